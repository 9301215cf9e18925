"""A digest of what decides a run, equal in every process that builds the same algorithm.

Arrays count by value, the rest by its structure and its repr: functions and other objects without a repr of
their own by their name alone. What that cannot see, such as the code of a function, a run can be told apart
by with a `run_id`.
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
    leaves, treedef = jax.tree.flatten(trees)
    digest = hashlib.sha256(_words(treedef))
    for leaf in leaves:
        if isinstance(leaf, jax.Array | np.ndarray | np.generic):
            array = to_numpy(leaf)
            digest.update(f"{leaf.dtype}{array.shape}".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
        else:
            digest.update(_words(leaf))
    return digest.hexdigest()


def to_numpy(leaf: Any) -> np.ndarray:
    """Return an array, or the data of PRNG keys, as contiguous NumPy array."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf, order="C")


def _words(value: Any) -> bytes:
    """The type and repr of a value; addresses differ between processes."""
    return _ADDRESS.sub("", f"{type(value).__qualname__} {value!r}").encode()
