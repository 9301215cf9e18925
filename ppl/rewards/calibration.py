"""Calibration of scores: do they mean what they say, and monotone maps that make them.

Everything here is fitted on held-out pairs of a score and an outcome: what a process reward model said of a
trace, and whether the trace was right. A fitted map is a pytree and a function of arrays inside jit; it is
what `ponder.process_reward` takes as `calibration=`.

References:
    Guo, Pleiss, Sun and Weinberger (2017), On calibration of modern neural networks, arXiv:1706.04599
    (temperature scaling, expected calibration error); Zadrozny and Elkan (2002), Transforming classifier
    scores into accurate multiclass probability estimates (isotonic regression); Brown, Cai and DasGupta
    (2001), Interval estimation for a binomial proportion (Jeffreys intervals).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ponder.arguments import check_count
from ponder.models.pytrees import pytree
from ponder.rewards.links import SMALLEST, clip_scores, logit

__all__ = [
    "PiecewiseLinear",
    "Reliability",
    "Temperature",
    "expected_calibration_error",
    "isotonic",
    "quantile",
    "reliability",
    "temperature",
]

_LARGEST_SLOPE = 100.0


@pytree
class Temperature:
    """The map r' = sigmoid(logit(r) / temperature); made by `temperature`.

    Attributes:
        temperature: float32[]; above 1 the scores were too sure of themselves.
    """

    temperature: Any

    def __call__(self, scores: jax.Array) -> jax.Array:
        """Return r' of scores of any shape, in (0, 1)."""
        return clip_scores(jax.nn.sigmoid(logit(clip_scores(scores)) / self.temperature))


@pytree
class PiecewiseLinear:
    """A monotone map through knots, linear between them and constant beyond; see `isotonic`, `quantile`.

    Attributes:
        scores: float32[K]; rising.
        values: float32[K]; in (0, 1), not falling.
    """

    scores: jax.Array
    values: jax.Array

    def __call__(self, scores: jax.Array) -> jax.Array:
        """Return r' of scores of any shape, in (0, 1)."""
        scores = jnp.asarray(scores, jnp.float32)
        return clip_scores(jnp.interp(scores, self.scores, self.values))


def temperature(scores: Any, outcomes: Any) -> Temperature:
    """Fit one temperature on the logit by maximum likelihood.

    The likelihood is concave in 1 / temperature; its maximum is found to rounding, in [0.01, 100]. At 0.01
    the scores tell outcomes apart without an error, and more data are needed to say by how much.

    Args:
        scores: float[n] in [0, 1]; clipped to [2^-24, 1 - 2^-24].
        outcomes: bool or 0/1 [n]; both have to occur.

    Raises:
        TypeError: `scores` or `outcomes` does not hold numbers.
        ValueError: they are not two arrays of one shape [n], n >= 1, a score is outside [0, 1], or an outcome
            is neither 0 nor 1; all outcomes are equal; or higher scores do not mean better outcomes.
    """
    from scipy.optimize import brentq
    from scipy.special import expit

    r, y = _pairs(scores, outcomes, both=True)
    z = np.log(r) - np.log1p(-r)

    def gradient(slope: float) -> float:
        return float(((expit(slope * z) - y) * z).sum())

    if gradient(1 / _LARGEST_SLOPE) >= 0:
        raise ValueError(
            "scores: expected higher scores to go with outcomes of 1; the best temperature is infinite or "
            "negative, and no rising map helps"
        )
    if gradient(_LARGEST_SLOPE) <= 0:
        slope = _LARGEST_SLOPE
    else:
        slope = float(brentq(gradient, 1 / _LARGEST_SLOPE, _LARGEST_SLOPE, xtol=1e-12))  # pyright: ignore[reportArgumentType]
    return Temperature(jnp.float32(1 / slope))


