"""Drawing tokens from a large vocabulary, and the transforms of logits that define a prior."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["PriorSettings", "draw", "log_prior"]

_BLOCK = 256
_REAL = int | float | np.integer | np.floating


@dataclasses.dataclass(frozen=True)
class PriorSettings:
    """Transforms of the model's logits that belong to the prior p, as in Hugging Face `generate`.

    Attributes:
        temperature: logits are divided by it, before the others.
        top_k: keep the k most probable tokens, and those as probable as the last of them.
        top_p: keep the smallest set of most probable tokens whose mass reaches p; of tokens that are equally
            probable, those of lower ids.
        min_p: keep tokens with at least min_p times the probability of the most probable one.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            ValueError: `temperature` is not a finite number above 0, `top_k` not an integer >= 1, or `top_p`
                or `min_p` not in (0, 1].
        """
        if not (isinstance(self.temperature, _REAL) and 0 < self.temperature < float("inf")):
            raise ValueError(f"temperature: expected a finite number > 0, got {self.temperature!r}")
        if self.top_k is not None and (not isinstance(self.top_k, int | np.integer) or self.top_k < 1):
            raise ValueError(f"top_k: expected an integer >= 1 or None, got {self.top_k!r}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, _REAL) and 0 < value <= 1):
                raise ValueError(f"{name}: expected a number in (0, 1] or None, got {value!r}")


def log_prior(logits: jax.Array, settings: PriorSettings) -> jax.Array:
    """Return the normalised log prior float32[N, V]; tokens that a filter drops get -inf."""
    logits = logits.astype(jnp.float32)  # whatever the model's dtype
    if settings.temperature != 1.0:
        logits = logits / settings.temperature
    if settings.top_k is not None and settings.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, settings.top_k)[0][..., -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if settings.top_p is not None and settings.top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # mass of the more probable ones
        kept = before < settings.top_p
        smallest = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
        # Of the tokens that tie with the last one, as many as the set has room for.
        ties = logits == smallest
        room = (kept & (ordered == smallest)).sum(-1, keepdims=True, dtype=jnp.int32)
        first = jnp.cumsum(ties, axis=-1, dtype=jnp.int32) <= room
        logits = jnp.where((logits > smallest) | (ties & first), logits, -jnp.inf)
    if settings.min_p is not None:
        smallest = logits.max(-1, keepdims=True) + jnp.log(settings.min_p)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.nn.log_softmax(logits, axis=-1)


def draw(key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Draw one index a row of unnormalised `log_weights [N, V]`, by inverse CDF in two stages.

    First a block of the vocabulary, then a token in it, each with its own uniform: a few percent of the cost
    of Gumbel noise over the vocabulary, and tokens rarer than the spacing of one float32 uniform are still
    drawn. A row without mass gives index 0.
    """
    n, v = log_weights.shape
    top = log_weights.max(-1, keepdims=True)
    weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(top), top, 0.0))
    weights = jnp.pad(weights, ((0, 0), (0, -v % _BLOCK))).reshape(n, -1, _BLOCK)
    u_block, u_token = jax.random.uniform(key, (2, n, 1), jnp.float32)
    block = _invert(weights.sum(-1), u_block)
    token = _invert(jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0], u_token)
    return (block * _BLOCK + token).astype(jnp.int32)


def _invert(weights: jax.Array, u: jax.Array) -> jax.Array:
    """Index of each row with mass where the cumulative sum first exceeds `u [N, 1]` times the total.

    Sums of many terms are not monotone to the last bit, and rounding may put the product at the total itself:
    hence only indices with mass count, and the last of them where none exceeds.
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    positive = weights > 0
    exceeds = positive & (cumulative > u * cumulative[:, -1:])
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    index = jnp.where(exceeds.any(-1), jnp.argmax(exceeds, axis=-1), last)
    return jnp.where(positive.any(-1), index, 0)
