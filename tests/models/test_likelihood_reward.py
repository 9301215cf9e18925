"""A language model as a reward model, against its own probabilities by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ponder
from ponder.models import Decoder, DecoderConfig, DecoderLM, load_reward
from ponder.models.likelihood_reward import LikelihoodReward

COEFFICIENTS = (4.0, 0.5, 1.5)


@pytest.fixture(scope="module")
def lm():
    config = DecoderConfig(7, 16, 32, 2, 2, 1, 8, 64)
    return DecoderLM(Decoder(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def prm(lm):
    return LikelihoodReward(lm, jnp.asarray(COEFFICIENTS))


def by_hand(lm, prompt, steps):
    """The score after each step, from one pass over the whole trace."""
    tokens = [*prompt, *(token for step in steps for token in step)]
    logits = np.asarray(lm.score(jnp.asarray(tokens)), np.float64)
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    place, score, scores = len(prompt), 1.0, []
    for step in steps:
        spoken = [log_p[place - 1 + i, token] for i, token in enumerate(step)]
        place += len(step)
        score *= 1 / (1 + np.exp(-(COEFFICIENTS[0] + 0.5 * sum(spoken) + 1.5 * min(spoken))))
        scores.append(score)
    return scores


def test_steps_are_scored_by_their_probabilities(lm, prm):
    prompt, rows = [1, 2, 3], [[[4, 5], [6], [0, 1, 2]], [[6, 6, 1], [2, 3, 4], [5]]]
    cache, scores = prm.prefill(jnp.asarray(prompt), 2, 8)
    np.testing.assert_allclose(scores, 1.0)
    for number in range(3):
        steps = [row[number] for row in rows]
        tokens = jnp.asarray([step + [0] * (4 - len(step)) for step in steps])
        cache, scores = jax.jit(prm.extend_block)(cache, tokens, jnp.asarray([len(s) for s in steps]))
        wanted = [by_hand(lm, prompt, row)[number] for row in rows]
        np.testing.assert_allclose(scores, wanted, rtol=2e-4)


@pytest.mark.slow
def test_rows_wait_and_fork(lm, prm):
    cache, _ = prm.prefill(jnp.asarray([1, 2]), 3, 8)
    step = jnp.asarray([[3, 4], [5, 6], [1, 1]])
    cache, first = prm.extend_block(cache, step, jnp.asarray([2, 0, 1]))
    cache = prm.fork(cache, jnp.asarray([2, 1, 0]))
    _, second = prm.extend_block(cache, step, jnp.asarray([1, 2, 0]))
    assert float(first[0]) == pytest.approx(by_hand(lm, [1, 2], [[3, 4]])[0], rel=2e-4)
    assert float(second[0]) == pytest.approx(by_hand(lm, [1, 2], [[1], [3]])[1], rel=2e-4)
    assert float(second[1]) == pytest.approx(by_hand(lm, [1, 2], [[5, 6]])[0], rel=2e-4)


@pytest.mark.slow
def test_it_judges_in_a_program(lm, prm):
    potential = ponder.process_reward(prm, link="ratio")
    program = ponder.Generation(lm, [1, 2], max_new_tokens=6, potential=potential, unit=ponder.Step(3))
    posterior = ponder.inference.smc(program, 6).run(jax.random.key(0))
    for row in range(6):
        tokens = np.asarray(posterior.tokens[row, : posterior.lengths[row]]).tolist()
        steps, step = [], []
        for token in tokens:
            step.append(token)
            if token == 3:
                steps, step = [*steps, step], []
        steps = [step for step in [*steps, step] if step not in ([], [3])]  # a lone delimiter is no step
        wanted = by_hand(lm, [1, 2], steps)[-1] if steps else 1.0
        assert float(posterior.log_potential[row]) == pytest.approx(np.log(wanted), rel=1e-3, abs=1e-6)


def write(directory, lm, settings):
    from safetensors.numpy import save_file

    from ponder.models.weights import to_weights

    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 7,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "ponder_reward": settings,
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file({k: np.asarray(v) for k, v in to_weights(lm.decoder).items()}, directory / "model.safetensors")


SETTINGS = {"layout": "likelihood", "coefficients": list(COEFFICIENTS)}


@pytest.mark.slow
def test_it_loads(tmp_path, lm, prm):
    write(tmp_path, lm, SETTINGS)
    loaded = load_reward(tmp_path)
    assert isinstance(loaded, LikelihoodReward)
    step, lengths = jnp.asarray([[3, 4, 5]]), jnp.asarray([3])
    (a, _), (b, _) = (model.prefill(jnp.asarray([1, 2]), 1, 8) for model in (prm, loaded))
    np.testing.assert_allclose(
        prm.extend_block(a, step, lengths)[1], loaded.extend_block(b, step, lengths)[1], rtol=1e-5
    )


@pytest.mark.parametrize("coefficients", [None, [1, 2], [1, 2, "x"], [1, 2, 1e9]])
def test_bad_coefficients(tmp_path, lm, coefficients):
    write(tmp_path, lm, {"layout": "likelihood", "coefficients": coefficients})
    with pytest.raises(ValueError, match="ponder_reward: expected coefficients of three numbers"):
        load_reward(tmp_path)
