"""Self-evaluation: the answer's probabilities by hand, and a question that leaves no trace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import register_dataclass

import ponder
from ponder.models import Decoder, DecoderConfig, DecoderLM, PieceTokenizer, RewardModel, TableLM
from ponder.models.protocols import Capabilities, capabilities

PIECES = PieceTokenizer((b"", b"a", b"b", b"?", b"y", b"n", b"!"))
V = len(PIECES.pieces)
TEMPLATE = "?!?"
PROMPT = [1, 2, 1]


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockTableLM(TableLM):
    """A table with `extend_block`, but no `truncate` and no `length` of a prompt."""

    def extend_block(self, cache, tokens, lengths):
        """Append the tokens one by one; the rows that have enough stay."""
        logits = []
        for c in range(tokens.shape[1]):
            after, scores = self.extend(cache, tokens[:, c])
            cache = jnp.where((c < lengths)[:, None], after, cache)
            logits.append(scores)
        return cache, jnp.stack(logits, axis=1)


def decoder_lm(tokenizer=PIECES):
    config = DecoderConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=64,
    )
    return DecoderLM(Decoder(config, rngs=nnx.Rngs(0)), tokenizer)


def table_lm():
    return BlockTableLM.random(jax.random.key(0), V, order=5, tokenizer=PIECES)


def by_hand(lm, tokens):
    """P(y) / (P(y) + P(n)) after the tokens and the question, read as one prompt."""
    tokens = [*tokens, *PIECES.encode(TEMPLATE)]
    if isinstance(lm, TableLM):
        logits = lm.table[tuple([0] * 5 + tokens)[-5:]]
    else:
        logits = prefill_padded(lm, jnp.asarray(tokens + [0] * (64 - len(tokens))), len(tokens))
    p = np.exp(np.asarray(logits, np.float64))
    return p[4] / (p[4] + p[5])


prefill_padded = jax.jit(lambda lm, tokens, length: lm.prefill(tokens, 1, 1, length=length)[1][0])
prefill = jax.jit(lambda judge, tokens, n, room: judge.prefill(tokens, n, room), static_argnums=(2, 3))
extend = jax.jit(lambda judge, cache, tokens: judge.extend(cache, tokens))
extend_block = jax.jit(lambda judge, cache, tokens, lengths: judge.extend_block(cache, tokens, lengths))


def ragged(steps):
    width = max(map(len, steps))
    block = jnp.asarray([[*step, *[6] * (width - len(step))] for step in steps])
    return block, jnp.asarray([len(step) for step in steps])


@pytest.mark.parametrize("make", [table_lm, decoder_lm])
def test_scores_by_hand(make):
    """Ragged steps, longer than a chunk, forks, single tokens: the question is never in the context."""
    lm = make()
    judge = ponder.self_evaluation(lm, TEMPLATE, yes="y", no="n")
    assert isinstance(judge, RewardModel) and judge.vocab_size == V and judge.tokenizer is PIECES
    rng = np.random.default_rng(0)
    cache, scores = prefill(judge, jnp.asarray(PROMPT), 3, 50)
    np.testing.assert_allclose(scores, by_hand(lm, PROMPT), atol=1e-5)
    histories = [list(PROMPT) for _ in range(3)]
    for lengths in ([2, 1, 4], [0, 20, 3], None, [1, 4, 0]):
        if lengths is None:
            steps = [[1], [2], [1]]
            cache, scores = extend(judge, cache, jnp.asarray([1, 2, 1]))
        else:
            steps = [rng.integers(1, 3, size=length).tolist() for length in lengths]
            cache, scores = extend_block(judge, cache, *ragged(steps))
        assert scores.shape == (3,) and scores.dtype == jnp.float32
        for n, step in enumerate(steps):
            if step:
                histories[n] += step
                np.testing.assert_allclose(scores[n], by_hand(lm, histories[n]), atol=1e-5)
        ancestors = rng.integers(3, size=3)
        cache = judge.fork(cache, jnp.asarray(ancestors))
        histories = [list(histories[a]) for a in ancestors]


def test_several_prompts():
    lm = decoder_lm()
    judge = ponder.self_evaluation(lm, TEMPLATE, yes="y", no="n")
    prompts = [[1, 2, 1], [2]]
    padded, lengths = ragged(prompts)
    cache, scores = jax.jit(lambda judge, p, n: judge.prefill_many(p, n, 2, 8))(judge, padded, lengths)
    np.testing.assert_allclose(scores, np.repeat([by_hand(lm, p) for p in prompts], 2), atol=1e-5)
    steps = [[1], [2, 2], [1, 1, 2], [2]]
    _, scores = extend_block(judge, cache, *ragged(steps))
    expected = [by_hand(lm, prompts[n // 2] + step) for n, step in enumerate(steps)]
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_room_for_the_question():
    """max_new_tokens is for the trace alone; beyond it the scores are NaN."""
    judge = ponder.self_evaluation(decoder_lm(), TEMPLATE, yes="y", no="n")
    _, scores = jax.jit(lambda judge, p, *step: judge.extend_block(judge.prefill(p, 2, 5)[0], *step))(
        judge, jnp.asarray(PROMPT), *ragged([[1] * 5, [1] * 6])
    )
    assert np.isnan(scores).tolist() == [False, True]
    assert judge.max_length == 64 - 3


def test_what_is_optional_is_what_the_model_has():
    found = capabilities(ponder.self_evaluation(table_lm(), TEMPLATE, yes="y", no="n"))
    assert found == Capabilities(
        blocks=True,
        rewinds=False,
        many_prompts=True,
        padded_prompts=False,
        max_length=None,
        separator=(),
    )

    class Bare(BlockTableLM):
        prefill_many = property()  # reading it is an AttributeError

    bare = Bare(table_lm().table, tokenizer=PIECES)
    found = capabilities(ponder.self_evaluation(bare, TEMPLATE, yes="y", no="n"))
    assert not found.many_prompts
    padded = capabilities(ponder.self_evaluation(decoder_lm(), TEMPLATE, yes="y", no="n"))
    assert padded.padded_prompts and padded.max_length == 64 - 3


def test_scores_stay_inside():
    table = jnp.zeros((V, V)).at[3, 4].set(-1e4)
    lm = BlockTableLM(table, tokenizer=PIECES)
    for yes, no, bound in (("y", "n", np.log), ("n", "y", lambda score: np.log1p(-score))):
        judge = ponder.self_evaluation(lm, TEMPLATE, yes=yes, no=no)
        _, scores = judge.prefill(jnp.asarray(PROMPT), 1, 4)
        assert np.isfinite(bound(np.asarray(scores))).all() and 0 < scores[0] < 1


def test_first_tokens_of_longer_answers():
    judge = ponder.self_evaluation(table_lm(), TEMPLATE, yes="yab", no="nab")
    assert (judge.question, judge.yes, judge.no) == ((3, 6, 3), 4, 5)
    assert repr(judge).startswith("SelfEvaluation(BlockTableLM(")


def test_smollm2_defaults(smollm2):
    """The default question and answers are of whole words, and go on in the assistant's turn."""
    judge = ponder.self_evaluation(smollm2)
    decode = smollm2.tokenizer.decode
    assert (decode([judge.yes]), decode([judge.no])) == (" Yes", " No")
    assert decode(judge.question).endswith("Answer (Yes or No):")
    assert not set(judge.question) & set(smollm2.eos_token_ids)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"yes": "ya", "no": "yb"},
            ValueError,
            r"first tokens differ, but 'ya' is \[4, 1\] and 'yb' is \[4, 2\]",
        ),
        ({"yes": ""}, ValueError, "yes: expected text of at least one token, got ''"),
        ({"no": ""}, ValueError, "no: expected text"),
        ({"template": ""}, ValueError, "template: expected text"),
        ({"template": [3]}, TypeError, r"template: expected a str, got \[3\]"),
        ({"yes": 4}, TypeError, "yes: expected a str, got 4"),
        ({"lm": 3}, TypeError, "lm: expected a LanguageModel"),
        ({"lm": TableLM}, TypeError, "lm: expected a LanguageModel"),
        ({"lm": decoder_lm(None)}, ValueError, "lm.tokenizer is None"),
        (
            {"lm": TableLM.random(jax.random.key(0), V, tokenizer=PIECES)},
            TypeError,
            "expected a model with extend_block; TableLM has none",
        ),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        ponder.self_evaluation(**({"lm": table_lm(), "template": TEMPLATE, "yes": "y", "no": "n"} | options))
