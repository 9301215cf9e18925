"""What a reward model reads before the trace: the program's prompt in the form of its training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from ponder.models.protocols import LanguageModel, RewardModel, capabilities
from ponder.models.step_form import StepForm, encode_after
from ponder.program.prompts import encode_prompt, encode_prompts, is_chat
from ponder.protocols import Context

__all__ = ["given_prompts", "judge_prompt", "translate_prompts"]


def judge_prompt(reader: RewardModel, source: Any) -> tuple[int, ...]:
    """Encode one prompt for a reader: text and chats in its form, ids as they are.

    Raises:
        TypeError: `source` is neither text, a chat nor ids.
        ValueError: it does not fit the form, there is no tokenizer for it, or an id is outside the
            vocabulary.
    """
    form, lm = capabilities(reader).form, cast("LanguageModel", reader)
    if form is None or form.question == "as given" or not (isinstance(source, str) or is_chat(source)):
        return encode_prompt(lm, source)
    if reader.tokenizer is None:
        raise ValueError("prompt: this model has no tokenizer; pass token ids")
    if form.question != "text" and not getattr(reader.tokenizer, "has_chat_template", True):
        raise ValueError(
            "prompt: this reward model was trained on chats, but its tokenizer has no chat template; pass "
            "the ids of the chat"
        )
    if form.question == "text":
        ids = encode_prompt(lm, _question(source) + form.after_question)
        bos = getattr(reader.tokenizer, "bos_token_id", None) if form.bos else None
        return ids if bos is None or ids[0] == bos else (bos, *ids)
    if isinstance(source, str):
        if not all(map(reader.tokenizer.token_bytes, reader.tokenizer.encode(source))):
            return encode_prompt(lm, source)  # it spells out special tokens: a chat by the user's own hand
        source = [{"role": "user", "content": source}]
    ids = encode_prompt(lm, source)
    return ids if form.question == "chat" else _opened(reader, form, ids)


def given_prompts(reader: RewardModel, prompt: Any) -> tuple[tuple[int, ...], ...]:
    """Encode what a user gave the reader to read: one prompt, or a list of several."""
    form = capabilities(reader).form
    if form is None or form.question == "as given":
        return encode_prompts(cast("LanguageModel", reader), prompt, 0)[0]
    several = isinstance(prompt, list | tuple) and any(
        isinstance(item, str | list | tuple) or getattr(item, "ndim", 0) > 0 for item in prompt
    )
    return tuple(judge_prompt(reader, item) for item in (prompt if several else [prompt]))


def translate_prompts(reader: RewardModel, context: Context, *, shared: bool) -> list[tuple[int, ...]]:
    """Encode the program's prompts with the reader's own tokenizer, in its form.

    Text and chats are taken as the user gave them. Ids, and prompts of which only the ids are known, are
    decoded first; but with `shared` ids they are read as they are.
    """
    decoder = context.lm.tokenizer
    assert decoder is not None
    translated = []
    for index, ids in enumerate(context.prompts):
        source = context.sources[index] if context.sources else None
        if not isinstance(source, str) and not is_chat(source):
            source = ids if shared else decoder.decode(ids)
        try:
            translated.append(judge_prompt(reader, source))
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"process_reward: the reward model's tokenizer cannot read the program's prompt: {error}; "
                "pass one that it can as prompt="
            ) from error
    return translated


def _question(source: str | Sequence[dict[str, str]]) -> str:
    """The words of a question."""
    if isinstance(source, str):
        return source
    asked = [message["content"] for message in source if message["role"] != "system"]
    if len(asked) != 1 or source[-1]["role"] != "user":
        raise ValueError(
            "prompt: this reward model reads a question; expected a chat with one turn of the user, "
            f"got the roles {[message['role'] for message in source]}"
        )
    return asked[0]


def _opened(reader: RewardModel, form: StepForm, ids: tuple[int, ...]) -> tuple[int, ...]:
    """Take off the end of the user's turn and the start of the assistant's: the tag."""
    assert reader.tokenizer is not None
    tag = tuple(encode_after(reader.tokenizer.encode, "a", form.tag))
    if ids[-len(tag) :] != tag:
        raise ValueError(
            f"prompt: expected the chat template to end a user's turn with {form.tag!r}, as in the training "
            "of this reward model"
        )
    return ids[: -len(tag)]
