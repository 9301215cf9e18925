"""Rebuild a tokenizer from the metadata of a GGUF file.

A GGUF holds vocabulary and merges, but only the *name* of the rules that split text before merging. Wrong
rules give plausible but wrong ids, so an unknown name is refused rather than guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ponder.models.loading.gguf_special import CONTROL_TEXTS, LLAMA3_NAMES, SpecialTokens, special_tokens
from ponder.models.loading.tokenizer import HubTokenizer
from ponder.models.messages import damage_named, quoted

__all__ = ["build_tokenizer", "read_tokenizer"]

# Token types of the format.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5

# Recovering merges tries every cut of a piece, which takes time with the square of its length.
_MAX_PIECE_LENGTH = 1024

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_DAMAGED = "the tokenizer in the metadata cannot be used"

_PLAIN_NAMES = ("gpt-2", "olmo", "phi-2", "jais")
_SINGLE_DIGIT_NAMES = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_SPLIT_PATTERNS = {
    **dict.fromkeys(LLAMA3_NAMES, _LLAMA3_SPLIT),
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
}


def read_tokenizer(metadata: Mapping[str, Any]) -> HubTokenizer:
    """Return the tokenizer that the metadata of a GGUF file describe, chat template included.

    Errors are those of `build_tokenizer`.
    """
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"tokenizer.chat_template: expected a string, got {quoted(template)}.")
    backend = build_tokenizer(metadata)
    tokens, found = _strings(metadata, "tokens"), special_tokens(metadata)
    ids = {"bos": found.bos, "eos": found.eos, "unk": found.unknown, "pad": found.padding}
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    with damage_named(_DAMAGED):
        return HubTokenizer.from_backend(backend, chat_template=template, **special)


def build_tokenizer(metadata: Mapping[str, Any]):
    """Build the `tokenizers.Tokenizer` that the metadata of a GGUF file describe.

    Raises:
        ValueError: The metadata lack the vocabulary, the merges, or the name of the splitting rules, or
            these are damaged.
        NotImplementedError: An unknown tokenizer model or splitting rule.
    """
    tokens = _strings(metadata, "tokens")
    types = _listed(metadata, "token_type", int, [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type: expected {len(tokens)} entries, got {len(types)}.")
    _refuse_duplicates(tokens)
    types = [
        _CONTROL if token in CONTROL_TEXTS else type_ for token, type_ in zip(tokens, types, strict=True)
    ]
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        _present("model", kind)
        raise NotImplementedError(
            f"tokenizer.ggml.model {quoted(kind)} is not supported; supported are 'gpt2', 'llama'."
        )
    found = special_tokens(metadata)
    with damage_named(_DAMAGED):
        return _build(metadata, tokens, types, kind, found)


def _build(metadata: Mapping[str, Any], tokens: list[str], types: list[int], kind: str, found: SpecialTokens):
    from tokenizers import AddedToken, processors

    # Unused ids pad the embedding matrix; they stand for no text, and neither do empty tokens.
    typed = list(zip(tokens, types, strict=True))
    vocab = {token: i for i, (token, type_) in enumerate(typed) if token and type_ != _UNUSED}
    if kind == "gpt2":
        rules = metadata.get("tokenizer.ggml.pre")
        _present("pre", rules)
        tokenizer = _byte_level(vocab, _strings(metadata, "merges"), rules)
    else:
        scores = _listed(metadata, "scores", float)
        if len(scores) != len(tokens):
            raise ValueError(f"tokenizer.ggml.scores: expected {len(tokens)} entries, got {len(scores)}.")
        tokenizer = _sentencepiece(vocab, types, scores, metadata)

    # All at once: each call rebuilds the search for added tokens.
    special = (_CONTROL, _UNKNOWN) if kind == "llama" else (_CONTROL,)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, type_ in typed if type_ in special]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=False)
            for token, type_ in typed
            if type_ == _USER_DEFINED
        ]
    )

    bos = found.bos
    if found.adds_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]} $B",
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def _present(name: str, value: Any) -> None:
    if value is None:
        raise ValueError(f"The GGUF metadata lack tokenizer.ggml.{name}; convert the model again to get it.")


def _listed(metadata: Mapping[str, Any], name: str, kind: type, default: Any = None) -> list:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    _present(name, value)
    if not isinstance(value, list) or not all(type(entry) is kind for entry in value):
        raise ValueError(f"tokenizer.ggml.{name}: expected a list of {kind.__name__}, got {quoted(value)}.")
    return value


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    return _listed(metadata, name, str)


def _refuse_duplicates(tokens: list[str]) -> None:
    if len(set(tokens)) == len(tokens):
        return
    first: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        if token and first.setdefault(token, token_id) != token_id:
            raise ValueError(
                f"tokenizer.ggml.tokens: {quoted(token)} stands for two ids, {first[token]} and {token_id}."
            )


def _byte_level(vocab: dict[str, int], merges: list[str], rules: Any):
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
        raise NotImplementedError(
            f"tokenizer.ggml.pre {quoted(rules)} is not supported; supported are {known}."
        )
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
    if too_long := next((token for token in vocab if len(token) > _MAX_PIECE_LENGTH), None):
        raise ValueError(
            f"tokenizer.ggml.tokens: expected pieces of at most {_MAX_PIECE_LENGTH} characters, "
            f"got one of {len(too_long)}."
        )
    ordinary = {token: token_id for token, token_id in vocab.items() if types[token_id] == _NORMAL}
    found = [
        (-scores[token_id], -cut, cut - len(token), token_id, token[:cut], token[cut:])
        for token, token_id in ordinary.items()
        for cut in range(1, len(token))
        if token[:cut] in ordinary and token[cut:] in ordinary
    ]
    return [(left, right) for *_, left, right in sorted(found)]
