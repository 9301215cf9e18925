"""One step of reasoning of every particle: tokens are drawn until each has reached the end of its step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ponder.program.proposing import fold_in, propose
from ponder.program.ragged import extend_rows
from ponder.program.state import GenerationState, Program
from ponder.program.step import CompiledStep
from ponder.program.weighing import log_increment, weigh
from ponder.protocols import Move

__all__ = ["propagate_step"]


class _Unfinished(NamedTuple):
    """Carry of the loop over tokens.

    A row is in one of these states; what it is in after a token decides whether it reads it:

    | state | running | reached | ends | impossible | the token is read |
    |---|---|---|---|---|---|
    | in the middle of its step | yes | no | no | no | yes |
    | its step has ended, its trace goes on | no | yes | no | no | yes |
    | at the limit of steps, with `force_eos`: EOS is still to come | yes | yes | no | no | yes |
    | its trace has ended | no | either | yes | no | no |
    | drew what has no probability, or could not draw | no | either | either | yes | no |
    | was finished before this step | no | no | no | no | no |

    Attributes:
        i: int32[]; tokens drawn in this step by the rows that still run.
        state: the program's.
        running: bool[N]; rows that draw another token.
        ends: bool[N]; rows whose trace has ended in this step.
        impossible: bool[N]; rows that drew what has no probability, or could not draw.
        delimiter: int32[N]; progress through the delimiter.
        reached: bool[N]; the step has its delimiter or its most tokens.
        tokens: int32[N, W]; the tokens of this step, padded.
        lengths: int32[N]; how many.
        log_p: float32[N]; log probability of the step under the prior.
        log_q: float32[N]; under the proposal.
    """

    i: jax.Array
    state: GenerationState
    running: jax.Array
    ends: jax.Array
    impossible: jax.Array
    delimiter: jax.Array
    reached: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    log_p: jax.Array
    log_q: jax.Array


def propagate_step(
    program: Program,
    unit: CompiledStep,
    key: jax.Array,
    state: GenerationState,
    forced: tuple[jax.Array, Move] | None,
) -> tuple[GenerationState, Move, jax.Array]:
    """Draw one step a particle, read it and weigh it; see `StateSpaceModel.propagate`.

    Rows that have reached the end of their step wait for the others; they cost their place in the batch.
    """
    # A trace of weight zero stays so: it need not keep the others waiting.
    active = ~state.done & (state.log_potential > -jnp.inf)
    end = jax.lax.while_loop(
        lambda c: c.running.any(),
        lambda c: _draw_token(program, unit, key, forced, c),
        _begin(program, unit, state, active),
    )
    log_q = end.log_q
    if forced is not None:
        mask, move = forced
        if program.proposal == "rejection":  # its normalisers were estimates: the recorded ones
            log_q = jnp.where(mask, move.log_proposal, log_q)
    judged = weigh(program.potential, end.state.potential, active, end.ends, withheld=state.withheld)
    impossible = end.impossible
    if forced is not None and forced[1].lengths is not None:
        # A row for which these tokens are not one step could not have made the move.
        impossible |= active & forced[0] & (end.lengths != forced[1].lengths)
    log_potential = jnp.where(impossible, -jnp.inf, judged.log_potential)
    log_weight = log_increment(end.log_p, log_q, impossible, state.log_potential, log_potential)
    after = end.state._replace(
        done=state.done | end.ends,
        potential=judged.potential,
        log_potential=jnp.where(active, log_potential, state.log_potential),
        withheld=judged.withheld,
        step=state.step + 1,
    )
    move = Move(end.tokens, jnp.where(active, log_q, 0.0), end.lengths)
    return after, move, jnp.where(active, log_weight, 0.0)


def _begin(program: Program, unit: CompiledStep, state: GenerationState, active: jax.Array) -> _Unfinished:
    n = active.shape[0]
    width = unit.max_tokens + (program.overflow == "force_eos")  # the EOS of a trace cut after its last step
    nothing, zero = jnp.zeros(n, bool), jnp.zeros(n, jnp.float32)
    return _Unfinished(
        i=jnp.int32(0),
        state=state,
        running=active,
        ends=nothing,
        impossible=nothing,
        delimiter=unit.delimiter.init(n),
        reached=nothing,
        tokens=jnp.full((n, width), program.padding, jnp.int32),
        lengths=jnp.zeros(n, jnp.int32),
        log_p=zero,
        log_q=zero,
    )


def _draw_token(
    program: Program,
    unit: CompiledStep,
    key: jax.Array,
    forced: tuple[jax.Array, Move] | None,
    c: _Unfinished,
) -> _Unfinished:
    """Draw a token in the rows that run, and read it where the trace goes on."""
    state = c.state
    n, capacity = state.tokens.shape
    forces_end = program.overflow == "force_eos"
    last_step = state.step == unit.max_steps - 1
    cut = c.reached if forces_end else jnp.broadcast_to(c.i == unit.max_tokens - 1, (n,))
    last = (state.lengths == capacity - 1) | (last_step & cut)
    replay = None
    if forced is not None:
        mask, move = forced
        replay = (mask, jax.lax.dynamic_index_in_dim(move.tokens, c.i, axis=1, keepdims=False), None)
    drawn = propose(program, fold_in(program, key, c.i), state, c.running, last, replay)

    delimiter = jnp.where(c.running, unit.delimiter.advance(c.delimiter, drawn.tokens), c.delimiter)
    reached = c.running & (unit.delimiter.is_stopped(delimiter) | (c.i >= unit.max_tokens - 1))
    ends = drawn.ends if forces_end else drawn.ends | (last_step & reached)
    impossible = c.running & (drawn.stuck | (drawn.log_p == -jnp.inf))
    pauses = reached & ~last_step if forces_end else reached
    reads = c.running & ~ends & ~impossible

    def read(_: Any, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        return extend_rows(program.lm, *carry, drawn.tokens, reads)

    # No trip where nothing is read; the carry of a loop is updated in place.
    trips = jnp.where(reads.any(), 1, 0)
    cache, logits = jax.lax.fori_loop(0, trips, read, (state.cache, state.logits))
    column = jnp.where(c.running, state.lengths, capacity)  # past the end: not written
    state = state._replace(
        cache=cache,
        logits=logits,
        tokens=state.tokens.at[jnp.arange(n, dtype=jnp.int32), column].set(drawn.tokens, mode="drop"),
        lengths=state.lengths + c.running.astype(jnp.int32),
        stop=drawn.stop,
        potential=drawn.potential,
        log_prior=state.log_prior + drawn.log_p,
    )
    return _Unfinished(
        i=c.i + 1,
        state=state,
        running=reads & ~pauses,
        ends=c.ends | ends,
        impossible=c.impossible | impossible,
        delimiter=delimiter,
        reached=reached,
        tokens=jax.lax.dynamic_update_index_in_dim(c.tokens, drawn.tokens, c.i, axis=1),
        lengths=c.lengths + c.running.astype(jnp.int32),
        log_p=c.log_p + drawn.log_p,
        log_q=c.log_q + drawn.log_q,
    )
