"""Potential that turns the prior p into p^α, over whole traces.

References:
    Karan and Du (2025), Reasoning with sampling: your base model is smarter than you think, arXiv:2510.14901.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ponder.models.pytrees import pytree
from ponder.potentials.combining import Composable

__all__ = ["Power", "PowerState", "power"]


class PowerState(NamedTuple):
    """`log_prior` float32[N] of the trace; `next_log_prior` float32[N, V] between `observe` and `update`."""

    log_prior: jax.Array
    next_log_prior: jax.Array | None


@pytree
class Power(Composable):
    """Φ(x) = p(x)^(α-1), so that the target is p^α over whole traces.

    This is not sampling at temperature 1/α: the locally optimal proposal is the tempered next token, and the
    weights Σ_v p(v|x)^α account for how much of p^α lies ahead.
    """

    alpha: Any

    def init(self, num_particles: int) -> PowerState:
        """See `Potential`."""
        return PowerState(jnp.zeros(num_particles, jnp.float32), None)

    def observe(self, state: PowerState, log_prior: jax.Array) -> PowerState:
        """Keep the prior of the next token until `update` knows which one it is."""
        return state._replace(next_log_prior=log_prior)

    def update(self, state: PowerState, tokens: jax.Array, active: jax.Array) -> PowerState:
        """See `Potential`."""
        step = jnp.take_along_axis(self._next(state), tokens[:, None], axis=1)[:, 0]
        return PowerState(state.log_prior + jnp.where(active, step, 0.0), None)

    def log_prefix(self, state: PowerState) -> jax.Array:
        """See `Potential`."""
        return self._raise(state.log_prior)

    def log_complete(self, state: PowerState) -> jax.Array:
        """See `Potential`."""
        return self._raise(state.log_prior)

    def token_logits(self, state: PowerState) -> jax.Array:
        """See `Potential`."""
        return self._raise(self._next(state))

    def complete_logits(self, state: PowerState) -> jax.Array:
        """See `BasePotential`."""
        return self.token_logits(state)

    def _raise(self, log_prior: jax.Array) -> jax.Array:
        # Where p = 0 the target is 0, for α < 1 too: there Φ is infinite, but no trace goes that way.
        return jnp.where(log_prior == -jnp.inf, -jnp.inf, (self.alpha - 1.0) * log_prior)

    def _next(self, state: PowerState) -> jax.Array:
        if state.next_log_prior is None:
            raise ValueError("power: the prior was not observed; call observe(state, log_prior) every step")
        return state.next_log_prior


def power(alpha: float) -> Power:
    """Target p(x)^alpha, globally over traces rather than token by token.

    Args:
        alpha: > 0; above 1 sharpens, below 1 flattens, 1 changes nothing. May be a traced scalar.

    Raises:
        ValueError: `alpha` is not a finite number above 0.
    """
    traced = isinstance(alpha, Tracer)
    number = isinstance(alpha, int | float | np.generic | np.ndarray | jax.Array)
    if not traced and not (number and np.all((np.asarray(alpha) > 0) & (np.asarray(alpha) < np.inf))):
        raise ValueError(f"alpha: expected a finite number > 0, got {alpha!r}")
    return Power(jnp.asarray(alpha, jnp.float32))
