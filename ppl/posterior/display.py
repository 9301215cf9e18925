"""A posterior as plain text and as an HTML table: evidence, effective sample size and the heaviest traces."""

from __future__ import annotations

import html
from typing import NamedTuple

import numpy as np

from ponder.arguments import check_count, escape, shorten
from ponder.posterior.arrays import (
    PosteriorArrays,
    counted,
    effective_sample_size,
    history,
    linear_weights,
    merge,
    rows_in_words,
    text_of,
    traces,
)
from ponder.posterior.genealogy import ancestral_mass

__all__ = [
    "Row",
    "Rows",
    "ancestry",
    "effective",
    "facts",
    "format_log",
    "heaviest",
    "percent",
    "summary",
    "to_html",
]

_TEXT_WIDTH = 76

ONE_PARTICLE = 1.1
"""Below this effective sample size one particle has more than 95% of the weight."""
LEAST_PARTICLES = 4
"""Of fewer particles one is expected to have most of the weight."""
_HTML_WIDTH = 600


class Row(NamedTuple):
    """One distinct trace: its weight (linear), its tokens (EOS included) and its text."""

    weight: float
    num_tokens: int
    text: str


class Rows(NamedTuple):
    """The heaviest distinct traces, how many with weight there are in all, and the weight of the others."""

    rows: list[Row]
    num_distinct: int
    rest: float


def summary(posterior: PosteriorArrays, num_traces: int = 10) -> str:
    """Return a table of the heaviest distinct traces under the facts of the run, as plain text.

    Args:
        posterior: of one run, not a batch of them.
        num_traces: rows of the table, >= 1.
    """
    found = heaviest(posterior, num_traces)
    lines = facts(posterior, found.num_distinct)
    lines.append(" weight  tokens  text")
    lines += [
        f"{percent(row.weight):>7}  {row.num_tokens:6d}  {shorten(escape(row.text), _TEXT_WIDTH)}"
        for row in found.rows
    ]
    if more := found.num_distinct - len(found.rows):
        lines.append(f"{percent(found.rest):>7}          in {counted(more, 'more trace')}")
    return "\n".join(lines)


