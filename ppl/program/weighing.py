"""What was drawn is weighed: log Φ of each row, and the incremental weight of its move."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ponder.bases import BasePotential

__all__ = ["checked", "log_increment", "weigh"]


def weigh(
    potential: BasePotential | None, state: Any, rows: jax.Array, ends: jax.Array, closes: bool = True
) -> tuple[Any, jax.Array]:
    """Return the potential's state and log Φ[N]: of the complete trace where it ends, else of the prefix.

    Args:
        potential: the program's; None is Φ = 1.
        state: its state.
        rows: bool[N]; the rows that are weighed; the others mean nothing.
        ends: bool[N]; of these, the ones whose trace has ended.
        closes: whether a unit has ended in these rows, and not merely a candidate is looked at.
    """
    if potential is None:
        return None, jnp.zeros(rows.shape, jnp.float32)
    if closes:
        state = potential.commit(state, rows)
    # A branch, since judging complete traces may call the host.
    complete = jax.lax.cond(
        ends.any(),
        lambda state: checked("potential.log_complete", potential.judge(state, ends), rows.shape),
        lambda _: jnp.zeros(rows.shape, jnp.float32),
        state,
    )
    prefix = checked("potential.log_prefix", potential.judge_prefix(state, rows & ~ends), rows.shape)
    return state, jnp.where(ends, complete, prefix)


def log_increment(
    log_p: jax.Array, log_q: jax.Array, stuck: jax.Array, before: jax.Array, after: jax.Array
) -> jax.Array:
    """Return the incremental log weight, log p - log q + log Φ_t - log Φ_{t-1}, each float32[N].

    `stuck[N]`: rows whose proposal has no mass cannot go on; a NaN has to show.
    """
    # Of a proposal that is NaN any token may come, also one that is impossible.
    impossible = ((log_p == -jnp.inf) | (after == -jnp.inf) | stuck) & ~jnp.isnan(log_q)
    # The factor that a trace of weight zero already has stays; -inf - -inf would be NaN.
    dead = (before == -jnp.inf) | impossible
    return jnp.where(dead, -jnp.inf, log_p - log_q + after - before)


def checked(name: str, value: Any, shape: tuple[int, ...]) -> jax.Array:
    """Return what a user's function gave as float32.

    Raises:
        TypeError: `value` holds something else than real numbers.
        ValueError: it is of another shape.
    """
    array = jnp.asarray(value)
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: expected real numbers (natural logs), got dtype {array.dtype}")
    return array.astype(jnp.float32)
