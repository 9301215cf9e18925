"""Reward decoders: what is read, what is kept, and where the score is taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ponder.models import Decoder, DecoderConfig, RewardDecoder, RewardModel
from ponder.models.cache import truncate
from ponder.models.reward_model import CHUNK, LARGEST_SCORE, SMALLEST_SCORE, RewardHead

CONFIG = DecoderConfig(
    vocab_size=17,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
PROMPT = [3, 1, 4, 1, 5]
SEPARATORS = [(), (15, 16)]

prefill = jax.jit(lambda prm, tokens, n, room: prm.prefill(tokens, n, room), static_argnums=(2, 3))
ragged_from_start = jax.jit(lambda cache: truncate(cache, cache.length))  # saves a compilation
extend = jax.jit(lambda prm, cache, tokens: prm.extend(cache, tokens))
extend_block = jax.jit(lambda prm, cache, tokens, lengths: prm.extend_block(cache, tokens, lengths))


def model(separator=(), num_layers=1):
    decoder = Decoder(dataclasses.replace(CONFIG, num_hidden_layers=num_layers), rngs=nnx.Rngs(0))
    decoder.embedding.set_value(jax.random.normal(jax.random.key(1), (17, 16)))
    keys = jax.random.split(jax.random.key(2), 2)
    head = RewardHead([0.8 * jax.random.normal(keys[0], (2, 16))], [jax.random.normal(keys[1], (2,))])
    return RewardDecoder(decoder, head, separator)


def reread(prm, tokens):
    """The score after all tokens, read at once; separators are to be among them."""
    bare = dataclasses.replace(prm, separator=())
    # One length for all, so that one compilation does.
    padded = jnp.asarray([*tokens, *[0] * (64 - len(tokens))])
    return float(read_padded(bare, padded, len(tokens)))


fork = jax.jit(lambda prm, cache, ancestors: prm.fork(cache, ancestors))
read_padded = jax.jit(lambda prm, tokens, length: prm.prefill(tokens, 1, 1, length=length)[1][0])


def ragged(steps, width=None):
    """Steps as a padded block, with garbage behind them, and their lengths."""
    width = max(map(len, steps)) if width is None else width
    block = np.full((len(steps), width), 9)
    for row, step in zip(block, steps, strict=True):
        row[: len(step)] = step
    return jnp.asarray(block), jnp.asarray([len(step) for step in steps])


@pytest.mark.slow
@pytest.mark.parametrize("separator", SEPARATORS)
def test_steps_equal_a_full_reread(separator):
    """Ragged steps, shorter and longer than a chunk, row by row; forks in between."""
    prm = model(separator, num_layers=2)
    assert isinstance(prm, RewardModel) and prm.vocab_size == 17 and prm.max_length == 64
    rng = np.random.default_rng(0)
    cache, scores = prefill(prm, jnp.asarray(PROMPT), 4, 62)
    np.testing.assert_allclose(scores, reread(prm, [*PROMPT, *separator]), atol=2e-6)
    cache = ragged_from_start(cache)
    histories = [list(PROMPT) for _ in range(4)]
    seen = []
    for lengths in ([3, 1, CHUNK - 1, 7], [0, CHUNK + 4, 1, 2], [5, 0, 0, 1], [2, 4, 1, 3]):
        steps = [rng.integers(15, size=length).tolist() for length in lengths]
        cache, scores = extend_block(prm, cache, *ragged(steps, 40))
        assert scores.shape == (4,) and scores.dtype == jnp.float32
        for n, step in enumerate(steps):
            if step:
                histories[n] += [*step, *separator]
                np.testing.assert_allclose(scores[n], reread(prm, histories[n]), atol=2e-6)
                seen.append(float(scores[n]))
        ancestors = rng.integers(4, size=4)
        cache = fork(prm, cache, jnp.asarray(ancestors))
        histories = [list(histories[a]) for a in ancestors]
    assert np.std(seen) > 0.01  # or all of this would say little


def test_extend_judges_as_if_the_step_ended():
    """Before and after a block, with a vector of lengths; the separator is not kept."""
    separator = (15, 16)
    prm = model(separator)
    cache, _ = prefill(prm, jnp.asarray(PROMPT), 2, 20)
    histories = [list(PROMPT), list(PROMPT)]
    for tokens in ([1, 2], [3, 4], None, [5, 6], [7, 0]):
        if tokens is None:
            cache, scores = extend_block(prm, cache, *ragged([[8], [9, 10, 11]]))
            histories[0] += [8, *separator]
            histories[1] += [9, 10, 11, *separator]
            expected = [reread(prm, history) for history in histories]
        else:
            cache, scores = extend(prm, cache, jnp.asarray(tokens))
            for history, token in zip(histories, tokens, strict=True):
                history.append(token)
            expected = [reread(prm, [*history, *separator]) for history in histories]
        np.testing.assert_allclose(scores, expected, atol=2e-6)


def test_a_block_is_its_tokens_one_by_one():
    prm = model()
    rng = np.random.default_rng(1)
    tokens = rng.integers(17, size=(3, 21))
    cache, _ = prefill(prm, jnp.asarray(PROMPT), 3, 24)
    _, block = extend_block(prm, cache, jnp.asarray(tokens), jnp.asarray([21, 4, 17]))
    singles = []
    for column in tokens.T:
        cache, scores = extend(prm, cache, jnp.asarray(column))
        singles.append(np.asarray(scores))
    np.testing.assert_allclose(block, [singles[20][0], singles[3][1], singles[16][2]], atol=2e-6)


def test_several_prompts():
    """Padded on the right; each row scores as if its prompt were alone."""
    prm = model((16,))
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [7]]
    padded, lengths = ragged(prompts)
    cache, scores = jax.jit(lambda prm, p, n: prm.prefill_many(p, n, 2, 8))(prm, padded, lengths)
    np.testing.assert_allclose(scores, np.repeat([reread(prm, [*p, 16]) for p in prompts], 2), atol=2e-6)
    steps = [[1], [2, 3], [4], [5, 6, 7], [], [8]]
    _, scores = extend_block(prm, cache, *ragged(steps))
    for n, step in enumerate(steps):
        if step:
            np.testing.assert_allclose(scores[n], reread(prm, [*prompts[n // 2], *step, 16]), atol=2e-6)


def test_is_a_pytree_of_its_weights():
    prm = model((16,))
    assert len(jax.tree.leaves(prm)) == len(jax.tree.leaves(prm.decoder)) + 2
    same = jax.tree.map(lambda x: x, prm)
    assert isinstance(same, RewardDecoder) and same.separator == (16,)


def test_overflow_is_nan():
    """A row that outgrows its cache, and only that; it stays so."""

    @jax.jit
    def two_steps(prm, *steps):
        cache, _ = prm.prefill(jnp.asarray(PROMPT), 3, 6)  # and room for one separator that is not kept
        cache, first = prm.extend_block(cache, *steps)
        return first, prm.extend(cache, jnp.asarray([1, 1, 1]))[1]

    prm = model((15, 16))
    first, second = two_steps(prm, *ragged([[1, 2], [1, 2, 3, 4, 5, 6], [1] * 7]))
    assert np.isnan(first).tolist() == [False, False, True]
    assert np.isnan(second).tolist() == [False, True, True]
    cache, _ = prefill(prm, jnp.asarray(PROMPT), 2, 2)
    for step in range(4):
        cache, scores = extend(prm, cache, jnp.asarray([1, 2]))
        assert np.isnan(scores).all() == np.isnan(scores).any() == (step >= 2)


def test_padding_costs_nothing():
    """The number of chunks is that of the longest row: garbage beyond it is never embedded."""
    prm = model((16,))
    cache, _ = prefill(prm, jnp.asarray(PROMPT), 2, 8)
    block, lengths = ragged([[1, 2, 3], [4]], width=50 * CHUNK)
    chunks = []
    call = type(prm.decoder).__call__

    def counted(self, tokens, *rest):
        jax.debug.callback(lambda: chunks.append(tokens.shape[1]))
        return call(self, tokens, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(prm.decoder), "__call__", counted)
        jax.block_until_ready(jax.jit(lambda *args: prm.extend_block(*args))(cache, block, lengths))
        jax.effects_barrier()
    assert chunks == [CHUNK]


def test_head_by_hand():
    x = np.asarray([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], np.float32)
    one = RewardHead([jnp.asarray([[0.5, 1.0, -1.0]])], [jnp.asarray([0.25])])
    z = np.array([0.5 - 2.0 - 0.5 + 0.25, 3.0 + 1.0 + 0.25])
    np.testing.assert_allclose(one(jnp.asarray(x)), 1 / (1 + np.exp(-z)), rtol=1e-6)

    first = np.asarray([[1.0, 0.0, 2.0], [0.0, -1.0, 0.0], [1.0, 1.0, 1.0]], np.float32)
    last = np.asarray([[1.0, -1.0, 0.5], [0.5, 2.0, -1.0]], np.float32)
    hidden = np.maximum(x @ first.T + [0.1, 0.0, -0.2], 0)
    logits = hidden @ last.T
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for positive in (0, 1):
        head = RewardHead(
            [jnp.asarray(first), jnp.asarray(last)], [jnp.asarray([0.1, 0.0, -0.2]), None], positive
        )
        np.testing.assert_allclose(head(jnp.asarray(x)), expected[:, positive], rtol=1e-6)


def test_scores_stay_inside():
    """Where float32 would round to 0 or 1."""
    head = RewardHead([jnp.asarray([[1.0]])], [None])
    scores = np.asarray(head(jnp.asarray([[-1e4], [-200.0], [200.0], [1e4], [jnp.nan]])))
    np.testing.assert_array_equal(
        scores, np.float32([SMALLEST_SCORE, SMALLEST_SCORE, LARGEST_SCORE, LARGEST_SCORE, np.nan])
    )
    assert np.isfinite(np.log(scores[:4])).all() and np.isfinite(np.log1p(-scores[:4])).all()


def test_heads_that_are_none():
    with pytest.raises(ValueError, match="expected a last layer with 1 or 2 outputs, got 3"):
        RewardHead([jnp.zeros((3, 4))], [None])
    with pytest.raises(ValueError, match="positive: expected 0 or 1, got 2"):
        RewardHead([jnp.zeros((2, 4))], [None], positive=2)


def test_repr():
    assert repr(model((16,))) == (
        "RewardDecoder('reward', classification, 0.0M parameters, 1 layers, vocabulary 17, separator (16,))"
    )
