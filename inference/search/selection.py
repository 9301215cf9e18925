"""What the baselines that draw traces side by side and keep some of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from ponder.bases import BaseProgram
from ponder.inference.particles.importance_sampling import importance_sampling
from ponder.inference.particles.smc import SMC, SMCInfo, SMCState
from ponder.inference.running.algorithm import Runnable
from ponder.models.pytrees import pytree, static
from ponder.posterior.posterior import Posterior
from ponder.protocols import StateSpaceModel

__all__ = ["Selection", "alternatives", "check_extract", "eligible", "select"]


@pytree
class Selection(Runnable):
    """The algorithm that `best_of_n` and `majority_vote` build; see `ponder.inference.Algorithm`.

    Attributes:
        draws: importance sampling, which draws the traces.
        choose: maps the posterior of the draws to the rows that are kept, bool[N]; on the host.
        method: name of the baseline; the draws go by their own, so that all baselines share what is compiled.
    """

    draws: SMC
    choose: Callable[[Posterior], jax.Array] = static()
    method: str = static()

    @property
    def program(self) -> BaseProgram:
        """What the traces are drawn from."""
        return self.draws.program

    @property
    def steps(self) -> Runnable:
        """Those of the draws."""
        return self.draws

    def init(self, key: jax.Array) -> SMCState:
        """Return N empty traces."""
        return self.draws.init(key)

    def step(self, key: jax.Array, state: SMCState) -> tuple[SMCState, SMCInfo]:
        """Extend every trace."""
        return self.draws.step(key, state)

    def conclude(self, posterior: Posterior) -> Posterior:
        """Share the weight among the chosen rows; if there are none, the run was degenerate."""
        chosen = jnp.asarray(self.choose(posterior))
        nothing = ~chosen.any()
        log_share = -jnp.log(jnp.where(nothing, len(posterior), chosen.sum()).astype(jnp.float32))
        stats = posterior.stats
        assert stats.num_tokens is not None
        return dataclasses.replace(
            posterior,
            log_weights=jnp.where(chosen | nothing, log_share, -jnp.inf),
            log_evidence=jnp.float32(jnp.nan),
            method=self.method,
            stats=stats._replace(
                log_evidence=None,
                tokens_discarded=jnp.where(chosen, 0, stats.num_tokens).sum(dtype=jnp.int32),
                degenerate=nothing,
            ),
        )


def select(
    program: StateSpaceModel, num_particles: int, choose: Callable[[Posterior], jax.Array], method: str
) -> Selection:
    """Check the arguments and build the baseline under a name."""
    draws = importance_sampling(program, num_particles)
    if not draws.program.tells_traces:
        raise TypeError(f"program: {method} needs one that tells its traces (a method `traces`)")
    return Selection(draws, choose, method)


def check_extract(extract: Any) -> None:
    """Refuse what is neither a function nor None."""
    if extract is not None and not callable(extract):
        raise TypeError(f"extract: expected a function of a text, or None, got {extract!r}")


def eligible(drawn: Posterior) -> jax.Array:
    """Tell which traces have positive density p(x) Φ(x), bool[N]; NaN and +inf are none."""
    density = drawn.log_prior + drawn.log_potential
    return (drawn.log_weights > -jnp.inf) & (density > -jnp.inf) & (density < jnp.inf)


def alternatives(
    drawn: Posterior, extract: Callable[[str], Hashable | None] | None, rows: Any
) -> list[list[int]]:
    """Group the rows by answer, in order of first row; those without one count only if no row has one.

    Args:
        drawn: the draws of one prompt.
        extract: see `Posterior.answers`; None: the whole text is the answer.
        rows: bool[N]; which rows count.

    Raises:
        TypeError: an answer is not hashable.
        ValueError: the draws are being traced.
    """
    from ponder.posterior.answers import answers_of

    groups: dict[Hashable, list[int]] = {}
    for row, answer in answers_of(drawn, extract or _whole, rows).items():
        groups.setdefault(answer, []).append(row)
    return [found for answer, found in groups.items() if answer is not None] or list(groups.values())


def _whole(text: str) -> str:
    return text
