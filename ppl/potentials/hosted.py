"""Potential whose constraint is parsed on the host: masks of tokens, and whether the text may end.

One call a step for all particles. What parses is a matcher: `ponder.grammar` and the host engines of
`ponder.regex` and `ponder.json_schema` each bring theirs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ponder.automata.lifting import token_pieces
from ponder.host.calls import call_host
from ponder.models.pytrees import pytree, static
from ponder.potentials.combining import Bound, Unbound, log_indicator
from ponder.protocols import Context

__all__ = ["HostedPotential", "HostedState", "bind_matchers", "text_pieces"]


class HostMatchers(Protocol):
    """A parser on the host; hashable and compared by value, since compiled code keeps it."""

    def __call__(self, tokens: Any, lengths: Any, needed: Any) -> tuple[np.ndarray, np.ndarray]:
        """Judge the prefixes `tokens[..., :length]` of at most T tokens that are needed; others get zeros.

        Args:
            tokens: int32[..., T].
            lengths: int32[...].
            needed: bool[...].

        Returns:
            `uint8[..., V/8]`, one bit a token, lowest first: which tokens can follow. And `bool[...]`:
            whether the text is accepted as it is.
        """
        ...


class HostedState(NamedTuple):
    """State of N traces.

    Attributes:
        tokens: int32[N, T]; the tokens before EOS, padded with 0.
        lengths: int32[N]; how many there are.
        possible: bool[N]; whether the parser took them all.
        accepts: bool[N]; whether the text is accepted.
        allowed: uint8[N, V/8]; which tokens can follow, one bit each.
    """

    tokens: jax.Array
    lengths: jax.Array
    possible: jax.Array
    accepts: jax.Array
    allowed: jax.Array


@pytree
class HostedPotential(Bound):
    """Membership of the text in a language that the host parses, for one model.

    Attributes:
        unbound: the description of the language.
        matchers: the parser on the host.
        is_eos: bool[V]; which tokens end a trace.
        start: the state of one empty trace.
        name: its repr, where there is more to say than of the description.
    """

    unbound: Unbound
    matchers: HostMatchers = static()
    is_eos: jax.Array
    start: HostedState
    name: str = static(default="")

    def init(self, num_particles: int) -> HostedState:
        """Return the state of empty traces."""
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, num_particles, axis=0), self.start)

    def update(self, state: HostedState, tokens: jax.Array, active: jax.Array) -> HostedState:
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
        return HostedState(
            buffer,
            lengths,
            jnp.where(reads, possible, state.possible),
            jnp.where(reads, accepts, state.accepts),
            jnp.where(reads[:, None], allowed, state.allowed),
        )

    def log_prefix(self, state: HostedState) -> jax.Array:
        """Return 0 where the parser can go on, or need not, else -inf."""
        may_go_on = state.lengths < state.tokens.shape[1]
        return log_indicator(state.possible & (may_go_on | state.accepts))

    def log_complete(self, state: HostedState) -> jax.Array:
        """Return 0 where the text is in the language, else -inf."""
        return log_indicator(state.accepts)

    def token_logits(self, state: HostedState) -> jax.Array:
        """Return 0 for the tokens that can follow, else -inf; EOS needs a text of the language."""
        count = self.is_eos.shape[0]
        allowed = jnp.unpackbits(state.allowed, axis=1, count=count, bitorder="little").astype(bool)
        return log_indicator(jnp.where(self.is_eos[None, :], state.accepts[:, None], allowed))

    def __repr__(self) -> str:
        return self.name or repr(self.unbound)


def text_pieces(context: Context, name: str) -> list[bytes]:
    """Bytes of every token of a program's model; empty for those without text, and for EOS.

    Raises:
        ValueError: the model has no tokenizer; the message begins with `name`.
    """
    pieces = token_pieces(context.lm, name)
    for token in context.lm.eos_token_ids:
        pieces[token] = b""
    return pieces


def bind_matchers(
    unbound: Unbound, matchers: HostMatchers, context: Context, name: str = ""
) -> HostedPotential:
    """Make the potential of a parser.

    Raises:
        ValueError: no text can begin.
    """
    lm, max_new_tokens = context.lm, context.max_new_tokens
    tokens, lengths = np.zeros((1, max_new_tokens), np.int32), np.zeros(1, np.int32)
    allowed, accepts = matchers(tokens, lengths, np.ones(1, bool))
    if not accepts.any() and not allowed.any():
        raise ValueError(
            f"{unbound!r} cannot be generated within max_new_tokens={max_new_tokens}: "
            "the text must not be empty, and no token can begin it"
        )
    start = HostedState(*map(jnp.asarray, (tokens, lengths, np.ones(1, bool), accepts, allowed)))
    is_eos = np.isin(np.arange(lm.vocab_size), lm.eos_token_ids)
    return HostedPotential(unbound, matchers, jnp.asarray(is_eos), start, name)
