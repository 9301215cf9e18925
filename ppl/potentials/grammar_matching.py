"""Host side of grammars and schemas: llguidance matchers for token prefixes, kept in a bounded cache.

A matcher reads tokens one by one and changes as it reads. Here its answers are a function of the prefix
alone: the matcher of a prefix is a copy of its parent's that reads one token more, or reads the whole prefix
again where the parent is no longer kept. So compiled code may ask for any prefix at any time, in any process.
Where the engine cannot say all that is asked for, a judge of complete texts has the last word.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

__all__ = [
    "CAPACITY",
    "EngineLimitError",
    "Matchers",
    "digest_of",
    "engine_refuses",
    "judge_rows",
    "shortened",
]

CAPACITY = 4096
"""Matchers that are kept."""

_MOST_TRIED = 8192
"""Most candidates for the last token that are tried one by one; about a microsecond each."""

_END = b"\xff<end>"  # as the engine marks special tokens; it looks for at least one

# Where only some bytes can follow, the engine would else allow only the token that it would itself write.
_ANY_TOKENS = '\n%llguidance {"no_forcing": true}'


_GBNF = (
    " (rules with ::= are GBNF, of llama.cpp; here they are Lark's, `start: ...`: "
    "llguidance.gbnf_to_lark.gbnf_to_lark(text) translates)"
)


class EngineLimitError(RuntimeError):
    """The engine met one of its limits, so that nothing is known of the text."""


@dataclasses.dataclass(frozen=True)
class Matchers:
    """What a grammar says of token prefixes; equal where the grammar and the vocabulary are.

    Attributes:
        text: the grammar.
        vocabulary: a digest of the bytes of all tokens.
        name: what they serve, for messages.
        judge: has to accept a text besides; None accepts all. Compared by equality.
        pieces: the bytes of each token.
        root: the matcher of the empty text; only copied.
        kept: matchers by prefix (the bytes of its int32 token ids), least recently used first.
        capacity: the most that are kept.
        lock: held while they are in use, since programs may run in several threads.
    """

    text: str
    vocabulary: bytes
    name: str
    judge: Callable[[str], bool] | None
    pieces: Sequence[bytes] = dataclasses.field(compare=False, repr=False)
    root: Any = dataclasses.field(compare=False, repr=False)
    kept: OrderedDict[bytes, Any] = dataclasses.field(compare=False, repr=False)
    capacity: int = dataclasses.field(compare=False)
    lock: Any = dataclasses.field(compare=False, repr=False)

    @classmethod
    def compile(
        cls,
        text: str,
        pieces: Sequence[bytes],
        capacity: int = CAPACITY,
        *,
        name: str = "",
        judge: Callable[[str], bool] | None = None,
    ) -> Matchers:
        """Compile a grammar for a vocabulary.

        Args:
            text: the grammar.
            pieces: the bytes of each token; empty for tokens that have no text, EOS among them.
            capacity: matchers to keep, at least 1.
            name: what they serve, for messages; the grammar itself by default.
            judge: what a text of the grammar's language has to satisfy besides.

        Raises:
            ImportError: llguidance is not installed.
            ValueError: the engine refuses the grammar.
        """
        name = name or shortened(text)
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise ImportError(f"{name} needs llguidance: pip install 'ponder-ppl[grammar]'") from error
        tokenizer = _tokenizer(pieces)
        # The text as it stands first: a message about it must not show the line that is added.
        problem = LLMatcher.validate_grammar(text, tokenizer)
        root = LLMatcher(tokenizer, text + _ANY_TOKENS, log_level=0)
        if not problem.startswith("WARNING") and (problem or root.is_error()):
            raise ValueError(
                f"{name}: the engine refuses the grammar: {_in_one_line(problem) or _reason(root)}"
                f"{_GBNF if '::=' in text else ''}"
            )
        lock, kept = threading.Lock(), OrderedDict()
        return cls(text, digest_of(pieces), name, judge, pieces, root, kept, capacity, lock)

    @property
    def num_bytes(self) -> int:
        """Bytes of a packed mask of the vocabulary."""
        return -(-len(self.pieces) // 8)

    def __call__(
        self,
        tokens: jax.Array | np.ndarray,
        lengths: jax.Array | np.ndarray,
        needed: jax.Array | np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Judge the prefixes `tokens[..., :length]` of at most T tokens that are needed; others get zeros.

        Args:
            tokens: int32[..., T].
            lengths: int32[...].
            needed: bool[...].

        Returns:
            `uint8[..., V/8]`, one bit a token, lowest first: which tokens can follow; where one token is left
            before the limit, those after which the text is in the language. And `bool[...]`: whether the text
            is in the language as it is.

        Raises:
            EngineLimitError: the engine met one of its limits.
        """
        with self.lock:
            return judge_rows(self._judge, self.num_bytes, tokens, lengths, needed)

    def _judge(self, prefix: bytes, remaining: int) -> tuple[np.ndarray, bool]:
        matcher = self._matcher(prefix)
        accepts = matcher.is_accepting() and self._approves(prefix)
        if not remaining:
            return np.zeros(self.num_bytes, np.uint8), accepts
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)[: self.num_bytes]
        if matcher.is_error():
            # What ends without being complete, such as half a character that no token completes, is no fault.
            if not _reason(matcher).startswith("NoExtension"):
                raise self._failed(matcher)
            return np.zeros(self.num_bytes, np.uint8), accepts
        if remaining > 1:
            return mask, accepts
        bits = np.unpackbits(mask, bitorder="little")
        candidates = np.flatnonzero(bits[: len(self.pieces)])
        if len(candidates) <= _MOST_TRIED:
            end = len(self.pieces)  # the engine's own mark for the end of text, an id that the model lacks
            wrong = [
                token
                for token in candidates.tolist()
                if matcher.validate_tokens([token, end]) < 2 or not self._approves(prefix, token)
            ]
            bits[wrong] = 0
        return np.packbits(bits, bitorder="little"), accepts

    def _approves(self, prefix: bytes, *more: int) -> bool:
        """Ask the judge about the text of a prefix, and perhaps a token more."""
        if self.judge is None:
            return True
        tokens = [*np.frombuffer(prefix, np.int32).tolist(), *more]
        try:
            return self.judge(b"".join(self.pieces[token] for token in tokens).decode())
        except UnicodeDecodeError:
            return False

    def _matcher(self, prefix: bytes) -> Any:
        """Return the matcher of a prefix, from the cache, from its parent's or from the empty text's."""
        matcher = self.kept.get(prefix)
        if matcher is None:
            parent = self.kept.get(prefix[:-4]) if prefix else None
            unread = prefix if parent is None else prefix[-4:]
            matcher = (self.root if parent is None else parent).deep_copy()
            if unread and not matcher.consume_tokens(np.frombuffer(unread, np.int32).tolist()):
                raise self._failed(matcher)
            self.kept[prefix] = matcher
        self.kept.move_to_end(prefix)
        for oldest in list(itertools.islice(self.kept, max(0, len(self.kept) - self.capacity))):
            del self.kept[oldest]
        return matcher

    def _failed(self, matcher: Any) -> EngineLimitError:
        return EngineLimitError(f"{self.name}: the engine gave up: {_reason(matcher)}")


