"""How sure the probabilities of answers are: standard errors from one run.

Trace n has weight w_n and answer a_n. With p_a = Σ_n w_n 1[a_n = a] and d_n = w_n (1[a_n = a] - p_a), the
variance of p_a is estimated by

- independent traces: N/(N-1) Σ_n d_n², the delta method for normalised weights;
- particles that were resampled R times: (N/(N-1))^(R+1) Σ_e (Σ_{n in e} d_n)², the inner sum over the family
  e of the particles that descend from row e of the first step. Without resampling it is the formula above. It
  was derived for multinomial resampling; for the other schemes it has been measured only;
- draws of a Markov chain: p_a (1 - p_a) / (n_a - 1), n_a the effective sample size of the series 1[a_n = a].

All are consistent, and too small where traces that hardly ever turn up have much of the weight. So is the
second where few families are left: the first steps are then a sample of that few. With one family (or one
trace) that has all the weight, the sums are zero and say nothing: NaN. No estimate exceeds p_a (1 - p_a), the
most that the variance of a number in [0, 1] with mean p_a can be.

References:
    Chan and Lai (2013), A general theory of particle filters in hidden Markov models and some applications;
    Lee and Whiteley (2018), Variance estimation in the particle filter, whose factor for R resamplings it is;
    Geyer (1992), Practical Markov chain Monte Carlo (the initial sequence, as NumPyro computes it).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ponder.posterior.arrays import PosteriorArrays, history, linear_weights

__all__ = ["MIN_DRAWS", "AnswerErrors", "answer_errors"]

MIN_DRAWS = 4
"""Least length of a Markov chain from which an autocorrelation is estimated."""


class AnswerErrors(NamedTuple):
    """Standard errors of K probabilities.

    Attributes:
        standard_error: float64[K]; NaN where the run does not tell.
        ess: effective sample size of the answers: that many independent traces would give the same total
            variance, 1 + Σ_a p_a (1 - p_a) / Σ_a se_a², at most N. With one answer only, that of the
            families' weights. Infinite for exact probabilities, NaN where the errors are.
        source: where the errors come from, or why there are none.
    """

    standard_error: np.ndarray
    ess: float
    source: str


def answer_errors(posterior: PosteriorArrays, indicators: np.ndarray) -> AnswerErrors:
    """Estimate how far the weight of each answer may be off.

    Args:
        posterior: of one run, not a batch of them.
        indicators: bool[N, K]; whether row n gives answer k.
    """
    stats, (n, k) = history(posterior.stats), indicators.shape
    # Rows that were merged or drawn again tell nothing of the run's errors, which `sample` adds to besides.
    if posterior.origin:
        return _unknown(k, f"none for rows {posterior.origin}: ask the run's own posterior")
    if stats.degenerate is not None and bool(stats.degenerate):
        return _unknown(k, "none: every particle had weight zero, and the probabilities mean nothing")
    if posterior.method == "exact":
        return AnswerErrors(np.zeros(k), np.inf, "zero: every trace was enumerated")
    if stats.acceptance is not None:
        return _of_chain(indicators)
    if np.isnan(float(posterior.log_evidence)):
        return _unknown(k, f"none: {posterior.method or 'the method'} has no stated target")
    weights = linear_weights(posterior)
    families, num_resamplings = np.arange(n), 0
    if stats.resampled is not None and (num_resamplings := int(np.asarray(stats.resampled).sum())):
        if stats.ancestors is None:
            return _unknown(k, "none: the genealogy of the resampled particles is not known")
        families = _first_ancestors(np.asarray(stats.ancestors))
    count = len(np.unique(families[weights > 0]))
    if count == 1:
        one = "all particles with weight descend from one" if num_resamplings else "one trace has all weight"
        return _unknown(k, f"none: {one}")
    probability = weights @ indicators
    deviations = weights[:, None] * (indicators - probability)
    sums = np.zeros((n, k))
    np.add.at(sums, families, deviations)
    variance = (n / (n - 1)) ** (num_resamplings + 1) * (sums**2).sum(axis=0)
    if num_resamplings:
        source = f"from the genealogy: {count} families"
    else:
        source = "from the weights of independent traces"
    kish = 1 / np.sum(np.bincount(families, weights) ** 2)
    return _bounded(probability, variance, n, kish, source)


def _of_chain(indicators: np.ndarray) -> AnswerErrors:
    """The errors of equally weighted draws in the order of the chain."""
    n, k = indicators.shape
    if n < MIN_DRAWS:
        return _unknown(k, f"none: {n} draws of a Markov chain are too few")
    if k == 1:  # it may be stuck
        return _unknown(k, "none: all draws of the Markov chain gave one answer")
    from numpyro.diagnostics import effective_sample_size

    size = effective_sample_size(indicators[None].astype(np.float64))
    # Negative: so strong an alternation that the sum of autocorrelations is. None gets more than N.
    size = np.where((size > 0) & (size < n), size, n)
    probability = indicators.mean(axis=0)
    variance = probability * (1 - probability) / np.maximum(size - 1, 1)
    return _bounded(probability, variance, n, np.nan, "from the autocorrelation of the Markov chain")


def _bounded(
    probability: np.ndarray, variance: np.ndarray, n: int, ess_of_one: float, source: str
) -> AnswerErrors:
    most = np.clip(probability * (1 - probability), 0, None)
    variance = np.minimum(variance, most)
    if len(probability) == 1:
        ess = ess_of_one
    else:
        # Zero only by chance, where the deviations of every family cancel.
        ess = 1 + most.sum() / variance.sum() if variance.sum() > 0 else np.inf
    return AnswerErrors(np.sqrt(variance), float(min(ess, n)), source)


def _unknown(k: int, reason: str) -> AnswerErrors:
    return AnswerErrors(np.full(k, np.nan), np.nan, reason)


def _first_ancestors(ancestors: np.ndarray) -> np.ndarray:
    """Row of the first step that each final particle descends from, int[N]; `ancestors` int[S, N]."""
    rows = np.arange(ancestors.shape[1])
    for of_step in ancestors[::-1]:
        rows = of_step[rows]
    return rows
