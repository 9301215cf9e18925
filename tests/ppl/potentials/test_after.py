"""Evidence after a marker against all traces of a vocabulary whose tokens hide the marker."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.enumeration import enumerate_traces
from ponder.models import PieceTokenizer, TableLM, TableReward
from ponder.potentials.after import AfterPotential
from ponder.potentials.automaton_potential import AutomatonPotential
from ponder.potentials.marker import tables_after
from ponder.testing import check_algorithm, check_potential

# The marker is "<>". It is split, merged, and hidden in tokens that go on with one or two others; token 7 has
# no text, and 8 is EOS.
PIECES = (b"a", b"b", b"<", b">", b"<>", b">a", b">ba", b"", b"")
EOS, T = 8, 3
SEQUENCES = np.array(list(itertools.product(range(len(PIECES)), repeat=T)), np.int32)


def table(seed):
    tokenizer = PieceTokenizer(PIECES)
    return TableLM.random(jax.random.key(seed), len(PIECES), eos_token_ids=(EOS,), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def lm():
    return table(0)


@pytest.fixture(scope="module")
def other():
    return table(5)


def written(sequence):
    """Tokens before EOS."""
    tokens = sequence.tolist()
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


def spelt(tokens):
    return b"".join(PIECES[token] for token in tokens).decode()


def rest_of(sequence):
    """The tokens after the marker, EOS among them, what is left of the one that it ends in anew; or None."""
    tokens = written(sequence)
    for count in range(1, len(tokens) + 1):
        _, marker, rest = spelt(tokens[:count]).partition("<>")
        if marker:
            first = {"": [], "a": [0], "ba": [1, 0]}[rest]
            return [*first, *tokens[count:], *[EOS] * (len(tokens) < T)]
    return None


def log_complete(potential, lm):
    """Log Φ of every sequence, by the potential's own methods."""
    bound = potential.bind(ponder.Context(lm, T, ((0, 1),)))

    def run(sequences):
        state, active = bound.init(len(sequences)), jnp.ones(len(sequences), bool)
        for tokens in sequences.T:
            state = bound.update(state, tokens, active)
            active = active & (tokens != EOS)
        return bound.log_complete(state)

    return np.asarray(jax.jit(run)(SEQUENCES)), bound


def check(potential, lm, judge, kind, missing=-np.inf):
    """`judge` maps the tokens after the marker to log Φ."""
    found, bound = log_complete(potential, lm)
    assert type(bound) is kind
    rests = [rest_of(sequence) for sequence in SEQUENCES]
    wanted = np.array([missing if rest is None else judge(rest) for rest in rests])
    assert np.isfinite(wanted).any()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def of_text(judge):
    return lambda rest: judge(spelt([token for token in rest if token != EOS]))


def matches(pattern):
    """As `regex`, which takes no tokens without text."""
    return lambda rest: 0.0 if 7 not in rest and re.fullmatch(pattern, of_text(str)(rest)) else -np.inf


def score(text):
    return 0.3 * len(text) - text.count("b")


SCORE = ponder.text(lambda texts: [score(text) for text in texts])


@pytest.mark.parametrize("required", [True, False])
def test_a_language_is_one_automaton_with_the_marker(lm, required):
    potential = ponder.after("<>", ponder.regex("(ab|b)*a?"), required=required)
    check(potential, lm, matches("(ab|b)*a?"), AutomatonPotential, -np.inf if required else 0.0)
    options = ponder.choice(["a", "ba", ""])
    check(ponder.after("<>", options), lm, matches("(a|ba)?"), AutomatonPotential)


@pytest.mark.parametrize("required", [True, False])
def test_any_other_potential_sees_what_follows(lm, other, required):
    settings = {"required": required, "potential": SCORE, "marker": "<>"}
    missing = -np.inf if required else 0.0
    check(ponder.after(**settings), lm, of_text(score), AfterPotential, missing)
    tokens = ponder.tokens(forbid=[1])
    judge = lambda rest: -np.inf if 1 in rest else 0.0  # noqa: E731
    check(ponder.after(**(settings | {"potential": tokens})), lm, judge, AfterPotential, missing)


