"""SMC against enumeration; statistical assertions are |z| < 5 (`ponder.testing.MAX_Z`) with fixed keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.inference.particles.smc import SMC, SMCState
from ponder.testing import MAX_Z, check_algorithm, z_scores

NUM_RUNS = 3000
SCHEMES = ["multinomial", "stratified", "systematic", "residual"]


def program(lm, potential, **kwargs):
    return ponder.Generation(lm, [1, 2], max_new_tokens=4, potential=potential, **kwargs)


def evidences(algorithm, num_runs=NUM_RUNS, seed=0):
    keys = jax.random.split(jax.random.key(seed), num_runs)
    log_evidence = jax.jit(lambda keys: jax.lax.map(lambda key: algorithm.run(key).log_evidence, keys))(keys)
    return np.exp(np.asarray(log_evidence, np.float64))


def exact_evidence(program):
    return np.exp(float(inference.exact(program).run().log_evidence))


@pytest.mark.parametrize(
    "num_particles", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("threshold", [pytest.param(0.0, marks=pytest.mark.slow), 0.5, 1.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_evidence_is_unbiased(toy, scores, scheme, threshold, num_particles):
    model = program(toy, scores)
    estimates = evidences(inference.smc(model, num_particles, scheme, threshold))
    assert np.std(estimates) > 0
    assert abs(z_scores(estimates, exact_evidence(model))) < MAX_Z


@pytest.mark.parametrize(
    "num_particles", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"overflow": "force_eos"}, marks=pytest.mark.slow),
        pytest.param({"stop": "ab"}, marks=pytest.mark.slow),
        {"stop": "ab", "overflow": "force_eos"},
        pytest.param({"temperature": 0.6, "top_k": 3}, marks=pytest.mark.slow),
        {"proposal": lambda prior, guide: 0.4 * prior},
    ],
    ids=lambda s: "-".join(s) or "plain",
)
def test_weights_are_proper(toy, scores, settings, num_particles):
    model = program(toy, scores * ponder.regex("(a|b|c)*"), **settings)
    check_algorithm(inference.smc(model, num_particles), model, num_runs=NUM_RUNS)


@pytest.mark.parametrize(
    "potential",
    [
        lambda scores: ponder.power(2.0),
        pytest.param(lambda scores: ponder.power(0.5), marks=pytest.mark.slow),
        pytest.param(lambda scores: ponder.tokens(forbid=[1]) * scores, marks=pytest.mark.slow),
        lambda scores: ponder.regex("a?(b|cc)*"),
        pytest.param(lambda scores: (ponder.power(1.5) * scores) ** 0.7, marks=pytest.mark.slow),
        lambda scores: ponder.text(lambda texts: [0.5 * t.count("a") - 0.2 * len(t) for t in texts]),
    ],
    ids=["power2", "power0.5", "tokens", "regex", "tempered", "text"],
)
def test_weights_are_proper_for_each_potential(toy, scores, potential):
    model = program(toy, potential(scores))
    check_algorithm(inference.smc(model, 4), model, num_runs=2000)


def test_posterior_expectations_converge(toy, scores):
    model = program(toy, scores)
    exact = inference.exact(model).run()
    found = inference.smc(model, 20_000).run(jax.random.key(3))
    assert found.ess > 5_000
    for f in (len, lambda t: t.count("a"), lambda t: t.startswith("b")):
        value = np.array([f(t) for t in found.text], float)
        error = found.expectation(f) - exact.expectation(f)
        assert abs(error) < MAX_Z * value.std() / np.sqrt(found.ess)
    assert abs(float(found.log_evidence - exact.log_evidence)) < 0.05


def exact_prefix_weights(lm, model):
    """The potential whose prefix weights are the exact value function: Σ over completions of p Φ, over p."""
    traces = ponder.enumeration.enumerate_traces(model)
    joint = np.exp(traces.log_prior.astype(float) + traces.log_potential)
    mass, prior = {}, {}
    for tokens, length, weight in zip(traces.tokens, traces.lengths, joint, strict=True):
        for t in range(length + 1):
            prefix = tuple(tokens[:t].tolist())
            mass[prefix] = mass.get(prefix, 0.0) + weight
    logits = np.asarray(lm.table, float)
    for prefix in mass:
        history, log_p = [1, 2], 0.0
        for token in prefix:
            row = logits[history[-2], history[-1]]
            log_p += row[token] - np.logaddexp.reduce(row)
            history.append(token)
        prior[prefix] = log_p
    # State: the trace as a number in base V + 1; values by table.
    table = np.full(5**4, -np.inf)
    for prefix, weight in mass.items():
        table[sum((token + 1) * 5**t for t, token in enumerate(prefix))] = np.log(weight) - prior[prefix]
    return jnp.asarray(table, jnp.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class ValueFunction(ponder.Composable):
    table: jax.Array

    def init(self, num_particles):
        return jnp.zeros((num_particles, 2), jnp.int32)  # code, length

    def update(self, state, tokens, active):
        code = state[:, 0] + (tokens + 1) * 5 ** state[:, 1]
        return jnp.where(active[:, None], jnp.stack([code, state[:, 1] + 1], 1), state)

    def log_prefix(self, state):
        return self.table[state[:, 0]]

    log_complete = log_prefix

    def token_logits(self, state):
        active = jnp.ones(len(state), bool)
        ahead = [self.update(state, jnp.full(len(state), v), active)[:, 0] for v in range(4)]
        ahead = jnp.stack(ahead, 1)
        return self.table[ahead] - self.table[state[:, 0]][:, None]

    def fork(self, state, ancestors):
        return state[ancestors]


jax.tree_util.register_dataclass(ValueFunction, ["table"], [])


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_exact_prefix_weights_have_no_variance(toy, scores, threshold, num_particles):
    """With the value function as potential and the locally optimal proposal, every run gives Z itself."""
    model = program(toy, scores)
    twisted = program(toy, ValueFunction(exact_prefix_weights(toy, model)))
    exact = exact_evidence(model)
    assert exact_evidence(twisted) == pytest.approx(exact, rel=1e-5)
    estimates = evidences(inference.smc(twisted, num_particles, "systematic", threshold), 50)
    np.testing.assert_allclose(estimates, exact, rtol=1e-5)
    posterior = inference.smc(twisted, 8, "systematic", threshold).run(jax.random.key(0))
    steps = int(posterior.stats.num_steps)
    np.testing.assert_allclose(posterior.stats.ess[:steps], 8, rtol=1e-4)


def test_power_is_not_temperature(toy):
    """The target is p² over traces; temperature 1/2 is another distribution, and SMC tells them apart."""
    squared = inference.exact(program(toy, ponder.power(2.0))).run()
    prior = inference.exact(program(toy, None)).run()
    np.testing.assert_allclose(
        np.exp(2 * np.asarray(prior.log_weights)) / np.sum(np.exp(2 * np.asarray(prior.log_weights))),
        squared.weights,
        rtol=1e-4,
    )
    cold = inference.exact(program(toy, None, temperature=0.5)).run()
    assert 0.5 * np.abs(cold.weights - squared.weights).sum() > 0.02  # total variation
    wrong = program(toy, None, temperature=0.5)
    with pytest.raises(AssertionError, match=r"evidence|posterior"):
        check_algorithm(inference.smc(wrong, 4), program(toy, ponder.power(2.0)), num_runs=NUM_RUNS)


@dataclasses.dataclass(frozen=True, eq=False)
class Constant(ponder.Composable):
    """Log Φ is c for the empty trace and c more at every token."""

    value: float

    def init(self, num_particles):
        return jnp.full(num_particles, self.value)

    def update(self, state, tokens, active):
        return state + jnp.where(active, self.value, 0.0)

    def log_prefix(self, state):
        return state

    log_complete = log_prefix

    def token_logits(self, state):
        return None

    def fork(self, state, ancestors):
        return state[ancestors]


def test_a_constant_at_every_step_shifts_the_evidence_exactly(toy, scores):
    lm = dataclasses.replace(toy, eos_token_ids=())  # all traces have four tokens
    plain, shifted = (
        inference.smc(program(lm, potential), 8).run(jax.random.key(5))
        for potential in (scores, scores * Constant(0.25))
    )
    assert float(shifted.log_evidence - plain.log_evidence) == pytest.approx(5 * 0.25, abs=1e-5)
    np.testing.assert_array_equal(shifted.tokens, plain.tokens)
    np.testing.assert_array_equal(shifted.stats.ancestors, plain.stats.ancestors)
    np.testing.assert_allclose(shifted.log_weights, plain.log_weights, atol=1e-5)


def test_same_key_same_result_and_sliced_run_too(toy, scores):
    algorithm = inference.smc(program(toy, scores), 8)
    reports = []
    runs = [
        algorithm.run(jax.random.key(1)),
        algorithm.run(jax.random.key(1)),
        algorithm.run(jax.random.key(1), progress=reports.append, progress_every=1),
        algorithm.run(jax.random.key(2)),
    ]
    for other in runs[1:3]:
        jax.tree.map(np.testing.assert_array_equal, runs[0], other)
    assert float(runs[3].log_evidence) != float(runs[0].log_evidence)
    assert [r.step for r in reports] == list(range(1, len(reports) + 1))
    assert reports[-1].log_evidence == pytest.approx(float(runs[0].log_evidence), abs=1e-5)


@pytest.mark.slow
def test_jit_equals_no_jit(toy, scores):
    algorithm = inference.smc(program(toy, scores * ponder.tokens(forbid=[2])), 4)
    compiled = algorithm.run(jax.random.key(1))
    with jax.disable_jit():
        plain = algorithm.run(jax.random.key(1))
    np.testing.assert_array_equal(compiled.tokens, plain.tokens)
    np.testing.assert_allclose(compiled.log_evidence, plain.log_evidence, rtol=1e-5)
    np.testing.assert_allclose(compiled.log_weights, plain.log_weights, atol=1e-5)


@pytest.mark.slow
def test_vmap_equals_loop(toy, scores):
    algorithm = inference.smc(program(toy, scores), 4)
    keys = jax.random.split(jax.random.key(1), 3)
    batch = jax.vmap(algorithm.run)(keys)
    for i, key in enumerate(keys):
        alone = algorithm.run(key)
        np.testing.assert_array_equal(batch.tokens[i], alone.tokens)
        np.testing.assert_allclose(batch.log_evidence[i], alone.log_evidence, rtol=1e-5)


def test_init_and_step_are_the_pure_layer(toy, scores):
    algorithm = inference.smc(program(toy, scores), 4)
    state = algorithm.init(jax.random.key(0))
    state, info = jax.jit(algorithm.step)(jax.random.key(1), state)
    assert isinstance(state, SMCState)
    assert info.ess.shape == () and info.ancestors.shape == (4,)
    assert 1 <= float(info.ess) <= 4


def test_all_dead_gives_a_flag_and_no_nan(toy):
    model = program(toy, ponder.tokens(allow=[], forbid=[3]))
    with pytest.warns(RuntimeWarning, match="every particle has weight zero"):
        posterior = inference.smc(model, 4).run(jax.random.key(0))
    assert float(posterior.log_evidence) == -np.inf
    assert bool(posterior.stats.degenerate)
    np.testing.assert_allclose(posterior.weights, 0.25)
    assert int(posterior.stats.num_steps) == 1  # nothing is left to decode
    assert "degenerate" in posterior.summary().lower()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_invalid_potentials_are_flagged(toy, value):
    """Traces with a token b get NaN or +inf; they lose their weight and the rest is right."""

    class Broken(ponder.Composable):
        def init(self, num_particles):
            return jnp.zeros(num_particles)

        def update(self, state, tokens, active):
            return state + jnp.where(active & (tokens == 1), value, 0.0)

        def log_prefix(self, state):
            return state

        log_complete = log_prefix

        def token_logits(self, state):
            return None

        def fork(self, state, ancestors):
            return state[ancestors]

    model = program(toy, Broken())
    with pytest.warns(RuntimeWarning, match="NaN"):
        posterior = inference.smc(model, 64).run(jax.random.key(0))
    assert bool(posterior.stats.invalid)
    assert np.isfinite(float(posterior.log_evidence))
    assert posterior.expectation(lambda t: "b" in t) == 0.0


def test_finished_particles_rest(toy, scores):
    """Once done, a particle draws nothing and its log weight stays, whatever the others do."""
    model = program(toy, scores)
    key = jax.random.key(4)
    state = model.init(key, 32)
    for t in range(model.num_steps):
        before = state
        state, move, log_weight = model.propagate(jax.random.fold_in(key, t), state)
        done = np.asarray(before.done)
        np.testing.assert_array_equal(np.asarray(log_weight)[done], 0.0)
        np.testing.assert_array_equal(np.asarray(move.log_proposal)[done], 0.0)
        for name in ("tokens", "lengths", "done", "potential", "log_potential", "log_prior"):
            a, b = np.asarray(getattr(before, name)), np.asarray(getattr(state, name))
            np.testing.assert_array_equal(a[done], b[done])
    assert done.any() and not done.all()


def test_loop_ends_when_all_are_done(toy):
    model = ponder.Generation(toy, [1, 2], max_new_tokens=50, potential=ponder.regex("a"))
    posterior = inference.smc(model, 4).run(jax.random.key(0))
    assert int(posterior.stats.num_steps) == 2  # "a", EOS
    assert int(posterior.stats.tokens_generated) == 8
    assert set(posterior.text) == {"a"}


def test_token_accounting(toy, scores):
    posterior = inference.smc(program(toy, scores), 16, "multinomial", 1.0).run(jax.random.key(2))
    stats = jax.tree.map(np.asarray, posterior.stats)
    # Walk each final particle back and collect the (step, row) nodes that it came through.
    nodes = set()
    for row in range(16):
        for t in reversed(range(int(stats.num_steps))):
            row = stats.ancestors[t, row]
            if stats.num_tokens[t, row]:
                nodes.add((t, row))
    assert stats.tokens_generated == stats.num_tokens.sum()
    assert stats.tokens_discarded == stats.num_tokens.sum() - len(nodes) > 0


class DropsCarriedWeights(SMC):
    """Forgets the weights of steps without resampling."""

    def step(self, key, state):
        return super().step(key, state._replace(log_weights=jnp.zeros_like(state.log_weights)))


class KeepsWeightsAfterResampling(SMC):
    """Resamples, but goes on with the old weights."""

    def step(self, key, state):
        after, info = super().step(key, state)
        kept = jnp.where(info.resampled, info.log_evidence - after.log_evidence, 0.0)
        return after._replace(
            log_weights=after.log_weights + kept + 0.3 * jnp.arange(4, dtype=jnp.float32) / 4
        ), info


class IgnoresTheFirstWeight(SMC):
    """Leaves out the potential of the empty trace."""

    def finish(self, state, history):
        posterior = super().finish(state, history)
        return dataclasses.replace(posterior, log_evidence=posterior.log_evidence - 0.25)


class ReusesKeys(SMC):
    """Draws the tokens of every step with one key."""

    def step(self, key, state):
        return super().step(jax.random.key(0), state)


class ResamplesTheWrongRows(SMC):
    """Draws ancestors by the weights of their neighbours."""

    def _ancestors(self, key, log_weights):
        return super()._ancestors(key, jnp.roll(log_weights, 1))


@pytest.mark.parametrize(
    "wrong",
    [
        DropsCarriedWeights,
        KeepsWeightsAfterResampling,
        IgnoresTheFirstWeight,
        ReusesKeys,
        ResamplesTheWrongRows,
    ],
)
def test_the_checks_have_power(toy, scores, wrong):
    """The same assertion that SMC passes fails for kernels that are wrong in known ways."""
    jax.tree_util.register_dataclass(
        wrong, ["program"], ["num_particles", "resampling", "ess_threshold", "method", "auxiliary"]
    )
    model = program(toy, scores)
    right = inference.smc(model, 4)
    check_algorithm(right, model, num_runs=NUM_RUNS)
    broken = wrong(model, 4, right.resampling, 0.9, "wrong")
    with pytest.raises(AssertionError, match=r"evidence|posterior"):
        check_algorithm(broken, model, num_runs=NUM_RUNS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_particles": 0}, "num_particles"),
        ({"num_particles": 2.5}, "num_particles"),
        ({"num_particles": True}, "num_particles"),
        ({"ess_threshold": 1.5}, "ess_threshold"),
        ({"ess_threshold": "0.5"}, "ess_threshold"),
        ({"resampling": "bootstrap"}, "resampling"),
    ],
)
def test_bad_arguments(toy, scores, arguments, message):
    with pytest.raises(ValueError, match=message):
        inference.smc(program(toy, scores), **arguments)


def test_bad_program_and_key(toy, scores):
    with pytest.raises(TypeError, match="program"):
        inference.smc(toy)
    with pytest.raises(TypeError, match="key"):
        inference.smc(program(toy, scores)).run(0)
    with pytest.raises(TypeError, match="key"):
        inference.smc(program(toy, scores)).run(jax.random.split(jax.random.key(0), 3))


def test_algorithms_share_their_compilation(toy, scores):
    """A second algorithm of the same shapes, with another prompt, is not traced again."""
    traced = []

    class Counting(type(scores)):  # no pytree of its own: a static leaf, compared by identity
        def update(self, state, tokens, active):
            traced.append(tokens.shape)
            return super().update(state, tokens, active)

    potential = Counting(scores.scores)
    inference.smc(program(toy, potential), 8).run(jax.random.key(0))
    before = len(traced)
    other = ponder.Generation(toy, [2, 0], max_new_tokens=4, potential=potential)
    inference.smc(other, 8).run(jax.random.key(1))
    assert len(traced) == before > 0
    inference.smc(other, 9).run(jax.random.key(1))
    assert len(traced) > before


@pytest.mark.slow
def test_double_precision_mode_changes_nothing(toy):
    """User potentials may then return float64; weights stay float32."""

    class Doubles(ponder.Composable):
        def init(self, num_particles):
            return jnp.zeros(num_particles)

        def update(self, state, tokens, active):
            return state + jnp.where(active, jnp.array([0.3, -0.5, 0.8, -1.0])[tokens], 0.0)

        def log_prefix(self, state):
            return state

        log_complete = log_prefix

        def token_logits(self, state):
            return np.zeros((len(state), 4))

        def fork(self, state, ancestors):
            return state[ancestors]

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        model = program(toy, ponder.regex("(a|b)*") * Doubles(), stop="ab", overflow="force_eos")
        check_algorithm(inference.smc(model, 4), model, num_runs=1000)
        assert inference.smc(model, 4).run(jax.random.key(0)).log_evidence.dtype == jnp.float32


class ConstantGuide(ponder.Composable):
    """Guides every token by the same number, a constant of the compiled program."""

    def __init__(self, value):
        self.value = value

    def init(self, num_particles):
        return jnp.zeros(num_particles)

    def update(self, state, tokens, active):
        return state

    def log_prefix(self, state):
        return state

    log_complete = log_prefix

    def token_logits(self, state):
        return jnp.full((state.shape[0], 4), self.value)

    def fork(self, state, ancestors):
        return state[ancestors]


NAN = {
    "proposal": {"proposal": lambda p, g: p * jnp.nan},
    "constant proposal": {"proposal": lambda p, g: jnp.full(p.shape, jnp.nan)},
    "one token": {"proposal": lambda p, g: p.at[:, 2].set(jnp.nan)},
    "with an impossible token": {
        "proposal": lambda p, g: p * jnp.nan,
        "potential": ponder.tokens(forbid=[0]),
    },
    "guide": {"potential": ConstantGuide(jnp.nan)},
    "rejection": {"potential": ConstantGuide(jnp.nan), "proposal": "rejection"},
}


@pytest.mark.parametrize("unit", ["token", ponder.Step("c", max_tokens=2)], ids=["token", "step"])
@pytest.mark.parametrize("case", NAN)
def test_a_proposal_of_nan_is_flagged(toy, case, unit):
    """XLA folds the normaliser of a constant NaN to -inf, which alone would look like a dead end."""
    model = ponder.Generation(toy, [1], max_new_tokens=3, unit=unit, **NAN[case])
    with pytest.warns(RuntimeWarning, match="every particle"), pytest.warns(RuntimeWarning, match="gave NaN"):
        posterior = inference.importance_sampling(model, 4).run(jax.random.key(0))
    assert bool(posterior.stats.invalid) and float(posterior.log_evidence) == -np.inf


def test_a_guide_that_is_a_number_is_not_flagged(toy):
    model = ponder.Generation(toy, [1], max_new_tokens=3, potential=ConstantGuide(0.5))
    assert not inference.smc(model, 4).run(jax.random.key(0)).stats.invalid
