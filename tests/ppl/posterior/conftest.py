import jax
import numpy as np
import pytest

import ponder
from ponder.models import PieceTokenizer
from ponder.posterior import Posterior, Stats


@pytest.fixture(scope="session")
def run(toy, scores):
    """A run of SMC that resamples, with 16 particles: one compilation serves all tests."""
    program = ponder.Generation(toy, [1, 2], max_new_tokens=4, potential=scores)
    return ponder.inference.smc(program, 16, ess_threshold=0.9).run(jax.random.key(0))


@pytest.fixture(scope="session")
def exact(toy):
    """The exact posterior of up to three tokens without evidence."""
    return ponder.inference.exact(ponder.Generation(toy, [1, 2], max_new_tokens=3)).run()


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
        log_weights = np.log(np.asarray(weights, np.float64)).astype(np.float32)
    posterior = Posterior(
        tokens=tokens,
        lengths=np.asarray(lengths, np.int32),
        log_weights=log_weights,
        log_evidence=np.float32(log_evidence),
        log_prior=np.zeros(n, np.float32),
        log_potential=np.zeros(n, np.float32),
        stats=Stats(**({"num_steps": np.int32(max(lengths))} | stats)),
        tokenizer=PieceTokenizer(pieces),
        method=method,
        origin=origin,
    )
    return jax.device_put(posterior)  # at once: JAX's own constructors compile for each shape
