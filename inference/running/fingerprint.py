"""A digest of what decides a run, equal in every process that builds the same algorithm.

Arrays count by value, the rest by its structure and its repr: functions by their name alone, other objects
without a repr of their own by their class and their attributes. What that cannot see, such as the code of a
function, a run can be told apart by with a `run_id`.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["fingerprint", "to_numpy"]

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def fingerprint(*trees: Any) -> str:
    """Return the digest of some pytrees."""
    digest = hashlib.sha256()
    _add(digest, trees)
    return digest.hexdigest()


def _add(digest: Any, tree: Any, looks_inside: bool = True) -> None:
    leaves, treedef = jax.tree.flatten(tree)
    digest.update(_words(treedef))
    for leaf in leaves:
        if isinstance(leaf, jax.Array | np.ndarray | np.generic):
            array = to_numpy(leaf)
            digest.update(f"{leaf.dtype}{array.shape}".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
            continue
        digest.update(_words(leaf))
        if looks_inside and type(leaf).__repr__ is object.__repr__ and hasattr(leaf, "__dict__"):
            _add(digest, vars(leaf), looks_inside=False)  # of what these hold, the names


def to_numpy(leaf: Any) -> np.ndarray:
    """Return an array, or the data of PRNG keys, as contiguous NumPy array."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf, order="C")


def _words(value: Any) -> bytes:
    """The type and repr of a value; addresses differ between processes."""
    return _ADDRESS.sub("", f"{type(value).__qualname__} {value!r}").encode()
