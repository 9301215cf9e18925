"""A digest of what decides a run, equal in every process that builds the same program.

Values count by their content, and what a program holds is followed to its ends: a function by its code, what
it closes over and the functions and classes that it names; an object by its class and attributes. Addresses,
the order of sets, file names and line numbers do not count. `docs/kernels.md`, "Long runs", says it for
users.
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import hashlib
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["fingerprint", "to_numpy"]

_MAX_DEPTH = 150
"""Nesting beyond it counts by type alone; also keeps below Python's own limit."""

_SCALARS = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented), range, slice)
_NATIVE = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
)
# What Python writes into classes by itself, partly with line numbers or in the order of a set.
_CLASS_NOISE = frozenset(
    "__dict__ __weakref__ __doc__ __module__ __qualname__ __annotations__ __abstractmethods__ _abc_impl "
    "__static_attributes__ __firstlineno__ __dataclass_fields__ __dataclass_params__ __match_args__ "
    "__parameters__ __orig_bases__ __protocol_attrs__ __annotate__ __annotate_func__".split()
)


def fingerprint(*trees: Any) -> str:
    """Return the digest of some pytrees, arrays among their leaves by value."""
    memo: dict[int, tuple[bytes, Any]] = {}
    return _digest(jax.tree.flatten(trees), memo, ()).hex()


def to_numpy(leaf: Any) -> np.ndarray:
    """Return an array, or the data of PRNG keys, as contiguous NumPy array."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf, order="C")


class _Content(NamedTuple):
    """What one value consists of: bytes of its own, and other values."""

    kind: str
    own: bytes = b""
    parts: Any = ()
    ordered: bool = True


def _digest(value: Any, memo: dict[int, tuple[bytes, Any]], path: tuple[int, ...]) -> bytes:
    """Hash a value with all that it holds.

    Args:
        value: anything.
        memo: digests by id; the values too, since the id of one that is gone may come again.
        path: ids of the values that lead here; one of them again is a cycle, told by how far up it is.
    """
    if type(value) in _SCALARS:
        return hashlib.sha256(f"{type(value).__name__} {value!r}".encode()).digest()
    if id(value) in memo:
        return memo[id(value)][0]
    if id(value) in path:
        return f"cycle {len(path) - path.index(id(value))}".encode()
    if len(path) >= _MAX_DEPTH:
        return f"deep {_name(type(value))}".encode()
    content = _content(value)
    found = [_digest(part, memo, (*path, id(value))) for part in content.parts]
    result = hashlib.sha256(f"{content.kind} {len(content.own)} {len(found)}\0".encode())
    result.update(content.own)
    for digest in found if content.ordered else sorted(found):
        result.update(len(digest).to_bytes(4) + digest)
    memo[id(value)] = result.digest(), value
    return result.digest()


def _content(value: Any) -> _Content:
    """Take one value apart."""
    kind = _name(type(value))
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = to_numpy(value)
        if array.dtype.hasobject:
            return _Content("objects", str(array.shape).encode(), array.ravel().tolist())
        # A PRNG key by its data: two kinds of key differ in their shape or dtype.
        bare = array.reshape(-1).view(np.uint8)
        return _Content("array", f"{value.dtype}{array.shape}".encode() + hashlib.sha256(bare.data).digest())
    if isinstance(value, jax.tree_util.PyTreeDef):
        return _Content("tree", str(value.num_nodes).encode(), (value.node_data(), *value.children()))
    if isinstance(value, dict | types.MappingProxyType):
        return _Content(kind, parts=[part for item in value.items() for part in item])
    if isinstance(value, set | frozenset):
        return _Content(kind, parts=value, ordered=False)
    if isinstance(value, tuple | list):
        return _Content(kind, parts=value)
    if isinstance(value, types.ModuleType):
        return _Content(kind, value.__name__.encode())
    if isinstance(value, type):
        return _class_content(value)
    return _callable_content(value) or _object_content(value)


def _callable_content(value: Any) -> _Content | None:
    """Take functions and what wraps them apart; None for anything else."""
    if isinstance(value, types.CodeType):
        counts = (value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags)
        own = b"".join((str(counts).encode(), value.co_code, value.co_exceptiontable))
        return _Content("code", own, (value.co_names, value.co_consts))
    if isinstance(value, types.FunctionType):
        attributes = sorted((k, v) for k, v in vars(value).items() if k != "__wrapped__")
        wrapped = getattr(value, "__wrapped__", None)
        cells = [_cell(cell) for cell in value.__closure__ or ()]
        named = _globals(value) if _is_users(value.__module__) else []
        code = value.__code__
        return _Content(
            "function",
            parts=(code, value.__defaults__, value.__kwdefaults__, cells, attributes, wrapped, named),
        )
    if isinstance(value, types.MethodType):
        return _Content("method", parts=(value.__func__, value.__self__))
    if isinstance(value, _NATIVE):
        owner = getattr(value, "__self__", None)
        module = owner if isinstance(owner, types.ModuleType) else None
        return _Content("native", value.__qualname__.encode(), (module or owner,))
    if isinstance(value, property):
        return _Content("property", parts=(value.fget, value.fset, value.fdel))
    if isinstance(value, staticmethod | classmethod):
        return _Content(type(value).__name__, parts=(value.__func__,))
    if isinstance(value, functools.partial):
        return _Content("partial", parts=(value.func, value.args, value.keywords))
    if isinstance(value, functools.cached_property):
        return _Content("property", parts=(value.func,))
    if _is_function(value):  # wrapped by jit or a cache
        return _Content(_name(type(value)), parts=(value.__wrapped__,))
    return None


def _class_content(cls: type) -> _Content:
    """Name of a class; of a user's own also its code and constants."""
    if not _is_users(cls.__module__):
        return _Content("class", _name(cls).encode())
    own = [(name, vars(cls)[name]) for name in sorted(vars(cls)) if name not in _CLASS_NOISE]
    return _Content("class", _name(cls).encode(), (cls.__bases__, own))


