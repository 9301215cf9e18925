import jax
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.enumeration import enumerate_traces
from ponder.models import PieceTokenizer, TableLM

# Merged tokens, the two halves of "é", a letter of patterns, EOS.
PIECES = (b"a", b"b", b"ab", b"\xc3", b"\xa9", b".", b"")
OPTIONS = ["ab", "a", "abab", "é.", "éé", "b.b", "", "zebra"]


@pytest.fixture(scope="module")
def lm():
    return TableLM.random(
        jax.random.key(3), len(PIECES), scale=1.0, eos_token_ids=(6,), tokenizer=PieceTokenizer(PIECES)
    )


def written(tokens, length):
    return b"".join(PIECES[token] for token in tokens[:length]).decode(errors="replace")


def program(lm, potential, **settings):
    return ponder.Generation(lm, [0, 1], max_new_tokens=4, potential=potential, **settings)


def check_against_the_prior(lm, potential, allows, **settings):
    """Exact inference must give the mass, and the traces, of the prior that a Python check allows."""
    everything = enumerate_traces(program(lm, None, **settings))
    texts = [written(*row) for row in zip(everything.tokens, everything.lengths, strict=True)]
    allowed = np.array([allows(text) for text in texts])
    assert 1 < allowed.sum() < len(allowed)
    posterior = inference.exact(program(lm, potential, **settings)).run(jax.random.key(0))
    mass = np.exp(everything.log_prior[allowed].astype(np.float64))
    np.testing.assert_allclose(posterior.log_evidence, np.log(mass.sum()), atol=1e-5)
    found = {
        tuple(tokens[:n]): weight
        for tokens, n, weight in zip(
            np.asarray(posterior.tokens).tolist(),
            np.asarray(posterior.lengths),
            np.exp(np.asarray(posterior.log_weights)),
            strict=True,
        )
        if weight > 0
    }
    wanted = [tuple(t[:n]) for t, n in zip(everything.tokens.tolist(), everything.lengths, strict=True)]
    wanted = {trace: m for trace, m in zip(np.array(wanted, object)[allowed], mass / mass.sum(), strict=True)}
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[t] for t in wanted], list(wanted.values()), rtol=1e-4)


@pytest.mark.parametrize("overflow", ["truncate", "force_eos"])
def test_is_the_prior_restricted_to_the_options(lm, overflow):
    check_against_the_prior(lm, ponder.choice(OPTIONS), OPTIONS.__contains__, overflow=overflow)


def test_a_wrong_option_would_be_noticed(lm):
    with pytest.raises(AssertionError):
        check_against_the_prior(lm, ponder.choice(OPTIONS[1:]), OPTIONS.__contains__)


@pytest.mark.slow
def test_laws(lm):
    ponder.testing.check_potential(ponder.choice(OPTIONS), lm, num_steps=4)


@pytest.mark.slow
def test_smc_is_proper(lm):
    model = program(lm, ponder.choice(OPTIONS))
    report = ponder.testing.check_algorithm(inference.smc(model, 3), model, num_runs=1000)
    assert abs(report.evidence_z) < 5


def test_characters_stand_for_themselves():
    options = ["a.b", "[x]*", "\\d", "日本", "日本語", "\n", "ŭ\x00", "🙂"]
    table, initial, finals = ponder.choice(options).language.byte_automaton()
    assert sum(read(table, initial, finals, text) for text in options) == len(options)
    for text in ("axb", "x", "1", "日", "", "ŭ", "a.b ", "日本人"):
        assert not read(table, initial, finals, text)


def read(table, initial, finals, text):
    state = initial
    for byte in text.encode():
        state = table[state, byte] if state >= 0 else -1
    return state in finals


def test_the_automaton_is_the_smallest():
    """Common endings are shared: a thousand options with one ending take the states of one."""
    options = [f"{i:03d} is the answer" for i in range(1000)]
    table, initial, finals = ponder.choice(options).language.byte_automaton()
    assert len(table) == len(options[0]) + 1
    assert all(read(table, initial, finals, text) for text in options)


def test_equal_options_count_once(lm):
    once, twice = ponder.choice(["ab", "a"]), ponder.choice(["ab", "a", "ab"])
    assert once.language == twice.language
    assert repr(twice) == "choice(['ab', 'a'])"
    assert len(repr(ponder.choice([f"option {i}" for i in range(1000)]))) < 250


def test_programs_that_differ_in_options_differ(lm):
    """The options are part of what is compiled: no mixing up of cached functions."""
    masses = [
        float(inference.exact(program(lm, ponder.choice([option]))).run(jax.random.key(0)).log_evidence)
        for option in ("ab", "b.b")
    ]
    assert masses[0] != masses[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("yes", TypeError, r"choice\(options\): expected several str, got one str"),
        (b"yes", TypeError, "got one bytes"),
        (7, TypeError, "expected several str, got int"),
        (["a", 1, None], TypeError, "expected str only, got NoneType, int among them"),
        ([], ValueError, r"at least one text that is not empty, got \[\]"),
        ([""], ValueError, r"at least one text that is not empty, got \[''\]"),
        (["a\ud800"], ValueError, "lone surrogates"),
    ],
)
def test_validates_its_options(options, error, message):
    with pytest.raises(error, match=message):
        ponder.choice(options)


def test_says_when_no_option_fits(lm):
    context = ponder.Context(lm, 2)
    with pytest.raises(ValueError, match=r"choice\(\['bbb'\]\) cannot be matched .*shortest .* 3 tokens"):
        ponder.choice(["bbb"]).bind(context)
    with pytest.raises(ValueError, match="no sequence of tokens matches"):
        ponder.choice(["zebra"]).bind(context)
    ponder.choice(["zebra", "bb"]).bind(context)  # one that can be written is enough
