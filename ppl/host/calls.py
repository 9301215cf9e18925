"""Calls of Python functions from compiled code that cannot wait for themselves.

JAX hands large arguments to a callback as copies that a thread of its pool still has to make. Where the pool
has one thread (a machine with one core), or all of them run callbacks, that thread is the one that waits, for
ever. Copies below about 100 KiB are made on the spot, so arguments go over in pieces.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from ponder.host.errors import guarded

__all__ = ["call_host"]

_PIECE_BYTES = 96 << 10


def call_host(fn: Callable[..., Any], shapes: Any, *args: Any) -> Any:
    """Call a function on the host from traced code, as `jax.pure_callback` does.

    Under vmap the runs come as leading axes of all arguments and results, so that they share one call.
    `host_errors.reraised` raises what the function raises.

    Args:
        fn: pure; of numpy arrays in the structure of `args`. Compared by equality for the compilation cache.
        shapes: pytree of `jax.ShapeDtypeStruct` (or arrays of that shape and dtype) of the results.
        args: pytrees of arrays.
    """
    leaves, treedef = jax.tree.flatten(args)

    @custom_vmap
    def call(*leaves: jax.Array) -> Any:
        host = _Joined(fn, treedef, tuple(leaf.shape for leaf in leaves))
        return jax.pure_callback(guarded(host), shapes, *map(_pieces, leaves))

    @call.def_vmap
    def _(axis_size: int, in_batched: list[bool], *leaves: jax.Array) -> tuple[Any, Any]:
        whole = [
            leaf if batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
            for leaf, batched in zip(leaves, in_batched, strict=True)
        ]
        wider = jax.tree.map(lambda x: jax.ShapeDtypeStruct((axis_size, *x.shape), x.dtype), shapes)
        out = call_host(fn, wider, *jax.tree.unflatten(treedef, whole))
        return out, jax.tree.map(lambda _: True, out)

    return call(*map(jnp.asarray, leaves))


@dataclasses.dataclass(frozen=True)
class _Joined:
    """The function of the pieces."""

    fn: Callable[..., Any]
    treedef: Any
    shapes: tuple[tuple[int, ...], ...]

    def __call__(self, *pieces: list[Any]) -> Any:
        leaves = [
            np.concatenate([np.asarray(part) for part in parts]).reshape(shape)
            for parts, shape in zip(pieces, self.shapes, strict=True)
        ]
        return self.fn(*jax.tree.unflatten(self.treedef, leaves))


def _pieces(array: jax.Array) -> list[jax.Array]:
    flat = array.reshape(-1)
    count = max(1, math.ceil(flat.size * flat.dtype.itemsize / _PIECE_BYTES))
    return jnp.array_split(flat, count)
