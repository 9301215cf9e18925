"""Saved posteriors: they come back bit by bit without the model, and bad files are refused in one line."""

import dataclasses
import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder.models import PieceTokenizer
from ponder.posterior import saving
from ponder.posterior.posterior import Posterior, Stats
from ponder.posterior.saving import RecordedText

PIECES = (b"a\n", "中\u2028".encode(), b"\xff", b'"\\u0041', b"")


class Surrogates(PieceTokenizer):
    """A tokenizer whose text UTF-8 cannot hold."""

    def decode(self, ids):
        return "\ud800" + super().decode(ids) + "\x00"


def small(**changes):
    fields = {
        "tokens": jnp.array([[0, 1, 4], [2, 3, 4], [4, 0, 0]]),
        "lengths": jnp.array([3, 3, 1]),
        "log_weights": jnp.log(jnp.array([0.75, 0.25, 0.0])),
        "log_evidence": jnp.float32(-1.25),
        "log_prior": jnp.array([-1.0, -2.0, -jnp.inf]),
        "log_potential": jnp.array([0.0, 0.1, -jnp.inf]),
        "stats": Stats(num_steps=jnp.int32(3)),
        "tokenizer": PieceTokenizer(PIECES),
        "method": "exact",
    }
    return Posterior(**(fields | changes))


def bits(posterior):
    arrays = {name: np.asarray(x) for name, x in saving._arrays(posterior).items() if x is not None}
    return {name: (x.dtype.name, x.shape, x.tobytes()) for name, x in arrays.items()}


CASES = {
    "of texts that JSON must escape": {},
    "without evidence": {"log_evidence": jnp.float32(jnp.nan)},
    "degenerate": {
        "log_evidence": jnp.float32(-jnp.inf),
        "log_weights": jnp.full(3, -np.log(3), jnp.float32),
        "log_potential": jnp.full(3, -jnp.inf),
        "stats": Stats(num_steps=jnp.int32(1), degenerate=jnp.ones((), bool)),
    },
    "without tokenizer": {"tokenizer": None},
    "of empty texts": {"lengths": jnp.ones(3, jnp.int32), "tokens": jnp.full((3, 3), 4)},
    "without tokens": {"tokens": jnp.zeros((3, 0), jnp.int32), "lengths": jnp.zeros(3, jnp.int32)},
    "of surrogates": {"tokenizer": Surrogates(PIECES)},
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip(tmp_path, case):
    before = small(**CASES[case])
    before.save(tmp_path / "p.safetensors")
    after = Posterior.load(tmp_path / "p.safetensors")
    assert bits(after) == bits(before)
    assert jax.tree.structure(after.stats) == jax.tree.structure(before.stats)
    assert after.method == "exact" and after.origin == ""
    assert case == "without tokens" or after.text == before.text
    assert repr(after) == repr(before)
    assert (after.tokenizer is None) == (before.tokenizer is None)
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_a_run_needs_no_model(run, tmp_path):
    pytest.importorskip("matplotlib")
    path = str(tmp_path / "run")
    run.save(path)
    loaded = Posterior.load(path)
    assert bits(loaded) == bits(run)
    missing = {name for name, value in loaded.stats._asdict().items() if value is None}
    assert missing == {"reward_calls", "acceptance"}  # of reward models and Markov chains
    assert repr(loaded) == repr(run) and loaded.mode().text == run.mode().text
    assert loaded.unique().text == run.unique().text
    assert loaded.expectation(len) == run.expectation(len)
    key = jax.random.key(1)
    assert loaded.sample(key, 20).text == run.sample(key, 20).text
    assert len(loaded.plot().subfigs) == 2 and loaded.plot_genealogy()
    assert isinstance(loaded.tokenizer, RecordedText)
    # Saved again, also after merging, where the stats say less.
    merged = loaded.unique()
    merged.save(path)
    assert Posterior.load(path).summary() == run.unique().summary()


def test_the_real_tokenizer_can_be_given(run, tmp_path):
    run.save(tmp_path / "p")
    loaded = Posterior.load(tmp_path / "p", tokenizer=run.tokenizer)
    assert loaded.tokenizer is run.tokenizer
    with pytest.raises(ValueError, match="tokenizer: expected that of the traces' model"):
        Posterior.load(tmp_path / "p", tokenizer=PieceTokenizer((b"x", b"y", b"z", b"")))


def test_recorded_text_knows_nothing_else():
    tokenizer = RecordedText([np.array([1, 2])], ["ab"])
    assert tokenizer.decode([1, 2]) == "ab" and "1 traces" in repr(tokenizer)
    assert isinstance(tokenizer, ponder.models.Tokenizer)
    with pytest.raises(ValueError, match=r"ids: expected the tokens of one of the 1 stored.*tokenizer="):
        tokenizer.decode([1])
    for call in (tokenizer.encode, tokenizer.token_bytes, tokenizer.apply_chat_template):
        with pytest.raises(ValueError, match="give the model's tokenizer"):
            call("a")


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "p"
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), small())
    with pytest.raises(ValueError, match=r"this Posterior holds runs of shape \(2,\); take one of them"):
        batch.save(path)
    with pytest.raises(ValueError, match="tracers"):
        jax.jit(lambda p: p.save(path))(small())
    with pytest.raises(ValueError, match="log_prior: expected N=3"):
        small(log_prior=jnp.zeros(2)).save(path)
    with pytest.raises(ValueError, match="log_weights: expected at least one finite"):
        small(log_weights=jnp.full(3, jnp.nan)).save(path)
    with pytest.raises(FileNotFoundError, match=r"the folder does not exist: '.*/missing'$"):
        small().save(tmp_path / "missing" / "p")
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"expected the path of a file, got a folder: '.*/folder'$"):
        small().save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_every_array_of_a_posterior_has_a_place_in_the_file():
    assert set(saving._arrays(small())) == set(saving._LAYOUT)


