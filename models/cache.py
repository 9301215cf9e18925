"""The particle cache: one shared prompt, and for each particle its own suffix of keys and values.

A prompt's keys and values are stored once; attention over them is one matrix product for all its particles,
merged with the particle's own suffix by a common maximum. With several prompts the rows are as many blocks of
equal size. Keys lie as [..., D, S] and values as [..., S, D],
the order in which each is contracted. Keys are stored after the rotary embedding, so they can be shared.

A block of the decoder attends `through_cache` or `without_cache`; it is the same block.

Axes: B prompts, N rows (particles of all prompts), C tokens of a block, H query heads, K key-value heads,
G = H / K, R = C · G queries of a key-value head, D head dimension, P prompt slots, S suffix slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ponder.models.rows import fork_rows

__all__ = [
    "Attention",
    "LayerCache",
    "ParticleCache",
    "append",
    "attend",
    "empty_layer",
    "fork",
    "per_row",
    "poison",
    "through_cache",
    "truncate",
    "without_cache",
]

Attention = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""Takes scaled queries [N, C, H, D], keys and values [N, C, K, D]; returns [N, C, H, D] and what is kept."""

SMALLEST_READ = 64
"""Suffix slots that attention always reads; each doubling up to the capacity costs compile time."""


class LayerCache(NamedTuple):
    """Keys and values of one layer; one array a layer, because stacked layers cannot be updated in place."""

    prefix_k: jax.Array  # [B, K, D, P]
    prefix_v: jax.Array  # [B, K, P, D]
    k: jax.Array  # [N, K, D, S]
    v: jax.Array  # [N, K, S, D]


class ParticleCache(NamedTuple):
    """All layers, with how much of them is filled.

    `length` is int32[] while all particles advance in lock step (a slice write), and int32[N] once
    `truncate` or a ragged block has made them differ (a scatter). Slots at or beyond `length` are garbage.
    """

    layers: tuple[LayerCache, ...]
    prefix_length: jax.Array  # int32[B]; real tokens among the P slots
    length: jax.Array  # int32[] or int32[N]; filled suffix slots

    @property
    def capacity(self) -> int:
        """Suffix slots, S."""
        return self.layers[0].k.shape[3]


def through_cache(
    layer: LayerCache, prefix_length: jax.Array, length: jax.Array, window: int | None
) -> Attention:
    """Return attention to all that the layer holds; it keeps the layer with the new keys and values."""

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, LayerCache]:
        after = append(layer, k, v, length)
        return attend(after, q, prefix_length, length, window), after

    return attention


def without_cache(visible: jax.Array | np.ndarray) -> Attention:
    """Return attention of a block to itself, where `visible bool[C, C]` (query, key); it keeps nothing.

    For training: without slots to write and branches to choose from, a step takes three quarters of the time.
    """

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        n, c, h, d = q.shape
        q = q.reshape(n, c, k.shape[2], -1, d)  # [N, C, K, G, D]
        scores = jnp.einsum("nckgd,nskd->nkgcs", q, k)  # [N, K, G, C, C]
        lowest = jnp.finfo(scores.dtype).min
        weights = jax.nn.softmax(jnp.where(visible[None, None, None], scores, lowest))
        out = jnp.einsum("nkgcs,nskd->nckgd", weights, v)  # [N, C, K, G, D]
        return out.reshape(n, c, h, d), None

    return attention


def empty_layer(rows: int, heads: int, head_dim: int, slots: int, prompts: LayerCache | None = None):
    """Return a layer with room for `slots` tokens a row, after the rows of `prompts`, a layer without any."""
    if prompts is None:
        prefix_k = jnp.zeros((1, heads, head_dim, 0), jnp.float32)
        prefix_v = jnp.zeros((1, heads, 0, head_dim), jnp.float32)
    else:
        prefix_k, prefix_v = prompts.k, prompts.v
    return LayerCache(
        prefix_k,
        prefix_v,
        jnp.zeros((rows, heads, head_dim, slots), jnp.float32),
        jnp.zeros((rows, heads, slots, head_dim), jnp.float32),
    )


def append(layer: LayerCache, k: jax.Array, v: jax.Array, length: jax.Array) -> LayerCache:
    """Write `k, v [N, C, K, D]` at slots `length ... length + C - 1`.

    Out-of-range slots are dropped, or in lock step written to the last slot, which only the queries that are
    out of range themselves could tell.
    """
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # [N, K, D, C], [N, K, C, D]
    if length.ndim == 0:
        new_k = jax.lax.dynamic_update_slice_in_dim(layer.k, k, length, axis=3)  # [N, K, D, S]
        new_v = jax.lax.dynamic_update_slice_in_dim(layer.v, v, length, axis=2)  # [N, K, S, D]
    else:
        rows = jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]  # [N, 1]
        slots = length[:, None] + jnp.arange(k.shape[3], dtype=jnp.int32)[None, :]  # [N, C]
        new_k = layer.k.at[rows, :, :, slots].set(k.transpose(0, 3, 1, 2), mode="drop")
        new_v = layer.v.at[rows, :, slots, :].set(v.transpose(0, 2, 1, 3), mode="drop")
    return layer._replace(k=new_k, v=new_v)


