"""Host side of patterns that are not regular: full and partial matches by the regex package.

A partial match tells that a text can still become a match. Walking the tree of the vocabulary with it, byte
by byte, gives the tokens that can follow. Where a pattern forces what comes next, as a back-reference does,
few places are visited; where nearly everything may follow, the walk stops at a bound, and what it has not
come to is allowed for now. So masks may be too wide, never too narrow, and the verdict on a complete text is
exact.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ponder.arguments import shorten
from ponder.potentials.grammar_matching import CAPACITY, digest_of, judge_rows
from ponder.potentials.pattern_syntax import SETS, expanded_size, features, for_prefixes

__all__ = ["MATCH_SECONDS", "MOST_VISITED", "PatternMatchers", "fault", "match"]

MATCH_SECONDS = 5.0
"""Longest match of one text; the engine goes back and forth, so that `(a|aa)+b` can take for ever."""

MOST_VISITED = 2048
"""Most partial matches for one mask, a few microseconds each."""

MOST_PARTS = 10**6
"""Most parts of a pattern: the engine writes repetitions out, `a{1000000000}` in all memory there is."""

_QUICK_SECONDS = 1e-4
_SHALLOW = 8
"""Bytes of a token within which a match cannot become much slower than a quick one."""


@dataclasses.dataclass(frozen=True)
class PatternMatchers:
    """What a pattern says of token prefixes; equal where the pattern and the vocabulary are.

    Attributes:
        pattern: in the syntax of the regex package.
        vocabulary: a digest of the bytes of all tokens.
        pieces: the bytes of each token; empty for tokens that no text has.
        root: the tree of the vocabulary.
        order: the tokens by their bytes; places of the tree are slices of it.
        kept: masks by the text so far, least recently used first.
        lock: held while they are in use.
    """

    pattern: str
    vocabulary: bytes
    pieces: Sequence[bytes] = dataclasses.field(compare=False, repr=False)
    root: _Place = dataclasses.field(compare=False, repr=False)
    order: np.ndarray = dataclasses.field(compare=False, repr=False)
    kept: OrderedDict[bytes, np.ndarray] = dataclasses.field(compare=False, repr=False)
    lock: Any = dataclasses.field(compare=False, repr=False)

    @classmethod
    def compile(cls, pattern: str, pieces: Sequence[bytes]) -> PatternMatchers:
        """Make the matchers of a pattern for a vocabulary.

        Raises:
            ImportError: the regex package is not installed.
            ValueError: it is no pattern; the message names the place and the cause.
        """
        _compile(pattern)
        order = np.array(
            sorted((t for t in range(len(pieces)) if pieces[t]), key=pieces.__getitem__), np.int64
        )
        root = _grow([pieces[token] for token in order], 0, len(order), 0)
        return cls(pattern, digest_of(pieces), pieces, root, order, OrderedDict(), threading.Lock())

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
        """See `grammar_matching.Matchers`; where one token is left, only what completes a match is allowed.

        Raises:
            RuntimeError: a match takes longer than `MATCH_SECONDS`.
        """
        with self.lock:
            return judge_rows(self._judge, self.num_bytes, tokens, lengths, needed)

    def _judge(self, prefix: bytes, remaining: int) -> tuple[np.ndarray, bool]:
        tokens = np.frombuffer(prefix, np.int32).tolist()
        spelt = [self.pieces[token] for token in tokens]
        text = b"".join(spelt)
        accepts = all(spelt) and match(self.pattern, text)
        if not remaining or not all(spelt):
            return np.zeros(self.num_bytes, np.uint8), accepts
        mask = self.kept.get(text)
        if mask is None:
            mask = self.kept[text] = self._mask(text)
        self.kept.move_to_end(text)
        if len(self.kept) > CAPACITY:
            self.kept.popitem(last=False)
        if remaining == 1:
            candidates = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
            if len(candidates) <= MOST_VISITED:
                last = [t for t in candidates.tolist() if match(self.pattern, text + self.pieces[t])]
                mask = self._packed(last)
        return mask, accepts

    def _mask(self, text: bytes) -> np.ndarray:
        """Find the tokens after which a match is still possible, as far as `MOST_VISITED` goes."""
        start = time.perf_counter()
        if not match(self.pattern, text, partial=True):
            return self._packed([])
        # A clock would take longer than most matches; a token later, they are not much slower than this one.
        quick = time.perf_counter() - start < _QUICK_SECONDS
        allowed: list[np.ndarray] = []
        visited, depth, level = 0, 0, [(*_decoded(text), self.root)]
        while level:
            depth += 1
            timed = not quick or depth > _SHALLOW
            deeper = []
            for whole, cut, place in level:
                for byte, inner in place.children.items():
                    visited += 1
                    if visited > MOST_VISITED:
                        allowed.append(self.order[inner.start : inner.stop])
                        continue
                    longer = _extended(whole, cut, byte)
                    if longer and (longer[1] or _matches(self.pattern, longer[0], True, timed)):
                        allowed.append(self.order[inner.start : inner.start + inner.ending])
                        deeper.append((*longer, inner))
            level = deeper
        return self._packed(np.concatenate(allowed) if allowed else [])

    def _packed(self, tokens: Any) -> np.ndarray:
        bits = np.zeros(len(self.pieces), bool)
        bits[np.asarray(tokens, np.int64)] = True
        return np.packbits(bits, bitorder="little")


@dataclasses.dataclass(frozen=True)
class _Place:
    """A place in the tree of a vocabulary: tokens `order[start:stop]` go through it, `ending` end there."""

    start: int
    stop: int
    ending: int
    children: dict[int, _Place]


def _grow(words: list[bytes], start: int, stop: int, depth: int) -> _Place:
    """Grow the tree of the sorted words `[start:stop]`, which share `depth` bytes."""
    ending = start
    while ending < stop and len(words[ending]) == depth:
        ending += 1
    children, at = {}, ending
    while at < stop:
        byte, end = words[at][depth], at + 1
        while end < stop and words[end][depth] == byte:
            end += 1
        children[byte] = _grow(words, at, end, depth + 1)
        at = end
    return _Place(start, stop, ending - start, children)


def match(pattern: str, text: bytes, partial: bool = False) -> bool:
    """Tell whether a text matches in full, or (`partial`) can still become a match.

    Args:
        pattern: a valid one.
        text: in UTF-8; with `partial` the last character may lack bytes.
        partial: whether more may follow.

    Raises:
        RuntimeError: it takes longer than `MATCH_SECONDS`.
    """
    try:
        whole, cut = _decoded(text)
    except UnicodeDecodeError:
        return False
    return (partial or not cut) and _matches(pattern, whole, partial, True)


def _matches(pattern: str, text: str, partial: bool, timed: bool) -> bool:
    engines = _for_prefixes(pattern) if partial else [_compile(pattern)]
    try:
        if not timed:
            return all(engine.fullmatch(text, partial=partial) for engine in engines)
        return all(engine.fullmatch(text, partial=partial, timeout=MATCH_SECONDS) for engine in engines)
    except MemoryError as error:
        raise RuntimeError(
            f"regex({shorten(repr(pattern), 60)}): matching {shorten(repr(text), 60)} takes too much memory"
        ) from error
    except TimeoutError:
        raise RuntimeError(
            f"regex({shorten(repr(pattern), 60)}): matching {shorten(repr(text), 60)} takes more than "
            f"{MATCH_SECONDS:g} seconds; avoid repetitions of repetitions, such as (a|aa)+"
        ) from None


@functools.lru_cache(maxsize=256)
def _for_prefixes(pattern: str) -> list[Any]:
    return [_compile(part) for part in for_prefixes(pattern) if not fault(part)]


def _decoded(text: bytes) -> tuple[str, bytes]:
    """Decode a text; what there is of a last character that lacks bytes comes beside it."""
    try:
        return text.decode(), b""
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            raise
        return text[: error.start].decode(), text[error.start :]


def _extended(whole: str, cut: bytes, byte: int) -> tuple[str, bytes] | None:
    """Append a byte to a decoded text; None where that is no text."""
    if byte < 128 and not cut:
        return whole + chr(byte), b""
    try:
        more, cut = _decoded(cut + bytes([byte]))
    except UnicodeDecodeError:
        return None
    return whole + more, cut


def fault(pattern: str) -> str:
    """Say what is wrong with a pattern for the regex package, and where; "" if nothing is.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        _compile(pattern)
    except (RecursionError, OverflowError, MemoryError):
        return "it is nested too deeply, or repeats too often"
    except ValueError as error:
        return str(error)
    return ""


@functools.lru_cache(maxsize=256)
def _compile(pattern: str) -> Any:
    """Compile a pattern for the regex package: in Python's sense, but for sets within sets."""
    try:
        import regex
    except ImportError as error:
        raise ImportError(
            f"regex({shorten(repr(pattern), 60)}) needs the regex package: pip install 'ponder-ppl[grammar]'"
        ) from error
    if expanded_size(pattern) > MOST_PARTS:
        raise ValueError(f"it repeats too often: written out, it has more than {MOST_PARTS} parts")
    sets = any(feature.kind in SETS for feature in features(pattern))
    try:
        return regex.compile(pattern, regex.V1 if sets else regex.V0)
    except regex.error as error:
        place: int | None = getattr(error, "pos", None)
        near = (
            ""
            if place is None
            else f" at position {place} ({shorten(repr(pattern[place : place + 20]), 30)})"
        )
        raise ValueError(f"{getattr(error, 'msg', error)}{near}") from error
