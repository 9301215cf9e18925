"""The posterior over answers: numbers by hand, then standard errors over many runs (|z| < 5, fixed keys)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.posterior.answers import Answers
from ponder.testing import MAX_Z, z_scores

PIECES = (b"x=1", b"x=2", b"what", b"so x=1", b"<b>$", b"")


@pytest.fixture
def make(make_posterior):
    """A posterior of one-token traces, after two steps."""
    return functools.partial(make_posterior, pieces=PIECES, num_steps=np.int32(2))


def value(text):
    return int(text.rpartition("=")[2]) if "=" in text else None


def history(ancestors, resampled) -> dict[str, Any]:
    return {"ancestors": np.asarray(ancestors, np.int32), "resampled": np.asarray(resampled)}


def test_answers_are_added_up(make):
    answers = make([0, 1, 2, 3, 1], [0.1, 0.2, 0.3, 0.4, 0.0]).answers(value)
    assert isinstance(answers, Answers) and len(answers) == 3
    assert answers.answers == (1, None, 2)
    np.testing.assert_allclose(answers.probability, [0.5, 0.3, 0.2], atol=1e-7)
    assert answers.probability.dtype == answers.standard_error.dtype == np.float64
    assert answers.num_traces.tolist() == [2, 1, 1]  # the last row has no weight
    assert answers.mode() == 1
    assert answers.probability_of(2) == pytest.approx(0.2, abs=1e-7)
    assert answers.probability_of(None) == pytest.approx(0.3, abs=1e-7)
    assert answers.probability_of(7) == 0.0
    assert answers.errors == "from the weights of independent traces"
    # N/(N-1) Σ w² (1[a] - p)²; N counts the row without weight.
    by_hand = [
        (0.1 * 0.5) ** 2 + (0.4 * 0.5) ** 2 + (0.2 * 0.5) ** 2 + (0.3 * 0.5) ** 2,
        (0.3 * 0.7) ** 2 + (0.1 * 0.3) ** 2 + (0.2 * 0.3) ** 2 + (0.4 * 0.3) ** 2,
        (0.2 * 0.8) ** 2 + (0.1 * 0.2) ** 2 + (0.3 * 0.2) ** 2 + (0.4 * 0.2) ** 2,
    ]
    np.testing.assert_allclose(answers.standard_error, np.sqrt(5 / 4 * np.array(by_hand)), rtol=1e-5)
    assert answers.ess == pytest.approx(1 + (0.25 + 0.21 + 0.16) / (5 / 4 * sum(by_hand)), rel=1e-5)


def test_numbers_that_are_equal_are_one_answer(make_posterior):
    pieces = (b"$1,000", b"= 1000.0", b"\\boxed{1{,}000}", b"0", b"Paris")
    posterior = make_posterior([0, 1, 2, 3, 4], [0.1, 0.2, 0.3, 0.1, 0.3], pieces, num_steps=np.int32(1))
    answers = posterior.answers(ponder.extract_number)
    assert answers.answers == ("1000", None, "0")
    np.testing.assert_allclose(answers.probability, [0.6, 0.3, 0.1], atol=1e-6)


def test_equal_independent_traces_count_in_full(make):
    answers = make([0, 1, 0, 0, 2, 0, 0, 1], np.full(8, 1 / 8)).answers(value)
    assert answers.ess == pytest.approx(8, rel=1e-5)
    np.testing.assert_allclose(answers.standard_error[0], np.sqrt(5 / 8 * 3 / 8 / 7), rtol=1e-5)
    only = make([0, 3, 0], [0.5, 0.25, 0.25]).answers(value)  # one answer: the ESS is that of the weights
    assert only.standard_error.tolist() == [0.0] and only.ess == pytest.approx(1 / 0.375, rel=1e-5)


def test_families_are_taken_together(make):
    """Rows 0, 1 descend from row 1 of the first step, rows 2, 3 from rows 0 and 3."""
    past = history([[1, 0, 1, 3], [0, 2, 1, 3], [3, 2, 1, 0]], [True, True, False])
    answers = make([0, 1, 0, 2], [0.4, 0.3, 0.2, 0.1], **past).answers(value)  # the third step was not taken
    assert answers.answers == (1, 2, None)
    assert answers.errors == "from the genealogy: 3 families"
    sums = [
        [0.4 * 0.4 - 0.3 * 0.6, 0.2 * 0.4, -0.1 * 0.6],
        [-0.4 * 0.3 + 0.3 * 0.7, -0.2 * 0.3, -0.1 * 0.3],
        [-0.4 * 0.1 - 0.3 * 0.1, -0.2 * 0.1, 0.1 * 0.9],
    ]
    variance = (4 / 3) ** 3 * (np.array(sums) ** 2).sum(1)
    np.testing.assert_allclose(answers.standard_error, np.sqrt(variance), rtol=1e-5)
    assert answers.ess == pytest.approx(min(4, 1 + (0.24 + 0.21 + 0.09) / variance.sum()), rel=1e-5)
    # Without resampling the ancestors do not matter.
    identity = history([[0, 1, 2, 3]] * 3, [False] * 3)
    plain = make([0, 1, 0, 2], [0.4, 0.3, 0.2, 0.1])
    with_history = make([0, 1, 0, 2], [0.4, 0.3, 0.2, 0.1], **identity)
    np.testing.assert_array_equal(
        plain.answers(value).standard_error, with_history.answers(value).standard_error
    )


def test_errors_stay_within_what_is_possible(make):
    """(N/(N-1))^(R+1) is 16 here: no variance exceeds p (1 - p)."""
    past = history([[0, 1], [0, 1], [0, 1]], [True] * 3)
    answers = make([0, 1], [0.7, 0.3], num_steps=jnp.int32(3), **past).answers(value)
    np.testing.assert_allclose(answers.standard_error, np.sqrt([0.21, 0.21]), rtol=1e-5)
    assert answers.ess == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (history([[0, 0, 0], [0, 1, 2]], [True, False]), "descend from one"),
        (history([[0, 0, 2], [0, 1, 2]], [True, False]) | {"weights": [0.5, 0.5, 0.0]}, "descend from one"),
        ({"weights": [0.0, 1.0, 0.0]}, "one trace has all weight"),
        ({"degenerate": jnp.bool_(True)}, "every particle had weight zero"),
        ({"log_evidence": np.nan, "method": "best_of_n"}, "best_of_n has no stated target"),
        ({"origin": "drawn from 8 particles"}, "none for rows drawn from 8 particles"),
        ({"resampled": jnp.array([True, False])}, "genealogy of the resampled particles is not known"),
        ({"acceptance": jnp.float32(0.5), "log_evidence": np.nan}, "3 draws of a Markov chain are too few"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_no_information_is_nan(make, settings, reason):
    settings = dict(settings)
    answers = make([0, 1, 2], settings.pop("weights", [0.5, 0.3, 0.2]), **settings).answers(value)
    assert np.isnan(answers.standard_error).all() and np.isnan(answers.ess)
    assert reason in answers.errors and reason in answers.summary()
    assert "?" in answers.summary() and "nan" not in answers.summary()
    assert answers.probability.sum() == pytest.approx(1.0)


def test_rows_that_were_merged_or_drawn_again(make):
    run = make([0, 1, 0, 2], [0.4, 0.3, 0.2, 0.1])
    merged, drawn = run.unique().answers(value), run.sample(jax.random.key(0), 50).answers(value)
    assert merged.answers == run.answers(value).answers
    np.testing.assert_allclose(merged.probability, run.answers(value).probability, atol=1e-6)
    assert np.isnan(merged.standard_error).all() and np.isnan(drawn.standard_error).all()
    assert "merged from 4 traces: ask the run's own posterior" in merged.summary()


def test_exact_answers_have_no_error(exact):
    answers = exact.answers(len)
    assert set(answers.answers) == {0, 1, 2, 3} and answers.probability.sum() == pytest.approx(1.0)
    assert answers.standard_error.tolist() == [0.0] * 4 and answers.ess == np.inf
    assert "ESS of the answers infinite, standard errors zero: every trace" in answers.summary()


@pytest.fixture
def of_chain(make):
    """Answers of the equally weighted draws of a Markov chain."""
    chain: dict[str, Any] = {
        "acceptance": jnp.float32(0.5),
        "log_evidence": np.nan,
        "method": "particle_gibbs",
    }
    return lambda rows: make(rows, np.full(len(rows), 1 / len(rows)), **chain).answers(value)


def test_markov_chain(of_chain):
    """Two states, left with probability 0.1: with ρ = 0.8, Var = p (1 - p) (1 + ρ) / ((1 - ρ) N)."""
    rng, n, num_chains = np.random.default_rng(0), 400, 400
    flips = rng.random((num_chains, n)) < 0.1
    flips[:, 0] = rng.random(num_chains) < 0.5
    chains = np.cumsum(flips, axis=1) % 2
    found = [of_chain(rows) for rows in chains]
    variance = np.array([answers.standard_error[0] ** 2 for answers in found])
    assert variance.mean() == pytest.approx(0.25 * 1.8 / 0.2 / n, rel=0.1)  # not z: biased by O(1/N)
    assert np.mean([answers.ess for answers in found]) == pytest.approx(n * 0.2 / 1.8, rel=0.25)
    share = chains.mean(1)
    assert abs(z_scores(variance - (share - 0.5) ** 2, 0.0)) < MAX_Z
    assert z_scores(share * (1 - share) / n - (share - 0.5) ** 2, 0.0) < -MAX_Z  # as if independent


def test_markov_chains_at_the_edge(of_chain):
    stuck = of_chain([0] * 10)
    assert np.isnan(stuck.standard_error).all() and "gave one answer" in stuck.errors
    alternating = of_chain([0, 1] * 10)  # no more than independent draws would give
    np.testing.assert_allclose(alternating.standard_error, np.sqrt(0.25 / 19))
    assert alternating.ess == 20
    assert of_chain([0, 1, 1, 0]).standard_error.min() > 0


NUM_RUNS = 2000
ANSWERS = (1, None, 2)


@functools.cache
def read(text):
    return text.count("a") or None


@pytest.mark.parametrize(
    ("scheme", "threshold"),
    [
        pytest.param("systematic", 0.0, marks=pytest.mark.slow),
        ("multinomial", 1.0),
        pytest.param("systematic", 1.0, marks=pytest.mark.slow),
        pytest.param("residual", 0.9, marks=pytest.mark.slow),
    ],
)
def test_standard_errors_agree_with_many_runs(toy, scores, scheme, threshold):
    """E[se²] is the variance of the estimate, up to a bias of order 1/N: N = 64, |z| < 5 and 15%."""
    program = ponder.Generation(toy, [1, 2], max_new_tokens=4, potential=scores**0.5)
    run = jax.jit(jax.vmap(inference.smc(program, 64, scheme, threshold).run))
    runs = jax.tree.map(np.asarray, run(jax.random.split(jax.random.key(3), NUM_RUNS)))
    naive_runs = NUM_RUNS if threshold else 100  # without resampling it is the same formula
    estimates, variances = np.zeros((2, NUM_RUNS, len(ANSWERS)))
    naive = np.zeros((naive_runs, len(ANSWERS)))
    for i in range(NUM_RUNS):
        one = jax.tree.map(lambda x, i=i: x[i], runs)
        estimates[i], variances[i] = by_answer(one.answers(read))
        if i < naive_runs:
            independent = one.stats._replace(resampled=np.zeros(4, bool))  # what ignores the genealogy
            naive[i] = by_answer(dataclasses.replace(one, stats=independent).answers(read))[1]
    squares = (estimates - estimates.mean(0)) ** 2 * NUM_RUNS / (NUM_RUNS - 1)
    assert (np.abs(z_scores(variances - squares, np.zeros(len(ANSWERS)))) < MAX_Z).all()
    np.testing.assert_allclose(variances.mean(0), squares.mean(0), rtol=0.15)
    if threshold:
        assert z_scores((naive - squares).sum(1), np.float64(0)) < -MAX_Z
        assert (naive.mean(0) < squares.mean(0)).all()
    else:
        np.testing.assert_array_equal(naive, variances[:naive_runs])


def by_answer(answers):
    """The probabilities and the squared errors; an answer that no trace gave has neither."""
    place = {answer: i for i, answer in enumerate(answers.answers)}
    errors = [answers.standard_error[place[a]] ** 2 if a in place else 0.0 for a in ANSWERS]
    return [answers.probability_of(a) for a in ANSWERS], errors


@pytest.mark.slow
def test_a_batch_of_prompts(toy, scores):
    two = ponder.Generation(toy, [[1, 2], [0, 1]], max_new_tokens=2, potential=scores)
    for posterior in inference.smc(two, 16, ess_threshold=1.0).run(jax.random.key(0)):
        answers = posterior.answers(read)
        assert answers.errors.startswith("from the genealogy") and (answers.standard_error > 0).all()
        assert answers.rows == "16 particles" and answers.method == "smc"


@pytest.mark.slow
def test_particle_gibbs(toy, scores):
    """A chain is known by its stats; its error covers the exact probabilities."""
    program = ponder.Generation(toy, [1, 2], max_new_tokens=2, potential=scores)
    exact = inference.exact(program).run().answers(read)
    posterior = inference.particle_gibbs(program, 2, 400, ancestor_sampling=False).run(jax.random.key(1))
    answers = posterior.answers(read)
    assert answers.errors == "from the autocorrelation of the Markov chain" and 1 < answers.ess < 400
    assert answers.num_traces.sum() == 400
    for answer, share, error in zip(
        answers.answers, answers.probability, answers.standard_error, strict=True
    ):
        assert abs(share - exact.probability_of(answer)) < MAX_Z * error


def test_each_text_is_read_once_and_only_with_weight(make):
    seen = []
    make([0, 1, 0, 2], [0.5, 0.3, 0.2, 0.0]).answers(lambda text: seen.append(text))
    assert seen == ["x=1", "x=2"]


def test_mode_of_equals_is_the_first_and_may_be_none(make):
    assert make([1, 0, 0], [0.5, 0.25, 0.25]).answers(value).mode() == 2
    assert make([0, 1, 0], [0.25, 0.5, 0.25]).answers(value).mode() == 1
    assert make([0, 2], [0.4, 0.6]).answers(value).mode() is None


def test_summary(make):
    answers = make([0, 1, 2, 4], [0.4, 0.3, 0.2, 0.1], resampled=jnp.array([False])).answers(
        lambda text: None if text == "what" else text
    )
    assert answers.summary(3).splitlines() == [
        "Answers by smc: 4 particles, 4 distinct answers",
        "ESS of the answers 3.76, standard errors from the weights of independent traces",
        "probability  std. error  traces  answer",
        "     40.00%      32.66%       1  x=1",
        "     30.00%      28.98%       1  x=2",
        "     20.00%      21.91%       1  (no answer)",
        "     10.00%                   1  in 1 more answer",
    ]
    assert repr(answers) == answers.summary(5) and "<b>$" in repr(answers)
    shown = answers._repr_html_()
    assert "<i>(no answer)</i>" in shown and "&lt;b&gt;$" in shown and "<b>$" not in shown
    assert "mathjax_ignore" in shown and "width:40.0px" in shown
    with pytest.raises(ValueError, match="num_answers: expected an integer >= 1, got 0"):
        answers.summary(0)


def test_errors(make):
    posterior = make([0, 1], [0.5, 0.5])
    with pytest.raises(TypeError, match="extract: expected a function of a text, got 'x='"):
        posterior.answers("x=")
    with pytest.raises(TypeError, match=r"expected a hashable answer or None, got \['x', '1'\] \(list\)"):
        posterior.answers(lambda text: text.split("="))
    with pytest.raises(ValueError, match=r"holds runs of shape \(3,\)"):
        jax.tree.map(lambda x: jnp.stack([x] * 3), posterior).answers(value)
    with pytest.raises(ValueError, match="answers are read from texts, outside jit"):
        jax.jit(lambda p: p.answers(value).probability)(posterior)


def test_no_probability_is_above_one_by_rounding(make):
    rng = np.random.default_rng(0)
    for n in range(2, 40):
        answers = make([0] * n, rng.random(n)).answers(value)
        assert answers.probability[0] <= 1.0
        assert answers.probability[0] == pytest.approx(1.0)


def test_answers_of_tokens(make_posterior):
    """As in `expectation`: the trace itself, EOS among them; each distinct trace once."""
    rows = [[0, 5], [3, 5], [0, 5], [1, 0]]
    posterior, seen = make_posterior(rows, [0.1, 0.2, 0.3, 0.4], PIECES), []

    def first(tokens):
        seen.append(tokens.tolist())
        return int(tokens[0]) or None

    answers = posterior.answers(first, on="tokens")
    assert answers.answers == (None, 1, 3) and seen == [[0, 5], [3, 5], [1, 0]]
    np.testing.assert_allclose(answers.probability, [0.4, 0.4, 0.2], atol=1e-6)
    with pytest.raises(ValueError, match="on: expected 'text' or 'tokens', got 'words'"):
        posterior.answers(first, on="words")
    with pytest.raises(ValueError, match=r"on: expected 'text' or 'tokens', got \['text'\]"):
        posterior.answers(first, on=["text"])
    with pytest.raises(TypeError, match="extract: expected a function of tokens, got 3"):
        posterior.answers(3, on="tokens")