def attend(
    layer: LayerCache,
    q: jax.Array,
    prefix_length: jax.Array,
    length: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Attend with scaled queries `q [N, C, H, D]` whose keys stand at slots `length + (0 ... C-1)`.

    Returns [N, C, H, D]. `window`: a key is visible to a query fewer than `window` positions after it.

    Of the suffix, only the leading slots up to a power of two are read: one branch of static shape for each,
    since most of a long suffix is empty most of the time. Slots beyond have weight zero either way.
    """
    c, slots = q.shape[1], layer.k.shape[3]
    sizes = [size for size in _powers_of_two(SMALLEST_READ, slots) if size >= c] + [slots]

    def branch(size: int) -> Callable[[LayerCache, jax.Array], jax.Array]:
        def read(layer: LayerCache, q: jax.Array) -> jax.Array:
            leading = layer._replace(k=layer.k[..., :size], v=layer.v[..., :size, :])
            return _attend(leading, q, prefix_length, length, window)

        return read

    filled = length.max() + c
    index = sum((filled > size).astype(jnp.int32) for size in sizes[:-1])
    return jax.lax.switch(index, [branch(size) for size in sizes], layer, q)


def _powers_of_two(smallest: int, limit: int) -> Iterator[int]:
    """Double `smallest` as long as it is below the limit."""
    size = smallest
    while size < limit:
        yield size
        size *= 2


def _attend(
    layer: LayerCache,
    q: jax.Array,
    prefix_length: jax.Array,
    length: jax.Array,
    window: int | None,
) -> jax.Array:
    """Attend over all slots of the layer; see `attend`."""
    n, c, h, d = q.shape
    prompts, heads, _, prefix_slots = layer.prefix_k.shape
    rows = c * (h // heads)
    q = q.reshape(n, c, heads, rows // c, d).transpose(0, 2, 1, 3, 4)  # [N, K, C, G, D]
    q = q.reshape(n, heads, rows, d)  # [N, K, R, D]
    # The queries' own slots.
    at = jnp.reshape(length, (-1, 1)) + jnp.arange(c, dtype=jnp.int32)[None, :]  # [N or 1, C]

    slots = jnp.arange(layer.k.shape[3], dtype=jnp.int32)[None, None]  # [1, 1, S]
    visible = slots <= at[:, :, None]  # [N or 1, C, S]
    if window is not None:
        visible &= slots > at[:, :, None] - window
    own = _masked(jnp.einsum("nkrd,nkds->nkrs", q, layer.k), visible, rows // c)  # [N, K, R, S]
    top = own.max(-1, keepdims=True)  # [N, K, R, 1]
    if prefix_slots:
        places = jnp.arange(prefix_slots, dtype=jnp.int32)[None, None]  # [1, 1, P]
        prefix_length = per_row(prefix_length, n)[:, None, None]  # [N or 1, 1, 1]
        visible = jnp.broadcast_to(places < prefix_length, (prefix_length.shape[0], c, prefix_slots))
        if window is not None:
            visible = visible & (places > prefix_length + at[:, :, None] - window)  # [N or 1, C, P]
        blocks = q.reshape(prompts, n // prompts, heads, rows, d)  # [B, N/B, K, R, D]
        shared = jnp.einsum("bnkrd,bkdp->bnkrp", blocks, layer.prefix_k)  # [B, N/B, K, R, P]
        shared = _masked(shared.reshape(n, heads, rows, prefix_slots), visible, rows // c)  # [N, K, R, P]
        top = jnp.maximum(top, shared.max(-1, keepdims=True))
        shared = jnp.exp(shared - top)
        own = jnp.exp(own - top)
        blocks = shared.reshape(prompts, n // prompts, heads, rows, prefix_slots)
        out = jnp.einsum("bnkrp,bkpd->bnkrd", blocks, layer.prefix_v).reshape(n, heads, rows, d)
        out = out + jnp.einsum("nkrs,nksd->nkrd", own, layer.v)  # [N, K, R, D]
        out = out / (own.sum(-1, keepdims=True) + shared.sum(-1, keepdims=True))
    else:
        own = jnp.exp(own - top)
        out = jnp.einsum("nkrs,nksd->nkrd", own, layer.v) / own.sum(-1, keepdims=True)
    out = out.reshape(n, heads, c, rows // c, d).transpose(0, 2, 1, 3, 4)  # [N, C, K, G, D]
    return out.reshape(n, c, h, d)


def per_row(values: jax.Array, rows: int) -> jax.Array:
    """One value a prompt `[B]` to one a row `[N]`; `[1]` stays, since it broadcasts."""
    return values if values.shape[0] == 1 else jnp.repeat(values, rows // values.shape[0])


def _masked(scores: jax.Array, visible: jax.Array, groups: int) -> jax.Array:
    """Hide keys from `scores [N, K, R, S]` where `visible [N or 1, C, S]` is false."""
    mask = jnp.repeat(visible, groups, axis=1)[:, None]  # [N or 1, 1, R, S]
    return jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


def poison(x: jax.Array, overflow: jax.Array) -> jax.Array:
    """NaN in the rows of `x [N, ...]` that outgrew their cache, where `overflow`, bool[] or bool[N], says so.

    A wrong answer must not look like a right one.
    """
    return jnp.where(overflow.reshape(overflow.shape + (1,) * (x.ndim - overflow.ndim)), jnp.nan, x)


def truncate(cache: ParticleCache, lengths: jax.Array) -> ParticleCache:
    """Keep the first `lengths[n]` suffix tokens of particle n; what lies beyond is overwritten later."""
    return cache._replace(length=jnp.broadcast_to(lengths, cache.layers[0].k.shape[:1]).astype(jnp.int32))


def fork(cache: ParticleCache, ancestors: jax.Array) -> ParticleCache:
    """Let row n continue from what was row `ancestors[n]`; the shared prompt stays where it is."""
    suffixes = fork_rows([(layer.k, layer.v) for layer in cache.layers], ancestors)
    layers = tuple(x._replace(k=k, v=v) for x, (k, v) in zip(cache.layers, suffixes, strict=True))
    length = cache.length if cache.length.ndim == 0 else cache.length[ancestors]
    return cache._replace(layers=layers, length=length)
