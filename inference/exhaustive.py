"""The exact posterior and evidence, by enumeration: for tiny vocabularies, and to check everything else.

Target: π(x) ∝ p(x | prompt) Φ(x), exactly. A step replays a block of the V^T token sequences.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ponder.enumeration import check_enumerable, judge_sequences, with_density
from ponder.inference.particles.weighting import normalised
from ponder.inference.running.algorithm import Runnable
from ponder.inference.running.progress import Progress, present_texts
from ponder.models.pytrees import pytree
from ponder.posterior.posterior import Posterior, Stats
from ponder.program.generation import Generation
from ponder.protocols import Traces

__all__ = ["Exact", "exact"]

BLOCK = 1 << 13
"""Most sequences that are replayed side by side."""


class ExactState(NamedTuple):
    """`done` int32[]: how many blocks of sequences have been replayed."""

    done: jax.Array


class ExactInfo(NamedTuple):
    """The traces of a block, and which of them count, `bool[M]`."""

    traces: Traces
    counts: jax.Array


@pytree
class Exact(Runnable):
    """The algorithm that `exact` builds; nothing in it is random."""

    program: Generation

    @property
    def num_steps(self) -> int:
        """Blocks of sequences."""
        return -(-self._num_sequences // BLOCK)

    @property
    def _num_sequences(self) -> int:
        return self.program.lm.vocab_size**self.program.max_new_tokens

    def init(self, key: jax.Array) -> ExactState:
        """Nothing has been replayed."""
        del key
        return ExactState(jnp.int32(0))

    def step(self, key: jax.Array, state: ExactState) -> tuple[ExactState, ExactInfo]:
        """Replay the next block."""
        del key
        block = jnp.arange(min(BLOCK, self._num_sequences), dtype=jnp.int32)
        traces, counts = judge_sequences(self.program, state.done * BLOCK + block)
        return ExactState(state.done + 1), ExactInfo(traces, counts)

    def finish(self, state: ExactState, history: ExactInfo) -> Posterior:
        """Weigh all sequences; those that do not count, or have density zero, have none."""
        del state
        traces, counts = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), history)
        joint = traces.log_prior + traces.log_potential
        wrong = jnp.isnan(joint) | (joint == jnp.inf)
        joint = jnp.where(counts & ~wrong, joint, -jnp.inf)
        log_weights, degenerate = normalised(joint)
        return Posterior(
            tokens=traces.tokens,
            lengths=traces.lengths,
            log_weights=log_weights,
            log_evidence=jax.nn.logsumexp(joint),
            log_prior=traces.log_prior,
            log_potential=traces.log_potential,
            stats=Stats(
                num_steps=jnp.int32(self.program.num_steps),
                degenerate=degenerate,
                invalid=(wrong & counts).any(),
            ),
            tokenizer=self.program.tokenizer,
            method="exact",
        )

    def run(self, key: jax.Array | None = None, **pauses: Any) -> Posterior:
        """Return every trace of positive density with its exact weight, and the exact evidence.

        The key, if there is one, decides nothing; see `Runnable.run` for the rest.
        """
        return super().run(jax.random.key(0) if key is None else key, **pauses)

    def conclude(self, posterior: Posterior) -> Posterior:
        """Keep the traces of positive density, and weigh them in float64.

        Raises:
            ValueError: there is none, or a potential is NaN or +inf.
        """
        if isinstance(posterior.tokens, Tracer):
            return posterior
        traces = Traces(posterior.tokens, posterior.lengths, posterior.log_prior, posterior.log_potential)
        traces = with_density(traces, posterior.log_weights > -jnp.inf)
        if not len(traces.tokens):
            raise ValueError("program: no trace has positive density p(x) Φ(x), so there is no posterior")
        joint = traces.log_prior.astype(np.float64) + traces.log_potential
        log_evidence = np.logaddexp.reduce(joint)
        return dataclasses.replace(
            posterior,
            **jax.tree.map(jnp.asarray, traces)._asdict(),
            log_weights=jnp.asarray(joint - log_evidence, jnp.float32),
            log_evidence=jnp.asarray(log_evidence, jnp.float32),
        )

    def progress(self, step: int, state: ExactState, report: ExactInfo) -> Progress:
        """See `Runnable`: the particles are sequences."""
        del state
        done, total = min(step * BLOCK, self._num_sequences), self._num_sequences
        texts = present_texts(self.program, lambda: with_density(report.traces, report.counts))
        return Progress(step, self.num_steps, done, total, float("nan"), float("nan"), texts)


def exact(program: Generation) -> Exact:
    """Build enumeration of all V^T traces.

    Raises:
        TypeError, ValueError: the program is not enumerable; the message gives its size and the limit.
    """
    check_enumerable(program)
    return Exact(program)