def test_a_terminal_score_is_withheld_and_a_missing_marker_is_not(lm):
    bound = ponder.after("<>", SCORE).bind(ponder.Context(lm, T))
    everyone = jnp.ones(2, bool)
    state = bound.update(bound.init(2), jnp.array([4, 0]), everyone)  # "<>" and "a"
    at_once, withheld = bound.judge_apart(bound.update(state, jnp.array([1, 1]), everyone), everyone)
    assert bound.withholds and at_once.tolist() == [0.0, -np.inf]
    np.testing.assert_allclose(withheld, [score("b"), 0.0], atol=1e-6)
    assert not ponder.after("<>", ponder.tokens(forbid=[1])).bind(ponder.Context(lm, T)).withholds


def test_languages_on_the_host(lm):
    """Where the automaton cannot hold the pattern, or is not asked to; they see what follows, as grammars."""
    pytest.importorskip("regex")
    hosted = ponder.after("<>", ponder.regex("(ab|b)*a?", engine="host"))
    check(hosted, lm, matches("(ab|b)*a?"), AfterPotential)
    back = ponder.after("<>", ponder.regex(r"(a|b)\1?"))
    check(back, lm, matches(r"(a|b)\1?"), AfterPotential)
    bound = back.bind(ponder.Context(lm, T))
    assert repr(bound).startswith("after('<>', regex('(a|b)\\\\1?', engine='host'")
    joined = ponder.after("<>", ponder.regex("a")).bind(ponder.Context(lm, T))
    assert repr(joined) == "after('<>', regex('a', engine='automaton'))"


def test_grammars(lm):
    inner = ponder.grammar('start: ("a" start "b")? | "ba"')
    check(ponder.after("<>", inner), lm, matches("(ab)?|aabb|ba"), AfterPotential)


def test_an_expert_reads_what_follows_from_its_own_prompt(lm, other):
    logits = np.asarray(jax.nn.log_softmax(other.table))

    def judge(rest):
        context = [2, 3, *rest]
        return 0.7 * sum(logits[tuple(context[i : i + 3])] for i in range(len(rest)))

    check(ponder.after("<>", ponder.expert(other, [2, 3], 0.7)), lm, judge, AfterPotential)


def test_a_reward_model_judges_what_follows(lm):
    prm = TableReward.random(jax.random.key(9), len(PIECES), order=2, tokenizer=PieceTokenizer(PIECES))
    scores = np.log(np.asarray(prm.table))

    def judge(rest):
        context = [0, 1, *(token for token in rest if token != EOS)]
        return scores[tuple(context[-2:])] if len(context) > 2 else 0.0

    potential = ponder.after("<>", ponder.process_reward(prm, link="ratio"))
    check(potential, lm, judge, AfterPotential)
    assert potential.bind(ponder.Context(lm, T, ((0, 1),))).num_reward_models == 1


def test_products_powers_and_markers_in_markers(lm):
    pattern = ponder.regex("(ab|b)*a?")
    both = ponder.after("<>", pattern * SCORE**0.5)
    bound = both.bind(ponder.Context(lm, T))
    assert [type(factor) for factor in bound.potentials] == [AutomatonPotential, AfterPotential]
    found, _ = log_complete(both, lm)
    wanted = log_complete(ponder.after("<>", pattern), lm)[0]
    wanted = wanted + log_complete(ponder.after("<>", SCORE**0.5), lm)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)

    def judge(text):
        _, marker, rest = text.partition("b")
        return score(rest) if marker else -np.inf

    check(ponder.after("<>", ponder.after("b", SCORE)), lm, of_text(judge), AfterPotential)


@pytest.mark.parametrize("inner", [ponder.regex("[ab<]*"), SCORE], ids=["automaton", "general"])
def test_token_ids_are_markers(lm, inner):
    """For special tokens, which have no text; the first of several markers counts."""
    for marker, ends in ((7, {7}), ([7, 5], {7, 5})):
        found, _ = log_complete(ponder.after(marker, inner), lm)
        for sequence, value in zip(SEQUENCES, found, strict=True):
            tokens = written(sequence)
            place = next((i for i, token in enumerate(tokens) if token in ends), None)
            rest = None if place is None else tokens[place + 1 :]
            if rest is None:
                wanted = -np.inf
            elif inner is SCORE:
                wanted = score(spelt(rest))
            else:
                wanted = 0.0 if 7 not in rest and re.fullmatch("[ab<]*", spelt(rest)) else -np.inf
            assert value == pytest.approx(wanted, abs=1e-5), (marker, tokens)