def isotonic(scores: Any, outcomes: Any) -> PiecewiseLinear:
    """Fit the rising map of largest likelihood, by pooling adjacent violators.

    Linear between the blocks, so that it is continuous. Values stay in [1 / (n + 2), (n + 1) / (n + 2)]: n
    pairs cannot show more.

    Args:
        scores: float[n] in [0, 1].
        outcomes: bool or 0/1 [n]; both have to occur.

    Raises:
        TypeError: `scores` or `outcomes` does not hold numbers.
        ValueError: they are not two arrays of one shape [n], n >= 1, a score is outside [0, 1], or an outcome
            is neither 0 nor 1; or all outcomes are equal.
    """
    from scipy.optimize import isotonic_regression

    r, y = _pairs(scores, outcomes, both=True)
    distinct, place, counts = np.unique(r, return_inverse=True, return_counts=True)
    frequency = np.bincount(place, y) / counts
    fit = isotonic_regression(frequency, weights=counts)
    values = np.clip(fit.x, 1 / (len(r) + 2), (len(r) + 1) / (len(r) + 2))
    # The first and the last score of every block: all that the map needs.
    ends = np.concatenate([fit.blocks[:-1], fit.blocks[1:] - 1])
    keep = np.unique(ends)
    return _knots(distinct[keep], values[keep])


def quantile(scores: Any, outcomes: Any, *, level: float = 0.1, num_bins: int = 10) -> PiecewiseLinear:
    """Fit a cautious map: a lower bound of the success probability, bin by bin, made monotone.

    In each of up to `num_bins` bins of equal counts the bound is the `level` quantile of the posterior
    Beta(k + 1/2, n - k + 1/2) of the success probability, with k successes among n. A bin's bound is lowered
    to that of any bin above it, and the map rises from bound to bound within the bins, reaching a bin's own
    at its upper end: nowhere is it above the bound of the bin. Few data give a low bound.

    Args:
        scores: float[n] in [0, 1].
        outcomes: bool or 0/1 [n].
        level: probability in (0, 1) that the success probability of a bin is below its bound.
        num_bins: at least 1; ties may leave fewer.

    Raises:
        TypeError: `scores` or `outcomes` does not hold numbers.
        ValueError: they are not two arrays of one shape [n], n >= 1, a score is outside [0, 1], or an outcome
            is neither 0 nor 1; `level` is not in (0, 1), or `num_bins` not an integer >= 1.
    """
    from scipy.stats import beta

    r, y = _pairs(scores, outcomes)
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level!r}")
    cuts = np.arange(1, check_count("num_bins", num_bins, 1) + 1) / num_bins
    upper = np.unique(np.quantile(r, cuts, method="inverted_cdf"))
    bins = np.searchsorted(upper, r)  # bin i holds the scores in (upper[i-1], upper[i]]
    n, k = np.bincount(bins, minlength=len(upper)), np.bincount(bins, y, minlength=len(upper))
    bounds = np.asarray(beta.ppf(level, k + 0.5, n - k + 0.5))
    return _knots(upper, np.minimum.accumulate(bounds[::-1])[::-1])


def expected_calibration_error(scores: Any, outcomes: Any, num_bins: int = 10) -> float:
    """Return Σ_b (n_b / n) |frequency of success - mean score| over bins of equal width on [0, 1].

    The bins are [i / B, (i + 1) / B), the last one closed. Of a calibrated score this is above 0 by the
    noise of the frequencies, about √(B / n) / 3: compare only at the same n and B.

    Args:
        scores: float[n] in [0, 1].
        outcomes: bool or 0/1 [n].
        num_bins: B, at least 1.

    Raises:
        TypeError: `scores` or `outcomes` does not hold numbers.
        ValueError: they are not two arrays of one shape [n], n >= 1, a score is outside [0, 1], or an outcome
            is neither 0 nor 1; or `num_bins` is not an integer >= 1.
    """
    table = reliability(scores, outcomes, num_bins)
    full = table.count > 0
    gaps = np.abs(table.frequency[full] - table.mean_score[full])
    return float((table.count[full] * gaps).sum() / table.count.sum())


