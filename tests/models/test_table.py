import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.models import LanguageModel, PieceTokenizer, RewardModel, TableLM, TableReward, Tokenizer

V = 3


def test_repr_is_short_and_templates_want_messages():
    key = jax.random.key(0)
    assert repr(TableLM.random(key, V, order=2)) == "TableLM(vocab_size=3, order=2)"
    assert repr(TableReward.random(key, V, order=2)) == "TableReward(vocab_size=3, order=2)"
    tokenizer = PieceTokenizer((b"a", b"b"))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}]) == [0, 1]
    for wrong in ([{"role": "user"}], ["ab"], "ab", {"role": "user", "content": "a"}):
        with pytest.raises(TypeError, match="messages: expected dicts with 'role' and 'content', got"):
            tokenizer.apply_chat_template(wrong)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_logits_are_those_of_the_table(order):
    """After prompts of every length, short ones included, and after every token."""
    lm = TableLM.random(jax.random.key(order), V, order=order)
    assert isinstance(lm, LanguageModel) and lm.vocab_size == V
    table = np.asarray(lm.table)
    rng = np.random.default_rng(order)
    for length in (1, 2, 4):
        prompt = rng.integers(V, size=length)
        cache, logits = lm.prefill(jnp.asarray(prompt), 4, 5)
        histories = [[0, 0, 0, *prompt.tolist()] for _ in range(4)]  # tokens 0 stand before the prompt
        for _ in range(2):
            assert logits.shape == (4, V) and logits.dtype == jnp.float32
            for row, history in zip(logits, histories, strict=True):
                np.testing.assert_array_equal(row, table[tuple(history[len(history) - order :])])
            tokens = rng.integers(V, size=4)
            cache, logits = lm.extend(cache, jnp.asarray(tokens))
            histories = [[*h, int(t)] for h, t in zip(histories, tokens, strict=True)]
            ancestors = rng.integers(4, size=4)
            cache, logits = lm.fork(cache, jnp.asarray(ancestors)), logits[ancestors]
            histories = [histories[a] for a in ancestors]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_scores_are_those_of_the_table(order):
    """After prompts shorter and longer than the order, tokens, ragged blocks and forks."""
    prm = TableReward.random(jax.random.key(order), V, order=order)
    assert isinstance(prm, RewardModel) and prm.vocab_size == V
    table = np.asarray(prm.table)
    assert table.shape == (V,) * order and 0.05 <= table.min() < table.max() < 0.95
    rng = np.random.default_rng(order)
    prompts = [[1], [2, 1, 0, 2]]
    padded = jnp.asarray([[1, 2, 2, 2], [2, 1, 0, 2]])  # garbage behind the shorter one
    cache, scores = prm.prefill_many(padded, jnp.asarray([1, 4]), 2, 9)
    alone = [prm.prefill(jnp.asarray(prompt), 2, 9)[1] for prompt in prompts]
    np.testing.assert_array_equal(scores, np.concatenate(alone))
    histories = [[0, 0, 0, *prompt] for prompt in prompts for _ in range(2)]  # tokens 0 before the prompt
    for lengths in (None, [2, 0, 1, 4], None, [0, 1, 3, 2]):
        assert scores.shape == (4,) and scores.dtype == jnp.float32
        for score, history in zip(scores, histories, strict=True):
            assert score == table[tuple(history[-order:])]
        block = rng.integers(V, size=(4, 1 if lengths is None else 4))
        if lengths is None:
            cache, scores = prm.extend(cache, jnp.asarray(block[:, 0]))
        else:
            cache, scores = prm.extend_block(cache, jnp.asarray(block), jnp.asarray(lengths))
        histories = [
            [*h, *row[:length].tolist()]
            for h, row, length in zip(histories, block, lengths or [1] * 4, strict=True)
        ]
        ancestors = rng.integers(4, size=4)
        cache, scores = prm.fork(cache, jnp.asarray(ancestors)), scores[ancestors]
        histories = [histories[a] for a in ancestors]


def test_is_a_pytree_of_its_table():
    lm = TableLM.random(jax.random.key(0), V, scale=2.0, eos_token_ids=(2,))
    (table,) = jax.tree.leaves(lm)
    assert table is lm.table and table.shape == (V, V, V)
    doubled = jax.tree.map(lambda x: 2 * x, lm)
    assert isinstance(doubled, TableLM) and doubled.eos_token_ids == (2,)
    assert float(jnp.std(TableLM.random(jax.random.key(0), 9, scale=2.0).table)) == pytest.approx(
        2.0, rel=0.1
    )


def test_pieces_take_the_longest_that_fits():
    tokenizer = PieceTokenizer((b"", b"a", b"ab", b"abc", b"c", "é".encode()))
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.encode("ababcac") == [2, 3, 1, 4]
    assert tokenizer.encode("é") == [5]
    assert tokenizer.encode("") == []
    with pytest.raises(ValueError, match="no token starts 'bc'"):
        tokenizer.encode("abbc")
    for pieces in itertools.product(range(1, 6), repeat=3):
        assert tokenizer.decode(tokenizer.encode(tokenizer.decode(pieces))) == tokenizer.decode(pieces)


def test_pieces_of_characters():
    """A character may be split between tokens; half of one is a replacement character."""
    tokenizer = PieceTokenizer((b"\xc3", b"\xa9", b"a", b""))
    assert tokenizer.encode("aé") == [2, 0, 1]
    assert tokenizer.decode([2, 0, 1, 3]) == "aé"
    assert tokenizer.decode(np.array([0, 2])) == "\N{REPLACEMENT CHARACTER}a"
    assert [tokenizer.token_bytes(i) for i in range(4)] == [b"\xc3", b"\xa9", b"a", b""]
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "é"}]
    assert tokenizer.apply_chat_template(messages) == [2, 0, 1]
