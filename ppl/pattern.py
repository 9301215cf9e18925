"""Potential that asks the whole generated text to match a regular expression."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from ponder.automaton import TokenAutomaton, dense_table
from ponder.lifting import lift, token_pieces
from ponder.models.protocols import LanguageModel
from ponder.potentials import Composable

__all__ = ["Regex", "RegexState", "regex"]

_START = b"\n"


def regex(pattern: str) -> Regex:
    r"""Constrain the generated text to match a regular expression from its first byte to its last.

    Φ of a finished trace is 1 if the text before EOS matches in full, else 0. Φ of a prefix is 1 if some
    continuation within the tokens that remain matches, else 0: dead ends and the length limit are exact, at
    the level of tokens. It only steers: the posterior is p(x) restricted to the matches and renormalised.

    The syntax is that of Rust's regex crate: Unicode classes, no look-around and no back-references. Anchors
    are not needed. Special tokens that have no text are never allowed, except EOS.

    Args:
        pattern: the regular expression.

    Raises:
        TypeError: the pattern is no string.
        ValueError: the pattern is empty.

    Example:
        >>> import ponder
        >>> date = ponder.regex(r"\d{4}-\d{2}-\d{2}")
    """
    if not isinstance(pattern, str):
        raise TypeError(f"regex(pattern): expected a str, got {type(pattern).__name__}")
    if not pattern:
        raise ValueError("regex(pattern): expected a pattern, got an empty string")
    return Regex(pattern)


class RegexState(NamedTuple):
    """State of N traces.

    Attributes:
        automaton: int32[N]; state of the automaton, -1 for dead.
        remaining: int32[N]; tokens that may still be generated.
    """

    automaton: jax.Array
    remaining: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Regex(Composable):
    """The potential made by `regex`; it works once bound to a model.

    Attributes:
        pattern: the regular expression.
        automaton: the automaton over the model's tokens; None before `bind`.
        is_eos: bool[V]; which tokens end a trace; None before `bind`.
        max_new_tokens: the length limit; 0 before `bind`.
    """

    pattern: str
    automaton: TokenAutomaton | None = None
    is_eos: jax.Array | None = None
    max_new_tokens: int = 0

    def bind(self, lm: LanguageModel, max_new_tokens: int) -> Regex:
        """Compile the automaton for a model's vocabulary.

        Raises:
            ImportError: the regular expression engine is not installed.
            ValueError: the model has no tokenizer, the pattern is invalid or too large, or no text that
                matches can be written in `max_new_tokens` tokens.
        """
        pieces: list[bytes | None] = [piece or None for piece in token_pieces(lm, repr(self))]
        for token in lm.eos_token_ids:
            pieces[token] = None
        byte_table, initial, finals = _byte_automaton(self.pattern)
        table, token_class = lift(byte_table, pieces)
        automaton = TokenAutomaton.from_table(table, token_class, initial, finals)

        shortest = int(automaton.distance[automaton.initial])
        if shortest > max_new_tokens:
            never = shortest == np.iinfo(np.int32).max
            raise ValueError(
                f"{self!r} cannot be matched within max_new_tokens={max_new_tokens}: "
                + ("no sequence of tokens matches" if never else f"the shortest match has {shortest} tokens")
            )
        is_eos = np.isin(np.arange(lm.vocab_size), lm.eos_token_ids)
        return Regex(self.pattern, automaton, jnp.asarray(is_eos), max_new_tokens)

    def init(self, num_particles: int) -> RegexState:
        """Return the state of empty traces."""
        automaton, _ = self._bound()
        remaining = jnp.full(num_particles, self.max_new_tokens, jnp.int32)
        return RegexState(automaton.init(num_particles), remaining)

    def update(self, state: RegexState, tokens: jax.Array, active: jax.Array) -> RegexState:
        """Append tokens; EOS leaves the text, and so the state, as it is."""
        automaton, is_eos = self._bound()
        reads = active & ~is_eos[tokens]
        return RegexState(
            jnp.where(reads, automaton.advance(state.automaton, tokens), state.automaton),
            state.remaining - reads.astype(jnp.int32),
        )

    def log_prefix(self, state: RegexState) -> jax.Array:
        """Return 0 where the remaining tokens suffice for a match, else -inf."""
        automaton, _ = self._bound()
        return _log(automaton.tokens_needed(state.automaton) <= state.remaining)

    def log_complete(self, state: RegexState) -> jax.Array:
        """Return 0 where the text matches, else -inf."""
        automaton, _ = self._bound()
        return _log(automaton.accepts(state.automaton))

    def token_logits(self, state: RegexState) -> jax.Array:
        """Return 0 for the tokens after which a match is within reach, else -inf; EOS needs a match now."""
        automaton, _ = self._bound()
        # Compared in the narrow type of the table: the largest value, never, stays above every limit.
        dtype = automaton.to_go.dtype
        remaining = jnp.clip(state.remaining, 0, jnp.iinfo(dtype).max).astype(dtype)
        allowed = automaton.tokens_to_go(state.automaton) < remaining[:, None]
        return self._with_eos(state, allowed)

    def complete_logits(self, state: RegexState) -> jax.Array:
        """Return 0 for the tokens after which the text matches, else -inf."""
        automaton, _ = self._bound()
        return self._with_eos(state, automaton.tokens_to_go(state.automaton) == 0)

    def fork(self, state: RegexState, ancestors: jax.Array) -> RegexState:
        """Let row n continue from what was row `ancestors[n]`."""
        return jax.tree.map(lambda leaf: leaf[ancestors], state)

    def _with_eos(self, state: RegexState, allowed: jax.Array) -> jax.Array:
        automaton, is_eos = self._bound()
        accepts = automaton.accepts(state.automaton)
        return _log(jnp.where(is_eos[None, :], accepts[:, None], allowed))

    def _bound(self) -> tuple[TokenAutomaton, jax.Array]:
        if self.automaton is None or self.is_eos is None:
            raise ValueError(
                f"{self!r} is not bound to a model: give it to a program, or call bind(lm, max_new_tokens)"
            )
        return self.automaton, self.is_eos

    def __repr__(self) -> str:
        return f"regex({self.pattern!r})"


register_dataclass(Regex, data_fields=["automaton", "is_eos"], meta_fields=["pattern", "max_new_tokens"])


def _log(condition: jax.Array) -> jax.Array:
    return jnp.where(condition, jnp.float32(0.0), jnp.float32(-jnp.inf))


def _byte_automaton(pattern: str) -> tuple[np.ndarray, int, list[int]]:
    """Compile a pattern: the table `int32[S, 256]`, the initial and the accepting states.

    The engine is given single bytes for a vocabulary and a wrapped pattern. As it stands, `a(bc)?` would
    refuse "abc", `é+` "éé" and `a|ab` "ab": the engine drops a prefix of a match once a shorter text has
    matched. An end anchor cures that. The engine refuses an anchored pattern that can be empty, hence a start
    byte, which is consumed here. The pattern is also compiled as it stands, to refuse what the wrapping would
    hide: `a)(b`, or a start anchor inside the pattern.
    """
    try:
        from outlines_core import Index, Vocabulary
    except ImportError as error:
        raise ImportError("regex(pattern) needs outlines-core: pip install 'ponder-ppl[grammar]'") from error

    end_of_text = 256
    vocabulary = Vocabulary(end_of_text, {bytes([byte]): [byte] for byte in range(256)})
    bare = _without_anchors(pattern)
    try:
        Index(bare, vocabulary)
        index = Index(rf"{_START.decode()}(?:{bare})\z", vocabulary)
    except ValueError as error:
        raise ValueError(
            f"regex({pattern!r}): the engine refuses the pattern: {error} (look-around, back-references, "
            "\\b and inner anchors are not supported; the pattern always has to match the whole text)"
        ) from error
    transitions = index.get_transitions()
    for row in transitions.values():
        row.pop(end_of_text, None)
    table, start, finals = dense_table(transitions, index.get_initial_state(), index.get_final_states(), 256)
    initial = int(table[start, _START[0]])
    if initial < 0:  # nothing matches, as with [^\s\S]: an automaton of one state that is not final
        return np.full((1, 256), -1, np.int32), 0, []
    return table, initial, finals


def _without_anchors(pattern: str) -> str:
    """Drop a leading ^ and a trailing $: a full match implies them, and the engine refuses the first."""
    pattern = pattern.removeprefix("^")
    body = pattern.removesuffix("$")
    escapes = len(body) - len(body.rstrip("\\"))
    return pattern if escapes % 2 else body
