"""What the command line hands over: a table on stdout, a JSON file, a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

import ponder
from ponder.arguments import escape
from ponder.cli.settings import STDOUT, Settings, Timings
from ponder.posterior.display import format_log, heaviest, percent
from ponder.posterior.posterior import Posterior
from ponder.posterior.saving import replacing

__all__ = ["print_posterior", "to_json", "write_json", "write_plot"]

_NUM_ROWS = 20


def print_posterior(posterior: Posterior, timings: Timings, stderr: bool = False) -> None:
    """Print the heaviest traces, the evidence, the effective sample size and the speed, for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, stderr=stderr)
    found = heaviest(posterior, _NUM_ROWS)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("weight", justify="right", no_wrap=True)
    table.add_column("text", overflow="fold")
    for row in found.rows:  # as Text: square brackets in a trace are no markup
        table.add_row(
            percent(row.weight), Text(escape(row.text)) if row.text else Text("(no text)", style="dim")
        )
    if more := found.num_distinct - len(found.rows):
        table.add_row(percent(found.rest), Text(f"({more} more)", style="dim"))
    console.print(table)

    n, rate = len(posterior), timings.tokens_per_second
    speed = "too short to measure" if rate is None else f"{rate:.0f}"
    facts = [
        ("log evidence", format_log(float(posterior.log_evidence))),
        ("ESS", f"{posterior.ess:.2f} of {n} ({posterior.ess / n:.0%})"),
        ("distinct traces", f"{found.num_distinct} of {n}"),
        ("tokens per second", f"{speed} (after {timings.compile_seconds:.1f} s to compile)"),
    ]
    for name, value in facts:
        console.print(Text.assemble((f"{name:<18}", "bold"), value))


def to_json(settings: Settings, posterior: Posterior, timings: Timings) -> dict[str, Any]:
    """Return what `--json` writes; numbers that JSON does not know, -inf and NaN, become null."""
    merged, stats = posterior.unique(), posterior.stats
    lengths = np.asarray(merged.lengths)
    columns = zip(
        merged.weights,
        merged.text,
        np.asarray(merged.tokens),
        lengths,
        np.asarray(merged.log_prior),
        np.asarray(merged.log_potential),
        strict=True,
    )
    num_steps = int(stats.num_steps)
    return {
        "ponder": ponder.__version__,
        "prompt": settings.prompt,
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "prompt"},
        "log_evidence": _number(posterior.log_evidence),
        "ess": _number(posterior.ess),
        "degenerate": bool(stats.degenerate),
        "invalid": bool(stats.invalid),
        "num_steps": num_steps,
        "ess_per_step": _numbers(stats.ess, num_steps),
        "log_evidence_per_step": _numbers(stats.log_evidence, num_steps),
        "timings": {name: _number(value) for name, value in timings._asdict().items()},
        "traces": [
            {
                "weight": _number(weight),
                "text": text,
                "tokens": tokens[:length].tolist(),
                "log_prior": _number(log_prior),
                "log_potential": _number(log_potential),
            }
            for weight, text, tokens, length, log_prior, log_potential in columns
        ],
    }


def write_json(path: Path, settings: Settings, posterior: Posterior, timings: Timings) -> None:
    """Write the run as strict JSON, into a file or to stdout: distinct traces, the heaviest first."""
    text = json.dumps(to_json(settings, posterior, timings), indent=2, allow_nan=False)
    if path == STDOUT:
        print(text, flush=True)
        return
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_plot(path: Path, posterior: Posterior) -> None:
    """Draw the posterior into a file; its ending says the format."""
    figure = posterior.plot()
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)


def _number(value: Any) -> float | None:
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def _numbers(values: Any, count: int) -> list[float | None] | None:
    return None if values is None else [_number(value) for value in np.asarray(values)[:count]]
