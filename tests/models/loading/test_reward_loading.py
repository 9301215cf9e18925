"""`load_reward`: the layouts against hand-computed scores, and what it refuses."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ponder.models import RewardDecoder, load_reward
from ponder.models.cache import truncate
from ponder.models.loading.hub import INDEX_FILE, SINGLE_FILE
from ponder.models.loading.reward_layouts import positive_label

V, M, F, HEADS, KV, D = 260, 12, 20, 2, 1, 6
EXTRA, KI, PLUS, MINUS = 256, 257, ord("+"), ord("-")
EPS, THETA = 1e-5, 1000.0
CONFIG = {
    "vocab_size": V,
    "hidden_size": M,
    "intermediate_size": F,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "max_position_embeddings": 64,
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "tie_word_embeddings": False,
}
PROMPT, STEPS = "1+2?", ["1+2=3", "so 3."]


def trunk(rng, bias):
    """Tensors of one layer in Hugging Face names; qwen2 has biases of q, k and v."""
    shapes = {
        "embed_tokens.weight": (V, M),
        "norm.weight": (M,),
        "layers.0.input_layernorm.weight": (M,),
        "layers.0.post_attention_layernorm.weight": (M,),
        "layers.0.self_attn.q_proj.weight": (HEADS * D, M),
        "layers.0.self_attn.k_proj.weight": (KV * D, M),
        "layers.0.self_attn.v_proj.weight": (KV * D, M),
        "layers.0.self_attn.o_proj.weight": (M, HEADS * D),
        "layers.0.mlp.gate_proj.weight": (F, M),
        "layers.0.mlp.up_proj.weight": (F, M),
        "layers.0.mlp.down_proj.weight": (M, F),
    }
    if bias:
        shapes |= {
            f"layers.0.self_attn.{p}_proj.bias": (rows * D,)
            for p, rows in (("q", HEADS), ("k", KV), ("v", KV))
        }
    return {f"model.{name}": 0.6 * rng.normal(size=shape) for name, shape in shapes.items()}


def hidden(weights, tokens):
    """The normalised hidden states float64[T, M], written down anew from the papers, without a cache."""
    w = {name.removeprefix("model."): np.asarray(value, np.float64) for name, value in weights.items()}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * w[name]

    def project(x, name):
        name = f"layers.0.self_attn.{name}_proj"
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def rope(x):
        """Each pair (i, i + D/2) of a head turns by t θ^(-2i/D)."""
        turned = x.copy()
        for t in range(len(x)):
            for i in range(D // 2):
                angle = t * THETA ** (-2 * i / D)
                a, b = x[t, :, i], x[t, :, i + D // 2]
                turned[t, :, i] = a * np.cos(angle) - b * np.sin(angle)
                turned[t, :, i + D // 2] = b * np.cos(angle) + a * np.sin(angle)
        return turned

    x = w["embed_tokens.weight"][tokens]
    y = norm(x, "layers.0.input_layernorm.weight")
    q = rope(project(y, "q").reshape(-1, HEADS, D))
    k = rope(project(y, "k").reshape(-1, KV, D))
    v = project(y, "v").reshape(-1, KV, D)
    heads = np.zeros_like(q)
    for t in range(len(tokens)):
        for head in range(HEADS):
            scores = k[: t + 1, head * KV // HEADS] @ q[t, head] / np.sqrt(D)
            p = np.exp(scores - scores.max())
            heads[t, head] = p / p.sum() @ v[: t + 1, head * KV // HEADS]
    x = x + heads.reshape(len(tokens), -1) @ w["layers.0.self_attn.o_proj.weight"].T
    y = norm(x, "layers.0.post_attention_layernorm.weight")
    gate, up = y @ w["layers.0.mlp.gate_proj.weight"].T, y @ w["layers.0.mlp.up_proj.weight"].T
    x = x + (gate / (1 + np.exp(-gate)) * up) @ w["layers.0.mlp.down_proj.weight"].T
    return norm(x, "norm.weight")


def write(directory, config, weights, dtype=np.float32, shards=1, tokenizer=True):
    """Write a checkpoint in hub format."""
    from safetensors.numpy import save_file

    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    weights = {name: np.ascontiguousarray(value.astype(dtype)) for name, value in weights.items()}
    if shards == 1:
        save_file(weights, directory / SINGLE_FILE)
    else:
        places = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(weights)}
        for file in set(places.values()):
            save_file({name: weights[name] for name in weights if places[name] == file}, directory / file)
        (directory / INDEX_FILE).write_text(json.dumps({"weight_map": places}))
    if tokenizer:
        write_tokenizer(directory)
    return directory


def write_tokenizer(directory, special=("<extra_0>",)):
    """One token a byte, in order, then '<extra_0>' (special) and 'ки' (not)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from ponder.models.loading.tokenizer import _byte_level_alphabet

    vocab = {char: byte[0] for char, byte in _byte_level_alphabet().items()}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([AddedToken("ки", special=False)])
    tokenizer.save(str(directory / "tokenizer.json"))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def classification(outputs, bias=True, **config):
    """A plain classification head on a llama trunk, and its score of a hidden state by hand."""
    rng = np.random.default_rng(outputs)
    weights = trunk(rng, bias=False) | {"score.weight": 0.3 * rng.normal(size=(outputs, M))}
    if bias:
        weights["score.bias"] = rng.normal(size=outputs)
    labels = {str(i): f"LABEL_{i}" for i in range(outputs)}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForTokenClassification"],
        "id2label": labels,
    } | config

    def score(h, positive=1):
        z = weights["score.weight"] @ h + weights.get("score.bias", 0.0)
        return sigmoid(z[0]) if outputs == 1 else np.exp(z[positive]) / np.exp(z).sum()

    return config, weights, score


