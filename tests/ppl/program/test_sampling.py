"""Draws against softmax (|z| < 5 with fixed keys) and the prior's filters against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.program.sampling import PriorSettings, _invert, draw, log_prior
from ponder.testing import MAX_Z

draw = jax.jit(draw)
invert = jax.jit(_invert)


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def draws_of(logits, num_rows=20_000, num_keys=5):
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (num_rows, len(logits)))
    keys = jax.random.split(jax.random.key(3), num_keys)
    return np.concatenate([np.asarray(draw(key, rows)) for key in keys])


def check_frequencies(tokens, probability):
    """Each common token by z, and all together by chi-square; rare tokens are pooled."""
    counts, expected = np.bincount(tokens, minlength=len(probability)), len(tokens) * probability
    assert (counts[probability == 0] == 0).all()
    common = expected >= 20
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    z = (counts - expected) / np.sqrt(expected * (1 - expected / len(tokens)))
    assert np.abs(z[expected >= 20]).max() < MAX_Z
    degrees = len(expected) - 1
    chi_square = ((counts - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert abs(chi_square - degrees) / np.sqrt(2 * degrees) < MAX_Z


@pytest.mark.parametrize("vocab_size", [3, 256, 700])  # less than a block of 256, one, and some
def test_frequencies_are_the_softmax(vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits = 1.5 * rng.normal(size=vocab_size)
    logits[rng.random(vocab_size) < 0.3] = -np.inf
    logits[-1] = 0.5  # the last token is not lost to padding
    tokens = draws_of(logits)
    assert tokens.dtype == np.int32
    check_frequencies(tokens, softmax(logits))
    check_frequencies(draws_of(logits + 3e4), softmax((logits + 3e4).astype(np.float32).astype(float)))
    if vocab_size == 700:
        with pytest.raises(AssertionError):  # the check has power: temperature 1.05
            check_frequencies(draws_of(logits / 1.05), softmax(logits))


def test_rows_are_independent():
    """Rows of one call share neither their weights nor their uniforms."""
    logits = np.log(np.array([[0.5, 0.5], [0.5, 0.5], [0.1, 0.9]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    tokens = np.asarray(jax.vmap(draw, in_axes=(0, None))(keys, jnp.asarray(logits, jnp.float32)))
    for column, probability in zip(tokens.T, (0.5, 0.5, 0.9), strict=True):
        check_frequencies(column, np.array([1 - probability, probability]))
    joint = tokens[:, 0] * 2 + tokens[:, 1]
    check_frequencies(joint, np.full(4, 0.25))


def test_block_and_token_are_independent():
    """The two stages have a uniform each: within a block, all tokens of a flat distribution are reached."""
    check_frequencies(draws_of(np.zeros(512), num_rows=40_000, num_keys=5), np.full(512, 1 / 512))


def test_a_row_without_mass_gives_zero():
    logits = np.full((3, 300), -np.inf, np.float32)
    logits[1, 299] = -4.0
    for seed in range(20):
        np.testing.assert_array_equal(draw(jax.random.key(seed), logits), [0, 299, 0])


def test_a_single_token_with_mass_is_always_drawn():
    logits = np.full((300, 300), -np.inf, np.float32)
    np.fill_diagonal(logits, np.linspace(-1e4, 1e4, 300))
    for seed in range(5):
        np.testing.assert_array_equal(draw(jax.random.key(seed), logits), np.arange(300))


def test_zero_weights_are_never_drawn_whatever_the_uniform():
    """Uniforms at the steps of the CDF, where rounding decides."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        weights = (rng.exponential(size=256) * (rng.random(256) < 0.5)).astype(np.float32)
        weights[:3] = weights[-3:] = 0
        at = np.round(np.cumsum(weights) / weights.sum() * 2**23)
        u = np.concatenate([[0, 2**23 - 1], *(at + d for d in range(-3, 4))]) / 2**23
        u = np.clip(u, 0, 1 - 2**-23).astype(np.float32)
        index = invert(jnp.broadcast_to(weights, (len(u), 256)), u[:, None])
        assert (weights[np.asarray(index)] > 0).all()


def test_rare_tokens_are_drawn_in_proportion():
    """A token of 1e-9 in a block of 1e-4: counted over all uniforms of float32 that lead to it."""
    probability = np.full(700, 1e-4 / 255)
    probability[300] = 1e-9
    probability[:256] = (1 - 2e-4) / 256
    weights = np.pad(probability, (0, 68)).reshape(3, 256).astype(np.float32)
    blocks = weights.sum(axis=1)

    def share(weights, wanted):
        """Share of the 2^23 uniforms that give the index `wanted`."""
        near = np.round((weights[:wanted].sum() / weights.sum()) * 2**23)
        u = near + np.arange(-5000, 5000)
        u = u[(u >= 0) & (u < 2**23)].astype(np.float32) / 2**23
        index = np.asarray(invert(jnp.broadcast_to(weights, (len(u), len(weights))), u[:, None]))
        assert index[0] < wanted or near < 5000
        assert index[-1] > wanted
        return (index == wanted).sum() / 2**23

    found = share(blocks, 1) * share(weights[1], 300 - 256)
    assert found == pytest.approx(1e-9, rel=0.05)


