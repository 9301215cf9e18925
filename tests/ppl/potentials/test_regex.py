import builtins
import dataclasses
import itertools
import random
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.models import PieceTokenizer
from ponder.potentials import regex as module
from ponder.potentials.regex import regex
from ponder.potentials.regex_compiler import compile_pattern
from ponder.protocols import Context, Potential


@dataclasses.dataclass
class ToyModel:
    tokenizer: PieceTokenizer | None
    vocab_size: int
    eos_token_ids: tuple


# A merged token, the two halves of "é", a special token without text, and two that end the trace.
PIECES = [b"a", b"b", b"ab", b"\xc3", b"\xa9", b"", b"", b"</s>"]
EOS = (6, 7)
LM = ToyModel(PieceTokenizer(PIECES), len(PIECES), EOS)
TEXT_TOKENS = range(5)


def matches(pattern, tokens):
    try:
        text = b"".join(PIECES[token] for token in tokens).decode()
    except UnicodeDecodeError:
        return False
    return re.fullmatch(pattern, text) is not None


def states_of(potential, sequences):
    """State after each of some token sequences of one length."""
    state = potential.init(len(sequences))
    for tokens in np.array(sequences, np.int32).reshape(len(sequences), -1).T:
        state = potential.update(state, jnp.asarray(tokens), jnp.ones(len(sequences), bool))
    return state


PATTERNS = [
    "a(ba)?",
    "b*ab",
    "(ab){2}",
    "a|ab|ba{2,}",
    "é+",
    "[^a]",
    "[^a]{2}",
    "(a|é)*",
    ".{3}",
    "a??b*?",
    "^ab?$",
    ".*",
]


