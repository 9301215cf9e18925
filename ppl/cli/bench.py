"""The command `ponder bench`: a grid of workloads, each measured in a process of its own.

JSON on stdout, and on stderr what is going on and a table. What is measured is in `ponder.cli.measure`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import ponder
from ponder.cli.checks import Failure, check_output, in_range
from ponder.cli.interrupts import INTERRUPTED
from ponder.cli.settings import STDOUT
from ponder.cli.workload import BASELINE, JOBS, Workload

__all__ = ["bench", "plan", "print_table", "run_grid"]

PARTICLES = (1, 8, 32, 64)
PROMPT_TOKENS = (64, 512)
REFERENCE = (32, 64)
"""Particles and prompt tokens of the point where every job runs."""
PROMPTS_REFERENCE = (8, 16)
"""Prompts in one batch, and particles of each."""

_COLUMNS = ("N", "prompt", "job", "tok/s", "ms/step", "cost", "floor", "chain", "compile", "MB")
_LEGEND = (
    "cost: time of a step beyond that of plain sampling. floor: time of the matrix products alone, as a "
    "share of the step; chain: the same where each of them waits for the last. Ratios compare neighbours in "
    "time; the other figures follow whatever else the machine does."
)


def bench(
    model: Annotated[
        str, typer.Option(help="Embedded model, local directory in hub format, .gguf file, or hub id.")
    ] = "smollm2-135m-instruct",
    particles: Annotated[
        list[int] | None, typer.Option(help="Traces drawn side by side; repeatable.  [default: 1 8 32 64]")
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None, typer.Option(help="Length of the prompt; repeatable.  [default: 64 512]")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Length of every trace.")] = 64,
    repeats: Annotated[int, typer.Option(help="Runs of each job, after the one that compiles.")] = 3,
    jobs: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Of {', '.join(JOBS)}; repeatable. {BASELINE} always runs.  [default: "
            f"{' '.join(name for name, job in JOBS.items() if job.everywhere)}, "
            f"and all at {REFERENCE[0]} particles and {REFERENCE[1]} tokens]"
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only 32 particles, 64 tokens and the jobs that run everywhere.")
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of the weights.  [default: float32]")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="OUT", help="Write the JSON into a file too.")] = None,
) -> None:
    """Measure particle decoding on this machine; prints JSON.

    Tokens per second, milliseconds a step, compile time and peak memory, against the matrix products that no
    decoder can avoid, and what SMC and potentials cost over plain sampling. The table goes to stderr, so that
    `ponder bench > bench.json` keeps the numbers. About 10 minutes on 2 cores; --quick takes one or two.
    """
    from ponder.cli.progress import ProgressLine

    for option, values in (("--particles", particles), ("--prompt-tokens", prompt_tokens)):
        for value in values or ():
            in_range(option, value, 1)
    in_range("--new-tokens", new_tokens, 2)
    in_range("--repeats", repeats, 1)
    for name in jobs or ():
        if name not in JOBS:
            raise typer.BadParameter(f"expected one of {', '.join(JOBS)}, got {name!r}", param_hint="--jobs")
    json = None if json == STDOUT else json  # it is printed there anyway
    check_output("--json", json)
    try:
        workloads = plan(model, dtype, particles, prompt_tokens, new_tokens, repeats, jobs, quick)
        start = time.perf_counter()
        with ProgressLine() as line:
            entries = run_grid(workloads, line.stage)
        result = _report(workloads[0], entries, time.perf_counter() - start)
        _hand_over(result, json)
    except Failure as failure:
        typer.echo(f"Error: {failure}", err=True)
        raise typer.Exit(failure.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("ponder: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if any("error" in entry for entry in entries):
        raise typer.Exit(1)


def plan(
    model: str,
    dtype: str | None,
    particles: Sequence[int] | None,
    prompt_tokens: Sequence[int] | None,
    new_tokens: int,
    repeats: int,
    jobs: Sequence[str] | None,
    quick: bool,
) -> list[Workload]:
    """Return the points of the grid, with the jobs of each; None leaves a choice to the default."""
    particles = particles or (REFERENCE[:1] if quick else PARTICLES)
    prompt_tokens = prompt_tokens or (REFERENCE[1:] if quick else PROMPT_TOKENS)
    workloads = []
    for length, n in itertools.product(dict.fromkeys(prompt_tokens), dict.fromkeys(particles)):
        if jobs:
            chosen = tuple(name for name in JOBS if name == BASELINE or name in jobs)
        elif (n, length) == REFERENCE and not quick:
            chosen = tuple(JOBS)
        else:
            chosen = tuple(name for name, job in JOBS.items() if job.everywhere)
        workloads.append(Workload(model, dtype, n, length, new_tokens, repeats, chosen))
    if not (quick or jobs):  # several prompts in one batch
        n, length = PROMPTS_REFERENCE[1], REFERENCE[1]
        workloads.append(
            Workload(model, dtype, n, length, new_tokens, repeats, (BASELINE,), PROMPTS_REFERENCE[0])
        )
    return workloads


def run_grid(workloads: Sequence[Workload], report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure each workload in a child; one that fails gives `{"error": ...}` in its entry.

    Raises:
        Failure: the first one failed, so that something is wrong with all of them.
    """
    entries: list[dict[str, Any]] = []
    for number, workload in enumerate(workloads, 1):
        place = _place(workload.particles, workload.prompt_tokens)
        prefix = f"[{number}/{len(workloads)}] {place}: "
        try:
            entry = _run_child(workload, prefix, report)
            # Told at once: the table comes late, and not at all after an interrupt.
            figures = [f"{name} {job['ms_per_step']:.1f}" for name, job in entry["jobs"].items()]
            report(f"{prefix}{', '.join(figures)} ms a step")
        except Failure as failure:
            if not entries:
                raise Failure(f"{place}: {failure}", failure.exit_code) from None
            entry = {
                "particles": workload.particles,
                "prompt_tokens": workload.prompt_tokens,
                "new_tokens": workload.new_tokens,
                "error": str(failure),
            }
        entries.append(entry)
    return entries


