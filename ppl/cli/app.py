"""The commands of `ponder`: their options, and the checks made before anything is loaded.

Needs typer. What is heavy is imported inside functions, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Literal

import typer

from ponder.cli.bench import bench
from ponder.cli.checks import Failure, check_outputs, check_settings
from ponder.cli.inputs import SampleCommand, from_stdin, read_prompt, read_text, unescaped
from ponder.cli.interrupts import INTERRUPTED
from ponder.cli.sample import run
from ponder.cli.settings import Outputs, Settings

__all__ = ["app"]

# \b keeps the lines as they are.
_OVERVIEW = """\
Treat LLM decoding as Bayesian inference: draw the posterior over texts.

The model is a prior over texts, your constraints are evidence, and the answer is a weighted set of texts.

\b
  ponder sample "Name a colour of the rainbow."
  ponder sample --help        all options, examples, and what the numbers mean
"""

_EPILOG = """\b
Environment:
  PONDER_CACHE     folder of compiled programs
                   [default: $XDG_CACHE_HOME/ponder, else ~/.cache/ponder]
  HF_HUB_OFFLINE   1: never download a model
  JAX_PLATFORMS    device that JAX uses, such as cpu or cuda

Exit codes: 0 a posterior, 1 failure, 2 bad input, 3 every particle has weight zero, 130 Ctrl-C.
"""

_EXAMPLES = """\b
Examples:
  ponder sample "Name a colour of the rainbow."
  ponder sample "Today is " --no-chat --regex "[A-Z][a-z]+day"
  ponder sample "One line about the sea." --power 2 --plot sea.png
  ponder sample "1, 2, 3," --no-chat --stop 10 --json out.json
  ponder sample "Hello" --particles 64 --save hello.safetensors
  ponder sample - --stop "\\n" --cut-stop --json - < question.txt

\b
What is printed:
  weight         posterior probability of a text, as this run estimates it
  log evidence   log of the evidence that the model's own texts have on
                 average; for a constraint, of the probability that the model
                 meets it by itself: -4.6 means 1 in 100, 0 always
  ESS            effective sample size: how many equally weighted texts the
                 weighted ones are worth; near 1 is poor

\b
Choosing:
  --method       smc drops texts that go wrong early and copies better ones;
                 importance_sampling keeps all: for weak evidence, or a check
  --particles    16 to look, 64 and more to estimate. More if the ESS is
                 small or log evidence changes much with --seed
  --force-eos    if no text should be cut at --max-new-tokens

\b
Files: --save is for ponder.Posterior.load(path) in Python, --json for other
programs. They are written even if every particle has weight zero; the exit
code is then 3 and no table is printed.
"""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=_OVERVIEW,
    epilog=_EPILOG,
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


app.command()(bench)


@app.command(epilog=_EXAMPLES, cls=SampleCommand)
def sample(
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT", help="What the model is asked, or the text that it continues; - reads stdin."
        ),
    ],
    model: Annotated[
        str, typer.Option(help="Embedded model, local directory in hub format, .gguf file, or hub id.")
    ] = "smollm2-135m-instruct",
    method: Annotated[str, typer.Option(help="Kernel: smc or importance_sampling.")] = "smc",
    particles: Annotated[int, typer.Option(help="Traces drawn side by side.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Longest trace, in tokens.")] = 64,
    regex: Annotated[str | None, typer.Option(help="The text must match this pattern as a whole.")] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The text must be one of these; repeatable.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text must be JSON that follows this schema.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text must be in this grammar (Lark syntax).")
    ] = None,
    power: Annotated[
        float | None, typer.Option(help="Target p^power over whole texts; above 1 sharpens.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Temperature of the prior.")] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End a trace at this text; repeatable. Reads \\n, \\t, \\\\, \\x0a and \\u000a."),
    ] = None,
    cut_stop: Annotated[
        bool, typer.Option("--cut-stop", help="Leave the --stop text out of the texts that are shown.")
    ] = False,
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
    json: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write everything as JSON; - is stdout, the report then stderr."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Draw the posterior: .png, .pdf or .svg.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Save the posterior: .safetensors, for Posterior.load.")
    ] = None,
) -> None:
    """Draw the posterior over answers to a prompt.

    Prints the traces, heaviest first, with their weights, the log evidence, the effective sample size and the
    speed. The prompt is a chat message where the model has a chat template, else the text to continue.
    """
    from_stdin({"PROMPT": prompt, "--json-schema": json_schema, "--grammar": grammar})
    settings = Settings(
        prompt=read_prompt(prompt),
        model=model,
        method=method,
        particles=particles,
        max_new_tokens=max_new_tokens,
        regex=regex,
        choice=tuple(choice) if choice else None,
        json_schema=read_text("--json-schema", json_schema),
        grammar=read_text("--grammar", grammar),
        power=power,
        temperature=temperature,
        stop=tuple(map(unescaped, stop or ())),
        cut_stop=cut_stop,
        force_eos=force_eos,
        chat=chat,
        resampling=resampling,
        ess_threshold=ess_threshold,
        dtype=dtype,
        seed=seed,
    )
    try:
        check_settings(settings)
        outputs = Outputs(json=json, plot=plot, save=save)
        check_outputs(outputs)
        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise Failure("--plot needs matplotlib: pip install 'ponder-ppl[plot]'")
        run(settings, outputs)
    except Failure as failure:
        typer.echo(f"Error: {failure}", err=True)
        raise typer.Exit(failure.exit_code) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None  # the message is that of `ponder.cli.entry.main`
