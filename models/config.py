"""Decoder hyperparameters, read from a Hugging Face `config.json`.

A family differs from another by the values here, not by code: biases, per-head norms, rotary scaling and
windows are fields. Field names are Hugging Face's wherever they mean the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ponder.models.messages import quoted

__all__ = ["SUPPORTED_FAMILIES", "DecoderConfig", "RopeConfig"]

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3")
_MAX_SIZE = 2**31 - 1  # ids and positions are int32
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _check_size(name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= _MAX_SIZE:
        raise ValueError(f"config: {name}: expected an int from 1 to {_MAX_SIZE}, got {quoted(value)}")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"config: {name}: expected a positive number, got {value!r}")


def _real(name: str, value: Any) -> float:
    if type(value) not in (int, float) or abs(value) > 1e30:
        raise ValueError(f"config: {name}: expected a number, got {quoted(value)}")
    return float(value)


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise ValueError(f"config: {name}: expected true or false, got {quoted(value)}")
    return bool(value)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base `theta` and, for `linear` and `llama3`, its frequency scaling."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        """Refuse numbers that would make frequencies of zero, infinity or NaN."""
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            _check_positive(f"rope {name}", getattr(self, name))
        _check_size("rope original_max_position_embeddings", self.original_max_position_embeddings)
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"config: rope high_freq_factor ({self.high_freq_factor}) must be above low_freq_factor "
                f"({self.low_freq_factor})"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"config: rope_parameters: expected an object, got {quoted(rope)}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in _ROPE_TYPES:
            raise NotImplementedError(
                f"config: rope type {quoted(kind)}; supported are {', '.join(_ROPE_TYPES)}"
            )
        if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
            raise NotImplementedError("config: partial_rotary_factor other than 1.0 is not supported")
        return cls(
            theta=_real("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            type=kind,
            factor=_real("rope factor", rope.get("factor", 1.0)),
            low_freq_factor=_real("rope low_freq_factor", rope.get("low_freq_factor", 1.0)),
            high_freq_factor=_real("rope high_freq_factor", rope.get("high_freq_factor", 4.0)),
            original_max_position_embeddings=rope.get("original_max_position_embeddings", 8192),
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
        for name in (*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            _check_size(name, getattr(self, name))
        if self.sliding_window is not None:
            _check_size("sliding_window", self.sliding_window)
        _check_positive("rms_norm_eps", self.rms_norm_eps)
        if self.hidden_act != "silu":
            raise NotImplementedError(f"config: hidden_act {quoted(self.hidden_act)}; supported is 'silu'")
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
            ValueError: a required key is missing, or a value has another type or range than the key allows.
        """
        family = config.get("model_type")
        if family not in SUPPORTED_FAMILIES:
            raise NotImplementedError(
                f"config: model_type {quoted(family)}; supported are {', '.join(SUPPORTED_FAMILIES)}"
            )
        if missing := [name for name in _SIZES if name not in config]:
            raise ValueError(f"config: {missing[0]!r} is missing from config.json")
        sizes = {name: config[name] for name in _SIZES}
        for name, value in sizes.items():
            _check_size(name, value)
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        head_dim = config.get("head_dim")
        if head_dim is None:
            head_dim, rest = divmod(hidden, heads)
            if rest:
                raise ValueError(
                    f"config: hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}) "
                    "where head_dim is not given"
                )
        kv_heads = config.get("num_key_value_heads")
        window = config.get("sliding_window")
        if family in ("qwen2", "qwen3"):
            if window is not None and _flag(config, "use_sliding_window"):
                raise NotImplementedError("config: use_sliding_window=true is not supported for Qwen")
            window = None
        attention_bias = _flag(config, "attention_bias")
        return cls(
            **sizes,
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rms_norm_eps=_real("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_hf(config),
            hidden_act=config.get("hidden_act", "silu"),
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            qkv_bias=True if family == "qwen2" else attention_bias,
            o_bias=attention_bias and family != "qwen2",
            mlp_bias=_flag(config, "mlp_bias"),
            qk_norm=family == "qwen3",
            sliding_window=window if family == "mistral" else None,
        )
