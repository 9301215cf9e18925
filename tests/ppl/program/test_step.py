"""Units of generation: where steps end, what a step draws, and that the target does not change with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder.enumeration import enumerate_traces, replay
from ponder.models import DecoderConfig, DecoderLM, PieceTokenizer, TableLM
from ponder.protocols import Move
from ponder.testing import check_algorithm

# A dot ends a step; the token "a." hides it, and "a", "." spell it over two tokens.
PIECES = PieceTokenizer((b"a", b".", b"a.", b""))
A, DOT, MERGED, EOS = range(4)


@pytest.fixture(scope="module")
def lm():
    return TableLM.random(jax.random.key(7), 4, scale=1.0, eos_token_ids=(EOS,), tokenizer=PIECES)


def steps(lm, tokens, unit, max_new_tokens=6, **kwargs):
    """The steps that a sequence of tokens falls into, as lists of tokens."""
    program = ponder.Generation(lm, [0], max_new_tokens=max_new_tokens, unit=unit, **kwargs)
    padded = jnp.asarray([tokens + [0] * (max_new_tokens - len(tokens))])
    state, moves = replay(program, padded)
    found = zip(np.asarray(moves.tokens[:, 0]), np.asarray(moves.lengths[:, 0]), strict=True)
    return [list(row[:length]) for row, length in found if length], state


@pytest.mark.parametrize(
    ("unit", "tokens", "expected"),
    [
        (ponder.Step("."), [A, DOT, A, A, DOT, EOS], [[A, DOT], [A, A, DOT], [EOS]]),
        (ponder.Step("."), [A, MERGED, DOT, A, EOS], [[A, MERGED], [DOT], [A, EOS]]),
        (ponder.Step("a."), [DOT, A, DOT, A, MERGED, EOS], [[DOT, A, DOT], [A, MERGED], [EOS]]),
        (ponder.Step(".."), [A, DOT, DOT, MERGED, DOT, A], [[A, DOT, DOT], [MERGED, DOT], [A]]),
        (ponder.Step(DOT), [A, DOT, MERGED, A, DOT, EOS], [[A, DOT], [MERGED, A, DOT], [EOS]]),
        (ponder.Step([".", MERGED]), [A, MERGED, A, DOT, EOS], [[A, MERGED], [A, DOT], [EOS]]),
        (ponder.Step(".", max_tokens=2), [A, A, A, DOT, A, EOS], [[A, A], [A, DOT], [A, EOS]]),
        (ponder.Step(".", max_tokens=1), [A, DOT, EOS], [[A], [DOT], [EOS]]),
        (ponder.Step(".", max_steps=3), [DOT, DOT, A, DOT, DOT, A], [[DOT], [DOT], [A, DOT]]),
        (ponder.Step(".", max_tokens=2, max_steps=2), [A, A, A, A, A, A], [[A, A], [A, A]]),
        (ponder.Step("."), [A, A, A, A, A, A], [[A, A, A, A, A, A]]),
    ],
)
def test_where_steps_end(lm, unit, tokens, expected):
    found, state = steps(lm, tokens, unit)
    assert found == expected
    assert state.done.all() and state.lengths[0] == sum(map(len, expected))
    assert list(state.tokens[0, : state.lengths[0]]) == [token for step in expected for token in step]


def test_max_steps_is_the_number_of_steps(lm):
    program = ponder.Generation(lm, [0], max_new_tokens=9, unit=ponder.Step(".", max_tokens=3, max_steps=3))
    posterior = ponder.inference.smc(program, 16).run(jax.random.key(0))
    assert program.num_steps == 3 == posterior.stats.num_tokens.shape[0]
    assert int(posterior.stats.num_steps) == 3


def test_a_trace_cut_after_its_last_step_is_ended_by_eos(lm):
    unit = ponder.Step(".", max_steps=2)
    found, state = steps(lm, [A, DOT, DOT, EOS], unit, overflow="force_eos")
    assert found == [[A, DOT], [DOT, EOS]] and state.log_potential[0] == 0
    _, state = steps(lm, [A, DOT, DOT, A, EOS], unit, overflow="force_eos")
    assert state.log_potential[0] == -jnp.inf


UNITS = [
    ponder.Step("."),
    ponder.Step("a."),
    ponder.Step(".", max_tokens=2),
    ponder.Step(".", max_tokens=2, max_steps=9),
]


@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("settings", [{}, {"overflow": "force_eos"}, {"stop": "aa"}], ids=str)
def test_the_unit_does_not_change_the_target(lm, scores, unit, settings):
    potential = scores * ponder.power(1.3)
    by_token, by_step = (
        enumerate_traces(
            ponder.Generation(lm, [0], max_new_tokens=4, potential=potential, unit=u, **settings)
        )
        for u in ("token", unit)
    )
    for a, b in zip(by_token, by_step, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("num_particles", [2, 4, 16])
@pytest.mark.parametrize("delimiter", [".", "a."])
def test_step_level_smc_is_properly_weighted(lm, scores, delimiter, num_particles):
    """Steps of many lengths, traces that end early, and a delimiter that a merged token hides."""
    program = ponder.Generation(
        lm, [0], max_new_tokens=4, potential=scores * ponder.power(1.4), unit=ponder.Step(delimiter)
    )
    algorithm = ponder.inference.smc(program, num_particles, "multinomial", ess_threshold=1.0)
    check_algorithm(algorithm, program, num_runs=2000)


def test_prefixes_are_weighed_at_the_ends_of_steps_only(lm):
    seen = []

    def prefix(texts):
        seen.extend(texts)
        return [0.0] * len(texts)

    potential = ponder.text(lambda texts: [0.0] * len(texts), prefix=prefix)
    program = ponder.Generation(lm, [0], max_new_tokens=6, potential=potential, unit=ponder.Step("."))
    ponder.inference.smc(program, 8).run(jax.random.key(1))
    assert seen and all(text.endswith(".") for text in seen)


def test_a_forced_step_that_does_not_fit_has_weight_zero(lm):
    program = ponder.Generation(lm, [0], max_new_tokens=6, unit=ponder.Step("."))
    state = program.init(jax.random.key(0), 3)
    tokens = jnp.full((3, 6), A).at[:, 2].set(DOT).at[2, 1].set(DOT)
    move = Move(tokens, jnp.zeros(3), jnp.array([3, 3, 3]))
    forced = (jnp.array([True, False, True]), move)
    state, made, log_weight = program.propagate(jax.random.key(1), state, forced)
    assert made.lengths[0] == 3 and made.lengths[2] == 2
    assert log_weight[0] == 0 and log_weight[1] == 0 and log_weight[2] == -jnp.inf


@pytest.mark.slow
def test_steps_of_several_prompts_are_those_of_each_alone(lm, scores):
    kwargs = {"max_new_tokens": 5, "potential": scores, "unit": ponder.Step(".")}
    batch = ponder.Generation(lm, [[0, 1], [2], [1, 1, 0]], **kwargs)
    key = jax.random.key(3)
    together = ponder.inference.smc(batch, 8).run(key)
    for i, prompt in enumerate([[0, 1], [2], [1, 1, 0]]):
        alone = ponder.inference.smc(ponder.Generation(lm, prompt, **kwargs), 8)
        posterior = alone.run(jax.random.split(key, 3)[i])
        np.testing.assert_allclose(together[i].log_evidence, posterior.log_evidence, atol=1e-5)
        np.testing.assert_array_equal(together[i].tokens, posterior.tokens)


@pytest.fixture(scope="module")
def decoder():
    from flax import nnx

    from ponder.models import Decoder

    config = DecoderConfig(4, 16, 32, 2, 2, 1, 8, 64, tie_word_embeddings=False)
    return DecoderLM(Decoder(config, rngs=nnx.Rngs(0)), PIECES, (EOS,), "tiny")


def teacher_forced(lm, prompt, tokens):
    """Log p of a trace by one pass over all of it; padded, so that all traces share a compilation."""
    padded = [*prompt, *tokens, *[0] * (16 - len(prompt) - len(tokens))]
    logits = jax.nn.log_softmax(jax.jit(lm.score)(jnp.asarray(padded, jnp.int32)))
    return float(sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(tokens)))


def test_a_ragged_cache_gives_the_log_probabilities_of_a_full_pass(decoder):
    program = ponder.Generation(decoder, [0, 1, 2], max_new_tokens=12, unit=ponder.Step("."))
    posterior = ponder.inference.smc(program, 8, ess_threshold=1.0).run(jax.random.key(2))
    lengths = np.asarray(posterior.stats.num_tokens)
    assert len(set(lengths[0])) > 1 and posterior.stats.resampled.any()
    for row in range(8):
        tokens = np.asarray(posterior.tokens[row, : posterior.lengths[row]])
        wanted = teacher_forced(decoder, [0, 1, 2], tokens)
        assert float(posterior.log_prior[row]) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
def test_an_expert_waits_with_the_particles(lm, decoder):
    other = TableLM.random(jax.random.key(8), 4, eos_token_ids=(EOS,), tokenizer=PIECES)
    for expert in (other, decoder):
        program = ponder.Generation(
            lm, [0], max_new_tokens=4, potential=ponder.expert(expert, weight=0.7), unit=ponder.Step(".")
        )
        by_token = ponder.Generation(lm, [0], max_new_tokens=4, potential=ponder.expert(expert, weight=0.7))
        a, b = enumerate_traces(by_token), enumerate_traces(program)
        np.testing.assert_allclose(a.log_potential, b.log_potential, atol=2e-5)
        posterior = ponder.inference.smc(program, 32).run(jax.random.key(0))
        assert not posterior.stats.invalid


class Positions:
    """A model whose cache is one number for all rows: they cannot wait for each other."""

    vocab_size, eos_token_ids, tokenizer = 3, (2,), None

    def prefill(self, tokens, num_particles, max_new_tokens):
        return jnp.int32(0), jnp.zeros((num_particles, 3))

    def extend(self, cache, tokens):
        return cache + 1, jnp.zeros((tokens.shape[0], 3))

    def fork(self, cache, ancestors):
        return cache


class Held:
    """A model without `extend_block`; its cache has the particles on the second axis."""

    vocab_size, eos_token_ids, tokenizer = 3, (2,), None

    def prefill(self, tokens, num_particles, max_new_tokens):
        return {"count": jnp.zeros((1, num_particles))}, jnp.zeros((num_particles, 3))

    def extend(self, cache, tokens):
        count = cache["count"] + tokens[None].astype(jnp.float32) + 1.0
        return {"count": count}, jnp.stack([count[0], -count[0], jnp.zeros_like(count[0])], axis=1)

    def fork(self, cache, ancestors):
        return {"count": cache["count"][:, ancestors]}


def test_models_without_extend_block():
    by_token, by_step = (
        enumerate_traces(ponder.Generation(Held(), [0], max_new_tokens=4, unit=unit))
        for unit in ("token", ponder.Step(1))
    )
    np.testing.assert_allclose(by_token.log_prior, by_step.log_prior, atol=1e-6)
    with pytest.raises(TypeError, match="lm: a step unit needs a model with extend_block"):
        ponder.Generation(Positions(), [0], max_new_tokens=4, unit=ponder.Step(1))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ponder.Step(".", max_tokens=0), ValueError, r"Step\(max_tokens\): expected an integer >= 1"),
        (lambda: ponder.Step(".", max_steps=2.5), ValueError, r"Step\(max_steps\): expected an integer >= 1"),
        (lambda: ponder.Step(".", max_steps=True), ValueError, r"Step\(max_steps\).*got True"),
        (lambda: ponder.Step(""), ValueError, r"Step\(delimiter\): expected a string or token ids, got ''"),
        (
            lambda: ponder.Step(None),
            ValueError,
            r"Step\(delimiter\): expected a string or token ids, got None",
        ),
    ],
)
def test_bad_steps(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("unit", "error", "message"),
    [
        (3, TypeError, "unit: expected 'token' or a ponder.Step, got 3"),
        (ponder.Step(9), ValueError, r"Step\(delimiter\): expected a token id from 0 to 3, got 9"),
        (ponder.Step(1.5), TypeError, r"Step\(delimiter\): expected strings and token ids, got 1.5"),
    ],
)
def test_bad_units(lm, unit, error, message):
    with pytest.raises(error, match=message):
        ponder.Generation(lm, [0], max_new_tokens=4, unit=unit)


def test_a_delimiter_needs_text():
    bare = TableLM.random(jax.random.key(0), 4, eos_token_ids=(3,))
    with pytest.raises(ValueError, match=r"needs the bytes of the tokens, but lm\.tokenizer is None"):
        ponder.Generation(bare, [0], max_new_tokens=4, unit=ponder.Step("."))
    program = ponder.Generation(bare, [0], max_new_tokens=4, unit=ponder.Step(1))
    assert ponder.inference.smc(program, 4).run(jax.random.key(0)).stats.num_steps >= 1


@pytest.mark.slow
def test_judgements_are_counted_once_a_step(lm):
    calls = []

    def judge(prompt, texts):
        calls.append(len(texts))
        return [0.5 + 0.4 * text.endswith(".") for text in texts]

    reward = ponder.process_reward(ponder.text_reward(judge), link="odds")
    program = ponder.Generation(lm, [0], max_new_tokens=6, potential=reward, unit=ponder.Step("."))
    stats = ponder.inference.smc(program, 8).run(jax.random.key(0)).stats
    # A step in which no trace says anything is not judged: the last one, which only ends, or a lone ".".
    assert 1 < len(calls) <= int(stats.reward_calls) == int(stats.num_steps)
    twice = ponder.Generation(
        lm, [0], max_new_tokens=6, potential=reward * reward**0.5, unit=ponder.Step(".")
    )
    stats = ponder.inference.smc(twice, 8).run(jax.random.key(0)).stats
    assert int(stats.reward_calls) == 2 * int(stats.num_steps)
    none = ponder.Generation(lm, [0], max_new_tokens=6, unit=ponder.Step("."))
    assert ponder.inference.smc(none, 8).run(jax.random.key(0)).stats.reward_calls is None


def test_a_stop_string_after_the_last_step_is_judged(lm):
    """Ended by force after its last step, a trace has one token more than a step may have."""
    reward = ponder.process_reward(ponder.text_reward(lambda prompt, texts: [0.5] * len(texts)))
    program = ponder.Generation(
        lm,
        [0],
        max_new_tokens=6,
        potential=reward,
        unit=ponder.Step("..", max_tokens=2, max_steps=1),
        overflow="force_eos",
        stop="a.",
    )
    traces = enumerate_traces(program)
    assert np.isfinite(traces.log_potential).all()
    ended = {tuple(row[:n]) for row, n in zip(traces.tokens, traces.lengths, strict=True)}
    assert (A, A, DOT) in ended


@pytest.mark.parametrize(
    "delimiter", [np.array([1]), {1}, (i for i in [1])], ids=["array", "set", "iterator"]
)
def test_a_delimiter_may_be_any_iterable(lm, delimiter):
    unit = ponder.Step(delimiter)
    for _ in range(2):
        assert steps(lm, [A, DOT, EOS], unit)[0] == [[A, DOT], [EOS]]
    with pytest.raises(ValueError, match="expected a string or token ids"):
        ponder.Step(np.array([], int))
