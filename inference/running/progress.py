"""What a run tells of itself on the way: how far it is, and the present texts for whoever asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ponder.bases import BaseProgram
from ponder.posterior.arrays import decode, trim
from ponder.protocols import Traces

__all__ = ["Progress", "present_texts"]


class Progress(NamedTuple):
    """What a progress callback is told between slices; over several prompts, means of the last two numbers.

    Attributes:
        step: steps taken.
        num_steps: the most that there may be.
        num_done: particles that are finished.
        num_particles: of all prompts.
        ess: effective sample size after the last step, in particles; NaN where a method has none.
        log_evidence: log of the estimate so far; NaN where a method has none.
        read_texts: what `texts` calls.
    """

    step: int
    num_steps: int
    num_done: int
    num_particles: int
    ess: float
    log_evidence: float
    read_texts: Callable[[], list[Any]] | None = None

    @property
    def texts(self) -> list[Any]:
        """The present text of every particle, finished or not; with several prompts, a list for each.

        In a Markov chain, the draw that it is at; in `exact`, the traces that the last step has found. They
        are decoded when they are asked for: a run that does not ask pays nothing.

        Raises:
            ValueError: the program or the kernel does not tell them, or the run has gone on since: keep the
                texts and not the report.
        """
        if self.read_texts is None:
            raise ValueError("texts: not told by this program (its traces) or kernel (its `progress`)")
        try:
            return self.read_texts()
        except (RuntimeError, ValueError) as error:
            # JAX says so of an array whose memory the next step has taken over.
            if "deleted" not in str(error):
                raise
            raise ValueError(
                "texts: expected to be read during the callback, and the run has gone on; keep the texts "
                "and not the report"
            ) from error

    def __repr__(self) -> str:
        told = zip(self._fields[:-1], self[:-1], strict=True)
        return f"Progress({', '.join(f'{name}={value!r}' for name, value in told)})"


def present_texts(
    program: BaseProgram, tell: Callable[[], Traces], rows: Callable[[Any], Any] = lambda x: x
) -> Callable[[], list[Any]] | None:
    """Return the function that reads the texts of a `Progress`; None if the program does not tell any.

    Args:
        program: whose tokenizer, and whose traces.
        tell: gives the traces.
        rows: brings their tokens to [N, T] and their lengths to [N], with several prompts an axis in front.
    """
    if not program.tells_traces:
        return None

    def read() -> list[Any]:
        traces = tell()
        return _decoded(program, *jax.device_get((rows(traces.tokens), rows(traces.lengths))))

    return read


def _decoded(program: BaseProgram, tokens: np.ndarray, lengths: np.ndarray) -> list[Any]:
    if tokens.ndim > 2:
        return [_decoded(program, *one) for one in zip(tokens, lengths, strict=True)]
    return [decode(program.tokenizer, row, program.cut) for row in trim(tokens, lengths)]
