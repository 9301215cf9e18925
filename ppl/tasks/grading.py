"""What the tasks share: how problems are drawn and split, grades, and rewards made of exact values."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from ponder.tasks.synthetic_reward import clipped, noisy_scores

__all__ = [
    "Grade",
    "distinct_problems",
    "in_test_split",
    "make_exact_reward",
    "make_synthetic_reward",
    "trace_lines",
]

P = TypeVar("P", bound=Hashable)


class Grade(NamedTuple):
    """Whether a trace solves its problem; if not, why."""

    correct: bool
    num_right: int  # steps that are right before the first that is not
    reason: str  # "" where the trace is correct


def in_test_split(key: str) -> bool:
    """Whether the problem with this key belongs to the tenth that no shipped model was trained on."""
    return zlib.crc32(key.encode()) % 10 == 0


def distinct_problems(draw: Callable[[np.random.Generator], P], seed: int, count: int) -> list[P]:
    """Draw until there are `count` different problems, in the order in which they turn up."""
    rng = np.random.default_rng(seed)
    found: dict[P, None] = {}
    while len(found) < count:
        found.setdefault(draw(rng))
    return list(found)


def trace_lines(trace: str) -> list[str]:
    r"""Return the steps of a trace; its last "\n" may be missing."""
    return trace.removesuffix("\n").split("\n") if trace else []


def make_exact_reward(exact_value: Callable[[str, str], float]) -> Callable[..., np.ndarray]:
    """Return a task's `exact_reward`; `exact_value` judges one prefix of the trace of a prompt."""

    def exact_reward(prompt: str, prefixes: Sequence[str], *, epsilon: float = 1e-3) -> np.ndarray:
        """Return the prefixes' exact values, clipped to [epsilon, 1 - epsilon]: float64[len(prefixes)]."""
        return clipped([exact_value(prompt, prefix) for prefix in prefixes], epsilon)

    return exact_reward


def make_synthetic_reward(exact_value: Callable[[str, str], float]) -> Callable[..., np.ndarray]:
    """Return a task's `synthetic_reward`; `exact_value` judges one prefix of the trace of a prompt."""

    def synthetic_reward(
        prompt: str,
        prefixes: Sequence[str],
        *,
        noise: float,
        overconfidence: bool = False,
        epsilon: float = 0.1,
        seed: int = 0,
    ) -> np.ndarray:
        """Return scores of a *synthetic* reward model: exact values with noise; nothing here is learnt.

        See `ponder.tasks.synthetic_reward.noisy_scores` for the settings.
        """
        values = [exact_value(prompt, prefix) for prefix in prefixes]
        return noisy_scores(
            prompt, prefixes, values, noise=noise, overconfidence=overconfidence, epsilon=epsilon, seed=seed
        )

    return synthetic_reward
