"""Calibration: maps are monotone and recover a known distortion; errors and tables by hand; the plot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import beta

import ponder
from ponder.models import TableLM, TableReward
from ponder.protocols import Context
from ponder.rewards import calibration
from ponder.testing import MAX_Z

FITS = {
    "temperature": calibration.temperature,
    "isotonic": calibration.isotonic,
    "quantile": calibration.quantile,
}


def overconfident(n, temperature, seed=0):
    """Scores whose logits are `temperature` times those of the success probabilities, and outcomes."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0.02, 0.98, n)
    return expit(temperature * logit(truth)), rng.random(n) < truth, truth


@pytest.mark.parametrize("name", FITS)
def test_maps_are_monotone_pytrees_in_the_open_interval(name):
    scores, outcomes, _ = overconfident(300, 2.5)
    fitted = FITS[name](scores, outcomes)
    grid = jnp.linspace(0, 1, 1001).reshape(7, 143)
    values = np.asarray(jax.jit(lambda fitted, grid: fitted(grid))(fitted, grid))
    assert values.shape == grid.shape
    assert (np.diff(values.ravel()) >= 0).all()
    assert (values > 0).all() and (values < 1).all()
    np.testing.assert_allclose(values, fitted(grid), rtol=1e-6)


def test_temperature_recovers_a_known_one():
    """Within |z| < 5 of the standard error from the Fisher information."""
    scores, outcomes, truth = overconfident(4000, 2.5)
    slope = 1 / float(calibration.temperature(scores, outcomes).temperature)
    error = 1 / np.sqrt((truth * (1 - truth) * logit(scores) ** 2).sum())
    assert abs(slope - 1 / 2.5) / error < MAX_Z
    assert abs(slope - 1.0) / error > MAX_Z  # it can tell


def test_temperature_by_hand():
    """Two scores ±z with success rates 3/4 and 1/4: logit(3/4) = z / temperature."""
    scores = np.repeat([0.9, 0.1], 4)
    fitted = calibration.temperature(scores, [1, 1, 1, 0, 0, 0, 0, 1])
    assert float(fitted.temperature) == pytest.approx(np.log(9) / np.log(3), rel=1e-6)
    assert float(fitted(0.9)) == pytest.approx(0.75, rel=1e-6)


def test_temperature_at_its_ends():
    assert float(calibration.temperature([0.4, 0.6], [0, 1]).temperature) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="higher scores to go with outcomes of 1"):
        calibration.temperature([0.4, 0.6], [1, 0])


def test_isotonic_by_hand():
    """0.3 and 0.5 violate the order and share 1/2; linear in between; ends within 1/8 and 7/8."""
    fitted = calibration.isotonic([0.1, 0.3, 0.5, 0.7, 0.7, 0.9], [0, 1, 0, 1, 0, 1])
    found = fitted(jnp.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9, 1.0]))
    middle = (1 / 8 + 1 / 2) / 2
    expected = [1 / 8, 1 / 8, middle, 0.5, 0.5, 0.5, 0.5, 11 / 16, 7 / 8, 7 / 8]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_isotonic_recovers_the_distortion():
    """In each tenth of the data the mean map is the mean truth within |z| < 5 of binomial noise."""
    scores, outcomes, truth = overconfident(4000, 2.5)
    values = np.asarray(calibration.isotonic(scores, outcomes)(scores))
    for part in np.array_split(np.argsort(scores), 10):
        error = np.sqrt((truth[part] * (1 - truth[part])).sum()) / len(part)
        assert abs(values[part].mean() - truth[part].mean()) / error < MAX_Z


def test_quantile_by_hand():
    """Two bins of three: 0 of 3 and 2 of 3 successes."""
    scores, outcomes = [0.1, 0.2, 0.3, 0.6, 0.7, 0.8], [0, 0, 0, 1, 0, 1]
    fitted = calibration.quantile(scores, outcomes, level=0.2, num_bins=2)
    low, high = beta.ppf(0.2, 0.5, 3.5), beta.ppf(0.2, 2.5, 1.5)
    np.testing.assert_allclose(fitted.values, [low, high], rtol=1e-5)
    np.testing.assert_allclose(fitted.scores, [0.3, 0.8], rtol=1e-6)
    np.testing.assert_allclose(
        fitted(jnp.array([0.1, 0.3, 0.55, 0.9])), [low, low, (low + high) / 2, high], rtol=1e-5
    )


def test_quantile_is_a_lower_bound():
    """Below the true frequency almost everywhere, and lower with fewer data and a lower level."""
    scores, outcomes, truth = overconfident(2000, 2.5)
    few, many, sure = (
        np.asarray(calibration.quantile(scores[:n], outcomes[:n], level=level)(scores))
        for n, level in ((200, 0.1), (2000, 0.1), (2000, 0.01))
    )
    parts = np.array_split(np.argsort(scores), 10)
    assert sum(many[part].mean() > truth[part].mean() for part in parts) <= 3
    assert not any(sure[part].mean() > truth[part].mean() for part in parts)
    assert few.mean() < many.mean() and sure.mean() < many.mean()


def test_quantile_of_one_score():
    fitted = calibration.quantile([0.5] * 9, [1] * 9)
    assert float(fitted(0.1)) == float(fitted(0.9)) == pytest.approx(beta.ppf(0.1, 9.5, 0.5), rel=1e-5)


