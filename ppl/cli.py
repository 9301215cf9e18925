"""Entry point of the `ponder` command; the commands themselves are in `ponder.cli_app`."""

from __future__ import annotations

import os
import sys

__all__ = ["INTERRUPTED", "main"]

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells report it."""


def main() -> None:
    """Run the command line; the exit code is 2 for bad options, 1 for a failure, 130 for Ctrl-C."""
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
    try:
        from ponder.cli_app import app

        app(prog_name="ponder")
    except KeyboardInterrupt:
        print("ponder: interrupted", file=sys.stderr)
        _leave_at_once()
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:
            _leave_at_once()
        raise


def _leave_at_once() -> None:
    """Exit without tearing down: JAX interrupted inside a compilation can crash the interpreter's exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)
