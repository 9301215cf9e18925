"""Operation chains: problems, and the grader against each kind of wrong step."""

import numpy as np
import pytest

from ponder.tasks import operation_chain as chain
from ponder.tasks.operation_chain import Step

PROMPT = "47+8*3-2+9*7-9*4+6\n"
LINES = ["+8=55\n", "*3=65\n", "-2=63\n", "+9=72\n", "*7=04\n", "-9=95\n", "*4=80\n", "+6=86\n"]
TRACE = "".join(LINES)


def test_problems_are_a_function_of_the_seed():
    assert chain.problems(3, 40) == chain.problems(3, 40)
    assert chain.problems(3, 40) != chain.problems(4, 40)


def test_splits_are_disjoint():
    tested, trained = chain.problems(0, 100), chain.problems(0, 400, held_out=False)
    assert all(map(chain.is_held_out, tested)) and not any(map(chain.is_held_out, trained))


def test_prompt_and_step_round_trip():
    for problem in chain.problems(1, 20):
        assert chain.parse_prompt(chain.prompt_text(problem)) == problem
    assert chain.parse_step("*7=04") == Step("*", 7, 4) and chain.step_text(Step("*", 7, 4)) == "*7=04\n"
    with pytest.raises(ValueError, match=r"prompt: expected a line such as .*, got '47"):
        chain.parse_prompt("47+8\n")


def test_solution_against_python():
    for problem in chain.problems(2, 50):
        value = problem.start
        for step in chain.solution(problem):
            value = eval(f"({value} {step.operation} {step.digit}) % 100")
            assert step.value == value
        trace = "".join(map(chain.step_text, chain.solution(problem)))
        assert chain.grade(chain.prompt_text(problem), trace) == (True, 8, "")
        assert chain.extract_answer(chain.prompt_text(problem), trace) == f"{value:02d}"


@pytest.mark.parametrize(
    ("trace", "num_right", "reason"),
    [
        (TRACE, 8, ""),
        (TRACE.removesuffix("\n"), 8, ""),
        (TRACE.replace("*3=65", "*3=66"), 1, "step 2: the value is 65"),
        (TRACE.replace("+6=86", "+6=85"), 7, "step 8: the value is 86"),
        (TRACE.replace("-2=63", "-3=62"), 2, "step 3: the term is -2"),
        (TRACE.replace("-2=63", "+2=67"), 2, "step 3: the term is -2"),
        (TRACE.replace("*7=04", "*7=4"), 4, "step 5 is not of the form '+8=55'"),
        ("".join(LINES[:7]), 7, "expected 8 steps, got 7"),
        ("".join([*LINES[:3], *LINES[4:]]), 3, "step 4: the term is +9"),
        (TRACE + "+6=92\n", 8, "step 9: there are only 8 terms"),
        (TRACE + "\n", 8, "step 9 is not of the form '+8=55'"),
        ("", 0, "expected 8 steps, got 0"),
    ],
)
def test_grade(trace, num_right, reason):
    assert chain.grade(PROMPT, trace) == (reason == "", num_right, reason)


def test_a_lucky_last_value_does_not_count():
    """From 65 to 15 and back: *4 forgets the difference of 50."""
    lucky = TRACE.replace("-9=95", "-9=45")
    assert chain.extract_answer(PROMPT, lucky) == "86" and not chain.grade(PROMPT, lucky).correct


def test_exact_value():
    for count in range(9):
        assert chain.exact_value(PROMPT, "".join(LINES[:count])) == 1.0
    assert chain.exact_value(PROMPT, "+8=55") == 0.0  # the step has not ended
    assert chain.exact_value(PROMPT, "+8=56\n") == 0.0
    assert chain.exact_value(PROMPT, "+8=56\n*3=68\n") == 0.0  # right after a wrong one
    np.testing.assert_allclose(chain.exact_reward(PROMPT, ["+8=55\n", "+8=56\n"]), [0.999, 0.001])


def test_synthetic_reward():
    prefixes = ["".join(LINES[:count]) for count in range(1, 9)]
    rewards = chain.synthetic_reward(PROMPT, prefixes, noise=1.0)
    assert len(set(rewards)) == 8 and ((rewards > 0) & (rewards < 1)).all()
    early = chain.synthetic_reward(PROMPT, prefixes, noise=1.0, overconfidence=True)
    np.testing.assert_allclose(early[2:], 0.9)
    assert early[0] == early[1]
