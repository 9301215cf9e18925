"""Countdown with five numbers: longer traces, in which search must be lucky four times.

The same functions as `ponder.tasks.countdown`; only the problems, and with them the lengths, are others.
"""

from __future__ import annotations

import functools

from ponder.tasks import countdown
from ponder.tasks.countdown import (
    EOS_ID,
    PIECES,
    SPLIT,
    draw_problem,
    exact_reward,
    exact_value,
    extract_answer,
    grade,
    prompt_text,
    step_text,
    synthetic_reward,
)

__all__ = [
    "EOS_ID",
    "MAX_NEW_TOKENS",
    "NUM_STEPS",
    "PIECES",
    "SPLIT",
    "draw_problem",
    "exact_reward",
    "exact_value",
    "extract_answer",
    "grade",
    "problems",
    "prompt_text",
    "step_text",
    "synthetic_reward",
]

NUM_STEPS = 4
MAX_NEW_TOKENS = 37
"""Tokens of a whole trace: steps of 12, 10, 8 and 6, and EOS."""

draw_problem = functools.partial(draw_problem, num_numbers=5)
problems = functools.partial(countdown.problems, num_numbers=5)
