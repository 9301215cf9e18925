"""What `ponder sample` is asked: its settings, the kernels and potentials they name, and the outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ponder

__all__ = ["EVIDENCE", "METHODS", "STDOUT", "Method", "Outputs", "Settings", "Timings"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of `ponder sample` that decide the result; None leaves a choice to the library."""

    prompt: str
    model: str
    method: str
    particles: int
    max_new_tokens: int
    regex: str | None
    choice: tuple[str, ...] | None
    json_schema: str | None
    grammar: str | None
    power: float | None
    temperature: float
    stop: tuple[str, ...]
    cut_stop: bool
    force_eos: bool
    chat: bool | None
    resampling: str | None
    ess_threshold: float | None
    dtype: str | None
    seed: int


STDOUT = Path("-")
"""Stands for stdout, of `--json`."""


class Outputs(NamedTuple):
    """Files to write; None where not asked for."""

    json: Path | None = None
    plot: Path | None = None
    save: Path | None = None


class Timings(NamedTuple):
    """Wall-clock seconds of the stages, and the steady speed.

    Attributes:
        load_seconds: reading the model.
        compile_seconds: compilation, the prompt, and the first slice of steps.
        sample_seconds: all later steps.
        tokens_per_second: tokens drawn by all particles in the later steps, over their time; None where
            there were none.
    """

    load_seconds: float
    compile_seconds: float
    sample_seconds: float
    tokens_per_second: float | None


class Method(NamedTuple):
    """How to build a kernel from a program and settings, and which optional settings it knows."""

    build: Callable[[Any, Settings], Any]
    options: frozenset[str] = frozenset()


def _smc(program: Any, settings: Settings) -> Any:
    given = {"resampling": settings.resampling, "ess_threshold": settings.ess_threshold}
    chosen = {name: value for name, value in given.items() if value is not None}
    return ponder.inference.smc(program, num_particles=settings.particles, **chosen)


def _importance_sampling(program: Any, settings: Settings) -> Any:
    return ponder.inference.importance_sampling(program, num_particles=settings.particles)


METHODS: dict[str, Method] = {
    "smc": Method(_smc, frozenset({"resampling", "ess_threshold"})),
    "importance_sampling": Method(_importance_sampling),
}
"""The kernels by name; a new row is all that a new kernel takes."""


EVIDENCE: dict[str, Callable[[Any], Any]] = {
    "regex": lambda pattern: ponder.regex(pattern),
    "choice": lambda options: ponder.choice(options),
    "json_schema": lambda schema: ponder.json_schema(schema),
    "grammar": lambda text: ponder.grammar(text),
    "power": lambda alpha: ponder.power(alpha),
}
"""The options that are potentials, by their names in `Settings`; those given are multiplied in this order."""
