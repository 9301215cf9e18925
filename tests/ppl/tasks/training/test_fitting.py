"""Training of small decoders: the forward pass, the loop, export and reload, and the gates' figures."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ponder.models.decoder import Decoder, linear
from ponder.models.language_model import DecoderLM
from ponder.models.loading import checkpoint_export
from ponder.models.loading.loading import load
from ponder.tasks import countdown, operation_chain
from ponder.tasks.training import fitting as training

CONFIG = training.small_config(len(countdown.PIECES), 1, 64)


FIXTURES = Path(__file__).parents[3] / "models" / "fixtures"
FAMILIES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz"))


@pytest.fixture(scope="module")
def decoder():
    return Decoder(CONFIG, rngs=nnx.Rngs(3))


@pytest.mark.slow
def test_forward_pass_is_that_of_the_library(decoder):
    tokens = jax.random.randint(jax.random.key(0), (2, 20), 0, CONFIG.vocab_size)
    fast = linear(training.hidden_states(decoder, tokens), decoder.head)
    for row, logits in zip(tokens, fast, strict=True):
        np.testing.assert_allclose(DecoderLM(decoder).score(row), logits, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_runs_the_blocks_that_decode(name):
    """Every family, so biases, norms of queries and keys, groups of heads, windows and rotary scalings."""
    lm = load(FIXTURES / name)
    decoder, length = lm.decoder, 24
    rows = jax.random.randint(jax.random.key(0), (2, length), 0, lm.vocab_size)

    @jax.jit
    def logits(decoder, tokens):
        head = decoder.embedding if decoder.head is None else decoder.head
        return linear(training.hidden_states(decoder, tokens), head)

    prefilled = jax.jit(lambda lm, tokens: lm.prefill(tokens, 1, 1)[1][0])
    scored = jax.jit(lambda lm, tokens: lm.score(tokens))
    found = np.asarray(logits(decoder, rows))
    scale = np.abs(found).max()
    for row, trained in zip(rows, found, strict=True):
        np.testing.assert_allclose(trained, scored(lm, row), atol=1e-5 * scale, rtol=0)
        for end in (9, length):  # mistral's window is 8
            np.testing.assert_allclose(trained[end - 1], prefilled(lm, row[:end]), atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_of_a_block_is_trained(name):
    """A loss has a gradient for each: what the training forward left out would have none."""
    graph, parameters = nnx.split(load(FIXTURES / name).decoder)
    rows = jax.random.randint(jax.random.key(1), (2, 16), 0, 96)

    @jax.jit
    @jax.grad
    def slopes(parameters):
        return jnp.square(training.hidden_states(nnx.merge(graph, parameters), rows)[..., 0]).sum()

    for path, slope in jax.tree.leaves_with_path(slopes(parameters)["blocks"]):
        slope = np.asarray(slope)
        assert np.isfinite(slope).all() and np.abs(slope).max() > 0, jax.tree_util.keystr(path)


def test_deepening_changes_nothing_at_first(decoder):
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, CONFIG.vocab_size)
    deeper = training.deepen(decoder, 3, seed=0)
    assert len(deeper.blocks) == 3 and len(decoder.blocks) == 1
    np.testing.assert_allclose(
        training.hidden_states(deeper, tokens), training.hidden_states(decoder, tokens), atol=1e-6
    )


def test_branches_are_rows_that_share_their_beginning(decoder):
    deeper = training.deepen(decoder, 2, seed=0)
    start, *ends = jax.random.randint(jax.random.key(2), (4, 2, 5), 0, CONFIG.vocab_size)
    branches = np.repeat([-1, 0, 1, 2], 5)

    together = training.last_two_states(deeper, jnp.concatenate([start, *ends], axis=1), branches)

    for i, end in enumerate(ends):
        apart = training.last_two_states(deeper, jnp.concatenate([start, end], axis=1))
        for found, expected in zip(together, apart, strict=True):
            np.testing.assert_allclose(found[:, 5 * i + 5 : 5 * i + 10], expected[:, 5:], atol=2e-5)


@pytest.mark.slow
def test_loss_falls_and_is_a_function_of_the_seed(decoder):
    graph, parameters = nnx.split(decoder)
    encode = checkpoint_export.encoder(countdown.PIECES, countdown.SPLIT)

    def batch_fn(i):
        rng = np.random.default_rng(i)
        drawn = [countdown.draw_problem(rng, held_out=False) for _ in range(16)]
        texts = [countdown.prompt_text(p) + "".join(map(countdown.step_text, steps)) for p, steps in drawn]
        return np.asarray([encode(text) for text in texts], np.int32)

    def loss_fn(values, tokens):
        model = nnx.merge(graph, values)
        logits = linear(training.hidden_states(model, tokens[:, :-1]), model.head)
        return training.cross_entropy(logits, tokens[:, 1:], jnp.ones(tokens[:, 1:].shape, jnp.float32)), {}

    fit = functools.partial(training.fit, parameters, loss_fn, batch_fn, num_steps=12, log=lambda _: None)
    trained, again = fit(), fit()
    before, after = (float(loss_fn(values, batch_fn(99))[0]) for values in (parameters, trained))
    assert after < before - 1.0
    jax.tree.map(np.testing.assert_array_equal, trained, again)


@pytest.mark.parametrize("task", [countdown, operation_chain])
def test_policy_reloads_with_equal_logits(task, tmp_path):
    decoder = Decoder(training.small_config(len(task.PIECES), 1, 64), rngs=nnx.Rngs(0))
    checkpoint_export.export_policy(tmp_path / "model", decoder, task.PIECES, task.SPLIT)
    lm = load(tmp_path / "model")
    assert (lm.vocab_size, lm.eos_token_ids) == (len(task.PIECES), (task.EOS_ID,))
    tokens = jnp.arange(12) % lm.vocab_size
    halves = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), nnx.state(decoder))
    nnx.update(decoder, halves)
    np.testing.assert_allclose(lm.score(tokens), DecoderLM(decoder).score(tokens), atol=1e-5)


def test_reward_reloads_with_equal_scores(decoder, tmp_path):
    weight, bias = np.ones((1, 128), np.float32) / 8, np.ones(1, np.float32) / 4
    checkpoint_export.export_reward(
        tmp_path / "prm", decoder, weight, bias, countdown.PIECES, countdown.SPLIT, ponder_note="a test"
    )
    found, found_weight, found_bias = checkpoint_export.read_reward(tmp_path / "prm")
    np.testing.assert_array_equal(found_weight, weight)
    np.testing.assert_array_equal(found_bias, bias)
    tokens = jnp.arange(12)[None]
    expected = training.hidden_states(decoder, tokens) @ weight[0]
    np.testing.assert_allclose(training.hidden_states(found, tokens) @ weight[0], expected, atol=0.02)


@pytest.mark.parametrize("task", [countdown, operation_chain])
def test_tokenizer_round_trip(task, tmp_path):
    from ponder.models.loading.tokenizer import HubTokenizer

    checkpoint_export.write_tokenizer(tmp_path, task.PIECES, task.SPLIT)
    tokenizer = HubTokenizer.from_directory(tmp_path)
    encode = checkpoint_export.encoder(task.PIECES, task.SPLIT)
    assert tokenizer.eos_token_id == task.EOS_ID and tokenizer.vocab_size == len(task.PIECES)
    assert [tokenizer.token_bytes(i).decode() for i in range(len(task.PIECES))] == list(task.PIECES)
    rng = np.random.default_rng(0)
    for problem in task.problems(0, 20):
        if task is countdown:
            problem, steps = countdown.draw_problem(rng, held_out=True)
        else:
            steps = operation_chain.solution(problem)
        text = task.prompt_text(problem) + "".join(map(task.step_text, steps))
        ids = tokenizer.encode(text)
        assert ids == encode(text) and tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, task.EOS_ID]) == text
    assert tokenizer.encode("x")[0] == len(task.PIECES) - 1  # unknown, not dropped


@pytest.mark.slow
def test_sampled_traces_end_with_eos(decoder):
    lm = DecoderLM(decoder, eos_token_ids=(countdown.EOS_ID,))
    prompts = np.arange(15).reshape(3, 5)
    traces = training.sample_traces(lm, prompts, 4, 60, seed=0, rows=8)
    assert traces.shape == (3, 4, 60)
    for row in traces.reshape(-1, 60):
        ends = np.flatnonzero(row == countdown.EOS_ID)
        assert not len(ends) or (row[ends[0] :] == countdown.EOS_ID).all()
    greedy = training.sample_traces(lm, prompts, 0, 4, seed=0)
    assert greedy[0, 0, 0] == int(lm.score(jnp.asarray(prompts[0]))[-1].argmax())


def test_best_of_n_is_the_mean_over_subsets():
    rng = np.random.default_rng(0)
    scores, correct = rng.permutation(30).reshape(5, 6) / 30, rng.random((5, 6)) < 0.4
    for n in (1, 2, 4, 6):
        subsets = itertools.combinations(range(6), n)
        picked = [correct[np.arange(5), np.asarray(s)[scores[:, s].argmax(1)]].mean() for s in subsets]
        assert training.best_of_n(scores, correct, [n]) == pytest.approx([np.mean(picked)])
    with pytest.raises(ValueError, match=r"counts: expected at most 6 .*, got 7"):
        training.best_of_n(scores, correct, [1, 7])


def test_within_problem_auc_does_not_reward_knowing_the_difficulty():
    scores = np.array([[0.9, 0.9, 0.9, 0.9], [0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.5, 0.5]])
    labels = np.array([[True, True, True, False], [False, False, False, True], [True] * 4])
    assert training.within_problem_auc(scores, labels) == (0.5, 2)
    scores[0] = [0.9, np.nan, 0.8, 0.1]
    assert training.within_problem_auc(scores, labels) == (0.75, 2)