@pytest.mark.parametrize("overflow", [pytest.param("truncate", marks=pytest.mark.slow), "force_eos"])
def test_exact_is_the_prior_times_the_evidence(lm, overflow):
    def program(potential):
        return ponder.Generation(lm, [0, 1], max_new_tokens=T, potential=potential, overflow=overflow)

    everything = enumerate_traces(program(None))
    rows = zip(everything.tokens, everything.lengths, strict=True)
    rests = [rest_of(np.append(row[:n], [EOS] * (T - n)).astype(int)) for row, n in rows]
    allowed = np.array([rest is not None and matches("a?b?")(rest) == 0.0 for rest in rests])
    assert 1 < allowed.sum() < len(allowed)
    posterior = inference.exact(program(ponder.after("<>", ponder.regex("a?b?")))).run()
    mass = np.exp(everything.log_prior[allowed].astype(np.float64)).sum()
    assert float(posterior.log_evidence) == pytest.approx(np.log(mass), abs=1e-5)
    assert len(posterior) == allowed.sum()


@pytest.mark.parametrize(
    "inner", [ponder.regex("(ab|b)*a?"), ponder.tokens(forbid=[1])], ids=["automaton", "general"]
)
def test_guides_are_what_a_token_changes(lm, inner):
    """After every two tokens, up to the limit; two rests have one token, so that the guide is exact."""
    bound = ponder.after("<>", inner).bind(ponder.Context(lm, T))
    prefixes = SEQUENCES[(SEQUENCES[:, :2] != EOS).all(1) & (SEQUENCES[:, 2] == 0), :2]

    def run(prefixes):
        everyone = jnp.ones(len(prefixes), bool)
        state = bound.init(len(prefixes))
        for tokens in prefixes.T:
            state = bound.update(state, tokens, everyone)
        after = [bound.update(state, jnp.full_like(tokens, v), everyone) for v in range(len(PIECES))]
        values = [bound.log_complete(s) if v == EOS else bound.log_prefix(s) for v, s in enumerate(after)]
        ends = [bound.log_complete(s) for s in after]
        guides = bound.token_logits(state), bound.complete_logits(state)
        return bound.log_prefix(state), guides, (jnp.stack(values, 1), jnp.stack(ends, 1))

    before, guides, wanted = jax.tree.map(np.asarray, jax.jit(run)(prefixes))
    alive = before > -np.inf
    late = prefixes.tolist().index([0, 0])  # only the marker as one token is still in time
    assert alive[late] and np.flatnonzero(guides[0][late] == 0).tolist() == [4]
    for found, value in zip(guides, wanted, strict=True):
        np.testing.assert_allclose(found[alive], value[alive], atol=1e-5)


@pytest.mark.slow
def test_laws_of_others(lm, other):
    rest_of_one = TableLM(other.table[:, :, :6][:6, :6], (5,), PieceTokenizer((*PIECES[:5], b"")))
    for inner in (ponder.regex("(ab|b)*a?"), SCORE, ponder.grammar('start: ("a" start "b")?')):
        for required in (True, False):
            check_potential(ponder.after("<>", inner, required=required), lm)
    small = ponder.expert(rest_of_one, [2, 3], 0.7)
    check_potential(ponder.after("<>", small), rest_of_one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inner", "settings"),
    [
        (ponder.regex("a*b?"), {}),
        (ponder.grammar('start: "a" start | "b" |'), {}),
        (SCORE, {"unit": ponder.Step("b"), "overflow": "force_eos"}),
        (ponder.text(lambda texts: ["b" in text for text in texts]), {"proposal": "rejection"}),
    ],
)
def test_smc_is_proper(lm, inner, settings):
    potential = ponder.after("<>", inner)
    program = ponder.Generation(lm, [0, 1], max_new_tokens=T, potential=potential, **settings)
    check_algorithm(inference.smc(program, 8), program, num_runs=1000)


