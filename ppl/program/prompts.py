"""Prompts: text, chat messages or token ids, as the token ids that a model reads."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ponder.models.protocols import Cache, LanguageModel, bos_of, capabilities
from ponder.program.prompt_forms import as_list, plain, refusal

__all__ = [
    "Prompt",
    "check_context",
    "describe_prompts",
    "encode_prompt",
    "encode_prompts",
    "is_chat",
    "pad_prompts",
    "read_prompts",
]

Prompt = str | Sequence[dict[str, Any]] | Sequence[int] | np.ndarray | jax.Array
"""Text, chat messages, or token ids."""

_PROMPT_BUCKET = 32


def encode_prompts(
    lm: LanguageModel,
    prompt: Prompt | Sequence[Prompt],
    max_new_tokens: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[tuple[tuple[int, ...], ...], bool]:
    """Encode one prompt or a batch of prompts, each within the model's context; tell which it was.

    A batch is a list of strings, of chats, of lists or arrays of ids, or an array of strings.
    `chat_template_kwargs` are variables for the template of all chats.

    Raises:
        TypeError: `prompt` is of another kind, there are several and `lm` has no `prefill_many`, or its
            tokenizer takes no variables.
        ValueError: a prompt is empty, has ids outside the vocabulary, needs a tokenizer that `lm` lacks, or
            is too long for its context; or there are variables, and no chat.
    """
    prompt = as_list(prompt)
    variables = _variables(prompt, chat_template_kwargs)
    if not (isinstance(prompt, list | tuple) and any(map(_is_prompt, prompt))):
        tokens = encode_prompt(lm, prompt, variables)
        check_context(lm, len(tokens), max_new_tokens)
        return (tokens,), False
    if not capabilities(lm).many_prompts:
        raise TypeError(
            f"prompt: several prompts need a model with prefill_many; {type(lm).__name__} has none"
        )
    encoded = []
    for index, single in enumerate(prompt):
        try:
            encoded.append(encode_prompt(lm, single, variables))
            check_context(lm, len(encoded[-1]), max_new_tokens)
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompt {index} of {len(prompt)}: {error}") from error
    return tuple(encoded), True


def encode_prompt(
    lm: LanguageModel, prompt: Any, variables: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Return the ids of text, chat messages (rendered with `variables` of the template) or ids.

    Text that spells the BOS which the tokenizer adds is warned of.

    Raises:
        TypeError: `prompt` is of another kind.
        ValueError: there are no ids, some are outside the vocabulary, or text comes to an `lm` without
            tokenizer.
    """
    tokens = _encode(lm, prompt, variables or {})
    if not len(tokens):
        raise ValueError("prompt: expected at least one token, got none")
    wrong = [i for i in tokens if not 0 <= i < lm.vocab_size]
    if wrong:
        raise ValueError(f"prompt: expected token ids in [0, {lm.vocab_size}), got {wrong[:8]}")
    return tuple(tokens)


def check_context(lm: LanguageModel, length: int, max_new_tokens: int, name: str = "prompt") -> None:
    """Refuse a prompt that is too long.

    Raises:
        ValueError: its `length` and `max_new_tokens` together are more than the context of `lm` holds.
    """
    limit = capabilities(lm).max_length
    if limit is not None and length + max_new_tokens > limit:
        raise ValueError(
            f"{name}: {length} tokens and max_new_tokens={max_new_tokens} exceed the model's context "
            f"of {limit}"
        )


def pad_prompts(lm: LanguageModel, prompts: Sequence[Sequence[int]]) -> tuple[jax.Array, jax.Array]:
    """Return int32[B, P], padded on the right where the model can take it, and the lengths int32[B]."""
    lengths = [len(tokens) for tokens in prompts]
    # Prompts of similar length then share one compilation.
    width = max(lengths)
    width += -width % _PROMPT_BUCKET if capabilities(lm).padded_prompts else 0
    padded = np.zeros((len(prompts), width), np.int32)
    for row, tokens in zip(padded, prompts, strict=True):
        row[: len(tokens)] = tokens
    return jnp.asarray(padded), jnp.asarray(lengths, jnp.int32)


def describe_prompts(num_prompts: int | None, lengths: jax.Array) -> str:
    """Say how many prompts there are and how long: the middle of a repr."""
    if isinstance(lengths, Tracer):
        return "traced prompt"
    if num_prompts is None:
        return f"prompt of {lengths[0]} tokens"
    return f"{num_prompts} prompts of {lengths.min()} to {lengths.max()} tokens"


def read_prompts(
    lm: LanguageModel, prompts: jax.Array, lengths: jax.Array, num_rows: int, max_new_tokens: int
) -> tuple[Cache, jax.Array]:
    """Prefill B prompts of `pad_prompts` for as many equal blocks of rows; the cache and logits [N, V]."""
    count = prompts.shape[0]
    if count > 1:
        many = lm.prefill_many  # pyright: ignore[reportAttributeAccessIssue]
        return many(prompts, lengths, num_rows // count, max_new_tokens)
    length = {"length": lengths[0]} if capabilities(lm).padded_prompts else {}
    return lm.prefill(prompts[0], num_rows, max_new_tokens, **length)


def is_chat(prompt: Any) -> bool:
    """Tell whether a prompt is chat messages."""
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], dict)


def _variables(prompt: Any, chat_template_kwargs: Any) -> dict[str, Any]:
    """Check variables of a chat template."""
    if chat_template_kwargs is None:
        return {}
    if not isinstance(chat_template_kwargs, Mapping) or not all(
        isinstance(name, str) for name in chat_template_kwargs
    ):
        raise TypeError(
            f"chat_template_kwargs: expected a dict of variables by name, got {chat_template_kwargs!r}"
        )
    chats = is_chat(prompt) or (isinstance(prompt, list | tuple) and any(map(is_chat, prompt)))
    if chat_template_kwargs and not chats:
        raise ValueError("chat_template_kwargs: only a chat has a template, and no prompt is one")
    return dict(chat_template_kwargs)


def _is_prompt(element: Any) -> bool:
    """Tell whether an element of a list is a prompt by itself, and not an id or a message."""
    return isinstance(element, str | list | tuple) or getattr(element, "ndim", 0) > 0


def _encode(lm: LanguageModel, prompt: Any, variables: Mapping[str, Any]) -> list[int]:
    prompt = plain(prompt)
    if not is_chat(prompt) and not isinstance(prompt, str):
        try:
            array = np.asarray(prompt)
        except ValueError:  # rows of different lengths
            array = np.asarray(prompt, object)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise TypeError(
                "prompt: expected a str, chat messages or a sequence of token ids, " + refusal(prompt)
            )
        return array.tolist()
    if lm.tokenizer is None:
        raise ValueError("prompt: this model has no tokenizer; pass token ids")
    if not isinstance(prompt, str):
        render = lm.tokenizer.apply_chat_template
        try:
            inspect.signature(render).bind(prompt, **variables)
        except TypeError:
            raise TypeError(
                f"chat_template_kwargs: expected variables that {type(lm.tokenizer).__name__} takes, got "
                f"{', '.join(variables)}"
            ) from None
        return list(render(prompt, **variables))
    tokens = list(lm.tokenizer.encode(prompt))
    bos = bos_of(lm.tokenizer)
    if bos and tokens[:1] == bos:
        warnings.warn(
            f"prompt: {prompt[:40]!r} begins with the token {bos[0]} (BOS), which the tokenizer adds to text "
            "anyway, so that the model reads it twice: leave it out, or pass token ids",
            stacklevel=2,
        )
    return [*bos, *tokens]
