"""Running an algorithm to its end: one compiled loop, in one piece or in slices that report progress.

An unbroken run and a sliced one execute the same compiled program with the same key at each step, and give
the same numbers. Several prompts advance side by side in that loop; each gets a key of its own, and the
numbers that it would get if it were run alone with that key.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ponder.host.errors import reraised
from ponder.inference.running.checkpoint import check_path, read, remove, write
from ponder.inference.running.fingerprint import fingerprint
from ponder.inference.running.static import jit
from ponder.posterior.posterior import Posterior

__all__ = ["Algorithm", "History", "Progress", "run"]


class History(NamedTuple):
    """What the steps reported, one row a step; T steps, N particles. B prompts are an axis after T.

    Attributes:
        ess: float32[T].
        resampled: bool[T].
        ancestors: int32[T, N]; the identity where nothing was resampled.
        log_evidence: float32[T].
        num_tokens: int32[T, N]; tokens that each row drew.
        invalid: bool[T].
        extra_tokens: int32[T]; tokens drawn only to look ahead.
        extra_calls: int32[T]; forward passes for them.
    """

    ess: jax.Array
    resampled: jax.Array
    ancestors: jax.Array
    log_evidence: jax.Array
    num_tokens: jax.Array
    invalid: jax.Array
    extra_tokens: jax.Array
    extra_calls: jax.Array


class Progress(NamedTuple):
    """What a progress callback is told between slices; over several prompts, means of the last two."""

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

    def run(self, key: jax.Array) -> Any:
        """Run to the end and return the posterior; for several prompts, a list of them."""
        ...


class SteppedAlgorithm(Algorithm, Protocol):
    """An algorithm that `run` can drive: its info is one row of `History`, its state has `particles`."""

    @property
    def num_particles(self) -> int:
        """N."""
        ...

    def is_finished(self, state: Any) -> jax.Array:
        """Tell whether further steps change nothing, `bool[]`, or `bool[B]` with several prompts."""
        ...

    def finish(self, state: Any, history: History) -> Posterior:
        """Make the posterior of the final state."""
        ...


class Carry(NamedTuple):
    """State of the loop: steps taken, the algorithm's state, and what was reported."""

    step: jax.Array
    state: Any
    history: History


def batch_shape(program: Any) -> tuple[int, ...]:
    """Return `(B,)` for a program of B prompts, `()` for a single inference."""
    num_prompts = getattr(program, "num_prompts", None)
    return () if num_prompts is None else (num_prompts,)


def per_prompt(fn: Callable, batch: tuple[int, ...], in_axes: Any = 0) -> Callable:
    """Map a function over the prompts, if there are several."""
    return jax.vmap(fn, in_axes) if batch else fn


