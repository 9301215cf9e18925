"""Countdown: problems, the grader against each kind of wrong step, and exact values against brute force."""

import itertools
import re

import numpy as np
import pytest

from ponder.tasks import countdown, countdown_five
from ponder.tasks.countdown import Problem, Step
from ponder.tasks.synthetic_reward import noise_for_auc, noisy_scores
from ponder.tasks.training.countdown_labels import LENGTHS, NEWLINES, corrupted_trace, label_trace

PROBLEM = Problem((3, 5, 13, 4), 28)
PROMPT = "28 from 3 5 13 4\n"
TRACE = "13 - 5 = 8 3 4\n8 * 3 = 24 4\n24 + 4 = 28\n"


def test_problems_are_a_function_of_the_seed():
    assert countdown.problems(3, 40) == countdown.problems(3, 40)
    assert countdown.problems(3, 40) != countdown.problems(4, 40)
    assert len(set(countdown.problems(3, 40))) == 40


def test_splits_are_disjoint_whatever_the_order_of_the_numbers():
    tested, trained = countdown.problems(0, 100), countdown.problems(0, 400, held_out=False)
    assert all(map(countdown.is_held_out, tested)) and not any(map(countdown.is_held_out, trained))
    for problem in (*tested[:10], *trained[:10]):
        for order in itertools.permutations(problem.numbers):
            assert countdown.is_held_out(Problem(order, problem.target)) == countdown.is_held_out(problem)


def test_training_draws_no_held_out_problem():
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert not countdown.is_held_out(countdown.draw_problem(rng, held_out=False)[0])
        assert not countdown.is_held_out(corrupted_trace(rng)[0])


def test_drawn_traces_are_correct():
    rng = np.random.default_rng(1)
    for _ in range(100):
        problem, steps = countdown.draw_problem(rng, held_out=True)
        prompt, trace = countdown.prompt_text(problem), "".join(map(countdown.step_text, steps))
        assert countdown.grade(prompt, trace) == (True, 3, "")
        expression = countdown.extract_answer(prompt, trace)
        assert expression is not None and eval(expression) == problem.target
        assert sorted(
            int(n) for n in expression.translate(dict.fromkeys(map(ord, "()+-*"), " ")).split()
        ) == (sorted(problem.numbers))


def test_five_numbers_are_the_same_task_with_a_step_more():
    rng = np.random.default_rng(5)
    for _ in range(20):
        problem, steps = countdown_five.draw_problem(rng, held_out=True)
        prompt, trace = countdown.prompt_text(problem), "".join(map(countdown.step_text, steps))
        assert len(problem.numbers) == 5 and countdown.parse_prompt(prompt) == problem
        assert countdown_five.grade(prompt, trace) == (True, countdown_five.NUM_STEPS, "")
        assert len(re.findall(countdown.SPLIT, trace)) + 1 == countdown_five.MAX_NEW_TOKENS
        short = trace[: trace.index("\n") + 1]
        assert countdown_five.grade(prompt, short).reason == "expected 4 steps, got 1"
        assert countdown_five.exact_value(prompt, short) == 1.0
    assert all(len(problem.numbers) == 5 for problem in countdown_five.problems(0, 10))


def test_prompt_and_step_round_trip():
    assert countdown.prompt_text(PROBLEM) == PROMPT and countdown.parse_prompt(PROMPT) == PROBLEM
    step = countdown.parse_step("13 - 5 = 8 3 4")
    assert step is not None and step == Step(13, "-", 5, (8, 3, 4))
    assert countdown.step_text(step) == "13 - 5 = 8 3 4\n"
    with pytest.raises(ValueError, match=r"prompt: expected a line such as .*, got '28 from 3 5'"):
        countdown.parse_prompt("28 from 3 5")


