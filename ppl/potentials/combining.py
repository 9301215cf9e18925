"""Potentials made of others, by product and tempering, and the base classes that have the operators."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ponder.bases import BasePotential, Evidence, UnboundPotential, as_evidence, log_values
from ponder.models.pytrees import pytree
from ponder.protocols import Context, Potential, PotentialState

__all__ = [
    "Bound",
    "Composable",
    "Product",
    "Tempered",
    "Unbound",
    "UnboundProduct",
    "UnboundTempered",
    "log_indicator",
]


class Operators:
    """The operators `a * b` (product) and `a ** s` (tempering); the result is unbound where a factor is."""

    def __mul__(self, other: Any) -> Product | UnboundProduct:
        """Return the product: log potentials add."""
        return _product(self, other) if _is_factor(other) else NotImplemented

    def __rmul__(self, other: Any) -> Product | UnboundProduct:
        """Return the product with a potential that has no operators of its own."""
        return _product(other, self) if _is_factor(other) else NotImplemented

    def __pow__(self, exponent: float | jax.Array) -> Tempered | UnboundTempered:
        """Return Φ^s: the log potential times s.

        Raises:
            ValueError: s is negative, which would turn evidence upside down, or not finite.
        """
        if not isinstance(exponent, int | float | np.generic | np.ndarray | jax.Array):
            return NotImplemented
        if not isinstance(exponent, Tracer) and not np.all(
            (np.asarray(exponent) >= 0) & np.isfinite(exponent)
        ):
            raise ValueError(f"exponent: expected a finite number >= 0, got {exponent!r}")
        power = jnp.asarray(exponent, jnp.float32)
        potential = as_evidence(self)
        if isinstance(potential, UnboundPotential):
            return UnboundTempered(potential, power)
        return Tempered(potential, power)


class Composable(Operators, BasePotential):
    """Base class of potentials: the whole contract with its defaults, and the operators `*` and `**`."""


class Unbound(Operators, UnboundPotential):
    """Base class of descriptions, of which `bind` makes a potential; with the operators `*` and `**`."""

    def on_engine(self, engine: str) -> str:
        """Return the repr of the bound potential; an engine is named where there are several."""
        del engine
        return repr(self)


class Bound(Composable):
    """Base class of what a description becomes for one program.

    Attributes:
        unbound: the description; where it is bound to another program, it starts from that.
    """

    unbound: Unbound

    def bind(self, context: Context) -> BasePotential:
        """Bind the description to another program."""
        return self.unbound.bind(context)

    def __repr__(self) -> str:
        return repr(self.unbound)


def log_indicator(condition: jax.Array) -> jax.Array:
    """Return 0 where a condition holds, else -inf: the log of a hard constraint."""
    return jnp.where(condition, jnp.float32(0.0), jnp.float32(-jnp.inf))


def _is_factor(value: Any) -> bool:
    return isinstance(value, Potential | UnboundPotential) and not isinstance(value, type)


def _product(*potentials: Any) -> Product | UnboundProduct:
    """Multiply; the factors of a product become factors of the new one."""
    factors: list[Evidence] = []
    for potential in potentials:
        nested = isinstance(potential, Product | UnboundProduct)
        factors += potential.potentials if nested else [as_evidence(potential)]
    bound = [factor for factor in factors if isinstance(factor, BasePotential)]
    return Product(tuple(bound)) if len(bound) == len(factors) else UnboundProduct(tuple(factors))


@pytree
class UnboundProduct(Unbound):
    """A product with factors that have to be bound."""

    potentials: tuple[Evidence, ...]

    def bind(self, context: Context) -> Product:
        """Bind every factor."""
        return Product(tuple(p.bind(context) for p in self.potentials))


@pytree
class UnboundTempered(Unbound):
    """Φ^s of a potential that has to be bound; `exponent` is float32[], and may be traced."""

    potential: UnboundPotential
    exponent: jax.Array

    def bind(self, context: Context) -> Tempered:
        """Bind the potential underneath."""
        return Tempered(self.potential.bind(context), self.exponent)


@pytree
class Product(Composable):
    """The product of potentials; its `token_logits` are the sum over the factors that offer them.

    A factor without `token_logits` is then weighed after the draw, so the proposal stays proper.
    """

    potentials: tuple[BasePotential, ...]

    @property
    def num_reward_models(self) -> int:
        """Those of the factors."""
        return sum(p.num_reward_models for p in self.potentials)

    @property
    def withholds(self) -> bool:
        """Whether some factor is a terminal score."""
        return any(p.withholds for p in self.potentials)

    def bind(self, context: Context) -> Product:
        """Bind every factor."""
        return Product(tuple(p.bind(context) for p in self.potentials))

    def init(self, num_particles: int) -> PotentialState:
        """See `Potential`."""
        return tuple(p.init(num_particles) for p in self.potentials)

    def observe(self, state: PotentialState, log_prior: jax.Array) -> PotentialState:
        """See `BasePotential`."""
        return tuple(p.observe(s, log_prior) for p, s in zip(self.potentials, state, strict=True))

    def update(self, state: PotentialState, tokens: jax.Array, active: jax.Array) -> PotentialState:
        """See `Potential`."""
        return tuple(p.update(s, tokens, active) for p, s in zip(self.potentials, state, strict=True))

    def commit(self, state: PotentialState, rows: jax.Array) -> PotentialState:
        """See `BasePotential`."""
        return tuple(p.commit(s, rows) for p, s in zip(self.potentials, state, strict=True))

    def log_prefix(self, state: PotentialState) -> jax.Array:
        """See `Potential`."""
        return _total([p.log_prefix(s) for p, s in zip(self.potentials, state, strict=True)])

    def log_complete(self, state: PotentialState) -> jax.Array:
        """See `Potential`."""
        return _total([p.log_complete(s) for p, s in zip(self.potentials, state, strict=True)])

    def judge(self, state: PotentialState, ends: jax.Array) -> jax.Array:
        """See `BasePotential`."""
        return _total([p.judge(s, ends) for p, s in zip(self.potentials, state, strict=True)])

    def judge_apart(self, state: PotentialState, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `BasePotential`."""
        parts = [p.judge_apart(s, ends) for p, s in zip(self.potentials, state, strict=True)]
        at_once, withheld = zip(*parts, strict=True)
        return _total(at_once), _total(withheld)

    def judge_prefix(self, state: PotentialState, rows: jax.Array) -> jax.Array:
        """See `BasePotential`."""
        return _total([p.judge_prefix(s, rows) for p, s in zip(self.potentials, state, strict=True)])

    def token_logits(self, state: PotentialState) -> jax.Array | None:
        """See `Potential`; None where no factor offers any."""
        found = [p.token_logits(s) for p, s in zip(self.potentials, state, strict=True)]
        found = [x for x in found if x is not None]
        return _total(found) if found else None

    def complete_logits(self, state: PotentialState) -> jax.Array | None:
        """See `BasePotential`; None unless every factor that guides tokens offers it."""
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


