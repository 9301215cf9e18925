"""Hub-format directories: what is read, and what is refused with which words."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ponder.models.loading import hub

FIXTURES = Path(__file__).parent.parent / "fixtures"
SHARDED = FIXTURES / "tiny_llama_sharded"


@pytest.fixture
def sharded(tmp_path):
    return Path(shutil.copytree(SHARDED, tmp_path / "model"))


def edit_index(directory, change):
    path = directory / hub.INDEX_FILE
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_shards_are_read_together():
    weights = hub.read_tensors(SHARDED)
    assert len(weights) == 3 + 2 * 9
    assert weights["model.embed_tokens.weight"].shape == (96, 32)
    assert weights["model.layers.1.mlp.down_proj.weight"].shape == (32, 48)
    assert {w.dtype for w in weights.values()} == {np.dtype("float32")}
    assert len({path.name for path in SHARDED.glob("*.safetensors")}) > 1


def test_bfloat16_single_file():
    weights = hub.read_tensors(FIXTURES / "tiny_llama3_bf16")
    assert {w.dtype for w in weights.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert "lm_head.weight" not in weights


def test_single_file_goes_before_an_index(sharded):
    save_file({"x": np.ones(2, np.float32)}, sharded / "model.safetensors")
    assert list(hub.read_tensors(sharded)) == ["x"]


def test_pickled_checkpoints_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(FileNotFoundError, match=r"found 'pytorch_model.bin'.*opening one can run code"):
        hub.read_tensors(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected model.safetensors or model.safetensors.index.json\."
    ):
        hub.read_tensors(tmp_path)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"Pass the path of the .gguf file itself"):
        hub.read_tensors(tmp_path)


def test_missing_shard(sharded):
    name = sorted(sharded.glob("*.safetensors"))[0].name
    (sharded / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"names the shard '{name}'"):
        hub.read_tensors(sharded)


def test_index_naming_an_absent_tensor(sharded):
    edit_index(sharded, lambda m: m.update({"model.ghost.weight": m["model.norm.weight"]}))
    with pytest.raises(ValueError, match=r"places \['model.ghost.weight'\] in .* does not hold it"):
        hub.read_tensors(sharded)


@pytest.mark.parametrize(
    "path", ["../other.safetensors", "a/../../b.safetensors", "/etc/x", "..\\x", "C:\\x"]
)
def test_shards_outside_the_directory(path, sharded):
    edit_index(sharded, lambda m: m.update({"model.norm.weight": path}))
    with pytest.raises(ValueError, match="lies outside of"):
        hub.read_tensors(sharded)


def test_links_out_of_the_directory_are_fine(sharded, tmp_path):
    """The hub's own cache is made of such links."""
    for path in sharded.glob("*.safetensors"):
        moved = shutil.move(path, tmp_path / path.name)
        path.symlink_to(moved)
    assert len(hub.read_tensors(sharded)) == 21


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_file(keep, tmp_path):
    whole = (FIXTURES / "tiny_qwen2" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors' is damaged or not a safetensors file"):
        hub.read_tensors(tmp_path)


def test_bad_index(sharded):
    path = sharded / hub.INDEX_FILE
    for text, message in (("{", "is not valid JSON"), ("[]", "got list"), ("{}", "expected 'weight_map'")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            hub.read_tensors(sharded)


def test_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"needs config.json; .* has no files"):
        hub.read_config(tmp_path)
    (tmp_path / "config.json").write_text("nonsense")
    with pytest.raises(ValueError, match=r"config.json' is not valid JSON"):
        hub.read_config(tmp_path)
    assert hub.read_config(SHARDED)["model_type"] == "llama"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 3, 5]}, {"eos_token_id": 9}, (5, 3)),
        ({"eos_token_id": 5}, {}, (5,)),
        ({"temperature": 1.0}, {"eos_token_id": 9}, (9,)),
        ({"eos_token_id": None}, {"eos_token_id": [9, 8]}, (9, 8)),
        (None, {"eos_token_id": 0}, (0,)),
        (None, {}, ()),
    ],
)
def test_eos_token_ids(generation, config, expected, tmp_path):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert hub.eos_token_ids(tmp_path, config) == expected


