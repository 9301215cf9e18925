"""The blank with which sentencepiece begins a text: who is told of it, and that all read the same text."""

import jax
import pytest

import ponder
from ponder.models import TableLM
from ponder.models.loading.gguf_tokenizer import read_tokenizer
from ponder.program.opening import opening_blank
from ponder.protocols import Context

PIECES = ["<unk>", "<s>", "</s>", "▁", *"YesNohi[]/\n", "Ye", "Yes", "No", "▁Yes", "▁No"]
PIECES = list(dict.fromkeys(PIECES))
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[' + m.content + '/]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Turns begin on lines of their own: the assistant's first word is the next of a line.
LINES = (
    "{{ bos_token }}{% for m in messages %}{{ '\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}\n{% endif %}"
)
CHAT = [{"role": "user", "content": "hi"}]
BOS, YES, BLANK_YES = 1, PIECES.index("Yes"), PIECES.index("▁Yes")


def model(template):
    size = len(PIECES)
    tokenizer = read_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": PIECES,
            "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (size - 3),
            "tokenizer.ggml.scores": [-float(i) for i in range(size)],
            "tokenizer.chat_template": template,
        }
    )
    return TableLM.random(jax.random.key(0), size, scale=1.0, eos_token_ids=(2,), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def lm():
    return model(LLAMA2)


def build(lm, potential, prompt=CHAT):
    return ponder.Generation(lm, prompt, max_new_tokens=4, potential=potential)


def test_the_natural_first_token(lm):
    tokenizer = lm.tokenizer
    ids = tokenizer.apply_chat_template([*CHAT, {"role": "assistant", "content": "Yes"}])
    assert ids == [*tokenizer.apply_chat_template(CHAT), BLANK_YES]
    assert tokenizer.decode([BLANK_YES]) == " Yes"  # what Posterior.text shows, and what constraints read


@pytest.mark.parametrize("prompt", [CHAT, [BOS], [4, 5, BOS]])
def test_options_that_are_starved_for_want_of_a_blank(lm, prompt):
    with pytest.warns(
        UserWarning, match=r"choice\(\['Yes', 'No'\]\): .* writes 'Yes' as ' Yes'.*choice\(\[' Yes'"
    ):
        build(lm, ponder.choice(["Yes", "No"]), prompt)
    with pytest.warns(UserWarning, match=r"regex\('Yes\|No'\): .* begins a text with a blank"):
        build(lm, ponder.regex("Yes|No"), prompt)
    # One of several prompts, or a product: it is told all the same.
    with pytest.warns(UserWarning, match="begins a text with a blank"):
        build(lm, ponder.choice(["Yes", "No"]) * ponder.tokens(forbid=[3]), [prompt, prompt])


@pytest.mark.parametrize("options", [[" Yes", " No"], ["Yes", " No"], [" Yes", ""]])
def test_options_that_begin_with_the_blank(lm, options):
    program = build(lm, ponder.choice(options))
    logits = program.potential.token_logits(program.potential.init(1))
    assert logits[0, BLANK_YES if " Yes" in options else PIECES.index("▁No")] == 0
    build(lm, ponder.regex(" ?(Yes|No)"))


def test_where_no_blank_belongs(lm):
    """After other text; in a turn that is open; with a template after which the first word has none."""
    options = ponder.choice(["Yes", "No"])
    for prompt in ("hi", [4, 5], [*CHAT, {"role": "assistant", "content": "Yes"}]):
        build(lm, options, prompt)
    build(model(LINES), options)
    # What ends the prompt decides, not the kind of tokenizer.
    with pytest.warns(UserWarning, match="blank"):
        build(model(LINES), options, [BOS])


def test_byte_level_tokenizers_begin_with_no_blank():
    tokens = ["<s>", "</s>", *"Yeshi", "Ġ"]
    tokenizer = read_tokenizer(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [*dict.fromkeys(tokens)],
            "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 1],
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.chat_template": "{% for m in messages %}{{ '<s>' + m.content + '</s>' }}{% endfor %}",
        }
    )
    lm = TableLM.random(jax.random.key(0), 8, scale=1.0, eos_token_ids=(1,), tokenizer=tokenizer)
    prompt = tuple(tokenizer.apply_chat_template(CHAT))
    assert prompt == (0, 5, 6, 1)
    for context in (Context(lm, 4, (prompt,), (CHAT,)), Context(lm, 4, ((0,),), ("",))):
        assert opening_blank(context) == ""


def test_templates_that_cannot_be_asked():
    """One that refuses, or that changes what comes before: nothing is claimed."""
    for template in (
        "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
        "{{ messages | length }}{{ messages[-1].content }}",
        "no text of the messages",
    ):
        lm = model(template)
        assert opening_blank(Context(lm, 4, ((4, 5),), (CHAT,))) == ""
    assert opening_blank(Context(lm, 4)) == ""
