"""Decoder hyperparameters, read from a Hugging Face `config.json`.

A family differs from another by the values here, not by code: biases, per-head norms, rotary scaling and
windows are fields. Field names are Hugging Face's wherever they mean the same. A key that config.json leaves
out has the default of its family, as in the configuration classes of transformers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ponder.models.messages import quoted

__all__ = ["FAMILY_DEFAULTS", "SUPPORTED_FAMILIES", "DecoderConfig", "RopeConfig"]

_COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
_LLAMA = _COMMON | {"vocab_size": 32000, "head_dim": None, "eos_token_id": 2}
_QWEN = _COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "eos_token_id": None,
}
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA
    | {
        "intermediate_size": 11008,
        "num_key_value_heads": None,  # as many as there are query heads
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": _LLAMA
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN | {"head_dim": None},
    "qwen3": _QWEN | {"head_dim": 128, "attention_bias": False},
}
"""What a key stands for where config.json leaves it out. A key that a family lacks is not read for it."""

SUPPORTED_FAMILIES = tuple(FAMILY_DEFAULTS)
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
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
    value = config[name]
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
        """Read `rope_parameters` (transformers 5) or `rope_scaling` (before) of a config without gaps."""
        # transformers, too, takes the older name first.
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"config: rope_parameters: expected an object, got {quoted(rope)}")
        if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
            raise NotImplementedError(
                f"config: rope_parameters that differ between layers ({quoted(nested)}) are not supported"
            )
        kind = rope.get("rope_type", rope.get("type", "default"))
        if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
            raise NotImplementedError(
                f"config: rope type {quoted(kind)}; supported are {', '.join(_ROPE_NEEDS)}"
            )
        if missing := [name for name in _ROPE_NEEDS[kind] if name not in rope]:
            raise ValueError(f"config: rope type {kind!r} needs {missing[0]!r}, got {quoted(dict(rope))}")
        if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1.0):
            raise NotImplementedError("config: partial_rotary_factor other than 1.0 is not supported")
        theta = _real("rope_theta", rope.get("rope_theta", config["rope_theta"]))
        if kind == "default":
            return cls(theta)
        factors: dict[str, Any] = {name: _real(f"rope {name}", rope[name]) for name in _ROPE_NEEDS[kind]}
        if kind == "llama3":
            trained = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
            factors["original_max_position_embeddings"] = trained
        return cls(theta, kind, **factors)


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
        """Read a `config.json`; what it leaves out has the default of its family.

        Raises:
            NotImplementedError: the model type, rope type or activation is not supported, or layers differ in
                what they attend to.
            ValueError: a value has another type or range than its key allows.
        """
        family = config.get("model_type")
        if family not in SUPPORTED_FAMILIES:
            raise NotImplementedError(
                f"config: model_type {quoted(family)}; supported are {', '.join(SUPPORTED_FAMILIES)}"
            )
        defaults = FAMILY_DEFAULTS[family]
        config = {**defaults, **config}
        sizes = {name: config[name] for name in _SIZES}
        for name, value in sizes.items():
            _check_size(name, value)
        heads, kv_heads = sizes["num_attention_heads"], config["num_key_value_heads"]
        attention_bias = "attention_bias" in defaults and _flag(config, "attention_bias")
        return cls(
            **sizes,
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=_head_dim(defaults, config),
            max_position_embeddings=config["max_position_embeddings"],
            rms_norm_eps=_real("rms_norm_eps", config["rms_norm_eps"]),
            rope=RopeConfig.from_hf(config),
            hidden_act=config["hidden_act"],
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias="mlp_bias" in defaults and _flag(config, "mlp_bias"),
            qk_norm=family == "qwen3",
            sliding_window=_sliding_window(family, config),
        )


def _head_dim(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """Return `head_dim`, which in most families follows from the sizes where it is not given."""
    if config["head_dim"] is not None or defaults["head_dim"] is not None:
        return config["head_dim"]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads:
        raise ValueError(
            f"config: hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}) "
            "where head_dim is not given"
        )
    return hidden // heads


def _sliding_window(family: str, config: Mapping[str, Any]) -> int | None:
    """Return the window of all layers, or None where they see everything.

    Raises:
        NotImplementedError: some layers have a window and others have none.
    """
    window, first = None, 0
    if family == "mistral":
        window = config["sliding_window"]
    elif family != "llama" and _flag(config, "use_sliding_window"):
        window, first = config["sliding_window"], config["max_window_layers"]
        if type(first) is not int:
            raise ValueError(f"config: max_window_layers: expected an int, got {quoted(first)}")
    windowed = 0 if window is None else max(config["num_hidden_layers"] - max(first, 0), 0)
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = {"sliding_attention"} if windowed else set()
        kinds |= {"full_attention"} if windowed < config["num_hidden_layers"] else set()
    if not isinstance(kinds, list | set) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"config: layer_types: expected a list of names, got {quoted(kinds)}")
    if set(kinds) == {"full_attention"} and (family != "mistral" or window is None):
        return None
    if set(kinds) == {"sliding_attention"} and window is not None:
        return window
    raise NotImplementedError(
        f"config: layer_types {quoted(sorted(set(kinds)))} with use_sliding_window="
        f"{config.get('use_sliding_window')!r}, sliding_window={quoted(window)}, max_window_layers={first}: "
        "supported are windows for all layers or for none"
    )
