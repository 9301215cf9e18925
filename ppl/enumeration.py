"""All traces of a small program with their exact posterior: the reference for all kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ponder.program.generation import Generation
from ponder.program.state import GenerationState
from ponder.protocols import Move, Traces

__all__ = ["MAX_TRACES", "check_enumerable", "enumerate_traces", "judge_sequences", "replay", "with_density"]

MAX_TRACES = 1 << 17
"""Most token sequences, V^T, that are enumerated."""


def check_enumerable(program: Generation) -> None:
    """Refuse a program that is no `Generation` or has too many traces.

    Raises:
        TypeError: `program` is another kind of program, or has several prompts.
        ValueError: it has more than `MAX_TRACES` token sequences.
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
            columns = state.lengths[:, None] + jnp.arange(program.unit.max_tokens + 1, dtype=jnp.int32)[None]
            tokens = jnp.take_along_axis(padded, columns, axis=1)
        move = Move(tokens, jnp.zeros(m, jnp.float32))
        return program.propagate(jax.random.key(0), state, (everyone, move))[:2]

    state = program.init(jax.random.key(0), m)
    return jax.lax.scan(forced, state, jnp.arange(program.num_steps, dtype=jnp.int32))


def judge_sequences(program: Generation, numbers: jax.Array) -> tuple[Traces, jax.Array]:
    """Replay some of the V^T token sequences of full length, by their numbers int32[M]; traceable.

    Those that end early differ only in what follows the end, so that one of them counts.

    Returns:
        The M traces, and which of them count, bool[M]; numbers beyond the last sequence do not.
    """
    v, t = program.lm.vocab_size, program.max_new_tokens
    powers = jnp.asarray(v ** np.arange(t - 1, -1, -1), jnp.int32)
    sequences = (numbers[:, None] // powers[None]) % v
    traces = program.traces(replay(program, sequences)[0])
    beyond = jnp.arange(t, dtype=jnp.int32)[None, :] >= traces.lengths[:, None]
    return traces, jnp.all((sequences == 0) | ~beyond, axis=1) & (numbers < v**t)


def with_density(traces: Traces, counts: jax.Array) -> Traces:
    """Return the traces that count and have positive density, on the host.

    Raises:
        ValueError: a potential is NaN or +inf.
    """
    traces, once = jax.tree.map(np.asarray, (traces, counts))
    wrong = once & (np.isnan(traces.log_potential) | (traces.log_potential == np.inf))
    if wrong.any():
        raise ValueError(
            f"potential: log Φ is NaN or +inf for {wrong.sum()} traces, for example tokens "
            f"{traces.tokens[wrong][0][: traces.lengths[wrong][0]].tolist()}"
        )
    keep = once & (traces.log_prior > -np.inf) & (traces.log_potential > -np.inf)
    return Traces(*(x[keep] for x in traces))


def enumerate_traces(program: Generation) -> Traces:
    """Return every trace that has positive density, once, with log p(x) and log Φ(x), on the host.

    Raises:
        TypeError: `program` is no `Generation` of one prompt.
        ValueError: it has more than `MAX_TRACES` token sequences, or its potential is NaN or +inf for one.
    """
    check_enumerable(program)
    numbers = jnp.arange(program.lm.vocab_size**program.max_new_tokens, dtype=jnp.int32)
    return with_density(*jax.jit(lambda numbers: judge_sequences(program, numbers))(numbers))
