"""Several prompts in one program: as many inferences, with the numbers that each would get alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ponder
from ponder import inference
from ponder.models import Decoder, DecoderConfig, DecoderLM, TableLM

PROMPTS = [[1, 2], [0, 1], [2, 2]]  # of equal length, so that the toys compile once for each alone
UNEQUAL = [[1, 2], [0], [2, 2, 1, 0, 1]]


@pytest.fixture(scope="module")
def decoder():
    config = DecoderConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
    )
    return DecoderLM(Decoder(config, rngs=nnx.Rngs(3)), eos_token_ids=(5, 6))


def alone(key, make, prompts=PROMPTS):
    """The posterior of each prompt by itself, with the key that it has in the batch."""
    keys = jax.random.split(key, len(prompts))
    return [make(prompt, i).run(k) for i, (prompt, k) in enumerate(zip(prompts, keys, strict=True))]


def assert_same(batch, singles):
    assert isinstance(batch, list) and len(batch) == len(singles)
    for found, wanted in zip(batch, singles, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5), found, wanted)


@pytest.mark.parametrize("threshold", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_batch_gives_what_each_prompt_gives_alone(decoder, threshold):
    potential = ponder.tokens(forbid=[3]) * ponder.power(1.5)

    def make(prompt, i=None):
        program = ponder.Generation(
            decoder, prompt, max_new_tokens=6, potential=potential, overflow="force_eos"
        )
        return inference.smc(program, 4, ess_threshold=threshold)

    key = jax.random.key(0)
    assert_same(make(UNEQUAL).run(key), alone(key, make, UNEQUAL))


@pytest.mark.slow
def test_prompts_that_finish_early_wait_without_a_trace(toy, scores):
    """Lengths differ, so that some prompts wait; what they report ends where it would alone."""

    def make(prompt, i=None):
        program = ponder.Generation(toy, prompt, max_new_tokens=30, potential=scores)
        return inference.smc(program, 2, ess_threshold=1.0)

    key = jax.random.key(4)
    batch = make(PROMPTS).run(key)
    assert len({int(posterior.stats.num_steps) for posterior in batch}) > 1
    assert_same(batch, alone(key, make))
    sliced = make(PROMPTS).run(key, progress=lambda progress: None, progress_every=3)
    assert_same(sliced, batch)


@pytest.mark.slow
def test_each_prompt_may_have_its_own_potential(toy, scores):
    potentials = [ponder.regex("a?(b|cc)*"), scores, ponder.power(2.0)]

    def make(prompt, i=None):
        potential = potentials if i is None else potentials[i]
        return inference.smc(ponder.Generation(toy, prompt, max_new_tokens=4, potential=potential), 8)

    key = jax.random.key(1)
    assert_same(make(PROMPTS).run(key), alone(key, make))


@pytest.mark.parametrize("own_prompt", [None, pytest.param([0, 1], marks=pytest.mark.slow)])
def test_an_expert_reads_each_prompt_or_its_own(toy, own_prompt):
    other = TableLM.random(jax.random.key(8), 4, eos_token_ids=(3,), tokenizer=toy.tokenizer)

    def make(prompt, i=None):
        potential = ponder.expert(other, own_prompt, weight=0.5)
        return inference.smc(ponder.Generation(toy, prompt, max_new_tokens=4, potential=potential), 4)

    key = jax.random.key(6)
    assert_same(make(PROMPTS).run(key), alone(key, make))


@pytest.mark.slow
def test_rejection_in_a_batch(toy, scores):
    def make(prompt, i=None):
        rule = ponder.tokens(forbid=[1]) * scores
        program = ponder.Generation(toy, prompt, max_new_tokens=4, potential=rule, proposal="rejection")
        return inference.smc(program, 4)

    key = jax.random.key(2)
    assert_same(make(PROMPTS).run(key), alone(key, make))


def test_a_batch_of_one_is_a_list(toy):
    program = ponder.Generation(toy, [[1, 2]], max_new_tokens=3)
    (posterior,) = inference.smc(program, 2).run(jax.random.key(0))
    assert posterior.tokens.shape == (2, 3) and posterior.log_evidence.shape == ()


def test_texts_and_chats_can_be_batched(toy):
    assert ponder.Generation(toy, ["ab", "c"], max_new_tokens=2).num_prompts == 2
    chat = [{"role": "user", "content": "ab"}]
    assert ponder.Generation(toy, [chat, "c"], max_new_tokens=2).num_prompts == 2
    assert ponder.Generation(toy, chat, max_new_tokens=2).num_prompts is None
    assert "2 prompts of 1 to 2 tokens" in repr(ponder.Generation(toy, ["ab", "c"], max_new_tokens=2))


def test_a_dead_prompt_is_named(toy):
    potentials = [ponder.power(1.0), ponder.text(lambda texts: [False] * len(texts))]
    program = ponder.Generation(toy, [[1], [2]], max_new_tokens=2, potential=potentials)
    with pytest.warns(RuntimeWarning, match=r"of prompts \[1\] has weight zero"):
        posteriors = inference.smc(program, 4).run(jax.random.key(0))
    assert [bool(p.stats.degenerate) for p in posteriors] == [False, True]
    assert posteriors[1].log_evidence == -jnp.inf


def test_arrays_of_ids_can_be_batched(toy):
    program = ponder.Generation(toy, [np.array([1, 2]), jnp.array([0])], max_new_tokens=2)
    assert program.prompt.tolist() == [[1, 2], [0, 0]] and program.prompt_length.tolist() == [2, 1]
    assert ponder.Generation(toy, [jnp.int32(1), 2], max_new_tokens=2).num_prompts is None


def test_bad_batches(toy):
    with pytest.raises(TypeError, match=r"potential 1 of 2: expected a ponder\.Potential, got None"):
        ponder.Generation(toy, ["ab", "c"], max_new_tokens=2, potential=[ponder.power(2.0), None])
    with pytest.raises(ValueError, match="prompt 1 of 2: prompt: expected text that UTF-8 can write"):
        ponder.Generation(toy, ["a", "\ud800"], max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt 1 of 2: prompt: expected at least one token"):
        ponder.Generation(toy, ["ab", ""], max_new_tokens=2)
    with pytest.raises(TypeError, match="prompt 1 of 2: prompt: expected a str"):
        ponder.Generation(toy, ["ab", 3], max_new_tokens=2)
    with pytest.raises(ValueError, match="potential: expected one for each of 2 prompts, got 1"):
        ponder.Generation(toy, ["ab", "c"], max_new_tokens=2, potential=[ponder.power(2.0)])
    with pytest.raises(TypeError, match="potential: expected one for the single prompt, got a list of 1"):
        ponder.Generation(toy, "ab", max_new_tokens=2, potential=[ponder.power(2.0)])
    with pytest.raises(TypeError, match="program: expected one prompt, got 2"):
        inference.exact(ponder.Generation(toy, ["ab", "c"], max_new_tokens=2))


def test_a_model_without_prefill_many_is_refused(toy):
    class Single:
        vocab_size, eos_token_ids, tokenizer = toy.vocab_size, toy.eos_token_ids, toy.tokenizer
        prefill, extend, fork = toy.prefill, toy.extend, toy.fork

    with pytest.raises(TypeError, match="several prompts need a model with prefill_many; Single has none"):
        ponder.Generation(Single(), ["ab", "c"], max_new_tokens=2)
