"""GGUF files: the same weights, config and tokens as the checkpoint the file was made from."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ponder.models.loading import hub
from ponder.models.loading.finding import find
from ponder.models.loading.gguf import dequantise, open_gguf, unpermute
from ponder.models.loading.gguf_header import TensorInfo
from ponder.models.loading.gguf_tokenizer import build_tokenizer
from ponder.models.loading.loading import load
from ponder.models.loading.tokenizer import HubTokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"
FAMILIES = [("tiny_llama_sharded", "llama"), ("tiny_qwen2", "qwen2"), ("tiny_qwen3", "qwen3")]


def test_unpermute_by_hand():
    # One head of four rows: GGUF holds them as the pairs (0, 2), (1, 3) that rotate together.
    np.testing.assert_array_equal(unpermute(np.array([[0], [2], [1], [3]]), 1), [[0], [1], [2], [3]])


@pytest.mark.parametrize("num_heads", [1, 3, 9])
def test_unpermute_undoes_llama_cpp(num_heads):
    weight = np.random.default_rng(0).normal(size=(num_heads * 8, 5))
    stored = weight.reshape(num_heads, 2, 4, 5).swapaxes(1, 2).reshape(weight.shape)
    np.testing.assert_array_equal(unpermute(stored, num_heads), weight)


@pytest.mark.parametrize(("name", "architecture"), FAMILIES)
def test_round_trip_from_a_checkpoint(name, architecture, write_gguf):
    path = write_gguf(name, architecture=architecture)

    original, found = hub.read_tensors(FIXTURES / name), open_gguf(path).tensors
    assert found.keys() == original.keys()
    for key in original:
        np.testing.assert_array_equal(found[key], original[key], err_msg=key)
        assert found.shapes[key] == found[key].shape

    lm = load(path)
    expected = np.load(FIXTURES / name / "expected.npz")
    np.testing.assert_allclose(lm.score(jnp.asarray(expected["tokens"])), expected["logits"], atol=5e-4)
    assert lm.eos_token_ids == (2, 0)
    assert lm.tokenizer is not None
    assert lm.tokenizer.encode("hello  1<|im_end|>") == [45, 4, 32, 2]


def test_forgetting_the_row_order_is_seen(write_gguf):
    """The power of the test above: a file in the wrong order has other logits."""
    wrong = {
        "blk.0.attn_q.weight": hub.read_tensors(FIXTURES / "tiny_llama_sharded")[
            "model.layers.0.self_attn.q_proj.weight"
        ]
    }
    path = write_gguf("tiny_llama_sharded", architecture="llama", tensors=wrong)
    expected = np.load(FIXTURES / "tiny_llama_sharded" / "expected.npz")
    logits = np.asarray(load(path).score(jnp.asarray(expected["tokens"])))
    assert np.abs(logits - expected["logits"]).max() > 0.1


def test_quantised_tensor(write_gguf):
    names = ("token_embd.weight", "blk.1.attn_k.weight")
    path = write_gguf("tiny_llama_sharded", architecture="llama", quantize=names)
    original, found = hub.read_tensors(FIXTURES / "tiny_llama_sharded"), open_gguf(path).tensors
    for key in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"):
        # Q8_0 rounds to 1/254 of the largest value of a block of 32, so to half of that at most.
        error = np.abs(found[key] - original[key])
        assert found[key].dtype == np.float32
        assert 0 < error.max() < np.abs(original[key]).max() / 250


def test_no_output_matrix_means_tied(write_gguf):
    path = write_gguf("tiny_llama_sharded", architecture="llama", tensors={"output.weight": None})
    checkpoint = open_gguf(path)
    assert checkpoint.raw_config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in checkpoint.tensors


def llama3_factors(factor, theta=500000.0, head_dim=8, low=1.0, high=4.0, original=8192):
    """The divisors that llama.cpp's converter stores, in its own words."""
    factors = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            factors.append(1)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered(factor, write_gguf):
    path = write_gguf(
        "tiny_llama_sharded",
        architecture="llama",
        tensors={"rope_freqs.weight": llama3_factors(factor)},
        metadata={"llama.rope.freq_base": 500000.0},
    )
    checkpoint = open_gguf(path)
    assert checkpoint.config.rope.type == "llama3"
    assert checkpoint.raw_config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_other_frequency_scaling_is_refused(write_gguf):
    path = write_gguf(
        "tiny_llama_sharded",
        architecture="llama",
        tensors={"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)},
    )
    with pytest.raises(NotImplementedError, match=r"rope_freqs\.weight does not follow"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, r"lacks tensors of architecture llama: \['blk.1.ffn_up.weight'\]"),
        ({"token_embd.weight": None}, "token_embd.weight is missing"),
        ({"blk.0.attn_q.bias": np.zeros(32, np.float32)}, r"has unknown tensors .*\['blk.0.attn_q.bias'\]"),
        (
            {"blk.0.attn_k.weight": np.zeros((8, 32), np.float32)},
            r"k_proj.weight has shape \(8, 32\), expected \(16, 32\)",
        ),
    ],
)
def test_wrong_tensors_are_refused(tensors, message, write_gguf):
    path = write_gguf("tiny_llama_sharded", architecture="llama", tensors=tensors)
    with pytest.raises(ValueError, match=message):
        open_gguf(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"general.architecture": "gemma3"},
            r"'gemma3' is not supported; supported are \['llama', 'qwen2', 'qwen3'\]",
        ),
        ({"split.count": 3}, "one part of a split GGUF"),
        ({"llama.rope.scaling.type": "yarn"}, "rotary scaling 'yarn' is not supported"),
        ({"llama.rope.dimension_count": 4}, "rotary embedding on 4 of 8 dimensions"),
    ],
)
def test_unsupported_metadata(metadata, message, tmp_path, monkeypatch):
    # The checks see metadata as a dict; writing a contradictory file is not needed for them.
    from ponder.models.loading import gguf as module

    base = {
        "general.architecture": "llama",
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.context_length": 128,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    monkeypatch.setattr(
        module,
        "_read_header",
        lambda *_: (base | metadata, {"token_embd.weight": TensorInfo((96, 32), 0, 0, 128, 12288)}),
    )
    with pytest.raises(NotImplementedError, match=message):
        open_gguf(tmp_path / "any.gguf")


