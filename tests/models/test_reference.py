"""Logits and likelihoods against Hugging Face transformers on torch (see make_fixtures.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.models.loading.loading import load

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINTS = sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz"))
TEXTS = json.loads((FIXTURES / "smollm2_nll.json").read_text(encoding="utf-8"))

# Compiled: faster than one operation after another even for a single call.
score = jax.jit(lambda lm, tokens: lm.score(tokens))
prefill = jax.jit(
    lambda lm, tokens, num_particles, max_new_tokens: lm.prefill(tokens, num_particles, max_new_tokens),
    static_argnums=(2, 3),
)
extend = jax.jit(lambda lm, cache, tokens: lm.extend(cache, tokens))
extend_block = jax.jit(lambda lm, cache, tokens, lengths: lm.extend_block(cache, tokens, lengths))


def chosen_log_probs(logits, tokens):
    log_probs = jax.nn.log_softmax(logits[:-1], axis=-1)
    return np.take_along_axis(np.asarray(log_probs, np.float64), np.asarray(tokens)[1:, None], axis=1)[:, 0]


def test_every_family_has_a_checkpoint():
    assert CHECKPOINTS == [
        "tiny_llama3_bf16",
        "tiny_llama_sharded",
        "tiny_mistral_bf16",
        "tiny_qwen2",
        "tiny_qwen3",
    ]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_logits(name):
    lm = load(FIXTURES / name)
    expected = np.load(FIXTURES / name / "expected.npz")
    tokens = jnp.asarray(expected["tokens"])

    logits = score(lm, tokens)

    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected["logits"], atol=5e-4)
    np.testing.assert_allclose(-chosen_log_probs(logits, tokens).sum(), expected["nll"], rtol=1e-5)


@pytest.mark.parametrize("name", ["tiny_llama3_bf16", "tiny_mistral_bf16"])
def test_checkpoint_logits_through_the_cache(name):
    """Prompt, one token, a block of tokens: the particle cache gives the same logits as one pass."""
    lm = load(FIXTURES / name)
    expected = np.load(FIXTURES / name / "expected.npz")
    tokens, logits = jnp.asarray(expected["tokens"]), expected["logits"]

    cache, first = prefill(lm, tokens[:10], 2, len(tokens) - 10)
    cache, second = extend(lm, cache, jnp.full(2, tokens[10]))
    rest = jnp.broadcast_to(tokens[11:], (2, len(tokens) - 11))
    cache, block = extend_block(lm, cache, rest, jnp.full(2, rest.shape[1]))

    for row in range(2):
        np.testing.assert_allclose(first[row], logits[9], atol=5e-4)
        np.testing.assert_allclose(second[row], logits[10], atol=5e-4)
        np.testing.assert_allclose(block[row], logits[11:], atol=5e-4)


@pytest.mark.parametrize("entry", TEXTS, ids=lambda entry: entry["name"])
def test_smollm2_tokens(entry, smollm2):
    assert smollm2.tokenizer.encode(entry["text"]) == entry["ids"]
    if "messages" in entry:
        assert smollm2.tokenizer.apply_chat_template(entry["messages"]) == entry["ids"]


@pytest.mark.parametrize("entry", TEXTS, ids=lambda entry: entry["name"])
def test_smollm2_log_likelihood(entry, smollm2):
    """The likelihood, not the best next token: a wrong rotary layout still knows what comes after Paris."""
    # Padded on the right to one length, so that the five texts share a compilation.
    longest = max(len(text["ids"]) for text in TEXTS)
    tokens = jnp.asarray(entry["ids"] + [0] * (longest - len(entry["ids"])), jnp.int32)

    logits = score(smollm2, tokens)

    log_probs = chosen_log_probs(logits[: len(entry["ids"])], entry["ids"])
    np.testing.assert_allclose(log_probs, entry["log_probs"], atol=2e-3)
    np.testing.assert_allclose(-log_probs.sum(), entry["nll"], rtol=1e-5)