def to_html(posterior: PosteriorArrays) -> str:
    """Return the summary as an HTML table with a bar for each weight; all text is escaped."""
    if posterior.tokens.ndim != 2 or not posterior.tokens.shape[1]:  # a batch, or no traces: no table to draw
        return f"<pre>{html.escape(repr(posterior))}</pre>"
    found = heaviest(posterior, 10)
    head = "<br>".join(html.escape(line) for line in facts(posterior, found.num_distinct))
    body = [_html_row(row.weight, str(row.num_tokens), _html_text(row.text)) for row in found.rows]
    if more := found.num_distinct - len(found.rows):
        body.append(_html_row(found.rest, "", f"<i>in {counted(more, 'more trace')}</i>"))
    header = "".join(f'<th style="text-align:left">{name}</th>' for name in ("weight", "", "tokens", "text"))
    # The classes keep MathJax from typesetting what stands between dollar signs in a trace.
    return (
        f'<div class="tex2jax_ignore mathjax_ignore"><p>{head}</p>'
        f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def heaviest(posterior: PosteriorArrays, num_traces: int) -> Rows:
    """Return the heaviest distinct traces; traces without weight are not part of the posterior."""
    num_traces = check_count("num_traces", num_traces, 1)
    if posterior.tokens.ndim != 2:
        raise ValueError(
            "posterior: expected one posterior with tokens of shape [N, T], got a batch of shape "
            f"{posterior.tokens.shape}; take one of them with jax.tree.map(lambda x: x[i], posterior)"
        )
    distinct, weights = merge(posterior)
    num_distinct = int((weights > 0).sum())
    shown = min(num_traces, num_distinct)
    tokens = traces(posterior)
    rows = [
        Row(float(weight), len(tokens[row]), text_of(posterior, tokens[row]))
        for row, weight in zip(distinct[:shown], weights[:shown], strict=True)
    ]
    return Rows(rows, num_distinct, float(weights[shown:].sum()))


def facts(posterior: PosteriorArrays, num_distinct: int | None) -> list[str]:
    """Return the lines above the table: what ran, the evidence, what it cost, and what went wrong.

    `num_distinct` is None where the program does not tell its traces.
    """
    stats = history(posterior.stats)
    method = f" by {posterior.method}" if posterior.method else ""
    told = "no traces told" if num_distinct is None else counted(num_distinct, "distinct trace")
    lines = [
        f"Posterior{method}: {rows_in_words(posterior)}, {told}",
        f"log evidence {format_log(float(posterior.log_evidence))}, {effective(posterior)}",
    ]
    cost = []
    if stats.tokens_generated is not None:
        generated = int(stats.tokens_generated)
        cost.append(f"{counted(generated, 'token')} generated")
        if stats.tokens_discarded is not None:
            discarded = int(stats.tokens_discarded)
            cost.append(f"{discarded} discarded ({discarded / max(generated, 1):.0%})")
    if stats.resampled is not None:
        cost.append(counted(int(stats.resampled.sum()), "resampling"))
    cost.append(counted(int(stats.num_steps), "step"))
    lines.append(", ".join(cost))
    lines += ancestry(posterior)
    if stats.degenerate is not None and bool(stats.degenerate):
        lines.append(
            "DEGENERATE: every particle had weight zero; the weights below are uniform and mean nothing"
        )
    if stats.invalid is not None and bool(stats.invalid):
        lines.append(
            "INVALID VALUES: a potential, a proposal or the model gave NaN or +inf; weight zero was given"
        )
    return lines


def ancestry(posterior: PosteriorArrays) -> list[str]:
    """Say what the effective sample size of the last weights does not: how few the particles descend from."""
    stats, lines = history(posterior.stats), []
    if posterior.origin or stats.ess is None or stats.ancestors is None:
        return lines
    n = posterior.tokens.shape[0]
    if stats.resampled is not None and stats.resampled.any():
        mass = ancestral_mass(np.asarray(stats.ancestors), linear_weights(posterior))
        left = (mass[:-1] > 0).sum(axis=1)
        alone = int(np.flatnonzero(left == 1).max(initial=0))
        until = f"up to step {alone + 1}" if alone else "at step 1"
        rest = f", {left[-1]} at step {len(left)}" if left[-1] > left[0] else ""
        lines.append(f"ancestors left: {left[0]} of {n} {until}{rest}")
    ess = np.where(stats.ess > 0, stats.ess, np.inf)
    if n >= LEAST_PARTICLES and ess.size and ess.min() < ONE_PARTICLE:
        step = int(ess.argmin())
        lines.append(
            f"ONE PARTICLE carries the evidence: at step {step + 1} the effective sample size was "
            f"{ess[step]:.2f} of {n}; the evidence and the weights can be far off"
        )
    return lines


def effective(posterior: PosteriorArrays) -> str:
    """Return the effective sample size in words; of merged or redrawn rows it is not that of the run."""
    n, ess = posterior.tokens.shape[0], effective_sample_size(linear_weights(posterior))
    if posterior.origin:
        return f"ESS of these {n} weights {ess:.2f}"
    return f"ESS {ess:.2f} ({ess / n:.0%} of {n})"


def format_log(value: float) -> str:
    """Format a log evidence; "none" for NaN, which stands for a method that estimates none."""
    return "none" if np.isnan(value) else f"{value:.3f}"


def percent(weight: float) -> str:
    """Format a weight; a small one does not read as zero."""
    return "<0.01%" if 0 < weight < 5e-5 else f"{weight:.2%}"


def _html_text(text: str) -> str:
    return html.escape(escape(shorten(text, _HTML_WIDTH), keep="\n"))


def _html_row(weight: float, num_tokens: str, text: str) -> str:
    bar = f'<div style="width:{100 * weight:.1f}px;height:0.8em;background:#0072b2"></div>'
    cells = (
        ("text-align:right", html.escape(percent(weight))),
        ("width:100px;text-align:left", bar),
        ("text-align:right", num_tokens),
        ("text-align:left;white-space:pre-wrap;overflow-wrap:anywhere", text),
    )
    return "<tr>" + "".join(f'<td style="{style}">{cell}</td>' for style, cell in cells) + "</tr>"
