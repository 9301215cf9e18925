"""The live progress line of the command line, on stderr."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ponder.posterior.display import format_log

__all__ = ["ProgressLine"]


class ProgressLine:
    """The stage, how far it is and its time in a line; where stderr is no terminal, a plain line a stage."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=None, status="")
        self._name = "starting"

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, name: str, total: int | None = None) -> None:
        """Announce a stage, whose time starts now; None where its length is unknown."""
        if name == self._name:
            return
        self._name = name
        self._progress.reset(self._task, description=name, total=total, status="")
        if not self._console.is_terminal:
            self._print(f"{name} ...")

    def fraction(self, stage: str, fraction: float) -> None:
        """Show how far a stage is, from 0 to 1; the `progress` of `ponder.models.load`."""
        self.stage(stage, 1)
        self._progress.update(self._task, completed=fraction)

    def update(self, progress: Any, tokens_per_second: float | None) -> None:
        """Show a `ponder.inference.Progress`."""
        parts = [
            f"{progress.step}/{progress.num_steps}",
            f"{progress.num_done}/{progress.num_particles} done",
            f"ESS {progress.ess:.1f}",
            f"log Z {format_log(progress.log_evidence)}",
        ]
        if tokens_per_second is not None and math.isfinite(tokens_per_second):
            parts.append(f"{tokens_per_second:.0f} tokens/s")
        self.stage("sampling", progress.num_steps)
        self._progress.update(self._task, completed=progress.step, status=" ".join(parts))

    def warn(self, message: str) -> None:
        """Print a warning above the line."""
        self._print(f"Warning: {message}")

    def _print(self, message: str) -> None:
        # A log keeps its lines whole; on a terminal the text must wrap, or it would break the live line.
        self._console.print(Text(message), soft_wrap=not self._console.is_terminal)
