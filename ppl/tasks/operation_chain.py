r"""Operation chain: eight operations on a running value modulo 100; a task of many easy steps.

A problem is a start in 10..99 and eight terms of an operation and a digit in 2..9, as the prompt
`47+8*3-2+9*7-5*4+6`. A trace has one step for each term, which repeats it and states the value so far:

    +8=55
    *3=65
    ...

One slip is carried to the end, so a trace is right only if every step is; `grade` checks them all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ponder.tasks.grading import (
    Grade,
    distinct_problems,
    in_test_split,
    make_exact_reward,
    make_synthetic_reward,
    trace_lines,
)

__all__ = [
    "EOS_ID",
    "MAX_NEW_TOKENS",
    "NUM_STEPS",
    "PIECES",
    "SPLIT",
    "Grade",
    "Problem",
    "Step",
    "apply_term",
    "draw_problem",
    "exact_reward",
    "exact_value",
    "extract_answer",
    "grade",
    "is_held_out",
    "parse_prompt",
    "parse_step",
    "problems",
    "prompt_text",
    "solution",
    "step_text",
    "synthetic_reward",
]

NUM_STEPS = 8
MODULUS = 100
SMALLEST_DIGIT, LARGEST_DIGIT = 2, 9
OPERATIONS = "+-*"

PIECES = (*"0123456789", *"+-*=", "\n", "", "")
"""Text of each token id: single characters; at the end are the tokens without text, EOS and unknown."""

EOS_ID = len(PIECES) - 2
SPLIT = r"[0-9+*=\n-]"
"""Regular expression of one token."""

MAX_NEW_TOKENS = 6 * NUM_STEPS + 1
"""Tokens of a whole trace: steps of six, and EOS."""

_PROMPT = re.compile(rf"([1-9][0-9])((?:[-+*][2-9]){{{NUM_STEPS}}})\n")
_STEP = re.compile(r"([-+*])([0-9])=([0-9][0-9])")


class Problem(NamedTuple):
    """The start and the terms, each an operation and a digit."""

    start: int
    terms: tuple[tuple[str, int], ...]


class Step(NamedTuple):
    """A term, and the value that is stated after it."""

    operation: str
    digit: int
    value: int


def problems(seed: int, count: int, *, held_out: bool = True) -> list[Problem]:
    """Draw distinct problems.

    Args:
        seed: the same seed gives the same problems.
        count: how many.
        held_out: from the tenth of all problems that no shipped model was trained on, else from the rest.
    """
    return distinct_problems(lambda rng: draw_problem(rng, held_out=held_out), seed, count)


def draw_problem(rng: np.random.Generator, *, held_out: bool) -> Problem:
    """Draw a problem from one of the two splits."""
    while True:
        operations = rng.integers(len(OPERATIONS), size=NUM_STEPS)
        digits = rng.integers(SMALLEST_DIGIT, LARGEST_DIGIT + 1, NUM_STEPS)
        terms = tuple((OPERATIONS[o], int(d)) for o, d in zip(operations, digits, strict=True))
        problem = Problem(int(rng.integers(10, MODULUS)), terms)
        if is_held_out(problem) == held_out:
            return problem


def is_held_out(problem: Problem) -> bool:
    """Whether a problem belongs to the test split, by its hash."""
    return in_test_split(prompt_text(problem))


def prompt_text(problem: Problem) -> str:
    r"""Return the prompt, such as `"47+8*3-2+9*7-9*4+6\n"`."""
    return f"{problem.start}{''.join(f'{operation}{digit}' for operation, digit in problem.terms)}\n"


def parse_prompt(prompt: str) -> Problem:
    """Read a prompt back.

    Raises:
        ValueError: it is not what `prompt_text` writes.
    """
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"prompt: expected a line such as '47+8*3-2+9*7-9*4+6\\n', got {prompt!r}.")
    start, terms = match.groups()
    return Problem(int(start), tuple((terms[i], int(terms[i + 1])) for i in range(0, len(terms), 2)))


def apply_term(value: int, operation: str, digit: int) -> int:
    """Return the value after a term, modulo 100."""
    if operation == "+":
        return (value + digit) % MODULUS
    return (value - digit if operation == "-" else value * digit) % MODULUS


def solution(problem: Problem) -> list[Step]:
    """Return the right steps; there is one right trace."""
    steps, value = [], problem.start
    for operation, digit in problem.terms:
        value = apply_term(value, operation, digit)
        steps.append(Step(operation, digit, value))
    return steps


def step_text(step: Step) -> str:
    r"""Return the line of a step, with its "\n"."""
    return f"{step.operation}{step.digit}={step.value:02d}\n"


def parse_step(line: str) -> Step | None:
    """Read a line without its newline; None if it is not a step. Whether it is right is not looked at."""
    match = _STEP.fullmatch(line)
    return None if match is None else Step(match[1], int(match[2]), int(match[3]))


def grade(prompt: str, trace: str) -> Grade:
    r"""Judge a whole trace: every term is repeated and every value right.

    Args:
        prompt: as `prompt_text` writes it.
        trace: the text after the prompt; the last "\n" may be missing.
    """
    num_right, reason = _follow(parse_prompt(prompt), trace_lines(trace))
    if not reason and num_right < NUM_STEPS:
        reason = f"expected {NUM_STEPS} steps, got {num_right}"
    return Grade(not reason, num_right, reason)


def extract_answer(prompt: str, trace: str) -> str | None:
    """Return the two digits that a trace ends on, right or wrong; None if its last line is not a step.

    Args:
        prompt: not needed here; tasks have the same functions.
        trace: the text after the prompt.
    """
    step = parse_step(trace.removesuffix("\n").split("\n")[-1])
    return None if step is None else f"{step.value:02d}"


def exact_value(prompt: str, prefix: str) -> float:
    r"""Return what an ideal process reward model says: 1.0 if all steps so far are right, else 0.0.

    Args:
        prompt: as `prompt_text` writes it.
        prefix: none, some or all of the steps, each with its "\n"; a line without it is a wrong step.
    """
    problem = parse_prompt(prompt)
    if prefix and not prefix.endswith("\n"):
        return 0.0
    return float(not _follow(problem, prefix.split("\n")[:-1])[1])


exact_reward = make_exact_reward(exact_value)
synthetic_reward = make_synthetic_reward(exact_value)


def _follow(problem: Problem, lines: Sequence[str]) -> tuple[int, str]:
    """Check lines until one is wrong: how many were right, and what is wrong."""
    steps = solution(problem)
    for i, line in enumerate(lines):
        step = parse_step(line)
        if step is None:
            return i, f"step {i + 1} is not of the form '+8=55'"
        if i >= NUM_STEPS:
            return i, f"step {i + 1}: there are only {NUM_STEPS} terms"
        if step[:2] != steps[i][:2]:
            return i, f"step {i + 1}: the term is {steps[i].operation}{steps[i].digit}"
        if step != steps[i]:
            return i, f"step {i + 1}: the value is {steps[i].value:02d}"
    return len(lines), ""
