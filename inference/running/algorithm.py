"""What an algorithm is: pure `init` and `step`, a posterior at the end, and a `run` that all share."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ponder.bases import BaseProgram
from ponder.inference.running import driver
from ponder.inference.running.progress import Progress
from ponder.posterior.posterior import Posterior

__all__ = ["Algorithm", "Progress", "Runnable"]


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


class Runnable:
    """Base class of algorithms: gives `run` to what has the members of `driver.Steps`."""

    program: BaseProgram

    def is_finished(self, state: Any) -> jax.Array:
        """Tell whether further steps change nothing; by default all `num_steps` are taken."""
        del state
        return jnp.zeros(driver.batch_shape(self.program), bool)

    def conclude(self, posterior: Posterior) -> Posterior:
        """Do what cannot be compiled, to the posterior of one prompt."""
        return posterior

    @property
    def steps(self) -> Any:
        """The algorithm whose steps are compiled and run; another than this one where several share them."""
        return self

    def run(
        self,
        key: jax.Array,
        *,
        progress: Callable[[Progress], None] | None = None,
        progress_every: int = 4,
        checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int = 16,
        run_id: str = "",
    ) -> Any:
        """Run to the end; a program of several prompts gives a list of posteriors.

        Args:
            key: a single PRNG key.
            progress: called on the host after every `progress_every` steps with a `Progress`, whose `texts`
                are the present ones; the run can then be interrupted.
            progress_every: steps between calls.
            checkpoint: a file that holds the state while the run lasts. If it is there at the start, written
                by a run of the same program, settings and key that was interrupted, the run goes on from it
                and gives the same result.
            checkpoint_every: steps between writes; each writes the whole state, caches included.
            run_id: tells runs apart that differ in what the checkpoint cannot see, such as the code of a
                Python function.

        Raises:
            TypeError: `key` is not a single PRNG key.
            ValueError: `progress_every` or `checkpoint_every` is not positive, the checkpoint belongs to
                another run or is damaged, or a checkpoint is asked for inside jit.

        What a Python function of the program raises, such as that of `ponder.text`, comes out as it was
        raised; inside jit it is text in a `JaxRuntimeError`.
        """
        pauses = driver.Pauses(progress, progress_every, checkpoint, checkpoint_every, run_id)
        found = dataclasses.replace(driver.run(self.steps, key, pauses), cut=self.program.cut)
        batch = driver.batch_shape(self.program)
        each = [jax.tree.map(lambda x, i=i: x[i], found) for i in range(batch[0])] if batch else [found]
        posteriors = [self.conclude(one) for one in each]
        warn(posteriors)
        return posteriors if batch else posteriors[0]


def warn(posteriors: Sequence[Posterior]) -> None:
    """Say what the flags of each prompt's posterior mean, unless they are being traced."""
    flags = [(one.stats.invalid, one.stats.degenerate) for one in posteriors]
    if any(isinstance(flag, Tracer) for pair in flags for flag in pair):
        return
    if any(invalid is not None and bool(invalid) for invalid, _ in flags):
        warnings.warn(
            "a potential, a proposal or the model gave NaN or +inf; those particles got weight zero",
            RuntimeWarning,
            stacklevel=3,
        )
    empty = [i for i, (_, degenerate) in enumerate(flags) if degenerate is not None and bool(degenerate)]
    if empty:
        where = f" of prompts {empty}" if len(posteriors) > 1 else ""
        warnings.warn(
            f"every particle{where} has weight zero, so log_evidence is -inf and the weights are uniform: "
            "use more particles, a potential that offers token_logits, or a larger max_new_tokens",
            RuntimeWarning,
            stacklevel=3,
        )
