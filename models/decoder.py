"""One decoder-only transformer for all supported families, driven by `DecoderConfig`.

Matrices are stored [out, in], queries, keys and values as one and gate and up as one. Layers are unrolled,
one array per layer. The residual stream, norms, softmax and logits are float32, whatever the weights' dtype.
Decoding and training run the same blocks, with a cache and without one.

Axes: B prompts, N rows (particles, or traces to train on), C tokens of a row, H query heads, K key-value
heads, D head dimension, M model, F feed forward, V vocabulary; O and I, outputs and inputs of a matrix.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ponder.models.cache import Attention, LayerCache, empty_layer, per_row, through_cache
from ponder.models.config import DecoderConfig, RopeConfig

__all__ = ["Block", "Decoder"]


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalise the last axis to unit root mean square and scale it."""
    scaled = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return scaled * jnp.broadcast_to(weight, x.shape)


SMALL_BATCH = 64
MOST_BLOCKS = 4
"""Up to this many blocks of `SMALL_BATCH` rows, `linear` puts the weights on the left; see there."""


def linear(x: jax.Array, weight: nnx.Param, bias: nnx.Param | None = None) -> jax.Array:
    """Apply `weight [out, in]` to the last axis of x; accumulate and return float32.

    For few rows, W xᵀ is up to 1.6 times as fast on CPU as x Wᵀ: the long axis is then the one that XLA's
    matrix product spreads over cores. The barrier keeps XLA from swapping the operands back. Some more rows
    are as many blocks of few.
    """
    w = weight[...]
    rows = x.reshape(-1, x.shape[-1]).astype(w.dtype)  # [N · C, I]
    contract_last = (((1,), (1,)), ((), ()))
    if rows.shape[0] <= MOST_BLOCKS * SMALL_BATCH:
        blocks = [rows[i : i + SMALL_BATCH] for i in range(0, rows.shape[0], SMALL_BATCH)]
        parts = [jax.lax.dot_general(w, b, contract_last, preferred_element_type=jnp.float32) for b in blocks]
        y = jnp.concatenate([jax.lax.optimization_barrier(part).T for part in parts])  # [N · C, O]
    else:
        y = jax.lax.dot_general(rows, w, contract_last, preferred_element_type=jnp.float32)  # [N · C, O]
    y = y.reshape(*x.shape[:-1], w.shape[0])  # [N, C, O]
    return y if bias is None else y + jnp.broadcast_to(bias[...].astype(jnp.float32), y.shape)


