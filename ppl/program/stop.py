"""Stop strings and stop tokens, found however the tokenizer cuts the text."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from ponder.automata.automaton import TokenAutomaton
from ponder.automata.lifting import lift, token_pieces
from ponder.models.protocols import LanguageModel
from ponder.models.pytrees import pytree

__all__ = ["FOUND", "StopAutomaton", "compile_stop", "find_any", "sort_stops"]

FOUND = 1
"""Number of the byte state in which a stop string has been read; 0 is the state of the empty text."""


@pytree
class StopAutomaton:
    r"""Tells when the generated text first contains a stop string, or a stop token.

    A stop string counts also where a token only contains it (".\n\n" for "\n\n") and where it is split
    between tokens. Once stopped, a row stays stopped; give it the state of `init` to watch for the next stop.
    Bytes that the stopping token adds after the stop string are not carried over.

    Attributes:
        automaton: accepts the sequences that contain a stop.
    """

    automaton: TokenAutomaton

    def init(self, num_particles: int) -> jax.Array:
        """Return the state of empty texts, `int32[N]`."""
        return self.automaton.init(num_particles)

    def advance(self, state: jax.Array, tokens: jax.Array) -> jax.Array:
        """Append `tokens[N]` to the texts with `state[N]`."""
        return self.automaton.advance(state, tokens)

    def is_stopped(self, state: jax.Array) -> jax.Array:
        """Tell which texts contain a stop, `bool[N]`."""
        return self.automaton.accepts(state)

    def stops_now(self, state: jax.Array) -> jax.Array:
        """Tell which next tokens would stop each text, `bool[N, V]`; all of them once it is stopped."""
        return self.automaton.tokens_to_go(state) == 0


def compile_stop(
    stop: str | int | Sequence[str | int], lm: LanguageModel, name: str = "stop"
) -> StopAutomaton | None:
    """Compile stop strings and stop token ids for a model's vocabulary.

    Args:
        stop: strings and token ids in any mixture; one alone stands for itself. Special tokens have no text:
            name them by id.
        lm: the model; strings need its tokenizer, ids do not.
        name: the argument's, for error messages.

    Returns:
        The automaton, or None if there is nothing to stop at.

    Raises:
        TypeError: an element of `stop` is neither a string nor an integer.
        ValueError: a string is empty or no Unicode text, an id is outside the vocabulary, or strings
            come with a model that has no tokenizer.
    """
    strings, tokens = sort_stops(stop, lm.vocab_size, name)
    if not strings and not tokens:
        return None
    # Without strings no byte matters, and a model without tokenizer will do.
    pieces = token_pieces(lm, f"{name}={stop!r}") if strings else [b""] * lm.vocab_size
    table, token_class = lift(find_any([text.encode() for text in strings]), pieces)
    if tokens:
        token_class[tokens] = table.shape[1]
        table = np.column_stack([table, np.full(len(table), FOUND, np.int32)])
    return StopAutomaton(TokenAutomaton.from_table(table, token_class, 0, [FOUND]))


def sort_stops(
    stop: str | int | Sequence[str | int], vocab_size: int, name: str
) -> tuple[list[str], list[int]]:
    """Check stops, and sort them into strings and token ids; see `compile_stop` for what it raises."""
    if isinstance(stop, bytes):
        raise TypeError(f"{name}: expected strings and token ids, got {stop!r} (bytes)")
    items = list(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else [stop]
    strings: list[str] = []
    tokens: list[int] = []
    for item in items:
        if isinstance(item, str):
            if not item:
                raise ValueError(f"{name}: expected a string of at least one character, got an empty string")
            try:
                item.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name}: expected Unicode text, got lone surrogates: {error}") from error
            strings.append(item)
        else:
            tokens.append(_token_id(item, vocab_size, name))
    return strings, tokens


def _token_id(item: Any, vocab_size: int, name: str) -> int:
    try:
        token = operator.index(item)  # of arrays without axes too
    except TypeError:
        token = None
    if token is None or isinstance(item, bool):
        raise TypeError(f"{name}: expected strings and token ids, got {item!r} ({type(item).__name__})")
    if not 0 <= token < vocab_size:
        raise ValueError(f"{name}: expected a token id from 0 to {vocab_size - 1}, got {token}")
    return token


def find_any(needles: list[bytes]) -> np.ndarray:
    """Build the Aho-Corasick automaton of some byte strings, `int32[S, 256]`.

    A state stands for the longest end of the text that begins a needle. The needles are short, so the longest
    end is looked up directly, without failure links; bytes of no needle lead back to the empty text.
    """
    beginnings = {needle[:size] for needle in needles for size in range(1, len(needle))}
    states = {b"": 0} | {text: number for number, text in enumerate(sorted(beginnings), start=2)}
    table = np.zeros((len(states) + 1, 256), np.int32)
    table[FOUND] = FOUND
    for (text, state), byte in itertools.product(states.items(), set(b"".join(needles))):
        end = text + bytes([byte])
        if any(end.endswith(needle) for needle in needles):
            table[state, byte] = FOUND
        else:
            table[state, byte] = next(
                states[end[start:]] for start in range(len(end) + 1) if end[start:] in states
            )
    return table
