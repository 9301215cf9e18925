"""The two protocols of the language: evidence on traces, and the state-space model that kernels run.

A trace `x = x_1 ... x_T` is a sequence of tokens that ends with an end-of-sequence token (EOS), with a stop
string, or at the length limit. A `Potential` weighs its prefixes; a `StateSpaceModel` proposes, weighs and
forks particles, so that one definition serves every kernel.

References:
    Del Moral (2004), Feynman-Kac Formulae; Naesseth, Lindsten and Schön (2019), Elements of Sequential
    Monte Carlo, section 2; Lew et al. (2023), arXiv:2306.03081 (potentials on token prefixes).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from ponder.models.protocols import LanguageModel

__all__ = [
    "Context",
    "Move",
    "Potential",
    "PotentialState",
    "State",
    "StateSpaceModel",
    "Traces",
]

State = Any
"""Any pytree whose arrays have the particles on their first axis (or none); only its owner looks inside."""

PotentialState = Any


@runtime_checkable
class Potential(Protocol):
    """Evidence Φ(x_{1:t}) >= 0 on the prefixes of a trace, carried in pure, jit-traceable state.

    Only `log_complete` (and the language model) defines the posterior; `log_prefix` steers the search and
    changes the variance alone. All methods are batched over N particles; all values are natural logs.

    Any object with these six methods is a potential. `ponder.bases.BasePotential` has the whole contract,
    with defaults: `ponder.Composable`, which adds operators to it, is the class to inherit from.
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
        """Log Φ(x·v) - log Φ(x) for every token, `[N, V]`, EOS by the complete rule; None where expensive.

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
        delimiters: what ends a step of reasoning, strings and token ids; empty where the unit is a token.
    """

    lm: LanguageModel
    max_new_tokens: int
    prompts: tuple[tuple[int, ...], ...] = ()
    sources: tuple[Any, ...] = ()
    max_units: int | None = None
    max_unit_tokens: int | None = None
    delimiters: tuple[str | int, ...] = ()


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

    Optional: `traces(state) -> Traces`, what the particles say; without it a posterior holds no tokens;
    `tokenizer`, to show them as text; and `withholds`, `withhold` and `settle`, see
    `ponder.bases.BaseProgram`.
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
        this row could not have made gets weight zero. After `withhold`, terminal scores are not in log Φ_t.
        """
        ...

    def fork(self, state: State, ancestors: jax.Array) -> State:
        """Let row n continue from what was row `ancestors[n]`."""
        ...

    def is_done(self, state: State) -> jax.Array:
        """Tell which particles are finished, `bool[N]`."""
        ...
