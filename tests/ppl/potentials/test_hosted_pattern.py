"""Patterns on the host: llguidance or the regex package; and what engines read in other senses."""

import builtins
import itertools
import re
import warnings

import jax
import numpy as np
import pytest

import ponder
from ponder.enumeration import enumerate_traces
from ponder.models import PieceTokenizer, TableLM
from ponder.potentials import pattern_matching
from ponder.potentials.pattern_matching import fault, match
from ponder.potentials.pattern_syntax import expanded_size, features, for_prefixes

# A merged token, the two halves of "é", one without text, and EOS.
PIECES = (b"a", b"b", b"ab", b"\xc3", b"\xa9", b" ", b"", b"")
TEXT_TOKENS = range(7)
LM = TableLM.random(
    jax.random.key(2), len(PIECES), order=1, eos_token_ids=(7,), tokenizer=PieceTokenizer(PIECES)
)

JUDGED = [
    r"(a|b|é)\1*",
    r"(?P<x>a|ab)(?P=x)b?",
    "(?!ab)[abé]+",
    "[abé]+(?<!b)",
    "(?>a|ab)b",
    "a++b?",
    "(a)?(?(1)b|é)",
    r"\b(?:ab|a)\b ?.*",
    "(?:^a|b)*(?:é$|b)",
    "(?=.*é)(?=.*a).+",
    "(?!.*bb)(?!é)a*(?!a)[bé]*",
    r"(?!(é)b)(a|é)(?!\1)\2?b*",
    "(?>a(?!b)|ab)b?",
    r"(?=(a(?!b)|ab))\1b*",
    "(?<!(?=a)a)[aéb]+",
]


def spelled(tokens):
    """The text of some tokens, None where they spell none."""
    if not all(PIECES[token] for token in tokens):
        return None
    try:
        return b"".join(PIECES[token] for token in tokens).decode()
    except UnicodeDecodeError:
        return None


@pytest.mark.parametrize("pattern", JUDGED)
def test_agrees_with_python_however_the_text_is_cut(pattern):
    """Verdicts on all short sequences of tokens; no prefix of a match is pruned."""
    matchers = ponder.regex(pattern).bind(ponder.Context(LM, 5)).matchers
    sequences = [s for length in range(5) for s in itertools.product(TEXT_TOKENS, repeat=length)]
    texts = list(map(spelled, sequences))
    matches = [text is not None and re.fullmatch(pattern, text) is not None for text in texts]
    allowed, accepts = asked(matchers, sequences, 5)
    assert accepts.tolist() == matches
    masks = dict(zip(sequences, allowed, strict=True))
    possible = {
        s[:n] for s, fits in zip(sequences, matches, strict=True) if fits for n in range(1, len(s) + 1)
    }
    assert possible and all(masks[tokens[:-1]][tokens[-1]] for tokens in possible)
    last = masks_of_last(matchers, [s for s in sequences if len(s) == 3])
    for tokens, mask in last.items():
        wanted = [
            (text := spelled((*tokens, token))) is not None and re.fullmatch(pattern, text) is not None
            for token in TEXT_TOKENS
        ]
        assert mask[:7].tolist() == wanted, tokens


def asked(matchers, sequences, limit):
    """Masks of the tokens that can follow, and verdicts."""
    rows, lengths = np.zeros((len(sequences), limit), np.int32), np.array(list(map(len, sequences)))
    for row, tokens in zip(rows, sequences, strict=True):
        row[: len(tokens)] = tokens
    allowed, accepts = matchers(rows, lengths, np.ones(len(rows), bool))
    return np.unpackbits(allowed, axis=1, bitorder="little").astype(bool), accepts


def masks_of_last(matchers, sequences):
    """Masks where one token is left."""
    return dict(zip(sequences, asked(matchers, sequences, 4)[0], strict=True))


def test_prefixes_without_a_future_are_pruned():
    texts = [b"", b"a", b"aa", b"aac", b"ab", b"aab", b"c", b"\xc3", b"\xa9"]
    found = [match(r"(a|b)\1c|é", text, partial=True) for text in texts]
    assert found == [True, True, True, True, False, False, False, True, False]
    # What is asked of the text ahead does not hide what is asked of the text at hand.
    found = [match(r"(?!.*xx)(?=.*\d)[A-Z].*", text, partial=True) for text in (b"A", b"a", b"Ab")]
    assert found == [True, False, True]