def split(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split a key, or each key of an array of them, in two."""
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if keys.ndim == (0 if typed else 1):
        first, second = jax.random.split(keys)
        return first, second
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def _start(algorithm: SteppedAlgorithm, key: jax.Array) -> Carry:
    t, n, batch = algorithm.program.num_steps, algorithm.num_particles, batch_shape(algorithm.program)
    history = History(
        ess=jnp.zeros((t, *batch), jnp.float32),
        resampled=jnp.zeros((t, *batch), bool),
        ancestors=jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (t, *batch, n)),
        log_evidence=jnp.zeros((t, *batch), jnp.float32),
        num_tokens=jnp.zeros((t, *batch, n), jnp.int32),
        invalid=jnp.zeros((t, *batch), bool),
        extra_tokens=jnp.zeros((t, *batch), jnp.int32),
        extra_calls=jnp.zeros((t, *batch), jnp.int32),
    )
    return Carry(jnp.int32(0), algorithm.init(key), history)


def _advance(algorithm: SteppedAlgorithm, key: jax.Array, until: jax.Array, carry: Carry) -> Carry:
    batch = batch_shape(algorithm.program)
    fold_in = per_prompt(jax.random.fold_in, batch, (0, None))

    def goes_on(carry: Carry) -> jax.Array:
        return (carry.step < until) & ~algorithm.is_finished(carry.state).all()

    def step(carry: Carry) -> Carry:
        finished = algorithm.is_finished(carry.state)
        state, info = algorithm.step(fold_in(key, carry.step), carry.state)

        def record(column: jax.Array, row: jax.Array) -> jax.Array:
            # A prompt that waits for the others reports nothing.
            idle = finished.reshape(finished.shape + (1,) * (row.ndim - finished.ndim))
            return column.at[carry.step].set(jnp.where(idle, column[carry.step], row))

        return Carry(carry.step + 1, state, jax.tree.map(record, carry.history, info))

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
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 16,
) -> Any:
    """Run an algorithm to its end; a program of several prompts gives a list of posteriors.

    Args:
        algorithm: what to run.
        key: a single PRNG key.
        progress: called on the host after every `progress_every` steps; the run can then be interrupted.
        progress_every: steps between calls.
        checkpoint: a file that holds the state while the run lasts. If it is there at the start, written by a
            run of the same program, settings and key that was interrupted, the run goes on from it and gives
            the same result.
        checkpoint_every: steps between writes; each writes the whole state, caches included.

    Raises:
        TypeError: `key` is not a single PRNG key.
        ValueError: `progress_every` or `checkpoint_every` is not positive, the checkpoint belongs to another
            run or is damaged, or a checkpoint is asked for inside jit.

    What a Python function of the program raises, such as that of `ponder.text`, comes out as it was raised;
    inside jit it is text in a `JaxRuntimeError`.
    """
    check_key(key)
    for name, every in (("progress_every", progress_every), ("checkpoint_every", checkpoint_every)):
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {every!r}")
    if checkpoint is not None:
        check_path(checkpoint)
        if isinstance(key, Tracer):
            raise ValueError("checkpoint: not possible inside jit or vmap")
    batch = batch_shape(algorithm.program)
    key_init, key_steps = split(jax.random.split(key, batch[0]) if batch else key)
    with reraised():
        carry = _compiled_start(algorithm, key_init)
        carry = _drive(
            algorithm, key, key_steps, carry, progress, progress_every, checkpoint, checkpoint_every
        )
        posterior = jax.block_until_ready(_compiled_finish(algorithm, carry))
    if checkpoint is not None:
        remove(checkpoint)
    warn(posterior)
    if not batch:
        return posterior
    return [jax.tree.map(lambda x, i=i: x[i], posterior) for i in range(batch[0])]


def _drive(
    algorithm: SteppedAlgorithm,
    key: jax.Array,
    key_steps: jax.Array,
    carry: Carry,
    progress: Callable[[Progress], None] | None,
    progress_every: int,
    checkpoint: str | os.PathLike | None,
    checkpoint_every: int,
) -> Carry:
    """Take all steps, between stops for the callback and the checkpoint; see `run`."""
    num_steps = algorithm.program.num_steps
    identity = ""
    if checkpoint is not None:
        identity = fingerprint(algorithm, key)
        carry = read(checkpoint, carry, identity) or carry
    if progress is None and checkpoint is None:
        return _compiled_advance(algorithm, key_steps, jnp.int32(num_steps), carry)
    step, finished = int(carry.step), False
    while step < num_steps and not finished:
        stops = [num_steps]
        stops += [] if progress is None else [_following(step, progress_every)]
        stops += [] if checkpoint is None else [_following(step, checkpoint_every)]
        step = min(stops)
        carry = _compiled_advance(algorithm, key_steps, jnp.int32(step), carry)
        finished = bool(algorithm.is_finished(carry.state).all())
        if checkpoint is not None and step % checkpoint_every == 0:
            write(checkpoint, carry, identity)
        if progress is not None and (step % progress_every == 0 or step == num_steps or finished):
            progress(_report(algorithm, carry))
    return carry


def _following(step: int, every: int) -> int:
    """Next multiple of `every` after `step`."""
    return step - step % every + every


def _report(algorithm: SteppedAlgorithm, carry: Carry) -> Progress:
    row = int(carry.step) - 1
    return Progress(
        step=row + 1,
        num_steps=algorithm.program.num_steps,
        num_done=int(algorithm.program.is_done(carry.state.particles).sum()),
        num_particles=carry.history.num_tokens[row].size,
        ess=float(carry.history.ess[row].mean()),
        log_evidence=float(carry.history.log_evidence[row].mean()),
    )


def warn(posterior: Posterior) -> None:
    """Say what the flags of a posterior mean, unless it is being traced."""
    invalid, degenerate = posterior.stats.invalid, posterior.stats.degenerate
    if isinstance(invalid, Tracer) or isinstance(degenerate, Tracer):
        return
    if invalid is not None and bool(invalid.any()):
        warnings.warn(
            "a potential, a proposal or the model gave NaN or +inf; those particles got weight zero",
            RuntimeWarning,
            stacklevel=4,
        )
    if degenerate is not None and bool(degenerate.any()):
        where = f" of prompts {jnp.nonzero(degenerate)[0].tolist()}" if degenerate.ndim else ""
        warnings.warn(
            f"every particle{where} has weight zero, so log_evidence is -inf and the weights are uniform: "
            "use more particles, a potential that offers token_logits, or a larger max_new_tokens",
            RuntimeWarning,
            stacklevel=4,
        )


def check_key(key: jax.Array) -> None:
    """Refuse anything but a single PRNG key, typed or raw."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    raw = isinstance(key, jax.Array) and key.shape == (2,) and key.dtype == jnp.uint32
    if not typed and not raw:
        raise TypeError(f"key: expected a single PRNG key (jax.random.key(0)), got {key!r}")
