"""The two protocols of the language: evidence on traces, and the state-space model that kernels run.

A trace `x = x_1 ... x_T` is a sequence of tokens that ends with an end-of-sequence token (EOS), with a stop
string, or at the length limit. A `Potential` weighs its prefixes; a `StateSpaceModel` proposes, weighs and
forks particles, so that one definition serves every kernel.

References:
    Del Moral (2004), Feynman-Kac Formulae; Naesseth, Lindsten and Schön (2019), Elements of Sequential
    Monte Carlo, section 2; Lew et al. (2023), arXiv:2306.03081 (potentials on token prefixes).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from ponder.arguments import lacking
from ponder.models.protocols import LanguageModel, Tokenizer
from ponder.models.rows import fork_rows

__all__ = [
    "BaseProgram",
    "Context",
    "ForeignProgram",
    "Move",
    "Potential",
    "PotentialState",
    "State",
    "StateSpaceModel",
    "Traces",
    "as_program",
    "bind",
    "commit",
    "complete_logits",
    "judge",
    "judge_prefix",
    "num_reward_models",
    "observe",
]

State = Any
"""Any pytree whose arrays have the particles on their first axis (or none); only its owner looks inside."""

PotentialState = Any


@runtime_checkable
class Potential(Protocol):
    """Evidence Φ(x_{1:t}) >= 0 on the prefixes of a trace, carried in pure, jit-traceable state.

    Only `log_complete` (and the language model) defines the posterior; `log_prefix` steers the search and
    changes the variance alone. All methods are batched over N particles; all values are natural logs.

    Optional methods, used where present:
        `bind(context) -> Potential`: called once, outside jit, when a program is built; a potential that
            depends on the vocabulary, the length limit or the prompt compiles its tables here.
        `observe(state, log_prior[N, V]) -> state`: called once a step, before `token_logits` and `update`,
            with the normalised log prior of the next token.
        `complete_logits(state) -> [N, V]`: log Φ_complete(x·v) - log Φ(x), for tokens that end the trace
            without being EOS (a stop string, the length limit).
        `judge(state, ends[N]) -> [N]`: `log_complete` of the rows that have just ended, for a potential that
            is dear; the other rows may hold any number.
        `judge_prefix(state, rows[N]) -> [N]`: `log_prefix` likewise.
        `commit(state, rows[N]) -> state`: called in the rows where a unit of generation (a token, or a step
            of reasoning) has just ended, before Φ of those rows is read: the place for work that is done once
            a unit; `judge` and `judge_prefix` may rely on it. Without that call `log_prefix` and
            `log_complete` take what was read since the last one for a unit.
    """

    def init(self, num_particles: int) -> PotentialState:
        """Return the state of `num_particles` empty traces."""
        ...

    def update(self, state: PotentialState, tokens: jax.Array, active: jax.Array) -> PotentialState:
        """Append `tokens[N]` (EOS like any other); rows where `active[N]` is false must not change."""
        ...

    def log_prefix(self, state: PotentialState) -> jax.Array:
        """Log Φ of unfinished traces, `[N]`."""
        ...

    def log_complete(self, state: PotentialState) -> jax.Array:
        """Log Φ of finished traces, `[N]`."""
        ...

    def token_logits(self, state: PotentialState) -> jax.Array | None:
        """Log Φ(x·v) - log Φ(x) for every token, `[N, V]`, EOS by the complete rule; None where dear.

        A row with Φ(x) = 0 may hold anything but NaN and +inf.
        """
        ...

    def fork(self, state: PotentialState, ancestors: jax.Array) -> PotentialState:
        """Let row n continue from what was row `ancestors[n]`."""
        ...


class Context(NamedTuple):
    """What a potential may need to know of the program that it is bound to.

    Attributes:
        lm: the language model.
        max_new_tokens: tokens that the text may have.
        prompts: token ids of each prompt. With several, the rows of a state are as many blocks of equal size,
            in this order.
        sources: the prompts as the user gave them: text, chat messages or ids; may be empty.
        max_units: the most units (tokens, or steps of reasoning) that a trace may have; None if unknown.
        max_unit_tokens: the most tokens of a unit.
    """

    lm: LanguageModel
    max_new_tokens: int
    prompts: tuple[tuple[int, ...], ...] = ()
    sources: tuple[Any, ...] = ()
    max_units: int | None = None
    max_unit_tokens: int | None = None


def bind(potential: Potential, context: Context) -> Potential:
    """Fit a potential to a model's vocabulary, to the length limit and the prompt, where it asks for that."""
    method = getattr(potential, "bind", None)
    return potential if method is None else method(context)


