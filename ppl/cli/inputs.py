"""What the command line is given beside its options: stdin, files, escapes in an argument. Needs typer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

__all__ = ["STDIN", "SampleCommand", "from_stdin", "read_prompt", "read_text", "unescaped"]

STDIN = "-"

_ONCE = ("regex", "json_schema", "grammar", "power", "json", "plot", "save")
_OPTION = re.compile(r"--[a-z][a-z-]*(=.*)?", re.DOTALL)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[ntr\\])")
_CHARACTERS = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


class SampleCommand(TyperCommand):
    """Refuses evidence and files that are given twice, of which parsing would keep the last.

    A prompt that begins with a dash, and so looks like an option, gets a hint.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, after a first look at the order in which the options came."""
        try:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        except Exception as error:
            # By its attributes: typer may have a click of its own.
            name = getattr(error, "option_name", None)
            prompt = next((arg for arg in args if name and arg.startswith(name)), None)
            if prompt is not None and not _OPTION.fullmatch(prompt):
                error.message = (  # pyright: ignore[reportAttributeAccessIssue]
                    f"No such option: {name}. A prompt that begins with a dash comes last, after --:  "
                    "ponder sample [OPTIONS] -- PROMPT"
                )
            raise
        for param in order:
            if param.name in _ONCE and order.count(param) > 1:
                more = "" if param.name in ("json", "plot", "save") else "; two are not combined"
                raise typer.BadParameter(
                    f"expected once, got it {order.count(param)} times{more}",
                    ctx,
                    param_hint=param.opts[0],
                )
        return super().parse_args(ctx, args)


def unescaped(text: str) -> str:
    r"""Read `\n`, `\t`, `\r`, `\\`, `\x0a` and `\u000a`; any other backslash stands for itself."""

    def character(match: re.Match[str]) -> str:
        code = match[1]
        return _CHARACTERS.get(code) or chr(int(code[1:], 16))

    return _ESCAPE.sub(character, text)


def from_stdin(given: dict[str, Any]) -> None:
    """Refuse that several arguments are to be read from stdin; `given` has their values by option."""
    reads = [option for option, value in given.items() if str(value) == STDIN]
    if len(reads) > 1:
        raise typer.BadParameter(f"stdin is already read for {reads[0]}", param_hint=reads[1])


def read_prompt(prompt: str) -> str:
    """Return the prompt; "-" stands for stdin, without the line break at its end."""
    if prompt != STDIN:
        return prompt
    text = _stdin("PROMPT")
    return text.removesuffix("\n").removesuffix("\r")


def read_text(option: str, path: Path | None) -> str | None:
    """Return the text of a file that an option names; "-" stands for stdin."""
    if path is None:
        return None
    if str(path) == STDIN:
        return _stdin(option)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}", param_hint=option) from error


def _stdin(option: str) -> str:
    try:
        return typer.get_binary_stream("stdin").read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"cannot read stdin: {error}", param_hint=option) from error
