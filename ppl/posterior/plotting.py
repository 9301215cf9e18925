"""Pictures of a posterior: its traces and weights, the genealogy of its particles, and the sample size.

Figures are made without pyplot, so that no backend is chosen and no global state changes.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from ponder.arguments import escape, shorten
from ponder.posterior.arrays import PosteriorArrays, effective_sample_size, history, linear_weights
from ponder.posterior.display import Rows, effective, format_log, heaviest
from ponder.posterior.genealogy import Genealogy, Segments, genealogy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_genealogy", "plot_posterior"]

# Okabe and Ito's colours, told apart by colour-blind readers.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#BBBBBB"
_NUM_TRACES = 8
_WRAP = 64
_MAX_LINES = 3


def plot_genealogy(posterior: PosteriorArrays, ax: Axes | None = None) -> Axes:
    """Draw which particles descend from which, step by step.

    Lines run from a particle's row to the rows that continue it. The ancestry of the final weights is drawn
    in blue, the wider the more weight descends from it; what died out is grey. A dot ends each finished
    trace; dotted lines lead on to the copies that were made of it afterwards, as small circles. Triangles
    mark resampling.

    Args:
        posterior: of one run of a particle method.
        ax: where to draw; None makes a figure, which is `ax.figure`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the posterior has no ancestors, as after `unique()` or from `exact`.
    """
    family = genealogy(posterior)
    n = posterior.tokens.shape[0]
    axes = _figures().new_figure(8.0, _genealogy_height(n)).add_subplot() if ax is None else ax
    _draw_genealogy(family, n, axes)
    return axes


def plot_posterior(posterior: PosteriorArrays) -> Figure:
    """Draw the heaviest traces with their weights, the genealogy, and the sample size step by step.

    The lower row is left out where the posterior has no ancestors.

    Raises:
        ImportError: matplotlib is not installed.
    """
    found = _visible(heaviest(posterior, _NUM_TRACES))
    has_history = posterior.stats.ancestors is not None and posterior.stats.num_tokens is not None
    covered = _figures().covered_characters()
    labels = [_label(row.text, covered) for row in found.rows]
    weights = [row.weight for row in found.rows]
    if found.num_distinct > len(labels):
        rest = found.num_distinct - len(labels)
        labels.append(f"({rest} more trace{'s' if rest > 1 else ''})")
        weights.append(found.rest)

    top_height = 0.8 + sum(0.16 + 0.16 * _num_lines(label) for label in labels)
    low_height = _genealogy_height(posterior.tokens.shape[0]) if has_history else 0.0
    figure = _figures().new_figure(11.0, 0.5 + top_height + low_height)
    figure.suptitle(_headline(posterior), fontsize="large")
    if not has_history:
        _draw_weights(labels, weights, len(found.rows), figure.add_subplot())
        return figure
    # Subfigures: in one grid the long labels above would push the genealogy aside.
    top, low = figure.subfigures(2, 1, height_ratios=[top_height, low_height])
    _draw_weights(labels, weights, len(found.rows), top.add_subplot())
    left, right = low.subplots(1, 2, width_ratios=[3, 2])
    plot_genealogy(posterior, left)
    _draw_ess(posterior, right)
    return figure


def _visible(found: Rows) -> Rows:
    """Leave out the rows whose weight would read 0.0%, but never the first."""
    shown = [row for i, row in enumerate(found.rows) if i == 0 or row.weight >= 0.0005]
    return found._replace(rows=shown, rest=found.rest + sum(row.weight for row in found.rows[len(shown) :]))


def _draw_genealogy(family: Genealogy, n: int, ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    widest = min(6.0, 0.7 * _height(ax) / n)  # points; neighbouring rows must not touch
    dead = family.moves.mass == 0
    _add_lines(ax, _take(family.moves, dead), widest)
    _add_lines(ax, family.waits, widest, linestyle="dotted")
    _add_lines(ax, _take(family.moves, ~dead), widest)
    alive = family.end_mass > 0
    dot: dict[str, Any] = {"linewidths": 0.6, "edgecolors": "white", "clip_on": False}
    ax.scatter(family.end_level[~alive], family.end_row[~alive], s=14, color=_GREY, zorder=3, **dot)
    ring: dict[str, Any] = {**dot, "edgecolors": _BLUE}
    ax.scatter(family.copy_level, family.copy_row, s=9, color="white", zorder=3, **ring)
    sizes = (2.5 + _width(family.end_mass[alive], widest)) ** 2
    ax.scatter(family.end_level[alive], family.end_row[alive], s=sizes, color=_BLUE, zorder=4, **dot)
    _mark_resampling(family.resampled, ax)
    ax.set_xlim(0, max(family.num_steps, 1))
    ax.set_ylim(n - 0.5, -0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.set_xlabel("step (tokens drawn)")
    ax.set_ylabel("row of the particle")
    ax.set_title(
        f"Genealogy: the final weight descends from {family.num_roots} of the {n} particles of step 1",
        fontsize="medium",
        loc="left",
    )
    _explain_genealogy(family, ax)
    ax.spines[["top", "right"]].set_visible(False)


def _explain_genealogy(family: Genealogy, ax: Axes) -> None:
    """Say below the axes what the lines and marks mean; only those that are drawn."""
    from matplotlib.lines import Line2D

    marks: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "white"}
    entries = [
        (True, Line2D([], [], color=_BLUE, linewidth=2.5, label="survives (wider: more weight)")),
        (bool((family.moves.mass == 0).any()), Line2D([], [], color=_GREY, linewidth=0.9, label="died out")),
        (True, Line2D([], [], color=_BLUE, marker="o", label="finished", **marks)),
        (
            len(family.copy_level) > 0,
            Line2D(
                [], [], color=_BLUE, linewidth=0.9, linestyle="dotted", marker="o", markersize=4,
                markerfacecolor="white", label="copied when finished",
            ),
        ),
        (len(family.resampled) > 0, Line2D([], [], color=_ORANGE, marker="^", label="resampling", **marks)),
    ]  # fmt: skip
    _legend_below([handle for drawn, handle in entries if drawn], 3, ax)


def _legend_below(handles: list[Any], columns: int, ax: Axes) -> None:
    place: dict[str, Any] = {
        "loc": "upper left",
        "bbox_to_anchor": (0.0, -42 / _height(ax)),
        "borderaxespad": 0,
    }
    ax.legend(handles=handles, ncols=columns, fontsize="small", frameon=False, columnspacing=1.2, **place)


def _height(ax: Axes) -> float:
    """Return the height of the axes in points."""
    return ax.get_window_extent().height * 72 / ax.get_figure().dpi  # pyright: ignore[reportOptionalMemberAccess]


def _take(segments: Segments, where: np.ndarray) -> Segments:
    return Segments(*(column[where] for column in segments))


def _add_lines(ax: Axes, segments: Segments, widest: float, linestyle: str = "solid") -> None:
    from matplotlib.collections import LineCollection

    order = np.argsort(segments.mass, kind="stable")  # the heaviest on top
    level, start, until, stop, mass = (column[order] for column in segments)
    lines = np.stack([np.stack([level, start], -1), np.stack([until, stop], -1)], axis=1)
    widths = np.where(mass > 0, _width(mass, widest), 0.7)
    if linestyle == "dotted":
        widths = np.full(len(mass), 0.9)
    style = {"colors": _shades(mass), "linewidths": widths, "linestyles": linestyle, "capstyle": "round"}
    ax.add_collection(LineCollection(list(lines), **style))


def _shades(mass: np.ndarray) -> np.ndarray:
    """Return grey for lines without weight, else blue, the stronger the heavier; RGB [K, 3]."""
    from matplotlib.colors import to_rgb

    # Mixed with white rather than transparent: where transparent lines meet, their ends add up to dots.
    strength = 0.45 + 0.55 * np.sqrt(np.clip(mass, 0.0, 1.0))[:, None]
    blue = 1.0 - strength * (1.0 - np.array(to_rgb(_BLUE)))
    return np.where(mass[:, None] > 0, blue, np.array(to_rgb(_GREY)))


def _width(mass: np.ndarray, widest: float) -> np.ndarray:
    return np.minimum(0.8, widest) + np.maximum(widest - 0.8, 0) * np.sqrt(mass)


def _mark_resampling(levels: np.ndarray, ax: Axes) -> None:
    for level in levels:
        ax.axvline(level, color=_ORANGE, linewidth=0.6, alpha=0.35, zorder=0)
    on_the_axis = [(-1, 0), (1, 0), (0, 2)]  # a triangle that stands on its position
    ax.scatter(
        levels,
        np.zeros(len(levels)),
        marker=on_the_axis,
        s=180,
        color=_ORANGE,
        linewidths=0,
        transform=ax.get_xaxis_transform(),
        zorder=5,
        clip_on=False,
    )


def _draw_weights(labels: list[str], weights: list[float], num_traces: int, ax: Axes) -> None:
    centres, heights, at = [], [], 0.0
    for label in labels:
        room = 1.0 + _num_lines(label)
        centres.append(at + room / 2)
        heights.append(0.6 * room)
        at += room
    colors = [_BLUE] * num_traces + [_GREY] * (len(labels) - num_traces)
    bars = ax.barh(centres, weights, height=heights, color=colors)
    ax.bar_label(bars, [_percent(w) for w in weights], padding=3, fontsize="small")
    ax.set_yticks(centres, labels, fontsize="small", linespacing=1.1)
    for tick in ax.get_yticklabels():
        tick.set_multialignment("left")
        tick.set_parse_math(False)  # dollar signs in a trace are no formula
        tick.set_usetex(False)
    ax.set_ylim(at, 0)
    ax.set_xlim(0, 1.12 * max(weights))
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.set_title("Heaviest traces and their weights", fontsize="medium", loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def _draw_ess(posterior: PosteriorArrays, ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    stats, n = history(posterior.stats), posterior.tokens.shape[0]
    num_steps = int(stats.num_steps)
    steps = np.arange(1, num_steps + 1)
    ess = np.asarray(stats.ess)
    ax.plot(steps, ess, color=_BLUE, linewidth=1.5, marker="o", markersize=3 if num_steps <= 32 else 0)
    handles: list[Any] = []
    threshold = 0.0 if stats.ess_threshold is None else float(stats.ess_threshold)
    if 0 < threshold:
        label = f"resample below {threshold:.0%} of {n}" if threshold < 1 else "resample at every step"
        handles.append(ax.axhline(threshold * n, color=_ORANGE, linestyle="--", linewidth=1, label=label))
    if stats.resampled is not None:
        hit = np.asarray(stats.resampled)
        count = int(hit.sum())
        label = f"resampled ({count} time{'s' if count > 1 else ''})"
        marks = ax.scatter(steps[hit], ess[hit], marker="^", s=32, color=_ORANGE, zorder=3, label=label)
        if count:
            handles.append(marks)
    if handles:
        _legend_below(handles, 2, ax)
    ax.set_xlim(0, max(num_steps, 1))
    ax.set_ylim(0, 1.05 * n)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y", alpha=0.3)
    ax.set_xlabel("step (tokens drawn)")
    ax.set_ylabel(f"particles, of {n}")
    ax.set_title("Effective sample size, before resampling", fontsize="medium", loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def _headline(posterior: PosteriorArrays) -> str:
    n, stats = posterior.tokens.shape[0], posterior.stats
    parts = [posterior.method] if posterior.method else []
    parts.append(f"log evidence {format_log(float(posterior.log_evidence))}")
    ess = effective_sample_size(linear_weights(posterior))
    parts.append(effective(posterior) if posterior.origin else f"ESS {ess:.1f} of {n}")
    if posterior.origin:
        parts.append(posterior.origin)
    if stats.degenerate is not None and bool(stats.degenerate):
        parts.append("DEGENERATE: every weight was zero")
    return " · ".join(parts)


def _label(text: str, covered: set[int]) -> str:
    """Fit a trace into a few lines, with escapes for what the font cannot draw."""
    text = shorten(escape(text), _WRAP * _MAX_LINES - 20)
    text = "".join(c if ord(c) in covered else c.encode("unicode_escape").decode() for c in text)
    lines = textwrap.wrap(text, _WRAP, max_lines=_MAX_LINES, placeholder=" …")
    return "\n".join(lines) if lines else "(no text)"


def _percent(weight: float) -> str:
    return "<0.1%" if 0 < weight < 0.0005 else f"{weight:.1%}"


def _num_lines(label: str) -> int:
    return label.count("\n") + 1


def _genealogy_height(num_particles: int) -> float:
    return float(np.clip(2.3 + 0.11 * num_particles, 3.3, 6.5))


def _figures() -> Any:
    """Import the module that needs matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plotting a posterior needs matplotlib: pip install 'ponder-ppl[plot]'") from error
    from ponder.posterior import figure

    return figure
