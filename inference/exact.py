"""The exact posterior and evidence, by enumeration: for tiny vocabularies, and to check everything else."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ponder.enumeration import check_enumerable, enumerate_traces
from ponder.host.errors import reraised
from ponder.posterior.posterior import Posterior, Stats
from ponder.program.generation import Generation

__all__ = ["Exact", "exact"]


class ExactInfo(NamedTuple):
    """Nothing to report: the step is exact."""


@dataclasses.dataclass(frozen=True, eq=False)
class Exact:
    """The algorithm that `exact` builds: its one step enumerates every trace."""

    program: Generation

    def init(self, key: jax.Array) -> None:
        """There is no state before the step, and nothing is random."""

    def step(self, key: jax.Array, state: Any) -> tuple[Posterior, ExactInfo]:
        """Enumerate; outside jit, because the number of traces depends on the values."""
        with reraised():
            traces = enumerate_traces(self.program)
        if not len(traces.tokens):
            raise ValueError("program: no trace has positive density p(x) Φ(x), so there is no posterior")
        joint = traces.log_prior.astype(np.float64) + traces.log_potential
        log_evidence = np.logaddexp.reduce(joint)
        posterior = Posterior(
            tokens=jnp.asarray(traces.tokens),
            lengths=jnp.asarray(traces.lengths),
            log_weights=jnp.asarray(joint - log_evidence, jnp.float32),
            log_evidence=jnp.asarray(log_evidence, jnp.float32),
            log_prior=jnp.asarray(traces.log_prior),
            log_potential=jnp.asarray(traces.log_potential),
            stats=Stats(num_steps=jnp.int32(self.program.num_steps)),
            tokenizer=self.program.tokenizer,
            method="exact",
        )
        return posterior, ExactInfo()

    def run(self, key: jax.Array | None = None) -> Posterior:
        """Return every trace of positive density with its exact weight, and the exact evidence."""
        del key
        return self.step(jax.random.key(0), None)[0]


def exact(program: Generation) -> Exact:
    """Build enumeration of all V^T traces.

    Raises:
        TypeError, ValueError: the program is not enumerable; the message gives its size and the limit.
    """
    check_enumerable(program)
    return Exact(program)
