"""Best-of-N and majority vote: choices worked out by hand on scripted traces, then on runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.inference import Algorithm
from ponder.inference.search.best_of_n import Best
from ponder.inference.search.majority_vote import Majority
from ponder.inference.search.selection import Selection
from ponder.models import PieceTokenizer
from ponder.posterior.posterior import Posterior, Stats

PIECES = (b"x=1", b"x=2", b"so x=1", b"what", b"hm", b"")
A, B, ALSO_A, NONE, NEITHER = range(5)  # "x=1", "x=2", "so x=1", and two texts without an answer


def value(text):
    return text.rpartition("=")[2] if "=" in text else None


def drawn(rows, log_potential, log_prior=None, log_weights=None):
    """Draws of one token each, as importance sampling gives them."""
    n = len(rows)
    log_potential = jnp.asarray(log_potential, jnp.float32)
    return Posterior(
        tokens=jnp.asarray(rows, jnp.int32)[:, None],
        lengths=jnp.ones(n, jnp.int32),
        log_weights=jax.nn.log_softmax(log_potential) if log_weights is None else jnp.asarray(log_weights),
        log_evidence=jnp.float32(-1.0),
        log_prior=jnp.zeros(n) if log_prior is None else jnp.asarray(log_prior),
        log_potential=log_potential,
        stats=Stats(num_steps=jnp.int32(1), num_tokens=jnp.ones((1, n), jnp.int32)),
        tokenizer=PieceTokenizer(PIECES),
    )


def rows_of(choose, draws):
    chosen = np.asarray(choose(draws))
    assert chosen.dtype == bool and chosen.shape == (len(draws),)
    return np.flatnonzero(chosen).tolist()


@pytest.mark.parametrize(
    ("score", "log_potential", "log_prior", "row"),
    [
        ("potential", [-2.0, -0.5, -1.0], [-1.0, -9.0, -1.0], 1),
        ("prior", [-2.0, -0.5, -1.0], [-1.0, -9.0, -0.5], 2),
        ("prior", [-2.0, -0.5, -np.inf], [-1.0, -9.0, -0.5], 0),  # of density zero: never chosen
        ("joint", [-2.0, -0.5, -1.0], [-0.1, -2.0, -1.5], 0),
        ("potential", [-1.0, -0.5, -0.5], [-1.0, -2.0, -1.0], 1),  # ties go to the first row
        ("potential", [-1.0, np.nan, -2.0], [-1.0, -1.0, -1.0], 0),
        ("potential", [-1.0, np.inf, -2.0], [-1.0, -1.0, -1.0], 0),
    ],
)
def test_best(score, log_potential, log_prior, row):
    weights = jnp.log(jnp.full(3, 1 / 3))  # importance weights play no role
    draws = drawn([A, B, NONE], log_potential, log_prior, weights)
    assert rows_of(Best(score, False, None), draws) == [row]


def test_traces_that_lost_their_weight_are_not_chosen():
    draws = drawn([A, B], [-1.0, -2.0], log_weights=[-jnp.inf, 0.0])
    for choose in (Best("potential", False, None), Best("potential", True, value), Majority(value)):
        assert rows_of(choose, draws) == [1]


@pytest.mark.parametrize(
    ("rows", "scores", "row"),
    [
        # "1" has 0.3 + 0.35 against 0.6, though "2" has the best trace; the better of its two is chosen.
        ([A, B, ALSO_A], [0.3, 0.6, 0.35], 2),
        ([A, B, ALSO_A], [0.1, 0.6, 0.35], 1),
        ([NONE, B, NONE], [0.9, 0.1, 0.9], 1),  # no answer, no say
        ([NONE, NEITHER, NONE], [0.2, 0.3, 0.2], 1),  # unless none has one: then the best of all
        ([B, A, ALSO_A], [0.5, 0.25, 0.25], 0),  # ties go to the first row
        ([A, B, B, B], [0.7, 0.2, 0.2, 0.0], 0),
    ],
)
def test_best_weighted(rows, scores, row):
    with np.errstate(divide="ignore"):
        draws = drawn(rows, np.log(scores))
    assert rows_of(Best("potential", True, value), draws) == [row]


def test_weighted_by_the_whole_text():
    """By default "x=1" and "so x=1" are two answers; very small scores add up as well."""
    draws = drawn([A, B, ALSO_A, A], np.log([0.3, 0.6, 0.35, 0.31]) - 2000)
    assert rows_of(Best("potential", True, None), draws) == [3]
    assert rows_of(Best("potential", True, value), draws) == [2]


@pytest.mark.parametrize(
    ("rows", "scores", "chosen"),
    [
        ([A, B, ALSO_A], [0.1, 0.9, 0.1], [0, 2]),
        ([B, A, B, A, NONE], np.ones(5), [0, 2]),  # ties go to the first row
        ([NONE, NONE, B], np.ones(3), [2]),
        ([NONE, NEITHER], np.ones(2), [0, 1]),
        ([A, B, ALSO_A], [0.0, 0.9, 0.1], [1]),  # of density zero: no vote
    ],
)
def test_majority(rows, scores, chosen):
    with np.errstate(divide="ignore"):
        draws = drawn(rows, np.log(scores))
    assert rows_of(Majority(value), draws) == chosen


def draws_of(program, num_particles, key):
    return inference.importance_sampling(program, num_particles).run(key)


def first(text):
    return text[:1] or None


BASELINES = {
    "best": inference.best_of_n,
    "weighted": lambda program, n: inference.best_of_n(program, n, weighted=True, extract=first),
    "vote": lambda program, n: inference.majority_vote(program, n, first),
}


def program(lm, potential, prompt=(1, 2)):
    return ponder.Generation(lm, list(prompt), max_new_tokens=4, potential=potential)


@pytest.mark.parametrize("name", BASELINES)
def test_runs(toy, scores, name):
    model, key, n = program(toy, scores), jax.random.key(4), 8
    algorithm = BASELINES[name](model, n)
    assert isinstance(algorithm, Selection) and isinstance(algorithm, Algorithm)
    assert algorithm.program is model and algorithm.draws.num_particles == n
    posterior, draws = algorithm.run(key), draws_of(model, n, key)
    np.testing.assert_array_equal(posterior.tokens, draws.tokens)
    chosen = np.flatnonzero(posterior.weights)
    assert chosen.tolist() == rows_of(algorithm.choose, draws)
    np.testing.assert_allclose(posterior.weights[chosen], 1 / len(chosen), rtol=1e-6)
    assert float(jax.nn.logsumexp(posterior.log_weights)) == pytest.approx(0.0, abs=1e-6)
    assert np.isnan(posterior.log_evidence) and posterior.stats.log_evidence is None
    assert posterior.method == ("majority_vote" if name == "vote" else "best_of_n")
    if name == "best":
        assert chosen == [np.argmax(draws.log_potential)]
        assert posterior.mode().text == draws.text[chosen[0]]
    # The account: as many tokens as were drawn, those of the others discarded.
    assert posterior.stats.tokens_generated == draws.stats.tokens_generated == draws.lengths.sum()
    kept = posterior.lengths[chosen].sum()
    assert posterior.stats.tokens_discarded == draws.lengths.sum() - kept
    assert posterior.stats.model_calls == draws.stats.model_calls
    assert not posterior.stats.degenerate
    # No stated target: the answer is the chosen one, and nothing is said of its error.
    answers = posterior.answers(first)
    assert (
        len(answers) == 1 and np.isnan(answers.standard_error).all() and "no stated target" in repr(answers)
    )
    assert "log evidence none" in posterior.summary()


def test_steps_are_those_of_the_draws(toy, scores):
    algorithm = inference.best_of_n(program(toy, scores), 8)
    state, info = jax.jit(lambda key: algorithm.step(key, algorithm.init(key)))(jax.random.key(1))
    assert state.step == 1 and not info.resampled and info.num_tokens.tolist() == [1] * 8


def test_only_best_of_n_can_be_traced(toy, scores):
    model, key = program(toy, scores), jax.random.key(4)
    algorithm = inference.best_of_n(model, 8)
    chosen = jax.jit(lambda key: algorithm.run(key).log_weights)(key)
    np.testing.assert_array_equal(chosen, algorithm.run(key).log_weights)
    for name in ("weighted", "vote"):
        with pytest.raises(ValueError, match="answers are read from texts, outside jit"):
            jax.jit(lambda key, name=name: BASELINES[name](model, 8).run(key).log_weights)(key)


def test_a_batch_of_prompts_gives_a_list(toy, scores):
    prompts, key = [[1, 2], [0, 1]], jax.random.key(2)
    both = ponder.Generation(toy, prompts, max_new_tokens=4, potential=scores)
    draws = draws_of(both, 8, key)
    for make in BASELINES.values():
        algorithm = make(both, 8)
        found = algorithm.run(key)
        assert isinstance(found, list) and len(found) == 2
        for posterior, of_prompt in zip(found, draws, strict=True):
            np.testing.assert_array_equal(posterior.tokens, of_prompt.tokens)
            assert np.flatnonzero(posterior.weights).tolist() == rows_of(algorithm.choose, of_prompt)
            assert posterior.stats.tokens_generated == of_prompt.lengths.sum()


def test_hard_constraints_hold(toy, scores):
    """The draws are guided, so that every trace that is chosen matches."""
    model = program(toy, scores * ponder.regex("a(b|c)"))
    for make in BASELINES.values():
        posterior = make(model, 4).run(jax.random.key(0))
        assert {posterior.text[row] for row in np.flatnonzero(posterior.weights)} <= {"ab", "ac"}


@pytest.mark.parametrize("name", BASELINES)
def test_degenerate(toy, name):
    """No trace is possible: uniform weights, a warning and the flag, as for SMC."""
    nothing = ponder.text(lambda texts: [-np.inf] * len(texts))
    with pytest.warns(RuntimeWarning, match="every particle has weight zero"):
        posterior = BASELINES[name](program(toy, nothing), 4).run(jax.random.key(0))
    assert posterior.stats.degenerate and np.isnan(posterior.log_evidence)
    np.testing.assert_allclose(posterior.weights, 0.25)
    assert posterior.stats.tokens_discarded == posterior.stats.tokens_generated
    assert "mean nothing" in posterior.answers(first).errors


class Untold:
    """A state-space model that does not tell its traces."""

    num_steps = 1

    def init(self, key, num_particles):
        return jnp.zeros(num_particles)

    def propagate(self, key, state, forced=None):
        return state, None, state

    def fork(self, state, ancestors):
        return state

    def is_done(self, state):
        return state > 0


def test_errors(toy, scores):
    model = program(toy, scores)
    with pytest.raises(ValueError, match="score: expected one of potential, prior, joint, got 'reward'"):
        inference.best_of_n(model, score="reward")
    with pytest.raises(TypeError, match="weighted: expected a bool, got 1"):
        inference.best_of_n(model, weighted=1)
    with pytest.raises(ValueError, match="extract: only used with weighted=True"):
        inference.best_of_n(model, extract=first)
    for make in (inference.majority_vote, lambda m, **k: inference.best_of_n(m, weighted=True, **k)):
        with pytest.raises(TypeError, match="extract: expected a function of a text, or None, got 'x='"):
            make(model, extract="x=")
        with pytest.raises(TypeError, match=r"expected a hashable answer or None, got .* \(list\)"):
            make(model, num_particles=8, extract=list).run(jax.random.key(0))
    for make in (inference.best_of_n, inference.majority_vote):
        with pytest.raises(ValueError, match="num_particles: expected an integer >= 1, got 0"):
            make(model, 0)
        with pytest.raises(TypeError, match="program: expected a StateSpaceModel"):
            make(toy)
        with pytest.raises(TypeError, match=r"program: .* needs one that tells its traces"):
            make(Untold())
