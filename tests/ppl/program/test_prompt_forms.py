"""Forms in which prompts come: what is read, and what is refused in our words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder.models import PieceTokenizer, TableLM
from ponder.program.prompts import encode_prompts


@pytest.fixture(scope="module")
def lm():
    tokenizer = PieceTokenizer((b"a", b"b", b"c", b""))
    return TableLM.random(jax.random.key(7), 4, eos_token_ids=(3,), tokenizer=tokenizer)


def chat(content, **others):
    return [{"role": "user", "content": content, **others}]


def text(value):
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (np.str_("ab"), (0, 1)),
        (np.array("ab"), (0, 1)),
        (np.array([0, 1], object), (0, 1)),
        (chat([text("a"), text("bc")]), (0, 1, 2)),
        (chat((text("a"),)), (0,)),
        ([*chat("a"), {"role": "assistant", "content": [text("b")]}], (0, 1)),
        (np.array(["a", "bc"]), [(0,), (1, 2)]),
        (np.array(["a", "bc"], object), [(0,), (1, 2)]),
        (np.array([[0], [1, 2]], object), [(0,), (1, 2)]),
        ([np.array([0]), np.array("bc"), chat([text("b")])], [(0,), (1, 2), (1,)]),
    ],
    ids=repr,
)
def test_what_is_read(lm, prompt, expected):
    found, is_batch = encode_prompts(lm, prompt, 4)
    assert found == (tuple(expected) if is_batch else (expected,))
    assert is_batch == isinstance(expected, list)


LONE = "a\ud800b"


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (
            LONE,
            ValueError,
            r"expected text that UTF-8 can write, got 'a\\ud800b': a lone surrogate at 1",
        ),
        (["a", LONE], ValueError, "prompt 1 of 2: .*lone surrogate"),
        (np.array([LONE]), ValueError, "prompt 0 of 1: .*lone surrogate"),
        (chat(LONE), ValueError, "prompt: message 0: expected text that UTF-8 can write"),
        (chat([text("a"), text(LONE)]), ValueError, "message 0: .*lone surrogate at 2"),
        (chat(None), TypeError, "prompt: message 0: expected content that is text, got None"),
        (chat(3), TypeError, "message 0: expected content that is text, got 3"),
        (chat(b"a"), TypeError, "message 0: expected content that is text, got b'a'"),
        (chat(["a"]), TypeError, r"message 0: part 0: expected {'type': 'text', 'text': ...}, got 'a'"),
        (chat([text("a"), {"type": "image"}]), TypeError, "message 0: part 1: .*got {'type': 'image'}"),
        (chat([{"type": "text"}]), TypeError, "message 0: part 0: expected"),
        ([*chat("a"), None], TypeError, "message 1: expected a dict with 'role' and 'content', got None"),
        (
            [{"content": "a"}],
            TypeError,
            "message 0: expected a dict .*, got {'content'",
        ),
        ([{"role": 1, "content": "a"}], TypeError, "message 0: expected a dict with 'role'"),
        ([{"role": "user"}], TypeError, r"message 0: .* got only \['role'\]"),
        (chat("a")[0], TypeError, "prompt: .* got dict; a chat is a list of messages$"),
        ([*chat("a"), "b"], TypeError, "prompt 0 of 2: .* got dict; a chat is a list of messages"),
        (None, TypeError, "prompt: expected a str, chat messages or a sequence of token ids, got NoneType$"),
        ([None], TypeError, r"got list of shape \(1,\) of NoneType$"),
        (["a", None], TypeError, "prompt 1 of 2: .* got NoneType$"),
        ([0, None], TypeError, r"got list of shape \(2,\) of NoneType, int$"),
        (b"ab", TypeError, "got bytes; decode it$"),
        (np.array([[0, 1], [1, 2]]), TypeError, "several prompts are a list of them, each without padding"),
        (jnp.zeros((1, 2), jnp.int32), TypeError, "several prompts are a list of them"),
        ([[["a"]]], TypeError, r"prompt 0 of 1: .* got list of shape \(1, 1\) of str$"),
        ([2**70], TypeError, r"got list of shape \(1,\) of int$"),
    ],
    ids=repr,
)
def test_what_is_refused(lm, prompt, error, message):
    with pytest.raises(error, match=message):
        encode_prompts(lm, prompt, 4)


def test_content_may_be_missing_beside_tool_calls(lm):
    """As servers have it; what the template makes of it is its own affair."""
    with pytest.raises(TypeError, match="sequence item 0"):  # that of a table joins contents
        encode_prompts(lm, chat(None, tool_calls=[{"type": "function"}]), 4)


def test_reward_models_get_the_text_too(lm):
    seen = []
    reward = ponder.text_reward(lambda prompt, texts: seen.append(prompt) or [0.5] * len(texts))
    evidence = ponder.process_reward(reward)
    program = ponder.Generation(lm, chat([text("a"), text("b")]), max_new_tokens=1, potential=evidence)
    state = program.potential.update(program.potential.init(1), jnp.zeros(1, jnp.int32), jnp.ones(1, bool))
    program.potential.log_complete(state)
    assert seen == ["ab"]
    batch = ponder.Generation(lm, np.array(["a", "bc"]), max_new_tokens=1)
    assert batch.num_prompts == 2 and batch.prompt_length.tolist() == [1, 2]
