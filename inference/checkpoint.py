"""Checkpoints of a run: the state of the loop in one safetensors file, bound to the run that wrote it."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

__all__ = ["check_path", "fingerprint", "read", "remove", "write"]

Tree = TypeVar("Tree")

_RUN = "ponder_run"


def fingerprint(*trees: Any) -> str:
    """Digest of what decides a run.

    Arrays count by value, objects by their repr without addresses and their plain attributes, functions by
    their code and the plain values that they close over.
    """
    leaves, treedef = jax.tree.flatten(trees)
    digest = hashlib.sha256(_without_addresses(str(treedef)))
    for leaf in leaves:
        if isinstance(leaf, jax.Array | np.ndarray | np.generic):
            array = _to_numpy(leaf)
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
        else:
            digest.update(_without_addresses(repr(leaf)))
            digest.update(_content(leaf).encode())
    for static in _statics(treedef):
        for function in _functions(static):
            digest.update(_content(function).encode())
    return digest.hexdigest()


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
    arrays = {str(i): _to_numpy(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    path, partial = Path(path), _partial(path)
    try:
        save_file(arrays, partial, metadata={_RUN: run})
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
            found = (file.metadata() or {}).get(_RUN)
            arrays = [file.get_tensor(str(i)) for i in range(len(leaves))] if found == run else []
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read ({error}); delete it to start anew") from error
    if found != run:
        raise ValueError(
            f"checkpoint: {path} "
            + ("is no checkpoint" if found is None else "belongs to another program, settings or key")
            + "; delete it or choose another path"
        )
    return jax.tree.unflatten(treedef, [_from_numpy(x, y) for x, y in zip(arrays, leaves, strict=True)])


def remove(path: str | os.PathLike) -> None:
    """Delete a checkpoint that has served its purpose, and what a kill during a write left."""
    Path(path).unlink(missing_ok=True)
    _partial(path).unlink(missing_ok=True)


def _partial(path: str | os.PathLike) -> Path:
    # One name, so that interrupted writes do not pile up.
    return Path(path).with_name(f"{Path(path).name}.partial")


def _without_addresses(text: str) -> bytes:
    return re.sub(r" at 0x[0-9a-f]+", "", text).encode()


def _functions(value: Any) -> Iterator[Any]:
    """Functions in nested tuples and lists."""
    if inspect.isfunction(value):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _functions(item)


def _statics(treedef: Any) -> Iterator[Any]:
    """Static data of all nodes of a tree."""
    data = treedef.node_data()
    if data is not None:
        yield data[1]
        for child in treedef.children():
            yield from _statics(child)


def _content(value: Any) -> str:
    """Plain attributes of an object; code and plain closure of a function."""
    if inspect.isfunction(value):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"{value.__code__.co_code!r}{_plain(value.__code__.co_consts)}{_plain(cells)}"
    return _plain([*sorted(getattr(value, "__dict__", {}).items())])


def _plain(values: Iterable[Any]) -> str:
    """Numbers, strings and arrays among values; anything else may differ from process to process."""
    found = []
    for value in values:
        if value is None or isinstance(value, bool | int | float | str | bytes):
            found.append(repr(value))
        elif isinstance(value, jax.Array | np.ndarray):
            found.append(hashlib.sha256(_to_numpy(value).tobytes()).hexdigest())
        elif isinstance(value, tuple | list):
            found.append(f"({_plain(value)})")
    return ",".join(found)


def _to_numpy(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf, order="C")


def _from_numpy(array: np.ndarray, like: Any) -> jax.Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    return jnp.asarray(array, like.dtype)
