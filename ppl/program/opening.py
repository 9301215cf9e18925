"""The blank that some tokenizers write before the first word of a text.

A sentencepiece tokenizer writes "Yes" as "▁Yes", which says " Yes", wherever a text begins: after a chat
prompt, say, as the assistant's first word. The text of a trace is what its tokens spell, that blank included,
for `Posterior.text` as for every potential. So a constraint whose texts do not begin with a blank forbids the
first token that the model was trained to write.
"""

from __future__ import annotations

import warnings
from typing import Any

from ponder.program.prompts import is_chat
from ponder.protocols import Context

__all__ = ["opening_blank", "warn_of_blank"]

_PROBE = "Yes"


def opening_blank(context: Context) -> str:
    """Return the blank with which the tokenizer begins a trace: " " or more, or "" where it writes none.

    Asked of the first prompt. Told where a text begins: after chat messages, and after a token without text
    such as BOS or the end of a turn. After other text a blank is the user's or the model's.
    """
    tokenizer = context.lm.tokenizer
    if tokenizer is None or not context.prompts:
        return ""
    prompt = list(context.prompts[0])
    source = context.sources[0] if context.sources else None
    try:
        if is_chat(source):
            written = list(tokenizer.apply_chat_template(_answered(source)))
            if written[: len(prompt)] != prompt:
                return ""
            written = written[len(prompt) :]
        elif tokenizer.token_bytes(prompt[-1]) == b"":
            written = tokenizer.encode(_PROBE)
        else:
            return ""
        text = tokenizer.decode(written)
    except (TypeError, ValueError):  # the template, or the vocabulary, cannot write the probe
        return ""
    blank = text[: len(text) - len(text.lstrip(" "))]
    return blank if text[len(blank) :].startswith(_PROBE) else ""


def warn_of_blank(name: str, context: Context) -> None:
    """Warn, where the tokenizer begins a trace with a blank, that none of the texts of a constraint does."""
    if blank := opening_blank(context):
        warnings.warn(
            f"{name}: after this prompt the tokenizer begins a text with a blank, and writes 'Yes' as "
            f"{blank + 'Yes'!r}. No text of this constraint begins with one, so that the model has to spell "
            "them as it never does. Where they are yours to choose, begin them with the blank, as in "
            "choice([' Yes', ' No']) or regex(' ?[0-9]+')",
            stacklevel=2,
        )


def _answered(messages: Any) -> list[dict[str, Any]]:
    """The chat with an answer of the assistant, or with more of the one that it ends with."""
    last = messages[-1]
    if last.get("role") == "assistant" and isinstance(last.get("content"), str):
        return [*messages[:-1], {**last, "content": last["content"] + _PROBE}]
    return [*messages, {"role": "assistant", "content": _PROBE}]
