"""Running an algorithm to its end: one compiled loop, in one piece or in slices between pauses.

An unbroken run and a sliced one execute the same compiled program with the same key at each step, and give
the same numbers. Several prompts advance side by side in that loop; each gets a key of its own, and the
numbers that it would get if it were run alone with that key.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ponder.arguments import check_count, check_key
from ponder.bases import BaseProgram
from ponder.host.errors import reraised
from ponder.inference.running.checkpoint import check_path, read, remove, write
from ponder.inference.running.fingerprint import fingerprint
from ponder.inference.running.static import jit
from ponder.posterior.posterior import Posterior

__all__ = ["Carry", "Loop", "Pauses", "Steps", "batch_shape", "complete", "per_prompt", "run", "split"]


class Loop(Protocol):
    """The steps of an algorithm.

    Whatever `step` reports is collected, one row a step: `finish` gets every array with an axis of
    `num_steps` in front, zero in the steps that were not taken. With B prompts each array of a report has a
    leading axis of length B, and `step` gets a key for each prompt.
    """

    @property
    def program(self) -> BaseProgram:
        """What is being inferred."""
        ...

    @property
    def num_steps(self) -> int:
        """The most steps that a run takes."""
        ...

    def init(self, key: jax.Array) -> Any:
        """Return the state before the first step."""
        ...

    def step(self, key: jax.Array, state: Any) -> tuple[Any, Any]:
        """Take one step; return the state, of the same type, and a report: a pytree of arrays."""
        ...

    def is_finished(self, state: Any) -> jax.Array:
        """Tell whether further steps change nothing, `bool[]`, or `bool[B]` with several prompts."""
        ...


class Steps(Loop, Protocol):
    """An algorithm that ends in a posterior, and can be watched."""

    def finish(self, state: Any, history: Any) -> Posterior:
        """Make the posterior of the final state and the reports; traceable."""
        ...

    def progress(self, step: int, state: Any, report: Any) -> Any:
        """Sum up, on the host, the state after `step` steps, of which the last gave `report`."""
        ...


class Carry(NamedTuple):
    """State of the loop.

    Attributes:
        step: int32[]; steps taken.
        state: the algorithm's.
        history: what its steps reported, with an axis of `num_steps` in front; zero where none was taken.
    """

    step: jax.Array
    state: Any
    history: Any


class Pauses(NamedTuple):
    """What happens between slices of a run; see `Runnable.run`."""

    progress: Callable[[Any], None] | None = None
    progress_every: int = 4
    checkpoint: str | os.PathLike | None = None
    checkpoint_every: int = 16
    run_id: str = ""


def batch_shape(program: BaseProgram) -> tuple[int, ...]:
    """Return `(B,)` for a program of B prompts, `()` for a single inference."""
    return () if program.num_prompts is None else (program.num_prompts,)


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


def start(algorithm: Loop, key: jax.Array) -> Carry:
    """Return the state before the first step, and an empty history; traceable."""
    state = algorithm.init(key)
    _, report = jax.eval_shape(algorithm.step, key, state)
    num_steps = algorithm.num_steps
    history = jax.tree.map(lambda x: jnp.zeros((num_steps, *x.shape), x.dtype), report)
    return Carry(jnp.int32(0), state, history)


def advance(algorithm: Loop, key: jax.Array, until: jax.Array, carry: Carry) -> Carry:
    """Take steps until so many are taken or nothing changes any more; traceable."""
    batch = batch_shape(algorithm.program)
    fold_in = per_prompt(jax.random.fold_in, batch, (0, None))

    def goes_on(carry: Carry) -> jax.Array:
        return (carry.step < until) & ~algorithm.is_finished(carry.state).all()

    def step(carry: Carry) -> Carry:
        finished = algorithm.is_finished(carry.state)
        state, report = algorithm.step(fold_in(key, carry.step), carry.state)

        def record(column: jax.Array, row: jax.Array) -> jax.Array:
            # A prompt that waits for the others reports nothing.
            idle = finished.reshape(finished.shape + (1,) * (row.ndim - finished.ndim))
            return column.at[carry.step].set(jnp.where(idle, column[carry.step], row))

        return Carry(carry.step + 1, state, jax.tree.map(record, carry.history, report))

    return jax.lax.while_loop(goes_on, step, carry)


def complete(algorithm: Loop, key: jax.Array) -> Carry:
    """Take all steps from a fresh start; traceable: an algorithm inside another one."""
    key_init, key_steps = split(key)
    carry = start(algorithm, key_init)
    return advance(algorithm, key_steps, jnp.int32(algorithm.num_steps), carry)


def _finish(algorithm: Steps, carry: Carry) -> Posterior:
    return algorithm.finish(carry.state, carry.history)


_compiled_start = jit(start)
_compiled_advance = jit(advance, donate=(3,))
_compiled_finish = jit(_finish)


def run(algorithm: Steps, key: jax.Array, pauses: Pauses) -> Posterior:
    """Run an algorithm to its end; several prompts are a leading axis of the result. See `Runnable.run`."""
    check_key(key)
    check_count("progress_every", pauses.progress_every, 1)
    check_count("checkpoint_every", pauses.checkpoint_every, 1)
    if not isinstance(pauses.run_id, str):
        raise TypeError(f"run_id: expected a string, got {pauses.run_id!r}")
    if pauses.progress is not None and not callable(pauses.progress):
        raise TypeError(f"progress: expected a function of a Progress, got {pauses.progress!r}")
    if pauses.checkpoint is not None:
        check_path(pauses.checkpoint)
    for name in ("progress", "checkpoint"):
        if getattr(pauses, name) is not None and isinstance(key, Tracer):
            raise ValueError(f"{name}: not possible inside jit or vmap")
    batch = batch_shape(algorithm.program)
    key_init, key_steps = split(jax.random.split(key, batch[0]) if batch else key)
    with reraised():
        carry = _compiled_start(algorithm, key_init)
        if pauses.progress is None and pauses.checkpoint is None:
            carry = _compiled_advance(algorithm, key_steps, jnp.int32(algorithm.num_steps), carry)
        else:
            carry = _in_slices(algorithm, key, key_steps, carry, pauses)
        posterior = jax.block_until_ready(_compiled_finish(algorithm, carry))
    if pauses.checkpoint is not None:
        remove(pauses.checkpoint)
    return posterior


def _in_slices(algorithm: Steps, key: jax.Array, key_steps: jax.Array, carry: Carry, pauses: Pauses) -> Carry:
    """Take all steps, between pauses for the callback and the checkpoint."""
    num_steps = algorithm.num_steps
    progress, path, identity = pauses.progress, pauses.checkpoint, ""
    if path is not None:
        identity = fingerprint(algorithm, key, pauses.run_id)
        carry = read(path, carry, identity) or carry
    step, finished = int(carry.step), False
    while step < num_steps and not finished:
        stops = [num_steps]
        stops += [] if progress is None else [_following(step, pauses.progress_every)]
        stops += [] if path is None else [_following(step, pauses.checkpoint_every)]
        step = min(stops)
        carry = _compiled_advance(algorithm, key_steps, jnp.int32(step), carry)
        finished = bool(algorithm.is_finished(carry.state).all())
        if path is not None and step % pauses.checkpoint_every == 0:
            write(path, carry, identity)
        if progress is not None and (step % pauses.progress_every == 0 or step == num_steps or finished):
            taken = int(carry.step)
            report = jax.tree.map(lambda x, row=taken - 1: x[row], carry.history)
            progress(algorithm.progress(taken, carry.state, report))
    return carry


def _following(step: int, every: int) -> int:
    """Next multiple of `every` after `step`."""
    return step - step % every + every
