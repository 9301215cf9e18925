"""Resampling schemes: unbiased counts, dead rows never drawn, survivors in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.inference.particles import resampling
from ponder.testing import MAX_Z, z_scores

SCHEMES = ["multinomial", "stratified", "systematic", "residual"]
LOG_WEIGHTS = jnp.array([0.3, -jnp.inf, 1.2, -2.0, -jnp.inf, 0.0]) - 500.0  # the scale must not matter


def counts(scheme, log_weights, num_samples, num_runs=4000):
    draw = jax.vmap(lambda key: getattr(resampling, scheme)(key, log_weights, num_samples))
    ancestors = draw(jax.random.split(jax.random.key(0), num_runs))
    assert ancestors.dtype == jnp.int32 and ancestors.shape == (num_runs, num_samples)
    return np.stack([np.bincount(row, minlength=len(log_weights)) for row in np.asarray(ancestors)])


@pytest.mark.parametrize("num_samples", [1, 6, 11])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_counts_are_unbiased(scheme, num_samples):
    weights = np.exp(np.asarray(LOG_WEIGHTS, float) + 500)
    found = counts(scheme, LOG_WEIGHTS, num_samples)
    assert (found[:, weights == 0] == 0).all()
    z = z_scores(found, num_samples * weights / weights.sum())
    assert (abs(z) < MAX_Z).all()


def test_the_check_has_power():
    found = counts("systematic", LOG_WEIGHTS * 0.9, 6)
    weights = np.exp(np.asarray(LOG_WEIGHTS, float) + 500)
    assert (abs(z_scores(found, 6 * weights / weights.sum())) >= MAX_Z).any()


@pytest.mark.parametrize("scheme", ["stratified", "systematic", "residual"])
def test_low_variance_schemes_keep_their_bounds(scheme):
    """Residual and systematic copy each row ⌊Nw⌋ times at least; no scheme is noisier than multinomial."""
    weights = np.exp(np.asarray(LOG_WEIGHTS, float) + 500)
    share = 6 * weights / weights.sum()
    found = counts(scheme, LOG_WEIGHTS, 6)
    if scheme != "stratified":
        assert (found >= np.floor(share - 1e-5)).all()
    if scheme == "systematic":
        assert (found <= np.ceil(share + 1e-5)).all()
    assert found.var(0).sum() < counts("multinomial", LOG_WEIGHTS, 6).var(0).sum()


@pytest.mark.parametrize("scheme", ["systematic", "residual"])
def test_equal_weights_copy_each_row_once(scheme):
    found = counts(scheme, jnp.full(8, -3.0), 8, 50)
    assert (found == 1).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_particle(scheme):
    assert (counts(scheme, jnp.array([-1e4]), 3, 10) == 3).all()


def test_keep_survivors():
    rng = np.random.default_rng(0)
    for _ in range(200):
        ancestors = rng.integers(0, 9, 9)
        kept = np.asarray(resampling.keep_survivors(jnp.asarray(ancestors)))
        np.testing.assert_array_equal(np.sort(kept), np.sort(ancestors))
        alive = np.unique(ancestors)
        np.testing.assert_array_equal(kept[alive], alive)


@pytest.mark.parametrize(
    ("log_weights", "expected"),
    [([0.0, 0.0, 0.0], 3.0), ([-900.0, -jnp.inf, -jnp.inf], 1.0), ([0.0, jnp.log(0.5), -jnp.inf], 1.8)],
)
def test_effective_sample_size(log_weights, expected):
    assert float(resampling.effective_sample_size(jnp.array(log_weights))) == pytest.approx(
        expected, rel=1e-5
    )


def test_effective_sample_size_of_nothing_is_zero():
    assert float(resampling.effective_sample_size(jnp.full(3, -jnp.inf))) == 0.0


def test_rounding_never_revives_a_dead_row():
    """Prefix sums of many terms waver in the last bit where weights are zero; try points right at them."""
    weights = jnp.where(jax.random.uniform(jax.random.key(0), (5000,)) < 0.2, 1.0, 0.0) * 0.1
    weights = weights * jnp.exp(jax.random.normal(jax.random.key(1), weights.shape))
    cumulative = jnp.cumsum(weights)
    for shift in (-1e-7, 0.0, 1e-7):
        rows = resampling._invert(weights, cumulative / cumulative[-1] * (1 + shift))
        assert (weights[rows] > 0).all()
