r"""Countdown: reach a target from some numbers; a reasoning task whose every step can be judged exactly.

A problem is four numbers in 1..20 and a target in 10..99, as the prompt `24 from 3 5 13 4`. A trace has three
steps `a op b = c r1 r2`: two of the numbers are replaced by a result in 1..99, and the step repeats the
numbers that remain, so that a step can be judged by the line before it:

    13 - 5 = 8 3 4
    8 * 3 = 24 4
    ...

More numbers (`ponder.tasks.countdown_five`) need as many more steps; the functions here take any count.
The last step leaves the target alone. Policies write false arithmetic when they are stuck and end on the
target all the same, so `grade` checks every step, and a vote on the last number means nothing.
"""

from __future__ import annotations

import functools
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
    "apply_step",
    "compute",
    "draw_problem",
    "draw_step",
    "draw_steps",
    "exact_reward",
    "exact_value",
    "extract_answer",
    "grade",
    "is_held_out",
    "parse_prompt",
    "parse_step",
    "problems",
    "prompt_text",
    "reachable",
    "step_text",
    "synthetic_reward",
]

NUM_NUMBERS = 4
NUM_STEPS = 3
LARGEST_NUMBER = 20
LARGEST_RESULT = 99
SMALLEST_TARGET = 10
OPERATIONS = "+-*"

PIECES = (*map(str, range(100)), " + ", " - ", " * ", " = ", " ", "\n", " from ", "", "")
"""Text of each token id: a number is its own id; at the end are the tokens without text, EOS and unknown."""

EOS_ID = len(PIECES) - 2
SPLIT = r"[0-9][0-9]?| [-+*=] | from | |\n"
"""Regular expression of one token."""

MAX_NEW_TOKENS = 25
"""Tokens of a whole trace: steps of 10, 8 and 6, and EOS."""

_TRIES = 256  # of drawing a step; a sixth or more of all steps are right, where any is

_NUMBER = "(?:0|[1-9][0-9]?)"
_PROMPT = re.compile(f"({_NUMBER}) from ({_NUMBER}(?: {_NUMBER})+)\n")
_STEP = re.compile(f"({_NUMBER}) ([-+*]) ({_NUMBER}) = ({_NUMBER}(?: {_NUMBER})*)")


class Problem(NamedTuple):
    """Numbers in the order in which the prompt shows them, and the target."""

    numbers: tuple[int, ...]
    target: int


class Step(NamedTuple):
    """`left operation right = written[0]`, and in the rest of `written` the numbers that remain."""

    left: int
    operation: str
    right: int
    written: tuple[int, ...]


def problems(
    seed: int, count: int, *, held_out: bool = True, num_numbers: int = NUM_NUMBERS
) -> list[Problem]:
    """Draw distinct problems that have a solution.

    Args:
        seed: the same seed gives the same problems.
        count: how many.
        held_out: from the tenth of all problems that no shipped model was trained on, else from the rest.
        num_numbers: of each problem, at least 2. Asking for more problems than there are does not end.

    Raises:
        ValueError: `num_numbers` is less than 2.
    """
    if num_numbers < 2:
        raise ValueError(f"num_numbers: expected at least 2, got {num_numbers}")
    return distinct_problems(
        lambda rng: draw_problem(rng, held_out=held_out, num_numbers=num_numbers)[0], seed, count
    )


def draw_problem(
    rng: np.random.Generator, *, held_out: bool, num_numbers: int = NUM_NUMBERS
) -> tuple[Problem, list[Step]]:
    """Draw numbers and random steps; what these leave is the target, so there is always a solution."""
    while True:
        numbers = tuple(int(n) for n in rng.integers(1, LARGEST_NUMBER + 1, num_numbers))
        steps = draw_steps(rng, numbers)
        if steps is None or steps[-1].written[0] < SMALLEST_TARGET:
            continue
        problem = Problem(numbers, steps[-1].written[0])
        if is_held_out(problem) == held_out:
            return problem, steps


def draw_steps(rng: np.random.Generator, numbers: Sequence[int]) -> list[Step] | None:
    """Draw right steps until one number is left; None if they come to where there is none."""
    steps: list[Step] = []
    while len(numbers) > 1:
        step = draw_step(rng, numbers)
        if step is None:
            return None
        steps.append(step)
        numbers = step.written
    return steps


def draw_step(rng: np.random.Generator, numbers: Sequence[int]) -> Step | None:
    """Draw one of the right steps from these numbers, larger operand first; None if there is none."""
    pairs = _pairs(len(numbers))
    for draw in rng.random(_TRIES):  # rejection: listing all steps takes ten times as long
        pair, kind = divmod(int(draw * len(pairs) * len(OPERATIONS)), len(OPERATIONS))
        first, second, _ = pairs[pair]
        left, right = max(numbers[first], numbers[second]), min(numbers[first], numbers[second])
        result = compute(left, OPERATIONS[kind], right)
        if 1 <= result <= LARGEST_RESULT:
            remaining = list(numbers)
            remaining.remove(left)
            remaining.remove(right)
            return Step(left, OPERATIONS[kind], right, (result, *remaining))
    return None


def is_held_out(problem: Problem) -> bool:
    """Whether a problem belongs to the test split: by a hash that does not see the numbers' order."""
    return in_test_split(f"{problem.target} {sorted(problem.numbers)}")


def prompt_text(problem: Problem) -> str:
    r"""Return the prompt, such as "24 from 3 5 13 4\n"."""
    return f"{problem.target} from {' '.join(map(str, problem.numbers))}\n"