@pytest.mark.parametrize("ids", ["</s>", [1, "2"], -1, True, 1.0])
def test_bad_eos_token_ids(ids, tmp_path):
    with pytest.raises(ValueError, match=r"eos_token_id in config.json: expected token ids"):
        hub.eos_token_ids(tmp_path, {"eos_token_id": ids})


def test_snapshot_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        OSError, match=r"'nobody/nothing' at revision 'v1' is not among the downloaded.*\.gguf"
    ):
        hub.snapshot("nobody/nothing", revision="v1", local_files_only=True)
    with pytest.raises(ValueError, match="not a valid hub id"):
        hub.snapshot("a--b/..c", local_files_only=True)


def test_snapshot_finds_what_was_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **k: asked.update(k) or str(tmp_path)
    )
    assert hub.snapshot("owner/name", revision="main") == tmp_path
    assert asked["revision"] == "main" and asked["local_files_only"] is False
    assert "*.safetensors" in asked["allow_patterns"] and "*.bin" not in asked["allow_patterns"]


def test_shapes_without_reading():
    for name in ("tiny_llama_sharded", "tiny_llama3_bf16"):
        tensors = hub.read_tensors(FIXTURES / name)
        assert tensors.shapes == {key: weight.shape for key, weight in tensors.items()}


def test_a_file_that_changes_meanwhile(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": np.ones((4, 2), np.float32), "y": np.zeros(1, np.float32)}, path)
    tensors = hub.read_tensors(tmp_path)
    save_file({"x": np.ones((1, 2), np.float32)}, path)
    with pytest.raises(ValueError, match=r"x has changed from shape \(4, 2\) to \(1, 2\)"):
        tensors["x"]
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        tensors["y"]
    with pytest.raises(KeyError):
        tensors["z"]
    assert list(tensors.without(["x"])) == ["y"]


def safetensors(path, header, data=b""):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 8), "b": entry(4, 12)},  # overlap
        {"a": entry(0, 8), "b": entry(0, 8)},
        {"a": entry(0, 8), "b": entry(12, 20)},  # a hole
        {"a": entry(0, 8, (4,))},
        {"a": entry(0, 2**63)},
        {"a": entry(-8, 0)},
        {"a": entry(8, 0)},
        {"a": entry(0, 8, (-2,))},
        {"a": entry(0, 8, (2**32, 2**32))},
        {"a": entry(0, 8, dtype="F3")},
        {"a": entry(0, 8, (8,), dtype="I4")},
        {"a": 3},
        b'{"a":' * 100_000,
        b"[]",
        b"\xff\xff",
    ],
)
def test_lying_headers(header, tmp_path):
    safetensors(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match=r"model.safetensors' is damaged or not a safetensors file"):
        hub.read_tensors(tmp_path)


def test_lying_header_length(tmp_path):
    for length in (2**64 - 1, 2**40, 100):
        (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
            hub.read_tensors(tmp_path)


def test_tensor_name_twice(tmp_path):
    one, two = (json.dumps(entry(i, i + 8)) for i in (0, 8))
    safetensors(tmp_path / "model.safetensors", f'{{"a": {one}, "a": {two}}}'.encode(), bytes(16))
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        hub.read_tensors(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "", "\ufeff{}", '{"a": 1' + "0" * 5000 + "}"]
)
def test_json_that_is_none(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json' is not valid JSON"):
        hub.read_config(tmp_path)


def test_huge_json_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(ValueError, match="expected at most 67108864 bytes of JSON, got 8589934592"):
        hub.read_config(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "sub/none.safetensors", "x" * 300, "\x00"])
def test_shards_that_are_no_files(name, sharded):
    edit_index(sharded, lambda m: m.update({"model.norm.weight": name}))
    with pytest.raises((FileNotFoundError, OSError), match=r"names the shard|too long"):
        hub.read_tensors(sharded)


def test_config_that_is_no_file(tmp_path):
    for make in (
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("config.json"),
        lambda path: path.symlink_to("/dev/zero"),
    ):
        make(tmp_path / "config.json")
        with pytest.raises(FileNotFoundError, match=r"needs config\.json"):
            hub.read_config(tmp_path)
        path = tmp_path / "config.json"
        path.rmdir() if not path.is_symlink() else path.unlink()
