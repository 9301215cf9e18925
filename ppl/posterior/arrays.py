"""What can be worked out from the arrays of a posterior: weights, traces, texts, merged traces, its history.

`ponder.posterior.Posterior` is the class that holds them. Whatever shows, keeps or summarises a posterior
needs no more than `PosteriorArrays`, and these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from ponder.models.protocols import Tokenizer

__all__ = [
    "PosteriorArrays",
    "Stats",
    "check_on",
    "check_single",
    "counted",
    "cut_id",
    "decode",
    "effective_sample_size",
    "history",
    "linear_weights",
    "merge",
    "rows_in_words",
    "text_of",
    "traces",
    "trim",
]


class Stats(NamedTuple):
    """How a run went; rows beyond `num_steps` are empty. T steps, N particles; None where a method has none.

    Attributes:
        num_steps: int32[]; steps taken.
        ess: float32[T]; effective sample size after weighing, before resampling.
        resampled: bool[T].
        ancestors: int32[T, N]; after step t, row n continues from what was row `ancestors[t, n]`.
        log_evidence: float32[T]; estimate of log Σ p Φ_t after step t.
        num_tokens: int32[T, N]; tokens that each row drew at step t: one, or those of a step of reasoning.
        tokens_generated: int32[]; tokens drawn in all.
        tokens_discarded: int32[]; of these, the ones that no final particle descends from.
        model_calls: int32[]; batched forward passes, the prompt's included.
        reward_calls: int32[]; batched judgements by reward models, at most one for each model and step.
        acceptance: float32[]; of Markov chains, the share of kept steps that changed the trace.
        degenerate: bool[]; every weight was zero: the evidence is -inf, the weights are uniform.
        invalid: bool[]; a potential or the model gave NaN or +inf; such particles got weight zero.
        ess_threshold: float32[]; the share of N below which the method resamples; 0 where it never does.
    """

    num_steps: jax.Array
    ess: jax.Array | None = None
    resampled: jax.Array | None = None
    ancestors: jax.Array | None = None
    log_evidence: jax.Array | None = None
    num_tokens: jax.Array | None = None
    tokens_generated: jax.Array | None = None
    tokens_discarded: jax.Array | None = None
    model_calls: jax.Array | None = None
    reward_calls: jax.Array | None = None
    acceptance: jax.Array | None = None
    degenerate: jax.Array | None = None
    invalid: jax.Array | None = None
    ess_threshold: jax.Array | None = None


class PosteriorArrays(Protocol):
    """The fields of a `Posterior`, of N traces of at most T tokens."""

    @property
    def tokens(self) -> jax.Array:
        """int32[N, T]; padded beyond the lengths."""
        ...

    @property
    def lengths(self) -> jax.Array:
        """int32[N]; tokens, EOS included."""
        ...

    @property
    def log_weights(self) -> jax.Array:
        """float32[N]; normalised logs."""
        ...

    @property
    def log_evidence(self) -> jax.Array:
        """float32[]; NaN where the method has none."""
        ...

    @property
    def log_prior(self) -> jax.Array:
        """float32[N]; log p(x)."""
        ...

    @property
    def log_potential(self) -> jax.Array:
        """float32[N]; log Φ(x)."""
        ...

    @property
    def stats(self) -> Stats:
        """How the run went."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the language model, or None."""
        ...

    @property
    def cut(self) -> tuple[str | int, ...]:
        """Stop strings and stop tokens that are left out of the texts."""
        ...

    @property
    def method(self) -> str:
        """Name of the kernel."""
        ...

    @property
    def origin(self) -> str:
        """Where the rows come from if not straight from a run."""
        ...


def check_single(posterior: PosteriorArrays) -> None:
    """Refuse a batch of posteriors, as `jax.vmap` of a run gives it."""
    if posterior.tokens.ndim != 2:
        raise ValueError(
            f"this Posterior holds runs of shape {posterior.tokens.shape[:-2]}; take one of them: "
            "jax.tree.map(lambda x: x[i], posterior)"
        )


