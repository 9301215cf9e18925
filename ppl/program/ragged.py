"""Caches whose rows differ in length: some rows read a token while the others wait.

Between the ends of their steps particles do not advance together. A model with `extend_block` appends to some
rows and not to others; for one without, what the other rows had is put back.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp

from ponder.models.protocols import Cache, LanguageModel, RewardModel, capabilities

__all__ = ["check_ragged", "extend_rows", "hold_rows", "ragged_cache"]

Model = LanguageModel | RewardModel


def check_ragged(model: Model, name: str) -> None:
    """Refuse a model whose rows cannot wait for each other.

    Raises:
        TypeError: `model` has no `extend_block`, and an array of its cache has no axis of rows.
    """
    if not capabilities(model).blocks:
        missing = [axis for axis in jax.tree.leaves(_row_axes(model, 1)) if axis < 0]
        if missing:
            raise TypeError(
                f"{name}: a step unit needs a model with extend_block(cache, tokens[N, C], lengths[N]), or "
                f"a cache with the particles on an axis of every array; {type(model).__name__} has neither"
            )


def ragged_cache(model: Model, cache: Cache, num_rows: int) -> Cache:
    """Return a cache whose type `extend_rows` does not change: a length for each row, where it holds one."""
    has = capabilities(model)
    if not has.rewinds or not has.blocks:
        return cache
    return model.truncate(cache, jnp.zeros(num_rows, jnp.int32))  # pyright: ignore[reportAttributeAccessIssue]


def extend_rows(
    model: Model, cache: Cache, outputs: jax.Array, tokens: jax.Array, rows: jax.Array
) -> tuple[Cache, jax.Array]:
    """Append `tokens[N]` in the rows where `rows[N]` is true; the others keep their cache and outputs.

    Args:
        model: a language or reward model that `check_ragged` lets pass.
        cache: from `ragged_cache` or this function.
        outputs: what the model gave for each row last: logits float32[N, V], or scores float32[N].
        tokens: int32[N].
        rows: bool[N].
    """
    if capabilities(model).blocks:
        block = model.extend_block  # pyright: ignore[reportAttributeAccessIssue]
        cache, new = block(cache, tokens[:, None], rows.astype(jnp.int32))
        new = new[:, 0] if outputs.ndim == 2 else new
    else:
        extended, new = model.extend(cache, tokens)
        cache = hold_rows(model, extended, cache, rows)
    return cache, jnp.where(rows.reshape(-1, *(1,) * (outputs.ndim - 1)), new.astype(jnp.float32), outputs)


def hold_rows(model: Model, new: Cache, old: Cache, rows: jax.Array) -> Cache:
    """Take the rows of a new cache where `rows[N]` is true, of the old one elsewhere."""

    def select(axis: int, new: jax.Array, old: jax.Array) -> jax.Array:
        shape = [1] * new.ndim
        shape[axis] = rows.shape[0]
        return jnp.where(rows.reshape(shape), new, old)

    return jax.tree.map(select, _row_axes(model, rows.shape[0]), new, old)


def _row_axes(model: Model, num_rows: int) -> Any:
    """Which axis of each array of a cache is the particles': the one that grows with them, or -1."""

    def shapes(n: int) -> Any:
        return jax.eval_shape(lambda: model.prefill(jnp.zeros(1, jnp.int32), n, 1)[0])

    def axis(small: Any, large: Any) -> int:
        grown = [i for i, (a, b) in enumerate(zip(small.shape, large.shape, strict=True)) if a != b]
        return grown[0] if len(grown) == 1 else -1

    return cast("Any", jax.tree.map(axis, shapes(num_rows), shapes(num_rows + 1)))
