"""The posterior over answers: traces that come to the same answer, taken together."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np
from jax.core import Tracer

from ponder.arguments import check_count, escape, shorten
from ponder.posterior.answer_errors import answer_errors
from ponder.posterior.arrays import (
    PosteriorArrays,
    check_on,
    check_single,
    counted,
    linear_weights,
    rows_in_words,
    text_of,
    traces,
)
from ponder.posterior.display import percent

__all__ = ["Answers", "answers_of", "posterior_over_answers"]

_TEXT_WIDTH = 60
_HTML_WIDTH = 600


class _Line(NamedTuple):
    """One line of the table; a note is text of our own, and no answer."""

    probability: float
    error: str
    num_traces: int
    text: str
    is_note: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """The posterior over K answers, the heaviest first; made by `Posterior.answers`.

    Attributes:
        answers: what `extract` gave, K of them; None stands for the traces without an answer.
        probability: float64[K]; estimate of the answer's posterior probability. They sum to 1.
        standard_error: float64[K]; of these estimates, by `answer_errors`. NaN where the run does not
            tell. Zero for an only answer means that no other turned up, not that none has probability.
        ess: effective sample size of the answers, in independent traces: see `AnswerErrors`.
        num_traces: int64[K]; rows with weight that gave the answer.
        errors: where the standard errors come from, or why there are none.
        rows: what was counted, such as "64 particles".
        method: name of the kernel.
    """

    answers: tuple[Hashable, ...]
    probability: np.ndarray
    standard_error: np.ndarray
    ess: float
    num_traces: np.ndarray
    errors: str
    rows: str
    method: str = ""

    def __len__(self) -> int:
        return len(self.answers)

    def __repr__(self) -> str:
        return self.summary(5)

    def mode(self) -> Hashable:
        """Return the most probable answer, None if that is to have none; ties go to the first row."""
        return self.answers[0]

    def probability_of(self, answer: Hashable) -> float:
        """Return the estimated probability of an answer, 0 if no trace gave it."""
        return float(self.probability[self.answers.index(answer)]) if answer in self.answers else 0.0

    def summary(self, num_answers: int = 10) -> str:
        """Return a table of the most probable answers with their standard errors."""
        lines = [*self._facts(), "probability  std. error  traces  answer"]
        for probability, error, num_traces, text, _ in self._lines(num_answers):
            text = shorten(escape(text), _TEXT_WIDTH)
            lines.append(f"{percent(probability):>11}  {error:>10}  {num_traces:6d}  {text}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the summary as an HTML table with a bar for each probability; all text is escaped."""
        head = "<br>".join(html.escape(line) for line in self._facts())
        names = ("probability", "", "std. error", "traces", "answer")
        header = "".join(f'<th style="text-align:left">{name}</th>' for name in names)
        body = "".join(map(_html_row, self._lines(10)))
        # The classes keep MathJax from typesetting what stands between dollar signs in an answer.
        return (
            f'<div class="tex2jax_ignore mathjax_ignore"><p>{head}</p>'
            f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def _lines(self, num_answers: int) -> list[_Line]:
        num_answers = check_count("num_answers", num_answers, 1)
        columns = (self.answers, self.probability, self.standard_error, self.num_traces)
        lines = [
            _Line(p, "?" if np.isnan(e) else f"{e:.2%}", k, "(no answer)" if a is None else str(a), a is None)
            for a, p, e, k in list(zip(*columns, strict=True))[:num_answers]
        ]
        if more := len(self) - len(lines):
            rest, traces = self.probability[num_answers:].sum(), self.num_traces[num_answers:].sum()
            lines.append(_Line(rest, "", traces, f"in {counted(more, 'more answer')}", True))
        return lines

    def _facts(self) -> list[str]:
        method = f" by {self.method}" if self.method else ""
        first = f"Answers{method}: {self.rows}, {counted(len(self), 'distinct answer')}"
        ess = "unknown" if np.isnan(self.ess) else "infinite" if np.isinf(self.ess) else f"{self.ess:.2f}"
        return [first, f"ESS of the answers {ess}, standard errors {self.errors}"]


def posterior_over_answers(
    posterior: PosteriorArrays, extract: Callable[[Any], Hashable | None], on: str = "text"
) -> Answers:
    """Add up the weights of the traces that give the same answer; see `Posterior.answers`.

    Raises:
        TypeError: `extract` is no function, or an answer is not hashable.
        ValueError: `on` is neither "text" nor "tokens", or the posterior is a batch of posteriors, is being
            traced, or holds no traces.
    """
    _check_values(posterior)
    weights = linear_weights(posterior)
    found = answers_of(posterior, extract, weights > 0, on)
    order = {answer: i for i, answer in enumerate(dict.fromkeys(found.values()))}
    indicators = np.zeros((len(weights), len(order)), bool)
    for row, answer in found.items():
        indicators[row, order[answer]] = True
    probability = np.minimum(weights @ indicators, 1.0)  # a sum of all weights may round to more
    # Rounded, so that a tie goes to the first row and not to the luckier last bit.
    heaviest = np.argsort(-np.round(probability, 6), kind="stable")
    indicators = indicators[:, heaviest]
    errors = answer_errors(posterior, indicators)
    names = list(order)
    return Answers(
        answers=tuple(names[i] for i in heaviest),
        probability=probability[heaviest],
        standard_error=errors.standard_error,
        ess=errors.ess,
        num_traces=indicators.sum(axis=0),
        errors=errors.source,
        rows=rows_in_words(posterior),
        method=posterior.method,
    )


def answers_of(
    posterior: PosteriorArrays, extract: Callable[[Any], Hashable | None], keep: Any, on: str = "text"
) -> dict[int, Hashable]:
    """Return the answers of the rows that are kept, bool[N], by row; each distinct trace is read once.

    Raises:
        TypeError: `extract` is no function, or an answer is not hashable.
        ValueError: `on` is neither "text" nor "tokens", or the posterior is a batch of posteriors, is being
            traced, or holds no traces.
    """
    check_on(on)
    if not callable(extract):
        given = "a text" if on == "text" else on
        raise TypeError(f"extract: expected a function of {given}, got {extract!r}")
    _check_values(posterior)
    tokens, answer_of, found = traces(posterior), {}, {}
    for row in np.flatnonzero(keep):
        given = text_of(posterior, tokens[row]) if on == "text" else tokens[row]
        name = given if isinstance(given, str) else tuple(given.tolist())
        if name not in answer_of:
            answer_of[name] = answer = extract(given)
            try:
                hash(answer)
            except TypeError:
                raise TypeError(
                    f"extract: expected a hashable answer or None, got {answer!r} ({type(answer).__name__})"
                ) from None
        found[int(row)] = answer_of[name]
    return found


def _check_values(posterior: PosteriorArrays) -> None:
    if isinstance(posterior.tokens, Tracer):
        raise ValueError("posterior: expected values, got tracers: answers are read from texts, outside jit")
    check_single(posterior)


def _html_row(line: _Line) -> str:
    bar = f'<div style="width:{100 * line.probability:.1f}px;height:0.8em;background:#0072b2"></div>'
    text = html.escape(escape(shorten(line.text, _HTML_WIDTH), keep="\n"))
    cells = (
        ("text-align:right", html.escape(percent(line.probability))),
        ("width:100px;text-align:left", bar),
        ("text-align:right", line.error),
        ("text-align:right", str(line.num_traces)),
        (
            "text-align:left;white-space:pre-wrap;overflow-wrap:anywhere",
            f"<i>{text}</i>" if line.is_note else text,
        ),
    )
    return "<tr>" + "".join(f'<td style="{style}">{cell}</td>' for style, cell in cells) + "</tr>"
