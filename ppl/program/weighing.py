"""What was drawn is weighed: log Φ of each row, and the incremental weight of its move."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ponder.bases import BasePotential, log_values

__all__ = ["Judgement", "checked", "log_increment", "weigh"]


class Judgement(NamedTuple):
    """What a potential says of some rows.

    Attributes:
        potential: its state.
        log_potential: float32[N]; log Φ of the complete trace where it ends, else of the prefix, as far as it
            is weighed at once.
        withheld: float32[N]; what `weigh` was given, and the rest of log Φ of those that end; None: none is
            kept apart.
    """

    potential: Any
    log_potential: jax.Array
    withheld: jax.Array | None


def weigh(
    potential: BasePotential | None,
    state: Any,
    rows: jax.Array,
    ends: jax.Array,
    *,
    closes: bool = True,
    withheld: jax.Array | None = None,
) -> Judgement:
    """Ask a potential for its value of each row.

    Args:
        potential: the program's; None is Φ = 1.
        state: its state.
        rows: bool[N]; the rows that are weighed; the others mean nothing.
        ends: bool[N]; of these, the ones whose trace has ended.
        closes: whether a unit has ended in these rows, and not merely a candidate is looked at.
        withheld: float32[N]; terminal scores that are kept apart; None: they are weighed at once.
    """
    nothing = jnp.zeros(rows.shape, jnp.float32)
    if potential is None:
        return Judgement(None, nothing, withheld)
    if closes:
        state = potential.commit(state, rows)

    def complete(state: Any) -> tuple[jax.Array, jax.Array]:
        name = "potential.log_complete"
        if withheld is None:
            return checked(name, potential.judge(state, ends), rows.shape), nothing
        at_once, later = potential.judge_apart(state, ends)
        return checked(name, at_once, rows.shape), checked(name, later, rows.shape)

    # A branch, since judging complete traces may call the host.
    at_once, later = jax.lax.cond(ends.any(), complete, lambda _: (nothing, nothing), state)
    prefix = checked("potential.log_prefix", potential.judge_prefix(state, rows & ~ends), rows.shape)
    log_potential = jnp.where(ends, at_once, prefix)
    if withheld is not None:
        withheld = withheld + jnp.where(ends & (log_potential > -jnp.inf), later, 0.0)
    return Judgement(state, log_potential, withheld)


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
    if jnp.shape(value) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {jnp.shape(value)}")
    return log_values(name, value)
