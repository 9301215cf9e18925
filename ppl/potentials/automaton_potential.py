"""Potential that asks the whole generated text to belong to a language, given as an automaton over bytes."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ponder.automata.automaton import AutomatonError, TokenAutomaton
from ponder.automata.lifting import lift, token_pieces
from ponder.models.pytrees import pytree, static
from ponder.potentials.combining import Bound, Unbound, log_indicator
from ponder.program.opening import warn_of_blank
from ponder.protocols import Context

__all__ = [
    "AutomatonPotential",
    "AutomatonState",
    "ByteAutomaton",
    "Language",
    "LanguagePotential",
    "fit_automaton",
]


class ByteAutomaton(NamedTuple):
    """A deterministic automaton over bytes.

    Attributes:
        table: int32[S, 256]; the state after each byte, -1 for dead.
        initial: the state of the empty text.
        finals: the accepting states.
    """

    table: np.ndarray
    initial: int
    finals: list[int]


class Language(Protocol):
    """A set of texts; hashable and compared by value, and its repr is what messages call the potential."""

    def byte_automaton(self) -> ByteAutomaton:
        """Compile the language; `AutomatonError` says why that cannot be done."""
        ...


class AutomatonState(NamedTuple):
    """State of N traces.

    Attributes:
        automaton: int32[N]; state of the automaton, -1 for dead.
        remaining: int32[N]; tokens that may still be generated.
    """

    automaton: jax.Array
    remaining: jax.Array


@pytree
class LanguagePotential(Unbound):
    """What `regex`, `choice` and `json_schema` return: a language, whatever the model's tokens."""

    language: Language = static()

    def bind(self, context: Context) -> AutomatonPotential:
        """Compile the automaton for a model's vocabulary.

        Raises:
            ImportError: the regular expression engine is needed and not installed.
            AutomatonError: the language is invalid or too large.
            ValueError: the model has no tokenizer, or no text can be written in `max_new_tokens` tokens.
        """
        lm = context.lm
        pieces: list[bytes | None] = [piece or None for piece in token_pieces(lm, repr(self))]
        for token in lm.eos_token_ids:
            pieces[token] = None
        byte_table, initial, finals = self.language.byte_automaton()
        if byte_table[initial, ord(" ")] < 0:
            warn_of_blank(repr(self), context)
        try:
            table, token_class = lift(byte_table, pieces)
            automaton = TokenAutomaton.from_table(table, token_class, initial, finals)
        except AutomatonError as error:
            raise AutomatonError(f"{self!r}: {error}") from error
        return fit_automaton(self, automaton, context)

    def __repr__(self) -> str:
        return repr(self.language)


@pytree
class AutomatonPotential(Bound):
    """Membership of the text in a language, for one model.

    Φ of a finished trace is 1 if the text before EOS is in the language, else 0. Φ of a prefix is 1 if some
    continuation within the tokens that remain is, else 0.

    Attributes:
        unbound: the texts that are accepted.
        automaton: the automaton over the model's tokens.
        is_eos: bool[V]; which tokens end a trace.
        max_new_tokens: the length limit.
    """

    unbound: Unbound
    automaton: TokenAutomaton
    is_eos: jax.Array
    max_new_tokens: int = static()

    def init(self, num_particles: int) -> AutomatonState:
        """Return the state of empty traces."""
        remaining = jnp.full(num_particles, self.max_new_tokens, jnp.int32)
        return AutomatonState(self.automaton.init(num_particles), remaining)

    def update(self, state: AutomatonState, tokens: jax.Array, active: jax.Array) -> AutomatonState:
        """Append tokens; EOS leaves the text, and so the state, as it is."""
        reads = active & ~self.is_eos[tokens]
        return AutomatonState(
            jnp.where(reads, self.automaton.advance(state.automaton, tokens), state.automaton),
            state.remaining - reads.astype(jnp.int32),
        )

    def log_prefix(self, state: AutomatonState) -> jax.Array:
        """Return 0 where the remaining tokens suffice for a match, else -inf."""
        return log_indicator(self.automaton.tokens_needed(state.automaton) <= state.remaining)

    def log_complete(self, state: AutomatonState) -> jax.Array:
        """Return 0 where the text matches, else -inf."""
        return log_indicator(self.automaton.accepts(state.automaton))

    def token_logits(self, state: AutomatonState) -> jax.Array:
        """Return 0 for the tokens after which a match is within reach, else -inf; EOS needs a match now."""
        # Compared in the narrow type of the table: the largest value, never, stays above every limit.
        dtype = self.automaton.to_go.dtype
        remaining = jnp.clip(state.remaining, 0, jnp.iinfo(dtype).max).astype(dtype)
        allowed = self.automaton.tokens_to_go(state.automaton) < remaining[:, None]
        return self._with_eos(state, allowed)

    def complete_logits(self, state: AutomatonState) -> jax.Array:
        """Return 0 for the tokens after which the text matches, else -inf."""
        return self._with_eos(state, self.automaton.tokens_to_go(state.automaton) == 0)

    def __repr__(self) -> str:
        return self.unbound.on_engine("automaton")

    def _with_eos(self, state: AutomatonState, allowed: jax.Array) -> jax.Array:
        accepts = self.automaton.accepts(state.automaton)
        return log_indicator(jnp.where(self.is_eos[None, :], accepts[:, None], allowed))


def fit_automaton(unbound: Unbound, automaton: TokenAutomaton, context: Context) -> AutomatonPotential:
    """Make the potential of an automaton over a model's tokens; `unbound` is what it was made of.

    Raises:
        ValueError: nothing that it accepts can be written in `max_new_tokens` tokens.
    """
    shortest, limit = int(automaton.distance[automaton.initial]), context.max_new_tokens
    if shortest > limit:
        never = shortest == np.iinfo(np.int32).max
        raise ValueError(
            f"{unbound!r} cannot be matched within max_new_tokens={limit}: "
            + ("no sequence of tokens matches" if never else f"the shortest match has {shortest} tokens")
        )
    is_eos = np.isin(np.arange(context.lm.vocab_size), context.lm.eos_token_ids)
    return AutomatonPotential(unbound, automaton, jnp.asarray(is_eos), limit)