def observe(potential: Potential, state: PotentialState, log_prior: jax.Array) -> PotentialState:
    """Show a potential the log prior of the next token [N, V], if it asks for that."""
    method = getattr(potential, "observe", None)
    return state if method is None else method(state, log_prior)


def complete_logits(potential: Potential, state: PotentialState) -> jax.Array | None:
    """Return log Φ_complete(x·v) - log Φ(x) for every token [N, V], or None where not offered."""
    method = getattr(potential, "complete_logits", None)
    return None if method is None else method(state)


def judge(potential: Potential, state: PotentialState, ends: jax.Array) -> jax.Array:
    """Return log Φ of the traces that have just ended; the other rows mean nothing."""
    method = getattr(potential, "judge", None)
    return potential.log_complete(state) if method is None else method(state, ends)


def judge_prefix(potential: Potential, state: PotentialState, rows: jax.Array) -> jax.Array:
    """Return log Φ of the unfinished traces in some rows; the other rows mean nothing."""
    method = getattr(potential, "judge_prefix", None)
    return potential.log_prefix(state) if method is None else method(state, rows)


def commit(potential: Potential, state: PotentialState, rows: jax.Array) -> PotentialState:
    """Tell a potential that a unit of generation ended in some rows, if it asks for that."""
    method = getattr(potential, "commit", None)
    return state if method is None else method(state, rows)


def num_reward_models(potential: Potential | None) -> int:
    """How many reward models judge a trace when a unit ends: what `Stats.reward_calls` counts."""
    return getattr(potential, "num_reward_models", 0)


class Move(NamedTuple):
    """What one step drew, enough to replay it.

    Attributes:
        tokens: int32[N], or int32[N, C] where a step draws up to C tokens; padding in rows that drew fewer.
        log_proposal: float32[N]; their log probability under the proposal, 0 in finished rows.
        lengths: int32[N]; how many tokens were drawn. None: one in each row that was not finished.
    """

    tokens: jax.Array
    log_proposal: jax.Array
    lengths: jax.Array | None = None

    def num_drawn(self, waiting: jax.Array) -> jax.Array:
        """How many tokens each row drew, int32[N]; `waiting[N]`: the rows that were not finished before."""
        return waiting.astype(jnp.int32) if self.lengths is None else self.lengths


class Traces(NamedTuple):
    """What N particles say.

    Attributes:
        tokens: int32[N, T]; padded beyond the lengths.
        lengths: int32[N]; tokens, EOS included.
        log_prior: float32[N]; log p(x | prompt).
        log_potential: float32[N]; log Φ(x).
    """

    tokens: jax.Array
    lengths: jax.Array
    log_prior: jax.Array
    log_potential: jax.Array


