r"""Which steps say anything: a step of nothing but blanks and its delimiter is no step.

Under a likelihood that pays for right steps a model would else be paid for empty lines, and how much would
depend on how they are cut into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ponder.automata.automaton import TokenAutomaton
from ponder.automata.lifting import lift, token_pieces
from ponder.models.pytrees import pytree
from ponder.protocols import Context

__all__ = ["Blanks", "compile_blanks", "without_excess"]

_BLANKS = [char.encode() for char in map(chr, range(0x3001)) if char.isspace()]
"""Every blank of Unicode, the last of which is U+3000, as `str.strip` has it."""


@pytree
class Blanks:
    """Tells whether steps have visible text, however they are cut into tokens.

    Attributes:
        automaton: accepts blanks and delimiters in any number and order.
    """

    automaton: TokenAutomaton

    def init(self, num_rows: int) -> jax.Array:
        """Return the state of empty steps, `int32[N]`."""
        return self.automaton.init(num_rows)

    def advance(self, state: jax.Array, tokens: jax.Array) -> jax.Array:
        """Append `tokens[N]` to the steps with `state[N]`."""
        return self.automaton.advance(state, tokens)

    def is_blank(self, state: jax.Array) -> jax.Array:
        """Tell which steps have no visible text, `bool[N]`."""
        return self.automaton.accepts(state)

    def trailing(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Count the blank tokens at the end of the first `lengths[n]` of `tokens[N, C]`, `int32[N]`."""
        flat = tokens.reshape(-1)
        blank = self.is_blank(self.advance(self.init(flat.shape[0]), flat)).reshape(tokens.shape)
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        visible = jnp.where((places < lengths[:, None]) & ~blank, places + 1, 0)
        return lengths - visible.max(axis=1, initial=0)


def compile_blanks(context: Context) -> Blanks | None:
    """Fit to a program; None where its unit is a token, which is judged whatever it says.

    Without a tokenizer every token is visible but those that are a delimiter.
    """
    if context.max_unit_tokens is not None and not context.delimiters:
        return None
    lm = context.lm
    texts = [item.encode() for item in context.delimiters if isinstance(item, str)]
    ids = [int(item) for item in context.delimiters if not isinstance(item, str)]
    pieces: list[bytes] = [b"\xff"] * lm.vocab_size if lm.tokenizer is None else token_pieces(lm, "unit")
    for token in ids:
        pieces[token] = b""  # leaves the state as it is
    table, finals = _repeated([*_BLANKS, *texts])
    token_table, token_class = lift(table, pieces)
    with jax.ensure_compile_time_eval():  # a program may be built inside jit
        return Blanks(TokenAutomaton.from_table(token_table, token_class, 0, finals))


def without_excess(text: str, delimiters: Sequence[str | int]) -> str:
    r"""Drop the blanks that follow the delimiter at the end of a text.

    A token may go on beyond a delimiter: "so.\n\n" and "so.\n\n\n" both end the step "so." of the delimiter
    "\n\n". What is judged must not depend on that.
    """
    strings = [item for item in delimiters if isinstance(item, str)]
    for end in range(len(text.rstrip()), len(text)):
        if text[:end].endswith(tuple(strings)):
            return text[:end]
    return text


def _repeated(words: list[bytes]) -> tuple[np.ndarray, list[int]]:
    """The automaton of (w1 | w2 | ...)* over bytes, `int32[S, 256]` with -1 for dead, and its final states.

    A state is a set of beginnings of words: what the bytes since the last whole word may be.
    """
    beginnings = {word[:size] for word in words for size in range(len(word))}
    whole = set(words)
    letters = sorted(set(b"".join(words)))
    start = frozenset([b""])
    numbers, todo, rows = {start: 0}, [start], []
    while todo:
        state = todo.pop(0)
        row = np.full(256, -1, np.int32)
        for letter in letters:
            longer = {text + bytes([letter]) for text in state}
            after = frozenset((longer & beginnings) | ({b""} if longer & whole else set()))
            if after and after not in numbers:
                numbers[after] = len(numbers)
                todo.append(after)
            if after:
                row[letter] = numbers[after]
        rows.append(row)
    return np.stack(rows), [number for state, number in numbers.items() if b"" in state]
