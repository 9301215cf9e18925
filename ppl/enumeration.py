"""All traces of a small program with their exact posterior: the reference for all kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ponder.program.generation import Generation, GenerationState
from ponder.protocols import Move, Traces

__all__ = ["MAX_TRACES", "check_enumerable", "enumerate_traces", "replay"]

MAX_TRACES = 1 << 17
"""Most token sequences, V^T, that are enumerated."""


def check_enumerable(program: Generation) -> None:
    """Refuse a program that is no `Generation` or has too many traces.

    Raises:
        TypeError, ValueError: with the number of sequences and the limit.
    """
    if not isinstance(program, Generation):
        raise TypeError(f"program: expected a ponder.Generation, got {type(program).__name__}")
    if program.num_prompts is not None:
        raise TypeError(f"program: expected one prompt, got {program.num_prompts}; enumerate them one by one")
    v, t = program.lm.vocab_size, program.max_new_tokens
    if t * np.log(v) > np.log(MAX_TRACES):
        raise ValueError(
            f"program: {v} tokens to the power of {t} steps is too many to enumerate (at most {MAX_TRACES} "
            "sequences); use ponder.inference.smc, or a smaller vocabulary or max_new_tokens"
        )


def replay(program: Generation, sequences: jax.Array) -> tuple[GenerationState, Move]:
    """Force token sequences through a program's own `propagate`; traceable.

    Args:
        program: of one prompt.
        sequences: int32[M, T]; what follows the end of a trace is not read.

    Returns:
        The state of M finished particles, and the moves that made them, an axis of `num_steps` in front.
    """
    m = sequences.shape[0]
    everyone = jnp.ones(m, bool)
    # A unit may look for tokens beyond the limit; they are never drawn.
    padded = jnp.pad(sequences, ((0, 0), (0, sequences.shape[1] + 1)))

    def forced(state: GenerationState, i: jax.Array) -> tuple[GenerationState, Move]:
        tokens = sequences[:, jnp.minimum(i, sequences.shape[1] - 1)]
        if program.unit is not None:
            columns = state.lengths[:, None] + jnp.arange(program.unit.max_tokens + 1)[None]
            tokens = jnp.take_along_axis(padded, columns, axis=1)
        move = Move(tokens, jnp.zeros(m))
        return program.propagate(jax.random.key(0), state, (everyone, move))[:2]

    state = program.init(jax.random.key(0), m)
    return jax.lax.scan(forced, state, jnp.arange(program.num_steps))


def enumerate_traces(program: Generation) -> Traces:
    """Return every trace that has positive density, once, with log p(x) and log Φ(x) on the host.

    Every token sequence of full length is replayed through the program's own `propagate`; those that end
    early differ only in what follows the end, so one of them is kept.

    Raises:
        TypeError, ValueError: the program is not enumerable, or a potential is NaN or +inf.
    """
    check_enumerable(program)
    v, t = program.lm.vocab_size, program.max_new_tokens
    sequences = np.stack(np.unravel_index(np.arange(v**t), (v,) * t), axis=1).astype(np.int32)

    read = jax.jit(lambda sequences: program.traces(replay(program, sequences)[0]))
    traces = jax.tree.map(np.asarray, read(sequences))
    beyond = np.arange(t)[None, :] >= traces.lengths[:, None]
    once = np.all((sequences == 0) | ~beyond, axis=1)
    wrong = once & (np.isnan(traces.log_potential) | (traces.log_potential == np.inf))
    if wrong.any():
        raise ValueError(
            f"potential: log Φ is NaN or +inf for {wrong.sum()} traces, for example tokens "
            f"{traces.tokens[wrong][0][: traces.lengths[wrong][0]].tolist()}"
        )
    keep = once & (traces.log_prior > -np.inf) & (traces.log_potential > -np.inf)
    return Traces(*(x[keep] for x in traces))
