"""Find a process reward model by name or path, tell its layout, and build it.

Layouts, with what they were checked against:

"classification": `*ForTokenClassification` and `*ForSequenceClassification` of transformers, `score.weight`
    [1 or 2, M] and an optional `score.bias`, read at the last token of a step. TRL's PRMTrainer makes such
    models, with a separator of its own choice, to be given as `separator`.
"qwen2.5-math-prm": `Qwen2ForProcessRewardModel`, `score` = Linear(M, M), ReLU, Linear(M, 2); "<extra_0>"
    goes after every step, and softmax(logits)[1] there is the score. Read in the model card of
    Qwen/Qwen2.5-Math-PRM-7B (`make_step_rewards`) and in vLLM's `model_executor/models/qwen2_rm.py`, which
    like this loader leaves out an `lm_head`. Zhang et al. (2025), arXiv:2501.07301.
"math-shepherd": a causal language model; 'ки' goes after every step, and softmax over the logits of '+' and
    '-' there gives the score, that of '+'. Read in the model card of peiyi9979/math-shepherd-mistral-7b-prm
    as others quote it, and in the README of the dataset peiyi9979/Math-Shepherd. Wang et al. (2024),
    arXiv:2312.08935.
"likelihood": ponder's own, a causal language model whose probabilities of a step's tokens make the score,
    with the coefficients under "ponder_reward" in config.json: see `ponder.models.likelihood_reward`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ponder.models.config import DecoderConfig
from ponder.models.language_model import DecoderLM
from ponder.models.likelihood_reward import LikelihoodReward
from ponder.models.loading import hub
from ponder.models.loading.loading import files_named, model_directory, refuse_quantised, stage, weight_dtype
from ponder.models.loading.tokenizer import HubTokenizer, has_tokenizer
from ponder.models.messages import quoted
from ponder.models.protocols import Tokenizer
from ponder.models.reward_model import RewardDecoder, RewardHead
from ponder.models.weights import check_shapes, finite, from_weights

__all__ = ["LAYOUTS", "load_reward"]

LAYOUTS = ("classification", "qwen2.5-math-prm", "math-shepherd", "likelihood")

_QWEN = ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias")
_SEPARATORS = {"classification": (), "qwen2.5-math-prm": "<extra_0>", "math-shepherd": "ки"}
# What checkpoints call the two classes. Of other names, such as LABEL_0 and LABEL_1, the second is right.
_RIGHT = {"good", "positive", "correct", "right", "true", "yes", "+", "1"}
_WRONG = {"bad", "negative", "incorrect", "wrong", "false", "no", "-", "0"}


def load_reward(
    name_or_path: str | os.PathLike,
    *,
    layout: str | None = None,
    dtype: Any = None,
    revision: str | None = None,
    local_files_only: bool = False,
    separator: str | Sequence[int] | None = None,
    good: str | int | None = None,
    bad: str | int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> RewardDecoder | LikelihoodReward:
    """Load a process reward model.

    Files are found, checked and distrusted as by `load`.

    Args:
        name_or_path: a shipped model such as "countdown-tiny-prm", a local directory in hub format, a hub id
            "owner/name", or for "math-shepherd" a .gguf file.
        layout: one of `LAYOUTS`, see the module; None tells it from config.json and the tensors. A
            "math-shepherd" cannot be told from a language model, so it has to be asked for.
        dtype: of the weight matrices: "float32" (the default) or "bfloat16", or a dtype.
        revision: branch, tag or commit of a hub id.
        local_files_only: never download.
        separator: text or ids that go after each step, in place of the layout's own: "<extra_0>", 'ки', or
            none for "classification". Text is encoded by the model's tokenizer.
        good: for "math-shepherd", the token of a right step, text or id; '+' by default.
        bad: that of a wrong step; '-' by default.
        progress: as in `load`.

    Returns:
        A `RewardModel`. Its `tokenizer` is None where a directory has no tokenizer files.

    Raises:
        ValueError: an argument is out of range, or the files are damaged or do not fit together.
        FileNotFoundError: the path does not exist, or files are missing from it.
        NotImplementedError: the layout, architecture or tokenizer is not supported.
        OSError: the hub does not have the model or cannot be reached.

    Examples:
        >>> load_reward("peiyi9979/math-shepherd-mistral-7b-prm", layout="math-shepherd")  # doctest: +SKIP
    """
    dtype = weight_dtype(dtype)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a function of a stage and a fraction, got {progress!r}.")
    if layout is not None and layout not in LAYOUTS:
        raise NotImplementedError(f"layout: supported are {', '.join(LAYOUTS)}; got {quoted(layout)}.")
    if layout != "math-shepherd" and (good is not None or bad is not None):
        raise ValueError(
            f"good, bad: only layout 'math-shepherd' has these tokens; got {good!r} and {bad!r} with "
            f"layout={layout!r}."
        )
    with model_directory(name_or_path, revision, local_files_only, progress) as directory:
        raw_config = hub.read_config(directory)
        refuse_quantised(raw_config, str(name_or_path))
        with files_named(directory):
            config = DecoderConfig.from_hf(raw_config)
            shapes = hub.read_shapes(directory)
            found = layout or _detect(raw_config, shapes)
            if found == "likelihood":
                if separator is not None:
                    raise ValueError(f"separator: layout 'likelihood' has none, got {separator!r}.")
                check_shapes(config, shapes)
                return _likelihood_reward(raw_config, config, directory, dtype, progress, str(name_or_path))
            # Headers first: weights that cannot fit need not be read.
            head_names = _check_head(found, config, shapes)
            positive = _positive_label(raw_config, shapes) if found == "classification" else 1
            trunk = dataclasses.replace(config, tie_word_embeddings=True)  # it needs no head of its own
            check_shapes(trunk, {name: shape for name, shape in shapes.items() if name not in head_names})

            tokenizer = HubTokenizer.from_directory(directory) if has_tokenizer(directory) else None
            ids = _separator_ids(found, separator, tokenizer, config)
            verdicts = (
                (
                    _token_id("bad", "-" if bad is None else bad, tokenizer, config),
                    _token_id("good", "+" if good is None else good, tokenizer, config),
                )
                if found == "math-shepherd"
                else None
            )
            weights = hub.read_weights(directory, progress=stage(progress, "reading"))
            head = _build_head(config, weights, verdicts, positive, dtype)
            weights = {name: weight for name, weight in weights.items() if name not in head_names}
            decoder = from_weights(trunk, weights, dtype=dtype, progress=stage(progress, "transferring"))
    return RewardDecoder(decoder, head, ids, tokenizer, found, str(name_or_path))


def _likelihood_reward(
    raw_config: Mapping[str, Any],
    config: DecoderConfig,
    directory: Path,
    dtype: Any,
    progress: Callable[[str, float], None] | None,
    name: str,
) -> LikelihoodReward:
    """Build the layout "likelihood" of a causal language model and its coefficients."""
    settings = raw_config.get("ponder_reward")
    values = settings.get("coefficients") if isinstance(settings, dict) else None
    values = values if isinstance(values, list) else []
    if len(values) != 3 or not all(type(x) in (int, float) and abs(x) < 1e6 for x in values):
        raise ValueError(
            "config: ponder_reward: expected coefficients of three numbers for the layout 'likelihood', "
            f"got {quoted(settings)}"
        )
    tokenizer = HubTokenizer.from_directory(directory) if has_tokenizer(directory) else None
    weights = hub.read_weights(directory, progress=stage(progress, "reading"))
    decoder = from_weights(config, weights, dtype=dtype, progress=stage(progress, "transferring"))
    return LikelihoodReward(DecoderLM(decoder, tokenizer, (), name), jnp.asarray(values, jnp.float32), name)


def _detect(raw_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Tell the layout from what config.json says, or where it names no architecture, from the tensors."""
    own = raw_config.get("ponder_reward")
    if isinstance(own, dict) and own.get("layout") == "likelihood":
        return "likelihood"
    architectures = raw_config.get("architectures")
    if architectures:
        name = architectures[0] if isinstance(architectures, list) else architectures
        if not isinstance(name, str):
            raise ValueError(f"config: architectures: expected a list of names, got {quoted(architectures)}")
        if name == "Qwen2ForProcessRewardModel":
            return "qwen2.5-math-prm"
        if name.endswith(("ForTokenClassification", "ForSequenceClassification")):
            return "classification"
    else:
        name = "no architecture"
        if "score.0.weight" in shapes:
            return "qwen2.5-math-prm"
        if "score.weight" in shapes:
            return "classification"
    plain = name.endswith("ForCausalLM") or name == "no architecture"
    hint = (
        "; a language model that was trained to write '+' or '-' needs layout='math-shepherd'"
        if plain
        else ""
    )
    raise NotImplementedError(
        f"{quoted(name)} is no reward model of a supported layout ({', '.join(LAYOUTS)}){hint}"
    )