def qwen():
    """The layout of Qwen2.5-Math-PRM."""
    rng = np.random.default_rng(7)
    weights = trunk(rng, bias=True) | {
        "score.0.weight": 0.5 * rng.normal(size=(M, M)),
        "score.0.bias": rng.normal(size=M),
        "score.2.weight": 0.5 * rng.normal(size=(2, M)),
        "score.2.bias": rng.normal(size=2),
    }
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForProcessRewardModel"]}

    def score(h):
        z = np.maximum(weights["score.0.weight"] @ h + weights["score.0.bias"], 0)
        z = weights["score.2.weight"] @ z + weights["score.2.bias"]
        return np.exp(z[1]) / np.exp(z).sum()

    return config, weights, score


def shepherd(tied=False):
    """The layout of Math-Shepherd: a causal language model."""
    rng = np.random.default_rng(8)
    weights = trunk(rng, bias=False)
    if not tied:
        weights["lm_head.weight"] = 0.6 * rng.normal(size=(V, M))
    table = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "tie_word_embeddings": tied}
    return config, weights, lambda h: sigmoid((table[PLUS] - table[MINUS]) @ h)


def skywork():
    """The layout of Skywork-o1-Open-PRM: TRL's value head, and the language model's own head left over."""
    rng = np.random.default_rng(9)
    weights = trunk(rng, bias=True) | {
        "lm_head.weight": rng.normal(size=(V, M)),
        "v_head.summary.weight": 0.3 * rng.normal(size=(1, M)),
        "v_head.summary.bias": rng.normal(size=1),
    }
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForPrmModel"]}

    def score(h):
        return sigmoid((weights["v_head.summary.weight"] @ h + weights["v_head.summary.bias"])[0])

    return config, weights, score


def unnamed(prm):
    """Without what differs between models of one shape, so that they share a compilation."""
    return dataclasses.replace(prm, tokenizer=None, name="", layout="", form=None)


def prefill(prm, tokens, room=1):
    return _prefill(unnamed(prm), jnp.asarray(tokens), room)


@functools.partial(jax.jit, static_argnums=2)
def _prefill(prm, tokens, room):
    cache, scores = prm.prefill(tokens, 1, room)
    return truncate(cache, cache.length), scores  # both steps then share a compilation


extend_block = jax.jit(lambda prm, cache, tokens, lengths: prm.extend_block(cache, tokens, lengths))


