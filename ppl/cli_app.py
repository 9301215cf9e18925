"""The commands of `ponder`: their options, and the checks made before anything is loaded.

Needs typer. What is heavy is imported inside functions, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ponder.cli import INTERRUPTED

__all__ = ["app"]

_PLOT_FORMATS = (".png", ".pdf", ".svg")

# \b keeps the lines as they are.
_EXAMPLES = """\b
Examples:
  ponder sample "Name a colour of the rainbow."
  ponder sample "Today is " --no-chat --regex "[A-Z][a-z]+day"
  ponder sample "One line about the sea." --power 2 --plot sea.png
  ponder sample "1, 2, 3," --no-chat --stop 10 --json out.json
  ponder sample "Hello" --method importance_sampling --particles 64
"""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Treat LLM decoding as Bayesian inference: draw the posterior over texts.",
    epilog="Start with: ponder sample --help",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import ponder

        typer.echo(f"ponder {ponder.__version__}")
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog=_EXAMPLES)
def sample(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What the model is asked, or the text that it continues.")
    ],
    model: Annotated[
        str, typer.Option(help="Embedded model, local directory in hub format, .gguf file, or hub id.")
    ] = "smollm2-135m-instruct",
    method: Annotated[str, typer.Option(help="Kernel: smc or importance_sampling.")] = "smc",
    particles: Annotated[int, typer.Option(help="Traces drawn side by side.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Longest trace, in tokens.")] = 64,
    regex: Annotated[str | None, typer.Option(help="The text must match this pattern as a whole.")] = None,
    power: Annotated[
        float | None, typer.Option(help="Target p^power over whole texts; above 1 sharpens.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Temperature of the prior.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End a trace at this text; repeatable.")] = None,
    force_eos: Annotated[
        bool, typer.Option("--force-eos", help="Condition on ending in time, rather than cut long traces.")
    ] = False,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Prompt as a chat message, or as raw text.  [default: chat where the model can]",
        ),
    ] = None,
    resampling: Annotated[
        str | None, typer.Option(help="smc: multinomial, stratified, systematic or residual.")
    ] = None,
    ess_threshold: Annotated[
        float | None,
        typer.Option(help="smc: resample below this share of the sample size."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of the weights.  [default: float32]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all randomness.")] = 0,
    json: Annotated[Path | None, typer.Option(metavar="OUT", help="Write everything as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Draw the posterior: .png, .pdf or .svg.")
    ] = None,
) -> None:
    """Draw the posterior over answers to a prompt.

    Prints the traces, heaviest first, with their weights, the log evidence, the effective sample size and the
    speed. The prompt is a chat message where the model has a chat template, else the text to continue.
    """
    from ponder import cli_sample

    settings = cli_sample.Settings(
        prompt=prompt,
        model=model,
        method=method,
        particles=particles,
        max_new_tokens=max_new_tokens,
        regex=regex,
        power=power,
        temperature=temperature,
        stop=tuple(stop or ()),
        force_eos=force_eos,
        chat=chat,
        resampling=resampling,
        ess_threshold=ess_threshold,
        dtype=dtype,
        seed=seed,
    )
    try:
        _check(settings)
        _check_output("--json", json)
        _check_output("--plot", plot, _PLOT_FORMATS)
        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise cli_sample.Failure("--plot needs matplotlib: pip install 'ponder-ppl[plot]'")
        cli_sample.run(settings, json, plot)
    except cli_sample.Failure as failure:
        typer.echo(f"Error: {failure}", err=True)
        raise typer.Exit(failure.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("ponder: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _check(settings: Any) -> None:
    """Refuse option values that no model could make good, in the words of the library."""
    import ponder
    from ponder.cli_sample import METHODS, byte_model
    from ponder.inference.resampling import by_name
    from ponder.sampling import PriorSettings

    if not settings.prompt:
        raise typer.BadParameter("expected some text, got an empty string", param_hint="PROMPT")
    _in_range("--particles", settings.particles, 1)
    _in_range("--max-new-tokens", settings.max_new_tokens, 1)
    _in_range("--seed", settings.seed, 0, 2**32 - 1)
    if settings.ess_threshold is not None:
        _in_range("--ess-threshold", settings.ess_threshold, 0, 1)
    if settings.method not in METHODS:
        raise typer.BadParameter(
            f"expected one of {', '.join(METHODS)}, got {settings.method!r}", param_hint="--method"
        )
    for name in ("resampling", "ess_threshold"):
        if getattr(settings, name) is not None and name not in METHODS[settings.method].options:
            raise typer.BadParameter(
                f"{settings.method} has no such setting", param_hint=f"--{name.replace('_', '-')}"
            )
    _try("--temperature", lambda: PriorSettings(settings.temperature))
    if settings.power is not None:
        _try("--power", lambda: ponder.power(settings.power))
    if settings.resampling is not None:
        _try("--resampling", lambda: by_name(settings.resampling))
    if "" in settings.stop:
        raise typer.BadParameter("expected some text, got an empty string", param_hint="--stop")
    if settings.regex is not None:
        # A model of single bytes can write whatever matches, so that only the pattern itself can be at fault.
        _try("--regex", lambda: ponder.regex(settings.regex).bind(byte_model(), 2**30))


def _in_range(option: str, value: float, low: int, high: int | None = None) -> None:
    # Not typer's own ranges: their messages do not tell what came.
    if not (low <= value and (high is None or value <= high)):
        expected = f">= {low}" if high is None else f"from {low} to {high}"
        raise typer.BadParameter(f"expected a number {expected}, got {value}", param_hint=option)


def _try(option: str, make: Callable[[], Any]) -> None:
    from ponder.cli_sample import Failure

    try:
        make()
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
    except ImportError as error:
        raise Failure(f"{option}: {error}") from error


def _check_output(option: str, path: Path | None, formats: tuple[str, ...] = ()) -> None:
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
    if not os.access(path.parent, os.W_OK):
        raise typer.BadParameter(f"the folder {path.parent} is not writable", param_hint=option)
