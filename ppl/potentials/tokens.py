"""Potential that allows only some tokens, or forbids some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ponder.models.pytrees import pytree, static
from ponder.potentials.combining import Bound, Unbound
from ponder.protocols import Context

__all__ = ["AllowedTokens", "Tokens", "TokensState", "tokens"]


class TokensState(NamedTuple):
    """`log_value` float32[N]: 0 while every token was allowed, else -inf."""

    log_value: jax.Array


@pytree
class Tokens(Unbound):
    """What `tokens` returns: token ids, whatever the vocabulary.

    Attributes:
        allow: those that are allowed, None for all.
        forbid: those that are not.
    """

    allow: tuple[int, ...] | None = static()
    forbid: tuple[int, ...] = static()

    def bind(self, context: Context) -> AllowedTokens:
        """Make the table for a vocabulary.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        lm = context.lm
        for name, ids in (("allow", self.allow or ()), ("forbid", self.forbid)):
            wrong = [i for i in ids if not 0 <= i < lm.vocab_size]
            if wrong:
                raise ValueError(f"{name}: expected token ids in [0, {lm.vocab_size}), got {wrong[:8]}")
        allowed = np.full(lm.vocab_size, self.allow is None)
        allowed[list(self.allow or ()) + list(lm.eos_token_ids)] = True
        allowed[list(self.forbid)] = False
        return AllowedTokens(self, jnp.asarray(np.where(allowed, 0.0, -np.inf), jnp.float32))


@pytree
class AllowedTokens(Bound):
    """Φ = 1 while every token is allowed, else 0. EOS is always allowed, unless it is forbidden by name.

    Attributes:
        unbound: the ids.
        log_allowed: float32[V]; 0 or -inf.
    """

    unbound: Tokens
    log_allowed: jax.Array

    def init(self, num_particles: int) -> TokensState:
        """See `Potential`."""
        return TokensState(jnp.zeros(num_particles, jnp.float32))

    def update(self, state: TokensState, tokens: jax.Array, active: jax.Array) -> TokensState:
        """See `Potential`."""
        return TokensState(state.log_value + jnp.where(active, self.log_allowed[tokens], 0.0))

    def log_prefix(self, state: TokensState) -> jax.Array:
        """See `Potential`."""
        return state.log_value

    def log_complete(self, state: TokensState) -> jax.Array:
        """See `Potential`."""
        return state.log_value

    def token_logits(self, state: TokensState) -> jax.Array:
        """See `Potential`."""
        shape = (state.log_value.shape[0], self.log_allowed.shape[0])
        return jnp.broadcast_to(self.log_allowed, shape)

    def complete_logits(self, state: TokensState) -> jax.Array:
        """See `BasePotential`."""
        return self.token_logits(state)


def tokens(*, allow: Iterable[int] | None = None, forbid: Iterable[int] = ()) -> Tokens:
    """Allow only some tokens, or forbid some: a hard constraint on every token of the trace.

    Args:
        allow: token ids; None allows all. EOS stays allowed.
        forbid: token ids that give the trace weight zero; EOS ids may be among them.

    Raises:
        ValueError: neither `allow` nor `forbid` is given, or one of them holds something else than integers.
    """
    allowed = None if allow is None else tuple(_ids("allow", allow))
    forbidden = tuple(_ids("forbid", forbid))
    if allowed is None and not forbidden:
        raise ValueError("tokens: expected allow= or forbid=, got neither")
    return Tokens(allow=allowed, forbid=forbidden)


def _ids(name: str, ids: Iterable[int]) -> list[int]:
    if isinstance(ids, str):
        raise ValueError(f"{name}: expected token ids, got the string {ids!r}; encode it with lm.tokenizer")
    if not isinstance(ids, Iterable):
        raise ValueError(f"{name}: expected token ids, got {ids!r}; put a single one in a list")
    ids = ids.tolist() if isinstance(ids, np.ndarray | jax.Array) else list(ids)
    wrong = [i for i in ids if not isinstance(i, int | np.integer) or isinstance(i, bool)]
    if wrong:
        raise ValueError(f"{name}: expected integers, got {wrong[:8]!r}")
    return [int(i) for i in ids]
