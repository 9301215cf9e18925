"""A cheap potential that makes weights uneven, so that a benchmark of SMC resamples."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import ponder

__all__ = ["NOISE"]


class _Noise(ponder.Composable):
    """Log Φ is the sum of sin(1.7 x_t) over the tokens; state float32[N]."""

    def init(self, num_particles: int) -> jax.Array:
        return jnp.zeros(num_particles, jnp.float32)

    def update(self, state: jax.Array, tokens: jax.Array, active: jax.Array) -> jax.Array:
        return state + jnp.where(active, jnp.sin(jnp.float32(1.7) * tokens.astype(jnp.float32)), 0.0)

    def log_complete(self, state: jax.Array) -> jax.Array:
        return state

    log_prefix = log_complete


NOISE = _Noise()  # one object, since programs with different ones compile anew
