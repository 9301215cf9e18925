"""Checks of command line options, before anything is loaded. Needs typer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

__all__ = ["attempt", "check_output", "in_range", "read_text"]


def in_range(option: str, value: float, low: int, high: int | None = None) -> None:
    """Refuse a number outside its range."""
    # Not typer's own ranges: their messages do not tell what came.
    if not (low <= value and (high is None or value <= high)):
        expected = f">= {low}" if high is None else f"from {low} to {high}"
        raise typer.BadParameter(f"expected a number {expected}, got {value}", param_hint=option)


def attempt(option: str, make: Callable[[], Any]) -> None:
    """Call the library, and turn its refusal into that of an option."""
    from ponder.cli.sample import Failure

    try:
        make()
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
    except ImportError as error:
        raise Failure(f"{option}: {error}") from error


def check_output(option: str, path: Path | None, formats: tuple[str, ...] = ()) -> None:
    """Refuse a file that could not be written when the work is done."""
    if path is None:
        return
    if formats and path.suffix.lower() not in formats:
        raise typer.BadParameter(
            f"expected a name that ends in {', '.join(formats)}, got {path}", param_hint=option
        )
    if path.exists() and not path.is_file():
        raise typer.BadParameter(f"expected a file, got a folder or device: {path}", param_hint=option)
    if not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist", param_hint=option)
    if path.exists() and not os.access(path, os.W_OK):
        raise typer.BadParameter(f"the file {path} is not writable", param_hint=option)
    if not os.access(path.parent, os.W_OK):
        raise typer.BadParameter(f"the folder {path.parent} is not writable", param_hint=option)


def read_text(option: str, path: Path | None) -> str | None:
    """Return the text of a file that an option names."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}", param_hint=option) from error
