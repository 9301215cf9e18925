"""Resampling schemes: ancestors whose expected numbers are proportional to the weights.

Each takes `(key, log_weights[N], num_samples)`, with unnormalised log weights, and returns int32[num_samples]
row numbers such that E[copies of n] = num_samples · w_n / Σ w. A particle without weight is never an ancestor
while another has some.

References:
    Douc, Cappé and Moulines (2005), Comparison of resampling schemes for particle filtering.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = [
    "Resampling",
    "by_name",
    "effective_sample_size",
    "keep_survivors",
    "multinomial",
    "residual",
    "stratified",
    "systematic",
]

Resampling = Callable[[jax.Array, jax.Array, int], jax.Array]


def multinomial(key: jax.Array, log_weights: jax.Array, num_samples: int) -> jax.Array:
    """Draw ancestors independently: the simplest scheme and the noisiest."""
    return _invert(_weights(log_weights), jax.random.uniform(key, (num_samples,), jnp.float32))


def stratified(key: jax.Array, log_weights: jax.Array, num_samples: int) -> jax.Array:
    """Draw one ancestor in each of `num_samples` equal strata of the cumulative weight."""
    u = jax.random.uniform(key, (num_samples,), jnp.float32)
    return _invert(_weights(log_weights), (jnp.arange(num_samples, dtype=jnp.float32) + u) / num_samples)


def systematic(key: jax.Array, log_weights: jax.Array, num_samples: int) -> jax.Array:
    """Draw as `stratified`, with one uniform shared by all strata."""
    u = jax.random.uniform(key, (), jnp.float32)
    return _invert(_weights(log_weights), (jnp.arange(num_samples, dtype=jnp.float32) + u) / num_samples)


def residual(key: jax.Array, log_weights: jax.Array, num_samples: int) -> jax.Array:
    """Copy each particle ⌊num_samples · w⌋ times and draw the rest independently from what is left."""
    weights = _weights(log_weights)
    share = num_samples * weights / weights.sum()
    copies = jnp.floor(share)
    rows = jnp.arange(weights.shape[0], dtype=jnp.int32)
    certain = jnp.repeat(rows, copies.astype(jnp.int32), total_repeat_length=num_samples)
    drawn = _invert(share - copies, jax.random.uniform(key, (num_samples,), jnp.float32))
    num_certain = copies.sum().astype(jnp.int32)
    return jnp.where(jnp.arange(num_samples, dtype=jnp.int32) < num_certain, certain, drawn)


def by_name(resampling: str | Resampling) -> Resampling:
    """Return a scheme by its name, or the function itself.

    Raises:
        ValueError: the name is unknown.
    """
    schemes = {f.__name__: f for f in (multinomial, stratified, systematic, residual)}
    if callable(resampling):
        return resampling
    if resampling not in schemes:
        raise ValueError(
            f"resampling: expected a function or one of {', '.join(schemes)}, got {resampling!r}"
        )
    return schemes[resampling]


def effective_sample_size(log_weights: jax.Array) -> jax.Array:
    """Return (Σ w)² / Σ w² over the last axis of unnormalised log weights; 0 where none has weight."""
    w = _weights(log_weights)
    return w.sum(-1) ** 2 / jnp.maximum((w**2).sum(-1), 1e-30)


def keep_survivors(ancestors: jax.Array) -> jax.Array:
    """Reorder ancestors so that each particle that survives keeps its slot.

    The multiset is the same and particles are exchangeable after resampling; only dead slots are then
    overwritten, which `fork` does in place. A retained path keeps its slot too.
    """
    n = ancestors.shape[0]
    copies = jnp.bincount(ancestors, length=n).astype(jnp.int32)
    extra = jnp.cumsum(jnp.maximum(copies - 1, 0))
    dead = copies == 0
    # The j-th dead slot takes the j-th extra copy.
    rank = jnp.cumsum(dead, dtype=jnp.int32) - 1
    source = jnp.searchsorted(extra, rank, side="right").astype(jnp.int32)
    return jnp.where(dead, source, jnp.arange(n, dtype=jnp.int32))


def _weights(log_weights: jax.Array) -> jax.Array:
    """Weights on the linear scale, the largest of them 1; all 0 where none has weight."""
    top = log_weights.max(-1, keepdims=True)
    return jnp.exp(log_weights - jnp.where(jnp.isfinite(top), top, 0.0))


def _invert(weights: jax.Array, u: jax.Array) -> jax.Array:
    """Rows with weight where the cumulative weight first exceeds `u` times the total.

    Sums of many terms are not monotone to the last bit: hence the running maximum, and the step on to the
    next row that has weight (or the last such row).
    """
    n = weights.shape[0]
    cumulative = jax.lax.cummax(jnp.cumsum(weights))
    index = jnp.searchsorted(cumulative, u * cumulative[-1], side="right").astype(jnp.int32)
    positive = weights > 0
    last = n - 1 - jnp.argmax(positive[::-1]).astype(jnp.int32)
    following = jax.lax.cummin(jnp.where(positive, jnp.arange(n, dtype=jnp.int32), n), reverse=True)
    return jnp.minimum(following[jnp.minimum(index, n - 1)], last)