@pytest.mark.parametrize("limit", [2, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_agrees_with_enumeration(pattern, limit):
    complete = {
        tokens: matches(pattern, tokens)
        for length in range(limit + 1)
        for tokens in itertools.product(TEXT_TOKENS, repeat=length)
    }
    possible = set()  # every prefix of a match that fits
    for tokens, is_match in complete.items():
        if is_match:
            possible.update(tokens[:length] for length in range(len(tokens) + 1))
    if not possible:
        with pytest.raises(ValueError, match="cannot be matched within"):
            regex(pattern).bind(Context(LM, limit))
        return
    potential = regex(pattern).bind(Context(LM, limit))
    for length in range(limit + 1):
        sequences = [tokens for tokens in complete if len(tokens) == length]
        state = states_of(potential, sequences)
        np.testing.assert_array_equal(potential.log_complete(state) == 0, [complete[s] for s in sequences])
        np.testing.assert_array_equal(potential.log_prefix(state) == 0, [s in possible for s in sequences])
        if length == limit:
            continue
        guided, final = np.full((2, len(sequences), len(PIECES)), False)
        for (row, tokens), token in itertools.product(enumerate(sequences), TEXT_TOKENS):
            guided[row, token] = (*tokens, token) in possible
            final[row, token] = complete[(*tokens, token)]
        for token in EOS:
            guided[:, token] = final[:, token] = [complete[s] for s in sequences]
        np.testing.assert_array_equal(potential.token_logits(state) == 0, guided)
        np.testing.assert_array_equal(potential.complete_logits(state) == 0, final)


def random_pattern(rng, depth=3):
    if depth == 0:
        return rng.choice(["a", "b", "é", ".", "[^a]", "[ab]", "(?:ab)"])
    parts = [random_pattern(rng, depth - 1) for _ in range(2)]
    repeat = rng.choice(["*", "+", "?", "{2}", "{1,2}", "*?", "??"])
    return rng.choice([f"{parts[0]}{parts[1]}", f"(?:{parts[0]}|{parts[1]})", f"(?:{parts[0]}){repeat}"])


def test_random_patterns_match_in_full():
    rng = random.Random(0)
    texts = ["".join(letters) for n in range(5) for letters in itertools.product("abé\n", repeat=n)]
    for _ in range(60):
        pattern = random_pattern(rng)
        flat, initial, finals = compile_pattern(pattern)
        table = np.frombuffer(flat, np.int32).reshape(-1, 256)
        for text in texts:
            state = initial
            for byte in text.encode():
                state = table[state, byte] if state >= 0 else -1
            assert (state in finals) == (re.fullmatch(pattern, text) is not None), (pattern, text)


def test_is_a_potential_that_composes():
    potential = regex("a+")
    assert isinstance(potential.bind(Context(LM, 3)), Potential)
    for composed in (potential * regex("b+"), potential**0.5):
        assert isinstance(composed.bind(Context(LM, 3)), Potential)


def test_eos_and_inactive_rows_leave_the_text_alone():
    potential = regex("ab").bind(Context(LM, 3))
    before = potential.update(potential.init(3), jnp.zeros(3, jnp.int32), jnp.ones(3, bool))
    after = potential.update(before, jnp.array([1, 1, EOS[1]]), jnp.array([True, False, True]))
    np.testing.assert_array_equal(potential.log_complete(after), [0, -np.inf, -np.inf])
    np.testing.assert_array_equal(after.remaining, [1, 2, 2])
    np.testing.assert_array_equal(after.automaton[1:], before.automaton[1:])


def test_fork_gathers():
    potential = regex("ab").bind(Context(LM, 3))
    state = potential.update(potential.init(3), jnp.array([0, 1, 2]), jnp.ones(3, bool))
    forked = potential.fork(state, jnp.array([2, 0, 2]))
    np.testing.assert_array_equal(potential.log_complete(forked), [0, -np.inf, 0])


def test_same_values_inside_jit():
    potential = regex("(a|é)+").bind(Context(LM, 4))
    state = states_of(potential, [(0, 3), (3, 4), (1, 1)])
    np.testing.assert_array_equal(
        jax.jit(lambda potential, state: potential.token_logits(state))(potential, state),
        potential.token_logits(state),
    )
    assert potential.token_logits(state).dtype == jnp.float32


def test_says_when_the_limit_is_too_short():
    with pytest.raises(
        ValueError, match=r"regex\('\(ab\)\{3\}'\) .* max_new_tokens=2: the shortest .* 3 tokens"
    ):
        regex("(ab){3}").bind(Context(LM, 2))
    with pytest.raises(ValueError, match="no sequence of tokens matches"):
        regex("c").bind(Context(LM, 2))


@pytest.mark.parametrize(
    ("pattern", "cause"),
    [
        ("(", "missing \\) at position 1"),
        ("a)(b", "unbalanced parenthesis at position 1"),
        ("b(?=a)a", r"look-around at position 1 \('\(\?='\)"),
        (r"(a)\1", "back-reference at position 3"),
        ("(^a|b)", "anchor at position 1"),
    ],
)
def test_refuses_what_the_engine_refuses(pattern, cause):
    with pytest.raises(ValueError, match=f"{cause}.*the engine refuses the pattern"):
        regex(pattern, "automaton").bind(Context(LM, 4))


def test_validates_its_arguments():
    with pytest.raises(TypeError, match=r"regex\(pattern\): expected a str, got bytes"):
        regex(b"a")
    with pytest.raises(ValueError, match="got an empty string"):
        regex("")
    with pytest.raises(ValueError, match=r"lm\.tokenizer is None"):
        regex("a").bind(Context(ToyModel(None, 3, (2,)), 4))
    assert not hasattr(regex("a"), "init")  # it has to be bound


def test_names_the_extra_to_install(monkeypatch):
    original = builtins.__import__

    def without_engine(name, *args, **kwargs):
        if name.startswith("outlines_core"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_engine)
    with pytest.raises(ImportError, match=r"pip install 'ponder-ppl\[grammar\]'"):
        regex("a").bind(Context(LM, 4))


@pytest.mark.parametrize(
    ("pattern", "match", "miss"),
    [
        (r"\d{4}-\d{2}-\d{2}", "2024-02-29", "2024-2-29"),
        (r"[A-Z][a-z ]{0,200}\.", "The cat sat on the mat.", "The cat sat, on the mat."),
        (r"\d+(\.\d+)?", "3.14", "3."),
        ("[é-ü ]+", "éü é", "éa"),
    ],
)
def test_real_vocabulary(smollm2, pattern, match, miss):
    potential = regex(pattern).bind(Context(smollm2, 32))
    for text, expected in ((match, True), (miss, False)):
        tokens = smollm2.tokenizer.encode(text)
        state = potential.init(1)
        guided = []
        for token in tokens:
            guided.append(float(potential.token_logits(state)[0, token]) == 0)
            state = potential.update(state, jnp.array([token]), jnp.ones(1, bool))
        assert (float(potential.log_complete(state)[0]) == 0) == expected, text
        assert float(potential.token_logits(state)[0, smollm2.eos_token_ids[0]]) == (
            0 if expected else -np.inf
        )
        if expected:
            assert all(guided)


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        ('[^"]{0,20}', 162),
        (r"[A-Z][^.!?]{5,60}[.!?]", 484),
        ("x[a-z]{200}", 203),
        (r"(\w+\s){20}", 6506),
        (r"\D{30}", None),
        ("(?:.*a){25}", 202),
        ("(x+x+)+y", None),
        ("((){1000}){1000}{1000}{1000}", None),
        ("|".join(f"word{i}x{i * 7919 % 10007}" for i in range(3000)), None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_ordinary_patterns_that_could_be_dear(pattern, states):
    table, _, finals = regex(pattern).language.byte_automaton()
    assert len(table) < 20_000 and finals
    assert states is None or len(table) == states


def test_word_boundaries_at_the_start():
    table, initial, finals = regex(r"(?-u:\b)[^\n\x00]+").language.byte_automaton()
    assert table[initial, ord("a")] in finals and table[initial, ord(" ")] not in finals


@pytest.mark.filterwarnings("ignore:.*'&&' at position 2 is read as a set operation")
@pytest.mark.parametrize("pattern", ["[])^]", "[^]^)(]*", r"\)\(\^\[", "[a&&[^)^]]", "(?i)a(b)"])
def test_brackets_that_do_not_count(pattern):
    assert regex(pattern).language.byte_automaton().finals


@pytest.mark.parametrize(
    ("pattern", "text", "miss"),
    [
        ("(?x)a #c", "a", "a#"),
        ("(?x)a #(\n b", "ab", "a"),
        ("(?x)a#) ( [ ^\n|b", "b", "ab"),
        ("(?x:a #)\n)#", "a#", "a"),
        ("((?x)a#)\n)#(b)", "a#b", "a"),
        (r"(?x)a\# (?-x: #)", "a# #", "a#"),
        ("(?x)[a#](b]\n] c", "ac", "a"),
        ("(?ix-s)A #c", "a", "c"),
        ("a #c", "a #c", "a"),
    ],
)
def test_comments_of_verbose_patterns(pattern, text, miss):
    table, initial, finals = regex(pattern).language.byte_automaton()

    def accepts(text):
        state = initial
        for byte in text.encode():
            state = table[state, byte] if state >= 0 else -1
        return state in finals

    assert accepts(text) and not accepts(miss)


@pytest.mark.parametrize("pattern", ["(?x)a #(\n)|(?:b", "(?x)a #\n)(b", "(?x)a|^b", "(?x:a#\n))(b"])
def test_invalid_verbose_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="the engine refuses the pattern"):
        regex(pattern, "automaton").bind(Context(LM, 4))


@pytest.mark.parametrize(
    "pattern",
    ["(" * 300 + "a" + ")" * 300, "(" * 50_000 + "a" + ")" * 50_000, "[" * 50_000 + "a" + "]" * 50_000,
     "a" + "*" * 100_000, "(a{2}", r"a{2}(?<!b)c"],
    ids=lambda value: value[:10],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*is read as a nested set")
def test_deep_and_invalid_patterns_are_errors(pattern):
    with pytest.raises(ValueError, match=r"the engine refuses the pattern.*200 deep") as error:
        regex(pattern, "automaton").bind(Context(LM, 4))
    assert len(str(error.value)) < 700


def test_long_patterns_are_refused_at_once():
    with pytest.raises(ValueError, match=r"at most 262144 characters, got 1000000.*ponder\.choice"):
        regex("a" * 1_000_000)
    with pytest.raises(ValueError, match="lone surrogates"):
        regex("\ud800")


@pytest.mark.parametrize("pattern", ["(a|aa){1000}{1000}", "(a|b)*a(a|b){20}", r"\w{1000}"])
def test_compilation_ends_at_the_time_limit(monkeypatch, pattern):
    monkeypatch.setattr(module, "COMPILE_SECONDS", 1)
    with pytest.raises(ValueError, match=r"regex\('.*'\): compiling .* limit of 1 seconds; lower the"):
        regex(pattern, "automaton").bind(Context(LM, 4))


def test_a_crash_of_the_engine_is_an_error(monkeypatch, tmp_path):
    """Stand-ins for the compiler: the real one has been seen to be aborted for want of memory."""
    script = tmp_path / "compiler.py"
    monkeypatch.setattr(module.regex_compiler, "__file__", str(script))
    script.write_text("import os\nos.abort()\n")
    with pytest.raises(ValueError, match=r"the engine failed .*exit code .*memory .* or stack"):
        regex("a{1,3}", "automaton").bind(Context(LM, 4))


def test_states_are_limited(monkeypatch):
    monkeypatch.setattr(module.regex_compiler, "STATE_LIMIT", 100)
    with pytest.raises(ValueError, match="has 129 states, above the limit of 100; lower the bounds"):
        compile_pattern("(a|b)*a(a|b){6}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    ["(a|aa){1000}{1000}", "(a|b)*a(a|b){20}", r"\w{1000}", "(((a{0,100}){0,100}){0,100})", "(?s).{0,500}",
     "a{1000000000}", "(?:a?){100000}", "a" * 100_000],
    ids=lambda value: value[:30],
)  # fmt: skip
def test_dear_patterns_end_within_the_limits(pattern):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="limit"):
        regex(pattern, "automaton").bind(Context(LM, 4))
    assert time.perf_counter() - start < module.COMPILE_SECONDS + 10
