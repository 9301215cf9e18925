"""The particle cache against teacher forcing, after any sequence of operations.

A random walk drives the cache and keeps, in plain Python, the tokens that each particle has read; `lm.score`
of the prompt with those tokens is what the cached logits have to be.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ponder.models import Decoder, DecoderConfig, DecoderLM
from ponder.models import cache as cache_module
from ponder.models.cache import ParticleCache, empty_layer, fork
from ponder.models.decoder import SMALL_BATCH, linear

PLAIN = DecoderConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)
CONFIGS = {
    "plain": PLAIN,
    "window": dataclasses.replace(PLAIN, sliding_window=5, tie_word_embeddings=True, num_hidden_layers=1),
    "norms and biases": dataclasses.replace(
        PLAIN, qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True, num_hidden_layers=1
    ),
}
N, SLOTS, BLOCK = 4, 20, 3
PROMPT = [7, 3, 49, 0, 12, 31, 8]
ATOL = 5e-5  # logits have unit scale; float32 sums in another order differ by about 1e-6

prefill = jax.jit(lambda lm, tokens: lm.prefill(tokens, N, SLOTS))
extend = jax.jit(lambda lm, cache, tokens: lm.extend(cache, tokens))
extend_block = jax.jit(lambda lm, cache, tokens, lengths: lm.extend_block(cache, tokens, lengths))
fork_cache = jax.jit(fork)
score_rows = jax.jit(lambda lm, tokens: jax.lax.map(lm.score, tokens))


def make_lm(config, dtype=jnp.float32):
    """A random decoder in which no norm is 1 and no bias 0."""
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def values(x):
        if x.ndim == 1:
            return jnp.asarray(1 + 0.3 * rng.normal(size=x.shape), jnp.float32)
        return jnp.asarray(x.shape[1] ** -0.5 * rng.normal(size=x.shape), dtype)

    nnx.update(decoder, jax.tree.map(values, nnx.state(decoder)))
    return DecoderLM(decoder, eos_token_ids=(0,))


@pytest.mark.slow
def test_reading_the_filled_part_changes_no_number(monkeypatch):
    """Branches of 4, 8, 16 and 20 slots against one of 20; also for rows that differ in length."""
    lm = make_lm(CONFIGS["window"])

    def logits(smallest):
        monkeypatch.setattr(cache_module, "SMALLEST_READ", smallest)
        extend = jax.jit(lambda cache, tokens: lm.extend(cache, tokens))  # compiled anew
        cache, _ = lm.prefill(jnp.asarray(PROMPT), N, SLOTS)
        found = []
        for step in range(SLOTS):
            if step == 9:
                cache = lm.truncate(cache, jnp.array([9, 3, 7, 8]))
            cache, row = extend(cache, jnp.arange(N) + step)
            found.append(row)
        return np.stack(found)

    np.testing.assert_allclose(logits(4), logits(SLOTS), atol=1e-5)


@pytest.fixture(scope="module")
def lms():
    return {name: make_lm(config) for name, config in CONFIGS.items()}


def teacher_forced(lm, traces):
    """Logits [N, SLOTS + 1, V]: after the prompt, and after each token of each trace."""
    rows = np.zeros((N, len(PROMPT) + SLOTS), np.int32)
    for row, trace in zip(rows, traces, strict=True):
        row[: len(PROMPT)] = PROMPT
        row[len(PROMPT) : len(PROMPT) + len(trace)] = trace
    return np.asarray(score_rows(lm, rows))[:, len(PROMPT) - 1 :]


def compare(lm, traces, logits):
    expected = teacher_forced(lm, traces)
    lengths = [len(trace) for trace in traces]
    np.testing.assert_allclose(logits, expected[np.arange(N), lengths], atol=ATOL)


def random_ancestors(rng):
    kind = rng.integers(4)
    if kind == 0:  # survivors keep their rows, as resampling lays them out
        ancestors = np.arange(N)
        dead = rng.random(N) < 0.5
        dead[rng.integers(N)] = False
        ancestors[dead] = rng.choice(np.flatnonzero(~dead), dead.sum())
    elif kind == 1:
        ancestors = rng.permutation(N)
    elif kind == 2:  # one cycle
        ancestors = np.roll(np.arange(N), rng.integers(1, N))
    else:
        ancestors = rng.integers(N, size=N)
    return ancestors.astype(np.int32)


class Walk:
    """A cache, its last logits, and what each particle has read."""

    def __init__(self, lm, seed):
        self.lm, self.rng = lm, np.random.default_rng(seed)
        self.traces = [[] for _ in range(N)]
        self.cache, self.logits = prefill(lm, jnp.asarray(PROMPT))

    def extend(self):
        tokens = self.rng.integers(50, size=N).astype(np.int32)
        self.cache, self.logits = extend(self.lm, self.cache, tokens)
        for trace, token in zip(self.traces, tokens, strict=True):
            trace.append(int(token))
        compare(self.lm, self.traces, self.logits)

    def extend_block(self):
        """Rows that read nothing keep their logits."""
        tokens = self.rng.integers(50, size=(N, BLOCK)).astype(np.int32)
        lengths = self.rng.integers(BLOCK + 1, size=N).astype(np.int32)
        before = [len(trace) for trace in self.traces]
        self.cache, block = extend_block(self.lm, self.cache, tokens, lengths)
        for trace, row, length in zip(self.traces, tokens, lengths, strict=True):
            trace += row[:length].tolist()
        expected, logits = teacher_forced(self.lm, self.traces), np.array(self.logits)
        for n, length in enumerate(lengths):
            found, wanted = block[n, :length], expected[n, before[n] + 1 : before[n] + 1 + length]
            np.testing.assert_allclose(found, wanted, atol=ATOL)
            logits[n] = block[n, length - 1] if length else logits[n]
        self.logits = logits

    def fork(self):
        ancestors = random_ancestors(self.rng)
        self.cache = fork_cache(self.cache, ancestors)
        self.logits = np.asarray(self.logits)[ancestors]
        self.traces = [list(self.traces[a]) for a in ancestors]

    def truncate(self):
        """Rewind, by up to three tokens, and read at least one token again, for its logits."""
        lengths = np.array([max(0, len(t) - self.rng.integers(4)) for t in self.traces], np.int32)
        self.cache = self.lm.truncate(self.cache, lengths)
        self.traces = [trace[:n] for trace, n in zip(self.traces, lengths, strict=True)]
        self.extend()


@pytest.mark.parametrize("name", CONFIGS)
def test_any_walk_is_teacher_forcing(lms, name):
    counts = {}
    for seed in range(3):
        walk = Walk(lms[name], seed)
        compare(walk.lm, walk.traces, walk.logits)
        for step in range(24):
            # In lock step at first, where the cache writes slices, then ragged.
            moves = [walk.extend, walk.fork]
            if step >= 6:
                moves += [walk.extend_block, walk.truncate]
            room = SLOTS - max(len(trace) for trace in walk.traces)
            if room == 0:
                moves = [walk.fork, walk.truncate] if min(map(len, walk.traces)) < SLOTS else [walk.fork]
            elif room < BLOCK:
                moves = [walk.extend, walk.fork]
            move = moves[walk.rng.integers(len(moves))]
            move()
            counts[move.__name__] = counts.get(move.__name__, 0) + 1
            lengths = np.broadcast_to(walk.cache.length, N)
            np.testing.assert_array_equal(lengths, [len(trace) for trace in walk.traces])
        lengths = np.array([min(2, len(trace)) for trace in walk.traces])
        walk.cache = walk.lm.truncate(walk.cache, lengths)
        walk.traces = [trace[:2] for trace in walk.traces]
        walk.extend()
    assert min(counts[move] for move in ("extend", "fork", "extend_block", "truncate")) >= 5


def test_the_comparison_has_power(lms):
    """Two rows of the cache in each other's place, in one array of one layer, are noticed."""
    walk = Walk(lms["plain"], 0)
    for _ in range(4):
        walk.extend()
    swapped = np.array([1, 0, 2, 3])
    for field in ("k", "v"):
        layers = list(walk.cache.layers)
        layers[1] = layers[1]._replace(**{field: getattr(layers[1], field)[swapped]})
        tokens = jnp.full(N, 5)
        _, logits = extend(walk.lm, walk.cache._replace(layers=tuple(layers)), tokens)
        with pytest.raises(AssertionError, match="Not equal"):
            compare(walk.lm, [[*trace, 5] for trace in walk.traces], logits)
    _, logits = extend(walk.lm, walk.cache, tokens)
    compare(walk.lm, [[*trace, 5] for trace in walk.traces], logits)


