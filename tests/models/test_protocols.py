"""What a model has beyond its protocol is told in one place, and wrappers pass on what is inside."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ponder
from ponder.models import Decoder, DecoderConfig, DecoderLM, TableLM, TableReward
from ponder.models.likelihood_reward import LikelihoodReward
from ponder.models.protocols import Capabilities, LanguageModel, RewardModel, bos_of, capabilities

NOTHING = Capabilities(False, False, False, False, None, ())


@pytest.fixture(scope="module")
def decoder():
    return DecoderLM(Decoder(DecoderConfig(7, 16, 32, 2, 2, 1, 8, 64), rngs=nnx.Rngs(0)), eos_token_ids=(6,))


class Bare:
    """The methods of the protocol over another model, and what else is given."""

    eos_token_ids, tokenizer = (6,), None

    def __init__(self, model, **members):
        self.model, self.vocab_size = model, model.vocab_size
        self.extend, self.fork = model.extend, model.fork
        vars(self).update(members)

    def prefill(self, tokens, num_particles, max_new_tokens):
        return self.model.prefill(tokens, num_particles, max_new_tokens)


def test_capabilities(decoder):
    assert capabilities(decoder) == Capabilities(True, True, True, True, 64, ())
    assert capabilities(TableLM(jnp.zeros((3, 3)))) == NOTHING._replace(many_prompts=True)
    assert capabilities(TableReward(jnp.zeros(3))) == NOTHING._replace(blocks=True, many_prompts=True)
    bare = Bare(decoder)
    assert isinstance(bare, LanguageModel) and capabilities(bare) == NOTHING
    nothing = dict.fromkeys(("extend_block", "truncate", "prefill_many", "max_length", "separator"))
    assert capabilities(Bare(decoder, **nothing)) == NOTHING
    assert capabilities(Bare(decoder, separator=[1, 2])).separator == (1, 2)


def test_the_first_token_of_a_prompt():
    for tokenizer, expected in (
        (types.SimpleNamespace(), []),
        (types.SimpleNamespace(adds_bos=False, bos_token_id=5), []),
        (types.SimpleNamespace(adds_bos=True, bos_token_id=5), [5]),
    ):
        assert bos_of(tokenizer) == expected


@pytest.mark.slow
def test_a_wrapper_has_what_its_model_has(decoder):
    """Also where the model reads no padded prompt: the wrapper must not be given one."""
    coefficients = jnp.array([4.0, 0.5, 1.5])
    bare = Bare(decoder, extend_block=decoder.extend_block, truncate=decoder.truncate)
    whole, part = (LikelihoodReward(lm, coefficients) for lm in (decoder, bare))
    assert isinstance(whole, RewardModel) and isinstance(part, RewardModel)
    assert capabilities(whole) == Capabilities(True, False, True, True, 64, ())
    assert capabilities(part) == NOTHING._replace(blocks=True)
    found = []
    for prm in (whole, part):
        potential = ponder.process_reward(prm, link="ratio")
        program = ponder.Generation(decoder, [1, 2], max_new_tokens=4, potential=potential)
        found.append(ponder.inference.smc(program, 4).run(jax.random.key(0)))
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_allclose(found[0].log_potential, found[1].log_potential, rtol=1e-5)
    with pytest.raises(TypeError, match="several prompts need a reward model with prefill_many"):
        potential = ponder.process_reward(part)
        ponder.Generation(decoder, [[1], [2]], max_new_tokens=4, potential=potential)
