"""Matplotlib figures that need neither pyplot nor a display; the module needs matplotlib at import."""

from __future__ import annotations

import io

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

__all__ = ["NotebookFigure", "covered_characters", "new_figure"]


class NotebookFigure(Figure):
    """A figure that draws itself where a notebook displays it.

    IPython shows a plain `Figure` only once pyplot has been imported; where it has been, its own formatter
    goes first, so that nothing is shown twice.
    """

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight")
        return buffer.getvalue()


def new_figure(width: float, height: float) -> NotebookFigure:
    """Return an empty figure; its size is in inches."""
    return NotebookFigure(figsize=(width, height), layout="constrained")


def covered_characters() -> set[int]:
    """Return the code points that the configured font families can draw."""
    covered: set[int] = set()
    for family in rcParams["font.family"]:
        covered.update(get_font(findfont(FontProperties(family=[family]))).get_charmap())
    return covered
