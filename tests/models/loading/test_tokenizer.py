"""The tokenizer's promises: bytes of tokens, text of ids, chat templates."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ponder.models.loading.tokenizer import HubTokenizer
from ponder.models.protocols import Tokenizer as TokenizerProtocol

TRICKY = [
    "",
    " leading and trailing ",
    "a  1\n\n\t12  345.678e-9",
    "naïve café — “quoted” ﬁ",
    "🙂👩‍🚀🏳️‍🌈 𝔘𝔫𝔦",  # noqa: RUF001
    "日本語と한국어 и русский",
    "\x00\x01\x7f\u00a0\u00ad\u200b\r\n",
    "def f(x):\n    return {x: [1, 2]}\n",
]


@pytest.fixture
def toy():
    """Build a tokenizer over a few byte-level tokens, with the given extra settings."""
    from transformers import PreTrainedTokenizerFast

    def build(*, decoder=None, **settings):
        vocab = {token: i for i, token in enumerate([*"abc", "Ġ", "Ã", "©", "Ġa"])}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a")]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoder or decoders.ByteLevel()
        return HubTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **settings))

    return build


@pytest.mark.parametrize("text", TRICKY)
def test_bytes_of_tokens_are_the_bytes_of_the_text(text, smollm2):
    tokenizer = smollm2.tokenizer
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    assert tokenizer.decode(ids) == text


def test_characters_split_across_tokens(smollm2):
    """No token of this emoji is valid UTF-8 by itself, yet together they are."""
    ids = smollm2.tokenizer.encode("🦙")
    pieces = [smollm2.tokenizer.token_bytes(i) for i in ids]
    assert len(ids) > 1
    assert b"".join(pieces) == "🦙".encode()
    assert "\ufffd" in smollm2.tokenizer.decode(ids[:1])


def test_special_and_unused_ids_have_no_bytes(smollm2):
    tokenizer = smollm2.tokenizer
    assert [tokenizer.token_bytes(i) for i in range(17)] == [b""] * 17
    assert tokenizer.token_bytes(17) == b"!"
    assert tokenizer.vocab_size == 49152
    assert tokenizer.token_bytes(49152) == b""
    assert tokenizer.decode([1, 17, 2, 49152, 10**6]) == "!"
    with pytest.raises(ValueError, match="token_id: expected a non-negative int, got -1"):
        tokenizer.token_bytes(-1)


def test_bytes_without_a_token(smollm2):
    """SmolLM2 cannot write these bytes: six control characters, and what UTF-8 has next to no use for."""
    single = {smollm2.tokenizer.token_bytes(i) for i in range(smollm2.vocab_size)}
    absent = {byte for byte in range(256) if bytes([byte]) not in single}
    assert absent == {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
    assert smollm2.tokenizer.decode(smollm2.tokenizer.encode("a\x04b")) == "ab"


def test_chat_template(smollm2):
    tokenizer = smollm2.tokenizer
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert all(type(i) is int for i in ids)
    text = tokenizer.hub_tokenizer.decode(ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tokenizer.bos_token_id) == 3  # one for each turn, none in front
    assert ids[0] == tokenizer.bos_token_id
    assert not tokenizer.adds_bos


QUESTION = {"role": "user", "content": "Hi"}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRIMMED = CHATML.replace("m.content", "m.content | trim")
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)


def rendered(tokenizer, monkeypatch, messages, **variables):
    """Return the text that a chat becomes."""
    seen = []
    monkeypatch.setattr(tokenizer, "encode", lambda text: seen.append(text) or [0])
    assert tokenizer.apply_chat_template(messages, **variables) == [0]
    return seen[0]


@pytest.mark.parametrize(
    ("template", "content", "end"),
    [
        (CHATML, "The answer is", "assistant\nThe answer is"),
        (CHATML, "The answer is ", "assistant\nThe answer is "),
        (CHATML, "a<|im_end|>\nb", "assistant\na<|im_end|>\nb"),
        (CHATML, "Hi", "assistant\nHi"),  # the user said the same
        (CHATML, "", "assistant\n"),
        (TRIMMED, "The answer is ", "assistant\nThe answer is"),
        (TRIMMED, "", "assistant\n"),
        (LLAMA2, "The answer is", "[INST] Hi [/INST] The answer is"),
        (LLAMA2, "", "[INST] Hi [/INST]"),
    ],
)
def test_a_chat_that_ends_with_the_assistant_is_continued(template, content, end, toy, monkeypatch):
    chat = [QUESTION, {"role": "assistant", "content": content}]
    text = rendered(toy(chat_template=template), monkeypatch, chat)
    assert text.endswith(end)
    assert text.count("assistant") == (template != LLAMA2)
    # Any other chat is answered by a new turn, also one that has the assistant's turns in it.
    text = rendered(toy(chat_template=template), monkeypatch, [*chat, QUESTION])
    assert text.endswith("[/INST]" if template == LLAMA2 else "<|im_start|>assistant\n")


def test_an_open_turn_of_the_embedded_model(smollm2):
    tokenizer, answer = smollm2.tokenizer, {"role": "assistant", "content": "The answer is"}
    ids = tokenizer.apply_chat_template([QUESTION, answer])
    assert ids == tokenizer.apply_chat_template([QUESTION]) + tokenizer.encode("The answer is")


def test_a_call_of_a_tool_is_not_continued(toy, monkeypatch):
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    text = rendered(toy(chat_template=CHATML), monkeypatch, [QUESTION, message])
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


VARIABLES = (
    "{% if tools %}{{ tools | length }} tools {{ tools[0].function.name }} {% endif %}"
    "{{ messages[0].content }}"
    "{% if enable_thinking is defined and not enable_thinking %} /no_think{% endif %}"
)


def test_variables_of_the_template(toy, monkeypatch):
    def text(**variables):
        return rendered(toy(chat_template=VARIABLES), monkeypatch, [QUESTION], **variables)

    assert text() == "Hi"
    assert text(enable_thinking=False) == "Hi /no_think"
    assert text(enable_thinking=True) == "Hi"
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    assert text(tools=[tool], enable_thinking=False) == "1 tools add Hi /no_think"
    assert text(chat_template="{{ other }}", other="x") == "x"
    with pytest.warns(UserWarning, match="the chat template does not read enable_thinkin, which changes"):
        assert text(enable_thinkin=False) == "Hi"
    for name in ("add_generation_prompt", "continue_final_message", "tokenize", "return_tensors"):
        with pytest.raises(TypeError, match=f"expected those of the chat template, got '{name}'"):
            text(**{name: True})


def test_bad_messages(smollm2, toy):
    for messages in ("Hi", {"role": "user", "content": "Hi"}, [{"role": "user"}], ["Hi"]):
        with pytest.raises(TypeError, match="messages: expected dicts with 'role' and 'content'"):
            smollm2.tokenizer.apply_chat_template(messages)
    with pytest.raises(ValueError, match="at least one message"):
        smollm2.tokenizer.apply_chat_template([])
    with pytest.raises(ValueError, match="no chat template"):
        toy().apply_chat_template([{"role": "user", "content": "Hi"}])


def test_added_tokens(toy):
    tokenizer = toy(bos_token="<s>", eos_token="</s>")
    tokenizer.hub_tokenizer.add_tokens(["Ġthink é"])
    bos, eos, think = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.encode("Ġthink é")
    assert (bos, eos) == (7, 8)
    # An added token stands for its own characters, also where they occur in the byte alphabet.
    assert [tokenizer.token_bytes(i) for i in (bos, eos, *think)] == [b"", b"", "Ġthink é".encode()]
    assert tokenizer.token_bytes(tokenizer.encode(" a")[0]) == b" a"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("é"))) == "é".encode()


def test_sentencepiece_style_tokens():
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<0xF0>", "<0x0A>", "\u2581the", "\u2581\u2581", "x<0x41>"]
    backend = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = HubTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert [tokenizer.token_bytes(i) for i in range(6)] == [b"", b"\xf0", b"\n", b" the", b"  ", b"x<0x41>"]


def test_unknown_spelling_is_refused(toy):
    tokenizer = toy(decoder=decoders.WordPiece())
    with pytest.raises(NotImplementedError, match=r"expected a ByteLevel.*got \['WordPiece'\]"):
        tokenizer.token_bytes(0)


def test_identity_and_protocol(toy):
    one, other = toy(), toy()
    assert isinstance(one, TokenizerProtocol)
    assert one == one and one != other and len({one, other}) == 2


def test_wrong_arguments(smollm2, tmp_path):
    with pytest.raises(TypeError, match="text: expected a str, got bytes"):
        smollm2.tokenizer.encode(b"abc")
    with pytest.raises(TypeError, match="expected a fast transformers tokenizer"):
        HubTokenizer(object())
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json"):
        HubTokenizer.from_directory(tmp_path)


def test_splitting_rules_of_the_file_win_over_the_named_class(smollm2, tmp_path):
    """AutoTokenizer would rebuild GPT-2's own rules here and break SmolLM's blanks before digits."""
    import json

    smollm2.tokenizer.hub_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    again = HubTokenizer.from_directory(tmp_path)
    assert again.encode("a  1") == smollm2.tokenizer.encode("a  1")
    assert len(again.encode("a  1")) == 3


@pytest.fixture
def directory(toy, tmp_path):
    toy(chat_template="{{ messages[0]['content'] }}", eos_token="a").hub_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_prompt_is_never_cut_or_filled_up(directory):
    """A tokenizer.json may ask for both."""
    edit(
        directory / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        },
    )
    assert HubTokenizer.from_directory(directory).encode("abcabc") == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "null", "[" * 100_000, '{"model": {"type": "BPE", "vocab": 3, "merges": []}}'],
)
def test_malformed_files(text, directory):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if name == "tokenizer_config.json" and text == "{}":
            continue
        whole = (directory / name).read_text()
        (directory / name).write_text(text)
        if name == "tokenizer_config.json" and text.startswith('{"model"'):
            HubTokenizer.from_directory(directory)  # an unknown setting
        else:
            with pytest.raises(ValueError, match=r"^the tokenizer in '.*' cannot be used: .+$") as caught:
                HubTokenizer.from_directory(directory)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
        (directory / name).write_text(whole)


def test_absurd_ids(directory):
    path = directory / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["vocab"]["c"] = 2**32 - 1
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="expected token ids from 0 to 16777216, got 4294967295"):
        HubTokenizer.from_directory(directory)


def test_unknown_decoder_is_refused_while_loading(directory):
    edit(
        directory / "tokenizer.json",
        decoder={"type": "CTC", "pad_token": "x", "word_delimiter_token": "|", "cleanup": True},
    )
    with pytest.raises(NotImplementedError, match="cannot tell the bytes"):
        HubTokenizer.from_directory(directory)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ raise_exception('no system role') }}",
        "{{ undefined_name.attribute }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set messages.x = 1 %}",
        "{{ messages.append(1) }}",
    ],
)
def test_hostile_chat_templates(template, directory):
    """The sandbox keeps a template from Python's internals; what it raises becomes one error."""
    (directory / "chat_template.jinja").write_text(template)
    tokenizer = HubTokenizer.from_directory(directory)
    message = {"role": "user", "content": "abc"}
    with pytest.raises(ValueError, match=r"^messages: the tokenizer's chat template fails: .+$"):
        tokenizer.apply_chat_template([message])


def test_code_that_comes_with_a_model_is_not_run(directory, monkeypatch):
    """Without tokenizer.json, transformers would offer to run it: on the terminal, which would hang."""
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text("{}")
    (directory / "ran.py").write_text(f"open({str(directory / 'ran')!r}, 'w')")
    edit(
        directory / "tokenizer_config.json",
        tokenizer_class="Ran",
        auto_map={"AutoTokenizer": ["ran.Ran", "ran.Ran"]},
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(ValueError, match="cannot be used"):
        HubTokenizer.from_directory(directory)
    assert not (directory / "ran").exists()
