"""GGUF files, opened as the model that they would be on the hub, with float32 weights.

Needs the `gguf` package to dequantise, but no torch. Three things in a GGUF differ from the hub format and
fail silently when forgotten, leaving a model that still looks plausible:

- architecture "llama" stores the rows of q and k in another order (for interleaved rotary embedding);
- frequency scaling of Llama 3.1 and later comes as a tensor, not as configuration;
- the splitting rules of the tokenizer are only named (see `gguf_tokenizer`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ponder.models.config import DecoderConfig
from ponder.models.loading.checkpoint import Checkpoint
from ponder.models.loading.gguf_config import ARCHITECTURES, hub_config, llama3_scaling
from ponder.models.loading.gguf_header import GGUFHeader, TensorInfo, read_header, read_tensor
from ponder.models.loading.gguf_tokenizer import read_tokenizer
from ponder.models.messages import errors_name, quoted
from ponder.models.weights import LazyTensors, check_shapes

__all__ = ["dequantise", "open_gguf", "unpermute"]

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
_OPTIONAL = {
    "llama": {"output.weight", "rope_freqs.weight"},
    "qwen2": {"output.weight"},
    "qwen3": {"output.weight"},
}


def open_gguf(path: str | os.PathLike) -> Checkpoint:
    """Open a GGUF file as the model that it would be on the hub; its tensors are dequantised to float32.

    All but the numbers in the tensors is checked here. Each is dequantised when it is read, which raises a
    ValueError where they are not finite.

    Raises:
        ImportError: The `gguf` package is not installed.
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or its metadata contradict its tensors.
        NotImplementedError: The file is sound but holds something that is not supported.
    """
    path = Path(path)
    with errors_name(path.name):
        metadata, infos = _read_header(path)
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise NotImplementedError(
                f"GGUF architecture {quoted(architecture)} is not supported; "
                f"supported are {sorted(ARCHITECTURES)}."
            )
        if metadata.get("split.count", 1) not in (0, 1):
            raise NotImplementedError(
                f"{path.name} is one part of a split GGUF: merge it with llama-gguf-split first."
            )
        _check_types(infos)
        if "token_embd.weight" not in infos:
            raise ValueError("the tensor token_embd.weight is missing.")
        raw_config = hub_config(
            metadata, infos["token_embd.weight"].shape[0], tied="output.weight" not in infos
        )
        config = DecoderConfig.from_hf(raw_config)
        if architecture == "llama" and (factors := infos.get("rope_freqs.weight")) is not None:
            stored = _read(path, "rope_freqs.weight", factors)
            raw_config["rope_scaling"] = llama3_scaling(stored, raw_config)
            config = DecoderConfig.from_hf(raw_config)
        tensors = _hub_tensors(path, infos, raw_config)
        try:
            check_shapes(config, tensors.shapes)
        except ValueError as error:
            raise ValueError(f"metadata and tensors contradict each other: {error}") from error
    return Checkpoint(
        file=path.name,
        raw_config=raw_config,
        config=config,
        eos_token_ids=tuple(raw_config.get("eos_token_id", ())),
        tensors=tensors,
        read_tokenizer=lambda: read_tokenizer(metadata),
    )


def _hub_tensors(path: Path, infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> LazyTensors:
    """Return the tensors under their hub names, with rows in the hub's order."""
    stored = {hub: name for name, hub in _hub_names(config, set(infos)).items()}
    heads: dict[str, int] = {}
    if config["model_type"] == "llama":
        heads["attn_q.weight"] = config["num_attention_heads"]
        heads["attn_k.weight"] = config["num_key_value_heads"]

    def read(hub: str) -> np.ndarray:
        name = stored[hub]
        weight = _read(path, name, infos[name])
        kind = name.partition(".")[2].partition(".")[2]  # blk.3.attn_q.weight -> attn_q.weight
        return unpermute(weight, heads[kind]) if kind in heads else weight

    return LazyTensors({hub: infos[name].shape for hub, name in stored.items()}, read)


def _read(path: Path, name: str, info: TensorInfo) -> np.ndarray:
    """Read a tensor as float32."""
    weight = dequantise(read_tensor(path, info), info.type_id).reshape(info.shape)
    if not np.isfinite(weight).all():
        raise ValueError(f"the tensor {name} holds NaN or infinity.")
    return weight


def dequantise(stored: np.ndarray, type_id: int) -> np.ndarray:
    """Return the weights float32[rows, in] of `stored uint8[rows, bytes of a row]`; damage may make them NaN.

    The gguf package takes 16 rows at a time, too few for numpy to be fast. Blocks do not care where a row
    ends, so several are given to it as one, which takes half the time.
    """
    gguf = _gguf_package()
    rows = math.prod(stored.shape[:-1])
    joined = stored.reshape(rows // math.gcd(rows, 16), -1)
    with np.errstate(over="ignore", invalid="ignore"):
        weights = gguf.quants.dequantize(joined, gguf.GGMLQuantizationType(type_id))
    return weights.astype(np.float32, copy=False).reshape(rows, -1)


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "Reading .gguf files needs the gguf package: pip install 'ponder-ppl[gguf]'."
        ) from error
    return gguf


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo the row order that llama.cpp gives to q and k of Llama models.

    Within a head, GGUF pairs rows (2i, 2i+1) for rotation; the hub format pairs (i, i + head_dim/2).

    Args:
        weight: `[num_heads * head_dim, in]`.
        num_heads: Query heads for q, key-value heads for k.
    """
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _read_header(path: Path) -> GGUFHeader:
    """Return all metadata values and the places of the (still quantised) tensors by name."""
    sizes = _gguf_package().GGML_QUANT_SIZES
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a .gguf file, got {str(path)!r}, which does not exist.")
    return read_header(path, {int(kind): size for kind, size in sizes.items()})


def _check_types(tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse types that the gguf package cannot dequantise, by trying one block of each."""
    gguf = _gguf_package()
    for type_id, name in {info.type_id: name for name, info in tensors.items()}.items():
        kind = gguf.GGMLQuantizationType(type_id)
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        try:
            gguf.quants.dequantize(block, kind)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"tensor {name!r} has type {kind.name}, which is not supported."
            ) from error


def _hub_names(config: Mapping[str, Any], found: set[str]) -> dict[str, str]:
    """Map GGUF tensor names to hub names, insisting on exactly the tensors of this architecture."""
    if config["num_hidden_layers"] > len(found):
        raise ValueError(
            f"the metadata imply {config['num_hidden_layers']} layers, but there are only "
            f"{len(found)} tensors."
        )
    layer_names = _LAYER_NAMES | _EXTRA_LAYER_NAMES[config["model_type"]]
    names = _GLOBAL_NAMES | {
        f"blk.{layer}.{name}": f"model.layers.{layer}.{hub}"
        for layer in range(config["num_hidden_layers"])
        for name, hub in layer_names.items()
    }
    optional = _OPTIONAL[config["model_type"]]
    missing = sorted(names.keys() - found - optional)
    unexpected = sorted(found - names.keys() - optional)
    for word, tensors in (("lacks", missing), ("has unknown", unexpected)):
        if tensors:
            more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
            raise ValueError(
                f"the file {word} tensors of architecture {config['model_type']}: {tensors[:3]}{more}."
            )
    return {name: hub for name, hub in names.items() if name in found}
