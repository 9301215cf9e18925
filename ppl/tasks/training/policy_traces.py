"""Traces that a policy writes of training problems, and their steps: what reward models learn to judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ponder.models.language_model import DecoderLM
from ponder.models.loading.checkpoint_export import encoder
from ponder.tasks.training.fitting import sample_traces

__all__ = ["parse_trace", "policy_traces"]


def policy_traces(
    policy: DecoderLM, task: Any, num_problems: int, num_samples: int, seed: int
) -> list[tuple[Any, list[list[int]]]]:
    """Draw traces of problems that are not held out.

    Args:
        policy: the model.
        task: the module of the task.
        num_problems: of them.
        num_samples: for each.
        seed: of problems and traces.

    Returns:
        Each problem with its traces as ids, as long as a whole trace without EOS.
    """
    encode = encoder(task.PIECES, task.SPLIT)
    found = task.problems(seed, num_problems, held_out=False)
    prompts = np.asarray([encode(task.prompt_text(problem)) for problem in found])
    traces = sample_traces(policy, prompts, num_samples, task.MAX_NEW_TOKENS - 1, seed)
    return [(problem, rows.tolist()) for problem, rows in zip(found, traces, strict=True)]


def parse_trace(task: Any, ids: Sequence[int]) -> list[Any] | None:
    """Return the steps of a trace, right or wrong; None if it is not as many lines as the task has steps."""
    lines = "".join(task.PIECES[i] for i in ids).split("\n")
    steps = [step for step in map(task.parse_step, lines[:-1]) if step is not None]
    return steps if len(steps) == len(lines) - 1 == task.NUM_STEPS and not lines[-1] else None
