"""Exact training labels for traces of countdown, right and wrong ones, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ponder.tasks import countdown
from ponder.tasks.countdown import LARGEST_RESULT, NUM_STEPS, OPERATIONS, Problem, Step, compute, reachable

__all__ = ["LENGTHS", "NEWLINES", "corrupt", "corrupted_trace", "label_trace"]

LENGTHS = (10, 8, 6)
"""Tokens of each step: `a`, ` op `, `b`, ` = `, `c`, a blank and a number for each that remains, newline."""

NEWLINES = (9, 17, 23)
"""Where in a trace the steps end."""


def corrupted_trace(rng: np.random.Generator) -> tuple[Problem, list[Step]]:
    """Draw a trace with a changed step, almost always a wrong one, and what it leaves as the target.

    So do policies that are stuck: they write what leads to the target.
    """
    while True:
        problem, _ = countdown.draw_problem(rng, held_out=False)
        state, steps = problem.numbers, []
        wrong = int(rng.integers(NUM_STEPS))
        while len(steps) < NUM_STEPS and (step := countdown.draw_step(rng, state)) is not None:
            steps.append(corrupt(rng, step, state) if len(steps) == wrong else step)
            state = steps[-1].written
        if len(steps) == NUM_STEPS and state[0] >= countdown.SMALLEST_TARGET:
            problem = Problem(problem.numbers, state[0])
            if not countdown.is_held_out(problem):
                return problem, steps


def corrupt(rng: np.random.Generator, step: Step, state: Sequence[int]) -> Step:
    """Change the result, a number that remains, or an operand, in a way that a policy might."""
    kind = rng.random()
    left, operation, right, (result, *rest) = step
    if kind < 0.7 or not rest:
        if rng.random() < 0.25:  # the result of something else that can be done
            other = countdown.draw_step(rng, state)
            changed = result if other is None else other.written[0]
        elif rng.random() < 0.6:
            changed = result + int(rng.choice([-20, -10, -5, -3, -2, -1, 1, 2, 3, 5, 10, 20]))
        else:
            changed = int(rng.integers(1, LARGEST_RESULT + 1))
        if not 1 <= changed <= LARGEST_RESULT or changed == result:
            changed = result % LARGEST_RESULT + 1
        return step._replace(written=(changed, *rest))
    if kind < 0.9:
        place = int(rng.integers(len(rest)))
        near = [v for d in (-2, -1, 1, 2) if 1 <= (v := rest[place] + d) <= LARGEST_RESULT]
        values = [*state, *near, int(rng.integers(1, countdown.LARGEST_NUMBER + 1))]
        rest[place] = int(rng.choice([v for v in values if v != rest[place]]))
        return step._replace(written=(result, *rest))
    wrong = int(rng.integers(1, countdown.LARGEST_NUMBER + 1))
    left, right = max(wrong, right), min(wrong, right)
    value = compute(left, str(rng.choice(list(OPERATIONS))), right)
    changed = value if 1 <= value <= LARGEST_RESULT else left
    return Step(left, operation, right, (changed, *rest))


def label_trace(problem: Problem, steps: Sequence[Step]) -> dict[str, np.ndarray]:
    """Return labels of the C tokens and S steps of a trace, whole or not.

    A wrong step is judged and then taken as written.

    Returns:
        correct, correct_weight: [C]; the number that should stand where a result or a remaining number
            does, given the line before and the operands; weight 1 where that is defined.
        result, result_weight: [C]; the right result of this step, at the written result and the newline.
        valid: [C]; 1 while all that is written is right.
        reach: [S, 100]; 1 for the numbers that the written state can be combined to.
        target: [S]; 1 if the target is among them.
        viable: [S]; 1 if all is right so far and the target can be reached.
    """
    length, num_steps = sum(LENGTHS[: len(steps)]), len(steps)
    correct, result_at = np.zeros(length, np.int32), np.zeros(length, np.int32)
    correct_weight, result_weight = np.zeros(length, np.float32), np.zeros(length, np.float32)
    valid = np.zeros(length, np.float32)
    reach = np.zeros((num_steps, 100), np.float32)
    viable, target = np.zeros(num_steps, np.float32), np.zeros(num_steps, np.float32)
    state, right, at = problem.numbers, True, 0
    for i, step in enumerate(steps):
        remaining = list(state)
        for place, operand in ((at, step.left), (at + 2, step.right)):
            right = right and operand in remaining
            if operand in remaining:
                remaining.remove(operand)
            valid[place : place + 2] = right
        value = compute(step.left, step.operation, step.right)
        possible = 1 <= value <= LARGEST_RESULT
        right = right and possible
        valid[at + 3] = right
        right = right and value == step.written[0]
        valid[at + 4] = right
        if possible:
            correct[at + 4] = value
            result_at[[at + 4, at + LENGTHS[i] - 1]] = value
            correct_weight[at + 4] = 1
            result_weight[[at + 4, at + LENGTHS[i] - 1]] = 1
        known = len(remaining) == len(step.written) - 1
        pool = list(remaining)
        for j, number in enumerate(step.written[1:]):
            place = at + 6 + 2 * j
            if known:
                correct[place], correct_weight[place] = remaining[j], 1
            valid[place - 1] = right
            right = right and number in pool
            if number in pool:
                pool.remove(number)
            valid[place] = right
        newline = at + LENGTHS[i] - 1
        valid[newline] = right
        found = reachable(step.written)
        reach[i, [n for n in found if n < 100]] = 1
        target[i] = problem.target in found
        viable[i] = right and target[i]
        state, at = step.written, newline + 1
    return {
        "correct": correct,
        "correct_weight": correct_weight,
        "result": result_at,
        "result_weight": result_weight,
        "valid": valid,
        "reach": reach,
        "target": target,
        "viable": viable,
    }
