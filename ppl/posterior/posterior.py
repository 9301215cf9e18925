"""What inference returns: a weighted sample of traces, the evidence, and how it came about."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ponder.arguments import check_count, check_key
from ponder.models.protocols import Tokenizer
from ponder.models.pytrees import pytree, static
from ponder.posterior.arrays import (
    Stats,
    check_on,
    effective_sample_size,
    linear_weights,
    merge,
    rows_in_words,
    text_of,
    traces,
)

if TYPE_CHECKING:
    from ponder.posterior.answers import Answers

__all__ = ["Posterior", "Stats", "Trace"]


class Trace(NamedTuple):
    """One trace: its tokens (EOS included), its text, and the log of its weight."""

    tokens: np.ndarray
    text: str
    log_weight: float


@pytree
class Posterior:
    """A weighted sample of N traces of at most T tokens; a pytree.

    Attributes:
        tokens: int32[N, T]; padded beyond the lengths.
        lengths: int32[N]; tokens, EOS included.
        log_weights: float32[N]; normalised, so that their logsumexp is 0.
        log_evidence: float32[]; log of the estimate of Z = Σ_x p(x) Φ(x); NaN where the method has none.
        log_prior: float32[N]; log p(x).
        log_potential: float32[N]; log Φ(x).
        stats: see `Stats`.
        tokenizer: of the language model, or None.
        cut: stop strings and stop tokens that the texts leave out, with what their token has beyond them;
            the tokens keep them. See `include_stop` of `ponder.Generation`.
        method: name of the kernel.
        origin: where the rows come from if not straight from a run, such as "merged from 32 particles".
    """

    tokens: jax.Array
    lengths: jax.Array
    log_weights: jax.Array
    log_evidence: jax.Array
    log_prior: jax.Array
    log_potential: jax.Array
    stats: Stats
    tokenizer: Tokenizer | None = static(default=None)
    cut: tuple[str | int, ...] = static(default=())
    method: str = static(default="")
    origin: str = static(default="")

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __repr__(self) -> str:
        if isinstance(self.tokens, Tracer) or self.tokens.ndim != 2:
            return f"Posterior({self.method}, tokens {self.tokens.shape})"
        if not self.tokens.shape[1]:
            from ponder.posterior.display import facts

            return "\n".join(facts(self, None))
        return self.summary(5)

    @property
    def weights(self) -> np.ndarray:
        """Normalised weights on the linear scale, float64[N]."""
        return linear_weights(self)

    @property
    def ess(self) -> float:
        """Effective sample size of the final weights, (Σ w)² / Σ w², in particles.

        It counts neither ties between traces nor common ancestors: see `unique` and `plot_genealogy`.
        """
        return effective_sample_size(self.weights)

    @property
    def text(self) -> list[str]:
        """The generated text of each trace, without special tokens."""
        return [text_of(self, tokens) for tokens in traces(self)]

    def expectation(self, f: Callable[[Any], Any], on: str = "text") -> np.ndarray:
        """Estimate E[f(x)] under the posterior, Σ_n w_n f(x_n).

        Args:
            f: maps one trace to a number, a bool or an array.
            on: what f is given: "text" (str) or "tokens" (int array of the trace's length).

        Returns:
            The estimate, of f's shape. Consistent as N grows, with a bias of order 1/N.

        Raises:
            TypeError: `f` is no function.
            ValueError: `on` is neither of these, it is a batch of posteriors, or the program does not tell
                its traces.
        """
        check_on(on)
        if not callable(f):
            raise TypeError(f"f: expected a function of a trace, got {f!r}")
        values = np.asarray([f(x) for x in (self.text if on == "text" else traces(self))], np.float64)
        weights = self.weights
        keep = weights > 0  # an infinite f of a trace without weight must not become NaN
        return np.tensordot(weights[keep], values[keep], axes=1)

    def sample(self, key: jax.Array, n: int) -> Posterior:
        """Draw n traces with replacement, in proportion to their weights; their weights are then equal.

        Raises:
            TypeError: `key` is not a single PRNG key.
            ValueError: `n` is not an integer >= 1, or it is a batch of posteriors.
        """
        key, n = check_key(key), check_count("n", n, 1)
        rows = np.asarray(jax.random.choice(key, len(self), (n,), p=jnp.asarray(self.weights, jnp.float32)))
        return self._rows(rows, np.full(n, -np.log(n)), f"drawn from {rows_in_words(self)}")

    def mode(self) -> Trace:
        """Return the trace of the highest posterior density p(x) Φ(x) among the particles with weight.

        Raises:
            ValueError: it is a batch of posteriors, or the program does not tell its traces.
        """
        joint = np.asarray(self.log_prior, np.float64) + np.asarray(self.log_potential, np.float64)
        rows = traces(self)
        row = int(np.argmax(np.where(self.weights > 0, joint, -np.inf)))
        tokens = rows[row]
        return Trace(tokens, text_of(self, tokens), float(self.log_weights[row]))

    def unique(self) -> Posterior:
        """Merge equal traces, adding their weights; the heaviest comes first.

        The evidence and the stats stay those of the run; `ess` is that of the merged weights.
        """
        rows, weights = merge(self)
        with np.errstate(divide="ignore"):
            log_weights = np.log(weights)
        return self._rows(rows, log_weights, f"merged from {rows_in_words(self)}")

    def answers(self, extract: Callable[[Any], Hashable | None], on: str = "text") -> Answers:
        """Return the posterior over answers: traces that come to the same answer, taken together.

        Each probability has a standard error: from the weights, from the genealogy where particles were
        resampled, from the autocorrelation of a Markov chain. They are NaN where the run does not tell, and
        for rows that come from `sample` or `unique`: ask the run's own posterior.

        Args:
            extract: maps a trace to its answer, which is hashable, or None if it has none: these are taken
                together too. `ponder.extract_number` is one, for answers that are numbers. Called on the
                host, once for each distinct trace with weight.
            on: what `extract` is given: "text" (str) or "tokens" (int array of the trace's length).

        Raises:
            TypeError: `extract` is no function, or an answer is not hashable.
            ValueError: `on` is neither of these, it is a batch of posteriors, or being traced, or the program
                does not tell its traces.
        """
        from ponder.posterior.answers import posterior_over_answers

        return posterior_over_answers(self, extract, on)

    def save(self, path: str | os.PathLike) -> None:
        """Write this posterior into one safetensors file, to be read by `load` without the model.

        Raises:
            ValueError: it is a batch of posteriors, or its arrays do not fit together.
            OSError: the file cannot be written.
        """
        from ponder.posterior.saving import save

        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, tokenizer: Tokenizer | None = None) -> Posterior:
        """Read a posterior that `save` wrote; it shows the stored texts and needs no model.

        Args:
            path: the file.
            tokenizer: of the language model; without it, only the stored traces can be decoded.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, no saved posterior, or written by a newer ponder; or the
                tokenizer gives other texts than the stored ones.
        """
        from ponder.posterior.saving import load

        return cls(**load(path, tokenizer))

    def summary(self, num_traces: int = 10) -> str:
        """Return a table of the heaviest traces with the evidence and the effective sample size.

        Raises:
            ValueError: `num_traces` is not an integer >= 1, it is a batch of posteriors, or the program does
                not tell its traces.
        """
        from ponder.posterior.display import summary

        return summary(self, num_traces)

    def _repr_html_(self) -> str:
        from ponder.posterior.display import to_html

        return to_html(self)

    def plot_genealogy(self, ax: Any = None) -> Any:
        """Draw which particles descend from which, step by step; return the matplotlib axes."""
        from ponder.posterior.plotting import plot_genealogy

        return plot_genealogy(self, ax)

    def plot(self) -> Any:
        """Draw weights, genealogy and effective sample size; return the matplotlib figure."""
        from ponder.posterior.plotting import plot_posterior

        return plot_posterior(self)

    def _rows(self, rows: np.ndarray, log_weights: np.ndarray, origin: str) -> Posterior:
        """Take rows; what is told per particle in the stats no longer applies to them."""
        stats = self.stats._replace(ancestors=None, num_tokens=None)
        names = ("tokens", "lengths", "log_prior", "log_potential")
        # On the host: indexing there is free, where JAX would compile it for every number of rows.
        taken = {name: np.asarray(getattr(self, name))[rows] for name in names}
        arrays = jax.device_put(taken | {"log_weights": np.asarray(log_weights, np.float32)})
        return dataclasses.replace(self, **arrays, stats=stats, origin=origin)
