"""Potential that asks the whole generated text to be in the language of a context-free grammar."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ponder.automata.lifting import token_pieces
from ponder.host.calls import call_host
from ponder.models.pytrees import pytree, static
from ponder.potentials.combining import Bound, Unbound, log_indicator
from ponder.potentials.grammar_matching import Matchers, shortened
from ponder.protocols import Context

__all__ = ["Grammar", "GrammarPotential", "GrammarState", "grammar"]


def grammar(text: str) -> Grammar:
    r"""Constrain the generated text to the language of a context-free grammar.

    Φ of a finished trace is 1 if the text before EOS is in the language, else 0. Φ of a prefix is 1 while the
    parser can still continue it and, once no further token may follow, if it is in the language. It only
    steers. Unlike `regex` it does not know how many tokens a text still needs: a particle may meet the length
    limit with brackets open, and has weight zero then.

    The syntax is llguidance's, close to Lark's: rules in lower case, beginning with `start`; terminals in
    upper case, strings "..." and regular expressions /.../; `%ignore`, `%json {schema}`. The parser reads
    bytes: any way to cut a text into tokens is allowed, also through a character. Special tokens that have no
    text are never allowed, except EOS.

    The language is what llguidance's lexer makes of the rules. A terminal is read as far as it goes, and is
    not cut shorter for the sake of what follows: `start: A "ab"`, `A: /a+/` refuses "aab", where `start: A+
    "b"`, `A: "a"` is fine. Rules have no such limit: write what needs looking ahead as rules.

    The parser runs on the host, once a step for all particles. If it meets one of llguidance's limits (an
    ambiguous grammar on a long text), the run stops with a RuntimeError that has its message; such texts get
    no weight in silence.

    Args:
        text: the grammar.

    Raises:
        TypeError: the text is no string.
        ValueError: the text is empty.

    Example:
        >>> import ponder
        >>> brackets = ponder.grammar('start: ("(" start ")")*')
    """
    if not isinstance(text, str):
        raise TypeError(f"grammar(text): expected a str, got {type(text).__name__}")
    if not text.strip():
        raise ValueError(f'grammar(text): expected rules such as \'start: "a" start | "b"\', got {text!r}')
    return Grammar(text)


class GrammarState(NamedTuple):
    """State of N traces.

    Attributes:
        tokens: int32[N, T]; the tokens before EOS, padded with 0.
        lengths: int32[N]; how many there are.
        possible: bool[N]; whether the parser took them all.
        accepts: bool[N]; whether the text is in the language.
        allowed: uint8[N, V/8]; which tokens can follow, one bit each.
    """

    tokens: jax.Array
    lengths: jax.Array
    possible: jax.Array
    accepts: jax.Array
    allowed: jax.Array


@pytree
class Grammar(Unbound):
    """What `grammar` returns: a grammar, whatever the model's tokens."""

    text: str = static()

    def bind(self, context: Context) -> GrammarPotential:
        """Compile the grammar for a model's vocabulary.

        Raises:
            ImportError: llguidance is not installed.
            ValueError: the model has no tokenizer, llguidance refuses the grammar, or no text can begin.
        """
        lm, max_new_tokens = context.lm, context.max_new_tokens
        pieces = token_pieces(lm, repr(self))
        for token in lm.eos_token_ids:
            pieces[token] = b""
        matchers = Matchers.compile(self.text, pieces)
        tokens, lengths = np.zeros((1, max_new_tokens), np.int32), np.zeros(1, np.int32)
        allowed, accepts = matchers(tokens, lengths, np.ones(1, bool))
        if not accepts.any() and not allowed.any():
            raise ValueError(
                f"{self!r} cannot be generated within max_new_tokens={max_new_tokens}: "
                "the text must not be empty, and no token can begin it"
            )
        start = GrammarState(*map(jnp.asarray, (tokens, lengths, np.ones(1, bool), accepts, allowed)))
        is_eos = np.isin(np.arange(lm.vocab_size), lm.eos_token_ids)
        return GrammarPotential(self, matchers, jnp.asarray(is_eos), start)

    def __repr__(self) -> str:
        return shortened(self.text)


@pytree
class GrammarPotential(Bound):
    """Membership of the text in the language of a grammar, for one model.

    Attributes:
        unbound: the grammar.
        matchers: the parser on the host.
        is_eos: bool[V]; which tokens end a trace.
        start: the state of one empty trace.
    """

    unbound: Grammar
    matchers: Matchers = static()
    is_eos: jax.Array
    start: GrammarState

    def init(self, num_particles: int) -> GrammarState:
        """Return the state of empty traces."""
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, num_particles, axis=0), self.start)

    def update(self, state: GrammarState, tokens: jax.Array, active: jax.Array) -> GrammarState:
        """Append tokens, and ask the parser what can follow; EOS leaves the text as it is."""
        reads = active & ~self.is_eos[tokens]
        rows, limit = jnp.arange(len(tokens), dtype=jnp.int32), state.tokens.shape[1]
        byte = state.allowed[rows, tokens // 8]
        possible = state.possible & (byte >> (tokens % 8).astype(jnp.uint8) & 1).astype(bool)
        column = jnp.where(reads, state.lengths, limit)  # past the end: not written
        buffer = state.tokens.at[rows, column].set(tokens.astype(jnp.int32), mode="drop")
        lengths = state.lengths + reads.astype(jnp.int32)
        shapes = (
            jax.ShapeDtypeStruct(state.allowed.shape, jnp.uint8),
            jax.ShapeDtypeStruct(lengths.shape, jnp.bool_),
        )
        allowed, accepts = call_host(self.matchers, shapes, buffer, lengths, reads & possible)
        return GrammarState(
            buffer,
            lengths,
            jnp.where(reads, possible, state.possible),
            jnp.where(reads, accepts, state.accepts),
            jnp.where(reads[:, None], allowed, state.allowed),
        )

    def log_prefix(self, state: GrammarState) -> jax.Array:
        """Return 0 where the parser can go on, or need not, else -inf."""
        may_go_on = state.lengths < state.tokens.shape[1]
        return log_indicator(state.possible & (may_go_on | state.accepts))

    def log_complete(self, state: GrammarState) -> jax.Array:
        """Return 0 where the text is in the language, else -inf."""
        return log_indicator(state.accepts)

    def token_logits(self, state: GrammarState) -> jax.Array:
        """Return 0 for the tokens that can follow, else -inf; EOS needs a text of the language."""
        count = self.is_eos.shape[0]
        allowed = jnp.unpackbits(state.allowed, axis=1, count=count, bitorder="little").astype(bool)
        return log_indicator(jnp.where(self.is_eos[None, :], state.accepts[:, None], allowed))
