"""Potentials made of others (product, tempering), of the prior (power), and of sets of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ponder.bases import BasePotential, UnboundPotential, as_potential
from ponder.models.pytrees import pytree, static
from ponder.protocols import Context, Potential, PotentialState

__all__ = [
    "Composable",
    "Power",
    "Product",
    "Tempered",
    "Tokens",
    "Unbound",
    "log_indicator",
    "power",
    "tokens",
]


class Operators:
    """The operators `a * b` (product) and `a ** s` (tempering)."""

    def __mul__(self, other: Any) -> Product:
        """Return the product: log potentials add."""
        return Product(_factors(self) + _factors(other)) if _is_factor(other) else NotImplemented

    def __rmul__(self, other: Any) -> Product:
        """Return the product with a potential that has no operators of its own."""
        return Product(_factors(other) + _factors(self)) if _is_factor(other) else NotImplemented

    def __pow__(self, exponent: float) -> Tempered:
        """Return Φ^s: the log potential times s."""
        if not isinstance(exponent, int | float | np.generic | np.ndarray | jax.Array):
            return NotImplemented
        return Tempered(_factor(self), exponent)


class Composable(Operators, BasePotential):
    """Base class of potentials: the whole contract with its defaults, and the operators `*` and `**`."""


class Unbound(Operators, UnboundPotential):
    """Base class of what `bind` makes a potential of, with the operators `*` and `**`."""


def log_indicator(condition: jax.Array) -> jax.Array:
    """Return 0 where a condition holds, else -inf: the log of a hard constraint."""
    return jnp.where(condition, jnp.float32(0.0), jnp.float32(-jnp.inf))


def _is_factor(value: Any) -> bool:
    return isinstance(value, Potential | UnboundPotential) and not isinstance(value, type)


def _factors(potential: Any) -> tuple[Any, ...]:
    return potential.potentials if isinstance(potential, Product) else (_factor(potential),)


def _factor(potential: Any) -> Any:
    """A potential with the whole contract; one that is not bound yet stays as it is."""
    return potential if isinstance(potential, UnboundPotential) else as_potential(potential)


@pytree
class Product(Composable):
    """The product of potentials; its `token_logits` are the sum over the factors that offer them.

    A factor without `token_logits` is then weighed after the draw, so the proposal stays proper. Its factors
    are potentials once it is bound; until then they may be such as have to be bound.
    """

    potentials: tuple[Any, ...]

    @property
    def num_reward_models(self) -> int:
        """Those of the factors."""
        return sum(p.num_reward_models for p in self.potentials)

    def bind(self, context: Context) -> Product:
        """Bind every factor."""
        return Product(tuple(p.bind(context) for p in self.potentials))

    def init(self, num_particles: int) -> PotentialState:
        """See `Potential`."""
        return tuple(p.init(num_particles) for p in self.potentials)

    def observe(self, state: PotentialState, log_prior: jax.Array) -> PotentialState:
        """Show the prior to the factors that ask for it."""
        return tuple(p.observe(s, log_prior) for p, s in zip(self.potentials, state, strict=True))

    def update(self, state: PotentialState, tokens: jax.Array, active: jax.Array) -> PotentialState:
        """See `Potential`."""
        return tuple(p.update(s, tokens, active) for p, s in zip(self.potentials, state, strict=True))

    def commit(self, state: PotentialState, rows: jax.Array) -> PotentialState:
        """See `Potential`."""
        return tuple(p.commit(s, rows) for p, s in zip(self.potentials, state, strict=True))

    def log_prefix(self, state: PotentialState) -> jax.Array:
        """See `Potential`."""
        return _total([p.log_prefix(s) for p, s in zip(self.potentials, state, strict=True)])

    def log_complete(self, state: PotentialState) -> jax.Array:
        """See `Potential`."""
        return _total([p.log_complete(s) for p, s in zip(self.potentials, state, strict=True)])

    def judge(self, state: PotentialState, ends: jax.Array) -> jax.Array:
        """See `Potential`."""
        return _total([p.judge(s, ends) for p, s in zip(self.potentials, state, strict=True)])

    def judge_prefix(self, state: PotentialState, rows: jax.Array) -> jax.Array:
        """See `Potential`."""
        return _total([p.judge_prefix(s, rows) for p, s in zip(self.potentials, state, strict=True)])

    def token_logits(self, state: PotentialState) -> jax.Array | None:
        """See `Potential`; None where no factor offers any."""
        found = [p.token_logits(s) for p, s in zip(self.potentials, state, strict=True)]
        found = [x for x in found if x is not None]
        return _total(found) if found else None

    def complete_logits(self, state: PotentialState) -> jax.Array | None:
        """See `Potential`; None unless every factor that guides tokens offers it."""
        found = []
        for p, s in zip(self.potentials, state, strict=True):
            logits = p.complete_logits(s)
            if logits is None and p.token_logits(s) is not None:
                return None
            found += [] if logits is None else [logits]
        return _total(found) if found else None

    def fork(self, state: PotentialState, ancestors: jax.Array) -> PotentialState:
        """See `Potential`."""
        return tuple(p.fork(s, ancestors) for p, s in zip(self.potentials, state, strict=True))


def _total(terms: list[jax.Array]) -> jax.Array:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


@pytree
class Tempered(Composable):
    """Φ^s; `exponent` s may be a traced scalar. 0 · log 0 counts as 0, that is Φ^0 = 1 everywhere."""

    potential: Any
    exponent: Any

    def __post_init__(self) -> None:
        """Refuse an exponent that would turn evidence upside down, or make NaN of log 1 = 0."""
        concrete = isinstance(self.exponent, jax.Array) and not isinstance(self.exponent, Tracer)
        if concrete or isinstance(self.exponent, int | float | np.generic | np.ndarray):
            exponent = np.asarray(self.exponent)
            if not np.all((exponent >= 0) & (exponent < np.inf)):
                raise ValueError(f"exponent: expected a finite number >= 0, got {self.exponent!r}")

    @property
    def num_reward_models(self) -> int:
        """Those of the potential underneath."""
        return self.potential.num_reward_models

    def bind(self, context: Context) -> Tempered:
        """Bind the potential underneath."""
        return Tempered(self.potential.bind(context), jnp.asarray(self.exponent, jnp.float32))

    def init(self, num_particles: int) -> PotentialState:
        """See `Potential`."""
        return self.potential.init(num_particles)

    def observe(self, state: PotentialState, log_prior: jax.Array) -> PotentialState:
        """Show the prior to the potential underneath."""
        return self.potential.observe(state, log_prior)

    def update(self, state: PotentialState, tokens: jax.Array, active: jax.Array) -> PotentialState:
        """See `Potential`."""
        return self.potential.update(state, tokens, active)

    def commit(self, state: PotentialState, rows: jax.Array) -> PotentialState:
        """See `Potential`."""
        return self.potential.commit(state, rows)

    def log_prefix(self, state: PotentialState) -> jax.Array:
        """See `Potential`."""
        return self._temper(self.potential.log_prefix(state))

    def log_complete(self, state: PotentialState) -> jax.Array:
        """See `Potential`."""
        return self._temper(self.potential.log_complete(state))

    def judge(self, state: PotentialState, ends: jax.Array) -> jax.Array:
        """See `Potential`."""
        return self._temper(self.potential.judge(state, ends))

    def judge_prefix(self, state: PotentialState, rows: jax.Array) -> jax.Array:
        """See `Potential`."""
        return self._temper(self.potential.judge_prefix(state, rows))

    def token_logits(self, state: PotentialState) -> jax.Array | None:
        """See `Potential`."""
        logits = self.potential.token_logits(state)
        return None if logits is None else self._temper(logits)

    def complete_logits(self, state: PotentialState) -> jax.Array | None:
        """See `Potential`."""
        logits = self.potential.complete_logits(state)
        return None if logits is None else self._temper(logits)

    def fork(self, state: PotentialState, ancestors: jax.Array) -> PotentialState:
        """See `Potential`."""
        return self.potential.fork(state, ancestors)

    def _temper(self, log_value: jax.Array) -> jax.Array:
        return jnp.where(self.exponent == 0, 0.0, log_value * self.exponent)


class TokensState(NamedTuple):
    """`log_value` float32[N]: 0 while every token was allowed, else -inf."""

    log_value: jax.Array


@dataclasses.dataclass(frozen=True)
class Tokens(Unbound):
    """What `tokens` returns: which token ids are allowed, whatever the vocabulary."""

    allow: tuple[int, ...] | None
    forbid: tuple[int, ...]

    def bind(self, context: Context) -> AllowedTokens:
        """Make the table for a vocabulary; an id outside it is a ValueError."""
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
class AllowedTokens(Composable):
    """Φ = 1 while every token is allowed, else 0. EOS is always allowed, unless it is forbidden by name.

    Attributes:
        tokens: the ids, whatever the vocabulary.
        log_allowed: float32[V]; 0 or -inf.
    """

    tokens: Tokens = static()
    log_allowed: jax.Array

    def bind(self, context: Context) -> AllowedTokens:
        """Fit the description anew, to another program."""
        return self.tokens.bind(context)

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
        ValueError: neither is given, or an id is not an integer.
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


class PowerState(NamedTuple):
    """`log_prior` float32[N] of the trace; `next_log_prior` float32[N, V] between `observe` and `update`."""

    log_prior: jax.Array
    next_log_prior: jax.Array | None


@pytree
class Power(Composable):
    """Φ(x) = p(x)^(α-1), so that the target is p^α over whole traces.

    This is not sampling at temperature 1/α: the locally optimal proposal is the tempered next token, and the
    weights Σ_v p(v|x)^α account for how much of p^α lies ahead (Karan and Du, 2025, arXiv:2510.14901).
    """

    alpha: Any

    def init(self, num_particles: int) -> PowerState:
        """See `Potential`."""
        return PowerState(jnp.zeros(num_particles, jnp.float32), None)

    def observe(self, state: PowerState, log_prior: jax.Array) -> PowerState:
        """Keep the prior of the next token until `update` knows which one it is."""
        return state._replace(next_log_prior=log_prior)

    def update(self, state: PowerState, tokens: jax.Array, active: jax.Array) -> PowerState:
        """See `Potential`."""
        step = jnp.take_along_axis(self._next(state), tokens[:, None], axis=1)[:, 0]
        return PowerState(state.log_prior + jnp.where(active, step, 0.0), None)

    def log_prefix(self, state: PowerState) -> jax.Array:
        """See `Potential`."""
        return self._raise(state.log_prior)

    def log_complete(self, state: PowerState) -> jax.Array:
        """See `Potential`."""
        return self._raise(state.log_prior)

    def token_logits(self, state: PowerState) -> jax.Array:
        """See `Potential`."""
        return self._raise(self._next(state))

    def complete_logits(self, state: PowerState) -> jax.Array:
        """See `Potential`."""
        return self.token_logits(state)

    def _raise(self, log_prior: jax.Array) -> jax.Array:
        # Where p = 0 the target is 0, for α < 1 too: there Φ is infinite, but no trace goes that way.
        return jnp.where(log_prior == -jnp.inf, -jnp.inf, (self.alpha - 1.0) * log_prior)

    def _next(self, state: PowerState) -> jax.Array:
        if state.next_log_prior is None:
            raise ValueError("power: the prior was not observed; call observe(state, log_prior) every step")
        return state.next_log_prior


def power(alpha: float) -> Power:
    """Target p(x)^alpha, globally over traces rather than token by token.

    Args:
        alpha: > 0; above 1 sharpens, below 1 flattens, 1 changes nothing. May be a traced scalar.
    """
    traced = isinstance(alpha, Tracer)
    number = isinstance(alpha, int | float | np.generic | np.ndarray | jax.Array)
    if not traced and not (number and np.all((np.asarray(alpha) > 0) & (np.asarray(alpha) < np.inf))):
        raise ValueError(f"alpha: expected a finite number > 0, got {alpha!r}")
    return Power(jnp.asarray(alpha, jnp.float32))
