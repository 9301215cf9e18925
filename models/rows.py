"""Copying particles: rows of a pytree continue from other rows, in place where that is possible."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

__all__ = ["fork_rows"]

Tree = TypeVar("Tree")


def fork_rows(tree: Tree, ancestors: jax.Array) -> Tree:
    """Let row n of every array in `tree` continue from what was row `ancestors[n]`.

    Where every source keeps its own row (as `ponder.inference.resampling.keep_survivors` lays ancestors
    out), only the overwritten rows are copied, in place; any other map takes a gather. Both are loops whose
    trip count is traced rather than branches, because XLA updates a loop's carry in place.
    """
    num_rows = ancestors.shape[0]
    moved = ancestors != jnp.arange(num_rows, dtype=ancestors.dtype)
    in_place = jnp.all(~moved[ancestors])
    targets = jnp.nonzero(moved, size=num_rows, fill_value=0)[0]

    def copy_row(i: jax.Array, tree: Tree) -> Tree:
        target = targets[i]
        source = ancestors[target]
        return jax.tree.map(
            lambda x: jax.lax.dynamic_update_index_in_dim(
                x, jax.lax.dynamic_index_in_dim(x, source, keepdims=False), target, 0
            ),
            tree,
        )

    tree = jax.lax.fori_loop(0, jnp.where(in_place, moved.sum(), 0), copy_row, tree)
    # A loop for each array: in one loop for all, the temporaries would be a second copy of the whole tree.
    trips = jnp.where(in_place, 0, 1)
    return jax.tree.map(lambda x: jax.lax.fori_loop(0, trips, lambda _, x: x[ancestors], x), tree)
