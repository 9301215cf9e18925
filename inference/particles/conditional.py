"""One sweep of conditional SMC: N particles, of which the first retraces a given path.

Target: π(x) ∝ p(x | prompt) Φ(x). Given a path from π, the path that a sweep draws at the end is from π
again: the sweep is a Markov kernel that leaves π invariant, for any N >= 2 and any threshold of resampling.

The retained path is replayed move by move in slot 0 and gets the weight of its prefix at each step, like
every other particle; its slot always descends from itself. With ancestor sampling, its future is joined at
each resampling to the prefix of a particle, drawn in proportion to
w_n π(x_{1:t}^n, x'_{t+1:T}) / π_t(x_{1:t}^n); that costs a replay of the future in all rows.

References:
    Andrieu, Doucet and Holenstein (2010), Particle Markov chain Monte Carlo methods, section 4.3;
    Lindsten, Jordan and Schön (2014), Particle Gibbs with ancestor sampling, algorithm 3.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from ponder.inference.particles.resampling import effective_sample_size, multinomial
from ponder.protocols import Move, StateSpaceModel

__all__ = ["Sweep", "SweepInfo", "SweepState"]


class SweepInfo(NamedTuple):
    """What a sweep reported; S steps.

    Attributes:
        log_evidence: float32[]; log of the usual estimate. Given a path from π it is biased upwards.
        ess: float32[S]; before resampling, 0 in steps that were not taken.
        tokens: int32[]; drawn anew in the sweep.
        calls: int32[]; forward passes, the prompt's not included.
        units: int32[]; steps taken, those that were replayed to draw ancestors included.
        invalid: bool[]; some weight was NaN or +inf.
        degenerate: bool[]; no particle has weight.
    """

    log_evidence: jax.Array
    ess: jax.Array
    tokens: jax.Array
    calls: jax.Array
    units: jax.Array
    invalid: jax.Array
    degenerate: jax.Array


class SweepState(NamedTuple):
    """Carry of the loop over steps; S steps, N particles.

    Attributes:
        step: int32[]; steps taken.
        particles: the program's state.
        log_weights: float32[N]; since the last resampling.
        log_evidence: float32[]; at the last resampling.
        moves: of every row, an axis S in front.
        ancestors: int32[S, N].
        info: what is reported so far.
    """

    step: jax.Array
    particles: Any
    log_weights: jax.Array
    log_evidence: jax.Array
    moves: Move
    ancestors: jax.Array
    info: SweepInfo


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """Conditional SMC over a program with multinomial resampling.

    Attributes:
        program: any `StateSpaceModel` of one prompt.
        num_particles: N.
        ess_threshold: as for `smc`.
        ancestor_sampling: whether the retained path may change its past at each resampling.
    """

    program: StateSpaceModel
    num_particles: int = dataclasses.field(metadata={"static": True})
    ess_threshold: float = dataclasses.field(metadata={"static": True})
    ancestor_sampling: bool = dataclasses.field(metadata={"static": True})

    def run(self, key: jax.Array, path: Move | None) -> tuple[SweepState, Move, jax.Array]:
        """Take all steps, and draw one of the final particles.

        Args:
            key: of the sweep.
            path: moves of the retained path, an axis of `num_steps` in front; None: plain SMC.

        Returns:
            The final state, the moves of the drawn particle's path, and its row int32[].
        """
        key_init, key_steps, key_choice = jax.random.split(key, 3)
        start = self._start(key_init)
        end = jax.lax.while_loop(
            lambda s: (s.step < self.program.num_steps) & ~self._finished(s),
            lambda s: self._step(jax.random.fold_in(key_steps, s.step), s, path),
            start,
        )
        total = jax.nn.logsumexp(end.log_weights)
        info = end.info._replace(
            log_evidence=end.log_evidence + total - math.log(self.num_particles),
            degenerate=total == -jnp.inf,
        )
        # Where none has weight, the retained path stays.
        row = jnp.where(total == -jnp.inf, 0, multinomial(key_choice, end.log_weights, 1)[0])
        return end._replace(info=info), _trace_back(end, row), row

    def _start(self, key: jax.Array) -> SweepState:
        n, num_steps = self.num_particles, self.program.num_steps
        particles = self.program.init(key, n)
        move = jax.eval_shape(lambda s: self.program.propagate(key, s)[1], particles)
        if move.lengths is None:
            move = move._replace(lengths=jax.ShapeDtypeStruct((n,), jnp.int32))
        zero = jnp.int32(0)
        info = SweepInfo(
            jnp.float32(0), jnp.zeros(num_steps), zero, zero, zero, jnp.zeros((), bool), jnp.zeros((), bool)
        )
        return SweepState(
            step=zero,
            particles=particles,
            log_weights=jnp.zeros(n, jnp.float32),
            log_evidence=jnp.float32(0),
            moves=jax.tree.map(lambda x: jnp.zeros((num_steps, *x.shape), x.dtype), move),
            ancestors=jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (num_steps, n)),
            info=info,
        )

    def _finished(self, state: SweepState) -> jax.Array:
        return jnp.all(self.program.is_done(state.particles) | (state.log_weights == -jnp.inf))

    def _step(self, key: jax.Array, state: SweepState, path: Move | None) -> SweepState:
        n = self.num_particles
        slots = jnp.arange(n, dtype=jnp.int32)
        key_propagate, key_resample, key_ancestor = jax.random.split(key, 3)

        # Propagate
        forced = None if path is None else (slots == 0, _rows(path, state.step, n))
        waiting = ~self.program.is_done(state.particles)
        particles, move, log_increment = self.program.propagate(key_propagate, state.particles, forced)
        lengths = waiting.astype(jnp.int32) if move.lengths is None else move.lengths
        move = move._replace(lengths=lengths)

        # Weight
        alive = state.log_weights > -jnp.inf
        wrong = jnp.isnan(log_increment) | (log_increment == jnp.inf)
        log_weights = jnp.where(wrong | ~alive, -jnp.inf, state.log_weights + log_increment)
        log_evidence = state.log_evidence + jax.nn.logsumexp(log_weights) - math.log(n)
        ess = effective_sample_size(log_weights)
        drawn = lengths if path is None else jnp.where(slots == 0, 0, lengths)
        state = state._replace(
            step=state.step + 1,
            particles=particles,
            log_weights=log_weights,
            moves=jax.tree.map(lambda column, row: column.at[state.step].set(row), state.moves, move),
            info=state.info._replace(
                ess=state.info.ess.at[state.step].set(ess),
                tokens=state.info.tokens + drawn.sum(),
                calls=state.info.calls + lengths.max(),
                units=state.info.units + 1,
                invalid=state.info.invalid | (wrong & alive).any(),
            ),
        )

        # Resample
        due = ess < self.ess_threshold * n if self.ess_threshold < 1.0 else jnp.bool_(True)
        due &= ~self._finished(state)
        ancestors = multinomial(key_resample, log_weights, n)
        if path is not None:
            first = calls = units = jnp.int32(0)
            if self.ancestor_sampling:
                first, calls, units = jax.lax.cond(
                    due, self._draw_ancestor, lambda *_: (first, calls, units), key_ancestor, state, path
                )
            ancestors = ancestors.at[0].set(first)
            info = state.info._replace(calls=state.info.calls + calls, units=state.info.units + units)
            state = state._replace(info=info)
        ancestors = jnp.where(due, ancestors, slots)
        return state._replace(
            particles=self.program.fork(state.particles, ancestors),
            log_weights=jnp.where(due, 0.0, log_weights),
            log_evidence=jnp.where(due, log_evidence, state.log_evidence),
            ancestors=state.ancestors.at[state.step - 1].set(ancestors),
        )

    def _draw_ancestor(self, key: jax.Array, state: SweepState, path: Move) -> tuple[jax.Array, ...]:
        """Draw whose past the retained path takes; return the row, the forward passes and the steps."""
        n = self.num_particles
        lengths = path.lengths
        assert lengths is not None

        def goes_on(carry: tuple) -> jax.Array:
            step = carry[0]
            following = lengths[jnp.minimum(step, self.program.num_steps - 1)]
            return (step < self.program.num_steps) & (following > 0)

        def replay(carry: tuple) -> tuple:
            step, particles, log_future, calls = carry
            move = _rows(path, step, n)
            waiting = ~self.program.is_done(particles)
            particles, made, log_increment = self.program.propagate(
                jax.random.fold_in(key, step), particles, (jnp.ones(n, bool), move)
            )
            made_lengths = waiting.astype(jnp.int32) if made.lengths is None else made.lengths
            # log p + log Φ_t - log Φ_{t-1}: what the proposal would have drawn does not matter here.
            log_future = log_future + jnp.where(
                made_lengths == move.lengths, log_increment + made.log_proposal, -jnp.inf
            )
            return step + 1, particles, log_future, calls + made_lengths.max()

        carry = (state.step, state.particles, jnp.zeros(n, jnp.float32), jnp.int32(0))
        end, particles, log_future, calls = jax.lax.while_loop(goes_on, replay, carry)
        # With another past the same future may stop short of the end, or run past the limit.
        possible = self.program.is_done(particles) & (state.log_weights > -jnp.inf) & ~jnp.isnan(log_future)
        log_joined = jnp.where(possible, state.log_weights + log_future, -jnp.inf)
        row = multinomial(jax.random.fold_in(key, self.program.num_steps), log_joined, 1)[0]
        row = jnp.where((log_joined > -jnp.inf).any(), row, 0).astype(jnp.int32)
        return row, calls, end - state.step


def _rows(path: Move, step: jax.Array, n: int) -> Move:
    """The path's move at a step, in every row."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x[step], (n, *x.shape[1:])), path)


def _trace_back(state: SweepState, row: jax.Array) -> Move:
    """Moves that led to a final row, an axis of steps in front."""

    def back(row: jax.Array, step: tuple[jax.Array, Move]) -> tuple[jax.Array, Move]:
        ancestors, moves = step
        row = ancestors[row]
        return row, jax.tree.map(lambda x: x[row], moves)

    return jax.lax.scan(back, row, (state.ancestors, state.moves), reverse=True)[1]
