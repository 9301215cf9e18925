"""Conditional SMC: N particles, of which the first retraces a given path. A sweep of it is a Markov kernel.

Target: π(x) ∝ p(x | prompt) Φ(x). Given a path from π, the path that a sweep draws at the end is from π
again: the sweep leaves π invariant, for any N >= 2 and any threshold of resampling.

It is SMC with multinomial resampling in which the retained path is replayed move by move in row 0. It gets
the weight of its prefix at each step, like every other particle, and its row descends from itself. With
ancestor sampling its future is joined at each resampling to the prefix of a particle, drawn in proportion to
w_n π(x_{1:t}^n, x'_{t+1:T}) / π_t(x_{1:t}^n); that costs a replay of the future in all rows.

References:
    Andrieu, Doucet and Holenstein (2010), Particle Markov chain Monte Carlo methods, section 4.3;
    Lindsten, Jordan and Schön (2014), Particle Gibbs with ancestor sampling, algorithm 3.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ponder.bases import BaseProgram
from ponder.inference.particles.ancestry import lineage, trace_back
from ponder.inference.particles.resampling import multinomial
from ponder.inference.particles.smc import SMC, Cost, SMCState, extend, is_due, resample
from ponder.inference.particles.weighting import log_mean, normalised
from ponder.inference.running.algorithm import Runnable
from ponder.inference.running.driver import complete
from ponder.models.pytrees import pytree, static
from ponder.protocols import Move, Traces

__all__ = ["ConditionalInfo", "ConditionalSMC", "Sweep", "sweep"]


class ConditionalInfo(NamedTuple):
    """What a step reports.

    Attributes:
        ess: float32[]; before resampling, in particles.
        resampled: bool[].
        ancestors: int32[N]; the identity where nothing was resampled.
        log_evidence: float32[]; log of the usual estimate. Given a path from π it is biased upwards.
        move: of every row.
        cost: tokens drawn anew, and forward passes.
        units: int32[]; steps taken: one, and those that were replayed to draw an ancestor.
        invalid: bool[]; some weight was NaN or +inf.
    """

    ess: jax.Array
    resampled: jax.Array
    ancestors: jax.Array
    log_evidence: jax.Array
    move: Move
    cost: Cost
    units: jax.Array
    invalid: jax.Array


@pytree
class ConditionalSMC(Runnable):
    """The steps of a sweep.

    Attributes:
        particles: SMC with multinomial resampling, of one prompt.
        path: moves of the retained path, an axis of `num_steps` in front; None: plain SMC.
        ancestor_sampling: whether the retained path may change its past at each resampling.
    """

    particles: SMC
    path: Move | None
    ancestor_sampling: bool = static()

    @property
    def program(self) -> BaseProgram:
        """What is being inferred."""
        return self.particles.program

    @property
    def num_steps(self) -> int:
        """Those of the program."""
        return self.program.num_steps

    def init(self, key: jax.Array) -> SMCState:
        """Return N empty traces."""
        return self.particles.init(key)

    def is_finished(self, state: SMCState) -> jax.Array:
        """See `SMC`."""
        return self.particles.is_finished(state)

    def step(self, key: jax.Array, state: SMCState) -> tuple[SMCState, ConditionalInfo]:
        """Extend, weigh and perhaps resample, with row 0 as the path has it."""
        n, path = self.particles.num_particles, self.path
        key_propagate, key_resample, key_ancestor = jax.random.split(key, 3)
        slots = jnp.arange(n, dtype=jnp.int32)
        forced = None if path is None else (slots == 0, _in_every_row(path, state.step, n))
        state, weighed, lengths, move = extend(self.particles, key_propagate, state, forced)
        drawn_anew = lengths if path is None else jnp.where(slots == 0, 0, lengths)

        # Resample
        due = is_due(self.particles, state, weighed)
        ancestors = multinomial(key_resample, state.log_weights, n)
        replay = _Replay(jnp.int32(0), jnp.int32(0), jnp.int32(0))
        if path is not None and self.ancestor_sampling:
            replay = jax.lax.cond(
                due, lambda: _draw_ancestor(self.program, key_ancestor, state, path), lambda: replay
            )
        if path is not None:
            ancestors = ancestors.at[0].set(replay.row)
        after, ancestors = resample(self.particles, state, due, ancestors, state.log_weights)
        return after, ConditionalInfo(
            ess=weighed.ess,
            resampled=due,
            ancestors=ancestors,
            log_evidence=weighed.log_evidence,
            move=move,
            cost=Cost(drawn_anew.sum(dtype=jnp.int32), lengths.max() + replay.calls),
            units=1 + replay.units,
            invalid=weighed.invalid,
        )


class Sweep(NamedTuple):
    """What a sweep gives.

    Attributes:
        moves: of the path that was drawn, an axis of `num_steps` in front.
        trace: that path, as `Traces` of one row.
        log_evidence: float32[]; see `ConditionalInfo`.
        ess: float32[num_steps]; 0 in steps that were not taken.
        cost: tokens drawn anew, and forward passes without the prompt's.
        units: int32[]; steps taken.
        invalid: bool[].
        degenerate: bool[]; no particle had weight, so that the retained path stayed.
    """

    moves: Move
    trace: Traces
    log_evidence: jax.Array
    ess: jax.Array
    cost: Cost
    units: jax.Array
    invalid: jax.Array
    degenerate: jax.Array


def sweep(algorithm: ConditionalSMC, key: jax.Array) -> Sweep:
    """Take all steps, and draw one of the final particles; traceable."""
    key_run, key_choice = jax.random.split(key)
    carry = complete(algorithm, key_run)
    state, history = carry.state, carry.history
    log_weights, degenerate = normalised(state.log_weights)
    row = jnp.where(degenerate, 0, multinomial(key_choice, log_weights, 1)[0])
    return Sweep(
        moves=trace_back(lineage(history.resampled, history.ancestors), history.move, row),
        trace=jax.tree.map(lambda x: x[row], algorithm.program.traces(state.particles)),
        log_evidence=state.log_evidence + log_mean(state.log_weights),
        ess=history.ess,
        cost=Cost(*(x.sum(dtype=jnp.int32) for x in history.cost)),
        units=history.units.sum(dtype=jnp.int32),
        invalid=history.invalid.any(),
        degenerate=degenerate,
    )


class _Replay(NamedTuple):
    """The row whose past the retained path takes, and what it cost to find: forward passes and steps."""

    row: jax.Array
    calls: jax.Array
    units: jax.Array


def _draw_ancestor(program: BaseProgram, key: jax.Array, state: SMCState, path: Move) -> _Replay:
    """Replay the rest of the path after every particle, and draw one of these."""
    n = state.log_weights.shape[0]
    key_replay, key_row = jax.random.split(key)
    lengths = path.lengths
    assert lengths is not None

    def goes_on(carry: tuple) -> jax.Array:
        step = carry[0]
        following = lengths[jnp.minimum(step, program.num_steps - 1)]
        return (step < program.num_steps) & (following > 0)

    def replay(carry: tuple) -> tuple:
        step, particles, log_future, calls = carry
        move = _in_every_row(path, step, n)
        waiting = ~program.is_done(particles)
        particles, made, log_increment = program.propagate(
            jax.random.fold_in(key_replay, step), particles, (jnp.ones(n, bool), move)
        )
        drawn = made.num_drawn(waiting)
        # log p + log Φ_t - log Φ_{t-1}: what the proposal would have drawn does not matter here.
        log_future = log_future + jnp.where(
            drawn == move.lengths, log_increment + made.log_proposal, -jnp.inf
        )
        return step + 1, particles, log_future, calls + drawn.max()

    carry = (state.step, state.particles, jnp.zeros(n, jnp.float32), jnp.int32(0))
    end, particles, log_future, calls = jax.lax.while_loop(goes_on, replay, carry)
    if program.withholds:
        particles, log_score = program.settle(particles, jnp.ones(n, bool))
        log_future = log_future + log_score
    # With another past the same future may stop short of the end, or run past the limit.
    possible = program.is_done(particles) & (state.log_weights > -jnp.inf) & ~jnp.isnan(log_future)
    log_joined = jnp.where(possible, state.log_weights + log_future, -jnp.inf)
    row = multinomial(key_row, log_joined, 1)[0]
    row = jnp.where((log_joined > -jnp.inf).any(), row, 0).astype(jnp.int32)
    return _Replay(row, calls, end - state.step)


def _in_every_row(path: Move, step: jax.Array, n: int) -> Move:
    """The path's move at a step, in every row."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x[step], (n, *x.shape[1:])), path)