def test_masks_are_wide_where_the_walk_is_cut_short_and_never_narrow(monkeypatch):
    bound = ponder.regex(r"(a|b)\1|é(?!a)").bind(ponder.Context(LM, 4))
    narrow = asked(bound.matchers, [(), (0,)], 4)[0]
    monkeypatch.setattr(pattern_matching, "MOST_VISITED", 2)
    again = ponder.regex(r"(a|b)\1|é(?!a)").bind(ponder.Context(LM, 4))
    wide = asked(again.matchers, [(), (0,)], 4)[0]
    assert (narrow <= wide).all() and narrow.sum(1).tolist() == [3, 2] and wide.sum() > narrow.sum()


@pytest.mark.slow
def test_evidence_is_the_mass_of_what_python_matches():
    pattern = r"(a|b)\1.*"
    everything = enumerate_traces(ponder.Generation(LM, [0], max_new_tokens=4))
    tokens = [row[:n].tolist() for row, n in zip(everything.tokens, everything.lengths, strict=True)]
    texts = [spelled([token for token in row if token != 7]) for row in tokens]
    allowed = np.array([text is not None and re.fullmatch(pattern, text) is not None for text in texts])
    mass = np.exp(everything.log_prior.astype(np.float64))[allowed].sum()
    for proposal in (None, "rejection"):
        program = ponder.Generation(
            LM, [0], max_new_tokens=4, potential=ponder.regex(pattern), proposal=proposal
        )
        posterior = ponder.inference.exact(program).run()
        np.testing.assert_allclose(posterior.log_evidence, np.log(mass), atol=1e-5)
    ponder.testing.check_potential(ponder.regex(pattern), LM, num_steps=4)
    ponder.testing.check_algorithm(ponder.inference.smc(program, 6), program, num_runs=1000)


def test_line_breaks_of_verbose_patterns_are_no_characters():
    assert "judge='regex'" in repr(ponder.regex("(?x)a #b\n b", "host").bind(ponder.Context(LM, 4)))
    assert match("(?x)a #b\n b", b"ab") and not match("(?x)a #b\n b", b"a\nb")


def test_regular_patterns_have_masks_on_the_host_too():
    """llguidance and the automaton on every short sequence."""
    for pattern in ("(a|b)*é?", "a/b?|b", "[^a]{2}", "^(?:ab)+$", "a\nb|b"):
        context = ponder.Context(LM, 4)
        hosted, automaton = (ponder.regex(pattern, engine).bind(context) for engine in ("host", "auto"))
        matchers, tables = hosted.matchers, automaton.automaton
        states, columns = np.asarray(tables.next_state), np.asarray(tables.token_class)
        finals = np.asarray(tables.distance) == 0
        for length in range(3):
            for tokens in itertools.product(TEXT_TOKENS, repeat=length):
                row, state, possible = np.zeros((1, 4), np.int32), tables.initial, True
                row[0, :length] = tokens
                for end, token in enumerate(tokens):
                    allowed = matchers(row, np.array([end]), np.ones(1, bool))[0][0]
                    possible = possible and bool(allowed[0] >> token & 1)
                    state = states[state, columns[token]] if state >= 0 else -1
                    if not possible:
                        break
                accepts = possible and bool(matchers(row, np.array([length]), np.ones(1, bool))[1][0])
                assert accepts == bool(state >= 0 and finals[state]), (pattern, tokens)


@pytest.mark.parametrize(
    ("pattern", "shown"),
    [
        ("a+", "regex('a+', engine='automaton')"),
        (r"(a)\1", r"regex('(a)\\1', engine='host', judge='regex', late=['back-reference'])"),
        ("(a|b)*a(a|b){20}", "regex('(a|b)*a(a|b){20}', engine='host')"),
        ("(?#note)a", "regex('(?#note)a', engine='host', judge='regex')"),
    ],
)
def test_the_repr_names_the_engine_and_what_is_judged_late(pattern, shown, monkeypatch):
    monkeypatch.setattr("ponder.potentials.regex_compiler.STATE_LIMIT", 100)
    monkeypatch.setattr("ponder.potentials.regex.COMPILE_SECONDS", 1)
    bound = ponder.regex(pattern).bind(ponder.Context(LM, 30))
    assert repr(bound) == shown
    assert repr(ponder.regex(pattern)) == f"regex({pattern!r})"
    assert repr(bound.bind(ponder.Context(LM, 31))) == shown


