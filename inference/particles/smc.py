"""Sequential Monte Carlo over traces.

Target: π(x) ∝ p(x | prompt) Φ(x), by way of the prefix distributions ∝ p(x_{1:t}) Φ_t(x_{1:t}). The evidence
estimate is unbiased on the linear scale for every number of particles, resampling scheme and threshold;
posterior expectations are consistent as N grows. One batched forward pass a step.

References:
    Naesseth, Lindsten and Schön (2019), Elements of Sequential Monte Carlo, algorithm 2 (arXiv:1903.04797);
    adaptive resampling: Del Moral, Doucet and Jasra (2012), On adaptive resampling strategies.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ponder.arguments import check_count, check_share
from ponder.bases import BaseProgram
from ponder.foreign import as_program
from ponder.inference.particles.ancestry import count_discarded, lineage
from ponder.inference.particles.resampling import Resampling, by_name, keep_survivors
from ponder.inference.particles.weighting import Weighed, log_mean, normalised, reweight
from ponder.inference.running.algorithm import Runnable
from ponder.inference.running.driver import batch_shape, per_prompt, split
from ponder.inference.running.progress import Progress, present_texts
from ponder.models.pytrees import pytree, static
from ponder.posterior.posterior import Posterior, Stats
from ponder.protocols import Move, StateSpaceModel, Traces

__all__ = [
    "SMC",
    "AuxiliaryWeights",
    "Cost",
    "SMCInfo",
    "SMCState",
    "build",
    "extend",
    "resample",
    "smc",
]


class SMCState(NamedTuple):
    """What the next step needs.

    With B prompts the arrays have a leading axis of length B.

    Attributes:
        particles: the program's state.
        log_weights: float32[N]; since the last resampling, not normalised.
        log_evidence: float32[]; log of the estimate at the last resampling.
        step: int32[]; steps taken.
        settled: bool[]; whether the weights have all that the program withholds until every trace has ended.
    """

    particles: Any
    log_weights: jax.Array
    log_evidence: jax.Array
    step: jax.Array
    settled: jax.Array


class SMCInfo(NamedTuple):
    """What a step reports; with B prompts every array has a leading axis of length B.

    Attributes:
        ess: float32[]; effective sample size after weighing, before resampling, in particles.
        resampled: bool[].
        ancestors: int32[N]; the identity where nothing was resampled.
        log_evidence: float32[]; log of the estimate after weighing.
        num_tokens: int32[N]; tokens that each row drew.
        invalid: bool[]; some weight was NaN or +inf.
        extra: the cost of the resampling weights alone, as of a look-ahead.
    """

    ess: jax.Array
    resampled: jax.Array
    ancestors: jax.Array
    log_evidence: jax.Array
    num_tokens: jax.Array
    invalid: jax.Array
    extra: Cost


class Cost(NamedTuple):
    """Tokens drawn and forward passes, int32[] or int32[B]."""

    tokens: jax.Array
    calls: jax.Array


class AuxiliaryWeights(Protocol):
    """Resampling weights (first-stage weights) other than the importance weights; hashable."""

    @property
    def corrected(self) -> bool:
        """Whether particles keep weight over resampling weight, so that the evidence is unbiased."""
        ...

    def __call__(self, key: jax.Array, program: BaseProgram, state: SMCState) -> tuple[jax.Array, Cost]:
        """Return log resampling weights like `state.log_weights`; -inf only where these are."""
        ...


@pytree
class SMC(Runnable):
    """The algorithm that `smc` and `importance_sampling` build; see `ponder.inference.Algorithm`."""

    program: BaseProgram
    num_particles: int = static()
    resampling: Resampling = static()
    ess_threshold: float = static()
    method: str = static(default="smc")
    auxiliary: AuxiliaryWeights | None = static(default=None)

    @property
    def num_steps(self) -> int:
        """Those of the program."""
        return self.program.num_steps

    def init(self, key: jax.Array) -> SMCState:
        """Return `num_particles` empty traces with equal weights."""
        batch = batch_shape(self.program)
        return SMCState(
            particles=self.program.withhold(self.program.init(key, self.num_particles)),
            log_weights=jnp.zeros((*batch, self.num_particles), jnp.float32),
            log_evidence=jnp.zeros(batch, jnp.float32),
            step=jnp.int32(0),
            settled=jnp.full(batch, not self.program.withholds, bool),
        )

    def step(self, key: jax.Array, state: SMCState) -> tuple[SMCState, SMCInfo]:
        """Extend, weigh and perhaps resample; `key` is one, or an array of one for each prompt."""
        key_propagate, key_resample = split(key)
        state, weighed, move_lengths, _ = extend(self, key_propagate, state)
        state, resampled, ancestors, extra = self._resample(key_resample, state, weighed)
        return state, SMCInfo(
            ess=weighed.ess,
            resampled=resampled,
            ancestors=ancestors,
            log_evidence=weighed.log_evidence,
            num_tokens=move_lengths,
            invalid=weighed.invalid,
            extra=extra,
        )

    def _resample(
        self, key: jax.Array, state: SMCState, weighed: Weighed
    ) -> tuple[SMCState, jax.Array, jax.Array, Cost]:
        """Resample where it is due; return the state, whether, the ancestors, and what that cost."""
        batch, n = state.log_weights.shape[:-1], self.num_particles
        cost = Cost(jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))
        if self.ess_threshold == 0.0:
            stay = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (*batch, n))
            return state, jnp.zeros(batch, bool), stay, cost
        log_weights = state.log_weights
        if self.auxiliary is not None:
            key_auxiliary, key = split(key)
            log_weights, cost = self.auxiliary(key_auxiliary, self.program, state)
        due = is_due(self, state, weighed)
        drawn = per_prompt(self._ancestors, batch)(key, log_weights)
        corrects = self.auxiliary is not None and self.auxiliary.corrected
        state, ancestors = resample(self, state, due, drawn, log_weights, corrects)
        return state, due, ancestors, cost

    def is_finished(self, state: SMCState) -> jax.Array:
        """Tell whether every particle (of each prompt) is finished or has weight zero."""
        return state.settled & self.all_ended(state.particles, state.log_weights)

    def all_ended(self, particles: Any, log_weights: jax.Array) -> jax.Array:
        """Tell whether every trace (of each prompt) has ended, or can have no weight."""
        done = self.rows(self.program.is_done(particles))
        return jnp.all(done | (log_weights == -jnp.inf), axis=-1)

    def finish(self, state: SMCState, history: SMCInfo) -> Posterior:
        """Normalise the weights and add up the cost; several prompts are a leading axis."""
        batch = batch_shape(self.program)
        traces = jax.tree.map(self.rows, self.program.traces(state.particles))
        done = self.rows(self.program.is_done(state.particles))
        history = jax.tree.map(lambda x: jnp.moveaxis(x, 0, len(batch)), history)
        return per_prompt(self._finish, batch)(
            state._replace(particles=None, step=None, settled=None), traces, done, history
        )

    def _finish(self, state: SMCState, traces: Traces, done: jax.Array, history: SMCInfo) -> Posterior:
        log_weights, degenerate = normalised(state.log_weights)
        unbiased = self.auxiliary is None or self.auxiliary.corrected
        log_evidence = state.log_evidence + log_mean(state.log_weights)
        ancestors = lineage(history.resampled, history.ancestors)
        discarded = count_discarded(ancestors, history.num_tokens, state.log_weights > -jnp.inf)
        draws = history.num_tokens.any(axis=1)
        # A step that draws nothing may still weigh what was withheld.
        num_steps = (draws | (history.ess > 0)).sum(dtype=jnp.int32)
        extra = Cost(*(x.sum(dtype=jnp.int32) for x in history.extra))
        # The prompt's, and one a token of the longest row; none after the last token of all.
        calls = history.num_tokens.max(axis=1).sum(dtype=jnp.int32) + (~done.all()).astype(jnp.int32)
        looked_ahead = (history.extra.calls > 0).sum(dtype=jnp.int32)
        judges = self.program.num_reward_models
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
                ancestors=ancestors,
                log_evidence=history.log_evidence if unbiased else None,
                num_tokens=history.num_tokens,
                tokens_generated=history.num_tokens.sum(dtype=jnp.int32) + extra.tokens,
                tokens_discarded=discarded + extra.tokens,
                model_calls=calls + extra.calls,
                reward_calls=judges * (draws.sum(dtype=jnp.int32) + looked_ahead) if judges else None,
                degenerate=degenerate,
                invalid=history.invalid.any(),
                ess_threshold=jnp.float32(self.ess_threshold),
            ),
            tokenizer=self.program.tokenizer,
            method=self.method,
        )

    def progress(self, step: int, state: SMCState, report: SMCInfo) -> Progress:
        """See `Runnable`."""
        return Progress(
            step=step,
            num_steps=self.num_steps,
            num_done=int(self.program.is_done(state.particles).sum()),
            num_particles=report.num_tokens.size,
            ess=float(report.ess.mean()),
            log_evidence=float(report.log_evidence.mean()),
            read_texts=present_texts(self.program, lambda: self.program.traces(state.particles), self.rows),
        )

    def rows(self, x: jax.Array) -> jax.Array:
        """Split the program's rows `[B · N, ...]` by prompt; one prompt has no axis of its own."""
        return x.reshape(*batch_shape(self.program), self.num_particles, *x.shape[1:])

    def _ancestors(self, key: jax.Array, log_weights: jax.Array) -> jax.Array:
        """Draw the ancestors `int32[N]` of one prompt, laid out for forking in place."""
        n = self.num_particles
        drawn = self.resampling(key, log_weights, n)
        if drawn.shape != (n,) or not jnp.issubdtype(drawn.dtype, jnp.integer):
            raise ValueError(
                f"resampling: expected {n} row numbers, got shape {drawn.shape}, dtype {drawn.dtype}"
            )
        return keep_survivors(drawn)