def test_truncated_and_foreign_files(write_gguf, tmp_path):
    path = write_gguf("tiny_llama_sharded", architecture="llama")
    whole = path.read_bytes()
    for size in (100, 3000, len(whole) - 1000):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or truncated"):
            open_gguf(path)
    path.write_bytes(b"PK\x03\x04" + whole)
    with pytest.raises(ValueError, match="is not a GGUF file"):
        open_gguf(path)
    with pytest.raises(FileNotFoundError, match=r"path: expected a \.gguf file"):
        open_gguf(tmp_path / "absent.gguf")


def test_without_the_gguf_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'ponder-ppl\[gguf\]'"):
        open_gguf(tmp_path / "any.gguf")


def test_unknown_splitting_rules_are_refused(write_gguf):
    with pytest.raises(NotImplementedError, match="'novel' is not supported; supported are"):
        load(write_gguf("tiny_llama_sharded", architecture="llama", pre="novel"))
    with pytest.raises(ValueError, match=r"lack tokenizer\.ggml\.pre"):
        load(write_gguf("tiny_llama_sharded", architecture="llama", pre=None))


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["a", "Ġ", "Ġ", "12", "12", "Ċ"]),
        ("smollm", ["a", "ĠĠ", "1", "2", "1", "2", "Ċ"]),
        ("qwen2", ["a", "Ġ", "Ġ", "1", "2", "1", "2", "Ċ"]),
        ("llama-bpe", ["a", "Ġ", "Ġ", "12", "1", "2", "Ċ"]),  # three digits at most
    ],
)
def test_splitting_rules(pre, expected):
    tokens = ["a", "Ġ", "ĠĠ", "1", "2", "12", "Ċ"]
    tokenizer = build_tokenizer(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": ["Ġ Ġ", "1 2"],
            "tokenizer.ggml.add_bos_token": False,
        }
    )
    assert tokenizer.encode("a  1212\n").tokens == expected


