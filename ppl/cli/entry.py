"""Entry point of the `ponder` command; the commands themselves are in `ponder.cli.app`.

Nothing heavy is imported before `main` has taken charge of Ctrl-C, so that it ends the command with one line
from the first moment on.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

__all__ = ["INTERRUPTED", "main", "unwind_on_interrupt"]

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells report it."""


def main() -> None:
    """Run the command line.

    The exit code is 0 for a posterior, 2 for input that is refused, 3 if every particle has weight zero,
    130 after Ctrl-C, and 1 for other failures.
    """
    # Where SIGINT is ignored (a background job), it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding lacks is shown as an escape: no crash after a long run.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        print("ponder: the command line needs typer and rich: pip install 'ponder-ppl[cli]'", file=sys.stderr)
        sys.exit(1)
    from ponder.cli.app import app

    try:
        app(prog_name="ponder")
    except BaseException as end:
        # By the handler too: compiled code turns an interrupt inside a callback into an error of its own.
        interrupted = isinstance(end, KeyboardInterrupt) or getattr(end, "code", None) == INTERRUPTED
        if interrupted or signal.getsignal(signal.SIGINT) is _leave_impatiently:
            _leave()
        raise


def unwind_on_interrupt() -> None:
    """From now on Ctrl-C removes temporary files and the progress line on its way; pressed again, it leaves.

    Until then it ends the process at once: there is nothing to remove yet, and an exception in the middle of
    an import might be swallowed there or come out as another error.
    """
    if signal.getsignal(signal.SIGINT) is _leave:
        sys.unraisablehook = _raise_again
        signal.signal(signal.SIGINT, _unwind)


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
