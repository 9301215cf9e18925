"""Entropic particle filtering: temperatures by hand, unbiased evidence, and the published form without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.inference.particles.entropic_smc import resampling_temperature
from ponder.inference.particles.resampling import effective_sample_size
from ponder.testing import MAX_Z, check_algorithm, z_scores


@pytest.mark.parametrize(
    ("weights", "progress", "rule", "expected"),
    [
        # ESS of (8, 1, 1) / 10 is 100 / 66; a share of 0.505050 of three particles.
        ([8, 1, 1], 0.0, "ess", 1.98),
        ([8, 1, 1], 0.25, "ess", 1.485),
        # One particle holds everything: ESS = 1, a share of a quarter.
        ([1, 0, 0, 0], 0.0, "ess", 4.0),
        ([1, 0, 0, 0], 0.5, "ess", 2.0),
        ([1, 0, 0, 0], 0.9, "ess", 1.0),  # never below 1
        # Two of four share the weight: entropy log 2, half of log 4.
        ([1, 1, 0, 0], 0.0, "entropy", 2.0),
        ([1, 1, 0, 0], 0.5, "entropy", 4 / 3),
        ([1, 0, 0, 0], 0.25, "entropy", 4.0),
        ([1, 1, 1, 1], 0.0, "ess", 1.0),
        ([1, 1, 1, 1], 0.0, "entropy", 1.0),
        ([0, 0, 0, 0], 0.0, "ess", 1.0),
    ],
)
def test_temperature_by_hand(weights, progress, rule, expected):
    log_weights = jnp.log(jnp.asarray(weights, jnp.float32)) + 3.0
    found = resampling_temperature(log_weights, jnp.float32(progress), rule, 1.0, 1.0)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("log_weights", [[0.0, -60.0, -70.0, -80.0], [0.0, -1.0, -jnp.inf, 300.0]])
def test_target_reaches_the_ess_and_no_more(log_weights):
    log_weights = jnp.asarray([log_weights, [0.0, 0.1, 0.2, 0.3]])
    temperature = resampling_temperature(log_weights, jnp.float32(0.2), "target", 0.4, 0.5)
    ess = effective_sample_size(log_weights / temperature[:, None])
    assert float(temperature[0]) > 1 and float(temperature[1]) == 1
    alive = int((log_weights[0] > -jnp.inf).sum())
    np.testing.assert_allclose(ess[0], min(0.4 * 4, 0.5 * alive), rtol=1e-3)


def test_target_leaves_a_lone_particle_alone():
    log_weights = jnp.asarray([-jnp.inf, 0.0, -jnp.inf, -jnp.inf, -jnp.inf])
    found = resampling_temperature(log_weights, jnp.float32(0.2), "target", 0.5, 0.5)
    assert float(found) == pytest.approx(1.0, abs=1e-5)


def test_annealing_is_for_low_ess_early_on():
    log_weights = jnp.log(jnp.array([[8.0, 1, 1], [1, 1, 1]]))
    temperature = lambda u: resampling_temperature(log_weights, jnp.float32(u), "ess", 0.6, 0.5)  # noqa: E731
    np.testing.assert_allclose(temperature(0.25), [1.485, 1.0], rtol=1e-5)
    np.testing.assert_allclose(temperature(0.5), [1.0, 1.0])
    below = resampling_temperature(log_weights, jnp.float32(0.25), "ess", 0.5, 0.5)
    np.testing.assert_allclose(below, [1.0, 1.0])


def program(lm, scores, unit="token"):
    return ponder.Generation(lm, [1, 2], max_new_tokens=4, potential=scores, unit=unit)


CASES = [
    (4, "token", {}),
    (2, ponder.Step("b"), {"lookahead": True}),
    *(
        pytest.param(n, unit, kwargs, marks=pytest.mark.slow)
        for n in (2, 4, 16)
        for unit in ("token", ponder.Step("b"))
        for kwargs in (
            {},
            {"lookahead": True},
            {"rule": "entropy", "ess_threshold": 0.9, "resampling": "multinomial"},
            {"rule": "target"},
        )
    ),
]


@pytest.mark.parametrize(("num_particles", "unit", "kwargs"), CASES, ids=str)
def test_weights_are_proper(toy, scores, num_particles, unit, kwargs):
    model = program(toy, scores, unit)
    algorithm = inference.entropic_smc(model, num_particles, anneal_below=1.0, anneal_until=1.0, **kwargs)
    check_algorithm(algorithm, model, num_runs=2000)


def stepwise_evidences(algorithm, num_runs=3000):
    """Evidence that the steps report, of `num_runs` runs of the pure layer."""

    def run(key):
        key_init, key_steps = jax.random.split(key)
        state = algorithm.init(key_init)
        for t in range(algorithm.program.num_steps):
            state, info = algorithm.step(jax.random.fold_in(key_steps, t), state)
        return info.log_evidence

    log_evidence = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), num_runs))
    return np.exp(np.asarray(log_evidence, np.float64))


@pytest.mark.slow
def test_the_check_notices_what_is_not_divided_out(toy, scores):
    model = program(toy, scores**3.0)
    exact = np.exp(float(inference.exact(model).run().log_evidence))
    z = {}
    for corrected in (True, False):
        algorithm = inference.entropic_smc(model, 4, anneal_below=1.0, anneal_until=1.0, corrected=corrected)
        z[corrected] = abs(float(z_scores(stepwise_evidences(algorithm), exact)))
    assert z[True] < MAX_Z < z[False]


def test_the_published_form_has_no_evidence(toy, scores):
    posterior = inference.entropic_smc(program(toy, scores), 8, corrected=False).run(jax.random.key(0))
    assert np.isnan(posterior.log_evidence) and posterior.stats.log_evidence is None
    assert not posterior.stats.invalid and "log evidence none" in posterior.summary()


@pytest.mark.slow
def test_without_annealing_it_is_smc(toy, scores):
    model = program(toy, scores)
    key = jax.random.key(5)
    plain = inference.smc(model, 8, ess_threshold=1.0).run(key)
    annealed = inference.entropic_smc(model, 8, anneal_below=0.0)
    state, other = annealed.init(key), inference.smc(model, 8, ess_threshold=1.0).init(key)
    state, info = annealed.step(key, state)
    other, same = inference.smc(model, 8, ess_threshold=1.0).step(key, other)
    np.testing.assert_allclose(state.log_evidence, other.log_evidence, atol=1e-6)
    np.testing.assert_allclose(state.log_weights, np.zeros(8), atol=1e-6)
    assert info.ess == same.ess and plain.stats.resampled.any()


@pytest.mark.slow
def test_looking_ahead_is_accounted_for(toy, scores):
    model = program(toy, scores)
    plain = inference.entropic_smc(model, 8).run(jax.random.key(0))
    ahead = inference.entropic_smc(model, 8, lookahead=True).run(jax.random.key(0))
    drawn = int(ahead.stats.num_tokens.sum())
    assert int(ahead.stats.tokens_generated) > drawn
    assert int(ahead.stats.tokens_discarded) >= int(ahead.stats.tokens_generated) - drawn
    assert int(ahead.stats.model_calls) > int(plain.stats.model_calls)


@pytest.mark.slow
def test_looking_ahead_prefers_what_goes_on_well():
    """Two tokens look alike until the next one: after 0 comes weight 0, after 1 weight 1."""
    table = jnp.array([[0.0, 0.0, -jnp.inf]] * 3)
    potential = ponder.text(
        lambda texts: [text[0] == "1" for text in texts],
        prefix=lambda texts: [len(text) < 3 or text[0] == "1" for text in texts],
    )
    lm = ponder.models.TableLM(table, tokenizer=ponder.models.PieceTokenizer((b"0", b"1", b"")))
    model = ponder.Generation(lm, [0], max_new_tokens=4, potential=potential)
    shares = []
    for lookahead in (False, True):
        algorithm = inference.entropic_smc(model, 64, lookahead=lookahead, anneal_below=0.0)
        state = algorithm.init(jax.random.key(0))
        for t in range(2):
            state, _ = algorithm.step(jax.random.key(t), state)
        shares.append(float((state.particles.tokens[:, 0] == 1).mean()))
    assert shares[0] < 0.7 and shares[1] > 0.95


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rule": "linear"}, ValueError, "rule: expected one of ess, entropy, target, got 'linear'"),
        ({"anneal_below": 2}, ValueError, r"anneal_below: expected a number in \[0, 1\], got 2"),
        ({"anneal_until": "x"}, ValueError, r"anneal_until: expected a number in \[0, 1\], got 'x'"),
        ({"lookahead": 1}, TypeError, "lookahead: expected a bool, got 1"),
        ({"corrected": None}, TypeError, "corrected: expected a bool, got None"),
        ({"num_particles": 0}, ValueError, "num_particles: expected an integer >= 1, got 0"),
    ],
)
def test_bad_arguments(toy, scores, kwargs, error, message):
    with pytest.raises(error, match=message):
        inference.entropic_smc(program(toy, scores), **kwargs)
