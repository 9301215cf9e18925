"""Particle Gibbs leaves the posterior invariant: from exact starts, one sweep, against enumeration."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import register_dataclass

import ponder
from ponder import inference
from ponder.enumeration import enumerate_traces, replay
from ponder.foreign import as_program
from ponder.inference.particles.conditional import ConditionalSMC, sweep
from ponder.inference.particles.smc import SMC
from ponder.inference.resampling import multinomial
from ponder.inference.running.driver import complete
from ponder.models import TableLM
from ponder.testing import MAX_Z, z_scores

NUM_STARTS = 4000
MIN_EXPECTED = 25
"""Traces that are expected more rarely among the starts are pooled."""


def program(lm, scores, unit="token", **kwargs):
    return ponder.Generation(lm, [1, 2], max_new_tokens=4, potential=scores, unit=unit, **kwargs)


def conditional(program, num_particles, path, ancestors, ess_threshold=1.0):
    particles = SMC(as_program(program), num_particles, multinomial, ess_threshold)
    return ConditionalSMC(particles, path, ancestors)


def worst_z(model, num_particles, wrap=lambda program, final: program, **settings):
    """Largest |z| over the traces' shares after one sweep from exact posterior draws, and how many moved."""
    traces = enumerate_traces(model)
    joint = traces.log_prior + traces.log_potential
    weights = np.exp(joint - np.logaddexp.reduce(joint))
    _, moves = jax.jit(lambda tokens: replay(model, tokens))(jnp.asarray(traces.tokens))
    start = np.random.default_rng(0).choice(len(weights), NUM_STARTS, p=weights / weights.sum())

    def move_on(key, row):
        wrapped = wrap(model, jnp.asarray(traces.log_potential)[row])
        path = jax.tree.map(lambda x: x[:, row], moves)
        return sweep(conditional(wrapped, num_particles, path, **settings), key).trace

    keys = jax.random.split(jax.random.key(1), NUM_STARTS)
    tokens, lengths = jax.jit(jax.vmap(move_on))(keys, jnp.asarray(start))[:2]
    inside = np.arange(4)[None] < np.asarray(lengths)[:, None]
    number = {tuple(row[:n]): i for i, (row, n) in enumerate(zip(traces.tokens, traces.lengths, strict=True))}
    found = [number[tuple(row[mask])] for row, mask in zip(np.asarray(tokens), inside, strict=True)]
    group = np.where(weights * NUM_STARTS < MIN_EXPECTED, len(weights), np.arange(len(weights)))
    groups, member = np.unique(group, return_inverse=True)
    share = np.bincount(member, weights)
    z = z_scores(np.eye(len(groups))[member[found]], share)
    return np.abs(z).max(), np.mean(np.asarray(found) != start)


FAST = [(2, "token", False), (3, ponder.Step("b"), True)]
ALL = [(n, u, a) for n in (2, 3, 8) for u in ("token", ponder.Step("b")) for a in (False, True)]


@pytest.mark.parametrize(
    ("num_particles", "unit", "ancestors"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FAST)],
    ids=str,
)
def test_a_sweep_leaves_the_posterior_invariant(toy, scores, num_particles, unit, ancestors):
    z, moved = worst_z(program(toy, scores, unit), num_particles, ancestors=ancestors)
    assert z < MAX_Z and moved > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["token", ponder.Step("b")], ids=str)
def test_the_retained_path_keeps_its_row(toy, scores, unit):
    model = program(toy, scores, unit)
    traces = enumerate_traces(model)
    _, moves = jax.jit(lambda tokens: replay(model, tokens))(jnp.asarray(traces.tokens))

    def first_row(key, row):
        path = jax.tree.map(lambda x: x[:, row], moves)
        state = complete(conditional(model, 3, path, ancestors=False), key).state
        return model.traces(state.particles).tokens[0]

    rows = jnp.arange(len(traces.tokens))
    tokens = jax.jit(jax.vmap(first_row))(jax.random.split(jax.random.key(0), len(rows)), rows)
    inside = np.arange(4)[None] < traces.lengths[:, None]
    np.testing.assert_array_equal(np.where(inside, tokens, 0), np.where(inside, traces.tokens, 0))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"overflow": "force_eos"}, {"stop": "ab"}], ids=str)
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_also_with_adaptive_resampling_and_other_ends(toy, scores, settings, threshold):
    model = program(toy, scores, ponder.Step("b", max_tokens=2, max_steps=3), **settings)
    z, moved = worst_z(model, 3, ancestors=True, ess_threshold=threshold)
    assert z < MAX_Z and moved > 0.05


