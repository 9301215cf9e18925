"""Who descends from whom: the ancestors that a run reports, walked back; traceable."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["count_discarded", "lineage", "trace_back"]


def lineage(resampled: jax.Array, ancestors: jax.Array) -> jax.Array:
    """Return the ancestors `int32[T, N]` of all steps; rows of steps that were not taken hold zeros."""
    own = jnp.arange(ancestors.shape[1], dtype=jnp.int32)
    return jnp.where(resampled[:, None], ancestors, own)


def count_discarded(ancestors: jax.Array, num_tokens: jax.Array, kept: jax.Array) -> jax.Array:
    """Count tokens that no particle of positive final weight descends from, walking the genealogy back.

    Args:
        ancestors: int32[T, N].
        num_tokens: int32[T, N].
        kept: bool[N]; the final particles with weight.
    """

    def back(kept: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        ancestors, num_tokens = row
        kept = jnp.zeros_like(kept).at[ancestors].max(kept)
        return kept, jnp.where(kept, 0, num_tokens).sum(dtype=jnp.int32)

    _, lost = jax.lax.scan(back, kept, (ancestors, num_tokens), reverse=True)
    return lost.sum(dtype=jnp.int32)


def trace_back(ancestors: jax.Array, moves: Any, row: jax.Array) -> Any:
    """Return the moves that led to a final row, an axis of steps in front like `ancestors` int32[T, N]."""

    def back(row: jax.Array, step: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        ancestors, moves = step
        row = ancestors[row]
        return row, jax.tree.map(lambda x: x[row], moves)

    return jax.lax.scan(back, row, (ancestors, moves), reverse=True)[1]
