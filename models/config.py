"""Decoder hyperparameters, read from a Hugging Face `config.json`.

A family differs from another by the values here, not by code: biases, per-head norms, rotary scaling and
windows are fields. Field names are Hugging Face's wherever they mean the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["SUPPORTED_FAMILIES", "DecoderConfig", "RopeConfig"]

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base `theta` and, for `linear` and `llama3`, its frequency scaling."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in _ROPE_TYPES:
            raise NotImplementedError(f"config: rope type {kind!r}; supported are {', '.join(_ROPE_TYPES)}")
        if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
            raise NotImplementedError("config: partial_rotary_factor other than 1.0 is not supported")
        return cls(
            theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            type=kind,
            factor=float(rope.get("factor", 1.0)),
            low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
            high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
            original_max_position_embeddings=int(rope.get("original_max_position_embeddings", 8192)),
        )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of one decoder; hashable, so that it can be static in compiled code."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        """Refuse what the decoder cannot compute, rather than compute something else."""
        if self.hidden_act != "silu":
            raise NotImplementedError(f"config: hidden_act {self.hidden_act!r}; supported is 'silu'")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim must be even for rotary embeddings, got {self.head_dim}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read a `config.json`.

        Raises:
            NotImplementedError: the model type, rope type or activation is not supported.
            ValueError: a required key is missing.
        """
        family = config.get("model_type")
        if family not in SUPPORTED_FAMILIES:
            raise NotImplementedError(
                f"config: model_type {family!r}; supported are {', '.join(SUPPORTED_FAMILIES)}"
            )
        try:
            heads = int(config["num_attention_heads"])
            hidden = int(config["hidden_size"])
            sizes = {
                "vocab_size": int(config["vocab_size"]),
                "intermediate_size": int(config["intermediate_size"]),
                "num_hidden_layers": int(config["num_hidden_layers"]),
            }
        except KeyError as error:
            raise ValueError(f"config: {error.args[0]!r} is missing from config.json") from None
        if family in ("qwen2", "qwen3"):
            window = config.get("sliding_window") if config.get("use_sliding_window") else None
            if window is not None:
                raise NotImplementedError("config: use_sliding_window=true is not supported for Qwen")
        else:
            window = config.get("sliding_window") if family == "mistral" else None
        attention_bias = bool(config.get("attention_bias", False))
        return cls(
            **sizes,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_hf(config),
            hidden_act=config.get("hidden_act", "silu"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=True if family == "qwen2" else attention_bias,
            o_bias=attention_bias and family != "qwen2",
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            sliding_window=window,
        )
