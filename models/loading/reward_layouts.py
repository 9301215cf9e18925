r"""What process reward models look like in files: their layouts, and how the head of each is told and built.

Layouts, with what they were checked against; `FORMS` states how each was shown the steps of a solution:

"classification": `*ForTokenClassification` and `*ForSequenceClassification` of transformers, `score.weight`
    [1 or 2, M] and an optional `score.bias`, read at the last token of a step. TRL's PRMTrainer makes such
    models: steps without their line breaks, each encoded by itself, a separator of its own choice behind
    each (to be given as `separator`), and 1 for right. Read in `tokenize_row` of TRL's `prm_trainer.py`.
"qwen2.5-math-prm": `Qwen2ForProcessRewardModel`, `score` = Linear(M, M), ReLU, Linear(M, 2); in a chat, the
    assistant's turn is the steps with "<extra_0>" after every one, and softmax(logits)[1] there is the score.
    Read in the model card of Qwen/Qwen2.5-Math-PRM-7B (`make_step_rewards`) and in vLLM's
    `model_executor/models/qwen2_rm.py`, which like this loader leaves out an `lm_head`. Zhang et al. (2025),
    arXiv:2501.07301.
"math-shepherd": a causal language model; after the question and a blank come the steps, a line each, with
    " ки" before the line break, and softmax over the logits of '+' and '-' there gives the score, that of
    '+'. Read in the README of the dataset peiyi9979/Math-Shepherd, and in the model card of
    peiyi9979/math-shepherd-mistral-7b-prm as others quote it. Wang et al. (2024), arXiv:2312.08935.
"rlhflow": a causal language model with the chat format of Llama 3; every step is a turn of the user, the
    first one behind the question and a blank, and every turn of the assistant is "+". The logits of '+' and
    '-' where that "+" is predicted give the score, and it stays in the context. Read in `prm_evaluate.py` of
    RLHFlow/RLHF-Reward-Modeling, for RLHFlow/Llama3.1-8B-PRM-Deepseek-Data and -Mistral-Data.
"skywork-o1-prm": a language model with TRL's value head, `v_head.summary` = Linear(M, 1) on the normalised
    hidden states, whose sigmoid is the score; BOS, the question and a line break, then the steps, each
    encoded by itself with a line break behind it, and read there. Read in `io_utils.py` and `prm_model.py`
    of SkyworkAI/skywork-o1-prm-inference, for Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B and -7B.
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
from ponder.models.step_form import StepForm
from ponder.models.weights import finite

__all__ = ["FORMS", "LAYOUTS", "build_head", "check_head", "detect_layout", "positive_label"]

_USER, _ASSISTANT = (
    f"<|eot_id|><|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")
)
FORMS = {
    "classification": StepForm(),
    "qwen2.5-math-prm": StepForm(trim="both", question="chat", tag="<extra_0>"),
    "math-shepherd": StepForm(
        trim="both", question="text", first=" ", between="\n", tag=" ки", read="tokens"
    ),
    "rlhflow": StepForm(
        trim="both", question="open turn", first=" ", between="+" + _USER, tag=_ASSISTANT, read="tokens"
    ),
    "skywork-o1-prm": StepForm(
        trim="end", question="text", after_question="\n", tag="\n", joined=False, bos=True, read="value"
    ),
    "likelihood": StepForm(),
}
"""How each layout was shown steps."""

LAYOUTS = tuple(FORMS)

_HEADS = (("v_head.summary",), ("score.0", "score.2"), ("score",))
"""Names of the layers of a head; the first that is there."""
_QWEN = ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias")
_VALUE = ("v_head.summary.weight", "v_head.summary.bias")

# What checkpoints call the two classes.
_RIGHT = {"good", "positive", "correct", "right", "true", "valid", "yes", "pos", "+", "1"}
_WRONG = {"bad", "negative", "incorrect", "wrong", "false", "invalid", "error", "no", "neg", "-", "0", "-1"}
# Of a single output that is the logit of being right.
_SCORE = {*_RIGHT, "score", "reward", "label_0"}
_UNNAMED = ["label_0", "label_1"]  # what transformers writes where nobody named them; TRL trains 1 as right


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
        if _VALUE[0] in shapes:  # of TRL's wrapper, whatever it wraps
            return "skywork-o1-prm"
        if name.endswith(("ForTokenClassification", "ForSequenceClassification")):
            return "classification"
    else:
        name = "no architecture"
        if _VALUE[0] in shapes:
            return "skywork-o1-prm"
        if "score.0.weight" in shapes:
            return "qwen2.5-math-prm"
        if "score.weight" in shapes:
            return "classification"
    plain = name.endswith("ForCausalLM") or name == "no architecture"
    hint = (
        "; a language model that was trained to write '+' or '-' needs layout='math-shepherd' or 'rlhflow'"
        if plain
        else ""
    )
    raise NotImplementedError(
        f"{quoted(name)} is no reward model of a supported layout ({', '.join(LAYOUTS)}){hint}"
    )


def check_head(layout: str, config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Check the tensors that are not the trunk's, and return their names."""
    m = config.hidden_size
    if FORMS[layout].read == "tokens":
        if config.tie_word_embeddings:
            return set()
        wanted: dict[str, tuple[int, ...]] = {"lm_head.weight": (config.vocab_size, m)}
    elif layout == "qwen2.5-math-prm":
        wanted = dict(zip(_QWEN, ((m, m), (m,), (2, m), (2,)), strict=True))
    elif FORMS[layout].read == "value":
        wanted = dict(zip(_VALUE, ((1, m), (1,)), strict=True))
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


