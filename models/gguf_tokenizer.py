"""Rebuild tokenizer.json from the metadata of a GGUF file.

A GGUF holds vocabulary and merges, but only the *name* of the rules that split text before merging. Wrong
rules give plausible but wrong ids, so an unknown name is refused rather than guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["build_tokenizer", "write_tokenizer"]

# Token types of the format.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_PLAIN_NAMES = ("gpt-2", "olmo", "phi-2", "jais")
_SINGLE_DIGIT_NAMES = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_SPLIT_PATTERNS = {
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
}


def write_tokenizer(metadata: Mapping[str, Any], out_dir: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, chat template included."""
    build_tokenizer(metadata).save(str(out_dir / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            config[f"{name}_token"] = metadata["tokenizer.ggml.tokens"][token_id]
    config = {name: value for name, value in config.items() if value is not None}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out_dir / "tokenizer_config.json").write_text(text, encoding="utf-8")


def build_tokenizer(metadata: Mapping[str, Any]):
    """Build the `tokenizers.Tokenizer` that the metadata of a GGUF file describe.

    Raises:
        ValueError: The metadata lack the vocabulary, the merges, or the name of the splitting rules.
        NotImplementedError: An unknown tokenizer model or splitting rule.
    """
    from tokenizers import AddedToken, processors

    def field(name: str, default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.ggml.{name}", default)
        if value is None:
            raise ValueError(
                f"The GGUF metadata lack tokenizer.ggml.{name}; convert the model again to get it."
            )
        return value

    tokens = field("tokens")
    types = field("token_type", [_NORMAL] * len(tokens))
    kind = field("model")
    # Unused ids pad the embedding matrix; they stand for no text.
    vocab = {token: i for i, (token, type_) in enumerate(zip(tokens, types, strict=True)) if type_ != _UNUSED}
    if kind == "gpt2":
        tokenizer = _byte_level(vocab, field("merges"), field("pre"))
    elif kind == "llama":
        tokenizer = _sentencepiece(vocab, types, field("scores"), metadata)
    else:
        raise NotImplementedError(
            f"tokenizer.ggml.model {kind!r} is not supported; supported are 'gpt2', 'llama'."
        )

    special = (_CONTROL, _UNKNOWN) if kind == "llama" else (_CONTROL,)
    for token, type_ in zip(tokens, types, strict=True):
        if type_ in special:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif type_ == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])

    bos = metadata.get("tokenizer.ggml.bos_token_id")
    # Old sentencepiece files have no flag, and llama.cpp takes it as set there.
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]} $B",
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def _byte_level(vocab: dict[str, int], merges: list[str], rules: str):
    """Byte-level BPE, with the splitting rules of that name."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    # Llama 3 takes a whole word that is in the vocabulary even where no merges lead to it.
    whole_words = _SPLIT_PATTERNS.get(rules) == _LLAMA3_SPLIT
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=whole_words))
    if rules in _PLAIN_NAMES:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif rules in _SINGLE_DIGIT_NAMES:
        # Digits first: the other rules then see the blanks before one as trailing, and keep them together.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif rules in _SPLIT_PATTERNS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT_PATTERNS[rules]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        if _SPLIT_PATTERNS[rules] == _QWEN2_SPLIT:
            tokenizer.normalizer = normalizers.NFC()
    else:
        known = sorted((*_PLAIN_NAMES, *_SINGLE_DIGIT_NAMES, *_SPLIT_PATTERNS))
        raise NotImplementedError(f"tokenizer.ggml.pre {rules!r} is not supported; supported are {known}.")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocab: dict[str, int], types: list[int], scores: list[float], metadata: Mapping[str, Any]):
    """BPE over characters with a blank written as U+2581, falling back to bytes (Llama 2, Mistral)."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = list(vocab)
    unknown = next((token for token in tokens if types[vocab[token]] == _UNKNOWN), None)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_from_scores(vocab, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    blank = "\u2581"
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(blank)] if prefix else []), normalizers.Replace(" ", blank)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(blank, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(content=" ", left=1)] if prefix else []),
        ]
    )
    return tokenizer


def _merges_from_scores(
    vocab: Mapping[str, int], types: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """Recover merges: sentencepiece joins any two neighbours that form a token, best score first.

    Ties go to the longer left part, then to the longer right part, as in transformers' own conversion.
    """
    ordinary = {token: token_id for token, token_id in vocab.items() if types[token_id] == _NORMAL}
    found = [
        (-scores[token_id], -cut, cut - len(token), token_id, token[:cut], token[cut:])
        for token, token_id in ordinary.items()
        for cut in range(1, len(token))
        if token[:cut] in ordinary and token[cut:] in ordinary
    ]
    return [(left, right) for *_, left, right in sorted(found)]