def _object_content(value: Any) -> _Content:
    """Class and attributes of an object.

    A dataclass counts by the fields that it is compared by; a cached property is the consequence of others.
    Of other people's objects (a tokenizer, the client of a server) only plain attributes count: what else is
    in there may be caches, connections and times.
    """
    cls = type(value)
    if dataclasses.is_dataclass(value):
        fields = [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value) if f.compare]
        return _Content("dataclass", parts=(cls, fields))
    if _is_installed(cls.__module__):
        plain = (*_SCALARS, jax.Array, np.ndarray, np.generic)
        found = [(k, v) for k, v in sorted(getattr(value, "__dict__", {}).items()) if isinstance(v, plain)]
        return _Content("foreign", parts=(cls, getattr(value, "__name__", None), found))
    try:
        # As pickle sees it: that knows slots, patterns and dates, and each class may have its own way.
        known = copyreg.dispatch_table.get(cls)
        reduced = value.__reduce_ex__(4) if known is None else known(value)
    except Exception:  # a lock, a file, a generator
        return _Content("opaque", parts=(cls,))
    if isinstance(reduced, str):
        return _Content("global", reduced.encode(), (cls,))
    make, args, state, items, pairs = cast("tuple[Any, ...]", (*reduced, None, None, None))[:5]
    if isinstance(state, dict):
        state = sorted((k, v) for k, v in state.items() if not _is_cached(cls, k))
    return _Content("object", parts=(cls, make, args, state, list(items or ()), list(pairs or ())))


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return "empty cell"


def _globals(function: types.FunctionType) -> list[tuple[str, Any]]:
    """Functions and classes that a function calls by a global name, also from the code inside it.

    Not the other globals: a flag of the script, a counter or a clock must not keep a run from going on.
    """
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    found = [(name, function.__globals__.get(name)) for name in sorted(names)]
    return [(name, value) for name, value in found if isinstance(value, type) or _is_function(value)]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_function(value: Any) -> bool:
    inner = getattr(value, "__wrapped__", value) if callable(value) and not isinstance(value, type) else None
    return isinstance(inner, types.FunctionType | types.BuiltinFunctionType)


def _is_cached(cls: type, name: str) -> bool:
    return isinstance(getattr(cls, name, None), functools.cached_property)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_users(module: str | None) -> bool:
    """Whether a module is neither ponder's, nor Python's, nor installed from somewhere."""
    top = (module or "").partition(".")[0]
    return top not in ("ponder", "builtins") and top not in sys.stdlib_module_names and not _is_installed(top)


def _is_installed(module: str | None) -> bool:
    """Whether a module lies where pip puts packages; ponder itself does not count."""
    top = (module or "").partition(".")[0]
    if top == "ponder":
        return False
    found = sys.modules.get(top)
    places = [getattr(found, "__file__", None) or "", *getattr(found, "__path__", ())]
    return any("site-packages" in place or "dist-packages" in place for place in places)
