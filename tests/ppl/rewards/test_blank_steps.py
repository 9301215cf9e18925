r"""Steps without visible text are no steps, and Φ of a text does not depend on how it is cut into tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.models import PieceTokenizer, TableLM, TableReward
from ponder.program.step import compile_step
from ponder.protocols import Context
from ponder.rewards.blanks import compile_blanks, without_excess
from ponder.testing import check_potential
from ponder.tokenisations import _reader, check_texts, cuts

PIECES = (b"A", b"B", b"\n", b"\n\n", b"A\n\n", b"\n\n\n\n", b" ", b"")
EOS = len(PIECES) - 1
UNIT = ponder.Step("\n\n")


@pytest.fixture(scope="module")
def lm():
    table = jnp.zeros((len(PIECES),) * 2)
    return TableLM(table, eos_token_ids=(EOS,), tokenizer=PieceTokenizer(PIECES))


def judges():
    """Scores of .8, odds of 4: of the same ids, of another tokenizer, and of a Python function."""
    own, other = PieceTokenizer(PIECES), PieceTokenizer((b"B", b"A", b" ", b"\n"))
    return {
        "ids": TableReward(jnp.full(len(PIECES), 0.8), tokenizer=own),
        "tokenizer": TableReward(jnp.full(4, 0.8), tokenizer=other),
        "text": ponder.text_reward(lambda prompt, texts: [0.8 for _ in texts]),
    }


def values(lm, potential, rows, unit=UNIT, limit=12):
    """Log Φ of rows of tokens in steps."""
    step = compile_step(unit, lm, limit)
    settings = {"max_unit_tokens": step.max_tokens, "delimiters": step.delimiters} if step else {}
    bound = potential.bind(Context(lm, limit, ((0,),), **settings))
    return _reader(bound, step)(rows, limit)[0]


def all_cuts(text):
    found = cuts(text, {piece: i for i, piece in enumerate(PIECES) if piece}, np.random.default_rng(0), 40)
    return [list(row) for row in dict.fromkeys(map(tuple, found))][:5]


@pytest.mark.parametrize("kind", ["ids", "tokenizer", "text"])
def test_empty_lines_earn_nothing_however_they_are_cut(lm, kind):
    """ "A\\n\\nB" has odds 16, and so has "A\\n\\n\\n\\nB", which had 64 or 16."""
    rows = [*all_cuts(b"A\n\n\n\nB"), *all_cuts(b"A\n\nB")[:2], *all_cuts(b"A\n\n \n\nB")[:2]]
    found = values(
        lm, ponder.process_reward(judges()[kind], link="odds"), rows[:9] + rows[:1] * (9 - len(rows))
    )
    np.testing.assert_allclose(found, np.log(16), rtol=1e-5)


def test_a_trace_of_blanks_is_a_trace_without_text(lm):
    rows = [[2, 2, 2], [3, 3], [6, 3], [5], [EOS]]
    found = values(lm, ponder.process_reward(judges()["ids"], link="odds"), rows)
    np.testing.assert_array_equal(found, 0.0)


def test_what_the_judges_are_shown(lm):
    """A text ends with its delimiter, not with what a token has beyond it; blank steps are no call."""
    seen = []

    def fn(prompt, texts):
        seen.extend(texts)
        return [0.8 for _ in texts]

    values(lm, ponder.process_reward(ponder.text_reward(fn)), [[0, 5, 2, 1, EOS], [4, 3, 2, 1, EOS]])
    assert sorted(set(seen)) == ["A\n\n", "A\n\n\n\n\nB"]
    assert len(seen) == 3  # the second row ends its first step earlier


def test_with_a_token_as_the_unit_every_token_is_judged(lm):
    potential = ponder.process_reward(judges()["ids"], link="odds")
    bound = ponder.Generation(lm, [0], max_new_tokens=4, potential=potential).potential
    assert bound.blanks is None and bound.init(1).blank is None
    scorer = ponder.Generation(lm, [0], max_new_tokens=4, potential=potential, unit=UNIT).potential
    assert scorer.blanks is not None and scorer.init(1).blank is not None


BLANK = ["", " ", "\n", "\t \r\n", "\u00a0", "\u2003\u3000", "\u0085", "--", " -- \n--", "c", "c -- c"]
VISIBLE = ["x", " x", "-", "- -", "---", "--c-", "\u200b", "é", "0", ".", "cx", "\u2013"]


def test_visible_text_is_told_in_every_cut():
    """Byte by byte and in pieces; delimiters are strings, over several tokens too, and ids."""
    texts = [*BLANK, *VISIBLE]
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [text.encode() for text in texts if len(text.encode()) > 1] + [b"special"]
    lm = TableLM(jnp.zeros(len(pieces)), tokenizer=PieceTokenizer(tuple(pieces)))
    delimiter = len(pieces) - 1
    blanks = compile_blanks(Context(lm, 9, delimiters=("--", "c", delimiter)))
    rows = [list(text.encode()) for text in texts] + [
        [pieces.index(text.encode())] for text in texts if len(text.encode()) > 1
    ]
    expected = [text in BLANK for text in texts] + [text in BLANK for text in texts if len(text.encode()) > 1]
    rows, expected = [*rows, [delimiter], [delimiter, 32, delimiter]], [*expected, True, True]
    state = np.zeros(len(rows), np.int32)
    table = np.asarray(blanks.automaton.next_state)[:, np.asarray(blanks.automaton.token_class)]
    for place in range(max(map(len, rows))):
        for index, row in enumerate(rows):
            if place < len(row) and state[index] >= 0:
                state[index] = table[state[index], row[place]]
    np.testing.assert_array_equal(blanks.is_blank(jnp.asarray(state)), expected)


def test_without_text_only_delimiters_are_blank():
    lm = TableLM(jnp.zeros(5))
    blanks = compile_blanks(Context(lm, 9, max_unit_tokens=4, delimiters=(2, 3)))
    after = blanks.advance(blanks.init(5), jnp.arange(5, dtype=jnp.int32))
    np.testing.assert_array_equal(blanks.is_blank(after), [False, False, True, True, False])
    assert compile_blanks(Context(lm, 9, max_unit_tokens=1)) is None
    prm = TableReward(jnp.full(5, 0.8))
    unit = ponder.Step(2)
    found = values(
        lm, ponder.process_reward(prm, link="odds"), [[0, 2, 2, 2, 1], [0, 2, 1], [2, 2], [0, 2]], unit
    )
    np.testing.assert_allclose(found, np.log([16, 16, 1, 4]), atol=1e-5)


@pytest.mark.parametrize(
    ("text", "delimiters", "expected"),
    [
        ("so.\n\n", ["\n\n"], "so.\n\n"),
        ("so.\n\n\n \n", ["\n\n"], "so.\n\n"),
        ("so. \n", ["\n\n"], "so. \n"),
        ("so  ", ["\n"], "so  "),
        ("a.  ", [". ", "\n"], "a. "),
        ("a;  ", [";"], "a;"),
        ("a\n\nb", ["\n\n"], "a\n\nb"),
        ("a\n\n", [3], "a\n\n"),
        ("", ["\n"], ""),
        ("\n\n\n", ["\n"], "\n"),
    ],
)
def test_a_text_ends_with_its_delimiter(text, delimiters, expected):
    assert without_excess(text, delimiters) == expected


# The law


SMALL = {"num_particles": 4, "num_steps": 6, "num_tokens": 1, "unit": UNIT}


def of_texts():
    """Scores that look at the whole text, and at its last tokens in another tokenizer."""
    lengths = ponder.text_reward(lambda prompt, texts: [1 / (2 + len(text)) for text in texts])
    letters = PieceTokenizer((b"B", b"A", b" ", b"\n"))
    return lengths, TableReward.random(jax.random.key(6), 4, order=2, tokenizer=letters)


def test_the_law_of_texts_holds_for_process_rewards(lm):
    for prm in of_texts():
        potential = ponder.process_reward(prm, link="odds")
        check_texts(potential, lm, UNIT, jax.random.key(0), num_texts=4, num_pieces=6, atol=1e-4)


@pytest.mark.slow
def test_all_laws_hold_for_process_rewards_in_steps(lm):
    for prm in of_texts():
        check_potential(ponder.process_reward(prm, link="odds"), lm, **SMALL)


class Paid(ponder.Composable):
    """Pays for every token, or for every step, whatever it says: no function of the text."""

    of_text = True

    def __init__(self, step):
        self.step = step

    def init(self, num_particles):
        return jnp.zeros(num_particles)

    def update(self, state, tokens, active):
        return state if self.step else state + jnp.where(active, 1.0, 0.0)

    def commit(self, state, rows):
        return state + jnp.where(rows, 1.0, 0.0) if self.step else state

    def log_complete(self, state):
        return state

    def log_prefix(self, state):
        return state


def test_the_law_of_texts_is_noticed(lm):
    message = r"text b'.*': log_complete is .* expected a function of the text"
    with pytest.raises(AssertionError, match=message):
        check_potential(Paid(step=False), lm, num_particles=2, num_steps=4, num_tokens=1, unit=UNIT)
    settings = {"num_texts": 4, "num_pieces": 6, "atol": 1e-4}
    with pytest.raises(AssertionError, match=message):
        check_texts(Paid(step=True) * Paid(step=True), lm, UNIT, jax.random.key(0), **settings)
    quiet = Paid(step=False)
    quiet.of_text = False
    check_texts(quiet, lm, UNIT, jax.random.key(0), **settings)


def test_cuts_of_a_text():
    tokens = {b"a": 0, b"b": 1, b"ab": 2, b"aba": 3}
    rng = np.random.default_rng(0)
    found = {tuple(row) for row in cuts(b"abab", tokens, rng, 40)}
    assert found == {(0, 1, 0, 1), (2, 2), (0, 1, 2), (2, 0, 1), (3, 1)}
    assert cuts(b"abac", tokens, rng, 5) == [] == cuts(b"", tokens, rng, 5)
    assert cuts(b"ba", {b"ba": 0, b"b": 1}, rng, 5) == [[0]] * 5


@pytest.mark.slow
def test_the_exact_posterior_is_one_of_texts(lm):
    """Traces of one text, of six tokens at most, have one Φ in the program itself."""
    potential = ponder.process_reward(judges()["ids"], link="odds")
    program = ponder.Generation(lm, [0], max_new_tokens=5, potential=potential, unit=UNIT)
    posterior = inference.exact(program).run()
    by_text = {}
    for text, log_phi in zip(posterior.text, posterior.log_potential, strict=True):
        by_text.setdefault(text, set()).add(round(float(log_phi), 4))
    assert len(by_text) > 50
    for text, found in by_text.items():
        steps = [step for step in text.split("\n\n") if step.strip()]
        assert found == {round(len(steps) * np.log(4), 4)}, text
