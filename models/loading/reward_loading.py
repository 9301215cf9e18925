"""Find a process reward model by name or path, tell its layout, and build it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ponder.models.config import DecoderConfig
from ponder.models.language_model import DecoderLM
from ponder.models.likelihood_reward import LikelihoodReward
from ponder.models.loading.checkpoint import Checkpoint
from ponder.models.loading.finding import find
from ponder.models.loading.loading import open_checkpoint, reading_progress, weight_dtype
from ponder.models.loading.reward_layouts import (
    FORMS,
    LAYOUTS,
    build_head,
    check_head,
    detect_layout,
    positive_label,
)
from ponder.models.messages import errors_name, quoted
from ponder.models.protocols import Tokenizer
from ponder.models.reward_model import RewardDecoder
from ponder.models.step_form import StepForm, encode_after
from ponder.models.weights import check_shapes, from_weights

__all__ = ["load_reward"]

_SPECIAL = {"qwen2.5-math-prm": "<extra_0>", "rlhflow": "<|eot_id|>"}
"""A token without which a tokenizer is not that of the layout."""


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
    right: str | int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> RewardDecoder | LikelihoodReward:
    """Load a process reward model.

    Files are found, checked and distrusted as by `load`.

    Args:
        name_or_path: a shipped model such as "countdown-tiny-prm", a local directory in hub format, a hub id
            "owner/name", or for "math-shepherd" and "rlhflow" a .gguf file.
        layout: one of `LAYOUTS`, see `reward_layouts`; None tells it from config.json and the tensors. A
            "math-shepherd" or "rlhflow" cannot be told from a language model, so it has to be asked for.
        dtype: of the weight matrices: "float32" (the default) or "bfloat16", or a dtype.
        revision: branch, tag or commit of a hub id.
        local_files_only: never download.
        separator: text or ids that go after each step, in place of the layout's own: "<extra_0>", " ки", a
            line break for "skywork-o1-prm", or none for "classification". Text is encoded by the model's
            tokenizer. With one, a "classification" is shown steps as TRL trains them, without their line
            breaks.
        good: for "math-shepherd" and "rlhflow", the token of a right step, text or id; '+' by default.
        bad: that of a wrong step; '-' by default.
        right: for "classification", the class that means right, by its name in config.json's `id2label` or
            its number. None: the names say so; names that are not known are refused, and where there are
            none the second class is right.
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
    dtype, report = weight_dtype(dtype), reading_progress(progress)
    if layout is not None and layout not in LAYOUTS:
        raise NotImplementedError(f"layout: supported are {', '.join(LAYOUTS)}; got {quoted(layout)}.")
    by_tokens = layout is not None and FORMS[layout].read == "tokens"
    if not by_tokens and (good is not None or bad is not None):
        raise ValueError(
            f"good, bad: only layout 'math-shepherd' has these tokens, and 'rlhflow'; got {good!r} and "
            f"{bad!r} with layout={layout!r}."
        )
    checkpoint = open_checkpoint(find(name_or_path, revision=revision, local_files_only=local_files_only))
    raw_config, config, tensors = checkpoint.raw_config, checkpoint.config, checkpoint.tensors
    with errors_name(checkpoint.file):
        found = layout or detect_layout(raw_config, tensors.shapes)
        if right is not None and found != "classification":
            raise ValueError(f"right: only layout 'classification' has named classes; this is {found!r}.")
        if found == "likelihood":
            if separator is not None:
                raise ValueError(f"separator: layout 'likelihood' has none, got {separator!r}.")
            return _likelihood_reward(checkpoint, dtype, report, str(name_or_path))
        # Shapes first: weights that cannot fit need not be read.
        head_names = check_head(found, config, tensors.shapes)
        positive = positive_label(raw_config, tensors.shapes, right) if found == "classification" else 1
        trunk = dataclasses.replace(config, tie_word_embeddings=True)  # it needs no head of its own
        check_shapes(trunk, tensors.without(head_names).shapes)

        tokenizer = checkpoint.read_tokenizer()
        form = _form(found, separator)
        ids = _separator_ids(found, form, separator, tokenizer, config)
        verdicts = (
            (
                _token_id("bad", "-" if bad is None else bad, tokenizer, config),
                _token_id("good", "+" if good is None else good, tokenizer, config),
            )
            if by_tokens
            else None
        )
        head = build_head(config, tensors, verdicts, positive, dtype)
        decoder = from_weights(trunk, tensors.without(head_names), dtype=dtype, progress=report)
    return RewardDecoder(decoder, head, ids, tokenizer, found, str(name_or_path), form)


