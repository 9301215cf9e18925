r"""Units of generation: steps of reasoning, which end with a delimiter.

With a step unit, particles decode inside the compiled program until each has finished its step; only then are
they weighed, resampled and moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ponder.models.protocols import LanguageModel
from ponder.models.pytrees import pytree, static
from ponder.program.stop import StopAutomaton, compile_stop

__all__ = ["CompiledStep", "Step", "compile_step"]


@dataclasses.dataclass(frozen=True)
class Step:
    r"""A step of reasoning as the unit of generation.

    A step ends where its text first contains the delimiter (also if a merged token hides it, as ".\n\n" does
    "\n\n", or if it is split between tokens), after `max_tokens` tokens, or where the trace ends. The
    delimiter belongs to its step. What a token has beyond the delimiter belongs to the step too, and does not
    count towards the next delimiter.

    Args:
        delimiter: a string, a token id (for a model without tokenizer), or several of them.
        max_tokens: the most tokens of a step; None: no limit but the trace's.
        max_steps: the most steps of a trace; a trace cut there is complete, like one that is cut at
            `max_new_tokens`. None: no limit.

    Raises:
        TypeError: `delimiter` holds something else than strings and token ids; when the program is built.
        ValueError: `delimiter` is empty, or `max_tokens` or `max_steps` is not an integer >= 1. When the
            program is built: a token id outside the vocabulary, or a string for a model without tokenizer.
    """

    delimiter: str | int | Sequence[str | int]
    max_tokens: int | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        """Check the limits; the delimiter is checked against a model's vocabulary."""
        for name in ("max_tokens", "max_steps"):
            value = getattr(self, name)
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if value is not None and (not whole or value < 1):
                raise ValueError(f"Step({name}): expected an integer >= 1 or None, got {value!r}")
        if isinstance(self.delimiter, Iterable) and not isinstance(self.delimiter, str | bytes):
            object.__setattr__(self, "delimiter", tuple(self.delimiter))
        empty = isinstance(self.delimiter, str | tuple) and not len(self.delimiter)
        if empty or self.delimiter is None:
            raise ValueError(
                f"Step(delimiter): expected a string or token ids, got {self.delimiter!r}; "
                "for a step a token use unit='token'"
            )


@pytree
class CompiledStep:
    """A `Step` for one model and length limit.

    Attributes:
        delimiter: finds the end of a step; it watches one step, and starts anew for the next.
        max_tokens: the most tokens of a step, at most the trace's limit.
        max_steps: the most steps of a trace, likewise.
        delimiters: what the automaton finds, strings and token ids.
    """

    delimiter: StopAutomaton
    max_tokens: int = static()
    max_steps: int = static()
    delimiters: tuple[str | int, ...] = static()


def compile_step(unit: Any, lm: LanguageModel, max_new_tokens: int) -> CompiledStep | None:
    """Fit a unit to a model; None is the unit "token".

    Raises:
        TypeError: `unit` is neither "token" nor a `Step`, or its delimiter of a wrong kind.
        ValueError: `unit` is another string, or its delimiter does not fit the vocabulary of `lm`.
    """
    if isinstance(unit, str) and unit == "token":
        return None
    if not isinstance(unit, Step):
        error = ValueError if isinstance(unit, str) else TypeError
        raise error(f"unit: expected 'token' or a ponder.Step, got {unit!r}")
    delimiter = compile_stop(unit.delimiter, lm, "Step(delimiter)")
    assert delimiter is not None  # Step refuses an empty one
    items = unit.delimiter if isinstance(unit.delimiter, tuple) else (unit.delimiter,)
    return CompiledStep(
        delimiter,
        max_tokens=min(int(unit.max_tokens or max_new_tokens), max_new_tokens),
        max_steps=min(int(unit.max_steps or max_new_tokens), max_new_tokens),
        delimiters=tuple(item if isinstance(item, str) else int(item) for item in items),  # pyright: ignore
    )