def test_error_and_table_by_hand():
    """Bins [0, .5) and [.5, 1]: mean scores 0.25 and 0.8, frequencies 1/2 and 2/3."""
    scores, outcomes = [0.1, 0.4, 0.5, 0.9, 1.0], [True, False, True, True, False]
    error = calibration.expected_calibration_error(scores, outcomes, num_bins=2)
    assert error == pytest.approx(2 / 5 * 0.25 + 3 / 5 * (0.8 - 2 / 3))
    table = calibration.reliability(scores, outcomes, num_bins=2)
    np.testing.assert_array_equal(table.count, [2, 3])
    np.testing.assert_allclose(table.mean_score, [0.25, 0.8])
    np.testing.assert_allclose(table.frequency, [1 / 2, 2 / 3])
    np.testing.assert_allclose(table.low, beta.ppf(0.025, [1.5, 2.5], [1.5, 1.5]))
    np.testing.assert_allclose(table.high, beta.ppf(0.975, [1.5, 2.5], [1.5, 1.5]))
    empty = calibration.reliability(scores, outcomes, num_bins=10)
    assert empty.count.sum() == 5 and np.isnan(empty.frequency[empty.count == 0]).all()
    np.testing.assert_array_equal(empty.count, [0, 1, 0, 0, 1, 1, 0, 0, 0, 2])


def test_the_error_falls_under_a_fitted_map():
    scores, outcomes, _ = overconfident(3000, 3.0)
    held, held_outcomes, _ = overconfident(3000, 3.0, seed=1)
    before = calibration.expected_calibration_error(held, held_outcomes)
    for fit in (calibration.temperature, calibration.isotonic):
        after = calibration.expected_calibration_error(fit(scores, outcomes)(held), held_outcomes)
        assert after < before / 3


def test_a_map_in_a_process_reward():
    """The score 0.9 is worth 0.75 (see above), whatever the dtype of the fit."""
    lm = TableLM(jnp.zeros((2, 2)))
    fitted = calibration.temperature(np.repeat([0.9, 0.1], 4), [1, 1, 1, 0, 0, 0, 0, 1])
    potential = ponder.process_reward(TableReward(jnp.array([0.9, 0.1])), link="odds", calibration=fitted)
    potential = potential.bind(Context(lm, 2, ((0,),)))
    state = potential.update(potential.init(2), jnp.array([0, 1], jnp.int32), jnp.ones(2, bool))
    found = jax.jit(lambda p, s: p.log_complete(s))(potential, state)
    np.testing.assert_allclose(found, np.log([3, 1 / 3]), rtol=1e-5)


@pytest.mark.parametrize(
    ("scores", "outcomes", "error", "message"),
    [
        ([0.5], [1, 0], ValueError, r"one shape \[n\], n >= 1; got \(1,\) and \(2,\)"),
        ([[0.5]], [[1]], ValueError, r"got \(1, 1\)"),
        ([], [], ValueError, "n >= 1"),
        ([0.5, 1.5], [0, 1], ValueError, r"scores: expected numbers in \[0, 1\], got \[1.5\]"),
        ([0.5, np.nan], [0, 1], ValueError, "scores: expected"),
        ([0.5, 0.6], [0, 2], ValueError, "outcomes: expected bools, or 0 and 1"),
        (["a", "b"], [0, 1], TypeError, "scores: expected numbers"),
        ([0.5, 0.6], ["0", "1"], TypeError, "outcomes: expected numbers"),
    ],
)
def test_wrong_pairs(scores, outcomes, error, message):
    for function in (*FITS.values(), calibration.expected_calibration_error, calibration.reliability):
        with pytest.raises(error, match=message):
            function(scores, outcomes)


def test_wrong_settings():
    pairs = [0.5, 0.6], [0, 1]
    for fit in (calibration.temperature, calibration.isotonic):
        with pytest.raises(ValueError, match="some of 0 and some of 1, got only 1"):
            fit([0.5, 0.6], [1, 1])
    with pytest.raises(ValueError, match=r"level: expected a number in \(0, 1\)"):
        calibration.quantile(*pairs, level=1.0)
    with pytest.raises(ValueError, match="num_bins: expected an integer >= 1"):
        calibration.quantile(*pairs, num_bins=0)
    with pytest.raises(ValueError, match="num_bins: expected an integer >= 1"):
        calibration.expected_calibration_error(*pairs, num_bins=2.5)
    with pytest.raises(ValueError, match="probability"):
        calibration.reliability(*pairs, probability=0)


def test_plot():
    scores, outcomes, _ = overconfident(400, 2.5)
    fitted = calibration.temperature(scores, outcomes)
    axes = ponder.plot_reliability(scores, outcomes, calibration=fitted)
    before = calibration.expected_calibration_error(scores, outcomes)
    after = calibration.expected_calibration_error(fitted(scores), outcomes)
    expected = f"400 traces; expected calibration error {before:.3f}, {after:.3f} after the map"
    assert axes.get_title(loc="left") == expected
    table = calibration.reliability(scores, outcomes)
    assert [int(text.get_text()) for text in axes.texts] == table.count[table.count > 0].tolist()
    points = axes.containers[-1].lines[0] if hasattr(axes.containers[-1], "lines") else axes.lines[1]
    np.testing.assert_allclose(points.get_ydata(), table.frequency[table.count > 0])
    assert ponder.plot_reliability(scores, outcomes, ax=axes) is axes


def test_a_score_at_an_edge_is_in_the_bin_above():
    for num_bins in (5, 10, 20):
        scores = np.arange(num_bins) / num_bins
        assert calibration.reliability(scores, np.zeros(num_bins), num_bins).count.tolist() == [1] * num_bins
