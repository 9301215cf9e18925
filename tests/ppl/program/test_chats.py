"""Chats and text as prompts: open turns, variables of the template, a BOS too many. Nothing is compiled."""

import dataclasses

import jax
import pytest

import ponder
from ponder.models import PieceTokenizer, TableLM


@dataclasses.dataclass(frozen=True)
class Chatting(PieceTokenizer):
    """Adds BOS, token 3, to text and reads "^" as it; renders the contents, after a "b" if told to think."""

    adds_bos: bool = True
    bos_token_id: int = 3

    def encode(self, text):
        ids = []
        for number, part in enumerate(text.split("^")):
            ids += [3] * (number > 0) + PieceTokenizer.encode(self, part)
        return ids

    def apply_chat_template(self, messages, think=False):
        return [*([1] if think else []), *super().apply_chat_template(messages)]


@pytest.fixture(scope="module")
def lm():
    tokenizer = Chatting((b"a", b"b", b"c", b""))
    return TableLM.random(jax.random.key(0), 4, scale=1.0, eos_token_ids=(3,), tokenizer=tokenizer)


CHAT = [{"role": "user", "content": "ac"}]


def prompt_of(lm, prompt, **settings):
    program = ponder.Generation(lm, prompt, max_new_tokens=2, **settings)
    return [row[:n] for row, n in zip(program.prompt.tolist(), program.prompt_length.tolist(), strict=True)]


def test_variables_of_the_chat_template(lm):
    assert prompt_of(lm, CHAT) == [[0, 2]]
    assert prompt_of(lm, CHAT, chat_template_kwargs={}) == [[0, 2]]
    assert prompt_of(lm, CHAT, chat_template_kwargs={"think": True}) == [[1, 0, 2]]
    # Of several prompts, the chats.
    assert prompt_of(lm, [CHAT, "a"], chat_template_kwargs={"think": True}) == [[1, 0, 2], [3, 0]]


@pytest.mark.parametrize(
    ("prompt", "given", "error", "message"),
    [
        (CHAT, "think", TypeError, "chat_template_kwargs: expected a dict of variables by name, got 'think'"),
        (CHAT, {1: 2}, TypeError, r"chat_template_kwargs: expected a dict .*got \{1: 2\}"),
        (
            CHAT,
            {"thnk": 1},
            TypeError,
            "chat_template_kwargs: expected variables that Chatting takes, got thnk",
        ),
        ("ac", {"think": True}, ValueError, "chat_template_kwargs: only a chat has a template"),
        ([0, 2], {"think": True}, ValueError, "chat_template_kwargs: only a chat has a template"),
        (["a", [0, 1]], {"think": True}, ValueError, "chat_template_kwargs: only a chat has a template"),
    ],
)
def test_variables_that_cannot_be_passed(lm, prompt, given, error, message):
    with pytest.raises(error, match=message):
        ponder.Generation(lm, prompt, max_new_tokens=2, chat_template_kwargs=given)


def test_text_that_spells_bos_is_warned_of(lm):
    message = r"prompt: '\^ab' begins with the token 3 \(BOS\), which the tokenizer adds to text anyway"
    with pytest.warns(UserWarning, match=message):
        assert prompt_of(lm, "^ab") == [[3, 3, 0, 1]]
    with pytest.warns(UserWarning, match=message):  # wherever text is encoded
        ponder.Generation(lm, "a", max_new_tokens=2, potential=ponder.expert(lm, "^ab"))
    # Elsewhere in the text, in ids and in chats it is what was asked for.
    assert prompt_of(lm, "a^b") == [[3, 0, 3, 1]]
    assert prompt_of(lm, [3, 0]) == [[3, 0]]
    assert prompt_of(lm, [{"role": "user", "content": "^a"}]) == [[3, 0]]
    other = dataclasses.replace(lm, tokenizer=dataclasses.replace(lm.tokenizer, adds_bos=False))
    assert prompt_of(other, "^ab") == [[3, 0, 1]]