LAYOUTS = {
    "scalar": (lambda: classification(1), {}, []),
    "scalar, no bias, sequence": (
        lambda: classification(1, False, architectures=["LlamaForSequenceClassification"]),
        {},
        [],
    ),
    "two classes": (lambda: classification(2), {}, []),
    "two classes, TRL's separator": (lambda: classification(2), {"separator": "\n"}, [10]),
    "qwen": (qwen, {}, [EXTRA]),
    "qwen, asked for": (qwen, {"layout": "qwen2.5-math-prm", "separator": [EXTRA]}, [EXTRA]),
    "shepherd": (shepherd, {"layout": "math-shepherd"}, [ord(" "), KI]),
    "shepherd, tied": (
        lambda: shepherd(True),
        {"layout": "math-shepherd", "good": PLUS, "bad": "-", "separator": "ки"},
        [KI],
    ),
    "skywork": (skywork, {}, [10]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_by_hand(name, tmp_path):
    """A whole forward pass in float64 numpy for the prompt and after each of two steps."""
    make, options, separator = LAYOUTS[name]
    config, weights, score = make()
    prm = load_reward(write(tmp_path / "m", config, weights), **options)
    assert isinstance(prm, RewardDecoder) and prm.tokenizer is not None
    assert prm.separator == tuple(separator) and prm.max_length == 64
    assert prm.tokenizer.decode([KI]) == "ки" and prm.tokenizer.decode([EXTRA]) == ""
    text = list(PROMPT.encode())
    cache, found = prefill(prm, jnp.asarray(text), 40)
    expected = [score(hidden(weights, [*text, *separator])[-1])]
    for step in STEPS:
        text += [*step.encode(), *separator]
        ids = prm.tokenizer.encode(step)
        block = jnp.asarray([[*ids, *[0] * (8 - len(ids))]])
        cache, scores = extend_block(unnamed(prm), cache, block, jnp.asarray([len(ids)]))
        found = [*found, *scores]
        expected.append(score(hidden(weights, text)[-1]))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 0.01


def test_rlhflow(tmp_path):
    """The logits of '+' and '-' behind the header of the assistant's turn; what follows is read later."""
    config, weights, _ = shepherd()
    config = config | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": V + 3}
    rng = np.random.default_rng(3)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = np.concatenate([weights[name], rng.normal(size=(3, M))])
    directory = write(tmp_path / "m", config, weights)
    with pytest.raises(ValueError, match=r"layout 'rlhflow' needs '<\|eot_id\|>' as one token"):
        load_reward(directory, layout="rlhflow")
    special = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    write_tokenizer(directory, ["<extra_0>", "other", *special])
    prm = load_reward(directory, layout="rlhflow")
    eot, start, end = (prm.tokenizer.encode(token)[0] for token in special)
    assert prm.separator == (eot, start, *b"assistant", end, 10, 10)
    assert prm.form.between.startswith("+<|eot_id|><|start_header_id|>user")
    h = rng.normal(size=(2, M))
    expected = [sigmoid((weights["lm_head.weight"][PLUS] - weights["lm_head.weight"][MINUS]) @ x) for x in h]
    np.testing.assert_allclose(prm.head(jnp.asarray(h, jnp.float32)), expected, atol=1e-5)
    swapped = load_reward(directory, layout="rlhflow", good="-", bad="+")
    np.testing.assert_allclose(swapped.head(jnp.asarray(h, jnp.float32)), 1 - np.array(expected), atol=1e-5)


def test_a_value_head_is_told_by_its_tensors(tmp_path):
    """Whatever architecture TRL's wrapper had around it; a head of another size is refused."""
    config, weights, _ = skywork()
    for architectures in (["Qwen2ForCausalLM"], None):
        directory = write(tmp_path / "m", config | {"architectures": architectures}, weights)
        assert load_reward(directory).layout == "skywork-o1-prm"
    weights["v_head.summary.weight"] = np.zeros((2, M))
    with pytest.raises(ValueError, match=r"v_head.summary.weight has shape \(2, 12\), expected \(1, 12\)"):
        load_reward(write(tmp_path / "w", config, weights))


def test_a_separator_makes_a_form(tmp_path):
    directory = write(tmp_path / "m", *classification(2)[:2])
    assert not load_reward(directory).form.rewrites
    assert not load_reward(directory, separator=[]).form.rewrites
    for separator in ("\n", [10]):
        prm = load_reward(directory, separator=separator)
        assert (prm.separator, prm.form.trim, prm.form.joined) == ((10,), "both", False)


@pytest.mark.parametrize(
    ("labels", "positive"),
    [
        (None, 1),
        (["LABEL_0", "LABEL_1"], 1),
        (["BAD", "GOOD"], 1),
        (["GOOD", "BAD"], 0),
        (["Correct", " incorrect "], 0),
        (["+", "-"], 0),
    ],
)
def test_the_right_class_is_told_by_its_name(labels, positive, tmp_path):
    labels = None if labels is None else dict(zip("01", labels, strict=True))
    config, weights, score = classification(2, id2label=labels)
    prm = load_reward(write(tmp_path / "m", config, weights, tokenizer=False))
    assert prm.head.positive == positive and prm.tokenizer is None
    tokens = [5, 6, 7]
    _, scores = prefill(prm, tokens)
    np.testing.assert_allclose(scores[0], score(hidden(weights, tokens)[-1], positive), atol=1e-5)


TWO = {"score.weight": (2, M)}


@pytest.mark.parametrize(
    ("labels", "right", "positive"),
    [
        (["valid", "invalid"], None, 0),
        (["invalid", "valid"], None, 1),
        (["error", "correct"], None, 1),
        (["x", "y"], "X", 0),
        (["x", "y"], 1, 1),
        (["bad", "good"], "bad", 0),  # what is asked for counts
        (None, 0, 0),
        (["LABEL_0", "LABEL_1"], "label_0", 0),
    ],
)
def test_labels_that_are_known_and_labels_that_are_asked_for(labels, right, positive):
    config = {} if labels is None else {"id2label": dict(zip("01", labels, strict=True))}
    assert positive_label(config, TWO, right) == positive


@pytest.mark.parametrize(
    ("labels", "right", "message"),
    [
        (
            ["x", "y"],
            None,
            r"names that say which class is right.*got \{'0': 'x', '1': 'y'\}; say it with right=",
        ),
        (["Correct", "x"], None, "names that say which class is right"),
        (["x", "incorrect"], None, "names that say which class is right"),
        (["good", "correct"], None, "names that say which class is right"),
        (["LABEL_1", "LABEL_0"], None, "names that say which class is right"),
        (["quality"], None, "names that say which class is right"),
        (["x", "y"], "z", r"right: expected a class from 0 to 1 or one of the names \['x', 'y'\], got 'z'"),
        (["x", "x"], "x", "right: expected a class"),
        (None, 2, "right: expected a class from 0 to 1, got 2"),
        (None, "good", "right: expected a class from 0 to 1, got 'good'"),
        (None, True, "right: expected a class from 0 to 1, got True"),
    ],
)
def test_labels_that_say_nothing_are_refused(labels, right, message):
    config = {} if labels is None else {"id2label": {str(i): label for i, label in enumerate(labels)}}
    shapes = {"score.weight": (1 if labels is not None and len(labels) == 1 else 2, M)}
    with pytest.raises(ValueError, match=message):
        positive_label(config, shapes, right)


def test_the_right_class_reaches_the_head(tmp_path):
    """`right` through `load_reward`, which has it for this layout alone."""
    config, weights, _ = classification(2, id2label={"0": "fine", "1": "off"})
    directory = write(tmp_path / "m", config, weights, tokenizer=False)
    with pytest.raises(ValueError, match="say it with right="):
        load_reward(directory)
    assert load_reward(directory, right="fine").head.positive == 0
    with pytest.raises(ValueError, match="right: only layout 'classification' has named classes"):
        load_reward(write(tmp_path / "q", *qwen()[:2]), right=1)


@pytest.mark.parametrize(
    ("make", "layout"), [(qwen, "qwen2.5-math-prm"), (lambda: classification(1), "classification")]
)
def test_the_tensors_tell_where_no_architecture_does(make, layout, tmp_path):
    config, weights, _ = make()
    prm = load_reward(write(tmp_path / "m", config | {"architectures": None}, weights))
    assert prm.layout == layout and f", {layout}, " in repr(prm)


def test_files_of_other_kinds(tmp_path):
    """Shards, bfloat16 weights in either dtype, and a language model's head left over."""
    config, weights, score = qwen()
    rounded = {name: value.astype(ml_dtypes.bfloat16) for name, value in weights.items()}
    leftover = rounded | {"lm_head.weight": np.zeros((V, M), ml_dtypes.bfloat16)}
    directory = write(tmp_path / "m", config, leftover, ml_dtypes.bfloat16, shards=3)
    tokens = [*PROMPT.encode(), EXTRA]
    prm = load_reward(directory)
    weights.update({name: np.asarray(value, np.float64) for name, value in rounded.items()})
    expected = score(hidden(weights, tokens)[-1])
    np.testing.assert_allclose(prefill(prm, tokens[:-1])[1][0], expected, atol=1e-5)
    assert {x.dtype for x in jax.tree.leaves(prm)} == {jnp.dtype("float32")}
    events = []
    half = load_reward(directory, dtype="bfloat16", progress=lambda *event: events.append(event))
    assert {str(x.dtype) for x in jax.tree.leaves(half) if x.ndim == 2} == {"bfloat16"}
    _, scores = prefill(half, tokens[:-1])
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores[0], expected, atol=0.03)
    assert list(dict.fromkeys(stage for stage, _ in events)) == ["reading"]


def test_hub_ids(tmp_path, monkeypatch):
    directory = write(tmp_path / "m", *classification(1)[:2])
    asked = {}

    def snapshot(name, **settings):
        asked.update(settings, name=name)
        return directory

    monkeypatch.setattr("ponder.models.loading.hub.snapshot", snapshot)
    prm = load_reward("owner/no-such-name", revision="v2", local_files_only=True)
    assert asked == {"name": "owner/no-such-name", "revision": "v2", "local_files_only": True}
    assert repr(prm).startswith(
        "RewardDecoder('owner/no-such-name', classification, 0.0M parameters, 1 layers"
    )


def test_shipped_names(tmp_path, monkeypatch):
    write(tmp_path / "countdown-tiny-prm", *classification(1)[:2])
    monkeypatch.setattr("ponder.models.loading.shipped.CHECKPOINTS", tmp_path)
    assert load_reward("countdown-tiny-prm").name == "countdown-tiny-prm"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layout": "skywork"}, NotImplementedError, "supported are classification, qwen2.5-math-prm, math"),
        ({"layout": 3}, NotImplementedError, "layout: supported are .*; got 3"),
        ({"good": "+"}, ValueError, r"only layout 'math-shepherd' has these.*got '\+' and None"),
        ({"layout": "classification", "bad": 3}, ValueError, "good, bad: only layout 'math-shepherd'"),
        ({"dtype": "float16"}, ValueError, "dtype: expected 'float32' or 'bfloat16'"),
        ({"progress": 3}, TypeError, "progress: expected a function"),
        ({"revision": "main"}, ValueError, "revision: only a hub id has revisions"),
        ({"separator": [V]}, ValueError, rf"separator: expected token ids in \[0, {V}\), got {V}"),
        ({"separator": [-1]}, ValueError, "separator: expected token ids"),
        ({"separator": [True]}, ValueError, "separator: expected token ids"),
        ({"layout": "qwen2.5-math-prm"}, ValueError, r"layout 'qwen2.5-math-prm': \['score.0.weight', "),
        ({"layout": "math-shepherd"}, ValueError, r"\['lm_head.weight'\] missing"),
    ],
)
def test_bad_arguments(options, error, message, tmp_path):
    directory = write(tmp_path / "m", *classification(1)[:2])
    with pytest.raises(error, match=message):
        load_reward(directory, **options)