def reference(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """One row, as the logits processors of Hugging Face do it, in their order, in float64."""
    scores = np.asarray(logits, float) / temperature
    if top_k is not None:
        kth = np.sort(scores)[-min(top_k, len(scores))]
        scores = np.where(scores < kth, -np.inf, scores)
    if top_p is not None and top_p < 1:
        order = np.argsort(scores)
        remove = np.cumsum(softmax(scores[order])) <= 1 - top_p
        remove[-1] = False
        scores[order[remove]] = -np.inf
    if min_p is not None:
        probability = softmax(scores)
        scores = np.where(probability < min_p * probability.max(), -np.inf, scores)
    with np.errstate(divide="ignore"):
        return np.log(softmax(scores))


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 100},
    {"top_p": 0.001},
    {"top_p": 0.6},
    {"top_p": 1.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 2.0, "top_k": 8, "top_p": 0.7, "min_p": 0.15},
    {"temperature": 0.5, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.7, "top_k": 12, "top_p": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters_are_those_of_hugging_face(settings):
    logits = np.random.default_rng(0).normal(size=(20, 40)) * 2
    logits[3, ::2] = -np.inf
    found = np.asarray(log_prior(jnp.asarray(logits, jnp.float32), PriorSettings(**settings)))
    assert found.dtype == np.float32
    expected = np.array([reference(row, **settings) for row in logits.astype(np.float32)])
    np.testing.assert_array_equal(found == -np.inf, expected == -np.inf)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_order_of_the_filters_matters():
    """top_p is taken of what top_k leaves, at the temperature: each other order keeps other tokens."""
    logits = jnp.log(jnp.array([[0.4, 0.25, 0.2, 0.1, 0.05]]))
    kept = lambda **settings: int((log_prior(logits, PriorSettings(**settings)) > -jnp.inf).sum())  # noqa: E731
    assert kept(top_p=0.7) == 3
    assert kept(top_k=3, top_p=0.7) == 2  # 0.65 of the 0.85 that top_k leaves
    assert kept(top_k=3, top_p=0.7, temperature=5.0) == 3
    assert kept(min_p=0.4) == 3
    assert kept(min_p=0.4, temperature=5.0) == 5


def test_equal_logits_are_kept_together():
    logits = jnp.array([[1.0, 2.0, 2.0, 0.0]])
    for settings in ({"top_k": 1}, {"min_p": 1.0}):
        found = np.exp(log_prior(logits, PriorSettings(**settings)))
        np.testing.assert_allclose(found, [[0, 0.5, 0.5, 0]], atol=1e-6)


def test_top_p_keeps_the_smallest_set_also_with_ties():
    logits = jnp.log(jnp.array([[0.2, 0.4, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]]))
    for top_p, kept in ((0.1, [[1], [0]]), (0.45, [[0, 1], [0, 1]]), (0.7, [[0, 1, 2], [0, 1, 2]])):
        found = log_prior(logits, PriorSettings(top_p=top_p)) > -jnp.inf
        assert [np.flatnonzero(row).tolist() for row in found] == kept


def test_the_prior_of_narrow_logits_is_float32():
    assert log_prior(jnp.zeros((1, 3), jnp.bfloat16), PriorSettings()).dtype == jnp.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature: expected a finite number > 0, got 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": None}, "temperature"),
        ({"top_k": 0}, "top_k: expected an integer >= 1 or None, got 0"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2.0}, "top_k"),
        ({"top_p": 0}, r"top_p: expected a number in \(0, 1\] or None, got 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_p": "0.5"}, "top_p"),
        ({"min_p": 0.0}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": "0.1"}, "min_p"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        PriorSettings(**settings)


def test_settings_may_be_numpy_numbers():
    """As a sweep over np.linspace or an argument parser gives them."""
    settings = PriorSettings(np.float32(0.5), np.int64(3), np.float32(0.9), np.float64(0.1))
    assert settings == PriorSettings(0.5, 3, float(np.float32(0.9)), 0.1)
    assert hash(settings) == hash(PriorSettings(0.5, 3, float(np.float32(0.9)), 0.1))


def test_rounding_never_draws_a_token_without_mass():
    """Prefix sums of many terms waver in the last bit where weights are zero; try points right at them."""
    weights = jnp.where(jax.random.uniform(jax.random.key(0), (2000,)) < 0.2, 1.0, 0.0) * 0.1
    weights = weights * jnp.exp(jax.random.normal(jax.random.key(1), weights.shape))
    cumulative = jnp.cumsum(weights)
    rows = jnp.broadcast_to(weights, (2000, 2000))
    index = _invert(rows, (cumulative / cumulative[-1])[:, None])
    assert (weights[index] > 0).all()
