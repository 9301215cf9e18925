"""The forms in which prompts come, brought to three: text, chat messages of text, token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ponder.arguments import shorten

__all__ = ["as_list", "plain", "refusal"]


def as_list(prompt: Any) -> Any:
    """Return an array of texts (or of other objects) as Python has them; anything else as it is."""
    if not hasattr(prompt, "__array__") or isinstance(prompt, jax.Array):
        return prompt
    array = np.asarray(prompt)  # as of pandas
    return array.tolist() if array.dtype.kind in "UO" else prompt


def plain(prompt: Any) -> Any:
    """Return one prompt with the content of its messages as text; what is no chat stays as it is.

    Content may come in parts, `[{"type": "text", "text": ...}, ...]`, as vision models and servers have it:
    their texts are joined, with nothing between them.

    Raises:
        TypeError: a message has no role, or content that is not text.
        ValueError: some text has lone surrogates.
    """
    prompt = as_list(prompt)
    if isinstance(prompt, str):
        _check_text(prompt, "prompt")
    elif isinstance(prompt, list | tuple) and len(prompt) and isinstance(prompt[0], Mapping):
        return [_message(message, f"prompt: message {i}") for i, message in enumerate(prompt)]
    return prompt


def refusal(prompt: Any) -> str:
    """Say what came instead of a prompt, and what to do about it: the end of an error."""
    got, hint = type(prompt).__name__, ""
    if isinstance(prompt, list | tuple | np.ndarray | jax.Array):
        try:
            array = np.asarray(prompt)
        except (ValueError, OverflowError):  # rows of different lengths
            array = np.asarray(prompt, object)
        kinds = sorted({"str" if isinstance(x, str) else type(x).__name__ for x in np.ravel(array)})
        told = f"of {', '.join(kinds)}" if array.dtype.kind in "UO" else f"and dtype {array.dtype}"
        got = f"{got} of shape {array.shape} {told}"
        if array.ndim == 2 and array.dtype.kind in "iu":
            hint = "; several prompts are a list of them, each without padding"
    elif isinstance(prompt, Mapping):
        hint = "; a chat is a list of messages"
    elif isinstance(prompt, bytes):
        hint = "; decode it"
    return f"got {got}{hint}"


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TypeError(f"{name}: expected a dict with 'role' and 'content', got {_quoted(message)}")
    if "content" not in message:
        raise TypeError(f"{name}: expected a dict with 'role' and 'content', got only {sorted(message)}")
    content = message["content"]
    if content is None and message.get("tool_calls"):  # what templates for tools expect
        return dict(message)
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "".join(_part(part, f"{name}: part {i}") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise TypeError(f"{name}: expected content that is text, got {_quoted(content)}")
    _check_text(content, name)
    return {**message, "content": content}


def _part(part: Any, name: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected {{'type': 'text', 'text': ...}}, got {_quoted(part)}")
    return text


def _check_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: expected text that UTF-8 can write, got {_quoted(text)}: a lone surrogate at "
            f"{error.start}, as of bytes that were decoded with surrogateescape"
        ) from error


def _quoted(value: Any) -> str:
    return shorten(ascii(value) if isinstance(value, str) else repr(value), 80)
