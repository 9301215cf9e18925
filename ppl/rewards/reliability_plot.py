"""Reliability plot: how often traces were right, against the score that they got."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ponder.rewards.calibration import Reliability, expected_calibration_error, reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_reliability"]

# Okabe and Ito's colours, told apart by colour-blind readers.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#BBBBBB"


def plot_reliability(
    scores: Any,
    outcomes: Any,
    num_bins: int = 10,
    *,
    calibration: Callable[[Any], Any] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the frequency of success in bins of the score, with 95% intervals, and how the scores spread.

    A calibrated score lies on the diagonal. The bars at the foot share the axis of scores and say how many
    traces are in each bin, the tallest a fifth of the height. The title holds the number of pairs and the
    expected calibration error.

    Args:
        scores: float[n] in [0, 1].
        outcomes: bool or 0/1 [n].
        num_bins: of equal width, see `ponder.calibration.reliability`.
        calibration: a fitted map to draw over the points, such as one of `ponder.calibration`.
        ax: where to draw; None makes a figure, which is `ax.figure`.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `scores` or `outcomes` does not hold numbers.
        ValueError: they are not two arrays of one shape [n], n >= 1, a score is outside [0, 1], an outcome is
            neither 0 nor 1, or `num_bins` is not an integer >= 1.
    """
    table = reliability(scores, outcomes, num_bins)
    error = expected_calibration_error(scores, outcomes, num_bins)
    axes = _new_axes() if ax is None else ax
    _draw_counts(table, axes)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="dashed", label="calibrated")
    full = table.count > 0
    x, y = table.mean_score[full], table.frequency[full]
    # An interval of few data may leave out the frequency itself, by a little: a bar has no negative length.
    bars = np.maximum([y - table.low[full], table.high[full] - y], 0.0)
    line: dict[str, Any] = {"markersize": 5, "linewidth": 1.2, "capsize": 2.5, "clip_on": False, "zorder": 3}
    axes.errorbar(x, y, bars, fmt="o-", color=_BLUE, label="frequency of success, 95% interval", **line)
    title = f"{table.count.sum()} traces; expected calibration error {error:.3f}"
    if calibration is not None:
        grid = np.linspace(0.001, 0.999, 999)
        axes.plot(grid, np.asarray(calibration(grid)), color=_ORANGE, linewidth=1.2, label="calibration map")
        mapped = np.asarray(calibration(np.asarray(scores, np.float64)))
        title += f", {expected_calibration_error(mapped, outcomes, num_bins):.3f} after the map"
    axes.set_title(title, fontsize="medium", loc="left")
    axes.set_xlabel("score: probability of success as predicted (mean of the bin)")
    axes.set_ylabel("frequency of success")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.legend(loc="upper left", frameon=False, fontsize="small")
    return axes


def _draw_counts(table: Reliability, axes: Axes) -> None:
    """Bars of the counts, with the numbers where the bins are wide enough."""
    heights = 0.2 * table.count / table.count.max()
    widths = table.right - table.left
    bars: dict[str, Any] = {"color": _GREY, "alpha": 0.5, "edgecolor": "white", "zorder": 0}
    axes.bar(table.left, heights, widths, align="edge", label="traces in the bin", **bars)
    if len(table.count) > 12:
        return
    words: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": "x-small", "color": "#666666"}
    for left, width, count in zip(table.left, widths, table.count, strict=True):
        if count:  # at the foot, where no point can be in the way
            axes.text(left + width / 2, 0.006, str(count), **words)


def _new_axes() -> Axes:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plot_reliability needs matplotlib: pip install 'ponder-ppl[plot]'") from error
    from ponder.posterior.figure import new_figure

    return new_figure(5.6, 5.6).add_subplot()
