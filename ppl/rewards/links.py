"""From the scores of a process reward model to a likelihood: aggregation, calibration, and the link.

Every quantity is kept as a logit or a logarithm, so that scores near 0 and near 1 lose no digits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ponder.models.pytrees import pytree, static

__all__ = ["AGGREGATES", "LINKS", "SMALLEST", "Judgements", "Likelihood", "clip_scores", "logit"]

LINKS = ("bernoulli", "odds", "ratio", "exp")
AGGREGATES = ("last", "min", "prod", "mean")

SMALLEST = 2.0**-24
"""Scores are clipped to [2^-24, 1 - 2^-24], whose ends float32 holds exactly: |logit| <= 16.64."""


def clip_scores(scores: jax.Array) -> jax.Array:
    """Return scores as float32 in [2^-24, 1 - 2^-24]; NaN stays NaN."""
    return jnp.clip(jnp.asarray(scores, jnp.float32), SMALLEST, 1.0 - SMALLEST)


def logit(probability: jax.Array) -> jax.Array:
    """Return log p - log(1 - p)."""
    return jnp.log(probability) - jnp.log1p(-probability)


class Judgements(NamedTuple):
    """What was judged of N traces.

    Attributes:
        statistic: float32[N]; of the scores so far: the last, the smallest, the sum of logs, or the mean.
        count: int32[N]; units judged.
        log_value: float32[N]; log Φ.
    """

    statistic: jax.Array
    count: jax.Array
    log_value: jax.Array


@pytree
class Likelihood:
    """The map from the scores s_1 ... s_t to log Φ_t; `ponder.process_reward` states the targets.

    Attributes:
        scale: float32[]; on the logit, or β of the link "exp". A leaf: it may be traced.
        offset: float32[]; on the logit. A leaf too.
        calibration: a monotone map of (0, 1), or None.
        link: one of `LINKS`.
        aggregate: one of `AGGREGATES`.
    """

    scale: Any
    offset: Any
    calibration: Callable[[jax.Array], jax.Array] | None = None
    link: str = static(default="bernoulli")
    aggregate: str = static(default="last")

    def init(self, num_particles: int) -> Judgements:
        """Return what is known of empty traces: nothing, Φ = 1."""
        zeros = jnp.zeros(num_particles, jnp.float32)
        start = jnp.ones_like(zeros) if self.aggregate == "min" else zeros
        return Judgements(start, jnp.zeros(num_particles, jnp.int32), zeros)

    def absorb(self, before: Judgements, scores: jax.Array, judged: jax.Array) -> Judgements:
        """Add one more score `scores[N]` in the rows where `judged[N]`; the others do not change."""
        # A harmless score in the other rows: masking infinities afterwards would make their gradient NaN.
        scores = clip_scores(jnp.where(judged, scores, 0.5))
        count = before.count + 1
        statistic = self._fold(before.statistic, scores, count)
        value = self._link(before.log_value, self._judgement(statistic))
        after = Judgements(statistic, count, value)
        return Judgements(*(jnp.where(judged, new, old) for new, old in zip(after, before, strict=True)))

    def _fold(self, statistic: jax.Array, scores: jax.Array, count: jax.Array) -> jax.Array:
        match self.aggregate:
            case "last":
                return scores
            case "min":
                return jnp.minimum(statistic, scores)
            case "prod":
                return statistic + jnp.log(scores)
            case _:
                return statistic + (scores - statistic) / count.astype(jnp.float32)

    def _judgement(self, statistic: jax.Array) -> jax.Array:
        """Logit of r_t: of the aggregate, calibrated."""
        if self.calibration is not None:
            probability = clip_scores(jnp.exp(statistic) if self.aggregate == "prod" else statistic)
            mapped = jnp.asarray(self.calibration(probability))
            if mapped.shape != probability.shape:
                raise ValueError(
                    f"calibration: expected a map of arrays, element by element; got shape {mapped.shape} "
                    f"from {probability.shape}"
                )
            return logit(clip_scores(mapped))
        if self.aggregate == "prod":
            # log(1 - e^x) for x < 0 without cancellation (Mächler, 2012, Accurately computing log(1 - e^-a)).
            return statistic - jnp.where(
                statistic > -0.693, jnp.log(-jnp.expm1(statistic)), jnp.log1p(-jnp.exp(statistic))
            )
        return logit(clip_scores(statistic))

    def _link(self, log_value: jax.Array, judgement: jax.Array) -> jax.Array:
        if self.link == "exp":
            return self.scale * jax.nn.sigmoid(judgement)
        judgement = self.scale * judgement + self.offset
        match self.link:
            case "bernoulli":
                return log_value + jax.nn.log_sigmoid(judgement)
            case "odds":
                return log_value + judgement
            case _:
                return jax.nn.log_sigmoid(judgement)
