"""Particle Gibbs: a Markov chain of traces, each drawn by a sweep of conditional SMC around the last one.

Target: π(x) ∝ p(x | prompt) Φ(x), invariant for every number of particles N >= 2; the draws are correlated,
and converge to π as the chain grows. A sweep costs about as much as SMC with N particles.

References:
    Andrieu, Doucet and Holenstein (2010), Particle Markov chain Monte Carlo methods, section 4.3;
    Lindsten, Jordan and Schön (2014), Particle Gibbs with ancestor sampling.
"""

from __future__ import annotations

import dataclasses
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from ponder.arguments import lacking
from ponder.host.errors import reraised
from ponder.inference.particles.conditional import Sweep, SweepInfo
from ponder.inference.particles.smc import read_traces
from ponder.inference.running import driver
from ponder.inference.running.static import jit
from ponder.posterior.posterior import Posterior, Stats
from ponder.protocols import Move, StateSpaceModel, Traces

__all__ = ["ParticleGibbsChain", "ParticleGibbsState", "particle_gibbs"]


class ParticleGibbsState(NamedTuple):
    """The retained path.

    Attributes:
        moves: its moves, an axis of `num_steps` in front.
        trace: what it says: `Traces` of one row.
    """

    moves: Move
    trace: Traces


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ParticleGibbsChain:
    """The algorithm that `particle_gibbs` builds; see `ponder.inference.Algorithm`."""

    sweep: Sweep
    num_sweeps: int = dataclasses.field(metadata={"static": True})
    warmup: int = dataclasses.field(metadata={"static": True})

    @property
    def program(self) -> StateSpaceModel:
        """What is being inferred."""
        return self.sweep.program

    def init(self, key: jax.Array) -> ParticleGibbsState:
        """Draw the first path by SMC."""
        return self._sweep(key, None)[0]

    def step(self, key: jax.Array, state: ParticleGibbsState) -> tuple[ParticleGibbsState, SweepInfo]:
        """Replace the retained path by one sweep around it."""
        return self._sweep(key, state.moves)

    def run(self, key: jax.Array) -> Posterior:
        """Run the chain; the posterior holds the `num_sweeps` draws after the warm-up, equally weighted."""
        driver.check_key(key)
        with reraised():
            posterior = jax.block_until_ready(_compiled_run(self, key))
        driver.warn(posterior)
        return posterior

    def _sweep(self, key: jax.Array, path: Move | None) -> tuple[ParticleGibbsState, SweepInfo]:
        end, moves, row = self.sweep.run(key, path)
        traces = read_traces(self.program, end.particles, self.sweep.num_particles)
        return ParticleGibbsState(moves, jax.tree.map(lambda x: x[row], traces)), end.info


def _run(chain: ParticleGibbsChain, key: jax.Array) -> Posterior:
    key_init, key_sweeps = jax.random.split(key)

    def sweep(state: ParticleGibbsState, i: jax.Array) -> tuple[ParticleGibbsState, Any]:
        after, info = chain.step(jax.random.fold_in(key_sweeps, i), state)
        moved = jnp.any(after.trace.tokens != state.trace.tokens) | (
            after.trace.lengths != state.trace.lengths
        )
        return after, (after.trace, info, moved)

    first, first_info = chain._sweep(key_init, None)
    sweeps = jnp.arange(chain.warmup + chain.num_sweeps)
    _, (traces, info, moved) = jax.lax.scan(sweep, first, sweeps)
    kept = jax.tree.map(lambda x: x[chain.warmup :], traces)
    judges = getattr(chain.program, "num_reward_models", 0)
    taken = info.units.sum() + first_info.units
    return Posterior(
        tokens=kept.tokens,
        lengths=kept.lengths,
        log_weights=jnp.full(chain.num_sweeps, -np.log(chain.num_sweeps), jnp.float32),
        log_evidence=jnp.float32(jnp.nan),
        log_prior=kept.log_prior,
        log_potential=kept.log_potential,
        stats=Stats(
            num_steps=jnp.int32(chain.warmup + chain.num_sweeps),
            acceptance=moved[chain.warmup :].mean(),
            tokens_generated=first_info.tokens + info.tokens.sum(),
            # The prompt's is read in every sweep.
            model_calls=first_info.calls + info.calls.sum() + 1 + len(sweeps),
            reward_calls=judges * taken if judges else None,
            degenerate=(kept.log_potential == -jnp.inf).any() | info.degenerate[-1],
            invalid=first_info.invalid | info.invalid.any(),
        ),
        tokenizer=getattr(chain.program, "tokenizer", None),
        method="particle_gibbs",
    )


_compiled_run = jit(_run)


def particle_gibbs(
    program: StateSpaceModel,
    num_particles: int = 16,
    num_sweeps: int = 32,
    warmup: int = 0,
    *,
    ancestor_sampling: bool = True,
    ess_threshold: float = 1.0,
) -> ParticleGibbsChain:
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
    if not isinstance(program, StateSpaceModel):
        raise TypeError("program: expected a StateSpaceModel, " + lacking(program, StateSpaceModel))
    if getattr(program, "num_prompts", None) is not None:
        raise TypeError("program: expected one prompt, got a batch; run particle Gibbs for each")
    least = {"num_particles": (num_particles, 2), "num_sweeps": (num_sweeps, 1), "warmup": (warmup, 0)}
    for name, (value, low) in least.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < low:
            raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
    if not isinstance(ancestor_sampling, bool):
        raise TypeError(f"ancestor_sampling: expected a bool, got {ancestor_sampling!r}")
    number = isinstance(ess_threshold, Real) and not isinstance(ess_threshold, bool)
    if not number or not 0 <= ess_threshold <= 1:
        raise ValueError(f"ess_threshold: expected a number in [0, 1], got {ess_threshold!r}")
    if ancestor_sampling and getattr(program, "proposal", None) == "rejection":
        raise ValueError(
            "ancestor_sampling: not possible with proposal='rejection', whose normaliser is an estimate "
            "given the past that a move was drawn with; pass ancestor_sampling=False"
        )
    sweep = Sweep(program, int(num_particles), float(ess_threshold), ancestor_sampling)
    return ParticleGibbsChain(sweep, int(num_sweeps), int(warmup))
