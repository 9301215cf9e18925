"""GGUF headers that lie: each field is checked before anything of its size is read."""

import struct
from pathlib import Path

import numpy as np
import pytest

from ponder.models.loading.gguf import open_gguf
from ponder.models.loading.gguf_header import MAX_ARRAY_LENGTH, read_header, read_tensor
from ponder.models.loading.loading import load

F32, Q8_0 = 0, 8
BLOCKS = {F32: (1, 4), Q8_0: (32, 34)}


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def uint32(key, value):
    return string(key) + struct.pack("<II", 4, value)


def array(key, kind, length, data=b""):
    return string(key) + struct.pack("<IIQ", 9, kind, length) + data


def tensor(name, dimensions=(2, 3), kind=F32, offset=0):
    return string(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


@pytest.fixture
def write(tmp_path):
    """Write a file of the given fields and tensors, with honest counts unless told otherwise."""

    def write(fields=(), tensors=(), *, version=3, counts=None, data=bytes(64)):
        num_tensors, num_fields = counts or (len(tensors), len(fields))
        head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_fields) + b"".join((*fields, *tensors))
        path = tmp_path / "x.gguf"
        path.write_bytes(head + bytes(-len(head) % 32) + data)
        return path

    return write


def test_sound_file(write):
    fields = [
        uint32("a", 7),
        string("b") + struct.pack("<I", 8) + string("é"),
        array("c", 8, 2, string("x") + string("")),
        array("d", 6, 2, struct.pack("<2f", 0.5, 2.0)),
        string("e") + struct.pack("<I?", 7, True),
        string("f") + struct.pack("<Iq", 11, -3),
        array("g", 4, 0),
    ]
    values = np.arange(6, dtype=np.float32)
    path = write(fields, [tensor("t"), tensor("u", (4,), offset=32)], data=values.tobytes() + bytes(40))
    header = read_header(path, BLOCKS)
    assert header.metadata == {"a": 7, "b": "é", "c": ["x", ""], "d": [0.5, 2.0], "e": True, "f": -3, "g": []}
    assert header.tensors["t"].shape == (3, 2)
    found = read_tensor(path, header.tensors["t"]).view(np.float32)
    np.testing.assert_array_equal(found, values.reshape(3, 2))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match="it shrank while it was read"):
        read_tensor(path, header.tensors["u"])


HUGE = 2**63


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"counts": (HUGE, 0)}, "9223372036854775808 tensors do not fit"),
        ({"counts": (0, HUGE)}, "9223372036854775808 metadata fields do not fit"),
        ({"counts": (0, 3), "fields": [uint32("a", 1)]}, "the metadata key '' comes twice"),
        ({"fields": [uint32("a", 1), uint32("a", 2)]}, "the metadata key 'a' comes twice"),
        ({"fields": [struct.pack("<Q", HUGE)], "counts": (0, 1)}, "bytes of the metadata key do not fit"),
        ({"fields": [string(b"\xff") + bytes(20)]}, "the metadata key is not UTF-8"),
        ({"fields": [string("a") + struct.pack("<I", 13) + bytes(8)]}, "'a' has the unknown type 13"),
        ({"fields": [string("a") + struct.pack("<IQ", 8, 2**40)]}, "bytes of the value of 'a' do not fit"),
        ({"fields": [array("a", 4, HUGE)]}, f"has {HUGE} entries, more than {MAX_ARRAY_LENGTH}"),
        ({"fields": [array("a", 4, 10**6)]}, "1000000 entries of 'a' do not fit"),
        ({"fields": [array("a", 8, 10**6)]}, "1000000 strings of 'a' do not fit"),
        ({"fields": [array("a", 9, 1, struct.pack("<IQ", 9, 1) * 4000)]}, "'a' is an array of arrays"),
        ({"fields": [uint32("general.alignment", 0)]}, "general.alignment is 0, which is no power of two"),
        ({"fields": [uint32("general.alignment", 24)]}, "no power of two"),
        ({"fields": [array("general.alignment", 4, 0)]}, r"general.alignment is \[\], which"),
        ({"tensors": [tensor("t"), tensor("t")]}, "the tensor 't' comes twice"),
        ({"tensors": [tensor("t"), tensor("u", offset=16)]}, "the tensors 't' and 'u' overlap"),
        ({"tensors": [tensor("t", offset=64)]}, "'t' ends at byte"),
        ({"tensors": [tensor("t", offset=2**64 - 64)]}, "'t' ends at byte"),
        ({"tensors": [tensor("t", (2**32, 2**32, 1))]}, "'t' ends at byte"),  # 2^64 elements, 0 in int64
        ({"tensors": [tensor("t", (0, 3))]}, r"dimensions \(0, 3\)"),
        ({"tensors": [tensor("t", (33,), Q8_0)]}, r"dimensions \(33,\), not a multiple of 32"),
        ({"tensors": [tensor("t", ())]}, "'t' has 0 dimensions"),
        ({"tensors": [string("t") + struct.pack("<I", 2**31) + bytes(64)]}, "has 2147483648 dimensions"),
        ({"fields": [uint32("general.alignment", 2**31)], "tensors": [tensor("t")]}, "'t' ends at byte"),
    ],
)
def test_lies(content, message, write):
    path = write(**content)
    with pytest.raises(ValueError, match=rf"x\.gguf is a damaged or truncated GGUF file: .*{message}"):
        read_header(path, BLOCKS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 1}, "version 1 not supported"),
        ({"version": 0x03000000}, "big-endian files not supported"),
        ({"tensors": [tensor("t", kind=99)]}, "tensor 't' has the unknown type 99"),
    ],
)
def test_unsupported(content, message, write):
    with pytest.raises(NotImplementedError, match=message):
        read_header(write(**content), BLOCKS)


