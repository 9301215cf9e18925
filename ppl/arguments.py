"""Checks of arguments, and values put into words: what error messages and reprs are made of."""

from __future__ import annotations

from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "NAME_WIDTH",
    "check_count",
    "check_flag",
    "check_key",
    "check_share",
    "escape",
    "lacking",
    "shorten",
]

NAME_WIDTH = 200
"""Longest argument of a potential that its repr, and so a message, shows in full."""


def check_count(name: str, value: Any, least: int) -> int:
    """Return an integer that is at least `least`; a bool is none."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    return int(value)


def check_share(name: str, value: Any) -> float:
    """Return a number in [0, 1]."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """Return a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return value


def check_key(key: Any) -> jax.Array:
    """Return a single PRNG key, typed or raw."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    raw = isinstance(key, jax.Array) and key.shape == (2,) and key.dtype == jnp.uint32
    if not typed and not raw:
        raise TypeError(f"key: expected a single PRNG key (jax.random.key(0)), got {key!r}")
    return key


def lacking(value: Any, protocol: type) -> str:
    """Say what came instead of an object that follows a protocol, and what it lacks: the end of an error."""
    if isinstance(value, type):
        return f"got the class {value.__name__} itself and not an instance of it"
    members = sorted(name for name in dir(protocol) if not name.startswith("_"))
    missing = [name for name in members if not hasattr(value, name)]
    return f"got {type(value).__name__}, which has no {', '.join(missing)}"


def escape(text: str, keep: str = "") -> str:
    r"""Show line breaks and other unprintable characters as `\n`, `\x1b`, ...; those in `keep` stay."""
    return "".join(c if c in keep or c.isprintable() else _escaped(c) for c in text)


def shorten(text: str, width: int) -> str:
    """Cut the middle out of a text that is longer than `width` characters."""
    if len(text) <= width:
        return text
    tail = (width - 3) // 3
    return f"{text[: width - 3 - tail]} … {text[len(text) - tail :]}"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