def parse_prompt(prompt: str) -> Problem:
    """Read a prompt back.

    Raises:
        ValueError: it is not what `prompt_text` writes.
    """
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"prompt: expected a line such as '24 from 3 5 13 4\\n', got {prompt!r}.")
    target, numbers = match.groups()
    return Problem(tuple(map(int, numbers.split())), int(target))


def step_text(step: Step) -> str:
    r"""Return the line of a step, with its "\n"."""
    return f"{step.left} {step.operation} {step.right} = {' '.join(map(str, step.written))}\n"


def parse_step(line: str) -> Step | None:
    """Read a line without its newline; None if it is not a step. Whether it is right is not looked at."""
    match = _STEP.fullmatch(line)
    if match is None:
        return None
    left, operation, right, written = match.groups()
    return Step(int(left), operation, int(right), tuple(map(int, written.split())))


def apply_step(numbers: Sequence[int], step: Step) -> tuple[int, ...] | str:
    """Return the numbers after a step, or what is wrong with it.

    Operands must be among the numbers (in any order), the result must be right and in 1..99, and the
    repeated numbers must be those that remain, in any order.
    """
    remaining = list(numbers)
    for operand in (step.left, step.right):
        if operand not in remaining:
            return f"{operand} is not among the numbers"
        remaining.remove(operand)
    result = compute(step.left, step.operation, step.right)
    if result != step.written[0]:
        return f"{step.left} {step.operation} {step.right} is {result}"
    if not 1 <= result <= LARGEST_RESULT:
        return f"{result} is not in 1..{LARGEST_RESULT}"
    if sorted(step.written[1:]) != sorted(remaining):
        return f"what remains is {remaining}"
    return step.written


def grade(prompt: str, trace: str) -> Grade:
    r"""Judge a whole trace: every step, and that the last one leaves the target alone.

    Args:
        prompt: as `prompt_text` writes it.
        trace: the text after the prompt; the last "\n" may be missing.
    """
    problem = parse_prompt(prompt)
    state, num_right, reason = _follow(problem.numbers, trace_lines(trace))
    if not reason and len(state) != 1:
        reason = f"expected {len(problem.numbers) - 1} steps, got {num_right}"
    if not reason and state != (problem.target,):
        reason = f"the last number is {state[0]}, and the target {problem.target}"
    return Grade(not reason, num_right, reason)


def extract_answer(prompt: str, trace: str) -> str | None:
    """Return the expression of a correct trace, such as "((13 - 5) * 3) + 4"; None if it is wrong.

    The operands of each + and * are put in order, so that traces which differ in that agree; sums of
    sums that are nested in another way do not.
    """
    if not grade(prompt, trace).correct:
        return None
    built = [(number, str(number)) for number in parse_prompt(prompt).numbers]
    for line in trace_lines(trace):
        step = parse_step(line)
        assert step is not None
        operands = []
        for number in (step.left, step.right):
            operands.append(next(pair for pair in built if pair[0] == number))
            built.remove(operands[-1])
        if step.operation != "-":
            operands.sort(key=lambda pair: (-pair[0], pair[1]))
        built.append((step.written[0], f"({operands[0][1]} {step.operation} {operands[1][1]})"))
    return built[0][1][1:-1]


def exact_value(prompt: str, prefix: str) -> float:
    r"""Return what an ideal process reward model says: 1 if all is right and the target can be reached.

    Args:
        prompt: as `prompt_text` writes it.
        prefix: none, some or all of the steps, each with its "\n"; a line without it is a wrong step.

    Returns:
        1.0 if every step is right and some continuation ends on the target, else 0.0. Whether the trace has
        ended, so that nothing can continue it, is not known here: `grade` judges whole traces.
    """
    problem = parse_prompt(prompt)
    if prefix and not prefix.endswith("\n"):
        return 0.0
    state, _, reason = _follow(problem.numbers, prefix.split("\n")[:-1])
    return float(not reason and problem.target in reachable(state))


exact_reward = make_exact_reward(exact_value)
synthetic_reward = make_synthetic_reward(exact_value)


def reachable(numbers: Sequence[int]) -> frozenset[int]:
    """Return all results that numbers can be combined to, each used once."""
    return _reachable(tuple(sorted(numbers)))


@functools.lru_cache(maxsize=1 << 18)
def _reachable(numbers: tuple[int, ...]) -> frozenset[int]:
    if len(numbers) == 1:
        return frozenset(numbers)
    found: set[int] = set()
    for first, second, rest in _pairs(len(numbers)):
        left, right = numbers[second], numbers[first]
        others = [numbers[k] for k in rest]
        for operation in OPERATIONS:
            result = compute(left, operation, right)
            if 1 <= result <= LARGEST_RESULT:
                found |= reachable((result, *others))
    return frozenset(found)


@functools.cache
def _pairs(count: int) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """Places of two of `count` numbers, the first before the second, and of the others."""
    places = range(count)
    return tuple(
        (i, j, tuple(k for k in places if k not in (i, j))) for i in places for j in range(i + 1, count)
    )


def _follow(numbers: tuple[int, ...], lines: Sequence[str]) -> tuple[tuple[int, ...], int, str]:
    """Apply lines until one is wrong: the numbers then, how many lines were right, and what is wrong."""
    state = numbers
    for i, line in enumerate(lines):
        step = parse_step(line)
        if step is None:
            return state, i, f"step {i + 1} is not of the form 'a op b = c ...'"
        after = apply_step(state, step)
        if isinstance(after, str):
            return state, i, f"step {i + 1}: {after}"
        state = after
    return state, len(lines), ""


def compute(left: int, operation: str, right: int) -> int:
    """Return the result of an operation, in range or not."""
    if operation == "+":
        return left + right
    return left - right if operation == "-" else left * right