def judge_rows(
    judge: Callable[[bytes, int], tuple[np.ndarray, bool]],
    num_bytes: int,
    tokens: jax.Array | np.ndarray,
    lengths: jax.Array | np.ndarray,
    needed: jax.Array | np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Judge the prefixes `tokens[..., :length]` that are needed, equal ones once; others get zeros.

    Args:
        judge: from a prefix (the bytes of its int32 token ids) and the number of tokens that may follow to a
            mask, `uint8[num_bytes]`, and a verdict.
        num_bytes: of a mask.
        tokens: int32[..., T].
        lengths: int32[...].
        needed: bool[...].
    """
    shape, limit = lengths.shape, tokens.shape[-1]
    counts = np.asarray(lengths).ravel()
    rows = np.asarray(tokens, np.int32).reshape(counts.size, limit)
    allowed = np.zeros((counts.size, num_bytes), np.uint8)
    accepts = np.zeros(counts.size, bool)
    judged: dict[bytes, tuple[np.ndarray, bool]] = {}  # resampling makes many equal
    for row in np.flatnonzero(needed):
        prefix = rows[row, : counts[row]].tobytes()
        if prefix not in judged:
            judged[prefix] = judge(prefix, limit - int(counts[row]))
        allowed[row], accepts[row] = judged[prefix]
    return allowed.reshape(*shape, num_bytes), accepts.reshape(shape)


def digest_of(pieces: Sequence[bytes]) -> bytes:
    """Return a digest of the bytes of all tokens."""
    return hashlib.sha256(b"".join(len(piece).to_bytes(4) + piece for piece in pieces)).digest()


def engine_refuses(text: str) -> str:
    """Say why the engine refuses a grammar over plain bytes, in one line; "" where it takes it.

    Raises:
        ImportError: llguidance is not installed.
    """
    from llguidance import LLMatcher

    problem = LLMatcher.validate_grammar(text, _byte_tokenizer())
    return "" if problem.startswith("WARNING") else _in_one_line(problem)


@functools.cache
def _byte_tokenizer() -> Any:
    return _tokenizer([bytes([byte]) for byte in range(256)])


def _tokenizer(pieces: Sequence[bytes]) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Vocabulary([*pieces, _END], len(pieces))))


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """A vocabulary as the engine asks for it."""

    tokens: list[bytes]
    eos_token_id: int
    bos_token_id: None = None

    def __call__(self, text: bytes) -> list[int]:
        """Encode nothing: the engine needs that only to force tokens, which is off."""
        return []


def shortened(text: str) -> str:
    """Name a grammar in one line."""
    line = " ".join(text.split())
    return f"grammar({line if len(line) <= 60 else line[:57] + '...'!r})"


def _reason(matcher: Any) -> str:
    return _in_one_line(matcher.get_error().split("\n<state>")[0])


def _in_one_line(message: str) -> str:
    """Leave out the excerpts with a caret below; the place is told in numbers before them."""
    lines = [line for line in message.splitlines() if not re.match(r"\s*(\d+ \| |\^+\s*$)", line)]
    return " ".join(" ".join(lines).split())
