"""Objects of others, which follow a protocol without inheriting: wrapped once, where they come in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ponder.arguments import check_count, lacking
from ponder.bases import BasePotential, BaseProgram, Evidence, UnboundPotential, log_values
from ponder.models.protocols import Tokenizer
from ponder.models.pytrees import pytree, static
from ponder.protocols import Context, Move, Potential, PotentialState, State, StateSpaceModel, Traces

__all__ = ["ForeignPotential", "ForeignProgram", "as_evidence", "as_potential", "as_program"]


@pytree
class ForeignPotential(BasePotential):
    """A `Potential` that does not inherit from `BasePotential`, with what it has of the rest.

    Where the object is a pytree, this is one with its leaves; any other object is itself the leaf, and a
    constant of compiled programs.
    """

    potential: Any

    @property
    def num_reward_models(self) -> int:
        """See `BasePotential`."""
        return self._own("num_reward_models")

    @property
    def withholds(self) -> bool:
        """See `BasePotential`; by default not, since a `Potential` has a `log_prefix` of its own."""
        return getattr(self.potential, "withholds", False)

    def init(self, num_particles: int) -> PotentialState:
        """See `Potential`."""
        return self.potential.init(num_particles)

    def update(self, state: PotentialState, tokens: jax.Array, active: jax.Array) -> PotentialState:
        """See `Potential`."""
        return self.potential.update(state, tokens, active)

    def log_prefix(self, state: PotentialState) -> jax.Array:
        """See `Potential`."""
        return self.potential.log_prefix(state)

    def log_complete(self, state: PotentialState) -> jax.Array:
        """See `Potential`."""
        return self.potential.log_complete(state)

    def token_logits(self, state: PotentialState) -> jax.Array | None:
        """See `Potential`."""
        return self.potential.token_logits(state)

    def fork(self, state: PotentialState, ancestors: jax.Array) -> PotentialState:
        """See `Potential`."""
        return self.potential.fork(state, ancestors)

    def bind(self, context: Context) -> BasePotential:
        """See `BasePotential`."""
        bind = getattr(self.potential, "bind", None)
        return self if bind is None else as_potential(bind(context))

    def observe(self, state: PotentialState, log_prior: jax.Array) -> PotentialState:
        """See `BasePotential`."""
        return self._own("observe")(state, log_prior)

    def complete_logits(self, state: PotentialState) -> jax.Array | None:
        """See `BasePotential`."""
        return self._own("complete_logits")(state)

    def judge(self, state: PotentialState, ends: jax.Array) -> jax.Array:
        """See `BasePotential`."""
        return self._own("judge")(state, ends)

    def judge_apart(self, state: PotentialState, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `BasePotential`."""
        return self._own("judge_apart")(state, ends)

    def judge_prefix(self, state: PotentialState, rows: jax.Array) -> jax.Array:
        """See `BasePotential`."""
        return self._own("judge_prefix")(state, rows)

    def commit(self, state: PotentialState, rows: jax.Array) -> PotentialState:
        """See `BasePotential`."""
        return self._own("commit")(state, rows)

    def _own(self, name: str) -> Any:
        """The object's own attribute, or the default."""
        return getattr(self.potential, name) if hasattr(self.potential, name) else getattr(super(), name)

    def __repr__(self) -> str:
        return repr(self.potential)


def as_potential(potential: Any) -> BasePotential:
    """Return a potential with the whole contract; a foreign one is wrapped.

    Raises:
        TypeError: it lacks a method of `Potential`, or is a class.
    """
    if isinstance(potential, BasePotential):
        return potential
    if isinstance(potential, type) or not isinstance(potential, Potential):
        raise TypeError("potential: expected a ponder.Potential or None, " + lacking(potential, Potential))
    return ForeignPotential(potential)


def as_evidence(potential: Any) -> Evidence:
    """Return a potential with the whole contract; one that has to be bound stays as it is.

    Raises:
        TypeError: it is neither.
    """
    return potential if isinstance(potential, UnboundPotential) else as_potential(potential)


@pytree
class ForeignProgram(BaseProgram):
    """A `StateSpaceModel` that does not inherit from `BaseProgram`, with what it has of the rest."""

    model: Any
    num_prompts: int | None = static()
    num_reward_models: int = static()
    tokenizer: Tokenizer | None = static()
    cut: tuple[str | int, ...] = static()
    tells_traces: bool = static()
    joins_pasts: bool = static()
    withholds: bool = static()

    @property
    def num_steps(self) -> int:
        """See `StateSpaceModel`."""
        return self.model.num_steps

    def init(self, key: jax.Array, num_particles: int) -> State:
        """See `StateSpaceModel`."""
        state = self.model.init(key, num_particles)
        _check_rows("is_done", self.model.is_done(state), num_particles * (self.num_prompts or 1))
        return state

    def propagate(
        self, key: jax.Array, state: State, forced: tuple[jax.Array, Move] | None = None
    ) -> tuple[State, Move, jax.Array]:
        """See `StateSpaceModel`."""
        after, move, log_weight = self.model.propagate(key, state, forced)
        _check_rows("propagate", log_weight, self.model.is_done(state).shape[0])
        return after, move, log_values("program.propagate", log_weight)

    def fork(self, state: State, ancestors: jax.Array) -> State:
        """See `StateSpaceModel`."""
        return self.model.fork(state, ancestors)

    def is_done(self, state: State) -> jax.Array:
        """See `StateSpaceModel`."""
        return self.model.is_done(state)

    def settle(self, state: State, rows: jax.Array) -> tuple[State, jax.Array]:
        """See `BaseProgram`."""
        return self.model.settle(state, rows) if self.withholds else super().settle(state, rows)

    def withhold(self, state: State) -> State:
        """See `BaseProgram`."""
        return self.model.withhold(state) if self.withholds else state

    def traces(self, state: State) -> Traces:
        """See `BaseProgram`."""
        return self.model.traces(state) if self.tells_traces else super().traces(state)


def _check_rows(method: str, value: Any, num_rows: int) -> None:
    if jnp.shape(value) != (num_rows,):
        raise ValueError(
            f"program.{method}: expected one value for each particle, of shape ({num_rows},), "
            f"got shape {jnp.shape(value)}"
        )


def as_program(program: Any) -> BaseProgram:
    """Return a program with all that kernels ask of it.

    Raises:
        TypeError: it is no `StateSpaceModel`.
    """
    if isinstance(program, BaseProgram):
        return program
    if isinstance(program, type) or not isinstance(program, StateSpaceModel):
        raise TypeError("program: expected a StateSpaceModel, " + lacking(program, StateSpaceModel))
    check_count("program.num_steps", program.num_steps, 1)
    missing = [name for name in ("withhold", "settle") if not hasattr(program, name)]
    if getattr(program, "withholds", False) and missing:
        lacks = " and no ".join(missing)
        raise TypeError(f"program: {type(program).__name__} withholds terminal scores, but has no {lacks}")
    return ForeignProgram(
        program,
        num_prompts=getattr(program, "num_prompts", None),
        num_reward_models=getattr(program, "num_reward_models", 0),
        tokenizer=getattr(program, "tokenizer", None),
        cut=tuple(getattr(program, "cut", ())),
        tells_traces=hasattr(program, "traces"),
        joins_pasts=getattr(program, "joins_pasts", True),
        withholds=getattr(program, "withholds", False),
    )
