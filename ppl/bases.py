"""The whole contracts of potentials and programs, with defaults, and what makes foreign objects follow them.

The protocols say what an object must have; kernels and programs ask for more, which the base classes here
declare. An object that follows a protocol without inheriting is wrapped once, where it comes in.
"""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp

from ponder.arguments import check_count, lacking
from ponder.models.protocols import Tokenizer
from ponder.models.pytrees import pytree, static
from ponder.models.rows import fork_rows
from ponder.protocols import Context, Move, Potential, PotentialState, State, StateSpaceModel, Traces

__all__ = [
    "BasePotential",
    "BaseProgram",
    "Evidence",
    "ForeignPotential",
    "ForeignProgram",
    "UnboundPotential",
    "as_evidence",
    "as_potential",
    "as_program",
    "log_values",
]


def log_values(name: str, value: Any) -> jax.Array:
    """Return what a user's function gave as float32, also in 64-bit mode: programs weigh in float32.

    Raises:
        TypeError: `value` holds something else than real numbers; a bool is none.
    """
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: expected real numbers (natural logs), got dtype {array.dtype}")
    return array.astype(jnp.float32)


class BasePotential(abc.ABC):
    """The whole contract of a potential, with defaults for all but three methods.

    `init`, `update` and `log_complete` say what Φ of a complete trace is, and so what the posterior is. The
    other methods make the search better or cheaper. `ponder.Composable` adds operators to this class.
    """

    @property
    def num_reward_models(self) -> int:
        """How many reward models judge a trace when a unit ends, for `Stats.reward_calls`; by default 0."""
        return 0

    @property
    def withholds(self) -> bool:
        """Whether (a part of) Φ is a terminal score: it says nothing of unfinished traces.

        Kernels that resample compare particles by such a score only when all of them have ended. Weighed as
        each ends, the first to end would crowd out the others, whose score is still to come. By default true
        where `log_prefix`, `judge_prefix` and `token_logits` are those of this class.
        """
        own = type(self)
        return all(
            getattr(own, name) is getattr(BasePotential, name)
            for name in ("log_prefix", "judge_prefix", "token_logits")
        )

    @abc.abstractmethod
    def init(self, num_particles: int) -> PotentialState:
        """See `Potential`."""

    @abc.abstractmethod
    def update(self, state: PotentialState, tokens: jax.Array, active: jax.Array) -> PotentialState:
        """See `Potential`."""

    @abc.abstractmethod
    def log_complete(self, state: PotentialState) -> jax.Array:
        """See `Potential`."""

    def log_prefix(self, state: PotentialState) -> jax.Array:
        """See `Potential`; by default 0, which says nothing of unfinished traces."""
        return jnp.zeros(jax.tree.leaves(state)[0].shape[0], jnp.float32)

    def token_logits(self, state: PotentialState) -> jax.Array | None:
        """See `Potential`; by default None."""
        del state
        return None

    def fork(self, state: PotentialState, ancestors: jax.Array) -> PotentialState:
        """See `Potential`; by default row by row of every array, whose first axis is the particles'."""
        return jax.tree.map(lambda x: x[ancestors], state)

    def bind(self, context: Context) -> BasePotential:
        """Return the potential for a model's vocabulary, a length limit and a prompt; by default itself.

        Called once, outside jit, when a program is built: the place to compile tables.
        """
        del context
        return self

    def observe(self, state: PotentialState, log_prior: jax.Array) -> PotentialState:
        """Take in the normalised log prior of the next token, `[N, V]`; by default without effect.

        Called once a step, before `token_logits` and `update`.
        """
        del log_prior
        return state

    def complete_logits(self, state: PotentialState) -> jax.Array | None:
        """Return log Φ_complete(x·v) - log Φ(x) for every token, `[N, V]`; by default None, not known.

        For tokens that end the trace without being EOS: a stop string, the length limit.
        """
        del state
        return None

    def judge(self, state: PotentialState, ends: jax.Array) -> jax.Array:
        """Return `log_complete` of the rows `ends[N]`, which have just ended; the others may hold any number.

        For a potential that is expensive to evaluate.
        """
        del ends
        return self.log_complete(state)

    def judge_apart(self, state: PotentialState, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Split what `judge` returns into what is weighed at once, and the terminal score; both `[N]`.

        That a score forbids a trace, with -inf, is weighed at once.
        """
        log_value = log_values("potential.log_complete", self.judge(state, ends))
        nothing = jnp.zeros_like(log_value)
        if not self.withholds:
            return log_value, nothing
        forbidden = log_value == -jnp.inf
        return jnp.where(forbidden, log_value, nothing), jnp.where(forbidden, nothing, log_value)

    def judge_prefix(self, state: PotentialState, rows: jax.Array) -> jax.Array:
        """Return `log_prefix` of some rows, likewise."""
        del rows
        return self.log_prefix(state)

    def commit(self, state: PotentialState, rows: jax.Array) -> PotentialState:
        """Learn that a unit of generation (a token, or a step of reasoning) has just ended in some rows.

        Called before Φ of those rows is read: the place for work that is done once a unit; `judge` and
        `judge_prefix` may rely on it. Without that call `log_prefix` and `log_complete` take what was read
        since the last one for a unit.
        """
        del rows
        return state


class UnboundPotential(abc.ABC):
    """A description of a potential that depends on the program: `bind` makes the potential.

    It has none of a potential's methods, so that none can be called too early.
    """

    @abc.abstractmethod
    def bind(self, context: Context) -> BasePotential:
        """Return the potential for a model's vocabulary, a length limit and a prompt.

        Called outside jit, when a program is built.
        """

    def __getattr__(self, name: str) -> Any:
        if hasattr(BasePotential, name):
            raise AttributeError(
                f"{self!r} has to be bound first: ponder.Generation does it, or "
                f"potential.bind(ponder.Context(lm, max_new_tokens=...)).{name}"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


Evidence = BasePotential | UnboundPotential
"""What programs and products take; `as_evidence` makes it of what users give."""


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


class BaseProgram:
    """Base class of programs: what kernels ask beyond `StateSpaceModel`, and its defaults.

    Attributes:
        num_prompts: B where the particles are as many equal blocks, each an inference of its own; None: one
            inference.
        num_reward_models: reward models that judge each unit: what `Stats.reward_calls` counts.
        tokenizer: shows traces as text; None: as token ids.
        cut: stop strings and stop tokens that the texts leave out.
        tells_traces: whether `traces` says what the particles are.
        joins_pasts: whether a recorded move may be replayed after another past than its own, as ancestor
            sampling does; not where `Move.log_proposal` is an estimate that depends on the past.
        withholds: whether `withhold` and `settle` do anything.
    """

    num_prompts: int | None = None
    num_reward_models: int = 0
    tokenizer: Tokenizer | None = None
    cut: tuple[str | int, ...] = ()
    tells_traces: bool = False
    joins_pasts: bool = True
    withholds: bool = False

    @property
    def num_steps(self) -> int:
        """See `StateSpaceModel`."""
        raise NotImplementedError

    def init(self, key: jax.Array, num_particles: int) -> State:
        """See `StateSpaceModel`; `num_particles` for each prompt."""
        raise NotImplementedError

    def propagate(
        self, key: jax.Array, state: State, forced: tuple[jax.Array, Move] | None = None
    ) -> tuple[State, Move, jax.Array]:
        """See `StateSpaceModel`."""
        raise NotImplementedError

    def fork(self, state: State, ancestors: jax.Array) -> State:
        """See `StateSpaceModel`; by default, row by row of every array."""
        return fork_rows(state, ancestors)

    def is_done(self, state: State) -> jax.Array:
        """See `StateSpaceModel`."""
        raise NotImplementedError

    def withhold(self, state: State) -> State:
        """Let `propagate`, from this state on, leave terminal scores out of its weights until `settle`.

        For kernels that resample: see `BasePotential.withholds`. Without this call the weight of each step is
        whole, and a kernel need not know of terminal scores.
        """
        return state

    def settle(self, state: State, rows: jax.Array) -> tuple[State, jax.Array]:
        """Return the terminal scores withheld in some rows `bool[N]`, as log weights float32[N].

        Kernels that called `withhold` weigh with them when all traces of an inference have ended. The
        state that comes back holds none for these rows; other rows keep theirs, and get 0.
        """
        return state, jnp.zeros(rows.shape, jnp.float32)

    def traces(self, state: State) -> Traces:
        """Return what the particles say; without tokens and with NaN where a program does not tell."""
        n = self.is_done(state).shape[0]
        unknown = jnp.full(n, jnp.nan, jnp.float32)
        return Traces(jnp.zeros((n, 0), jnp.int32), jnp.zeros(n, jnp.int32), unknown, unknown)


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
