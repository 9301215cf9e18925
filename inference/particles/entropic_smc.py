"""Entropic particle filtering: resampling weights that are flattened while few particles hold the weight.

With a reward model that is overconfident after the first steps, a particle filter soon keeps the descendants
of very few. Here early resampling draws from the weights to the power β <= 1, and can look a step ahead.

Target: π(x) ∝ p(x | prompt) Φ(x), as for `smc`. With `corrected=True` a particle keeps the ratio of its
weight to its resampling weight, so that the evidence is unbiased at any number of particles. With
`corrected=False`, the published form, weights are reset after each resampling: a heuristic search without a
stated target, and its evidence is NaN.

References:
    Giannone et al. (2025), arXiv:2510.05825: 1/β_t = (N / ESS_t)(1 - t/T). The correction and the rule
    "target" are ours; it is the bisection of adaptive tempering (Jasra et al., 2011, Inference for
    Lévy-driven stochastic volatility models via adaptive SMC) applied to resampling.
    Look-ahead as an auxiliary particle filter: Pitt and Shephard (1999), Filtering via simulation.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from ponder.arguments import check_flag, check_share
from ponder.bases import BaseProgram
from ponder.inference.particles.resampling import Resampling, effective_sample_size
from ponder.inference.particles.smc import SMC, Cost, SMCState, build
from ponder.inference.particles.weighting import proper
from ponder.protocols import StateSpaceModel

__all__ = ["Annealing", "entropic_smc", "resampling_temperature"]

RULES = ("ess", "entropy", "target")

LEAST_POWER = 1e-6

FLOOR = 0.01
"""Least look-ahead factor, as a share of the mean: a particle with weight may never become impossible."""


def resampling_temperature(
    log_weights: jax.Array, progress: jax.Array, rule: str, below: float, until: float
) -> jax.Array:
    """Return the temperature 1/β >= 1 of the resampling weights, w^β, for each row of `log_weights[..., N]`.

    With e = ESS / N, H the entropy of the weights as a share of log N, and u the progress t / T: "ess":
    max(1, (1 - u) / e); "entropy": max(1, 1 / (H + (1 - H) u)); "target": the least temperature at
    which the ESS of w^β is `below` · N, or half of the particles that have weight. 1 unless e < `below`
    and u < `until`.
    """
    n = log_weights.shape[-1]
    share = effective_sample_size(log_weights) / n
    if rule == "target":
        temperature = 1 / _power_to_ess(log_weights, below * n)
    elif rule == "ess":
        temperature = (1 - progress) / jnp.maximum(share, 1 / n)
    else:
        log_p = jax.nn.log_softmax(log_weights, axis=-1)
        entropy = -jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0.0).sum(-1) / math.log(max(n, 2))
        temperature = 1 / jnp.maximum(entropy + (1 - entropy) * progress, 1 / n)
    anneal = (share > 0) & (share < below) & (progress < until)
    return jnp.where(anneal, jnp.maximum(temperature, 1.0), 1.0)


def _power_to_ess(log_weights: jax.Array, target: float) -> jax.Array:
    """Return the largest β in (0, 1] with ESS(w^β) >= target, by bisection, for each row of [..., N]."""
    alive = log_weights > -jnp.inf
    wanted = jnp.minimum(target, 0.5 * jnp.maximum(alive.sum(-1), 1).astype(jnp.float32))

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        powered = jnp.where(alive, middle[..., None] * log_weights, -jnp.inf)
        reached = effective_sample_size(powered) >= wanted
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    low = jnp.zeros(log_weights.shape[:-1], jnp.float32)
    low, _ = jax.lax.fori_loop(0, 24, halve, (low, jnp.ones_like(low)))
    return jnp.maximum(low, LEAST_POWER)


@dataclasses.dataclass(frozen=True)
class Annealing:
    """The auxiliary weights of entropic particle filtering; see `entropic_smc` for the fields."""

    rule: str
    below: float
    until: float
    lookahead: bool
    corrected: bool

    def __call__(self, key: jax.Array, program: BaseProgram, state: SMCState) -> tuple[jax.Array, Cost]:
        """Flatten the weights, and multiply them with the look-ahead weights of one simulated step."""
        progress = state.step.astype(jnp.float32) / program.num_steps
        temperature = resampling_temperature(state.log_weights, progress, self.rule, self.below, self.until)
        log_weights = state.log_weights / temperature[..., None]
        if not self.lookahead:
            nothing = jnp.zeros(temperature.shape, jnp.int32)
            return log_weights, Cost(nothing, nothing)
        log_ahead, cost = _look_ahead(key, program, state)
        return log_weights + log_ahead, cost


def _look_ahead(key: jax.Array, program: BaseProgram, state: SMCState) -> tuple[jax.Array, Cost]:
    """Log of the incremental weight of one simulated successor, not below `FLOOR` times the mean."""
    shape = state.log_weights.shape
    waiting = ~program.is_done(state.particles)
    _, move, log_increment = program.propagate(key, state.particles)
    num_tokens = move.num_drawn(waiting).reshape(shape)
    log_ahead, _ = proper(log_increment.reshape(shape))
    # The mean under the weights; where no successor has weight, there is nothing to compare with.
    log_mean = jax.nn.logsumexp(log_ahead + jax.nn.log_softmax(state.log_weights), axis=-1, keepdims=True)
    log_mean = jnp.where(jnp.isfinite(log_mean), log_mean, 0.0)
    cost = Cost(num_tokens.sum(-1, dtype=jnp.int32), num_tokens.max(-1))
    return jnp.maximum(log_ahead, log_mean + math.log(FLOOR)), cost


def entropic_smc(
    program: StateSpaceModel,
    num_particles: int = 32,
    resampling: str | Resampling = "systematic",
    ess_threshold: float = 1.0,
    *,
    rule: str = "ess",
    anneal_below: float = 0.5,
    anneal_until: float = 0.5,
    lookahead: bool = False,
    corrected: bool = True,
) -> SMC:
    """Build entropic particle filtering; its target and guarantees are in the module docstring.

    Args:
        program: `ponder.Generation` or any other `StateSpaceModel`. Its `num_steps` is T: with `ponder.Step`
            set `max_steps` to the steps that traces take, or t / T stays small.
        num_particles: N >= 1.
        resampling: see `smc`.
        ess_threshold: see `smc`; 1.0, as published, resamples at every step.
        rule: how resampling is annealed, "ess" (published), "entropy" or "target": see
            `resampling_temperature`. "target" flattens until the effective sample size is reached; the others
            follow a formula whose temperature is bounded, which is too little for a very sharp reward model.
        anneal_below: only where the effective sample size is below this share of N; with "target", up to it.
        anneal_until: only before this share of the steps.
        lookahead: multiply the resampling weights with the incremental weight of one simulated successor
            (look-ahead modulation), divided out afterwards. It costs about as much again.
        corrected: False is the published form.

    Raises:
        TypeError, ValueError: an argument is out of range or of the wrong kind.
    """
    algorithm = build(program, num_particles, resampling, ess_threshold, "entropic_smc")
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    weights = Annealing(
        rule,
        check_share("anneal_below", anneal_below),
        check_share("anneal_until", anneal_until),
        check_flag("lookahead", lookahead),
        check_flag("corrected", corrected),
    )
    return dataclasses.replace(algorithm, auxiliary=weights)
