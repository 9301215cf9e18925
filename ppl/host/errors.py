"""Errors of Python functions that compiled code calls, brought back to whoever started the computation.

XLA reports whatever a host callback raises as a `JaxRuntimeError` that holds only text. `guarded(fn)` puts
the exception aside under a number that it writes into that text, and `reraised()` around the computation
looks the number up and raises the exception itself. So nothing has to be known of threads: the callback may
run in any of them, and of two runs that fail at once each finds its own error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import re
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import jax

__all__ = ["guarded", "reraised"]

# Errors that nobody has fetched, by number: of computations outside `reraised`, or of callbacks that failed
# side by side, of which XLA reports one. Bounded, since each keeps the frames of its traceback alive.
_CAPACITY = 16
_pending: OrderedDict[str, BaseException] = OrderedDict()
_lock = threading.Lock()
_numbers = itertools.count(1)

_MARK = re.compile(r"\[ponder: host error (\d+)\]")


class _HostError(RuntimeError):
    """What XLA gets to see: the traceback of the error, for its text, and the number."""


def guarded(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function for `jax.pure_callback`, so that `reraised` can raise what it raised."""
    return _Guarded(fn)


@contextlib.contextmanager
def reraised() -> Iterator[None]:
    """Raise the exception of a guarded callback in place of the `JaxRuntimeError` that reports it.

    The `JaxRuntimeError` becomes its context. The computation must have ended inside: block on a result.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        original = _fetch(str(error))
        if original is None:
            raise
        # Not `from error`: that would replace a cause that the function gave itself.
        raise original  # noqa: B904


@dataclasses.dataclass(frozen=True)
class _Guarded:
    """Equal where the functions are: JAX keeps what it compiled for a callback by its value."""

    fn: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        try:
            return self.fn(*args)
        except BaseException as error:  # an interrupt too: inside compiled code it would be lost
            _hush_jax()
            raise _HostError(_put_aside(error)) from None


def _put_aside(error: BaseException) -> str:
    """Keep an error; return the text that tells of it."""
    number = str(next(_numbers))
    with _lock:
        _pending[number] = error
        while len(_pending) > _CAPACITY:
            _pending.popitem(last=False)
    return f"{''.join(traceback.format_exception(error))}[ponder: host error {number}]"


def _fetch(text: str) -> BaseException | None:
    # The last mark: an error's own text comes before it.
    numbers = _MARK.findall(text)
    with _lock:
        return _pending.pop(numbers[-1], None) if numbers else None


def _hush_jax() -> None:
    """Keep JAX from logging the traceback of a `_HostError`: the exception that is raised has it."""
    logger = logging.getLogger("jax._src.callback")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], _HostError))
