"""Every field of every family, as the configuration classes of transformers give it."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ponder.models.config import FAMILY_DEFAULTS, SUPPORTED_FAMILIES, DecoderConfig
from ponder.models.loading.hub import eos_token_ids

HEADS = {"num_attention_heads": 64, "hidden_size": 512}


def expected(config):
    """Our fields, read off a configuration of transformers."""
    heads = config.num_attention_heads
    known = type(config)()  # any key of config.json becomes an attribute; a model reads those of its class
    bias = hasattr(known, "attention_bias") and config.attention_bias
    full = not hasattr(known, "sliding_window") or set(getattr(config, "layer_types", ())) == {
        "full_attention"
    }
    return {
        **{name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")},
        **{name: getattr(config, name) for name in ("num_hidden_layers", "num_attention_heads")},
        **{name: getattr(config, name) for name in ("num_key_value_heads", "max_position_embeddings")},
        **{name: getattr(config, name) for name in ("rms_norm_eps", "hidden_act", "tie_word_embeddings")},
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        # The layers of these families ask for biases as follows: see their modeling files.
        "qkv_bias": config.model_type == "qwen2" or bias,
        "o_bias": bias,
        "mlp_bias": hasattr(known, "mlp_bias") and config.mlp_bias,
        "qk_norm": config.model_type == "qwen3",
        "sliding_window": None if full else config.sliding_window,
    }


def rope(config):
    return {
        "theta": config.rope_parameters["rope_theta"],
        "type": config.rope_parameters["rope_type"],
        **{
            name: config.rope_parameters[name]
            for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            if name in config.rope_parameters
        },
    }


def check(family, config):
    """Compare our reading of a config.json with that of transformers."""
    theirs = CONFIG_MAPPING[family].from_dict(dict(config))
    ours = DecoderConfig.from_hf({"model_type": family} | config)
    wanted = expected(theirs)
    assert {name: getattr(ours, name) for name in wanted} == wanted
    assert {name: getattr(ours.rope, name) for name in rope(theirs)} == rope(theirs)
    # Nothing of ours is left out of the comparison.
    assert set(vars(ours)) == {*wanted, "rope"}


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_missing_keys_have_the_defaults_of_the_family(family, tmp_path):
    check(family, {})
    check(family, HEADS)
    ends = CONFIG_MAPPING[family]().eos_token_id
    assert eos_token_ids(tmp_path, {"model_type": family}) == (() if ends is None else (ends,))
    assert eos_token_ids(tmp_path, {"model_type": family, "eos_token_id": None}) == ()


# For every field that we read, another value than the default.
OTHER = {
    "vocab_size": 96,
    "hidden_size": 2048,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 64,
    "num_key_value_heads": 16,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 99,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 5e5,
    "attention_bias": True,
    "mlp_bias": True,
    "sliding_window": 7,
    "use_sliding_window": True,
    "max_window_layers": 0,
}


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_every_field(family):
    """Each key by itself, keys of other families included, and all together."""
    for name, value in OTHER.items():
        if name == "use_sliding_window" and family.startswith("qwen"):
            continue  # by itself it makes layers of two kinds
        check(family, {name: value})
    check(family, OTHER)
    for name in set(FAMILY_DEFAULTS[family]) - {"eos_token_id"}:
        assert name in OTHER, f"{name} is read, and not compared"
    check(family, {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 5})


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_nulls(family):
    if family != "mistral":  # transformers has no null there
        check(family, HEADS | {"num_key_value_heads": None})
    if family == "qwen3":
        with pytest.raises(ValueError, match="head_dim: expected an int"):
            DecoderConfig.from_hf({"model_type": family, "head_dim": None})
    else:
        check(family, HEADS | {"head_dim": None})
    if family != "llama":
        check(family, {"sliding_window": None})
    check(family, {"rope_scaling": None, "rope_parameters": None})


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
@pytest.mark.parametrize(
    "keys",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4}, "rope_theta": 7.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3.0}, "rope_theta": 7.0},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "max_position_embeddings": 77},
        {"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 64, **LLAMA3}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5.0}},
        {"rope_parameters": {"rope_theta": 5.0, "factor": 9.0}},
    ],
)
def test_rotary_scaling(family, keys):
    config = {"max_position_embeddings": 131072} | keys
    theirs = CONFIG_MAPPING[family].from_dict({**config})
    found = DecoderConfig.from_hf({"model_type": family} | config).rope
    wanted = rope(theirs)
    if wanted["type"] == "default":
        wanted.pop("factor", None)  # written, and not used
    assert {name: getattr(found, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"rope_scaling": {"type": "linear"}}, ValueError, "rope type 'linear' needs 'factor'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            ValueError,
            "rope type 'llama3' needs 'low_freq_factor'",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            NotImplementedError,
            r"differ between layers \(\['full_attention'\]\)",
        ),
        ({"partial_rotary_factor": 0.5}, NotImplementedError, "partial_rotary_factor"),
        *(
            ({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, NotImplementedError, f"rope type '{kind}'")
            for kind in ("dynamic", "yarn", "longrope", "su", "mrope", "proportional")
        ),
    ],
)
def test_rotary_scaling_that_is_refused(keys, error, message):
    with pytest.raises(error, match=message):
        DecoderConfig.from_hf({"model_type": "qwen2"} | keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"use_sliding_window": True},  # the first 28 layers of 32 see everything
        {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
        {"layer_types": ["sliding_attention"] * 32},  # without a window
    ],
)
def test_layers_of_two_kinds_are_refused(keys):
    with pytest.raises(NotImplementedError, match=r"layer_types .* windows for all layers or for none"):
        DecoderConfig.from_hf({"model_type": "qwen3"} | keys)


def test_windows_of_qwen():
    """All layers or none: what `layer_types` comes to counts, not `use_sliding_window` by itself."""
    check("qwen2", {"use_sliding_window": True, "max_window_layers": 32})
    check("qwen2", {"use_sliding_window": True, "max_window_layers": 0})
    check("qwen2", {"use_sliding_window": True, "sliding_window": None})
    check("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"] * 32})
