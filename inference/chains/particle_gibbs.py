"""Particle Gibbs: a Markov chain of traces, each drawn by a sweep of conditional SMC around the last one.

Target: π(x) ∝ p(x | prompt) Φ(x), invariant for every number of particles N >= 2; the draws are correlated,
and converge to π as the chain grows. A sweep costs about as much as SMC with N particles.

References:
    Andrieu, Doucet and Holenstein (2010), Particle Markov chain Monte Carlo methods, section 4.3;
    Lindsten, Jordan and Schön (2014), Particle Gibbs with ancestor sampling.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ponder.arguments import check_count, check_flag
from ponder.bases import BaseProgram
from ponder.inference.particles.conditional import ConditionalSMC, Sweep, sweep
from ponder.inference.particles.smc import SMC, Cost, build
from ponder.inference.running.algorithm import Runnable
from ponder.inference.running.progress import Progress, present_texts
from ponder.models.pytrees import pytree, static
from ponder.posterior.posterior import Posterior, Stats
from ponder.protocols import Move, StateSpaceModel, Traces

__all__ = ["ParticleGibbs", "ParticleGibbsInfo", "ParticleGibbsState", "particle_gibbs"]


class ParticleGibbsState(NamedTuple):
    """The retained path, and what the chain has cost so far.

    Attributes:
        moves: its moves, an axis of the program's `num_steps` in front.
        trace: that path, as `Traces` of one row.
        cost: tokens drawn, and forward passes with those of the prompt, which every sweep reads.
        units: int32[]; steps of particles.
        invalid: bool[]; some weight was NaN or +inf.
    """

    moves: Move
    trace: Traces
    cost: Cost
    units: jax.Array
    invalid: jax.Array


class ParticleGibbsInfo(NamedTuple):
    """What a sweep reports.

    Attributes:
        trace: the draw: `Traces` of one row.
        moved: bool[]; it differs from the last one.
        log_evidence: float32[]; log of the usual estimate. Given a path from π it is biased upwards.
        ess: float32[S]; after each step of the particles, 0 in steps that were not taken.
        degenerate: bool[]; no particle had weight.
    """

    trace: Traces
    moved: jax.Array
    log_evidence: jax.Array
    ess: jax.Array
    degenerate: jax.Array


@pytree
class ParticleGibbs(Runnable):
    """The algorithm that `particle_gibbs` builds; see `ponder.inference.Algorithm`."""

    particles: SMC
    num_sweeps: int = static()
    warmup: int = static()
    ancestor_sampling: bool = static()

    @property
    def program(self) -> BaseProgram:
        """What is being inferred."""
        return self.particles.program

    @property
    def num_steps(self) -> int:
        """All sweeps."""
        return self.warmup + self.num_sweeps

    def init(self, key: jax.Array) -> ParticleGibbsState:
        """Draw the first path by SMC."""
        first = self._sweep(key, None)
        return ParticleGibbsState(
            first.moves, first.trace, _with_prompt(first.cost), first.units, first.invalid
        )

    def step(self, key: jax.Array, state: ParticleGibbsState) -> tuple[ParticleGibbsState, ParticleGibbsInfo]:
        """Replace the retained path by one sweep around it."""
        found = self._sweep(key, state.moves)
        before, after = state.trace, found.trace
        moved = jnp.any(after.tokens != before.tokens) | (after.lengths != before.lengths)
        cost = jax.tree.map(jnp.add, state.cost, _with_prompt(found.cost))
        state = ParticleGibbsState(
            found.moves, after, cost, state.units + found.units, state.invalid | found.invalid
        )
        return state, ParticleGibbsInfo(after, moved, found.log_evidence, found.ess, found.degenerate)

    def _sweep(self, key: jax.Array, path: Move | None) -> Sweep:
        return sweep(ConditionalSMC(self.particles, path, self.ancestor_sampling), key)

    def finish(self, state: ParticleGibbsState, history: ParticleGibbsInfo) -> Posterior:
        """Weigh the draws after the warm-up equally."""
        kept = jax.tree.map(lambda x: x[self.warmup :], history)
        judges = self.program.num_reward_models
        return Posterior(
            tokens=kept.trace.tokens,
            lengths=kept.trace.lengths,
            log_weights=jnp.full(self.num_sweeps, -math.log(self.num_sweeps), jnp.float32),
            log_evidence=jnp.float32(jnp.nan),
            log_prior=kept.trace.log_prior,
            log_potential=kept.trace.log_potential,
            stats=Stats(
                num_steps=jnp.int32(self.num_steps),
                acceptance=kept.moved.mean(dtype=jnp.float32),
                tokens_generated=state.cost.tokens,
                model_calls=state.cost.calls,
                reward_calls=judges * state.units if judges else None,
                degenerate=(kept.trace.log_potential == -jnp.inf).any() | kept.degenerate[-1],
                invalid=state.invalid,
            ),
            tokenizer=self.program.tokenizer,
            method="particle_gibbs",
        )

    def progress(self, step: int, state: ParticleGibbsState, report: ParticleGibbsInfo) -> Progress:
        """See `Runnable`: steps are sweeps, and the effective sample size is the last sweep's mean."""
        taken = int((report.ess > 0).sum())
        n = self.particles.num_particles
        ess = float(report.ess.sum()) / max(taken, 1)
        texts = present_texts(self.program, lambda: state.trace, lambda x: x[None])
        return Progress(step, self.num_steps, n, n, ess, math.nan, texts)


def _with_prompt(cost: Cost) -> Cost:
    return cost._replace(calls=cost.calls + 1)


def particle_gibbs(
    program: StateSpaceModel,
    num_particles: int = 16,
    num_sweeps: int = 32,
    warmup: int = 0,
    *,
    ancestor_sampling: bool = True,
    ess_threshold: float = 1.0,
) -> ParticleGibbs:
    """Build particle Gibbs; its target and guarantees are in the module docstring.

    Args:
        program: `ponder.Generation` of one prompt, or any other `StateSpaceModel`.
        num_particles: N >= 2, the retained path included.
        num_sweeps: draws that are kept, one a sweep.
        warmup: sweeps before those.
        ancestor_sampling: let the retained path change its past too. It mixes much better where traces are
            long or N is small; at each step it replays the rest of the path in every row. Not with
            `proposal="rejection"`.
        ess_threshold: see `smc`; 1.0 resamples at every step. Resampling is multinomial.

    Returns:
        An algorithm whose posterior holds the kept draws, equally weighted; its `log_evidence` is NaN, its
        `stats.acceptance` the share of sweeps that changed the trace.

    Raises:
        TypeError, ValueError: an argument is out of range or of the wrong kind.
    """
    check_count("num_particles", num_particles, 2)
    particles = build(program, num_particles, "multinomial", ess_threshold, "particle_gibbs")
    if particles.program.num_prompts is not None:
        raise TypeError("program: expected one prompt, got a batch; run particle Gibbs for each")
    num_sweeps = check_count("num_sweeps", num_sweeps, 1)
    warmup = check_count("warmup", warmup, 0)
    check_flag("ancestor_sampling", ancestor_sampling)
    if ancestor_sampling and not particles.program.joins_pasts:
        raise ValueError(
            "ancestor_sampling: not possible with proposal='rejection', whose normaliser is an estimate "
            "given the past that a move was drawn with; pass ancestor_sampling=False"
        )
    return ParticleGibbs(particles, num_sweeps, warmup, ancestor_sampling)
