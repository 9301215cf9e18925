"""Convert a GGUF file to a model directory in hub format, with float32 weights.

Needs the `gguf` package to dequantise, but neither torch nor transformers. Three things in a GGUF differ
from the hub format and fail silently when forgotten, leaving a model that still looks plausible:

- architecture "llama" stores the rows of q and k in another order (for interleaved rotary embedding);
- frequency scaling of Llama 3.1 and later comes as a tensor, not as configuration;
- the splitting rules of the tokenizer are only named (see `gguf_tokenizer`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ponder.models.config import DecoderConfig
from ponder.models.loading.gguf_header import TensorInfo, read_header, read_tensor
from ponder.models.loading.gguf_tokenizer import write_tokenizer
from ponder.models.loading.safetensors_writer import write_safetensors
from ponder.models.messages import quoted
from ponder.models.weights import check_shapes

__all__ = ["convert", "unpermute"]

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_EXTRA_LAYER_NAMES = {
    "llama": {},
    "qwen2": {f"attn_{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"},
    "qwen3": {f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"},
}
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_OPTIONAL = ("output.weight", "rope_freqs.weight")


def convert(
    gguf_path: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Write config, weights and tokenizer of a GGUF file into the directory `out_dir`.

    Everything is checked before the weights are written. They are dequantised one tensor at a time, so
    memory stays near the size of the largest one.

    Args:
        gguf_path: The file.
        out_dir: Where to write; made if it does not exist.
        progress: Called with the fraction of the weights that is written, 0 to 1.

    Raises:
        ImportError: The `gguf` package is not installed.
        ValueError: The file is damaged, its metadata contradict its tensors, or weights are not finite.
        NotImplementedError: The file is sound but holds something that is not supported.
        OSError: The file cannot be read, or the weights cannot be written.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "Reading .gguf files needs the gguf package: pip install 'ponder-ppl[gguf]'."
        ) from error

    path, out_dir = Path(gguf_path), Path(out_dir)
    metadata, tensors = _read(path, gguf.GGML_QUANT_SIZES)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _CLASSES:
        raise NotImplementedError(
            f"{path.name}: GGUF architecture {quoted(architecture)} is not supported; "
            f"supported are {sorted(_CLASSES)}."
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise NotImplementedError(
            f"{path.name} is one part of a split GGUF: merge it with llama-gguf-split first."
        )

    def load(name: str) -> np.ndarray:
        kind = gguf.GGMLQuantizationType(tensors[name].type_id)
        with np.errstate(over="ignore", invalid="ignore"):  # damaged scales; seen by the check below
            weight = gguf.quants.dequantize(read_tensor(path, tensors[name]), kind).astype(
                np.float32, copy=False
            )
        if not np.isfinite(weight).all():
            raise ValueError(f"{path.name}: the tensor {name} holds NaN or infinity.")
        return weight

    _check_types(tensors, gguf, path.name)
    config = _config(metadata, tensors, path.name)
    decoder_config = _checked(config, path.name)
    if "rope_freqs.weight" in tensors:
        config["rope_scaling"] = _llama3_scaling(load("rope_freqs.weight"), config, path.name)
    names = _hub_names(config, set(tensors), path.name)
    shapes = {hub: tensors[name].shape for name, hub in names.items()}
    try:
        check_shapes(decoder_config, shapes)
    except ValueError as error:
        raise ValueError(f"{path.name}: metadata and tensors contradict each other: {error}") from error

    heads = {"attn_q.weight": config["num_attention_heads"], "attn_k.weight": config["num_key_value_heads"]}

    def hub_tensor(name: str) -> np.ndarray:
        weight = load(name)
        kind = name.partition(".")[2].partition(".")[2]  # blk.3.attn_q.weight -> attn_q.weight
        if architecture == "llama" and kind in heads:
            return unpermute(weight, heads[kind])
        return weight

    sources: dict[str, Callable[[], np.ndarray]] = {
        hub: (lambda name=name: hub_tensor(name)) for name, hub in names.items()
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    # The tokenizer first: it is quick, and what is wrong with it should show before the long part.
    write_tokenizer(metadata, out_dir, path.name)
    _write_json(out_dir / "config.json", config)
    _write_json(out_dir / "generation_config.json", _generation_config(metadata, config, path.name))
    write_safetensors(out_dir / "model.safetensors", shapes, sources, progress=progress)


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo the row order that llama.cpp gives to q and k of Llama models.

    Within a head, GGUF pairs rows (2i, 2i+1) for rotation; the hub format pairs (i, i + head_dim/2).

    Args:
        weight: `[num_heads * head_dim, in]`.
        num_heads: Query heads for q, key-value heads for k.
    """
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _read(
    path: Path, quant_sizes: Mapping[Any, tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Return all metadata values and the places of the (still quantised) tensors by name."""
    if not path.is_file():
        raise FileNotFoundError(f"gguf_path: expected a .gguf file, got {str(path)!r}, which does not exist.")
    return read_header(path, {int(kind): sizes for kind, sizes in quant_sizes.items()})


def _check_types(tensors: Mapping[str, TensorInfo], gguf: Any, file: str) -> None:
    """Refuse types that the gguf package cannot dequantise, by trying one block of each."""
    for type_id, name in {info.type_id: name for name, info in tensors.items()}.items():
        kind = gguf.GGMLQuantizationType(type_id)
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        try:
            gguf.quants.dequantize(block, kind)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{file}: tensor {name!r} has type {kind.name}, which is not supported."
            ) from error


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Translate the metadata to config.json of the same model on the hub."""
    architecture = metadata["general.architecture"]

    def value(key: str, kind: type = int, default: Any = None) -> Any:
        found = metadata.get(f"{architecture}.{key}", default)
        if found is None:
            raise ValueError(f"{file}: the metadata lacks {architecture}.{key}.")
        if isinstance(found, list):
            raise NotImplementedError(
                f"{file}: {architecture}.{key} differs between layers, which is not supported."
            )
        if type(found) is not kind:
            raise ValueError(f"{file}: {architecture}.{key}: expected {kind.__name__}, got {quoted(found)}.")
        # Shortest decimal of the stored float32: 1e-05 rather than 9.999999747378752e-06.
        return float(str(np.float32(found))) if kind is float else found

    if "token_embd.weight" not in tensors:
        raise ValueError(f"{file}: the tensor token_embd.weight is missing.")
    num_heads, hidden_size = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", default=hidden_size // max(num_heads, 1))
    if (rotated := value("rope.dimension_count", default=head_dim)) != head_dim:
        raise NotImplementedError(
            f"{file}: rotary embedding on {rotated} of {head_dim} dimensions is not supported."
        )
    config = {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": tensors["token_embd.weight"].shape[0],
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
        "rope_scaling": None,
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32",
    }
    if (scaling := value("rope.scaling.type", str, "none")) == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": value("rope.scaling.factor", float)}
    elif scaling != "none":
        raise NotImplementedError(
            f"{file}: rotary scaling {quoted(scaling)} is not supported; supported is 'linear'."
        )
    return config | _generation_config(metadata, config, file)


def _checked(config: Mapping[str, Any], file: str) -> DecoderConfig:
    """Return the decoder's own reading of the config, naming the file where it is refused."""
    try:
        return DecoderConfig.from_hf(config)
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{file}: {error}") from error


def _generation_config(metadata: Mapping[str, Any], config: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Special token ids; every id that ends a turn counts as EOS."""
    ids = [
        metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom", "bos", "padding")
    ]
    for token_id in ids:
        if token_id is not None and not (type(token_id) is int and 0 <= token_id < config["vocab_size"]):
            raise ValueError(
                f"{file}: expected special token ids from 0 to {config['vocab_size'] - 1}, "
                f"got {quoted(token_id)}."
            )
    ends = list(dict.fromkeys(i for i in ids[:3] if i is not None))
    found = {"eos_token_id": ends or None, "bos_token_id": ids[3], "pad_token_id": ids[4]}
    return {name: value for name, value in found.items() if value is not None}


def _hub_names(config: Mapping[str, Any], found: set[str], file: str) -> dict[str, str]:
    """Map GGUF tensor names to hub names, insisting on exactly the tensors of this architecture."""
    if config["num_hidden_layers"] > len(found):
        raise ValueError(
            f"{file}: the metadata imply {config['num_hidden_layers']} layers, but there are only "
            f"{len(found)} tensors."
        )
    layer_names = _LAYER_NAMES | _EXTRA_LAYER_NAMES[config["model_type"]]
    names = _GLOBAL_NAMES | {
        f"blk.{layer}.{name}": f"model.layers.{layer}.{hub}"
        for layer in range(config["num_hidden_layers"])
        for name, hub in layer_names.items()
    }
    missing = sorted(names.keys() - found - set(_OPTIONAL))
    unexpected = sorted(found - names.keys() - set(_OPTIONAL))
    for word, tensors in (("lacks", missing), ("has unknown", unexpected)):
        if tensors:
            more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
            raise ValueError(
                f"{file} {word} tensors of architecture {config['model_type']}: {tensors[:3]}{more}."
            )
    return {name: hub for name, hub in names.items() if name in found}


def _llama3_scaling(factors: np.ndarray, config: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Recover Llama 3's scaling from the divisors of the inverse frequencies that it led to.

    All released models share the cut-offs below and differ in `factor` alone, the largest divisor. What does
    not reproduce the stored divisors is refused.
    """
    if factors.shape != (config["head_dim"] // 2,):
        raise ValueError(
            f"{file}: rope_freqs.weight has shape {factors.shape}, but head_dim is {config['head_dim']}."
        )
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
            f"{file}: rope_freqs.weight does not follow the scaling of Llama 3.1-3.3; no other is supported."
        )
    return scaling


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