@pytest.mark.parametrize(
    ("pattern", "cause"),
    [
        ("a(b", "missing \\) at position 3"),
        ("a)(b", "unbalanced parenthesis at position 1 \\('\\)\\(b'\\)"),
        ("[b-a]", "bad character range at position 4"),
        ("a{3,2}", "min repeat greater than max repeat at position 2"),
        ("(?P<n>a)(?P=m)", "unknown group at position 11"),
        ("*a", "nothing to repeat at position 0"),
        ("(" * 50_000 + "a", "nested too deeply"),
    ],
    ids=lambda value: value[:20],
)
def test_errors_name_the_place_and_the_cause(pattern, cause):
    for engine in ("auto", "host"):
        with pytest.raises(ValueError, match=rf"regex\('.*'\): .*{cause}"):
            ponder.regex(pattern, engine).bind(ponder.Context(LM, 4))


@pytest.mark.parametrize(
    ("pattern", "text", "position"),
    [
        (r"[a\w&&[^b]]", "set operation", 4),
        ("[a[b]]", "nested set", 2),
        (r"b[\w--b]", "set operation", 4),
        ("[[:alpha:]]", "POSIX class", 1),
    ],
)
def test_what_re_reads_otherwise_warns(pattern, text, position):
    with pytest.warns(UserWarning, match=rf"regex\(pattern\): .* at position {position} is read as a {text}"):
        potential = ponder.regex(pattern)
    assert repr(potential.bind(ponder.Context(LM, 4))).endswith("engine='automaton')")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ponder.regex(re.escape(pattern))


def test_sets_mean_the_same_on_both_engines():
    """A back-reference brings the regex package in; the sets are read as the automaton reads them."""
    with pytest.warns(UserWarning, match="set operation"):
        ponder.regex(r"([\w--b])\1").bind(ponder.Context(LM, 4))
    assert [match(r"([\w--b])\1", text) for text in (b"aa", b"bb", b"--")] == [True, False, False]


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        ("a++b", "aab", "aa"),
        ("a++a|b", "b", "aa"),
        ("(?x)[a b]{2}", "a ", "ac"),
        ("a{1,2}+ab?", "aaab", "aa"),
    ],
)
def test_what_rust_reads_otherwise_is_taken_in_pythons_sense(pattern, right, wrong):
    assert "judge='regex'" in repr(ponder.regex(pattern).bind(ponder.Context(LM, 4)))
    assert match(pattern, right.encode()) and not match(pattern, wrong.encode())
    assert re.fullmatch(pattern, right) and not re.fullmatch(pattern, wrong)
    with pytest.raises(ValueError, match=r"regex\(pattern\): a .* at position \d+ .* use engine='auto'"):
        ponder.regex(pattern, "automaton")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a++b", [("possessive quantifier", 2)]),
        (r"\++[+]+(?:a)++", [("possessive quantifier", 13)]),
        ("a+?b{2}?", []),
        ("^a$", []),
        ("(^a|b$)c", [("anchor", 1), ("anchor", 5)]),
        (r"\^\$\\b", []),
        (r"\bx\B", [("word boundary", 0), ("word boundary", 3)]),
        ("(?i)a(?:b)(?P<n>c)(?<m>d)", []),
        (r"(?<=a)(?<!b)(?=c)(?!d)", [("look-around", n) for n in (0, 6, 12, 17)]),
        (r"(a)\1(?P=n)\g<1>", [("back-reference", n) for n in (3, 5, 11)]),
        ("(?R)(?1)(?&n)(?P>n)", [("recursion", n) for n in (0, 4, 8, 13)]),
        ("(?>a)(?|b)(?(1)c)(*PRUNE)", [("atomic group", 0), ("branch reset", 5), ("conditional", 10),
                                       ("control verb", 17)]),
        ("(?#a++)(?x)a #++ [[\n b", []),
        ("(?x)[a b](?-x:[a b])", [("blank in a verbose class", 6)]),
        ("[]&&[a]]", [("set operation", 2), ("nested set", 4)]),
        ("[[:digit:]x]", [("POSIX class", 1)]),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_features_of_patterns(pattern, found):
    assert [(feature.kind, feature.position) for feature in features(pattern)] == found