def positive_label(
    raw_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], right: str | int | None = None
) -> int:
    """Tell which class means right: as asked for, or from the names that config.json gives them.

    Args:
        raw_config: config.json; its `id2label` names the classes.
        shapes: of the tensors.
        right: the class that means right, by name or number; None: the names have to say so. Without names,
            or with those that transformers makes up (LABEL_0, LABEL_1), it is the second, as TRL trains it.

    Returns:
        0 or 1; 1 where there is a single output, whose sigmoid is the score.

    Raises:
        ValueError: `id2label` does not fit the outputs, its names do not say which class is right, or `right`
            is none of them.
        NotImplementedError: the only class means wrong.
    """
    labels, outputs = raw_config.get("id2label"), shapes["score.weight"][0]
    wanted = [str(i) for i in range(outputs)]
    if labels is not None and (not isinstance(labels, dict) or sorted(labels) != wanted):
        raise ValueError(
            f"config: id2label: expected the keys {wanted}, the outputs of score.weight, got {quoted(labels)}"
        )
    names = None if labels is None else [str(labels[i]).strip().lower() for i in wanted]
    if right is not None:
        place = _place_of(right, names, outputs)
        return place if outputs == 2 else 1
    if names is None or names == _UNNAMED:
        return 1
    if outputs == 1:
        if names[0] in _WRONG:
            raise NotImplementedError(f"id2label {quoted(labels)}: a single class that means wrong")
        if names[0] in _SCORE:
            return 1
    for place in (0, 1) if outputs == 2 else ():
        if names[place] in _RIGHT and names[1 - place] in _WRONG:
            return place
    raise ValueError(
        f"config: id2label: expected names that say which class is right, such as 'correct' and 'incorrect', "
        f"got {quoted(labels)}; say it with right=, the name or number of the class"
    )


def _place_of(right: Any, names: list[str] | None, outputs: int) -> int:
    """The number of the class that was asked for."""
    if isinstance(right, str):
        if names is not None and names.count(right.strip().lower()) == 1:
            return names.index(right.strip().lower())
    elif isinstance(right, int | np.integer) and not isinstance(right, bool) and 0 <= right < outputs:
        return int(right)
    known = "" if names is None else f" or one of the names {quoted(names)}"
    raise ValueError(f"right: expected a class from 0 to {outputs - 1}{known}, got {right!r}")


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
        names = next(names for names in _HEADS if f"{names[0]}.weight" in weights)
        matrices = [finite(f"{name}.weight", weights[f"{name}.weight"]) for name in names]
        stored = [weights.get(f"{name}.bias") for name in names]
        biases = [
            None if bias is None else jnp.asarray(finite(f"{name}.bias", bias), jnp.float32)
            for name, bias in zip(names, stored, strict=True)
        ]
    return RewardHead([jnp.asarray(matrix, dtype) for matrix in matrices], biases, positive)