def extend(
    algorithm: SMC, key: jax.Array, state: SMCState, forced: tuple[jax.Array, Move] | None = None
) -> tuple[SMCState, Weighed, jax.Array, Move]:
    """Move every particle a unit on and weigh it.

    Args:
        algorithm: whose program.
        key: one, or an array with one for each prompt.
        state: before the step.
        forced: see `StateSpaceModel.propagate`.

    Returns:
        The state, its weights, how many tokens each row drew int32[N], and the moves, with their lengths.
    """
    program = algorithm.program
    waiting = ~program.is_done(state.particles)

    # Propagate
    particles, move, log_increment = program.propagate(key, state.particles, forced)
    lengths = move.num_drawn(waiting)
    move = move._replace(lengths=lengths)

    # Weight
    weighed = reweight(state.log_weights, algorithm.rows(log_increment), state.log_evidence)
    settled = state.settled
    if program.withholds:
        is_last = state.step + 1 >= algorithm.num_steps
        ends = algorithm.all_ended(particles, weighed.log_weights) | is_last
        particles, weighed = _settle(algorithm, particles, weighed, state.log_evidence, ends)
        settled |= ends
    state = state._replace(
        particles=particles, log_weights=weighed.log_weights, step=state.step + 1, settled=settled
    )
    return state, weighed, algorithm.rows(lengths), move


