"""Where a marker first ends in a trace, however it is cut into tokens, and what is left of its last token."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from ponder.automata.automaton import AutomatonError, TokenAutomaton
from ponder.automata.lifting import lift, token_pieces
from ponder.models.protocols import LanguageModel
from ponder.potentials.automaton_potential import ByteAutomaton
from ponder.program.stop import FOUND, find_any, sort_stops

__all__ = ["Marker", "MarkerTables", "tables_after", "tokens_after"]

_NEVER = np.iinfo(np.int32).max

Marker = tuple[str | int, ...]
"""Strings and token ids, of which the first that is read counts."""


class MarkerTables(NamedTuple):
    """The search for a marker over the tokens of a model: S states, V tokens, R rests of at most K tokens.

    Attributes:
        moves: int32[S, V]; the state after each token, or S + r where the marker ends in it and what the
            token has beyond the marker is rest r. Rest 0 is nothing.
        needed: int32[S]; fewest tokens to the end of the marker.
        rests: int32[R, K], K >= 1; each rest as the fewest tokens that write it, padded with -1.
    """

    moves: jax.Array | np.ndarray
    needed: jax.Array | np.ndarray
    rests: jax.Array | np.ndarray


def tables_after(marker: Marker, lm: LanguageModel, name: str) -> MarkerTables:
    """Make the tables of the search.

    Args:
        marker: strings need the model's tokenizer, ids do not.
        lm: the model.
        name: what needs them, for the error messages.

    Raises:
        ValueError: an id is outside the vocabulary or an EOS, the model has no tokenizer, no tokens write a
            marker, or no tokens write what is left of the token that it ends in.
    """
    needles, ids, pieces = _parts(marker, lm, name)
    byte_table = find_any(needles)
    table, token_class = lift(byte_table, pieces)
    moves = table[:, token_class]
    num_states = len(moves)
    spelling: dict[bytes, int] = {}
    for token, piece in enumerate(pieces):
        if piece and token not in lm.eos_token_ids:
            spelling.setdefault(piece, token)
    number: dict[bytes, int] = {b"": 0}
    rests: list[tuple[int, ...]] = [()]
    for state, token in np.argwhere(moves == FOUND).tolist():
        if state == FOUND:
            continue
        rest = _beyond(byte_table, state, pieces[token])
        if rest not in number:
            tokens = _spell(rest, spelling)
            if tokens is None:
                raise ValueError(
                    f"{name}: the marker can end inside token {token} ({pieces[token]!r}), and no tokens of "
                    f"the model write what is left of it, {rest!r}"
                )
            number[rest] = len(rests)
            rests.append(tokens)
        moves[state, token] = num_states + number[rest]
    moves[:, ids] = num_states
    width = max(1, *map(len, rests))
    padded = np.array([(*rest, *[-1] * (width - len(rest))) for rest in rests], np.int32)
    needed = _fewest(moves)
    if needed[0] == _NEVER:
        raise ValueError(f"{name}: no sequence of tokens writes the marker")
    return MarkerTables(moves, needed, padded)


def tokens_after(
    marker: Marker, language: ByteAutomaton, required: bool, lm: LanguageModel, name: str
) -> TokenAutomaton:
    """Make the automaton of the texts whose part after the marker is in a language.

    Tokens without text may stand before the marker, and not after it.

    Args:
        marker: see `tables_after`.
        language: over the bytes of what follows the marker.
        required: whether texts without the marker are refused; else they are accepted.
        lm: the model.
        name: what needs it, for the error messages.

    Raises:
        AutomatonError: the tables are too large.
        ValueError: as `tables_after`.
    """
    needles, ids, pieces = _parts(marker, lm, name)
    search, (inner, initial, finals) = find_any(needles), language
    size = len(search)
    joined = np.concatenate([np.where(search == FOUND, size + initial, search), _shifted(inner, size)])
    spelt: list[bytes | None] = list(pieces)
    for token in lm.eos_token_ids:
        spelt[token] = None
    try:
        table, token_class = lift(joined.astype(np.int32), spelt)
        empty = {token_class[token] for token, piece in enumerate(spelt) if piece == b""}
        table[size:, list(empty)] = -1
        columns = table[:, token_class[ids]]
        columns[:size] = size + initial
        token_class[ids] = table.shape[1] + np.arange(len(ids))
        accepting = [size + final for final in finals]
        accepting += [] if required else [state for state in range(size) if state != FOUND]
        return TokenAutomaton.from_table(np.column_stack([table, columns]), token_class, 0, accepting)
    except AutomatonError as error:
        raise AutomatonError(f"{name}: {error}") from error


def _parts(marker: Marker, lm: LanguageModel, name: str) -> tuple[list[bytes], list[int], list[bytes]]:
    """The marker's strings as bytes, its token ids, and the bytes of every token, none for EOS."""
    strings, ids = sort_stops(marker, lm.vocab_size, f"{name}: marker")
    wrong = sorted(set(ids) & set(lm.eos_token_ids))
    if wrong:
        raise ValueError(f"{name}: marker: expected tokens that text may follow, got the EOS ids {wrong}")
    if lm.tokenizer is None and not strings:  # no byte matters
        pieces = [b""] * lm.vocab_size
    else:
        pieces = list(token_pieces(lm, name))
    for token in lm.eos_token_ids:
        pieces[token] = b""
    return [text.encode() for text in strings], sorted(set(ids)), pieces


def _shifted(table: np.ndarray, by: int) -> np.ndarray:
    return np.where(table < 0, -1, table + by)


def _beyond(byte_table: np.ndarray, state: int, piece: bytes) -> bytes:
    """What a token has beyond the marker that ends in it."""
    for place, byte in enumerate(piece):
        state = int(byte_table[state, byte])
        if state == FOUND:
            return piece[place + 1 :]
    raise AssertionError("unreachable")


def _spell(text: bytes, spelling: dict[bytes, int]) -> tuple[int, ...] | None:
    """Return the fewest tokens that write some bytes, or None; ties go to the longest first token."""
    best: list[tuple[int, ...] | None] = [None] * (len(text) + 1)
    best[-1] = ()
    for start in reversed(range(len(text))):
        found: list[tuple[int, ...]] = [
            (token, *rest)
            for end in range(len(text), start, -1)
            if (token := spelling.get(text[start:end])) is not None and (rest := best[end]) is not None
        ]
        best[start] = min(found, key=len, default=None)
    return best[0]


def _fewest(moves: np.ndarray) -> np.ndarray:
    """Fewest tokens from each state to the end of the marker, `int32[S]`."""
    num_states = len(moves)
    needed = np.full(num_states, _NEVER, np.int32)
    while True:
        after = np.where(moves >= num_states, 0, needed[np.minimum(moves, num_states - 1)]).min(axis=1)
        found = np.where(after == _NEVER, _NEVER, after + (after != _NEVER)).astype(np.int32)
        if np.array_equal(found, needed):
            return needed
        needed = found