def silu(x: jax.Array) -> jax.Array:
    """X · sigmoid(x), in the form that XLA vectorises best on CPU."""
    return x / (1 + jnp.exp(-x))


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Inverse frequencies [D / 2], as `transformers.modeling_rope_utils` computes them."""
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.type == "linear":
        inverse = inverse / rope.factor
    elif rope.type == "llama3":
        wavelength = 2 * np.pi / inverse
        long = rope.original_max_position_embeddings / rope.low_freq_factor
        short = rope.original_max_position_embeddings / rope.high_freq_factor
        blend = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        medium = (1 - blend) * inverse / rope.factor + blend * inverse
        inverse = np.where(wavelength > long, inverse / rope.factor, inverse)
        inverse = np.where((wavelength <= long) & (wavelength >= short), medium, inverse)
    return inverse.astype(np.float32)


def rotation_at(config: DecoderConfig, positions: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """What `rotate` needs for tokens at `positions [N or 1, C]`: cosines and sines [N or 1, C, 1, D/2]."""
    frequencies = rope_frequencies(config.rope, config.head_dim)  # [D/2]
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the halves of the head dimension of `x [N, C, heads, D]` by `cos, sin [N or 1, C, 1, D/2]`."""
    a, b = jnp.split(x, 2, axis=-1)  # [N, C, heads, D/2] each
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Block(nnx.Module):
    """Attention and gated feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        m, f = config.hidden_size, config.intermediate_size
        self.input_norm = nnx.Param(jnp.ones(m, jnp.float32))
        self.qkv = _matrix(rngs, q + 2 * kv, m)
        self.qkv_bias = nnx.Param(jnp.zeros(q + 2 * kv, jnp.float32)) if config.qkv_bias else None
        self.q_norm = nnx.Param(jnp.ones(config.head_dim, jnp.float32)) if config.qk_norm else None
        self.k_norm = nnx.Param(jnp.ones(config.head_dim, jnp.float32)) if config.qk_norm else None
        self.o = _matrix(rngs, m, q)
        self.o_bias = nnx.Param(jnp.zeros(m, jnp.float32)) if config.o_bias else None
        self.post_norm = nnx.Param(jnp.ones(m, jnp.float32))
        self.gate_up = _matrix(rngs, 2 * f, m)
        self.gate_up_bias = nnx.Param(jnp.zeros(2 * f, jnp.float32)) if config.mlp_bias else None
        self.down = _matrix(rngs, m, f)
        self.down_bias = nnx.Param(jnp.zeros(m, jnp.float32)) if config.mlp_bias else None

    def __call__(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], attention: Attention
    ) -> tuple[jax.Array, Any]:
        """Return the residual stream [N, C, M] after the block, and what the attention keeps.

        Args:
            x: the stream before, float32[N, C, M].
            rotation: `rotation_at` the tokens' positions.
            attention: `through_cache`, which keeps the layer with this block's keys and values, or
                `without_cache`.
        """
        config = self.config
        n, c, _ = x.shape
        heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim

        y = rms_norm(x, self.input_norm[...], config.rms_norm_eps)  # [N, C, M]
        y = linear(y, self.qkv, self.qkv_bias).reshape(n, c, heads + 2 * kv_heads, d)  # [N, C, H + 2K, D]
        q, k, v = jnp.split(y, [heads, heads + kv_heads], axis=2)  # [N, C, H, D], [N, C, K, D] twice
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, self.q_norm[...], config.rms_norm_eps)
            k = rms_norm(k, self.k_norm[...], config.rms_norm_eps)
        q, k = rotate(q, *rotation) * d**-0.5, rotate(k, *rotation)
        y, kept = attention(q, k, v)  # [N, C, H, D]
        x = x + linear(y.reshape(n, c, heads * d), self.o, self.o_bias)  # [N, C, M]

        y = rms_norm(x, self.post_norm[...], config.rms_norm_eps)  # [N, C, M]
        gate, up = jnp.split(linear(y, self.gate_up, self.gate_up_bias), 2, axis=-1)  # [N, C, F] each
        return x + linear(silu(gate) * up, self.down, self.down_bias), kept  # [N, C, M]


class Decoder(nnx.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _matrix(rngs, config.vocab_size, config.hidden_size, scale=0.02)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = nnx.Param(jnp.ones(config.hidden_size, jnp.float32))
        self.head = (
            None if config.tie_word_embeddings else _matrix(rngs, config.vocab_size, config.hidden_size)
        )

    def __call__(
        self,
        tokens: jax.Array,  # int32[N, C]
        layers: tuple[LayerCache, ...],
        prefix_length: jax.Array,  # int32[B]; one a prompt
        length: jax.Array,  # int32[] or int32[N]
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """Read a block of tokens at slots `length ...`; return hidden states [N, C, M] and the layers."""
        start = per_row(prefix_length, tokens.shape[0]) + length  # [N or 1]
        positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]  # [N or 1, C]
        rotation = rotation_at(self.config, positions)
        x = self.embed(tokens)
        updated = []
        for block, layer in zip(self.blocks, layers, strict=True):
            attention = through_cache(layer, prefix_length, length, self.config.sliding_window)
            x, layer = block(x, rotation, attention)
            updated.append(layer)
        return x, tuple(updated)

    def read(self, tokens: jax.Array) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """Read whole rows int32[B, C]; return hidden states [B, C, M] and layers that hold them."""
        rows, length = tokens.shape
        empty = self.empty_layers(rows, length)
        return self(tokens, empty, jnp.zeros(1, jnp.int32), jnp.int32(0))

    def empty_layers(
        self, rows: int, slots: int, prompts: tuple[LayerCache, ...] | None = None
    ) -> tuple[LayerCache, ...]:
        """Return layers with room for `slots` tokens a row, after those of `prompts` or after nothing."""
        heads, d = self.config.num_key_value_heads, self.config.head_dim
        before = (None,) * len(self.blocks) if prompts is None else prompts
        return tuple(empty_layer(rows, heads, d, slots, layer) for layer in before)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Return the residual stream float32[N, C, M] before the first block, of tokens int32[N, C]."""
        return self.embedding[...][tokens].astype(jnp.float32)

    def logits(self, x: jax.Array) -> jax.Array:
        """Next-token logits float32[..., V] of hidden states [..., M]."""
        x = rms_norm(x, self.norm[...], self.config.rms_norm_eps)
        return linear(x, self.embedding if self.head is None else self.head)


def _matrix(rngs: nnx.Rngs, rows: int, columns: int, scale: float | None = None) -> nnx.Param:
    values = jax.random.normal(rngs.params(), (rows, columns), jnp.float32)
    return nnx.Param((columns**-0.5 if scale is None else scale) * values)