@pytest.mark.parametrize("size", range(24))
def test_every_short_file(size, write):
    path = write([uint32("a", 1)])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"x\.gguf is (not a GGUF|a damaged or truncated GGUF) file"):
        read_header(path, BLOCKS)


def test_sparse_file_costs_no_memory(tmp_path):
    """A terabyte that is not there: only counts of it are believed, and headers are bounded anyway."""
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**39))
    with path.open("r+b") as file:
        try:
            file.truncate(2**40)
        except OSError:
            pytest.skip("the file system has no sparse files of this size")
    with pytest.raises(ValueError, match="bytes of the metadata key do not fit"):
        read_header(path, BLOCKS)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.attention.head_count": 0}, "num_attention_heads: expected an int from 1"),
        ({"llama.attention.head_count": 3}, "head_dim|multiple|contradict"),
        ({"llama.block_count": 10**9}, "1000000000 layers, but there are only"),
        ({"llama.embedding_length": 33}, "contradict each other"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps: expected a"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "expected float, got 'x'"),
        ({"llama.rope.freq_base": 0.0}, "rope theta: expected a positive number, got 0.0"),
        ({"llama.context_length": "long"}, "context_length: expected int, got 'long'"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id: expected an int, got 'x'"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token: expected a bool, got 1"),
        ({"tokenizer.ggml.model": 3}, "tokenizer.ggml.model 3 is not supported"),
        ({"tokenizer.chat_template": 3}, "tokenizer.chat_template: expected a string, got 3"),
        ({"tokenizer.ggml.tokens": "abc"}, "tokens: expected a list of str, got 'abc'"),
    ],
)
def test_metadata_that_make_no_model(metadata, message, write_gguf, monkeypatch):
    from ponder.models.loading import gguf as module

    path, read = write_gguf("tiny_llama_sharded", architecture="llama"), module._read_header

    def changed(*args):
        header = read(*args)
        return header[0] | metadata, header[1]

    monkeypatch.setattr(module, "_read_header", changed)
    monkeypatch.setattr(module, "read_tensor", lambda *_: pytest.fail("a tensor is read in vain"))
    with pytest.raises((ValueError, NotImplementedError), match=rf"tiny\.gguf.*({message})"):
        load(path)


def test_weights_that_are_not_finite(write_gguf):
    weight = np.ones(32, np.float32)
    weight[3] = np.nan
    path = write_gguf("tiny_llama_sharded", architecture="llama", tensors={"output_norm.weight": weight})
    with pytest.raises(ValueError, match=r"tiny\.gguf: the tensor output_norm\.weight holds NaN or infinity"):
        load(path)


def test_type_without_dequantisation(write_gguf):
    path = write_gguf(
        "tiny_llama_sharded", architecture="llama", tensors={"output_norm.weight": np.ones(32, np.int8)}
    )
    with pytest.raises(NotImplementedError, match=r"tensor 'output_norm\.weight' has type I8"):
        open_gguf(path)


def test_huge_frequency_table_is_not_built(write_gguf):
    path = write_gguf(
        "tiny_llama_sharded",
        architecture="llama",
        tensors={"rope_freqs.weight": np.ones(5, np.float32)},
    )
    with pytest.raises(ValueError, match=r"rope_freqs\.weight has shape \(5,\), but head_dim is 8"):
        open_gguf(path)


def test_pieces_too_long_to_recover_merges():
    from ponder.models.loading.gguf_tokenizer import build_tokenizer

    with pytest.raises(ValueError, match="pieces of at most 1024 characters, got one of 100000"):
        build_tokenizer(
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": ["a", "b" * 100_000],
                "tokenizer.ggml.scores": [0.0, 0.0],
            }
        )


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"merges": ["a"]}, "cannot be used"),
        ({"merges": ["a x"]}, "cannot be used.*x"),
        ({"merges": [1]}, r"merges: expected a list of str, got \[1\]"),
        ({"token_type": [1]}, "token_type: expected 2 entries, got 1"),
        ({"bos_token_id": 1.5}, "bos_token_id: expected an int, got 1.5"),
        ({"tokens": ["a", "b", "a"]}, "tokens: 'a' stands for two ids, 0 and 2"),
        ({"add_bos_token": True}, "prompts begin with BOS .*bos_token_id is missing or beyond"),
        ({"add_bos_token": True, "bos_token_id": 2**32 - 1}, "missing or beyond the vocabulary"),
        ({"pre": ["x"]}, "cannot be used"),
    ],
)
def test_tokenizers_that_are_none(metadata, message):
    from ponder.models.loading.gguf_tokenizer import build_tokenizer

    base = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b"], "merges": []} | metadata
    with pytest.raises(ValueError, match=message):
        build_tokenizer({f"tokenizer.ggml.{name}": value for name, value in base.items()})


def test_fixture_headers_agree_with_the_gguf_package(write_gguf):
    import gguf

    path = write_gguf("tiny_qwen3", architecture="qwen3")
    reader = gguf.GGUFReader(path)
    header = read_header(Path(path), {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()})
    for key, value in header.metadata.items():
        assert reader.fields[key].contents() == value
    for tensor_ in reader.tensors:
        info = header.tensors[tensor_.name]
        assert (info.offset, info.num_bytes) == (tensor_.data_offset, tensor_.n_bytes)
        np.testing.assert_array_equal(read_tensor(path, info).view(np.float32), tensor_.data)