def test_bad_verdicts_and_separators(tmp_path):
    directory = write(tmp_path / "m", *shepherd()[:2])
    for options, message in (
        ({"good": "ok"}, r"good: expected one token, but this tokenizer writes 'ok' as \[111, 107\]"),
        ({"bad": ""}, r"bad: expected one token, .* ''"),
        ({"bad": V}, "bad: expected token ids"),
        ({"good": "-"}, "good, bad: expected two tokens, got 45 for both"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward(directory, layout="math-shepherd", **options)
    with pytest.raises(
        NotImplementedError, match=r"'MistralForCausalLM' is no reward .*layout='math-shepherd'"
    ):
        load_reward(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="there is no tokenizer to encode ' ки' with; pass token ids"):
        load_reward(directory, layout="math-shepherd")
    prm = load_reward(directory, layout="math-shepherd", separator=[KI], good=PLUS, bad=MINUS)
    assert prm.separator == (KI,)
    # Without the special token, '<extra_0>' would be read as nine letters.
    directory = write(tmp_path / "q", *qwen()[:2])
    file = directory / "tokenizer.json"
    file.write_text(file.read_text().replace("<extra_0>", "<other_0>"))
    with pytest.raises(ValueError, match=r"'qwen2.5-math-prm' needs '<extra_0>' as one token, .*\[60, 101"):
        load_reward(directory)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            {"architectures": ["BertForMaskedLM"]},
            {},
            "'BertForMaskedLM' is no reward model of a supported layout",
        ),
        ({"architectures": [3]}, {}, "architectures: expected a list of names"),
        ({"architectures": None}, {"score.weight": None}, "no architecture.*layout='math-shepherd'"),
        ({}, {"score.weight": None}, r"layout 'classification': \['score.weight'\] missing"),
        ({"id2label": None}, {"score.weight": (3, M)}, "score.weight has 3 outputs; supported are 1 and 2"),
        ({"id2label": {"0": "x"}}, {}, r"id2label: expected the keys \['0', '1'\], .*got {'0': 'x'}"),
        ({"id2label": [1]}, {}, "id2label: expected the keys"),
        ({}, {"score.weight": (2, M + 1)}, r"score.weight has shape \(2, 13\), expected \(2, 12\)"),
        ({}, {"score.bias": (1,)}, r"score.bias has shape \(1,\), expected \(2,\)"),
        ({}, {"score.weight": ()}, "score.weight has shape"),
        ({}, {"v_head.weight": (1, M)}, r"1 unexpected \['v_head.weight'\]"),
        ({}, {"model.norm.weight": None}, r"1 missing \['model.norm.weight'\]"),
        ({"hidden_size": 10**9, "head_dim": D}, {}, "score.weight has shape"),
        ({"vocab_size": 10**9}, {}, r"expected \(1000000000, 12\)"),
        ({"model_type": "bert"}, {}, "model_type 'bert'; supported are"),
        ({"quantization_config": {"quant_method": "awq"}}, {}, r"is quantised \(awq\)"),
        ({"id2label": {"0": "x" * 10**6, "1": "y", "2": "z"}}, {}, "id2label"),
    ],
)
def test_files_that_make_no_reward_model(config, change, message, tmp_path, monkeypatch):
    """One line that names the directory, before any weight is read."""
    base, weights, _ = classification(2)
    weights = weights | {name: None if shape is None else np.zeros(shape) for name, shape in change.items()}
    weights = {name: value for name, value in weights.items() if value is not None}
    directory = write(tmp_path / "m", base | config, weights)
    monkeypatch.setattr(
        "ponder.models.weights.LazyTensors.__getitem__", lambda *_: pytest.fail("read in vain")
    )
    with pytest.raises((ValueError, NotImplementedError), match=message) as caught:
        load_reward(directory)
    text = str(caught.value)
    assert str(directory) in text and "\n" not in text and len(text) < 500