@pytest.mark.slow
def test_also_with_a_proposal_whose_normaliser_is_an_estimate(toy):
    """The estimate is part of a path: starts come from one-particle runs, resampled by their weights."""
    allowed = lambda texts: ["ab" not in text for text in texts]  # noqa: E731
    model = program(toy, ponder.text(allowed, prefix=allowed), proposal="rejection")
    traces = enumerate_traces(model)
    joint = traces.log_prior + traces.log_potential
    weights = np.exp(joint - np.logaddexp.reduce(joint))

    def alone(key):
        found = sweep(conditional(model, 1, None, ancestors=False, ess_threshold=0.0), key)
        return found.moves, found.log_evidence

    moves, log_weights = jax.jit(jax.vmap(alone))(jax.random.split(jax.random.key(2), 20 * NUM_STARTS))
    share = np.exp(np.asarray(log_weights, np.float64))
    start = np.random.default_rng(1).choice(len(share), NUM_STARTS, p=share / share.sum())

    def move_on(key, path):
        return sweep(conditional(model, 3, path, ancestors=False), key).trace

    keys = jax.random.split(jax.random.key(3), NUM_STARTS)
    tokens, lengths = jax.jit(jax.vmap(move_on))(keys, jax.tree.map(lambda x: x[start], moves))[:2]
    number = {tuple(row[:n]): i for i, (row, n) in enumerate(zip(traces.tokens, traces.lengths, strict=True))}
    found = [number[tuple(t[:n])] for t, n in zip(np.asarray(tokens), np.asarray(lengths), strict=True)]
    common = weights * NUM_STARTS > MIN_EXPECTED
    z = z_scores(np.eye(len(weights))[found][:, common], weights[common])
    assert np.abs(z).max() < MAX_Z


def test_ancestor_sampling_is_refused_with_such_a_proposal(toy):
    """The recorded estimate was made given another past: joined to a new one it is biased."""
    model = program(toy, ponder.text(lambda texts: [True] * len(texts)), proposal="rejection")
    with pytest.raises(ValueError, match="ancestor_sampling: not possible with proposal='rejection'"):
        inference.particle_gibbs(model)
    inference.particle_gibbs(model, ancestor_sampling=False)


@pytest.mark.slow
def test_chains_side_by_side(toy, scores):
    chain = inference.particle_gibbs(program(toy, scores), 3, num_sweeps=5)
    keys = jax.random.split(jax.random.key(0), 2)
    together = jax.vmap(chain.run)(keys)
    for i in range(2):
        np.testing.assert_array_equal(together.tokens[i], chain.run(keys[i]).tokens)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FinalScore:
    """The mistake of a rival library: the retained path is weighted by its final score at every step."""

    program: Any
    final: jax.Array

    @property
    def num_steps(self):
        return self.program.num_steps

    def init(self, key, num_particles):
        return self.program.init(key, num_particles)

    def propagate(self, key, state, forced=None):
        going = ~self.program.is_done(state)
        state, move, log_weight = self.program.propagate(key, state, forced)
        retained = jnp.zeros_like(going) if forced is None else forced[0]
        return state, move, jnp.where(retained & going, self.final, log_weight)

    def fork(self, state, ancestors):
        return self.program.fork(state, ancestors)

    def is_done(self, state):
        return self.program.is_done(state)

    def traces(self, state):
        return self.program.traces(state)


@pytest.mark.slow
def test_the_check_notices_a_path_weighted_by_its_final_score(toy, scores):
    model = program(toy, scores)
    assert worst_z(model, 8, ancestors=False)[0] < MAX_Z
    assert worst_z(model, 8, wrap=FinalScore, ancestors=False)[0] > MAX_Z


