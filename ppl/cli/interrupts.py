"""Ctrl-C on the command line: one line on stderr and exit code 130, whatever the process was doing.

Imports nothing heavy, so that `ponder.cli.entry` can take charge before anything else is there.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

__all__ = ["INTERRUPTED", "leave_if_interrupted", "leave_on_interrupt", "unwind_on_interrupt"]

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells report it."""


def leave_on_interrupt() -> None:
    """From now on Ctrl-C ends the process at once."""
    # Where SIGINT is ignored (a background job), it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def unwind_on_interrupt() -> None:
    """From now on Ctrl-C removes temporary files and the progress line on its way; pressed again, it leaves.

    Until then it ends the process at once: there is nothing to remove yet, and an exception in the middle of
    an import might be swallowed there or come out as another error.
    """
    if signal.getsignal(signal.SIGINT) is _leave:
        sys.unraisablehook = _raise_again
        signal.signal(signal.SIGINT, _unwind)


def leave_if_interrupted(end: BaseException) -> None:
    """End the process if this is how an interrupt came out of the command line, else return."""
    # By the handler too: compiled code turns an interrupt inside a callback into an error of its own.
    interrupted = isinstance(end, KeyboardInterrupt) or getattr(end, "code", None) == INTERRUPTED
    if interrupted or signal.getsignal(signal.SIGINT) is _leave_impatiently:
        _leave()


def _raise_again(unraisable: Any) -> None:
    """Interrupt anew where Python swallowed an interrupt: a garbage collection callback or a destructor."""
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)
    elif hasattr(signal, "setitimer"):
        # Not from here, which is still inside what swallows it, but a moment later.
        signal.signal(signal.SIGALRM, _unwind)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        _leave()


def _unwind(*_: Any) -> NoReturn:
    signal.signal(signal.SIGINT, _leave_impatiently)
    raise KeyboardInterrupt


def _leave_impatiently(*_: Any) -> NoReturn:
    _leave()


def _leave(*_: Any) -> NoReturn:
    """Exit without tearing down: JAX interrupted inside a compilation can crash the interpreter's exit."""
    # Straight to the descriptor: this may run in the middle of another write. The code shows the cursor,
    # which a progress line hides.
    cursor = b"\x1b[?25h" if os.isatty(2) else b""
    os.write(2, cursor + b"ponder: interrupted\n")
    os._exit(INTERRUPTED)
