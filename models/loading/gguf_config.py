"""The settings in the metadata of a GGUF file, as the config.json that the model has on the hub.

A key means here what it means to llama.cpp, defaults included (`load_hparams` in its src/llama-model.cpp at
commit 0034230): it is applied, or its value must be one that changes nothing, else the file is refused by
name. docs/models.md has the table.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ponder.models.loading.gguf_special import special_tokens
from ponder.models.messages import quoted

__all__ = ["ARCHITECTURES", "hub_config", "llama3_scaling"]

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""The architectures that are read, with their classes on the hub."""

# Keys of an architecture that are applied.
_APPLIED = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
}

# Keys whose other values would change the model, with those that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.value_scale": (0.0, 1.0),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "hidden_activation": ("silu",),
    "nextn_predict_layers": (0,),
    "rope.dimension_sections": (0,),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (0.0, -1.0),
    "use_parallel_residual": (False,),
}
_NEUTRAL_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "general.type": ("model",),
    "tokenizer.ggml.add_eos_token": (False,),
    "tokenizer.ggml.add_sep_token": (False,),
    "tokenizer.ggml.suppress_tokens": (),
}

# Keys that say nothing about the next token of these architectures.
_WITHOUT_EFFECT = {
    "vocab_size",
    "tensor_data_layout",
    "pooling_type",
    "classifier.output_labels",
    "attention.layer_norm_epsilon",
    "rope.freq_base_swa",
    "rope.dimension_count_swa",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
}


def hub_config(metadata: Mapping[str, Any], vocab_size: int, *, tied: bool) -> dict[str, Any]:
    """Translate the metadata to the config.json of the same model on the hub.

    Args:
        metadata: of one of `ARCHITECTURES`.
        vocab_size: rows of the embedding.
        tied: whether the file lacks a matrix of its own for the logits.

    Raises:
        ValueError: a key is missing, or its value of the wrong type.
        NotImplementedError: a key has a value that llama.cpp would apply and the decoder does not.
    """
    architecture = metadata["general.architecture"]

    def value(key: str, kind: type = int, default: Any = None) -> Any:
        found = metadata.get(f"{architecture}.{key}", default)
        if found is None:
            raise ValueError(f"the metadata lacks {architecture}.{key}.")
        if isinstance(found, list):  # one number a layer
            if not found or any(entry != found[0] for entry in found):
                raise NotImplementedError(
                    f"{architecture}.{key} differs between layers, which is not supported."
                )
            found = found[0]
        if type(found) is not kind:
            raise ValueError(f"{architecture}.{key}: expected {kind.__name__}, got {quoted(found)}.")
        # Shortest decimal of the stored float32: 1e-05 rather than 9.999999747378752e-06.
        return float(str(np.float32(found))) if kind is float else found

    num_heads, hidden_size = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", default=hidden_size // max(num_heads, 1))
    for key, what in (("rope.dimension_count", "rotary embedding"), ("attention.value_length", "values")):
        if (found := value(key, default=head_dim)) != head_dim:
            raise NotImplementedError(f"{what} on {found} of {head_dim} dimensions is not supported ({key}).")
    config = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": value("attention.head_count_kv", default=num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon", float),
        "rope_theta": value("rope.freq_base", float, 10000.0),
        "rope_scaling": _rope_scaling(value, metadata, architecture),
        "tie_word_embeddings": tied,
        "dtype": "float32",
    }
    _refuse_what_is_not_applied(value, metadata, config)
    special = special_tokens(metadata, vocab_size)
    found = {"eos_token_id": list(special.ends), "bos_token_id": special.bos, "pad_token_id": special.padding}
    return config | {name: ids for name, ids in found.items() if ids not in (None, [])}


def _rope_scaling(
    value: Callable[..., Any], metadata: Mapping[str, Any], architecture: str
) -> dict[str, Any] | None:
    """Return the scaling of the rotary embedding; it is linear where a factor is given without a type."""
    kind = value("rope.scaling.type", str, "linear")
    if kind not in ("none", "linear"):
        raise NotImplementedError(f"rotary scaling {quoted(kind)} is not supported; supported is 'linear'.")
    named = f"{architecture}.rope.scaling.factor" in metadata
    factor = value("rope.scaling.factor" if named else "rope.scale_linear", float, 0.0)
    if kind == "none" or factor in (0.0, 1.0):
        return None
    return {"rope_type": "linear", "factor": factor}


def _refuse_what_is_not_applied(
    value: Callable[..., Any], metadata: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Refuse keys that would change the model; warn of those that nobody knows."""
    prefix = f"{config['model_type']}."
    neutral = {prefix + key: values for key, values in _NEUTRAL.items()} | _NEUTRAL_ELSEWHERE
    for key in neutral.keys() & metadata.keys():
        found = metadata[key]
        if any(entry not in neutral[key] for entry in (found if isinstance(found, list) else [found])):
            raise NotImplementedError(
                f"{key} is {quoted(found)}, which is not supported; supported is "
                f"{' or '.join(map(repr, neutral[key])) or 'an empty list'}."
            )
    scale, usual = value("attention.scale", float, 0.0), config["head_dim"] ** -0.5
    if scale != 0.0 and not abs(scale - usual) <= 1e-6 * usual:
        raise NotImplementedError(
            f"{prefix}attention.scale is {scale}, which is not supported; supported is 1/sqrt(head_dim), "
            f"{usual}."
        )
    window = value("attention.sliding_window", default=0)
    if 0 < window < config["max_position_embeddings"]:
        raise NotImplementedError(f"{prefix}attention.sliding_window is {window}, which is not supported.")
    known = _APPLIED | _NEUTRAL.keys() | _WITHOUT_EFFECT
    unknown = [
        key
        for key in metadata
        if key.startswith(prefix)
        and not key.startswith(prefix + "expert_")
        and key[len(prefix) :] not in known
    ]
    if unknown:
        warnings.warn(
            f"the metadata have keys that are not known and have no effect: {quoted(sorted(unknown))}",
            stacklevel=2,
        )


def llama3_scaling(factors: np.ndarray, config: Mapping[str, Any]) -> dict[str, Any]:
    """Recover Llama 3's scaling from the divisors of the inverse frequencies that it led to.

    All released models share the cut-offs below and differ in `factor` alone, the largest divisor. What does
    not reproduce the stored divisors is refused.
    """
    if factors.shape != (config["head_dim"] // 2,):
        raise ValueError(
            f"rope_freqs.weight has shape {factors.shape}, but head_dim is {config['head_dim']}."
        )
    if config["rope_scaling"] is not None:
        raise NotImplementedError("rope_freqs.weight beside a linear rotary scaling is not supported.")
    largest = factors.max()
    scaling = {
        "rope_type": "llama3",
        "factor": float(str(np.float32(largest))) if largest >= 1 else 1.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    exponent = np.arange(0, config["head_dim"], 2, dtype=np.float64) / config["head_dim"]
    wavelength = 2 * np.pi * config["rope_theta"] ** exponent
    smooth = np.clip(
        (scaling["original_max_position_embeddings"] / wavelength - low) / (high - low), 0.0, 1.0
    )
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if not np.allclose(factors, expected, rtol=1e-4):
        raise NotImplementedError(
            "rope_freqs.weight does not follow the scaling of Llama 3.1-3.3; no other is supported."
        )
    return scaling