@pytest.mark.slow
def test_the_chain_finds_the_posterior(toy, scores):
    model = program(toy, scores, ponder.Step("b"))
    chain = inference.particle_gibbs(model, 4, num_sweeps=400, warmup=10)
    means = [chain.run(jax.random.key(i)).expectation(len) for i in range(20)]
    exact = inference.exact(model).run().expectation(len)
    assert abs(z_scores(np.asarray(means), np.asarray(exact))) < MAX_Z


def test_what_the_chain_returns(toy, scores):
    model = program(toy, scores)
    chain = inference.particle_gibbs(model, 4, num_sweeps=7, warmup=3)
    posterior = chain.run(jax.random.key(0))
    assert len(posterior) == 7 and np.isnan(posterior.log_evidence)
    np.testing.assert_allclose(posterior.weights, 1 / 7, rtol=1e-6)
    assert 0 < posterior.stats.acceptance <= 1 and int(posterior.stats.num_steps) == 10
    again = chain.run(jax.random.key(0))
    np.testing.assert_array_equal(posterior.tokens, again.tokens)
    traces = enumerate_traces(model)
    known = {tuple(t[:n]): p for t, n, p in zip(traces.tokens, traces.lengths, traces.log_prior, strict=True)}
    for row in range(7):
        tokens = tuple(np.asarray(posterior.tokens[row, : posterior.lengths[row]]))
        assert float(posterior.log_prior[row]) == pytest.approx(known[tokens], abs=1e-5)


@pytest.mark.slow
def test_init_and_step_are_the_pure_layer(toy, scores):
    chain = inference.particle_gibbs(program(toy, scores), 4, num_sweeps=1)
    state = jax.jit(chain.init)(jax.random.key(0))
    after, info = jax.jit(chain.step)(jax.random.key(1), state)
    assert after.trace.tokens.shape == (4,) and float(info.ess[0]) > 0
    # With two particles of which one is retained, the ESS is at most two.
    assert np.isfinite(info.log_evidence)


def test_no_weight_is_a_flag_and_no_nan(toy):
    model = program(toy, ponder.text(lambda texts: [False] * len(texts)))
    with pytest.warns(RuntimeWarning, match="weight zero"):
        posterior = inference.particle_gibbs(model, 3, num_sweeps=2).run(jax.random.key(0))
    assert posterior.stats.degenerate
    np.testing.assert_allclose(posterior.weights, 0.5)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"num_particles": 1}, ValueError, "num_particles: expected an integer >= 2, got 1"),
        ({"num_sweeps": 0}, ValueError, "num_sweeps: expected an integer >= 1, got 0"),
        ({"warmup": -1}, ValueError, "warmup: expected an integer >= 0, got -1"),
        ({"ancestor_sampling": 1}, TypeError, "ancestor_sampling: expected a bool, got 1"),
        ({"ess_threshold": 1.5}, ValueError, r"ess_threshold: expected a number in \[0, 1\], got 1.5"),
    ],
)
def test_bad_arguments(toy, scores, kwargs, error, message):
    with pytest.raises(error, match=message):
        inference.particle_gibbs(program(toy, scores), **kwargs)


def test_bad_programs(toy, scores):
    with pytest.raises(TypeError, match="program: expected a StateSpaceModel, got int"):
        inference.particle_gibbs(3)
    batch = ponder.Generation(toy, [[1], [2]], max_new_tokens=2)
    with pytest.raises(TypeError, match="program: expected one prompt, got a batch"):
        inference.particle_gibbs(batch)
    with pytest.raises(TypeError, match="key: expected a single PRNG key"):
        inference.particle_gibbs(program(toy, scores)).run(0)


@pytest.mark.slow
def test_a_long_path_keeps_its_place():
    """Thirty tokens, two particles: without ancestor sampling the first tokens hardly ever move."""
    lm = TableLM.random(jax.random.key(3), 3)
    model = ponder.Generation(lm, [0], max_new_tokens=30, potential=ponder.power(1.5))
    moved = {}
    for ancestors in (False, True):
        chain = inference.particle_gibbs(model, 3, num_sweeps=200, ancestor_sampling=ancestors)
        tokens = np.asarray(chain.run(jax.random.key(0)).tokens)
        moved[ancestors] = (tokens[1:, :5] != tokens[:-1, :5]).any(axis=1).mean()
    assert moved[True] > 2 * moved[False]