@pytest.mark.parametrize("name", ["plain", "window"])
def test_a_padded_prompt_is_the_prompt(lms, name):
    """What stands in the padding, tokens that would be read as words, does not matter."""
    lm = lms[name]
    padded = jnp.asarray([*PROMPT, 5, 6, 7, 8, 9])
    cache, first = jax.jit(lambda lm, tokens, length: lm.prefill(tokens, N, SLOTS, length))(
        lm, padded, jnp.int32(len(PROMPT))
    )
    compare(lm, [[]] * N, first)
    traces = [[] for _ in range(N)]
    for token in (11, 0, 23, 41, 2, 30):  # beyond the window of five
        cache, logits = extend(lm, cache, jnp.arange(N) + token)
        traces = [[*trace, n + token] for n, trace in enumerate(traces)]
        compare(lm, traces, logits)


def test_overflow_in_lock_step(lms):
    """One token too many gives NaN, in all rows since all advance together; what was read before stays."""
    walk = Walk(lms["plain"], 0)
    for _ in range(SLOTS):
        walk.extend()
    tokens = jnp.arange(N)
    cache, logits = extend(walk.lm, walk.cache, tokens)
    assert np.isnan(logits).all()
    cache, logits = extend(walk.lm, cache, tokens)
    assert np.isnan(logits).all()
    walk.cache = walk.lm.truncate(cache, jnp.full(N, SLOTS - 1))
    walk.traces = [trace[: SLOTS - 1] for trace in walk.traces]
    walk.extend()