class Reliability(NamedTuple):
    """What was said and what happened, bin by bin; all of shape [B], NaN where a bin is empty.

    Attributes:
        left: lower end of the bin.
        right: upper end.
        count: pairs in the bin.
        mean_score: of them.
        frequency: share of successes.
        low: lower end of the interval of the success probability.
        high: upper end.
    """

    left: np.ndarray
    right: np.ndarray
    count: np.ndarray
    mean_score: np.ndarray
    frequency: np.ndarray
    low: np.ndarray
    high: np.ndarray


def reliability(scores: Any, outcomes: Any, num_bins: int = 10, *, probability: float = 0.95) -> Reliability:
    """Tabulate successes by score, in the bins of `expected_calibration_error`.

    The intervals are central ones of Beta(k + 1/2, n - k + 1/2), with k successes among n, and hold the
    success probability of a bin with the given posterior probability.

    Args:
        scores: float[n] in [0, 1].
        outcomes: bool or 0/1 [n].
        num_bins: B, at least 1.
        probability: of the intervals, in (0, 1).

    Raises:
        TypeError: `scores` or `outcomes` does not hold numbers.
        ValueError: they are not two arrays of one shape [n], n >= 1, a score is outside [0, 1], or an outcome
            is neither 0 nor 1; `num_bins` is not an integer >= 1, or `probability` not in (0, 1).
    """
    from scipy.stats import beta

    r, y = _pairs(scores, outcomes, clip=False)
    if not 0 < probability < 1:
        raise ValueError(f"probability: expected a number in (0, 1), got {probability!r}")
    edges = np.arange(check_count("num_bins", num_bins, 1) + 1) / num_bins  # linspace has .30000000000000004
    bins = np.clip(np.searchsorted(edges, r, side="right") - 1, 0, num_bins - 1)
    n, k = np.bincount(bins, minlength=num_bins), np.bincount(bins, y, minlength=num_bins)
    full = n > 0

    def of_full(values: np.ndarray) -> np.ndarray:
        return np.where(full, values, np.nan)

    tail = (1 - probability) / 2
    size = np.maximum(n, 1)
    return Reliability(
        left=edges[:-1],
        right=edges[1:],
        count=n,
        mean_score=of_full(np.bincount(bins, r, minlength=num_bins) / size),
        frequency=of_full(k / size),
        low=of_full(beta.ppf(tail, k + 0.5, n - k + 0.5)),
        high=of_full(beta.ppf(1 - tail, k + 0.5, n - k + 0.5)),
    )


def _pairs(
    scores: Any, outcomes: Any, *, both: bool = False, clip: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Check pairs of scores and outcomes; return them as float64."""
    r, y = np.asarray(scores), np.asarray(outcomes)
    if r.ndim != 1 or r.shape != y.shape or not len(r):
        raise ValueError(
            f"scores, outcomes: expected two arrays of one shape [n], n >= 1; got {r.shape} and {y.shape}"
        )
    for name, array in (("scores", r), ("outcomes", y)):
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{name}: expected numbers, got dtype {array.dtype}")
    r, y = r.astype(np.float64), y.astype(np.float64)
    wrong = ~((r >= 0) & (r <= 1))
    if wrong.any():
        raise ValueError(f"scores: expected numbers in [0, 1], got {r[wrong][:4]}")
    wrong = (y != 0) & (y != 1)
    if wrong.any():
        raise ValueError(f"outcomes: expected bools, or 0 and 1, got {y[wrong][:4]}")
    if both and y.min() == y.max():
        raise ValueError(f"outcomes: expected some of 0 and some of 1, got only {y[0]:.0f}")
    return (np.clip(r, SMALLEST, 1 - SMALLEST) if clip else r), y


def _knots(scores: np.ndarray, values: np.ndarray) -> PiecewiseLinear:
    return PiecewiseLinear(jnp.asarray(scores, jnp.float32), jnp.asarray(values, jnp.float32))
