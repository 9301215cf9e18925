r"""What a judge reads: its token ids against those that its published recipe gives, written out here.

The recipes encode the whole text at once, as their model cards do; the judge gets the trace step by step, in
the policy's tokens. The tokenizers are small ones of the kinds that the models have, with their templates.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder.models import PieceTokenizer, TableLM
from ponder.models.loading.reward_layouts import FORMS
from ponder.models.loading.reward_loading import _form, _separator_ids
from ponder.models.loading.tokenizer import HubTokenizer, _byte_level_alphabet
from ponder.models.step_form import StepForm, encode_after
from ponder.protocols import Context

QUESTION = "How many are 2*3 and 4?"
STEPS = ["First 2*3=6.", "Then 6+4=10.", "The answer is 10"]

QWEN_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\\n' + messages[0]['content'] + "
    "'<|im_end|>\\n' }}{% else %}{{ '<|im_start|>system\\nPlease reason step by step, and put your final "
    "answer within \\\\boxed{}.<|im_end|>\\n' }}{% endif %}{% for message in messages %}{% if "
    "message['role'] != 'system' %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% endif %}"
)
LLAMA_CHAT = (
    "{{ '<|begin_of_text|>' }}{% if messages[0]['role'] != 'system' %}{{ '<|start_header_id|>system"
    "<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n\\n<|eot_id|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
    "message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def byte_level(template, special, **settings):
    """BPE over bytes with the splitting rule of Qwen and Llama 3; full stops merge with line breaks."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = {byte[0]: char for char, byte in _byte_level_alphabet().items()}
    vocab = {letters[byte]: byte for byte in range(256)}
    blank, line, stop, ask = (letters[ord(char)] for char in " \n.?")
    merges = [(blank, "a"), (line, line), (stop, line), (stop, line + line), (ask, line), ("T", "h")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return HubTokenizer.from_backend(tokenizer, chat_template=template, **settings)


def sentencepiece():
    """BPE with byte fallback that begins every text with a blank, as Mistral's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    words = [
        ("к", "и"),
        ("\u2581", "ки"),
        ("\u2581", "+"),
        ("\u2581", "-"),
        ("\u2581", "S"),
        ("\u2581S", "t"),
    ]
    words += [("\u2581", "T"), ("\u2581T", "h"), ("T", "h"), ("\u2581", "F")]
    chars = "\u2581ки" + "".join(map(chr, range(33, 127)))
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>"])}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in [*chars, *("".join(pair) for pair in words)]:
        vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, words, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return HubTokenizer.from_backend(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


IM = ["<extra_0>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """A reward model of which only the tokenizer and the form matter."""

    tokenizer: HubTokenizer
    form: StepForm
    separator: tuple[int, ...]

    @property
    def vocab_size(self):
        return 1000

    def prefill(self, tokens, num_particles, max_new_tokens):
        return tokens, jnp.full(num_particles, 0.5)

    def prefill_many(self, tokens, lengths, num_particles, max_new_tokens):
        return tokens, jnp.full(len(lengths) * num_particles, 0.5)

    def extend(self, cache, tokens):
        return cache, jnp.full(tokens.shape[0], 0.5)

    def extend_block(self, cache, tokens, lengths):
        return cache, jnp.full(tokens.shape[0], 0.5)

    def fork(self, cache, ancestors):
        return cache


def judge(layout, tokenizer, separator=None):
    form = _form(layout, separator)
    config = type("Config", (), {"vocab_size": 1000})
    return Judge(tokenizer, form, _separator_ids(layout, form, separator, tokenizer, config))


def policy(pieces):
    """A policy that writes these tokens; the last one is EOS."""
    pieces = (*pieces, b"")
    eos = len(pieces) - 1
    table = jnp.zeros((len(pieces), len(pieces)))
    return TableLM(table, eos_token_ids=(eos,), tokenizer=PieceTokenizer(pieces))


def read(prm, units, source, delimiters=("\n\n",), prompt=None):
    """The ids that a judge reads of a trace in units of a policy's tokens, up to the last separator."""
    pieces = tuple(dict.fromkeys(piece for unit in units for piece in unit))
    lm = policy(pieces)
    context = Context(
        lm, 64, ((0,),), sources=(source,), max_units=8, max_unit_tokens=32, delimiters=delimiters
    )
    scorer = ponder.process_reward(prm, prompt=prompt).bind(context).scorer
    ids = [int(i) for i in scorer.prompt[0, : int(scorer.prompt_length[0])]]
    leftover = scorer.translation.init(1)
    for unit in units:
        tokens = [pieces.index(piece) for piece in unit]
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        # On the host, without a call from compiled code.
        visible = np.array([bool(b"".join(unit).strip())])
        leftover, read, lengths = scorer.translation._on_host(
            leftover, padded, np.array([len(tokens)]), visible
        )
        if lengths[0]:
            ids += [*read[0, : lengths[0]].tolist(), *prm.separator]
    return ids


# One text of the policy, cut in three ways: empty lines between steps, and tokens that hide delimiters.
TEXT = "First 2*3=6.\n\nThen 6+4=10.\n\n\n\nThe answer is 10"
CUTS = {
    "plain": [
        [b"First", b" 2*3=6.", b"\n\n"],
        [b"Then 6+4", b"=10.", b"\n\n"],
        [b"\n\n"],
        [b"The answer is 10"],
    ],
    "merged": [[b"First 2*3=6", b".\n\n"], [b"Then 6+4=10", b".\n\n\n\n"], [b"The answer", b" is 10"]],
    "small": [
        [b"First 2*3=6", b".", b"\n", b"\n"],
        [b"Then", b" 6+4=10.", b"\n", b"\n\n"],
        [b"\n", b"The answer is 10"],
    ],
}
assert all(b"".join(piece for unit in units for piece in unit).decode() == TEXT for units in CUTS.values())

CHAT = [{"role": "user", "content": QUESTION}]


def qwen_recipe(tokenizer, steps, system=None):
    """The model card of Qwen2.5-Math-PRM: the chat, encoded as a whole; scores at the ids of <extra_0>."""
    messages = [
        {
            "role": "system",
            "content": "Please reason step by step, and put your final answer within \\boxed{}.",
        },
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"},
    ]
    hub = tokenizer.hub_tokenizer
    text = hub.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    ids = hub.encode(text)
    places = [place for place, token in enumerate(ids) if token == hub.encode("<extra_0>")[0]]
    assert len(places) == len(steps)
    return ids[: places[-1] + 1]


def shepherd_recipe(tokenizer, steps):
    """The model card of Math-Shepherd: question, a blank, and lines that end with the tag."""
    hub = tokenizer.hub_tokenizer
    ids = hub.encode(QUESTION + " " + "\n".join(f"{step} ки" for step in steps))
    assert [ids.count(hub.encode("ки")[-1]), hub.encode("ки")[-1]] == [len(steps), ids[-1]]
    return ids


def rlhflow_recipe(tokenizer, steps):
    """`prm_evaluate.py` of RLHFlow: a chat of steps and "+"; read at the place -3, which predicts the "+"."""
    conversation = []
    for k, step in enumerate(steps):
        text = QUESTION + " " + step if k == 0 else step
        conversation += [{"content": text, "role": "user"}, {"content": "+", "role": "assistant"}]
    hub = tokenizer.hub_tokenizer
    ids = hub.encode(hub.apply_chat_template(conversation, tokenize=False), add_special_tokens=False)
    return ids[: len(ids) - 2]  # up to the place -3


def skywork_recipe(tokenizer, steps):
    """`prepare_input` of skywork-o1-prm-inference, with "\\n" as the step token."""
    hub = tokenizer.hub_tokenizer
    ids = hub.encode(hub.bos_token + QUESTION + "\n")
    for step in steps:
        ids += [*hub.encode(step), hub.encode("\n")[-1]]
    return ids


def trl_recipe(tokenizer, steps):
    """`tokenize_row` of TRL's PRMTrainer: every completion by itself, and the separator's ids."""
    hub = tokenizer.hub_tokenizer
    ids = hub.encode(QUESTION, add_special_tokens=False)
    for step in steps:
        ids += hub.encode(step, add_special_tokens=False) + hub.encode("\n\n", add_special_tokens=False)
    return ids


RECIPES = {
    "qwen2.5-math-prm": (qwen_recipe, lambda: byte_level(QWEN_CHAT, IM), CHAT, None),
    "math-shepherd": (shepherd_recipe, sentencepiece, CHAT, None),
    "rlhflow": (rlhflow_recipe, lambda: byte_level(LLAMA_CHAT, HEADERS), CHAT, None),
    "skywork-o1-prm": (
        skywork_recipe,
        lambda: byte_level(QWEN_CHAT, IM, bos_token="<|endoftext|>"),
        QUESTION,
        None,
    ),
    "classification": (trl_recipe, lambda: byte_level(QWEN_CHAT, IM), QUESTION, "\n\n"),
}


@pytest.mark.parametrize("layout", RECIPES)
def test_a_judge_reads_what_its_recipe_gives(layout):
    """After every step, however the policy cut the text."""
    recipe, make, source, separator = RECIPES[layout]
    tokenizer = make()
    prm = judge(layout, tokenizer, separator)
    for units in CUTS.values():
        assert read(prm, units, source) == recipe(tokenizer, STEPS)
    for count in (1, 2):
        assert read(prm, CUTS["merged"][:count], source) == recipe(tokenizer, STEPS[:count])


@pytest.mark.parametrize("layout", RECIPES)
def test_text_and_chats_are_the_same_question(layout):
    """As the program's prompt and as `prompt=`; but a classifier reads prompts as they are given."""
    recipe, make, source, separator = RECIPES[layout]
    tokenizer = make()
    prm = judge(layout, tokenizer, separator)
    for given in (QUESTION, CHAT) if layout != "classification" else (QUESTION,):
        assert read(prm, CUTS["merged"], given) == recipe(tokenizer, STEPS)
        assert read(prm, CUTS["merged"], "something else", prompt=given) == recipe(tokenizer, STEPS)
    ids = tokenizer.encode(QUESTION)
    assert read(prm, [], source, prompt=ids) == ids


def test_every_layout_has_a_recipe():
    assert set(RECIPES) | {"likelihood"} == set(FORMS)


def test_a_chat_by_the_users_own_hand_is_read_as_it_is():
    tokenizer = byte_level(QWEN_CHAT, IM)
    text = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    assert read(judge("qwen2.5-math-prm", tokenizer), [], text) == tokenizer.encode(text)


def test_chats_that_are_no_question_are_refused():
    prm = judge("math-shepherd", sentencepiece())
    chat = [*CHAT, {"role": "assistant", "content": "10"}, {"role": "user", "content": "Why?"}]
    with pytest.raises(
        ValueError, match=r"one turn of the user, got the roles \['user', 'assistant', 'user'\]"
    ):
        read(prm, [], chat)
    other = byte_level(QWEN_CHAT, [*IM, *HEADERS])
    with pytest.raises(ValueError, match="expected the chat template to end a user's turn with"):
        read(judge("rlhflow", other), [], CHAT)


def test_tokenizers_of_other_models_are_refused():
    with pytest.raises(ValueError, match=r"'rlhflow' needs '<\|eot_id\|>' as one token"):
        judge("rlhflow", byte_level(QWEN_CHAT, IM))
    with pytest.raises(ValueError, match="layout 'rlhflow' has the turns of a chat between its steps"):
        judge("rlhflow", byte_level(LLAMA_CHAT, HEADERS), separator="\n")
    with pytest.raises(
        ValueError, match=r"StepForm\(trim\): expected one of 'none', 'end', 'both', got 'all'"
    ):
        StepForm(trim="all")


def test_ids_behind_a_text():
    """A sentencepiece tokenizer begins a text with a blank, which is not there in the middle."""
    encode = sentencepiece().encode
    assert encode_after(encode, "\n", "Then") == encode("\nThen")[2:] != encode("Then")
    assert encode_after(encode, "a", " ки") == encode("ки")
    assert encode_after(PieceTokenizer((b"a",)).encode, "\n", "aa") == [0, 0]  # cannot write "\n"
    merges = PieceTokenizer((b"a", b"aa")).encode
    assert encode_after(merges, "a", "a") == [0]


def test_ids_without_text_lose_their_delimiter():
    """A judge and a policy without tokenizers: the delimiter's id is cut off where the form says so."""
    form = StepForm(trim="both", tag="<extra_0>")
    prm = dataclasses.replace(judge("qwen2.5-math-prm", byte_level(QWEN_CHAT, IM)), tokenizer=None, form=form)
    lm = TableLM(jnp.zeros((1000, 1000)))
    seen = []

    def extend_block(self, cache, tokens, lengths):
        if not isinstance(tokens, jax.core.Tracer):
            seen.append(
                [row[:n].tolist() for row, n in zip(np.asarray(tokens), np.asarray(lengths), strict=True)]
            )
        return cache, jnp.full(tokens.shape[0], 0.5)

    prm = type("Seen", (Judge,), {"extend_block": extend_block})(None, form, prm.separator)
    context = Context(lm, 8, ((0,),), max_units=4, max_unit_tokens=4, delimiters=(10,))
    potential = ponder.process_reward(prm).bind(context)
    state, everyone = potential.init(2), jnp.ones(2, bool)
    for tokens in ([7, 10], [8, 10], [10, 3]):
        state = potential.update(state, jnp.asarray(tokens, jnp.int32), everyone)
    potential.commit(state, everyone)
    assert seen[-1] == [[7, 8], [10, 10, 3]]


def test_programs_hand_on_their_delimiters():
    lm = policy([b"a", b"\n"])
    prm = ponder.text_reward(lambda prompt, texts: [0.5 for _ in texts])
    for unit, expected in (("token", ()), (ponder.Step("\n"), ("\n",)), (ponder.Step([1, "a"]), (1, "a"))):
        program = ponder.Generation(
            lm, [0], max_new_tokens=4, unit=unit, potential=ponder.process_reward(prm)
        )
        assert program.potential.scorer.delimiters == expected
