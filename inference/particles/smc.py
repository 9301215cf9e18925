"""Sequential Monte Carlo over traces.

Target: π(x) ∝ p(x | prompt) Φ(x), by way of the prefix distributions ∝ p(x_{1:t}) Φ_t(x_{1:t}). The evidence
estimate is unbiased on the linear scale for every number of particles, resampling scheme and threshold;
posterior expectations are consistent as N grows. One batched forward pass a step.

References:
    Naesseth, Lindsten and Schön (2019), Elements of Sequential Monte Carlo, algorithm 2 (arXiv:1903.04797);
    adaptive resampling: Del Moral, Doucet and Jasra (2012), On adaptive resampling strategies.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from ponder.arguments import lacking
from ponder.inference.particles.resampling import Resampling, by_name, effective_sample_size, keep_survivors
from ponder.inference.running import driver
from ponder.posterior.posterior import Posterior, Stats
from ponder.protocols import StateSpaceModel, Traces

__all__ = ["SMC", "SMCState", "Spent", "Tilt", "build", "read_traces", "smc"]


class SMCState(NamedTuple):
    """What the next step needs.

    With B prompts the arrays have a leading axis of length B.

    Attributes:
        particles: the program's state.
        log_weights: float32[N]; since the last resampling, not normalised.
        log_evidence: float32[]; log of the estimate at the last resampling.
        step: int32[]; steps taken.
    """

    particles: Any
    log_weights: jax.Array
    log_evidence: jax.Array
    step: jax.Array


class Spent(NamedTuple):
    """What choosing the resampling weights cost: tokens and forward passes, int32[] or int32[B]."""

    tokens: jax.Array
    calls: jax.Array


class Tilt(Protocol):
    """Resampling weights other than the importance weights; hashable, since it is compiled in."""

    @property
    def corrected(self) -> bool:
        """Whether particles keep weight over resampling weight, so that the evidence is unbiased."""
        ...

    def __call__(self, key: jax.Array, program: StateSpaceModel, state: SMCState) -> tuple[jax.Array, Spent]:
        """Return log resampling weights like `state.log_weights`; -inf only where these are."""
        ...


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SMC:
    """The algorithm that `smc` and `importance_sampling` build; see `ponder.inference.Algorithm`."""

    program: StateSpaceModel
    num_particles: int = dataclasses.field(metadata={"static": True})
    resampling: Resampling = dataclasses.field(metadata={"static": True})
    ess_threshold: float = dataclasses.field(metadata={"static": True})
    method: str = dataclasses.field(default="smc", metadata={"static": True})
    tilt: Tilt | None = dataclasses.field(default=None, metadata={"static": True})

    def init(self, key: jax.Array) -> SMCState:
        """Return `num_particles` empty traces with equal weights."""
        particles = self.program.init(key, self.num_particles)
        batch = driver.batch_shape(self.program)
        log_weights = jnp.zeros((*batch, self.num_particles), jnp.float32)
        return SMCState(particles, log_weights, jnp.zeros(batch, jnp.float32), jnp.int32(0))

    def step(self, key: jax.Array, state: SMCState) -> tuple[SMCState, driver.History]:
        """Extend, weigh and perhaps resample; the info is one row of `History`.

        `key` is a single key, or an array of one for each of several prompts.
        """
        batch = driver.batch_shape(self.program)
        n = self.num_particles
        key_propagate, key_resample = driver.split(key)
        moved = ~self._rows(self.program.is_done(state.particles))

        # Propagate
        particles, move, log_increment = self.program.propagate(key_propagate, state.particles)
        num_tokens = moved.astype(jnp.int32) if move.lengths is None else self._rows(move.lengths)

        # Weight
        log_increment = self._rows(log_increment)
        alive = state.log_weights > -jnp.inf
        wrong = jnp.isnan(log_increment) | (log_increment == jnp.inf)
        log_weights = jnp.where(wrong | ~alive, -jnp.inf, state.log_weights + log_increment)
        log_evidence = state.log_evidence + jax.nn.logsumexp(log_weights, axis=-1) - math.log(n)
        ess = effective_sample_size(log_weights)
        state = SMCState(particles, log_weights, state.log_evidence, state.step + 1)

        # Resample
        resampled, spent = jnp.zeros(batch, bool), Spent(*jnp.zeros((2, *batch), jnp.int32))
        ancestors = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (*batch, n))
        if self.ess_threshold > 0.0:
            due = ess < self.ess_threshold * n if self.ess_threshold < 1.0 else jnp.ones(batch, bool)
            resampled = due & ~self.is_finished(state)
            tilted, residue = log_weights, jnp.zeros_like(log_weights)
            if self.tilt is not None:
                key_tilt, key_resample = driver.split(key_resample)
                tilted, spent = self.tilt(key_tilt, self.program, state)
                if self.tilt.corrected:
                    residue = jnp.where(log_weights == -jnp.inf, -jnp.inf, log_weights - tilted)
            drawn = driver.per_prompt(self._resample, batch)(key_resample, tilted)
            ancestors = jnp.where(resampled[..., None], drawn, ancestors)
            at_resampling = state.log_evidence + jax.nn.logsumexp(tilted, axis=-1) - math.log(n)
            # Each prompt's rows are a block of the program's.
            rows = ancestors + n * jnp.arange(math.prod(batch), dtype=jnp.int32).reshape(*batch, 1)
            residue = jnp.take_along_axis(residue, ancestors, axis=-1)
            state = SMCState(
                self.program.fork(particles, rows.reshape(-1)),
                jnp.where(resampled[..., None], residue, log_weights),
                jnp.where(resampled, at_resampling, state.log_evidence),
                state.step,
            )
        return state, driver.History(
            ess, resampled, ancestors, log_evidence, num_tokens, (wrong & alive).any(axis=-1), *spent
        )

    def is_finished(self, state: SMCState) -> jax.Array:
        """Tell whether every particle (of each prompt) is finished or has weight zero."""
        done = self._rows(self.program.is_done(state.particles))
        return jnp.all(done | (state.log_weights == -jnp.inf), axis=-1)

    def finish(self, state: SMCState, history: driver.History) -> Posterior:
        """Normalise the weights and count what was spent; several prompts are a leading axis."""
        batch = driver.batch_shape(self.program)
        n = self.num_particles
        traces = read_traces(self.program, state.particles, n * math.prod(batch))
        traces = jax.tree.map(self._rows, traces)
        done = self._rows(self.program.is_done(state.particles))
        history = driver.History(*(jnp.moveaxis(x, 0, len(batch)) for x in history))
        return driver.per_prompt(self._finish, batch)(
            state._replace(particles=None, step=None), traces, done, history
        )

    def _finish(self, state: SMCState, traces: Traces, done: jax.Array, history: driver.History) -> Posterior:
        total = jax.nn.logsumexp(state.log_weights)
        degenerate = total == -jnp.inf
        uniform = jnp.full(self.num_particles, -math.log(self.num_particles), jnp.float32)
        log_weights = jnp.where(degenerate, uniform, state.log_weights - jnp.where(degenerate, 0.0, total))
        num_steps = history.num_tokens.any(axis=1).sum()
        judges = getattr(self.program, "num_reward_models", 0)
        unbiased = self.tilt is None or self.tilt.corrected
        log_evidence = state.log_evidence + total - math.log(self.num_particles)
        return Posterior(
            tokens=traces.tokens,
            lengths=traces.lengths,
            log_weights=log_weights,
            log_evidence=log_evidence if unbiased else jnp.full_like(log_evidence, jnp.nan),
            log_prior=traces.log_prior,
            log_potential=traces.log_potential,
            stats=Stats(
                num_steps=num_steps,
                ess=history.ess,
                resampled=history.resampled,
                ancestors=history.ancestors,
                log_evidence=history.log_evidence if unbiased else None,
                num_tokens=history.num_tokens,
                tokens_generated=history.num_tokens.sum() + history.extra_tokens.sum(),
                tokens_discarded=_discarded(history, state.log_weights > -jnp.inf)
                + history.extra_tokens.sum(),
                # The prompt's, and one a token of the longest row; none after the last token of all.
                model_calls=history.num_tokens.max(axis=1).sum() + ~done.all() + history.extra_calls.sum(),
                reward_calls=judges * (num_steps + (history.extra_calls > 0).sum()) if judges else None,
                degenerate=degenerate,
                invalid=history.invalid.any(),
                ess_threshold=jnp.float32(self.ess_threshold),
            ),
            tokenizer=getattr(self.program, "tokenizer", None),
            method=self.method,
        )

    def _rows(self, x: jax.Array) -> jax.Array:
        """Split the program's rows `[B · N, ...]` by prompt; one prompt has no axis of its own."""
        return x.reshape(*driver.batch_shape(self.program), self.num_particles, *x.shape[1:])

    def _resample(self, key: jax.Array, log_weights: jax.Array) -> jax.Array:
        """Draw the ancestors `int32[N]`, laid out for forking in place."""
        n = self.num_particles
        drawn = self.resampling(key, log_weights, n)
        if drawn.shape != (n,) or not jnp.issubdtype(drawn.dtype, jnp.integer):
            raise ValueError(
                f"resampling: expected {n} row numbers, got shape {drawn.shape}, dtype {drawn.dtype}"
            )
        return keep_survivors(drawn)

    def run(
        self,
        key: jax.Array,
        *,
        progress: Callable[[driver.Progress], None] | None = None,
        progress_every: int = 4,
        checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int = 16,
    ) -> Any:
        """Run to the end; see `ponder.inference.running.driver.run`."""
        return driver.run(
            self,
            key,
            progress=progress,
            progress_every=progress_every,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
        )


