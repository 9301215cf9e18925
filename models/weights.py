"""Hugging Face tensors to the decoder's parameters and back: one table, read in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ponder.models.config import DecoderConfig
from ponder.models.decoder import Decoder

__all__ = ["from_weights", "to_weights", "weight_table"]


def weight_table(config: DecoderConfig) -> dict[tuple[str | int, ...], tuple[tuple[str, int], ...]]:
    """Return parameter path -> the Hugging Face tensors, with their rows, that it concatenates."""
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    m, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    table: dict[tuple[str | int, ...], tuple[tuple[str, int], ...]] = {
        ("embedding",): (("model.embed_tokens.weight", config.vocab_size),),
        ("norm",): (("model.norm.weight", m),),
    }
    if not config.tie_word_embeddings:
        table["head",] = (("lm_head.weight", config.vocab_size),)
    for i in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        qkv = (("q_proj", q), ("k_proj", kv), ("v_proj", kv))
        block: dict[str, tuple[tuple[str, int], ...]] = {
            "input_norm": ((f"model.layers.{i}.input_layernorm.weight", m),),
            "qkv": tuple((f"{attention}.{name}.weight", rows) for name, rows in qkv),
            "o": ((f"{attention}.o_proj.weight", m),),
            "post_norm": ((f"model.layers.{i}.post_attention_layernorm.weight", m),),
            "gate_up": ((f"{mlp}.gate_proj.weight", f), (f"{mlp}.up_proj.weight", f)),
            "down": ((f"{mlp}.down_proj.weight", m),),
        }
        if config.qkv_bias:
            block["qkv_bias"] = tuple((f"{attention}.{name}.bias", rows) for name, rows in qkv)
        if config.o_bias:
            block["o_bias"] = ((f"{attention}.o_proj.bias", m),)
        if config.qk_norm:
            block["q_norm"] = ((f"{attention}.q_norm.weight", d),)
            block["k_norm"] = ((f"{attention}.k_norm.weight", d),)
        if config.mlp_bias:
            block["gate_up_bias"] = ((f"{mlp}.gate_proj.bias", f), (f"{mlp}.up_proj.bias", f))
            block["down_bias"] = ((f"{mlp}.down_proj.bias", m),)
        table |= {("blocks", i, name): parts for name, parts in block.items()}
    return table


def from_weights(config: DecoderConfig, weights: Mapping[str, np.ndarray], dtype: Any = None) -> Decoder:
    """Build a decoder from tensors in Hugging Face names.

    Args:
        config: the sizes.
        weights: every tensor of the checkpoint, `[out, in]`.
        dtype: of the stored matrices; None means float32. Norms and biases stay float32.

    Raises:
        ValueError: a tensor is missing, is not known, or has another shape than the config implies.
    """
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    table = weight_table(config)
    wanted = {name for parts in table.values() for name, _ in parts}
    # Older checkpoints store rotary frequencies; tied ones may repeat the embedding as the head.
    ignored = {name for name in weights if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= set(weights):
        if not np.array_equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
            raise ValueError(
                "weights: config says tied embeddings, but lm_head.weight differs from embed_tokens"
            )
        ignored.add("lm_head.weight")
    missing, unexpected = sorted(wanted - set(weights)), sorted(set(weights) - wanted - ignored)
    if missing or unexpected:
        raise ValueError(
            f"weights do not fit the config: {len(missing)} missing {missing[:8]}, "
            f"{len(unexpected)} unexpected {unexpected[:8]}"
        )

    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    for path, parts in table.items():
        parameter = _at(decoder, path)
        for name, rows in parts:
            expected = (rows, *parameter.shape[1:])
            if weights[name].shape != expected:
                raise ValueError(f"weights: {name} has shape {weights[name].shape}, expected {expected}")
        array = np.concatenate([weights[name] for name, _ in parts])
        parameter.set_value(jnp.asarray(array, dtype=dtype if array.ndim == 2 else jnp.float32))
    return decoder


def to_weights(decoder: Decoder) -> dict[str, np.ndarray]:
    """Return the decoder's tensors in Hugging Face names, the inverse of `from_weights`."""
    weights: dict[str, np.ndarray] = {}
    for path, parts in weight_table(decoder.config).items():
        array = np.asarray(jax.device_get(_at(decoder, path).get_value()))
        stops = np.cumsum([rows for _, rows in parts])[:-1]
        pieces = np.split(array, stops) if len(parts) > 1 else [array]
        weights |= {name: piece for (name, _), piece in zip(parts, pieces, strict=True)}
    return weights


def _at(module: Any, path: tuple[str | int, ...]) -> nnx.Param:
    for key in path:
        module = module[key] if isinstance(key, int) else getattr(module, key)
    return module
