"""Compiling functions of arguments that mix arrays with other objects."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

__all__ = ["jit"]


class _Identity:
    """Hashes and compares an object by identity, and keeps it alive while it is a key."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value


def jit(fn: Callable, donate: tuple[int, ...] = ()) -> Callable:
    """Compile `fn(*args)`: arrays among the leaves of the arguments are traced, everything else is static.

    A leaf that is no array (a user's potential that is not a pytree, say) is a compile-time constant compared
    by identity; numbers, strings and None by value.

    Args:
        fn: positional arguments only.
        donate: positions of arguments whose buffers the result may reuse.
    """

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def compiled(static: tuple, kept: list, donated: list) -> Any:
        treedef, leaves, _ = static
        kept_arrays, donated_arrays = iter(kept), iter(donated)
        filled = [
            next(donated_arrays) if leaf is _DONATED else next(kept_arrays) if leaf is _KEPT else leaf.value
            for leaf in leaves
        ]
        return fn(*jax.tree.unflatten(treedef, filled))

    @functools.wraps(fn)
    def wrapper(*args: Any) -> Any:
        static, kept, donated = [], [], []
        # Inside another trace there is no buffer to give away.
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(args))
        for position, arg in enumerate(args):
            for leaf in jax.tree.leaves(arg):
                if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
                    static.append(_by_value(leaf))
                elif position in donate and not traced:
                    static.append(_DONATED)
                    donated.append(leaf)
                else:
                    static.append(_KEPT)
                    kept.append(leaf)
        treedef = jax.tree.structure(args)
        # JAX 0.10 takes the structures of two dataclasses for equal if their fields are: classes count too.
        return compiled((treedef, tuple(static), _classes(treedef)), kept, donated)

    return wrapper


def _classes(treedef: Any) -> tuple:
    """The class of every node, in order."""
    node = treedef.node_data()
    return () if node is None else (node[0], *(c for child in treedef.children() for c in _classes(child)))


_KEPT, _DONATED = "traced", "donated"


class _Value(_Identity):
    """Hashes and compares by value and type."""

    def __hash__(self) -> int:
        return hash(self.value)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Value) and type(self.value) is type(other.value) and self.value == other.value
        )


def _by_value(leaf: Any) -> _Identity:
    return _Value(leaf) if isinstance(leaf, bool | int | float | str) else _Identity(leaf)