@pytest.mark.parametrize(
    ("trace", "num_right", "reason"),
    [
        (TRACE, 3, ""),
        (TRACE.removesuffix("\n"), 3, ""),
        ("5 + 13 = 18 4 3\n18 + 3 = 21 4\n21 + 4 = 25\n", 3, "the last number is 25, and the target 28"),
        ("13 - 5 = 9 3 4\n9 * 3 = 27 4\n24 + 4 = 28\n", 0, "step 1: 13 - 5 is 8"),
        ("13 - 6 = 7 3 4\n7 * 4 = 28 3\n", 0, "step 1: 6 is not among the numbers"),
        ("13 - 13 = 0 5 3\n", 0, "step 1: 13 is not among the numbers"),
        ("13 - 5 = 8 3 5\n", 0, "step 1: what remains is [3, 4]"),
        ("13 - 5 = 8 3\n8 * 3 = 24\n", 0, "step 1: what remains is [3, 4]"),
        ("13 - 5 = 8 3 4\n8 * 3 = 24 3\n", 1, "step 2: what remains is [4]"),
        ("13 - 5 = 8 3 4\n8 * 3 = 24 4\n24 + 4 = 29\n", 2, "step 3: 24 + 4 is 28"),
        ("3 - 5 = 2 13 4\n", 0, "step 1: 3 - 5 is -2"),
        ("13 - 5 = 8 3 4\n8 * 13 = 99 4\n", 1, "step 2: 13 is not among the numbers"),
        ("13 - 5 = 8 3 4\n8 * 3 = 24 4\n", 2, "expected 3 steps, got 2"),
        ("", 0, "expected 3 steps, got 0"),
        ("13 - 05 = 8 3 4\n", 0, "step 1 is not of the form 'a op b = c ...'"),
        ("\u0661\u0663 - 5 = 8 3 4\n", 0, "step 1 is not of the form 'a op b = c ...'"),
        ("13 / 5 = 8 3 4\n", 0, "step 1 is not of the form 'a op b = c ...'"),
        (TRACE + "28 + 0 = 28\n", 3, "step 4: 0 is not among the numbers"),
        (TRACE + "\n", 3, "step 4 is not of the form 'a op b = c ...'"),
    ],
)
def test_grade(trace, num_right, reason):
    assert countdown.grade(PROMPT, trace) == (reason == "", num_right, reason)
    assert (countdown.extract_answer(PROMPT, trace) is not None) == (reason == "")


def test_results_out_of_range_are_wrong():
    assert countdown.grade("60 from 20 20 2 2\n", "20 - 20 = 0 2 2\n").reason == "step 1: 0 is not in 1..99"


def test_answers_agree_whatever_the_order():
    other = "8 * 3 = 24 4\n".join(["13 - 5 = 8 4 3\n", "4 + 24 = 28\n"])
    assert countdown.extract_answer(PROMPT, other) == countdown.extract_answer(PROMPT, TRACE)
    assert countdown.extract_answer(PROMPT, TRACE) == "((13 - 5) * 3) + 4"


