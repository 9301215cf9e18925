"""Words for errors about files that cannot be trusted: one line, and short whatever the file holds."""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["check_messages", "damage_named", "errors_name", "quoted"]


def quoted(value: object, limit: int = 100) -> str:
    """Return `repr(value)` with the end cut off where it is longer than `limit`."""
    text = repr(value[:limit] if isinstance(value, str | bytes | list) and len(value) > limit else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_messages(messages: Any) -> None:
    """Refuse what is no sequence of chat messages, with a TypeError."""
    if isinstance(messages, (str, Mapping)) or not all(
        isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages
    ):
        raise TypeError(f"messages: expected dicts with 'role' and 'content', got {messages!r}.")


@contextlib.contextmanager
def damage_named(what: str) -> Iterator[None]:
    """Turn whatever foreign code raises over bad input into a ValueError of one line that begins with `what`.

    The Rust libraries raise plain exceptions and, where they have a bug, panics beyond `Exception`.
    """
    try:
        yield
    except (NotImplementedError, ImportError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        # What these say about themselves may be a bare key: `KeyError: 'type'` tells more than `'type'`.
        kind = "" if type(error) in (ValueError, Exception) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{textwrap.shorten(str(error), 300)}") from error


@contextlib.contextmanager
def errors_name(file: str) -> Iterator[None]:
    """Put a file name, or a path in quotes, before a ValueError or NotImplementedError that lacks it."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        if file in str(error):
            raise
        kind = NotImplementedError if isinstance(error, NotImplementedError) else ValueError
        raise kind(f"{file if os.path.basename(file) == file else repr(file)}: {error}") from error
