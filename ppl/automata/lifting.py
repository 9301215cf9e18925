"""From automata over bytes to automata over tokens.

Constraints on text are automata over bytes; a model emits tokens, each a string of bytes. Walking every token
through the byte automaton from every state gives the token automaton, so that it does not matter how the
tokenizer cuts the text: characters split between tokens and delimiters merged into tokens come out right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ponder.automata.automaton import check_table_size, merge_columns
from ponder.models.protocols import LanguageModel

__all__ = ["lift", "token_pieces"]

_CHUNK = 1 << 20
"""Pairs (state, string) walked at a time, which bounds the temporaries."""


def token_pieces(lm: LanguageModel, name: str) -> list[bytes]:
    """Bytes of every token of a model; empty for special and unused ids.

    Args:
        lm: the model; its tokenizer is asked once for each of `lm.vocab_size` ids.
        name: what needs them, for the error message.

    Raises:
        ValueError: the model has no tokenizer.
    """
    if lm.tokenizer is None:
        raise ValueError(f"{name} needs the bytes of the tokens, but lm.tokenizer is None")
    return [lm.tokenizer.token_bytes(token) for token in range(lm.vocab_size)]


def lift(byte_table: np.ndarray, pieces: Sequence[bytes | None]) -> tuple[np.ndarray, np.ndarray]:
    """Walk every token through a byte automaton.

    Args:
        byte_table: int32[S, 256]; the state after each byte, -1 for dead.
        pieces: the bytes of each token; empty bytes stay where they are, None is dead from everywhere.

    Returns:
        A table `int32[S, C]` and the column of each token, `int32[V]`, for `TokenAutomaton.from_table`.
    """
    # Bytes that no state tells apart are one letter, and tokens that spell the same word one column.
    letters, byte_letter = merge_columns(byte_table)
    spelling = byte_letter.astype(np.uint8).tobytes()
    dead_letters = {letter for letter in range(letters.shape[1]) if (letters[:, letter] < 0).all()}
    words: dict[bytes, int] = {}
    token_class = np.zeros(len(pieces), np.int32)  # column 0 is dead
    for token, piece in enumerate(pieces):
        word = None if piece is None else piece.translate(spelling)
        if word is None or not dead_letters.isdisjoint(word):
            continue
        token_class[token] = words.setdefault(word, len(words) + 1)

    check_table_size(len(byte_table), len(pieces), 4 * len(byte_table) * len(words))
    table = np.full((len(byte_table), len(words) + 1), -1, np.int32)
    table[:, 1:] = _walk(letters, list(words))
    return table, token_class


def _walk(letters: np.ndarray, words: list[bytes]) -> np.ndarray:
    """State after each word from each state, `int32[S, W]`."""
    num_states, num_letters = letters.shape
    # Longest first: the words that still have a letter at some position are then a leading slice.
    lengths = np.array([len(word) for word in words], np.int64)
    order = np.argsort(-lengths, kind="stable")
    width = int(lengths.max(initial=0))
    spelled = np.frombuffer(b"".join(words[i].ljust(width, b"\0") for i in order), np.uint8)
    spelled = spelled.reshape(len(words), width)
    # Dead becomes an ordinary last state that leads to itself.
    flat = np.full((num_states + 1, num_letters), num_states, np.int32)
    flat[:-1] = np.where(letters < 0, num_states, letters)
    flat = (flat * num_letters).ravel()  # holds row offsets, which saves a product at every step

    table = np.empty((num_states, len(words)), np.int32)
    step = max(1, _CHUNK // max(1, len(words)))
    for start in range(0, num_states, step):
        rows = np.arange(start, min(start + step, num_states), dtype=np.int32) * num_letters
        offset = np.repeat(rows[:, None], len(words), axis=1)
        for position in range(width):
            active = np.searchsorted(-lengths[order], -position)
            offset[:, :active] = flat[offset[:, :active] + spelled[:active, position]]
        state = offset // num_letters
        table[start : start + step, order] = np.where(state == num_states, -1, state)
    return table