def brute_force(numbers):
    """All results, by trying every ordered pair and operation."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        for result in (a + b, a - b, a * b):
            if 1 <= result <= 99:
                found |= brute_force([result, *rest])
    return found


def test_reachable_is_brute_force():
    rng = np.random.default_rng(2)
    for size in (1, 2, 3, 3, 4, 4, 5):
        numbers = sorted(rng.integers(1, 21, size).tolist())
        assert countdown.reachable(tuple(numbers)) == brute_force(numbers)


def test_exact_value_is_that_some_continuation_is_correct():
    """Against all continuations of right and wrong prefixes."""

    def continuations(state, steps):
        if len(state) == 1:
            yield steps
            return
        for i, j in itertools.combinations(range(len(state)), 2):
            rest = [n for k, n in enumerate(state) if k not in (i, j)]
            a, b = max(state[i], state[j]), min(state[i], state[j])
            for operation, result in (("+", a + b), ("-", a - b), ("*", a * b)):
                step = Step(a, operation, b, (result, *rest))
                yield from continuations(step.written, [*steps, step])

    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(40):
        problem, steps = corrupted_trace(rng)
        prompt = countdown.prompt_text(problem)
        for count in (1, 2, 3):
            prefix = "".join(map(countdown.step_text, steps[:count]))
            possible = any(
                countdown.grade(prompt, prefix + "".join(map(countdown.step_text, more))).correct
                for more in continuations(steps[count - 1].written, [])
            )
            assert countdown.exact_value(prompt, prefix) == float(possible)
            seen.add(possible)
    assert seen == {True, False}


def test_labels_agree_with_exact_values():
    rng = np.random.default_rng(4)
    assert tuple(np.cumsum(LENGTHS) - 1) == NEWLINES
    for i in range(60):
        wrong = i % 2 == 1
        problem, steps = corrupted_trace(rng) if wrong else countdown.draw_problem(rng, held_out=False)
        labels = label_trace(problem, steps)
        prompt = countdown.prompt_text(problem)
        texts = ["".join(map(countdown.step_text, steps[: k + 1])) for k in range(3)]
        assert labels["viable"].tolist() == [countdown.exact_value(prompt, text) for text in texts]
        assert labels["valid"][-1] == (not wrong)
        assert (np.diff(labels["valid"]) <= 0).all()


def test_exact_value_of_whole_and_unfinished_steps():
    assert countdown.exact_value(PROMPT, "") == countdown.exact_value(PROMPT, TRACE) == 1.0
    assert countdown.exact_value(PROMPT, "13 - 5 = 8 3 4\n") == 1.0
    assert countdown.exact_value(PROMPT, "13 - 5 = 8 3 4") == 0.0
    assert countdown.exact_value(PROMPT, TRACE + "28 + 0 = 28\n") == 0.0


def test_exact_reward_is_clipped():
    rewards = countdown.exact_reward(PROMPT, ["13 - 5 = 8 3 4\n", "13 - 5 = 7 3 4\n"], epsilon=0.01)
    np.testing.assert_allclose(rewards, [0.99, 0.01])
    with pytest.raises(ValueError, match=r"epsilon: expected a number between 0 and 0\.5, got 0\.5"):
        countdown.exact_reward(PROMPT, [""], epsilon=0.5)


def test_synthetic_reward_is_a_function_of_the_trace():
    prefixes = ["13 - 5 = 8 3 4\n", "13 - 5 = 8 3 4\n8 * 3 = 24 4\n", TRACE]
    rewards = countdown.synthetic_reward(PROMPT, prefixes, noise=2.0)
    np.testing.assert_array_equal(
        rewards[::-1], countdown.synthetic_reward(PROMPT, prefixes[::-1], noise=2.0)
    )
    assert not np.isclose(rewards, countdown.synthetic_reward(PROMPT, prefixes, noise=2.0, seed=1)).any()
    np.testing.assert_allclose(countdown.synthetic_reward(PROMPT, prefixes, noise=0.0), 0.9)


def test_overconfidence_is_early_and_shared_by_a_lineage():
    same = ["a\nb\n", "a\nc\n", "d\nb\n", "a\nb\nc\n"]
    early = noisy_scores("p", same, [0.6] * 4, noise=1.0, overconfidence=True)
    assert early[0] == early[1] != early[2] and early[3] == pytest.approx(0.6)
    quiet = noisy_scores("p", same, [0.9] * 4, noise=0.0, overconfidence=True)
    np.testing.assert_allclose(np.log(quiet / (1 - quiet)), np.log(9) * np.array([4, 4, 4, 1]), rtol=1e-6)


def test_noise_gives_the_area_under_the_curve():
    """10000 pairs: the standard error is below 0.004."""
    noise = noise_for_auc(0.85)
    prefixes = [f"{i}\n" for i in range(10000)]
    good = noisy_scores("p", prefixes, [1.0] * 10000, noise=noise)
    bad = noisy_scores("q", prefixes, [0.0] * 10000, noise=noise)
    assert abs(np.mean(good > bad) - 0.85) < 0.02


def test_a_problem_has_two_numbers_or_more():
    assert countdown.grade("12 from 3 4\n", "4 * 3 = 12\n").correct
    with pytest.raises(ValueError, match="num_numbers: expected at least 2, got 1"):
        countdown.problems(0, 1, num_numbers=1)
