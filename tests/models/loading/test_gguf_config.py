"""The keys of a GGUF file: each is applied as llama.cpp applies it, or refused by name."""

import re
from pathlib import Path

import pytest

from ponder.models.config import DecoderConfig
from ponder.models.loading import gguf_config
from ponder.models.loading.gguf import open_gguf
from ponder.models.loading.gguf_config import ARCHITECTURES, hub_config

DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"


def read(architecture="llama", **keys):
    """Return our reading of the smallest sound metadata and `keys`, in which __ stands for a dot."""
    metadata = {
        "embedding_length": 32,
        "feed_forward_length": 48,
        "block_count": 2,
        "attention.head_count": 4,
        "context_length": 128,
        "attention.layer_norm_rms_epsilon": 1e-5,
    } | {key.replace("__", "."): value for key, value in keys.items()}
    full = {f"{architecture}.{key}": value for key, value in metadata.items()}
    return DecoderConfig.from_hf(
        hub_config({"general.architecture": architecture} | full, vocab_size=96, tied=True)
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults(architecture):
    config = read(architecture)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert (config.rope.theta, config.rope.type, config.rope.factor) == (10000.0, "default", 1.0)
    assert (config.sliding_window, config.max_position_embeddings) == (None, 128)
    assert config.qkv_bias is (architecture == "qwen2")


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"rope__scale_linear": 4.0}, 4.0),  # the name of old files
        ({"rope__scaling__factor": 4.0}, 4.0),  # linear is the default type
        ({"rope__scaling__factor": 4.0, "rope__scale_linear": 8.0}, 4.0),
        ({"rope__scaling__factor": 4.0, "rope__scaling__type": "linear"}, 4.0),
        ({"rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 64}, 4.0),
        ({"rope__scaling__factor": 0.0, "rope__scale_linear": 8.0}, None),
        ({"rope__scaling__factor": 1.0}, None),
        ({"rope__scaling__type": "linear"}, None),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope__scaling__type": "none", "rope__scale_linear": 4.0}, None),
    ],
)
def test_rotary_scaling(keys, factor):
    for architecture in ARCHITECTURES:
        rope = read(architecture, **keys).rope
        assert (rope.type, rope.factor) == (("default", 1.0) if factor is None else ("linear", factor))


@pytest.mark.parametrize(
    "keys",
    [
        {"attention__scale": 8**-0.5},
        {"attention__scale": 0.35355338454246521},  # as float32 has it
        {"attention__scale": 0.0},
        {"attention__sliding_window": 128},  # sees the whole context
        {"attention__sliding_window": 0},
        {"attention__causal": True},
        {"attention__value_length": 8, "attention__key_length": 8},
        {"attention__head_count": [4, 4], "feed_forward_length": [48, 48]},  # one a layer, all the same
        {"expert_count": 0, "expert_used_count": 0, "expert_weights_norm": True},
        {"rope__dimension_sections": [0, 0, 0, 0]},
        {"rope__scaling__attn_factor": 1.0, "rope__scaling__finetuned": True},
        {"logit_scale": 1.0, "residual_scale": 0.0, "attn_logit_softcapping": 0.0},
        {"vocab_size": 5, "pooling_type": 3, "tensor_data_layout": "Meta AI original pth"},
    ],
)
def test_values_that_change_nothing(keys):
    assert read(**keys) == read()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention__scale": 0.5}, r"llama\.attention\.scale is 0\.5, .* supported is 1/sqrt\(head_dim\)"),
        ({"attention__scale": float("nan")}, r"llama\.attention\.scale is nan"),
        ({"attention__sliding_window": 64}, r"llama\.attention\.sliding_window is 64"),
        ({"attention__causal": False}, r"llama\.attention\.causal is False.*supported is True"),
        ({"attention__value_length": 16}, r"values on 16 of 8 dimensions .*attention\.value_length"),
        ({"attention__head_count": [4, 2]}, r"attention\.head_count differs between layers"),
        ({"expert_count": 8}, r"llama\.expert_count is 8"),
        ({"rope__dimension_sections": [16, 24, 24, 0]}, r"rope\.dimension_sections is \[16, 24, 24, 0\]"),
        ({"rope__scaling__attn_factor": 1.2}, r"rope\.scaling\.attn_factor is 1\.2"),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, "rotary scaling 'yarn'"),
        ({"rope__scaling__type": "longrope"}, "rotary scaling 'longrope'"),
        ({"rope__dimension_count": 4}, r"rotary embedding on 4 of 8 .*rope\.dimension_count"),
        ({"logit_scale": 0.0625}, r"llama\.logit_scale is 0\.0625, .*supported is 0\.0 or 1\.0"),
        ({"residual_scale": 0.22}, r"llama\.residual_scale"),
        ({"embedding_scale": 12.0}, r"llama\.embedding_scale"),
        ({"final_logit_softcapping": 30.0}, r"llama\.final_logit_softcapping"),
        ({"hidden_activation": "gelu"}, r"llama\.hidden_activation is 'gelu'"),
    ],
)
def test_values_that_are_refused_by_name(keys, message):
    with pytest.raises(NotImplementedError, match=message):
        read(**keys)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.type", "adapter"),
        ("tokenizer.ggml.add_eos_token", True),
        ("tokenizer.ggml.add_sep_token", True),
        ("tokenizer.ggml.suppress_tokens", [3, 4]),
    ],
)
def test_other_keys_that_are_refused(key, value, write_gguf):
    path = write_gguf("tiny_llama_sharded", architecture="llama", metadata={key: value})
    with pytest.raises(NotImplementedError, match=rf"tiny\.gguf: {re.escape(key)} is"):
        open_gguf(path)


def test_unknown_keys_are_named():
    with pytest.warns(
        UserWarning, match=r"not known and have no effect: \['llama\.novel', 'llama\.other\.key'\]"
    ):
        read(novel=1, other__key="x")


def test_two_scalings_are_refused(write_gguf):
    """llama.cpp divides by both; rope_freqs.weight used to win without a word."""
    import numpy as np

    tensors = {"rope_freqs.weight": np.ones(4, np.float32)}
    path = write_gguf(
        "tiny_llama_sharded",
        architecture="llama",
        tensors=tensors,
        metadata={"llama.rope.scaling.factor": 4.0},
    )
    with pytest.raises(NotImplementedError, match=r"rope_freqs\.weight beside a linear rotary scaling"):
        open_gguf(path)
    # Qwen has no such tensor in llama.cpp.
    path = write_gguf("tiny_qwen3", architecture="qwen3", tensors=tensors, file="qwen.gguf")
    with pytest.raises(ValueError, match=r"has unknown tensors .*rope_freqs\.weight"):
        open_gguf(path)


def test_every_key_is_in_the_documentation():
    text = DOCUMENT.read_text()
    keys = gguf_config._APPLIED | gguf_config._NEUTRAL.keys() | gguf_config._WITHOUT_EFFECT
    missing = [key for key in keys | gguf_config._NEUTRAL_ELSEWHERE.keys() if f"`{key}`" not in text]
    assert not missing