def _place(particles: int, prompt_tokens: int) -> str:
    return f"{particles} particles, prompt of {prompt_tokens} tokens"


def _run_child(workload: Workload, prefix: str, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure in a new process; it does not outlive this call, whatever ends it.

    Raises:
        Failure: the child said what is wrong, or died.
    """
    # -P: no file of the working directory may take the place of a library.
    command = [sys.executable, "-P", "-m", "ponder.cli.measure", json.dumps(dataclasses.asdict(workload))]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8")
        try:
            assert child.stdout is not None
            for text in child.stdout:
                line = _message(text)
                if "stage" in line:
                    report(prefix + line["stage"])
                elif "error" in line:
                    raise Failure(line["error"], exit_code=2)
                elif "result" in line:
                    return line["result"]
            code = child.wait()
        finally:
            child.kill()
            child.communicate()
        if code < 0:
            raise Failure(f"the process was ended by {signal.Signals(-code).name}; is there enough memory?")
        errors.seek(0)
        raise Failure((errors.read().strip() or f"exit code {code}").splitlines()[-1])


def _message(text: str) -> dict[str, Any]:
    """Return a line of the child as an object; an empty one for what a library may have printed there."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _report(workload: Workload, entries: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    import jax

    return {
        "ponder": ponder.__version__,
        "jax": jax.__version__,
        "machine": {"system": platform.system(), "processor": _processor(), "cores": os.cpu_count()},
        "model": workload.model,
        "dtype": workload.dtype or "float32",
        "repeats": workload.repeats,
        "seconds": seconds,
        "workloads": entries,
    }


def _processor() -> str:
    """Return the name of the processor, which Linux tells only here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _hand_over(result: dict[str, Any], path: Path | None) -> None:
    from ponder.posterior.saving import replacing

    text = json.dumps(result, indent=2, allow_nan=False)
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    print_table(result)


def print_table(result: dict[str, Any]) -> None:
    """Print the numbers as a table on stderr."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))  # fits into 80 columns
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "job" else "right", no_wrap=True)
    for row in table_rows(result["workloads"]):
        table.add_row(*row)
    console = Console(stderr=True, highlight=False)
    console.print(table)
    for entry in result["workloads"]:
        if "error" in entry:
            place = _place(entry["particles"], entry["prompt_tokens"])
            console.print(f"{place}: {entry['error']}", markup=False)
    console.print(_LEGEND, style="dim")


def table_rows(workloads: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the cells of the table, one row a job."""
    rows = []
    for entry in workloads:
        for name, job in entry.get("jobs", {}).items():
            over, memory = job["overhead_percent"], entry["peak_memory_mb"]
            rows.append(
                (
                    str(entry["particles"]),
                    str(entry["prompt_tokens"]),
                    name,
                    f"{job['tokens_per_second']:.0f}",
                    f"{job['ms_per_step']:.1f}",
                    "" if over is None else f"{over:+.1f}%",
                    f"{job['share_of_gemm_floor']:.2f}",
                    f"{job['share_of_gemm_chain']:.2f}",
                    f"{job['compile_seconds']:.1f}",
                    "" if memory is None else f"{memory:.0f}",
                )
            )
        if "prompts" in entry:
            batch = entry["prompts"]
            rows.append(
                (
                    f"{batch['prompts']}x{entry['particles']}",
                    str(entry["prompt_tokens"]),
                    f"x{batch['speedup']:.2f}",
                    f"{batch['tokens_per_second']:.0f}",
                    *("",) * 6,
                )
            )
    return rows