def smc(
    program: StateSpaceModel,
    num_particles: int = 32,
    resampling: str | Resampling = "systematic",
    ess_threshold: float = 0.5,
) -> SMC:
    """Build sequential Monte Carlo; its target and guarantees are in the module docstring.

    Args:
        program: `ponder.Generation` or any other `StateSpaceModel`.
        num_particles: N >= 1.
        resampling: "multinomial", "stratified", "systematic", "residual", or a function like those of
            `ponder.inference.resampling`.
        ess_threshold: resample when the effective sample size falls below this share of N; 0.0 never,
            1.0 at every step. Weights carry over between resamplings.

    Raises:
        TypeError, ValueError: an argument is out of range or of the wrong kind.
    """
    return build(program, num_particles, resampling, ess_threshold, "smc")


def build(
    program: StateSpaceModel,
    num_particles: int,
    resampling: str | Resampling,
    ess_threshold: float,
    method: str,
) -> SMC:
    """Check the arguments and build the algorithm under a name."""
    if not isinstance(program, StateSpaceModel):
        raise TypeError("program: expected a StateSpaceModel, " + lacking(program, StateSpaceModel))
    if (
        not isinstance(num_particles, int | np.integer)
        or isinstance(num_particles, bool)
        or num_particles < 1
    ):
        raise ValueError(f"num_particles: expected an integer >= 1, got {num_particles!r}")
    if (
        not isinstance(ess_threshold, Real)
        or isinstance(ess_threshold, bool)
        or not 0.0 <= ess_threshold <= 1.0
    ):
        raise ValueError(f"ess_threshold: expected a number in [0, 1], got {ess_threshold!r}")
    return SMC(program, int(num_particles), by_name(resampling), float(ess_threshold), method)


def read_traces(program: StateSpaceModel, particles: Any, num_particles: int) -> Traces:
    """What the particles say; without tokens and with NaN for a program that does not tell."""
    method = getattr(program, "traces", None)
    if method is not None:
        return method(particles)
    unknown = jnp.full(num_particles, jnp.nan, jnp.float32)
    none = jnp.zeros((num_particles, 0), jnp.int32)
    return Traces(none, jnp.zeros(num_particles, jnp.int32), unknown, unknown)


def _discarded(history: driver.History, kept: jax.Array) -> jax.Array:
    """Count tokens that no particle of positive final weight descends from, walking the genealogy back."""

    def back(kept: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        ancestors, num_tokens = row
        kept = jnp.zeros_like(kept).at[ancestors].max(kept)
        return kept, jnp.where(kept, 0, num_tokens).sum()

    _, lost = jax.lax.scan(back, kept, (history.ancestors, history.num_tokens), reverse=True)
    return lost.sum()
