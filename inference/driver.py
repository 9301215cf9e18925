"""Running an algorithm to its end: one compiled loop, in one piece or in slices that report progress.

An unbroken run and a sliced one execute the same compiled program with the same key at each step, and give
the same numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ponder.inference.static import jit
from ponder.posterior import Posterior

__all__ = ["Algorithm", "History", "Progress", "run"]


class History(NamedTuple):
    """What the steps reported, one row a step; T steps, N particles.

    Attributes:
        ess: float32[T].
        resampled: bool[T].
        ancestors: int32[T, N]; the identity where nothing was resampled.
        log_evidence: float32[T].
        moved: bool[T, N].
        invalid: bool[T].
    """

    ess: jax.Array
    resampled: jax.Array
    ancestors: jax.Array
    log_evidence: jax.Array
    moved: jax.Array
    invalid: jax.Array


class Progress(NamedTuple):
    """What a progress callback is told between slices."""

    step: int
    num_steps: int
    num_done: int
    num_particles: int
    ess: float
    log_evidence: float


@runtime_checkable
class Algorithm(Protocol):
    """What every function of `ponder.inference` returns.

    `init` and `step` are pure and traceable; `run` compiles them once for each combination of shapes.
    """

    @property
    def program(self) -> Any:
        """What is being inferred."""
        ...

    def init(self, key: jax.Array) -> Any:
        """Return the state before the first step."""
        ...

    def step(self, key: jax.Array, state: Any) -> tuple[Any, Any]:
        """Take one step; return the state and diagnostics."""
        ...

    def run(self, key: jax.Array) -> Posterior:
        """Run to the end and return the posterior."""
        ...


class SteppedAlgorithm(Algorithm, Protocol):
    """An algorithm that `run` can drive: its info is one row of `History`, its state has `particles`."""

    @property
    def num_particles(self) -> int:
        """N."""
        ...

    def is_finished(self, state: Any) -> jax.Array:
        """Tell whether further steps change nothing, `bool[]`."""
        ...

    def finish(self, state: Any, history: History) -> Posterior:
        """Make the posterior of the final state."""
        ...


class Carry(NamedTuple):
    """State of the loop: steps taken, the algorithm's state, and what was reported."""

    step: jax.Array
    state: Any
    history: History


def _start(algorithm: SteppedAlgorithm, key: jax.Array) -> Carry:
    t, n = algorithm.program.num_steps, algorithm.num_particles
    history = History(
        ess=jnp.zeros(t, jnp.float32),
        resampled=jnp.zeros(t, bool),
        ancestors=jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (t, n)),
        log_evidence=jnp.zeros(t, jnp.float32),
        moved=jnp.zeros((t, n), bool),
        invalid=jnp.zeros(t, bool),
    )
    return Carry(jnp.int32(0), algorithm.init(key), history)


def _advance(algorithm: SteppedAlgorithm, key: jax.Array, until: jax.Array, carry: Carry) -> Carry:
    def goes_on(carry: Carry) -> jax.Array:
        return (carry.step < until) & ~algorithm.is_finished(carry.state)

    def step(carry: Carry) -> Carry:
        state, info = algorithm.step(jax.random.fold_in(key, carry.step), carry.state)
        history = History(*(x.at[carry.step].set(row) for x, row in zip(carry.history, info, strict=True)))
        return Carry(carry.step + 1, state, history)

    return jax.lax.while_loop(goes_on, step, carry)


def _finish(algorithm: SteppedAlgorithm, carry: Carry) -> Posterior:
    return algorithm.finish(carry.state, carry.history)


_compiled_start = jit(_start)
_compiled_advance = jit(_advance, donate=(3,))
_compiled_finish = jit(_finish)


def run(
    algorithm: SteppedAlgorithm,
    key: jax.Array,
    *,
    progress: Callable[[Progress], None] | None = None,
    progress_every: int = 4,
) -> Posterior:
    """Run an algorithm to its end.

    Args:
        algorithm: what to run.
        key: a single PRNG key.
        progress: called on the host after every `progress_every` steps; the run can then be interrupted.
        progress_every: steps between calls.

    Raises:
        TypeError: `key` is not a single PRNG key.
        ValueError: `progress_every` is not positive.
    """
    _check_key(key)
    if progress_every < 1:
        raise ValueError(f"progress_every: expected an integer >= 1, got {progress_every!r}")
    key_init, key_steps = jax.random.split(key)
    num_steps = algorithm.program.num_steps
    carry = _compiled_start(algorithm, key_init)
    if progress is None:
        carry = _compiled_advance(algorithm, key_steps, jnp.int32(num_steps), carry)
    else:
        finished = False
        step = 0
        while step < num_steps and not finished:
            step = min(step + progress_every, num_steps)
            carry = _compiled_advance(algorithm, key_steps, jnp.int32(step), carry)
            finished = bool(algorithm.is_finished(carry.state))
            progress(_report(algorithm, carry))
    posterior = _compiled_finish(algorithm, carry)
    if not isinstance(posterior.log_evidence, Tracer):
        _warn(posterior)
    return posterior


def _report(algorithm: SteppedAlgorithm, carry: Carry) -> Progress:
    row = int(carry.step) - 1
    return Progress(
        step=row + 1,
        num_steps=algorithm.program.num_steps,
        num_done=int(algorithm.program.is_done(carry.state.particles).sum()),
        num_particles=algorithm.num_particles,
        ess=float(carry.history.ess[row]),
        log_evidence=float(carry.history.log_evidence[row]),
    )


def _warn(posterior: Posterior) -> None:
    if bool(posterior.stats.invalid):
        warnings.warn(
            "a potential, a proposal or the model gave NaN or +inf; those particles got weight zero",
            RuntimeWarning,
            stacklevel=4,
        )
    if bool(posterior.stats.degenerate):
        warnings.warn(
            "every particle has weight zero, so log_evidence is -inf and the weights are uniform: "
            "use more particles, a potential that offers token_logits, or a larger max_new_tokens",
            RuntimeWarning,
            stacklevel=4,
        )


def _check_key(key: jax.Array) -> None:
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    raw = isinstance(key, jax.Array) and key.shape == (2,) and key.dtype == jnp.uint32
    if not typed and not raw:
        raise TypeError(f"key: expected a single PRNG key (jax.random.key(0)), got {key!r}")
