"""The whole contracts of potentials and programs, with defaults.

The protocols say what an object must have; kernels and programs ask for more, which the base classes here
declare. `ponder.foreign` wraps objects that follow a protocol without inheriting.
"""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp

from ponder.models.protocols import Tokenizer
from ponder.models.rows import fork_rows
from ponder.protocols import Context, Move, PotentialState, State, Traces

__all__ = ["BasePotential", "BaseProgram", "Evidence", "UnboundPotential", "log_values"]


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