def _form(layout: str, separator: Any) -> StepForm:
    """How steps are shown: the layout's form, with the separator that was asked for."""
    form = FORMS[layout]
    if separator is None:
        return form
    if layout == "rlhflow":
        raise ValueError(
            f"separator: layout 'rlhflow' has the turns of a chat between its steps, got {separator!r}."
        )
    text = separator if isinstance(separator, str) else ""
    if layout == "classification" and np.size(separator):
        return StepForm(trim="both", tag=text, joined=False)
    return dataclasses.replace(form, tag=text or form.tag)


def _likelihood_reward(
    checkpoint: Checkpoint, dtype: Any, report: Callable[[float], None] | None, name: str
) -> LikelihoodReward:
    """Build the layout "likelihood" of a causal language model and its coefficients."""
    check_shapes(checkpoint.config, checkpoint.tensors.shapes)
    settings = checkpoint.raw_config.get("ponder_reward")
    values = settings.get("coefficients") if isinstance(settings, dict) else None
    values = values if isinstance(values, list) else []
    if len(values) != 3 or not all(type(x) in (int, float) and abs(x) < 1e6 for x in values):
        raise ValueError(
            "config: ponder_reward: expected coefficients of three numbers for the layout 'likelihood', "
            f"got {quoted(settings)}"
        )
    tokenizer = checkpoint.read_tokenizer()
    decoder = from_weights(checkpoint.config, checkpoint.tensors, dtype=dtype, progress=report)
    return LikelihoodReward(DecoderLM(decoder, tokenizer, (), name), jnp.asarray(values, jnp.float32), name)


def _separator_ids(
    layout: str, form: StepForm, separator: Any, tokenizer: Tokenizer | None, config: DecoderConfig
) -> tuple[int, ...]:
    """Token ids that go after each step."""
    if separator is None or isinstance(separator, str):
        own = separator is None
        text = form.tag if own else separator
        # As it was written in training: behind a word.
        ids = _encode("separator", text, tokenizer, after="a" if own and form.joined else "") if text else []
        if own and layout == "skywork-o1-prm":
            ids = ids[-1:]  # behind the blank with which a sentencepiece tokenizer begins
        special = _SPECIAL.get(layout) if own else None
        if special and len(found := _encode("separator", special, tokenizer)) != 1:
            raise ValueError(
                f"separator: layout {layout!r} needs {special!r} as one token, but this tokenizer writes "
                f"{quoted(found)}; pass the text or ids of the separator that the model was trained with"
            )
    else:
        ids = list(separator) if isinstance(separator, Iterable) else [separator]
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


def _encode(name: str, text: str, tokenizer: Tokenizer | None, after: str = "") -> list[int]:
    if tokenizer is None:
        raise ValueError(f"{name}: there is no tokenizer to encode {text!r} with; pass token ids")
    return encode_after(tokenizer.encode, after, text) if after else tokenizer.encode(text)


def _in_vocabulary(name: str, token: Any, config: DecoderConfig) -> int:
    whole = isinstance(token, int | np.integer) and not isinstance(token, bool)
    if not whole or not 0 <= token < config.vocab_size:
        raise ValueError(f"{name}: expected token ids in [0, {config.vocab_size}), got {quoted(token)}")
    return int(token)
