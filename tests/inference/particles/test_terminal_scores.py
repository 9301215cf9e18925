"""A terminal score, which says nothing of unfinished traces, is weighed when all particles have ended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.bases import BasePotential
from ponder.foreign import as_potential, as_program
from ponder.inference.particles.smc import SMC
from ponder.inference.resampling import multinomial
from ponder.models.pytrees import pytree
from ponder.testing import MAX_Z, check_algorithm, z_scores


@pytree
class Counts(ponder.Composable):
    """Log Φ is `score` if a trace has token 1, which only a complete trace is asked."""

    score: jax.Array

    def init(self, num_particles):
        return jnp.zeros(num_particles, bool)

    def update(self, state, tokens, active):
        return state | (active & (tokens == 1))

    def log_complete(self, state):
        return jnp.where(state, self.score, 0.0)


@pytree
class Hasty(Counts):
    """The same, weighed as each trace ends."""

    @property
    def withholds(self):
        return False


def estimates(program, num_runs=200):
    run = inference.smc(program, 16).run
    found = jax.vmap(run)(jax.random.split(jax.random.key(0), num_runs))
    length = (np.exp(found.log_weights) * np.asarray(found.lengths)).sum(-1)
    return np.asarray(found.log_evidence), length


def test_the_first_to_end_do_not_crowd_out_the_others(toy):
    settings = {"max_new_tokens": 6}
    truth = inference.exact(
        ponder.Generation(toy, [1, 2], potential=Counts(jnp.float32(8)), **settings)
    ).run()
    mean_length = float(truth.weights @ np.asarray(truth.lengths))
    errors = {}
    for kind in (Counts, Hasty):
        program = ponder.Generation(toy, [1, 2], potential=kind(jnp.float32(8)), **settings)
        log_evidence, length = estimates(program)
        errors[kind] = np.median(np.abs(log_evidence - truth.log_evidence)), abs(length.mean() - mean_length)
        if kind is Counts:
            ratio = np.exp(log_evidence.astype(np.float64) - float(truth.log_evidence))
            assert np.abs(z_scores(ratio[:, None], np.ones(1))).max() < MAX_Z
    assert errors[Counts][0] < 0.3 and errors[Counts][1] < 0.2
    assert errors[Hasty][0] > 2 * errors[Counts][0] and errors[Hasty][1] > 2 * errors[Counts][1]


@pytest.mark.slow
def test_the_score_is_part_of_what_a_trace_says(toy, scores):
    program = ponder.Generation(toy, [1, 2], max_new_tokens=4, potential=Counts(jnp.float32(2)) * scores)
    posterior = inference.smc(program, 8, ess_threshold=1.0).run(jax.random.key(1))
    exact = inference.exact(program).run()
    table = {
        tuple(row[:n]): value
        for row, n, value in zip(
            np.asarray(exact.tokens), exact.lengths, np.asarray(exact.log_potential), strict=True
        )
    }
    for row, n, value in zip(
        np.asarray(posterior.tokens), posterior.lengths, np.asarray(posterior.log_potential), strict=True
    ):
        np.testing.assert_allclose(value, table[tuple(row[:n])], rtol=1e-5)


def test_what_is_withheld(toy, scores):
    terminal = Counts(jnp.float32(2))
    assert terminal.withholds and (terminal * scores).withholds and (scores * terminal**0.5).withholds
    assert not scores.withholds and not (scores**2.0).withholds
    for potential, withholds in (
        (ponder.text(len), True),
        (ponder.text(len, prefix=len), False),
        (ponder.regex("a*"), False),
        (ponder.power(2.0), False),
    ):
        program = ponder.Generation(toy, [1, 2], max_new_tokens=4, potential=potential)
        assert program.withholds is withholds
    batch = ponder.Generation(toy, [[1, 2], [2]], max_new_tokens=4, potential=[scores, terminal])
    assert batch.withholds

    class Foreign:
        init, update, log_complete, fork = Counts.init, Counts.update, Counts.log_complete, Counts.fork
        log_prefix, token_logits = BasePotential.log_prefix, BasePotential.token_logits

    assert not as_potential(Foreign()).withholds
    Foreign.withholds = True
    assert as_potential(Foreign()).withholds


def test_what_a_score_forbids_ends_at_once(toy):
    """A trace of weight zero makes room for others."""
    never = ponder.Generation(toy, [1, 2], max_new_tokens=4, potential=Counts(jnp.float32(-jnp.inf)))
    posterior = inference.smc(never, 64, ess_threshold=1.0).run(jax.random.key(0))
    assert np.asarray(posterior.stats.resampled).any() and float(posterior.ess) > 1
    assert not (np.asarray(posterior.tokens)[posterior.weights > 0] == 1).any()


def test_nan_is_noticed_when_it_is_weighed(toy):
    program = ponder.Generation(toy, [1, 2], max_new_tokens=3, potential=Counts(jnp.float32(jnp.nan)))
    with pytest.warns(RuntimeWarning):
        posterior = inference.smc(program, 8).run(jax.random.key(0))
    assert bool(posterior.stats.invalid) and np.isfinite(posterior.weights).all()


def test_a_kernel_that_does_not_ask_for_it_gets_whole_weights(toy, scores):
    program = ponder.Generation(toy, [1, 2], max_new_tokens=3, potential=Counts(jnp.float32(2)) * scores)
    total, state = 0.0, program.init(jax.random.key(0), 16)
    assert state.withheld is None and program.withhold(state).withheld.shape == (16,)
    step = jax.jit(program.propagate)
    for key in jax.random.split(jax.random.key(1), 3):
        state, _, log_weight = step(key, state)
        total = total + log_weight
    np.testing.assert_allclose(total, program.traces(state).log_potential, atol=1e-5)


def test_programs_that_withhold_and_cannot_settle_are_refused(toy):
    class Half:
        num_steps, withholds = 3, True
        init = propagate = fork = is_done = settle = print

    with pytest.raises(TypeError, match="Half withholds terminal scores, but has no withhold"):
        inference.smc(Half())


@pytest.mark.slow
@pytest.mark.parametrize("num_particles", [2, 4, 16])
@pytest.mark.parametrize("unit", ["token", ponder.Step("b", max_tokens=2)], ids=["token", "step"])
def test_the_target_stays(toy, scores, unit, num_particles):
    program = ponder.Generation(
        toy, [1, 2], max_new_tokens=4, potential=Counts(jnp.float32(2)) * scores, unit=unit
    )
    check_algorithm(inference.smc(program, num_particles, "residual", 1.0), program, num_runs=4000)
    check_algorithm(inference.entropic_smc(program, num_particles), program, num_runs=4000)


@pytest.mark.slow
def test_a_score_that_is_never_weighed_would_be_noticed(toy):
    """Power: where resampling leaves only traces that have ended, a step is still to come."""

    class Forgets(SMC):
        def is_finished(self, state):
            return self.all_ended(state.particles, state.log_weights)

    pytree(Forgets)
    unit = ponder.Step("b", max_tokens=2)
    program = ponder.Generation(toy, [1, 2], max_new_tokens=4, potential=Counts(jnp.float32(2)), unit=unit)
    settings = (as_program(program), 4, multinomial, 1.0)
    check_algorithm(SMC(*settings), program, num_runs=4000)
    with pytest.raises(AssertionError):
        check_algorithm(Forgets(*settings), program, num_runs=4000)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["token", ponder.Step("b")], ids=["token", "step"])
def test_particle_gibbs_agrees(toy, scores, unit):
    """The mean score over chains from short runs of SMC, against enumeration."""
    program = ponder.Generation(
        toy, [1, 2], max_new_tokens=4, potential=Counts(jnp.float32(2)) * scores, unit=unit
    )
    exact = inference.exact(program).run()
    gibbs = inference.particle_gibbs(program, 4, num_sweeps=1, warmup=12)
    draws = jax.vmap(gibbs.run)(jax.random.split(jax.random.key(0), 4000))
    truth = exact.weights @ np.asarray(exact.log_potential)
    assert np.abs(z_scores(np.asarray(draws.log_potential), np.array([truth]))).max() < MAX_Z
    lengths = exact.weights @ np.asarray(exact.lengths)
    assert np.abs(z_scores(np.asarray(draws.lengths), np.array([lengths]))).max() < MAX_Z


@pytest.mark.slow
def test_each_prompt_waits_for_its_own_particles(toy):
    potential = Counts(jnp.float32(3))
    prompts = [[1, 2], [2, 0]]
    batch = ponder.Generation(toy, prompts, max_new_tokens=4, potential=potential)
    key = jax.random.key(5)
    together = inference.smc(batch, 4).run(key)
    for prompt, own, found in zip(prompts, jax.random.split(key, 2), together, strict=True):
        alone = inference.smc(ponder.Generation(toy, prompt, max_new_tokens=4, potential=potential), 4).run(
            own
        )
        np.testing.assert_array_equal(found.tokens, alone.tokens)
        np.testing.assert_allclose(found.log_weights, alone.log_weights, atol=1e-5)
        np.testing.assert_allclose(found.log_evidence, alone.log_evidence, atol=1e-5)
