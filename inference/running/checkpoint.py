"""Checkpoints of a run: the state of the loop in one safetensors file, bound to the run that wrote it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ponder.inference.running.fingerprint import to_numpy
from ponder.posterior.saving import sync

__all__ = ["check_path", "read", "remove", "write"]

Tree = TypeVar("Tree")

_RUN = "ponder_run"
_SUM = "sha256"


def check_path(path: str | os.PathLike) -> None:
    """Refuse a path that could not be written, before any work is done."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"checkpoint: expected the path of a file, got {path!r}")
    folder = Path(path).absolute().parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(
            f"checkpoint: expected a file in a folder that exists and is writable, got {str(path)!r}"
        )


def write(path: str | os.PathLike, tree: Any, run: str) -> None:
    """Write the arrays of `tree`; the file appears under its name only when it is complete."""
    arrays = {str(i): to_numpy(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    path, partial = Path(path), _partial(path)
    try:
        save_file(arrays, partial, metadata={_RUN: run, _SUM: _checksum(arrays)})
        sync(partial)  # else the name may outlive a power cut, and the content not
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike, like: Tree, run: str) -> Tree | None:
    """Return the tree that was written, shaped as `like`; None where there is no file.

    Raises:
        ValueError: the file is no checkpoint, is damaged, or belongs to another run.
    """
    path = Path(path)
    if not path.exists():
        return None
    leaves, treedef = jax.tree.flatten(like)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            found = metadata.get(_RUN)
            arrays = {str(i): file.get_tensor(str(i)) for i in range(len(leaves))} if found == run else {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read ({error}); delete it to start anew") from error
    if found != run:
        raise ValueError(
            f"checkpoint: {path} "
            + ("is no checkpoint" if found is None else "belongs to another program, settings or key")
            + "; delete it or choose another path"
        )
    if metadata.get(_SUM) != _checksum(arrays):
        raise ValueError(f"checkpoint: {path} is damaged (its checksum is wrong); delete it to start anew")
    values = [_from_numpy(arrays[str(i)], leaf) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, values)


def remove(path: str | os.PathLike) -> None:
    """Delete a checkpoint that has served its purpose, and what a kill during a write left."""
    Path(path).unlink(missing_ok=True)
    _partial(path).unlink(missing_ok=True)


def _partial(path: str | os.PathLike) -> Path:
    # One name, so that interrupted writes do not pile up.
    return Path(path).with_name(f"{Path(path).name}.partial")


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _from_numpy(array: np.ndarray, like: Any) -> jax.Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    return jnp.asarray(array, like.dtype)
