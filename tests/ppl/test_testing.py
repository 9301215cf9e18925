"""The checks pass what is right and name the law that a broken potential breaks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.models import TableLM
from ponder.testing import MAX_Z, AlgorithmReport, check_algorithm, check_potential, z_scores

A, EOS = 0, 3


class Counts(ponder.Composable):
    """What a user writes first: log Φ is -0.5 for every token a, twice that for complete traces."""

    def init(self, num_particles):
        return jnp.zeros(num_particles)

    def update(self, state, tokens, active):
        return state - jnp.where(active & (tokens == A), 0.5, 0.0)

    def log_prefix(self, state):
        return state

    def log_complete(self, state):
        return 2 * state

    def token_logits(self, state):
        step = jnp.where(jnp.arange(4) == A, -0.5, 0.0)[None]
        return jnp.where((jnp.arange(4) == EOS)[None], state[:, None], step)

    def complete_logits(self, state):
        return state[:, None] - jnp.where(jnp.arange(4) == A, 1.0, 0.0)[None]

    def fork(self, state, ancestors):
        return state[ancestors]


def check(potential, lm):
    check_potential(potential, lm, num_particles=4, num_steps=3, num_tokens=4)


def test_a_right_potential_passes(toy):
    check(Counts(), toy)
    check(Counts() * ponder.tokens(forbid=[1]), toy)
    check(Counts() ** 0.5, toy)


class WrongShape(Counts):
    def log_prefix(self, state):
        return state[:, None]


class WrongShapeComplete(Counts):
    def log_complete(self, state):
        return state.sum()


class Integers(Counts):
    def log_complete(self, state):
        return jnp.zeros(state.shape, jnp.int32)


class Unguided(Counts):
    """The same, offering no guide."""

    def token_logits(self, state):
        return None

    complete_logits = token_logits


class NotANumber(Unguided):
    def log_prefix(self, state):
        return jnp.where(state < 0, jnp.nan, 0.0)


class Infinite(Unguided):
    def log_complete(self, state):
        return jnp.where(state < 0, jnp.inf, 0.0)


class OtherUnderJit(Counts):
    def log_prefix(self, state):
        return state + float(isinstance(state, jax.core.Tracer))


class CompletesTheImpossible(Unguided):
    def log_prefix(self, state):
        return jnp.where(state < 0, -jnp.inf, 0.0)


class ComesBackToLife(Unguided):
    """Zero after an odd number of tokens."""

    def update(self, state, tokens, active):
        return state + active.astype(jnp.float32)

    def log_prefix(self, state):
        return jnp.where(state % 2 == 1, -jnp.inf, 0.0)

    log_complete = log_prefix


class MovesInactiveRows(Counts):
    def update(self, state, tokens, active):
        return state - jnp.where(tokens == A, 0.5, 0.0)


class StopsActiveRows(Counts):
    def update(self, state, tokens, active):
        return jnp.where(active.all(), state - jnp.where(tokens == A, 0.5, 0.0), state)


class GuidesWrong(Counts):
    def token_logits(self, state):
        return super().token_logits(state) * 1.5


class GuidesEosByThePrefixRule(Counts):
    def token_logits(self, state):
        return jnp.broadcast_to(jnp.where(jnp.arange(4) == A, -0.5, 0.0), (len(state), 4))


class GuidesWithTheValue(Counts):
    """log Φ(x·v) in place of the difference."""

    def token_logits(self, state):
        return super().token_logits(state) + state[:, None]


class GuidesTooFewTokens(Counts):
    def token_logits(self, state):
        return super().token_logits(state)[:, :3]


class CompletesByThePrefixRule(Counts):
    def complete_logits(self, state):
        return self.token_logits(state)


class ForksNothing(Counts):
    def fork(self, state, ancestors):
        return state


class ForksBackwards(Counts):
    """Row n becomes what ancestors[n] says is to come from it."""

    def fork(self, state, ancestors):
        return state.at[ancestors].set(state)


class CountsRepeats(Unguided):
    """Another value where all rows are equal: wrong only for a row alone."""

    def log_prefix(self, state):
        return state * jnp.where(jnp.ptp(state) == 0, 2, 1)


class RelativeToTheBatch(Unguided):
    """As scores that are normalised over the batch are: no row means anything by itself."""

    def log_prefix(self, state):
        return state - state.mean()


class ReadsThePadding(Unguided):
    """Lets EOS through to rows that are not active, whose padding it is."""

    def update(self, state, tokens, active):
        return super().update(state, tokens, active) - jnp.where(tokens == EOS, 0.1, 0.0)


BROKEN = [
    (WrongShape, r"step 0: log_prefix has shape \(4, 1\), expected \(4,\)"),
    (WrongShapeComplete, r"step 0: log_complete has shape \(\), expected \(4,\)"),
    (Integers, "step 0: log_complete has dtype int32"),
    (NotANumber, r"step \d: log_prefix is NaN or \+inf in rows"),
    (Infinite, r"step \d: log_complete is NaN or \+inf in rows"),
    (OtherUnderJit, "step 0: log_prefix under jit"),
    (CompletesTheImpossible, "log_prefix is -inf where log_complete is not"),
    (ComesBackToLife, "step 1: a prefix of weight zero got weight again"),
    (MovesInactiveRows, "update of rows that are not active"),
    (ReadsThePadding, "update of rows that are not active"),
    (StopsActiveRows, "update of rows that are not active"),
    (GuidesWrong, "step 0: token_logits: got"),
    (GuidesEosByThePrefixRule, r"step [12]: token_logits: got"),
    (GuidesWithTheValue, r"step [12]: token_logits: got"),
    (GuidesTooFewTokens, r"step 0: token logits \(4, 3\), expected \(4, 4\)"),
    (CompletesByThePrefixRule, r"step \d: complete_logits: got"),
    (ForksNothing, "fork, then update"),
    (ForksBackwards, "fork, then update"),
    (CountsRepeats, "row 0 without the other rows"),
    (RelativeToTheBatch, "without the other rows|rows that are not active|fork, then update"),
]


@pytest.mark.parametrize(("broken", "law"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_the_broken_law_is_named(toy, broken, law):
    with pytest.raises(AssertionError, match=law):
        check(broken(), toy)
    with pytest.raises(AssertionError, match=law):  # also as a factor, where the others might hide it
        check(ponder.tokens(forbid=[1]) * broken(), toy)


def test_a_tolerance_can_be_given(toy):
    class Rounded(Counts):
        def token_logits(self, state):
            return super().token_logits(state) + 0.01

    with pytest.raises(AssertionError, match="token_logits"):
        check(Rounded(), toy)
    check_potential(Rounded(), toy, num_particles=4, num_steps=3, num_tokens=4, atol=0.02)


def test_arguments(toy):
    with pytest.raises(ValueError, match="num_particles: expected at least 2, got 1"):
        check_potential(Counts(), toy, num_particles=1)
    program = ponder.Generation(toy, [0], max_new_tokens=2)
    with pytest.raises(ValueError, match="num_runs: expected at least 1000, got 10"):
        check_algorithm(inference.smc(program, 2), program, num_runs=10)
    large = ponder.Generation(TableLM.random(jax.random.key(0), 50, order=1), [0], max_new_tokens=6)
    with pytest.raises(ValueError, match="too many to enumerate"):
        check_algorithm(inference.smc(large, 2), large)
    with pytest.raises(TypeError, match=r"program: expected a ponder\.Generation"):
        check_algorithm(inference.smc(program, 2), toy)


class Sampler:
    """Draws four traces of the exact posterior, with a noisy and unbiased estimate of the evidence."""

    def __init__(self, exact, **changes):
        self.exact, self.changes = exact, changes

    def run(self, key):
        key_rows, key_noise = jax.random.split(key)
        rows = jax.random.categorical(key_rows, self.exact.log_weights, shape=(4,))
        posterior = dataclasses.replace(
            self.exact,
            tokens=self.exact.tokens[rows],
            lengths=self.exact.lengths[rows],
            log_weights=jnp.full(4, -np.log(4.0)),
            log_evidence=self.exact.log_evidence
            + jnp.log(jax.random.uniform(key_noise, minval=0.5, maxval=1.5)),
        )
        return dataclasses.replace(posterior, **{name: f(posterior) for name, f in self.changes.items()})


@pytest.fixture(scope="module")
def exact(toy):
    program = ponder.Generation(toy, [0], max_new_tokens=2, potential=Counts())
    return program, inference.exact(program).run()


def test_check_algorithm(exact):
    program, posterior = exact
    report = check_algorithm(Sampler(posterior), program, num_runs=1000)
    assert isinstance(report, AlgorithmReport)
    assert report.exact_log_evidence == pytest.approx(float(posterior.log_evidence), abs=1e-6)
    assert abs(report.evidence_z) < MAX_Z and (np.abs(report.group_z) < MAX_Z).all()
    assert len(report.group_z) >= 4
    again = check_algorithm(Sampler(posterior), program, num_runs=1000, key=jax.random.key(1))
    assert again.evidence_z != report.evidence_z and abs(again.evidence_z) < MAX_Z


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_evidence": lambda p: p.log_evidence + 0.1}, "evidence: the mean over 1000 runs is"),
        ({"log_evidence": lambda p: p.log_evidence - 0.1}, "evidence: the mean over 1000 runs is"),
        ({"log_evidence": lambda p: p.log_evidence * jnp.nan}, "log_evidence is NaN"),
        ({"log_weights": lambda p: p.log_weights + 0.01}, "log_weights: logsumexp is"),
        (
            {"log_weights": lambda p: jax.nn.log_softmax(0.5 * p.lengths.astype(jnp.float32))},
            "posterior: the mean mass of traces .* not proper",
        ),
        ({"tokens": lambda p: p.tokens.at[0, 0].set(2)}, "posterior: the mean mass of traces"),
    ],
    ids=["evidence high", "evidence low", "evidence NaN", "not normalised", "weights", "traces"],
)
def test_check_algorithm_notices(exact, changes, message):
    program, posterior = exact
    with pytest.raises(AssertionError, match=message):
        check_algorithm(Sampler(posterior, **changes), program, num_runs=1000)


def test_z_scores():
    rng = np.random.default_rng(0)
    samples = rng.normal(loc=[1.0, 2.0, 3.0], scale=[0.1, 1.0, 2.0], size=(4000, 3))
    z = z_scores(samples, np.array([1.0, 2.0, 3.0]))
    assert z.shape == (3,) and (np.abs(z) < MAX_Z).all()
    mean, spread = samples.mean(0), samples.std(0, ddof=1) / np.sqrt(4000)
    np.testing.assert_allclose(z, (mean - [1, 2, 3]) / spread, rtol=1e-9)
    np.testing.assert_allclose(z_scores(samples, mean + 7 * spread), -7, rtol=1e-6)
    # Calibrated: over many experiments, z has unit variance.
    many = z_scores(rng.exponential(size=(1000, 2000)), np.ones(2000))
    assert abs(many.mean()) < 5 / np.sqrt(2000) and many.std() == pytest.approx(1.0, abs=0.1)


def test_z_scores_of_constants():
    """Estimates without variance are right or wrong, up to float32 rounding."""
    assert z_scores(np.full(10, 2.0), np.float64(2.0)) == 0.0
    assert z_scores(np.full(10, 2.0, np.float32) * np.float32(1.0000001), np.float64(2.0)) == 0.0
    assert z_scores(np.full(10, 2.0), np.float64(2.001)) == np.inf
    assert z_scores(np.zeros(10), np.float64(0.0)) == 0.0
    assert z_scores(np.full(10, 1e-9), np.float64(0.0)) == np.inf
    z = z_scores(np.array([[1.0, 0.0], [1.0, 1.0]] * 500), np.array([1.0, 0.5]))
    np.testing.assert_allclose(z, [0.0, 0.0])