def _total(terms: Sequence[jax.Array]) -> jax.Array:
    """Add up what the factors say, each checked: a sum would hide what is wrong with one."""
    values = [log_values(f"potential: factor {i + 1} of {len(terms)}", x) for i, x in enumerate(terms)]
    shapes = {value.shape for value in values}
    if len(shapes) > 1:
        raise ValueError(f"potential: expected factors with values of one shape, got {sorted(shapes)}")
    return functools.reduce(jnp.add, values)


@pytree
class Tempered(Composable):
    """Φ^s; `exponent` is s, float32[], and may be traced. 0 · log 0 counts as 0: Φ^0 = 1 everywhere."""

    potential: BasePotential
    exponent: jax.Array

    @property
    def num_reward_models(self) -> int:
        """Those of the potential underneath."""
        return self.potential.num_reward_models

    @property
    def withholds(self) -> bool:
        """Whether the potential underneath does."""
        return self.potential.withholds

    def bind(self, context: Context) -> Tempered:
        """Bind the potential underneath."""
        return Tempered(self.potential.bind(context), self.exponent)

    def init(self, num_particles: int) -> PotentialState:
        """See `Potential`."""
        return self.potential.init(num_particles)

    def observe(self, state: PotentialState, log_prior: jax.Array) -> PotentialState:
        """See `BasePotential`."""
        return self.potential.observe(state, log_prior)

    def update(self, state: PotentialState, tokens: jax.Array, active: jax.Array) -> PotentialState:
        """See `Potential`."""
        return self.potential.update(state, tokens, active)

    def commit(self, state: PotentialState, rows: jax.Array) -> PotentialState:
        """See `BasePotential`."""
        return self.potential.commit(state, rows)

    def log_prefix(self, state: PotentialState) -> jax.Array:
        """See `Potential`."""
        return self._temper(self.potential.log_prefix(state))

    def log_complete(self, state: PotentialState) -> jax.Array:
        """See `Potential`."""
        return self._temper(self.potential.log_complete(state))

    def judge(self, state: PotentialState, ends: jax.Array) -> jax.Array:
        """See `BasePotential`."""
        return self._temper(self.potential.judge(state, ends))

    def judge_apart(self, state: PotentialState, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `BasePotential`."""
        at_once, withheld = self.potential.judge_apart(state, ends)
        return self._temper(at_once), self._temper(withheld)

    def judge_prefix(self, state: PotentialState, rows: jax.Array) -> jax.Array:
        """See `BasePotential`."""
        return self._temper(self.potential.judge_prefix(state, rows))

    def token_logits(self, state: PotentialState) -> jax.Array | None:
        """See `Potential`."""
        logits = self.potential.token_logits(state)
        return None if logits is None else self._temper(logits)

    def complete_logits(self, state: PotentialState) -> jax.Array | None:
        """See `BasePotential`."""
        logits = self.potential.complete_logits(state)
        return None if logits is None else self._temper(logits)

    def fork(self, state: PotentialState, ancestors: jax.Array) -> PotentialState:
        """See `Potential`."""
        return self.potential.fork(state, ancestors)

    def _temper(self, log_value: jax.Array) -> jax.Array:
        return jnp.where(self.exponent == 0, 0.0, log_values("potential", log_value) * self.exponent)
