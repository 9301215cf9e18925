"""What a program carries from step to step, and what the functions that move it need to know of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax

from ponder.bases import BasePotential
from ponder.models.protocols import LanguageModel
from ponder.program.sampling import PriorSettings
from ponder.program.stop import StopAutomaton

__all__ = ["GenerationState", "Program", "Proposal"]

Proposal = Callable[[jax.Array, jax.Array | None], jax.Array] | Literal["rejection"]
"""`proposal(log_prior[N, V], token_logits[N, V] or None) -> log q[N, V]`, unnormalised; pure, traceable.
"rejection": see `Generation`."""


class GenerationState(NamedTuple):
    """N rows of partial traces; with several prompts, as many blocks of equal size.

    Attributes:
        cache: the language model's.
        logits: float32[N, V]; of the next token.
        tokens: int32[N, T]; the traces, padded.
        lengths: int32[N]; tokens so far, EOS included.
        done: bool[N]; finished traces.
        stop: int32[N]; progress through the stop strings, or None.
        potential: the potential's state, or None.
        log_potential: float32[N]; log Φ so far; 0 before the first step, whose weight includes log Φ of the
            empty trace.
        withheld: float32[N]; the terminal score of finished traces, until `settle` adds it to
            `log_potential`; None where scores are weighed as each trace ends.
        log_prior: float32[N]; log p of the tokens so far.
        step: int32[]; units taken.
    """

    cache: Any
    logits: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array
    stop: jax.Array | None
    potential: Any
    log_potential: jax.Array
    withheld: jax.Array | None
    log_prior: jax.Array
    step: jax.Array


class Program(Protocol):
    """What drawing and weighing tokens need to know of a `ponder.Generation`; see there."""

    @property
    def lm(self) -> LanguageModel:
        """The language model."""
        ...

    @property
    def num_prompts(self) -> int | None:
        """B, or None for a single prompt."""
        ...

    @property
    def settings(self) -> PriorSettings:
        """Of the prior."""
        ...

    @property
    def potential(self) -> BasePotential | None:
        """The evidence, bound."""
        ...

    @property
    def proposal(self) -> Proposal | None:
        """None, a function, or "rejection"."""
        ...

    @property
    def stop(self) -> StopAutomaton | None:
        """The stop strings."""
        ...

    @property
    def overflow(self) -> str:
        """What becomes of a trace at the limit: "truncate" or "force_eos"."""
        ...

    @property
    def padding(self) -> int:
        """What stands in `tokens` beyond the end of a trace."""
        ...