def test_overflow_of_single_rows(lms):
    walk = Walk(lms["plain"], 0)
    for _ in range(SLOTS):
        walk.extend()
    lm, start = walk.lm, np.array([SLOTS - 2, SLOTS, SLOTS - 1, 3])
    begun = [trace[:n] for trace, n in zip(walk.traces, start, strict=True)]
    cache = lm.truncate(walk.cache, start)

    def check(traces, logits, fit):
        expected = teacher_forced(lm, [trace[:SLOTS] for trace in traces])
        for n, trace in enumerate(traces):
            if n in fit:
                np.testing.assert_allclose(logits[n], expected[n, len(trace)], atol=ATOL)
            else:
                assert np.isnan(logits[n]).all()

    tokens = jnp.array([4, 5, 6, 7])
    once, logits = extend(lm, cache, tokens)
    check([[*trace, n + 4] for n, trace in enumerate(begun)], logits, fit={0, 2, 3})
    twice, logits = extend(lm, once, tokens)
    check([[*trace, n + 4, n + 4] for n, trace in enumerate(begun)], logits, fit={0, 3})

    # A block: rows 0 and 2 fill their slots to the last, row 1 has none left.
    lengths = np.array([2, 2, 1, 2])
    block, logits = extend_block(lm, cache, jnp.tile(tokens[:, None], BLOCK), lengths)
    traces = [[*trace, *[n + 4] * lengths[n]] for n, trace in enumerate(begun)]
    check(traces, logits[np.arange(N), lengths - 1], fit={0, 2, 3})
    assert np.isnan(logits[1]).all()

    # Earlier slots are as they were: rewound, all rows are right again.
    for overflowed in (twice, block):
        walk.cache = lm.truncate(overflowed, start - 1)
        walk.traces = [trace[:-1] for trace in begun]
        walk.extend()


def test_bfloat16_weights_are_close(lms):
    exact = lms["norms and biases"]
    rounded = make_lm(CONFIGS["norms and biases"], jnp.bfloat16)
    dtypes = {x.dtype.name for x in jax.tree.leaves(rounded.decoder)}
    assert dtypes == {"bfloat16", "float32"}
    walk = Walk(exact, 0)
    cache, logits = prefill(rounded, jnp.asarray(PROMPT))
    for _ in range(6):
        assert logits.dtype == jnp.float32
        error = np.abs(np.asarray(logits) - np.asarray(walk.logits))
        assert 1e-4 < error.max() < 0.15  # unit scale, weights and activations rounded to 8 bits
        walk.extend()
        tokens = jnp.array([trace[-1] for trace in walk.traces])
        cache, logits = extend(rounded, cache, tokens)


def test_fork_is_in_place():
    """No second copy of the cache: temporaries are those of one array of eight, by the compiler's count."""
    layer = empty_layer(16, 4, 16, 128)
    cache = ParticleCache((layer,) * 4, jnp.int32(0), jnp.int32(0))
    size = sum(x.nbytes for x in jax.tree.leaves(cache))
    ancestors = jax.ShapeDtypeStruct((16,), jnp.int32)
    plan = jax.jit(fork, donate_argnums=0).lower(cache, ancestors).compile().memory_analysis()
    assert plan.alias_size_in_bytes >= size - 8
    assert plan.temp_size_in_bytes < size / 4

    def by_gather(cache, ancestors):
        layers = tuple(x._replace(k=x.k[ancestors], v=x.v[ancestors]) for x in cache.layers)
        return cache._replace(layers=layers)

    plan = jax.jit(by_gather, donate_argnums=0).lower(cache, ancestors).compile().memory_analysis()
    assert plan.temp_size_in_bytes >= size / 2  # what the limit is there to notice


@pytest.mark.parametrize("rows", [1, SMALL_BATCH, SMALL_BATCH + 1, 4 * SMALL_BATCH + 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear_is_a_matrix_product(rows, dtype):
    """Both orders of the product, on either side of the threshold."""
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.normal(size=(rows, 1, 24)), dtype).astype(jnp.float32)
    weight, bias = (
        jnp.asarray(rng.normal(size=(10, 24)), dtype),
        jnp.asarray(rng.normal(size=10), jnp.float32),
    )
    found = jax.jit(linear)(x, nnx.Param(weight), nnx.Param(bias))
    assert found.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T + np.asarray(bias, np.float64)
    np.testing.assert_allclose(found, expected, atol=2e-5)