def check_on(on: str) -> None:
    """Refuse what is no name for the form in which a function is given a trace."""
    if not isinstance(on, str) or on not in ("text", "tokens"):
        raise ValueError(f"on: expected 'text' or 'tokens', got {on!r}")


def linear_weights(posterior: PosteriorArrays) -> np.ndarray:
    """Return the normalised weights on the linear scale, float64[N]."""
    check_single(posterior)
    weights = np.exp(np.asarray(posterior.log_weights, np.float64))
    return weights / weights.sum()


def effective_sample_size(weights: np.ndarray) -> float:
    """Return (Σ w)² / Σ w² of normalised weights float[N]: between 1 and N."""
    return float(1.0 / np.sum(weights**2))


def traces(posterior: PosteriorArrays) -> list[np.ndarray]:
    """Return the tokens of each row without padding, N arrays int32[length].

    Raises:
        ValueError: it is a batch of posteriors, or its program does not tell its traces.
    """
    check_single(posterior)
    if not posterior.tokens.shape[1]:
        raise ValueError(
            f"posterior: expected one that holds traces, got {rows_in_words(posterior)} without tokens: the "
            "program does not tell its traces (it has no method `traces`); weights, log_evidence, ess and "
            "stats are there"
        )
    return trim(np.asarray(posterior.tokens), np.asarray(posterior.lengths))


def trim(tokens: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Cut rows [N, T] to their lengths [N]."""
    return [row[:length] for row, length in zip(tokens, lengths, strict=True)]


def text_of(posterior: PosteriorArrays, tokens: np.ndarray) -> str:
    """Return the text of one trace of a posterior."""
    return decode(posterior.tokenizer, tokens, posterior.cut)


def decode(tokenizer: Tokenizer | None, tokens: np.ndarray, cut: Sequence[str | int] = ()) -> str:
    """Return the text of one trace; without a tokenizer, its ids.

    Args:
        tokenizer: of the model.
        tokens: the trace.
        cut: strings and token ids that may have ended it; the text ends where the first of them begins.
    """
    tokens = cut_id(tokens, cut)
    if tokenizer is None:
        return " ".join(map(str, tokens))
    text = tokenizer.decode(tokens.tolist())
    # The stop that was complete first, and of several the longest.
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in cut if isinstance(stop, str)]
    found = [(end, start) for end, start in found if start >= 0]
    return text[: min(found)[1]] if found else text


def cut_id(tokens: np.ndarray, cut: Sequence[str | int]) -> np.ndarray:
    """Drop the last token of a trace where its id is among those that are cut off."""
    return tokens[:-1] if cut and len(tokens) and int(tokens[-1]) in cut else tokens


def merge(posterior: PosteriorArrays) -> tuple[np.ndarray, np.ndarray]:
    """Merge equal traces, adding their weights; K distinct ones, the heaviest first.

    Returns:
        The first row of each, int[K], and its weight on the linear scale, float64[K]. Ties go to the first
        row.
    """
    groups: dict[bytes, list[int]] = {}
    for row, tokens in enumerate(traces(posterior)):
        groups.setdefault(tokens.tobytes(), []).append(row)
    weights = linear_weights(posterior)
    rows = np.array([found[0] for found in groups.values()])
    mass = np.array([weights[found].sum() for found in groups.values()])
    order = np.argsort(-mass, kind="stable")
    return rows[order], mass[order]


def history(stats: Stats) -> Stats:
    """Return the stats with what is told of each step, as NumPy arrays, cut to the steps that were taken."""
    num_steps = int(stats.num_steps)
    per_step = ("ess", "resampled", "ancestors", "log_evidence", "num_tokens")
    cut = {name: np.asarray(x)[:num_steps] for name in per_step if (x := getattr(stats, name)) is not None}
    return stats._replace(**cut)


def rows_in_words(posterior: PosteriorArrays) -> str:
    """Say what was counted, such as "64 particles" or "3 traces merged from 64 particles"."""
    n = posterior.tokens.shape[0]
    noun = "trace" if posterior.origin or posterior.stats.resampled is None else "particle"
    return f"{counted(n, noun)} {posterior.origin}".rstrip()


def counted(number: int, noun: str) -> str:
    """Return "1 trace", "2 traces" and so on."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
