"""What process reward models look like in files: their layouts, and how the head of each is told and built.

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

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ponder.models.config import DecoderConfig
from ponder.models.messages import quoted
from ponder.models.reward_model import RewardHead
from ponder.models.weights import finite

__all__ = ["LAYOUTS", "SEPARATORS", "build_head", "check_head", "detect_layout", "positive_label"]

LAYOUTS = ("classification", "qwen2.5-math-prm", "math-shepherd", "likelihood")

_QWEN = ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias")
SEPARATORS = {"classification": (), "qwen2.5-math-prm": "<extra_0>", "math-shepherd": "ки"}
"""What goes after each step of reasoning, as text or ids."""

# What checkpoints call the two classes. Of other names, such as LABEL_0 and LABEL_1, the second is right.
_RIGHT = {"good", "positive", "correct", "right", "true", "yes", "+", "1"}
_WRONG = {"bad", "negative", "incorrect", "wrong", "false", "no", "-", "0"}


def detect_layout(raw_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
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


def check_head(layout: str, config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
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


def positive_label(raw_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> int:
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


def build_head(
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