def test_the_rest_of_a_token_takes_the_fewest_tokens():
    pieces = (b"x", b"y", b"xy", b"yx", b">xyx", b">yy", b">", b"")
    lm = TableLM.random(jax.random.key(0), 8, order=1, eos_token_ids=(7,), tokenizer=PieceTokenizer(pieces))
    tables = tables_after((">",), lm, "after")
    num_states = len(tables.moves)
    rests = tables.rests[tables.moves[0, [4, 5, 6]] - num_states].tolist()
    assert rests == [[2, 0], [1, 1], [-1, -1]]
    assert tables.needed[0] == 1 and (tables.moves[0, [0, 1, 2, 3, 7]] == 0).all()


def test_bad_arguments(lm, toy):
    pattern = ponder.regex("a")
    for marker, message in (
        ("", "expected a string of at least one character"),
        ([], r"after\(marker\): expected a string or token ids, got \[\]"),
        ("\ud800", "lone surrogates"),
        (-1, "expected a token id"),
    ):
        with pytest.raises(ValueError, match=message):
            ponder.after(marker, pattern)
    for marker in (None, 1.5, b"<>", True):
        with pytest.raises(TypeError, match=r"after\(marker\): expected strings and token ids"):
            ponder.after(marker, pattern)
    for potential in (None, "a+", len, ponder.power):
        with pytest.raises(TypeError, match=r"after\(potential\): expected a ponder\.Potential, got"):
            ponder.after("<>", potential)
    with pytest.raises(TypeError, match=r"after\(required\): expected a bool, got 1"):
        ponder.after("<>", pattern, required=1)


def test_what_cannot_be_bound(lm):
    context = ponder.Context(lm, T)
    for marker, inner, message in (
        (99, SCORE, "marker: expected a token id from 0 to 8, got 99"),
        (EOS, SCORE, r"expected tokens that text may follow, got the EOS ids \[8\]"),
        ("<>", ponder.power(2.0), "the potential asks for the prior of the next token"),
        ("<>", SCORE * ponder.power(2.0) ** 0.5, "asks for the prior of the next token"),
        ("zebra", SCORE, r"after\('zebra', text\(<lambda>\)\): no sequence of tokens writes the marker"),
        ("zebra", ponder.regex("a"), r"after\('zebra', regex\('a'\)\) cannot be matched"),
        ("<<<<", SCORE, "the marker takes 4 tokens, more than max_new_tokens=3"),
    ):
        with pytest.raises(ValueError, match=message):
            ponder.after(marker, inner).bind(context)
    pieces = (b">x", b">", b"")
    short = TableLM.random(
        jax.random.key(0), 3, order=1, eos_token_ids=(2,), tokenizer=PieceTokenizer(pieces)
    )
    with pytest.raises(ValueError, match=r"end inside token 0 \(b'>x'\), and no tokens .* left of it, b'x'"):
        ponder.after(">", SCORE).bind(ponder.Context(short, T))
    ponder.after(">", ponder.regex("x")).bind(ponder.Context(short, T))  # bytes are all that it needs
    bare = TableLM(short.table, (2,))
    with pytest.raises(ValueError, match=r"lm\.tokenizer is None"):
        ponder.after(">", ponder.tokens(forbid=[1])).bind(ponder.Context(bare, T))
    ponder.after(1, ponder.tokens(forbid=[1])).bind(ponder.Context(bare, T))


def test_repr_and_binding_to_another_program(lm):
    potential = ponder.after(["<>", 7], SCORE, required=False)
    assert repr(potential) == "after(['<>', 7], text(<lambda>), required=False)"
    bound = potential.bind(ponder.Context(lm, T))
    assert bound.bind(ponder.Context(lm, 7)).max_new_tokens == 7
    again = ponder.after("<>", ponder.regex("a").bind(ponder.Context(lm, 2)))
    assert type(again.bind(ponder.Context(lm, T))) is AutomatonPotential
