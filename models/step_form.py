r"""What a process reward model is shown of a trace: the form that its steps had in training.

A trace holds whatever tokens the policy wrote. A reward model was trained on steps of one form, with its own
text between them, and is sure of itself also where it is shown another. So each model states its form, and
whoever feeds it brings the steps into that form:

    question, first + step 1, tag, between + step 2, tag, ..., between + step t, tag

with the score read at the last token of each tag. What follows a tag is only read when the next step comes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

__all__ = ["StepForm", "encode_after"]

_EMPTY_LINES = re.compile(r"\A\s*\n")
_TRIMS = ("none", "end", "both")
_QUESTIONS = ("as given", "text", "chat", "open turn")
_READS = ("classes", "tokens", "value")


@dataclasses.dataclass(frozen=True)
class StepForm:
    r"""How a reward model was shown steps in training; the default takes traces as they are.

    Attributes:
        trim: the blanks that a step loses: "none", those at its "end", or at "both" ends. With "none" the
            step keeps its delimiter. Empty lines before it are never kept, so that it does not matter where
            in a run of line breaks a step ends.
        question: what comes first. "as given": the prompt as it is, a chat by the model's template. "text":
            the question alone, from a chat the words of its user. "chat": a chat, of which text is the one
            turn of the user. "open turn": likewise, but the user's turn stays open for the first step.
        after_question: text that belongs to the question.
        first: text between the question and the first step.
        between: text between the tag and the next step.
        tag: text after each step; "" where the score is read at the last token of the step itself.
        joined: whether the whole was encoded as one text; if not, every step by itself.
        bos: whether the question begins with BOS wherever the tokenizer has one.
        read: where the score comes from: "classes", the logits of one or two classes; "tokens", the logits
            of two tokens of the vocabulary; "value", one linear output.

    Raises:
        ValueError: `trim`, `question` or `read` is none of these.
    """

    trim: str = "none"
    question: str = "as given"
    after_question: str = ""
    first: str = ""
    between: str = ""
    tag: str = ""
    joined: bool = True
    bos: bool = False
    read: str = "classes"

    def __post_init__(self) -> None:
        """Check the choices."""
        for name, known in (("trim", _TRIMS), ("question", _QUESTIONS), ("read", _READS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"StepForm({name}): expected one of {', '.join(map(repr, known))}, "
                    f"got {getattr(self, name)!r}"
                )

    @property
    def rewrites(self) -> bool:
        """Whether steps are read otherwise than as the trace has them, so that their text is needed."""
        return self.trim != "none" or bool(self.first or self.between)

    def trimmed(self, text: str) -> str:
        """Return the text of a step without the blanks that it loses; "" if it has no visible text."""
        if not text.strip():
            return ""
        text = _EMPTY_LINES.sub("", text)
        return {"none": text, "end": text.rstrip(), "both": text.strip()}[self.trim]

    def encode_step(self, encode: Callable[[str], list[int]], text: str, is_first: bool) -> list[int]:
        """Return the ids of a trimmed step with what stands before it, without the tag."""
        opening = self.first if is_first else self.between
        if not self.joined:
            return [*(encode(opening) if opening else ()), *encode(text)]
        # A tag ends a word; a question, and a chat's header, a line. A first blank joins on to a word.
        before = self.tag or "\n" if not is_first else "a" if opening else "\n"
        return encode_after(encode, before, opening + text)


def encode_after(encode: Callable[[str], list[int]], before: str, text: str) -> list[int]:
    """Return the ids that a text has behind another one.

    A sentencepiece tokenizer begins every text that it is given with a blank, which is not there in the
    middle of a text. Where the tokenizer merges across the border, or cannot write `before`, the text is
    encoded by itself.
    """
    try:
        start, whole = encode(before), encode(before + text)
    except ValueError:
        return encode(text)
    return whole[len(start) :] if whole[: len(start)] == start else encode(text)
