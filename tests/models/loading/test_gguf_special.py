"""Special tokens of GGUF files, as llama.cpp finds them."""

import pytest

from ponder.models.loading.gguf_special import special_tokens
from ponder.models.loading.gguf_tokenizer import build_tokenizer, read_tokenizer
from ponder.models.loading.loading import load

SENTENCEPIECE = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a"]


def metadata(tokens, *, model="gpt2", pre="gpt-2", **fields):
    given = {"model": model, "pre": pre, "tokens": tokens, **fields}
    if model == "gpt2":
        given.setdefault("merges", [])
    else:
        given.setdefault("scores", [0.0] * len(tokens))
        given.setdefault("token_type", [2, 3, 3] + [1] * (len(tokens) - 3))
    return {f"tokenizer.ggml.{name}": value for name, value in given.items()}


@pytest.mark.parametrize(
    ("tokens", "ids", "ends"),
    [
        # The token that ends a text is named, that of a turn is not: the other way round in the second.
        (["a", "<|endoftext|>", "<|im_end|>"], {"eos": 1}, (1, 2)),
        (["a", "<|endoftext|>", "<|im_end|>"], {"eos": 2}, (2, 1)),
        (["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"], {"eos": 0}, (0, 1, 2)),
        (["a", "<end_of_turn>", "<eos>"], {}, (1, 2)),
        (["a", "b", "c"], {"eos": 2, "eot": 1, "eom": 0}, (2, 1, 0)),
        (["a", "b", "c"], {}, ()),
        (["<|fim_prefix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"], {}, (1, 2, 3)),
        (["a", "<|fim_pad|>", "b"], {"fim_pad": 2}, (2,)),
        # Harmony: <|end|> ends a message, not the turn.
        (["<|end|>", "<|return|>", "<|call|>"], {}, (1, 2)),
        (["<|end|>", "<|return|>"], {}, (0, 1)),
        (["<|im_end|", " <|im_end|>", "<|IM_END|>"], {}, ()),
    ],
)
def test_tokens_that_end_a_generation(tokens, ids, ends):
    given = {f"{name}_token_id": token_id for name, token_id in ids.items()}
    assert special_tokens(metadata(tokens, **given)).ends == ends


def test_tokens_that_end_have_no_text():
    """Whatever type the file gives them."""
    types = [1, 1, 4]
    tokenizer = read_tokenizer(metadata(["a", "<|im_end|>", "<|eot_id|>"], token_type=types))
    assert tokenizer.encode("a<|im_end|>a<|eot_id|>") == [0, 1, 0, 2]
    assert [tokenizer.token_bytes(i) for i in range(3)] == [b"a", b"", b""]


@pytest.mark.parametrize(
    ("pre", "flag", "adds"),
    [
        ("llama-bpe", None, True),
        ("llama3", None, True),
        ("llama-v3", None, True),
        ("llama-bpe", False, False),
        ("gpt-2", None, False),
        ("smollm", None, False),
        ("qwen2", None, False),
        ("qwen2", True, True),
    ],
)
def test_prompts_that_begin_with_bos(pre, flag, adds):
    given = {} if flag is None else {"add_bos_token": flag}
    tokenizer = read_tokenizer(
        metadata(["a", "<|begin_of_text|>"], pre=pre, token_type=[1, 3], bos_token_id=1, **given)
    )
    assert tokenizer.adds_bos is adds
    assert tokenizer.bos_token_id == 1
    assert tokenizer.encode("a") == [0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (1, 2, 0, True)),
        ({"bos_token_id": 2, "eos_token_id": 1}, (2, 1, 0, True)),
        ({"add_bos_token": False}, (1, 2, 0, False)),
    ],
)
def test_defaults_of_sentencepiece(given, expected):
    found = special_tokens(metadata(SENTENCEPIECE, model="llama", **given))
    assert (found.bos, found.eos, found.unknown, found.adds_bos) == expected
    tokenizer = build_tokenizer(metadata(SENTENCEPIECE, model="llama", **given))
    first = tokenizer.encode("a").tokens[0]
    assert first == (SENTENCEPIECE[expected[0]] if expected[3] else "▁a")


@pytest.mark.parametrize("beyond", [3, -1, 2**32 - 1])
def test_ids_beyond_the_vocabulary(beyond):
    """Of a token that nothing uses: no matter. Of one that is used: a warning, and the default."""
    unused = {f"{name}_token_id": beyond for name in ("padding", "unknown", "bos", "mask", "seperator")}
    found = special_tokens(metadata(["a", "b", "c"], eos_token_id=2, **unused))
    assert found[:5] == (None, 2, None, None, (2,))
    assert read_tokenizer(metadata(["a", "b", "c"], **unused)).vocab_size == 3
    for name in ("eos", "eot", "eom"):
        with pytest.warns(UserWarning, match=rf"{name}_token_id is {beyond}, beyond the vocabulary of 3"):
            assert special_tokens(metadata(["a", "b", "c"], **{f"{name}_token_id": beyond})).ends == ()
    # Sentencepiece has defaults: BOS is 1.
    tokens = SENTENCEPIECE[:3]
    with pytest.warns(UserWarning, match=f"bos_token_id is {beyond}"):
        assert special_tokens(metadata(tokens, model="llama", bos_token_id=beyond)).bos == 1


def test_ids_beyond_the_embedding():
    """The tokenizer may have more tokens than the model has rows."""
    found = special_tokens(metadata(["a", "b", "<|im_end|>"], padding_token_id=2), vocab_size=2)
    assert (found.padding, found.ends) == (None, ())


def test_a_file_with_an_unused_id_loads(write_gguf):
    ids = {"tokenizer.ggml.padding_token_id": 2**32 - 1, "tokenizer.ggml.unknown_token_id": 96}
    lm = load(write_gguf("tiny_llama_sharded", architecture="llama", metadata=ids))
    assert lm.eos_token_ids == (2, 0)


def test_empty_tokens_have_no_text():
    tokenizer = read_tokenizer(metadata(["a", "", "b", ""]))
    assert tokenizer.encode("ab") == [0, 2]
    assert tokenizer.token_bytes(1) == tokenizer.token_bytes(3) == b""
