"""Special tokens in the metadata of a GGUF file: which begin a prompt, which end a generation.

They are found as llama.cpp finds them, defaults included (`llama_vocab::impl::load` in its
src/llama-vocab.cpp at commit 00ad355). Many files name the token that ends a text, `<|endoftext|>`, and not
the one that ends a turn, `<|im_end|>`: so tokens are also told by their text.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from ponder.models.messages import quoted

__all__ = ["CONTROL_TEXTS", "LLAMA3_NAMES", "SpecialTokens", "special_tokens"]

LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
"""Names of Llama 3's splitting rules, with which prompts begin with BOS unless the file says otherwise."""

_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}

_END_TEXTS = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "[e~[",
}
# Tokens of fill-in-the-middle that end a generation; one of each, unless a key names it.
_INFILL_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
CONTROL_TEXTS = frozenset(_END_TEXTS.union(*_INFILL_ENDS.values()))
"""Tokens that are special by their text, whatever type the file gives them: they add nothing to a text."""


class SpecialTokens(NamedTuple):
    """Ids of special tokens; None where there is none.

    Attributes:
        bos: begins a prompt, if `adds_bos`.
        eos: ends a text.
        unknown: stands for what the vocabulary cannot write.
        padding: fills up batches.
        ends: all tokens that end a generation, `eos` first.
        adds_bos: whether a prompt begins with `bos`.
    """

    bos: int | None
    eos: int | None
    unknown: int | None
    padding: int | None
    ends: tuple[int, ...]
    adds_bos: bool


def special_tokens(metadata: Mapping[str, Any], vocab_size: int | None = None) -> SpecialTokens:
    """Find the special tokens.

    An id beyond the vocabulary counts as not given, as in llama.cpp; where it would be used, with a warning.

    Args:
        metadata: of the file.
        vocab_size: rows of the embedding; None: as many as there are tokens.

    Raises:
        ValueError: an id is no integer, or prompts begin with a token that is not named.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    count = min((size for size in (vocab_size, len(tokens)) if size), default=0)
    kind = metadata.get("tokenizer.ggml.model")
    defaults = {
        name: token_id
        for name, token_id in (_SENTENCEPIECE_IDS.items() if kind == "llama" else ())
        if token_id < count
    }
    pre = metadata.get("tokenizer.ggml.pre")
    adds_bos = metadata.get(
        "tokenizer.ggml.add_bos_token", kind == "llama" or (kind == "gpt2" and pre in LLAMA3_NAMES)
    )
    if type(adds_bos) is not bool:
        raise ValueError(f"tokenizer.ggml.add_bos_token: expected a bool, got {quoted(adds_bos)}.")

    def find(name: str, used: bool) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = metadata.get(key)
        if token_id is None:
            return defaults.get(name)
        if type(token_id) is not int:
            raise ValueError(f"{key}: expected an int, got {quoted(token_id)}.")
        if 0 <= token_id < count:
            return token_id
        if used:
            warnings.warn(
                f"{key} is {quoted(token_id)}, beyond the vocabulary of {count} tokens: taken as missing",
                stacklevel=3,
            )
        return defaults.get(name)

    bos, eos = find("bos", used=adds_bos and "bos" in defaults), find("eos", used=True)
    if adds_bos and bos is None and tokens:
        raise ValueError(
            "prompts begin with BOS (tokenizer.ggml.add_bos_token, or its default for this tokenizer), but "
            "tokenizer.ggml.bos_token_id is missing or beyond the vocabulary."
        )
    named = [eos, find("eot", used=True), find("eom", used=True)]
    ends = dict.fromkeys(token_id for token_id in named if token_id is not None)
    ends |= dict.fromkeys(_ends_by_text(tokens[:count], [find(name, used=False) for name in _INFILL_ENDS]))
    return SpecialTokens(
        bos,
        eos,
        find("unknown", used=False),
        find("padding", used=False),
        tuple(ends),
        adds_bos and bool(tokens),
    )


def _ends_by_text(tokens: list[Any], infill: list[int | None]) -> list[int]:
    """Ids of tokens whose text says that they end a generation, and those of `_INFILL_ENDS`."""
    found: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        if isinstance(token, str) and token in CONTROL_TEXTS:
            found.setdefault(token, token_id)
    ends = {token_id for text, token_id in found.items() if text in _END_TEXTS}
    # In this format <|end|> ends a message of several that make a turn.
    if {"<|end|>", "<|call|>", "<|return|>"} <= found.keys() or (
        {"<|end|>", "<|flush|>"} <= found.keys() and {"<|call|>", "<|calls|>"} & found.keys()
    ):
        ends.discard(found["<|end|>"])
    for texts, named in zip(_INFILL_ENDS.values(), infill, strict=True):
        by_text = [found[text] for text in texts if text in found]
        ends |= {named} if named is not None else set(by_text[:1])
    return sorted(ends)
