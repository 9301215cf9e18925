import jax.numpy as jnp
import numpy as np
import pytest

from ponder.models import PieceTokenizer
from ponder.posterior import Posterior, Stats


@pytest.fixture(scope="session")
def make_posterior():
    """A function that builds a posterior of given token rows and weights."""
    return _make_posterior


def _make_posterior(rows, weights, pieces, *, method="smc", log_evidence=-1.5, origin="", **stats):
    """One token a trace if a row is an int; `num_steps` is T unless it is given."""
    rows = [np.atleast_1d(row) for row in rows]
    n, lengths = len(rows), [len(row) for row in rows]
    tokens = np.zeros((n, max(lengths)), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.asarray(weights, np.float64))
    return Posterior(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths, jnp.int32),
        log_weights=jnp.asarray(log_weights, jnp.float32),
        log_evidence=jnp.float32(log_evidence),
        log_prior=jnp.zeros(n, jnp.float32),
        log_potential=jnp.zeros(n, jnp.float32),
        stats=Stats(**({"num_steps": jnp.int32(max(lengths))} | stats)),
        tokenizer=PieceTokenizer(pieces),
        method=method,
        origin=origin,
    )