def _check_head(layout: str, config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Check the tensors that are not the trunk's, and return their names."""
    m = config.hidden_size
    if layout == "math-shepherd":
        if config.tie_word_embeddings:
            return set()
        wanted: dict[str, tuple[int, ...]] = {"lm_head.weight": (config.vocab_size, m)}
    elif layout == "qwen2.5-math-prm":
        wanted = dict(zip(_QWEN, ((m, m), (m,), (2, m), (2,)), strict=True))
    else:
        outputs = (shapes.get("score.weight") or (1,))[0]
        if outputs not in (1, 2):
            raise NotImplementedError(f"score.weight has {outputs} outputs; supported are 1 and 2 classes")
        wanted = {"score.weight": (outputs, m)}
        if "score.bias" in shapes:
            wanted["score.bias"] = (outputs,)
    if missing := [name for name in wanted if name not in shapes]:
        raise ValueError(f"weights do not fit the layout {layout!r}: {missing} missing")
    for name, shape in wanted.items():
        if tuple(shapes[name]) != shape:
            raise ValueError(f"weights: {name} has shape {tuple(shapes[name])}, expected {shape}")
    # A language model's head may be left over from training; no score needs it.
    return {*wanted, "lm_head.weight"}


def _positive_label(raw_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Tell which class means right, from the names that config.json gives them."""
    labels, outputs = raw_config.get("id2label"), shapes["score.weight"][0]
    if labels is None:
        return 1
    wanted = [str(i) for i in range(outputs)]
    if not isinstance(labels, dict) or sorted(labels) != wanted:
        raise ValueError(
            f"config: id2label: expected the keys {wanted}, the outputs of score.weight, got {quoted(labels)}"
        )
    right, wrong = ([str(labels[i]).strip().lower() in names for i in wanted] for names in (_RIGHT, _WRONG))
    if outputs == 1:
        if wrong[0]:
            raise NotImplementedError(f"id2label {quoted(labels)}: a single class that means wrong")
        return 1
    says_zero = (right[0] and not right[1]) or (wrong[1] and not wrong[0])
    return 0 if says_zero else 1


def _separator_ids(
    layout: str, separator: Any, tokenizer: Tokenizer | None, config: DecoderConfig
) -> tuple[int, ...]:
    """Token ids that go after each step."""
    own = separator is None
    separator = _SEPARATORS[layout] if own else separator
    if isinstance(separator, str):
        ids = _encode("separator", separator, tokenizer)
        if own and layout == "qwen2.5-math-prm" and len(ids) != 1:
            raise ValueError(
                f"separator: layout {layout!r} needs {separator!r} as one token, but this tokenizer writes "
                f"{quoted(ids)}; pass the text or ids of the separator that the model was trained with"
            )
    else:
        if not isinstance(separator, Iterable):
            separator = [separator]
        ids = list(separator)
    return tuple(_in_vocabulary("separator", i, config) for i in ids)


def _token_id(name: str, token: Any, tokenizer: Tokenizer | None, config: DecoderConfig) -> int:
    """The id of a token given by text or id."""
    if isinstance(token, str):
        ids = _encode(name, token, tokenizer)
        if len(ids) != 1:
            raise ValueError(
                f"{name}: expected one token, but this tokenizer writes {token!r} as {quoted(ids)}"
            )
        token = ids[0]
    return _in_vocabulary(name, token, config)


def _encode(name: str, text: str, tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is None:
        raise ValueError(f"{name}: there is no tokenizer to encode {text!r} with; pass token ids")
    return tokenizer.encode(text)


def _in_vocabulary(name: str, token: Any, config: DecoderConfig) -> int:
    whole = isinstance(token, int | np.integer) and not isinstance(token, bool)
    if not whole or not 0 <= token < config.vocab_size:
        raise ValueError(f"{name}: expected token ids in [0, {config.vocab_size}), got {quoted(token)}")
    return int(token)


def _build_head(
    config: DecoderConfig,
    weights: Mapping[str, np.ndarray],
    verdicts: tuple[int, int] | None,
    positive: int,
    dtype: Any,
) -> RewardHead:
    """Build the head from checked tensors; of a language model's, the rows of the two verdicts."""
    if verdicts is not None:
        if verdicts[0] == verdicts[1]:
            raise ValueError(f"good, bad: expected two tokens, got {verdicts[1]} for both")
        name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        matrices, biases = [finite(name, weights[name])[list(verdicts)]], [None]
    else:
        names = ("score.0", "score.2") if "score.0.weight" in weights else ("score",)
        matrices = [finite(f"{name}.weight", weights[f"{name}.weight"]) for name in names]
        stored = [weights.get(f"{name}.bias") for name in names]
        biases = [
            None if bias is None else jnp.asarray(finite(f"{name}.bias", bias), jnp.float32)
            for name, bias in zip(names, stored, strict=True)
        ]
    return RewardHead([jnp.asarray(matrix, dtype) for matrix in matrices], biases, positive)