def _settle(
    algorithm: SMC, particles: Any, weighed: Weighed, log_evidence: jax.Array, ends: jax.Array
) -> tuple[Any, Weighed]:
    """Weigh what is withheld of the particles (of each prompt `ends[B]`), which have all ended."""
    rows = jnp.broadcast_to(ends[..., None], weighed.log_weights.shape).reshape(-1)
    particles, log_score = algorithm.program.settle(particles, rows)
    log_score = jnp.where(rows, log_score, 0.0)
    settled = reweight(weighed.log_weights, algorithm.rows(log_score), log_evidence)
    return particles, settled._replace(invalid=weighed.invalid | settled.invalid)


def is_due(algorithm: SMC, state: SMCState, weighed: Weighed) -> jax.Array:
    """Whether the particles (of each prompt) are to be resampled."""
    share = algorithm.ess_threshold
    due = weighed.ess < share * algorithm.num_particles if share < 1.0 else jnp.ones(weighed.ess.shape, bool)
    return due & ~algorithm.is_finished(state)


def resample(
    algorithm: SMC,
    state: SMCState,
    due: jax.Array,
    drawn: jax.Array,
    log_weights: jax.Array,
    corrects: bool = False,
) -> tuple[SMCState, jax.Array]:
    """Let the particles continue from their ancestors where resampling is due.

    Args:
        algorithm: whose program.
        state: after weighing.
        due: bool[] or bool[B].
        drawn: int32[N]; the ancestors.
        log_weights: float32[N]; the weights that they were drawn with.
        corrects: whether particles keep the ratio of their weight to the one they were drawn with; otherwise
            all weights become 1, which is the same where the two are equal.

    Returns:
        The state, and the ancestors: the identity where resampling is not due.
    """
    n, batch = algorithm.num_particles, state.log_weights.shape[:-1]
    ancestors = jnp.where(due[..., None], drawn, jnp.arange(n, dtype=jnp.int32))
    # Each prompt's rows are a block of the program's.
    first = n * jnp.arange(math.prod(batch), dtype=jnp.int32).reshape(*batch, 1)
    residue = jnp.zeros_like(log_weights)
    if corrects:
        alive = state.log_weights > -jnp.inf
        residue = jnp.where(alive, state.log_weights - log_weights, -jnp.inf)
        residue = jnp.take_along_axis(residue, ancestors, axis=-1)
    log_evidence = state.log_evidence + log_mean(log_weights)
    after = state._replace(
        particles=algorithm.program.fork(state.particles, (ancestors + first).reshape(-1)),
        log_weights=jnp.where(due[..., None], residue, state.log_weights),
        log_evidence=jnp.where(due, log_evidence, state.log_evidence),
    )
    return after, ancestors


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
    checked = as_program(program)
    num_particles = check_count("num_particles", num_particles, 1)
    ess_threshold = check_share("ess_threshold", ess_threshold)
    return SMC(checked, num_particles, by_name(resampling), ess_threshold, method)