def test_sentencepiece_vocabulary():
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "<0x0A>",
        "<0xC3>",
        "<0xA9>",
        "\u2581",
        "l",
        "o",
        "h",
        "lo",
        "\u2581h",
        "\u2581lo",
    ]
    tokenizer = build_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.token_type": [2, 3, 3, 6, 6, 6, *[1] * 7],
            "tokenizer.ggml.scores": [0.0] * 6 + [-9.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0],
            "tokenizer.ggml.bos_token_id": 1,
        }
    )
    assert tokenizer.encode("lo h\n").tokens == ["<s>", "\u2581lo", "\u2581h", "<0x0A>"]
    assert tokenizer.encode("é", add_special_tokens=False).tokens == ["\u2581", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("lo h\né").ids) == "lo h\né"


def test_smollm2_config(smollm2):
    raw = open_gguf(find("smollm2-135m-instruct")).raw_config
    assert raw["rms_norm_eps"] == 1e-5  # not the 9.99999974e-06 that float32 makes of it
    assert raw["rope_theta"] == 100000.0
    config = smollm2.decoder.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings) == (
        49152,
        8192,
        True,
    )
    # <|im_end|> by its key, then by their text <|endoftext|> and <reponame>.
    assert smollm2.eos_token_ids == (2, 0, 4)
    assert smollm2.tokenizer.encode("<|im_end|>") == [2]


def test_smollm2_splits_digits(smollm2):
    backend = smollm2.tokenizer.hub_tokenizer.backend_tokenizer
    assert backend.encode("a  1").tokens == ["a", "ĠĠ", "1"]
    assert backend.encode("in 1984 x").tokens == ["in", "Ġ", "1", "9", "8", "4", "Ġx"]


def test_saved_tokenizer_is_read_by_transformers(write_gguf, tmp_path):
    """What is rebuilt from the metadata can be saved, and plain transformers finds the same tokens in it."""
    from transformers import AutoTokenizer

    ours = open_gguf(write_gguf("tiny_llama_sharded", architecture="llama")).read_tokenizer()
    assert ours is not None
    ours.hub_tokenizer.save_pretrained(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    for again in (theirs, HubTokenizer.from_directory(tmp_path / "out").hub_tokenizer):
        for text in ("hello  12 abc\n", "<|im_start|>hello<|im_end|>"):
            assert again(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert (again.bos_token_id, again.eos_token_id) == (1, 2)
        assert again.chat_template == ours.hub_tokenizer.chat_template and again.chat_template
    assert ours.vocab_size == 46  # the unused ids behind it have no text
    assert ours.token_bytes(60) == b""


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"])
@pytest.mark.parametrize("name", ["blk.1.attn_k.weight", "token_embd.weight"])
def test_every_stored_type_that_fits_is_read(kind, name, write_gguf):
    """In whole files; blocks of 256 do not fit into these rows."""
    weights = hub.read_tensors(FIXTURES / "tiny_llama_sharded")
    path = write_gguf("tiny_llama_sharded", architecture="llama", quantize=(name,), kind=kind)
    found = open_gguf(path).tensors
    for hub_name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"):
        weight = weights[hub_name]
        assert found[hub_name].dtype == np.float32
        np.testing.assert_allclose(found[hub_name], weight, atol=np.abs(weight).max() / 7)


@pytest.mark.parametrize("rows", [1, 7, 24, 64])
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ2_0"])
def test_dequantise_is_row_by_row(kind, rows):
    """Joining rows changes no number, for blocks of 32 and of 256."""
    import gguf

    qtype = gguf.GGMLQuantizationType[kind]
    block, num_bytes = gguf.GGML_QUANT_SIZES[qtype]
    # No byte above 100, so that scales, two bytes of float16, are finite.
    data = np.random.default_rng(0).integers(0, 100, (rows, 512 // block * num_bytes), dtype=np.uint8)
    found = dequantise(data, qtype.value)
    assert (found.shape, found.dtype) == ((rows, 512), np.dtype("float32"))
    expected = [gguf.quants.dequantize(row[None], qtype)[0] for row in data]
    np.testing.assert_array_equal(found, expected)
    assert np.ptp(found) > 0
    np.testing.assert_array_equal(dequantise(data[0], qtype.value), expected[:1])  # a vector
