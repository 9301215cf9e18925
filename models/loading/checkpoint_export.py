"""Write small trained models in hub format: config, float16 weights and a word-level tokenizer."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ponder.models.config import DecoderConfig
from ponder.models.decoder import Decoder
from ponder.models.loading import hub
from ponder.models.weights import from_weights, to_weights

__all__ = ["encoder", "export_policy", "export_reward", "read_reward", "write_tokenizer"]

EOS_TOKEN = "<|end|>"
UNKNOWN_TOKEN = "<|unknown|>"


def encoder(pieces: Sequence[str], split: str) -> Callable[[str], list[int]]:
    """Return a function from text to ids that agrees with the written tokenizer and is much faster."""
    ids = {piece: i for i, piece in enumerate(pieces) if piece}
    pattern = re.compile(split)
    return lambda text: [ids[word] for word in pattern.findall(text)]


def export_policy(directory: Path, decoder: Decoder, pieces: Sequence[str], split: str, **notes: Any) -> None:
    """Write a decoder as a llama checkpoint.

    Args:
        directory: made if it does not exist.
        decoder: with an untied head and no biases.
        pieces: text of each id; the last two are EOS and unknown.
        split: regular expression of one token.
        notes: further keys of config.json.
    """
    config = _hub_config(decoder.config, len(pieces)) | {"architectures": ["LlamaForCausalLM"]} | notes
    _write(directory, config, to_weights(decoder))
    write_tokenizer(directory, pieces, split)


def export_reward(
    directory: Path,
    decoder: Decoder,
    weight: np.ndarray,
    bias: np.ndarray,
    pieces: Sequence[str],
    split: str,
    **notes: Any,
) -> None:
    """Write a decoder with a scalar head as LlamaForTokenClassification with one label.

    The reward of a trace is sigmoid(weight · h + bias), h the normalised hidden state of its last token,
    which ends a step.

    Args:
        directory: made if it does not exist.
        decoder: its own head is not written.
        weight: float[1, M].
        bias: float[1].
        pieces: text of each id; the last two are EOS and unknown.
        split: regular expression of one token.
        notes: further keys of config.json.
    """
    config = _hub_config(decoder.config, len(pieces)) | {
        "architectures": ["LlamaForTokenClassification"],
        "num_labels": 1,
        "id2label": {"0": "right"},
        "label2id": {"right": 0},
    }
    weights = to_weights(decoder)
    weights.pop("lm_head.weight", None)
    weights |= {"score.weight": np.asarray(weight), "score.bias": np.asarray(bias)}
    _write(directory, config | notes, weights)
    write_tokenizer(directory, pieces, split)


def read_reward(directory: Path, head: Any = None) -> tuple[Decoder, np.ndarray, np.ndarray]:
    """Read what `export_reward` wrote: the decoder, weight and bias.

    Args:
        directory: of the reward model.
        head: the decoder's own head [V, M], which was not written; None ties it to the embedding.
    """
    checkpoint = hub.open_directory(directory)
    config = dataclasses.replace(checkpoint.config, tie_word_embeddings=head is None)
    weights = dict(checkpoint.tensors)
    weight, bias = (weights.pop(f"score.{name}").astype(np.float32) for name in ("weight", "bias"))
    if head is not None:
        weights["lm_head.weight"] = np.asarray(head[...])
    return from_weights(config, weights), weight, bias


def write_tokenizer(directory: Path, pieces: Sequence[str], split: str) -> None:
    """Write tokenizer.json: text is cut by `split`, and each cut is one token of the vocabulary.

    A cut that is no token, such as a third digit, falls apart into characters; characters that are no
    tokens become the unknown token. Ids decode to the joined pieces.
    """
    eos, unknown = len(pieces) - 2, len(pieces) - 1
    spelt = [_byte_level(piece) for piece in pieces[:-2]]
    special = [
        {"id": i, "content": content, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for i, content in ((eos, EOS_TOKEN), (unknown, UNKNOWN_TOKEN))
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN_TOKEN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {word: i for i, word in enumerate([*spelt, EOS_TOKEN, UNKNOWN_TOKEN])},
            "merges": [],
        },
    }
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TOKEN,
        "unk_token": UNKNOWN_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(directory / "tokenizer.json", tokenizer)
    _write_json(directory / "tokenizer_config.json", names)


def _byte_level(piece: str) -> str:
    """Spell a piece of ASCII in the alphabet of byte-level tokenizers."""
    return piece.replace(" ", "\u0120").replace("\n", "\u010a")


def _hub_config(config: DecoderConfig, num_pieces: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "hidden_act": config.hidden_act,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": num_pieces - 2,
        "torch_dtype": "float16",
    }


def _write(directory: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config)
    halves = {name: np.ascontiguousarray(weight, dtype=np.float16) for name, weight in weights.items()}
    save_file(halves, directory / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