@runtime_checkable
class StateSpaceModel(Protocol):
    """A Feynman-Kac model, batch-native over particles: what every kernel in `ponder.inference` runs.

    Optional: `traces(state) -> Traces`, what the particles say; without it a posterior holds no tokens. And
    `tokenizer`, to show them as text.
    """

    @property
    def num_steps(self) -> int:
        """Steps that finish every particle."""
        ...

    def init(self, key: jax.Array, num_particles: int) -> State:
        """Return the state of `num_particles` empty traces."""
        ...

    def propagate(
        self, key: jax.Array, state: State, forced: tuple[jax.Array, Move] | None = None
    ) -> tuple[State, Move, jax.Array]:
        """Extend each unfinished particle by one move; return the state, the moves and `log_weight[N]`.

        The incremental weight is log p(x_t|x_{<t}) - log q(x_t|x_{<t}) + log Φ_t - log Φ_{t-1}; that of the
        first step includes log Φ of the empty trace. Finished particles keep their state and get 0.
        `forced = (mask[N], move)` replays a recorded move in the rows where the mask is true; a move that
        this row could not have made gets weight zero.
        """
        ...

    def fork(self, state: State, ancestors: jax.Array) -> State:
        """Let row n continue from what was row `ancestors[n]`."""
        ...

    def is_done(self, state: State) -> jax.Array:
        """Tell which particles are finished, `bool[N]`."""
        ...


class BaseProgram:
    """Base class of programs: what kernels ask beyond `StateSpaceModel`, and its defaults.

    Attributes:
        num_prompts: B where the particles are as many equal blocks, each an inference of its own; None: one
            inference.
        num_reward_models: reward models that judge each unit: what `Stats.reward_calls` counts.
        tokenizer: shows traces as text; None: as token ids.
        tells_traces: whether `traces` says what the particles are.
        joins_pasts: whether a recorded move may be replayed after another past than its own, as ancestor
            sampling does; not where `Move.log_proposal` is an estimate that depends on the past.
    """

    num_prompts: int | None = None
    num_reward_models: int = 0
    tokenizer: Tokenizer | None = None
    tells_traces: bool = True
    joins_pasts: bool = True

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

    def traces(self, state: State) -> Traces:
        """Return what the particles say; without tokens and with NaN where a program does not tell."""
        n = self.is_done(state).shape[0]
        unknown = jnp.full(n, jnp.nan, jnp.float32)
        return Traces(jnp.zeros((n, 0), jnp.int32), jnp.zeros(n, jnp.int32), unknown, unknown)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ForeignProgram(BaseProgram):
    """A `StateSpaceModel` that does not inherit from `BaseProgram`, with what it has of the rest."""

    model: StateSpaceModel

    num_prompts = property(lambda self: getattr(self.model, "num_prompts", None))
    num_reward_models = property(lambda self: getattr(self.model, "num_reward_models", 0))
    tokenizer = property(lambda self: getattr(self.model, "tokenizer", None))
    tells_traces = property(lambda self: hasattr(self.model, "traces"))
    joins_pasts = property(lambda self: getattr(self.model, "joins_pasts", True))

    @property
    def num_steps(self) -> int:
        """See `StateSpaceModel`."""
        return self.model.num_steps

    def init(self, key: jax.Array, num_particles: int) -> State:
        """See `StateSpaceModel`."""
        return self.model.init(key, num_particles)

    def propagate(
        self, key: jax.Array, state: State, forced: tuple[jax.Array, Move] | None = None
    ) -> tuple[State, Move, jax.Array]:
        """See `StateSpaceModel`."""
        return self.model.propagate(key, state, forced)

    def fork(self, state: State, ancestors: jax.Array) -> State:
        """See `StateSpaceModel`."""
        return self.model.fork(state, ancestors)

    def is_done(self, state: State) -> jax.Array:
        """See `StateSpaceModel`."""
        return self.model.is_done(state)

    def traces(self, state: State) -> Traces:
        """See `BaseProgram`."""
        return self.model.traces(state) if self.tells_traces else super().traces(state)


def as_program(program: Any) -> BaseProgram:
    """Return a program with all that kernels ask of it.

    Raises:
        TypeError: it is no `StateSpaceModel`.
    """
    if isinstance(program, BaseProgram):
        return program
    if isinstance(program, type) or not isinstance(program, StateSpaceModel):
        raise TypeError("program: expected a StateSpaceModel, " + lacking(program, StateSpaceModel))
    return ForeignProgram(program)
