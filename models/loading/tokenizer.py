"""A Hugging Face tokenizer behind ponder's `Tokenizer` protocol."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ponder.models.messages import check_messages, damage_named, quoted

__all__ = ["HubTokenizer", "has_tokenizer"]

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Larger ids are damage: no vocabulary comes near, and the table of bytes has a row for each.
_MAX_TOKEN_ID = 1 << 24
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What `apply_chat_template` of transformers takes besides the variables of a template.
_NO_VARIABLES = {
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}


def has_tokenizer(directory: str | os.PathLike) -> bool:
    """Whether a hub-format directory has tokenizer files."""
    return any((Path(directory) / name).is_file() for name in _FILES)


class HubTokenizer:
    """Text to token ids and back, with the vocabulary of a hub model.

    Compared and hashed by identity, so that it can be static data of a jax pytree.

    Args:
        tokenizer: A fast transformers tokenizer (`PreTrainedTokenizerFast` or a subclass).
    """

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TypeError(
                "tokenizer: expected a fast transformers tokenizer (one with a tokenizer.json), "
                f"got {type(tokenizer).__name__}."
            )
        self.hub_tokenizer = tokenizer
        self._backend = backend
        # A file may ask for either, and a prompt would then be cut or filled up without a word.
        backend.no_truncation()
        backend.no_padding()

    @classmethod
    def from_directory(cls, directory: str | os.PathLike) -> HubTokenizer:
        """Read the tokenizer files of a hub-format directory. Code that comes with a model is never run.

        Raises:
            FileNotFoundError: The directory has no tokenizer files.
            ValueError: The files are damaged, or would need code of their own.
            NotImplementedError: Its tokens cannot be spelt as bytes.
        """
        directory = Path(directory)
        if not has_tokenizer(directory):
            raise FileNotFoundError(f"No tokenizer in {str(directory)!r}: expected tokenizer.json.")
        with _without_pytorch_notice():
            from transformers import AutoTokenizer, PreTrainedTokenizerFast
        with damage_named(f"the tokenizer in {str(directory)!r} cannot be used"):
            if (directory / "tokenizer.json").is_file():
                # Not AutoTokenizer: the class named in tokenizer_config.json may rebuild the splitting rules
                # from its own defaults, and then SmolLM's digits are no longer split one by one.
                found = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
            else:
                # Without an explicit False, transformers asks on the terminal whether to run foreign code.
                found = AutoTokenizer.from_pretrained(
                    directory, local_files_only=True, trust_remote_code=False
                )
            tokenizer = cls(found)
            tokenizer._check()
        return tokenizer

    @classmethod
    def from_backend(cls, backend: Any, **settings: Any) -> HubTokenizer:
        """Wrap a `tokenizers.Tokenizer`.

        Args:
            backend: The tokenizer; it is copied.
            settings: Special tokens and `chat_template`, as in tokenizer_config.json.

        Raises:
            ValueError: A setting is damaged, or an id is absurdly large.
            NotImplementedError: Its tokens cannot be spelt as bytes.
        """
        with _without_pytorch_notice():
            from transformers import PreTrainedTokenizerFast
        found = PreTrainedTokenizerFast(
            tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings
        )
        tokenizer = cls(found)
        tokenizer._check()
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids with a meaning, added tokens included; the model may have more (padded) rows."""
        return len(self._bytes_by_id)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, if there is one; see `adds_bos`."""
        return self.hub_tokenizer.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, if there is one."""
        return self.hub_tokenizer.eos_token_id

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works."""
        return bool(self.hub_tokenizer.chat_template)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the model was trained on texts that begin with `bos_token_id`.

        Having a BOS token does not say so: SmolLM2 has one that only its chat template writes.
        """
        return self._backend.encode("a", add_special_tokens=True).ids[:1] == [self.bos_token_id]

    def encode(self, text: str) -> list[int]:
        """Encode text as it stands, with no special tokens added.

        A special token spelt out in the text, such as `<|im_end|>`, becomes that token.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str, got {type(text).__name__}.")
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; special tokens and ids beyond the vocabulary leave no text behind.

        This joins `token_bytes`, so that constraints on bytes and functions of text see the same text: a
        sentencepiece decoder would drop the blank before the first word of a continuation.
        """
        return b"".join(self.token_bytes(i) for i in ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one token adds to the text; empty for special and unused ids."""
        token_id = int(token_id)
        if token_id < 0:
            raise ValueError(f"token_id: expected a non-negative int, got {token_id}.")
        return self._bytes_by_id[token_id] if token_id < len(self._bytes_by_id) else b""

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **variables: Any) -> list[int]:
        """Render chat messages and the start of the assistant's turn, as token ids.

        A chat that ends with the assistant's turn leaves it open: what is generated goes on from its last
        word, as with `continue_final_message` in transformers.

        Args:
            messages: Dicts with "role" and "content".
            variables: Of the template, such as `enable_thinking=False`, and what transformers has for all of
                them: `tools`, `documents`, `chat_template`. One that the template does not read is warned of.

        Raises:
            TypeError: `messages` is not a sequence of dicts with "role" and "content", or a variable is a
                setting of transformers' method, such as `add_generation_prompt`.
            ValueError: There are no messages, the tokenizer has no chat template, or the template fails.

        The template is code of the model's publisher. It runs in jinja's sandbox, which keeps it from files
        and from Python's internals, but not from taking time and memory without end.
        """
        if not self.has_chat_template:
            raise ValueError(
                "messages: this tokenizer has no chat template (a base model?); pass a str instead."
            )
        check_messages(messages)
        if not len(messages):
            raise ValueError("messages: expected at least one message, got none.")
        if settings := sorted(_NO_VARIABLES & variables.keys()):
            raise TypeError(
                f"variables: expected those of the chat template, got {settings[0]!r}, which is set here: a "
                "chat that ends with the assistant's turn is continued, after any other that turn begins."
            )
        messages = [dict(m) for m in messages]
        last = messages[-1]
        open_turn = last["role"] == "assistant" and not last.get("tool_calls")
        if open_turn and last["content"] == "" and len(messages) > 1:
            messages, open_turn = messages[:-1], False  # nothing is said yet
        with damage_named("messages: the tokenizer's chat template fails"):
            self._warn_of_unread(variables)
            text = self.hub_tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not open_turn,
                continue_final_message=open_turn,
                **variables,
            )
        return self.encode(text)  # the template itself writes BOS where the model wants one

    def _warn_of_unread(self, variables: dict[str, Any]) -> None:
        """Jinja takes any variable; a misspelt one would change nothing without a word."""
        names = variables.keys() - {"chat_template"}
        if not names:
            return
        template = self.hub_tokenizer.get_chat_template(
            variables.get("chat_template"), tools=variables.get("tools")
        )
        if unread := sorted(name for name in names if not re.search(rf"\b{re.escape(name)}\b", template)):
            warnings.warn(
                f"variables: the chat template does not read {', '.join(unread)}, which changes nothing",
                stacklevel=3,
            )

    def _check(self) -> None:
        """Refuse, while loading, what would fail at the first use."""
        largest = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if not 0 <= largest <= _MAX_TOKEN_ID:
            raise ValueError(f"expected token ids from 0 to {_MAX_TOKEN_ID}, got {largest}.")
        template = self.hub_tokenizer.chat_template
        if not isinstance(template, str | dict | None):
            raise ValueError(f"chat_template: expected a string, got {quoted(template)}.")
        _ = self._bytes_by_id  # needs a decoder that it knows

    @cached_property
    def _bytes_by_id(self) -> list[bytes]:
        """What each id adds to the text, for the whole vocabulary."""
        spec = json.loads(self._backend.to_str())
        spell = _speller(spec)
        vocab = self._backend.get_vocab(with_added_tokens=True)
        added = {token["id"]: token for token in spec.get("added_tokens", ())}
        table = [b""] * (max(vocab.values(), default=-1) + 1)
        for token, token_id in vocab.items():
            if token_id not in added:
                table[token_id] = spell(token)
            elif not added[token_id]["special"]:
                table[token_id] = token.encode()  # matched as text, not spelt in the model's alphabet
        return table


def _speller(spec: dict):
    """Choose how vocabulary entries spell bytes, from the decoder in tokenizer.json."""
    decoder = spec.get("decoder") or {}
    kinds = {d["type"] for d in (decoder, *decoder.get("decoders", ()))}
    if "ByteLevel" in kinds:
        alphabet = _byte_level_alphabet()
        return lambda token: b"".join(alphabet.get(c) or c.encode() for c in token)
    if kinds & {"ByteFallback", "Metaspace"}:
        return _sentencepiece_bytes
    raise NotImplementedError(
        f"tokenizer: cannot tell the bytes of its tokens; expected a ByteLevel, ByteFallback or Metaspace "
        f"decoder, got {sorted(kinds) or 'none'}."
    )


def _sentencepiece_bytes(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("\u2581", " ").encode()


def _byte_level_alphabet() -> dict[str, bytes]:
    """Map the characters of byte-level BPE back to bytes.

    Printable latin-1 characters stand for themselves; the other 68 bytes follow from U+0100 on.
    """
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): bytes([byte]) for byte in own} | {
        chr(256 + position): bytes([byte]) for position, byte in enumerate(others)
    }


class _without_pytorch_notice:
    """Drop transformers' import-time notice that torch is absent: ponder never needs it."""

    def __enter__(self):
        logging.getLogger("transformers").addFilter(self._keep)

    def __exit__(self, *_):
        logging.getLogger("transformers").removeFilter(self._keep)

    @staticmethod
    def _keep(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()
