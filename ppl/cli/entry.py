"""Entry point of the `ponder` command; the commands themselves are in `ponder.cli.app`.

Nothing heavy is imported before `main` has taken charge of Ctrl-C, so that it ends the command with one line
from the first moment on.
"""

from __future__ import annotations

import sys

from ponder.cli.interrupts import leave_if_interrupted, leave_on_interrupt

__all__ = ["main"]


def main() -> None:
    """Run the command line.

    The exit code is 0 for a posterior, 2 for input that is refused, 3 if every particle has weight zero,
    130 after Ctrl-C, and 1 for other failures.
    """
    leave_on_interrupt()
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
        leave_if_interrupted(end)
        raise