def test_head_weights_are_checked(tmp_path):
    config, weights, _ = classification(2)
    for name, value, message in (
        ("score.weight", np.full((2, M), np.nan), "score.weight holds NaN or infinity"),
        ("score.bias", np.full(2, np.inf), "score.bias holds NaN or infinity"),
        ("model.norm.weight", np.full(M, np.nan), "model.norm.weight holds NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward(write(tmp_path / "m", config, weights | {name: value}))
    with pytest.raises(ValueError, match=r"score.weight has dtype int32, expected floats"):
        load_reward(write(tmp_path / "m", config, weights, np.int32))


def test_damaged_files(tmp_path):
    directory = write(tmp_path / "m", *classification(1)[:2])
    for file, content in ((SINGLE_FILE, b"\xff" * 40), ("config.json", b"{"), ("tokenizer.json", b"[1")):
        copy = Path(shutil.copytree(directory, tmp_path / f"damaged-{file}"))
        (copy / file).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(copy))) as caught:
            load_reward(copy)
        assert "\n" not in str(caught.value)
    (directory / SINGLE_FILE).unlink()
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="Pickled checkpoints are not read"):
        load_reward(directory)


@pytest.mark.parametrize("name", ["nonsense", "", "./absent"])
def test_unknown_names(name):
    with pytest.raises((ValueError, FileNotFoundError), match="name_or_path: expected"):
        load_reward(name)