BOUNDARY = r"(?:(?<=\w)(?!\w)|(?<=\A|\W)(?=\w))"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a", ("a",)),
        ("[(?!]a", ("[(?!]a",)),
        (r"\(?!a", (r"\(?!a",)),
        (r"\ba[\b]", (rf"{BOUNDARY}a[\b]",)),
        ("(?!.*(b))a", ("(?!.*(b))a", "(?:(?!).*(b))?a")),
        (r"(?!a(?=b))\bc", (rf"(?!a(?=b)){BOUNDARY}c", "(?:(?!)a(?:(?!)b)?)?(?:)c")),
        (r"(a)(?!\1)", (r"(a)(?!\1)", r"(a)(?:(?!)\1)?")),
        (r"(?=(a))\1", (r"(?=(a))\1",)),
        ("(?>a(?!b)|ab)c", ("(?>a(?!b)|ab)c",)),
        ("(?<!(?=a)b)c", ("(?:(?!)(?:(?!)a)?b)?c",)),
        ("(?>a(?<!b)|ab)c", ()),
        ("(?(?=a)a|b)", ("(?(?=a)a|b)",)),
    ],
)
def test_patterns_for_prefixes(pattern, found):
    assert for_prefixes(pattern) == found


@pytest.mark.parametrize(
    ("pattern", "text", "prefix"),
    [(r"\b.", "a", ""), (r"a\Bb+", "ab", "a"), (r"(\w)*(?<=b)a", "aba", "a"),
     (r"(\w)*(?<!b)\w", "bbaa", "bb"), (r"\b(?!\w*([a-z])\1)\w+\b", "a", "")],
)  # fmt: skip
def test_prefixes_that_the_engine_alone_would_miss(pattern, text, prefix):
    assert match(pattern, text.encode()) and match(pattern, prefix.encode(), partial=True)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?!a$)[ab]+",
        r"(?!(?:a|bb)$)[ab ]+",
        r"(?:[ab]| (?!$))+",
        r"[ab](?:[ab]|-(?!$))*",
        r"a(?!\Z)b",
        r"(?>a(?!$))b",
        r"(a)?(?(1)b$|a)b?",
        r"a \mb",
        r"(?r)ab(?=)",
        r"(?!ab\b)\w+",
    ],
)
def test_no_prefix_of_a_match_is_pruned(pattern):
    """An end that look-ahead asks for holds at the end of every prefix, and tells nothing of the text."""
    texts = ["".join(letters) for n in range(1, 5) for letters in itertools.product("ab -", repeat=n)]
    matches = [text for text in texts if match(pattern, text.encode())]
    assert matches
    for text in matches:
        for size in range(len(text)):
            assert match(pattern, text[:size].encode(), partial=True), (text, size)


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("ab{3}c", 5),
        ("(?:ab{2}){4}|[xyz]{0,9}d?", 16),
        (r"((a{100}){100}\d){2,}", 2 * 10001),
        (r"\(a{3}", 4),
        ("a{1000000000}", 10**9),
    ],
)
def test_size_of_patterns_that_are_written_out(pattern, size):
    assert expanded_size(pattern) == size


def test_patterns_that_take_all_memory_are_refused():
    assert "repeats too often" in fault("(?:(?:a{1000}){1000}){1000}")
    with pytest.raises(ValueError, match="repeats too often"):
        ponder.regex(r"(?!b)a{1000000000}").bind(ponder.Context(LM, 4))


def test_a_match_that_takes_for_ever_is_an_error(monkeypatch):
    monkeypatch.setattr(pattern_matching, "MATCH_SECONDS", 0.05)
    with pytest.raises(RuntimeError, match=r"regex\('.*'\): matching '.*' takes more than 0.05 seconds"):
        match("(a|aa)+(?<!a)[bc]", b"a" * 40 + b"c")


def test_equal_patterns_compile_once():
    context = ponder.Context(LM, 4)
    one, other = (ponder.regex(r"(a)\1").bind(context).matchers for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != ponder.regex(r"(b)\1").bind(context).matchers


def test_names_the_extra_to_install(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "regex":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs the regex package: pip install 'ponder-ppl\[grammar\]'"):
        ponder.regex(r"(ab?)\1").bind(ponder.Context(LM, 4))
    ponder.regex("ab").bind(ponder.Context(LM, 4))


def test_fault_of_a_good_pattern_is_empty():
    assert fault(r"(a)\1") == ""
