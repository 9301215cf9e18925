"""What all tasks have in common."""

import subprocess
import sys

import numpy as np
import pytest

from ponder.tasks import countdown, countdown_five, grading, operation_chain


def test_tasks_are_reached_from_the_package_without_jax():
    code = (
        "import sys, ponder\n"
        "assert ponder.tasks.countdown.grade('12 from 3 4\\n', '4 * 3 = 12\\n').correct\n"
        "assert ponder.tasks.countdown_five.NUM_STEPS == 4 and ponder.tasks.operation_chain.NUM_STEPS == 8\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("task", [countdown, countdown_five, operation_chain], ids=lambda task: task.__name__)
def test_they_have_the_same_functions(task):
    """What the benchmarks and the training of reward models ask of a task."""
    (problem,) = task.problems(0, 1)
    prompt = task.prompt_text(problem)
    assert task.exact_value(prompt, "") == 1.0
    grade = task.grade(prompt, "")
    assert grade == grading.Grade(False, 0, f"expected {task.NUM_STEPS} steps, got 0")
    assert task.extract_answer(prompt, "") is None
    np.testing.assert_allclose(task.exact_reward(prompt, ["", "?\n"]), [0.999, 0.001])
    np.testing.assert_allclose(task.synthetic_reward(prompt, ["", "?\n"], noise=0.0), [0.9, 0.1])
    for function in (task.exact_reward, task.synthetic_reward):
        assert function.__doc__
    assert task.PIECES[task.EOS_ID] == "" and task.MAX_NEW_TOKENS > task.NUM_STEPS
