import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.models import DecoderConfig
from ponder.models.weights import from_weights, to_weights, weight_table

PLAIN = DecoderConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,  # 4 heads of 4 are not the hidden size
    max_position_embeddings=64,
)
TIED = dataclasses.replace(PLAIN, tie_word_embeddings=True)
FULL = dataclasses.replace(PLAIN, qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True)
LAYER = "model.layers.0."

# Every tensor of the first layer, as Hugging Face names and shapes them.
SHAPES = {
    "input_layernorm.weight": (8,),
    "post_attention_layernorm.weight": (8,),
    "self_attn.q_proj.weight": (16, 8),
    "self_attn.k_proj.weight": (8, 8),
    "self_attn.v_proj.weight": (8, 8),
    "self_attn.o_proj.weight": (8, 16),
    "mlp.gate_proj.weight": (12, 8),
    "mlp.up_proj.weight": (12, 8),
    "mlp.down_proj.weight": (8, 12),
}
MORE_SHAPES = {
    "self_attn.q_proj.bias": (16,),
    "self_attn.k_proj.bias": (8,),
    "self_attn.v_proj.bias": (8,),
    "self_attn.o_proj.bias": (8,),
    "self_attn.q_norm.weight": (4,),
    "self_attn.k_norm.weight": (4,),
    "mlp.gate_proj.bias": (12,),
    "mlp.up_proj.bias": (12,),
    "mlp.down_proj.bias": (8,),
}


def checkpoint(config):
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (11, 8)
    for i in range(2):
        for name, shape in (SHAPES | (MORE_SHAPES if config.qk_norm else {})).items():
            shapes[f"model.layers.{i}.{name}"] = shape
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("config", [PLAIN, TIED, FULL], ids=["plain", "tied", "full"])
def test_round_trip(config):
    weights = checkpoint(config)
    decoder = from_weights(config, weights)
    found = to_weights(decoder)
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(found[name], value)
    again = from_weights(config, found)
    jax.tree.map(np.testing.assert_array_equal, decoder, again)
    assert not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(decoder))
    assert len(weight_table(config)) == len(jax.tree.leaves(decoder))


def test_dtype_is_that_of_the_matrices():
    decoder = from_weights(FULL, checkpoint(FULL), dtype="bfloat16")
    for x in jax.tree.leaves(decoder):
        assert x.dtype == (jnp.bfloat16 if x.ndim == 2 else jnp.float32)
    weights = checkpoint(FULL) | {"model.norm.weight": np.ones(8, jnp.bfloat16)}
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(from_weights(FULL, weights)))


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", LAYER + "self_attn.k_proj.weight"])
def test_missing(name):
    weights = checkpoint(PLAIN)
    del weights[name]
    with pytest.raises(ValueError, match=rf"1 missing \['{name}'\], 0 unexpected"):
        from_weights(PLAIN, weights)


@pytest.mark.parametrize("name", [LAYER + "self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight"])
def test_unexpected(name):
    weights = checkpoint(PLAIN) | {name: np.zeros(16, np.float32)}
    with pytest.raises(ValueError, match=rf"0 missing \[\], 1 unexpected \['{name}'\]"):
        from_weights(PLAIN, weights)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (12, 8)),
        (LAYER + "self_attn.q_proj.weight", (8, 8)),
        (LAYER + "self_attn.o_proj.weight", (16, 8)),
        (LAYER + "self_attn.q_proj.bias", (15,)),
        ("model.norm.weight", (8, 1)),
    ],
)
def test_wrong_shape(name, shape):
    weights = checkpoint(FULL) | {name: np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=rf"weights: {name} has shape .*, expected"):
        from_weights(FULL, weights)


def test_tied_embeddings_may_be_repeated_as_the_head():
    weights = checkpoint(TIED)
    copied = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}
    decoder = from_weights(TIED, copied)
    assert decoder.head is None
    assert to_weights(decoder).keys() == weights.keys()
    copied["lm_head.weight"][3, 2] += 0.5
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from embed_tokens"):
        from_weights(TIED, copied)


def test_a_head_without_embeddings_is_missing_them():
    weights = checkpoint(TIED)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    with pytest.raises(ValueError, match=r"1 missing \['model.embed_tokens.weight'\]"):
        from_weights(TIED, weights)


def test_stored_rotary_frequencies_are_ignored():
    weights = checkpoint(PLAIN) | {LAYER + "self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    assert from_weights(PLAIN, weights).head is not None
