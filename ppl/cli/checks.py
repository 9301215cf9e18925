"""Checks of command line options, before anything is loaded. Needs typer."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

import ponder
from ponder.cli.settings import EVIDENCE, METHODS, STDOUT, Outputs, Settings

__all__ = [
    "Failure",
    "attempt",
    "check_output",
    "check_outputs",
    "check_settings",
    "in_range",
]

_FORMATS = {"plot": (".png", ".pdf", ".svg"), "save": (".safetensors",)}


class Failure(Exception):
    """An error to report to the user in one line, without a traceback."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def in_range(option: str, value: float, low: int, high: int | None = None) -> None:
    """Refuse a number outside its range."""
    # Not typer's own ranges: their messages do not tell what came.
    if not (low <= value and (high is None or value <= high)):
        expected = f">= {low}" if high is None else f"from {low} to {high}"
        raise typer.BadParameter(f"expected a number {expected}, got {value}", param_hint=option)


def attempt(option: str, make: Callable[[], Any]) -> None:
    """Call the library, and turn its refusal into that of an option."""
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


def check_settings(settings: Settings) -> None:
    """Refuse option values that no model could make good, in the words of the library."""
    from ponder.inference.particles.resampling import by_name
    from ponder.program.prompt_forms import plain
    from ponder.program.sampling import PriorSettings
    from ponder.program.stop import sort_stops

    if not settings.prompt:
        raise typer.BadParameter("expected some text, got an empty string", param_hint="PROMPT")
    attempt("PROMPT", lambda: plain(settings.prompt))
    in_range("--particles", settings.particles, 1)
    in_range("--max-new-tokens", settings.max_new_tokens, 1)
    in_range("--seed", settings.seed, 0, 2**32 - 1)
    if settings.ess_threshold is not None:
        in_range("--ess-threshold", settings.ess_threshold, 0, 1)
    if settings.method not in METHODS:
        raise typer.BadParameter(
            f"expected one of {', '.join(METHODS)}, got {settings.method!r}", param_hint="--method"
        )
    for name in ("resampling", "ess_threshold"):
        if getattr(settings, name) is not None and name not in METHODS[settings.method].options:
            raise typer.BadParameter(
                f"{settings.method} has no such setting", param_hint=f"--{name.replace('_', '-')}"
            )
    attempt("--temperature", lambda: PriorSettings(settings.temperature))
    if (scheme := settings.resampling) is not None:
        attempt("--resampling", lambda: by_name(scheme))
    attempt("--stop", lambda: sort_stops(settings.stop, 1, "stop"))
    if settings.cut_stop and not settings.stop:
        raise typer.BadParameter("there is no --stop to cut off", param_hint="--cut-stop")
    # A model of single bytes can write anything, so that only the option itself can be at fault.
    for name, make in EVIDENCE.items():
        value = getattr(settings, name)
        if value is not None:
            # A grammar keeps a row of all the tokens, and does not look further ahead than one of them.
            context = ponder.Context(_byte_model(), 16 if name == "grammar" else 2**30)
            option = f"--{name.replace('_', '-')}"
            attempt(option, lambda make=make, value=value, context=context: make(value).bind(context))


def check_outputs(outputs: Outputs) -> None:
    """Refuse files that could not be written, or that would take each other's place."""
    for name, path in outputs._asdict().items():
        if name == "json" and path == STDOUT:
            continue
        check_output(f"--{name}", path, _FORMATS.get(name, ()))
    given = [(name, path.resolve()) for name, path in outputs._asdict().items() if path is not None]
    for (name, path), (other, other_path) in itertools.combinations(given, 2):
        if path == other_path:
            raise typer.BadParameter(f"the same file as --{name}: {path}", param_hint=f"--{other}")


def _byte_model() -> Any:
    """Return a tiny model whose tokens are the 256 bytes, to try patterns on."""
    import jax.numpy as jnp

    from ponder.models import PieceTokenizer, TableLM

    pieces = (*(bytes([byte]) for byte in range(256)), b"")
    table = jnp.zeros((257, 257), jnp.float32)
    return TableLM(table, eos_token_ids=(256,), tokenizer=PieceTokenizer(pieces))
