"""Weights of particles: how a step updates them, and the evidence estimate that they give."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ponder.inference.particles.resampling import effective_sample_size

__all__ = ["Weighed", "log_mean", "normalised", "proper", "reweight"]


class Weighed(NamedTuple):
    """Particles after a step; several prompts are a leading axis.

    Attributes:
        log_weights: float32[N]; since the last resampling, not normalised.
        log_evidence: float32[]; log of the estimate.
        ess: float32[]; effective sample size, in particles.
        invalid: bool[]; a particle that had weight got NaN or +inf.
    """

    log_weights: jax.Array
    log_evidence: jax.Array
    ess: jax.Array
    invalid: jax.Array


def proper(log_increment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Give NaN and +inf weight zero; return the increments, and which were NaN or +inf."""
    wrong = jnp.isnan(log_increment) | (log_increment == jnp.inf)
    return jnp.where(wrong, -jnp.inf, log_increment), wrong


def reweight(log_weights: jax.Array, log_increment: jax.Array, log_evidence: jax.Array) -> Weighed:
    """Multiply the weights of particles.

    Args:
        log_weights: float32[..., N]; what has weight zero keeps it.
        log_increment: float32[..., N]; NaN and +inf count as weight zero, and set `invalid`.
        log_evidence: float32[...]; log of the estimate at the last resampling.
    """
    alive = log_weights > -jnp.inf
    log_increment, wrong = proper(log_increment.astype(log_weights.dtype))
    log_weights = jnp.where(alive, log_weights + log_increment, -jnp.inf)
    return Weighed(
        log_weights,
        log_evidence + log_mean(log_weights),
        effective_sample_size(log_weights),
        (wrong & alive).any(axis=-1),
    )


def log_mean(log_weights: jax.Array) -> jax.Array:
    """Return the log of the mean weight, float32[...], of `log_weights[..., N]`: a factor of the evidence."""
    return jax.nn.logsumexp(log_weights, axis=-1) - math.log(log_weights.shape[-1])


def normalised(log_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return log weights `[N]` whose weights sum to 1, and whether none had weight: all are then equal."""
    n = log_weights.shape[0]
    total = jax.nn.logsumexp(log_weights)
    degenerate = total == -jnp.inf
    uniform = jnp.full(n, -math.log(n), jnp.float32)
    return jnp.where(degenerate, uniform, log_weights - jnp.where(degenerate, 0.0, total)), degenerate