def test_chains_and_reward_models_are_kept(tmp_path):
    stats = Stats(num_steps=jnp.int32(3), reward_calls=jnp.int32(4), acceptance=jnp.float32(0.25))
    before = small(stats=stats)
    before.save(tmp_path / "p")
    assert bits(Posterior.load(tmp_path / "p")) == bits(before)


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p"
    small().save(path)
    old = path.read_bytes()

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small(method="other").save(path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_every_field_is_in_the_layout():
    names = {f.name for f in dataclasses.fields(Posterior)} - {
        "stats",
        "tokenizer",
        "cut",
        "method",
        "origin",
    }
    assert set(saving._LAYOUT) == names | {f"stats.{name}" for name in Stats._fields}


def rewritten(path, *, document=None, **arrays):
    """Write the small posterior with another header or other arrays; None leaves one out."""
    from safetensors.numpy import load, save

    small().save(path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])["__metadata__"]["ponder"]
    tensors = {name.replace("__", "."): x for name, x in (load(data) | arrays).items() if x is not None}
    if document is not None:
        header = document if isinstance(document, str) else json.dumps({**json.loads(header), **document})
    path.write_bytes(save(tensors, metadata={"ponder": header}))


BAD = {
    "newer": ({"document": {"version": 2}}, "newer ponder .format version 2; this one reads up to 1"),
    "no version": ({"document": {"version": "1"}}, "format version is '1'"),
    "other format": ({"document": {"format": "x"}}, "does not name the format"),
    "no JSON": ({"document": "{"}, "its header is no JSON"),
    "deep JSON": ({"document": "[" * 100_000}, "its header is no JSON"),
    "a list": ({"document": "[]"}, "does not name the format"),
    "no method": ({"document": {"method": 3}}, "'method' is no text"),
    "few texts": ({"document": {"texts": ["a"]}}, "expected 3 texts, got 1"),
    "no texts": ({"document": {"texts": [1, 2, 3]}}, "no list of texts"),
    "missing": ({"lengths": None}, "the array 'lengths' is missing"),
    "unknown": ({"extra": np.zeros(3)}, "unknown array 'extra'"),
    "dtype": ({"tokens": np.zeros((3, 3), np.float32)}, "tokens: expected int32, got float32"),
    "half": ({"log_prior": np.zeros(3, np.float16)}, "log_prior: expected float32, got float16"),
    "axes": ({"tokens": np.zeros(3, np.int32)}, r"tokens: expected 2 axes, got shape \(3,\)"),
    "rows": ({"tokens": np.zeros((2, 3), np.int32)}, "tokens: expected N=3"),
    "lengths": ({"lengths": np.array([3, 3, 4], np.int32)}, r"lengths: expected integers in \[0, 3\]"),
    "negative": ({"lengths": np.array([3, 3, -1], np.int32)}, r"lengths: expected integers in \[0, 3\]"),
    "steps": (
        {"stats__ess": np.zeros(2, np.float32)},
        r"stats.num_steps: expected integers in \[0, 2\], got 3 to 3",
    ),
    "ancestors": (
        {"stats__ancestors": np.full((3, 3), 3, np.int32)},
        r"stats.ancestors: expected integers in \[0, 2\]",
    ),
    "weights": ({"log_weights": np.full(3, -np.inf, np.float32)}, "log_weights: expected at least one"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(tmp_path, case):
    changes, message = BAD[case]
    path = tmp_path / "p.safetensors"
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        Posterior.load(path)
    text = str(caught.value)
    assert text.startswith(f"path: {str(path)!r} cannot be read as a saved posterior: ") and "\n" not in text


def test_damaged_and_missing_files(tmp_path):
    path = tmp_path / "p"
    small().save(path)
    data = path.read_bytes()
    for broken in (b"", data[:7], data[:100], data[:-1], data + b"x", b"\xff" * 200, b"not a posterior"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged or no safetensors file"):
            Posterior.load(path)
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3)}, path)  # as of a model
    with pytest.raises(ValueError, match="it holds no posterior"):
        Posterior.load(path)
    # A dtype that NumPy does not know.
    head = json.dumps({"tokens": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    head = head[:-1] + b', "__metadata__": {"ponder": "{}"}}'
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"\0\0")
    with pytest.raises(ValueError, match="cannot be read as a saved posterior"):
        Posterior.load(path)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"path: expected a saved posterior, got .* is no file"):
            Posterior.load(missing)


def test_paths_that_are_none(tmp_path):
    for path in (None, 3, b"run"):
        with pytest.raises(TypeError, match="path: expected the path of a file, got"):
            Posterior.load(path)
        with pytest.raises(TypeError, match="path: expected the path of a file, got"):
            small().save(path)
