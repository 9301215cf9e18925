"""The jobs of `ponder bench`, and where they are measured. Light, so that `--help` answers at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import ponder

if TYPE_CHECKING:
    from ponder.bases import BasePotential, UnboundPotential

__all__ = ["BASELINE", "JOBS", "Job", "Workload"]

BASELINE = "plain"
"""The job that the others are compared with."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """One point of the grid, and what to run there.

    Attributes:
        model: name or path of the model.
        dtype: of the weights, or None for the library's choice.
        particles: N.
        prompt_tokens: length of the prompt.
        new_tokens: length of every trace: EOS does not end them.
        repeats: steady runs of each job, after the one that compiles.
        jobs: names in `JOBS`.
        prompts: in one batch, against as many run one by one; 0 leaves that comparison out.
    """

    model: str
    dtype: str | None
    particles: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    jobs: tuple[str, ...]
    prompts: int = 0


class Job(NamedTuple):
    """What to run.

    Attributes:
        ess_threshold: of SMC; 0.0 never resamples.
        potential: makes the potential from the model, or None.
        everywhere: whether it belongs at every point of the default grid.
    """

    ess_threshold: float
    potential: Callable[[Any], BasePotential | UnboundPotential] | None
    everywhere: bool = False


def _noise(_: Any) -> BasePotential:
    from ponder.cli.noise import NOISE

    return NOISE


def _count_vowels(texts: list[str]) -> list[float]:
    return [0.1 * sum(text.count(vowel) for vowel in "aeiou") for text in texts]


JOBS: dict[str, Job] = {
    BASELINE: Job(0.0, None, everywhere=True),
    "smc": Job(0.5, _noise, everywhere=True),
    "smc_every_step": Job(1.0, _noise),
    "regex": Job(1.0, lambda _: ponder.regex(r"[A-Za-z ,.'\n]*")),
    "text": Job(1.0, lambda _: ponder.text(_count_vowels, prefix=_count_vowels)),
    "expert": Job(1.0, lambda lm: ponder.expert(lm)),
}
"""A new row is all that a new job takes."""
