import builtins
import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder.automata.lifting import token_pieces
from ponder.enumeration import enumerate_traces
from ponder.host.errors import reraised
from ponder.models import PieceTokenizer, TableLM
from ponder.models.pytrees import pytree
from ponder.potentials.grammar import grammar
from ponder.potentials.grammar_matching import EngineLimitError, Matchers
from ponder.potentials.hosted import HostedPotential
from ponder.protocols import Context, Potential
from ponder.testing import check_algorithm, check_potential

# Merged tokens, two with the same bytes, the halves of "é", one without text, and two that end the trace;
# some of the bytes that the grammars know cannot be written alone.
PIECES = (b"(", b")", b"()", b")(", b"a", b"a", b"\xc3", b"\xa9b", b"", b"", b"</s>")
EOS = (9, 10)
LM = TableLM.random(
    jax.random.key(1), len(PIECES), order=1, eos_token_ids=EOS, tokenizer=PieceTokenizer(PIECES)
)
TEXT_TOKENS = range(9)

BALANCED = 'start: ("(" start ")" | "a")*'
ACCENTS = 'start: "(" start ")" | "éb"'


def is_balanced(text):
    depth = 0
    for letter in text:
        depth += {"(": 1, ")": -1, "a": 0}.get(letter, -99)
        if depth < 0:
            return False
    return depth == 0


def is_accents(text):
    depth = text.count("(")
    return text == "(" * depth + "éb" + ")" * depth


LANGUAGES = [(BALANCED, is_balanced), (ACCENTS, is_accents)]


def contains(accepts, tokens, pieces=PIECES):
    """Whether a Python recogniser takes the text of some tokens; a token without text is never allowed."""
    if not all(pieces[token] for token in tokens):
        return False
    try:
        return accepts(b"".join(pieces[token] for token in tokens).decode())
    except UnicodeDecodeError:
        return False


def states_of(potential, sequences):
    """State after each of some token sequences of one length."""
    state = potential.init(len(sequences))
    for tokens in np.array(sequences, np.int32).reshape(len(sequences), -1).T:
        state = potential.update(state, jnp.asarray(tokens), jnp.ones(len(sequences), bool))
    return state


@pytest.mark.parametrize(("text", "accepts"), LANGUAGES)
def test_agrees_with_enumeration_however_the_text_is_cut(text, accepts):
    limit = 3
    potential = grammar(text).bind(Context(LM, limit))
    # Two further tokens close any prefix of these lengths that can be closed.
    possible = {
        tokens[:length]
        for total in range(6)
        for tokens in itertools.product((0, 1, 4, 6, 7), repeat=total)
        if contains(accepts, tokens)
        for length in range(total + 1)
    }
    spelled = {b"".join(PIECES[token] for token in tokens) for tokens in possible}
    for length in range(limit + 1):
        sequences = list(itertools.product(TEXT_TOKENS, repeat=length))
        state = states_of(potential, sequences)
        complete = np.array([contains(accepts, tokens) for tokens in sequences])
        np.testing.assert_array_equal(potential.log_complete(state) == 0, complete)
        if length == limit:
            np.testing.assert_array_equal(potential.log_prefix(state) == 0, complete)
        elif length < 2:
            can = [
                all(map(PIECES.__getitem__, s)) and b"".join(PIECES[i] for i in s) in spelled
                for s in sequences
            ]
            np.testing.assert_array_equal(potential.log_prefix(state) == 0, can)
        else:  # the last token is guided by what is complete after it
            guide = np.asarray(potential.token_logits(state) == 0)
            for row, tokens in enumerate(sequences):
                wanted = [contains(accepts, (*tokens, token)) for token in TEXT_TOKENS]
                assert guide[row].tolist() == [*wanted, complete[row], complete[row]], tokens


@pytest.mark.parametrize(("text", "accepts"), LANGUAGES)
def test_laws(text, accepts):
    potential = grammar(text)
    assert isinstance(potential.bind(Context(LM, 5)), Potential)
    check_potential(potential, LM, num_particles=3, num_steps=4, num_tokens=4)


def letters(pieces, seed=0):
    """A model over these tokens and an EOS."""
    pieces = (*pieces, b"")
    return TableLM.random(
        jax.random.key(seed),
        len(pieces),
        order=1,
        eos_token_ids=(len(pieces) - 1,),
        tokenizer=PieceTokenizer(pieces),
    )


ARITHMETIC = """
start: product ("+" product)*
product: atom ("*" atom)*
atom: "1" | "(" start ")"
"""


def is_arithmetic(text):
    while "(" in text:
        inner = re.sub(r"\(1([+*]1)*\)", "1", text)
        if inner == text:
            return False
        text = inner
    return re.fullmatch(r"1([+*]1)*", text) is not None


PROGRAMS = [
    (BALANCED, is_balanced, (b"(", b")", b"a", b"()"), 5),
    (
        'start: "a" start "b" | ""',
        lambda s: s == "a" * (len(s) // 2) + "b" * (len(s) // 2),
        (b"a", b"b", b"ab"),
        6,
    ),
    (ARITHMETIC, is_arithmetic, (b"1", b"+", b"*", b"(", b")"), 5),
    ('start: "é" start | "é"', lambda s: set(s) == {"é"}, (b"\xc3", b"\xa9", b"\xa9\xc3"), 5),
]


@pytest.mark.parametrize("overflow", ["truncate", "force_eos"])
@pytest.mark.parametrize(("text", "accepts", "pieces", "limit"), PROGRAMS)
def test_evidence_is_that_of_enumeration(text, accepts, pieces, limit, overflow):
    lm = letters(pieces)
    settings = {"max_new_tokens": limit, "overflow": overflow}
    program = ponder.Generation(lm, [0], potential=grammar(text), **settings)
    free = enumerate_traces(ponder.Generation(lm, [0], **settings))
    eos = lm.eos_token_ids[0]
    joint = 0.0
    for tokens, length, log_p in zip(free.tokens, free.lengths, free.log_prior, strict=True):
        trace = [token for token in tokens[:length].tolist() if token != eos]
        joint += np.exp(np.float64(log_p)) * contains(accepts, trace, pieces)
    posterior = ponder.inference.exact(program).run(jax.random.key(0))
    np.testing.assert_allclose(posterior.log_evidence, np.log(joint), atol=1e-5)
    if overflow == "truncate" and text == BALANCED:
        check_algorithm(ponder.inference.smc(program, 6, ess_threshold=1.0), program, num_runs=1000)


@pytest.mark.slow
def test_a_mask_that_forgets_would_be_noticed():
    """Power: as if the engine allowed only the tokens that it would itself use."""

    @pytree
    class Canonical(HostedPotential):
        def token_logits(self, state):
            return super().token_logits(state).at[:, 3].set(-jnp.inf)

    program = ponder.Generation(
        letters((b"(", b")", b"a", b"()")), [0], max_new_tokens=4, potential=grammar(BALANCED)
    )
    bound = program.potential
    wrong = Canonical(bound.unbound, bound.matchers, bound.is_eos, bound.start)
    program.potential = wrong
    with pytest.raises(AssertionError):
        check_algorithm(ponder.inference.smc(program, 6), program, num_runs=1000)


def test_eviction_and_order_do_not_change_answers():
    sequences = np.array(list(itertools.product(TEXT_TOKENS, repeat=3)), np.int32)
    pieces = [b"" if token in EOS else piece for token, piece in enumerate(PIECES)]

    def walk(matchers, rows):
        """What is said of every row, each fed one token at a time while it is possible."""
        alive, said = np.ones(len(rows), bool), []
        for length in range(4):
            if length:
                alive = alive & (
                    np.unpackbits(said[-1][0], axis=1, bitorder="little")[
                        np.arange(len(rows)), rows[:, length - 1]
                    ]
                    > 0
                )
            said.append(matchers(np.pad(rows, ((0, 0), (0, 2))), np.full(len(rows), length), alive))
        return said

    roomy, tiny = (Matchers.compile(BALANCED, pieces, capacity) for capacity in (4096, 2))
    assert roomy == tiny and hash(roomy) == hash(tiny)
    first, second, shuffled = walk(roomy, sequences), walk(tiny, sequences), walk(tiny, sequences[::-1])
    assert len(tiny.kept) == 2 < len(roomy.kept)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    jax.tree.map(np.testing.assert_array_equal, first, [(a[::-1], b[::-1]) for a, b in shuffled])
    jax.tree.map(np.testing.assert_array_equal, first, walk(roomy, sequences))


def test_forks_resume_anywhere():
    """A state that comes from elsewhere, with an empty cache, goes on as it would have."""
    potential = grammar(BALANCED).bind(Context(LM, 6))
    state = states_of(potential, [(0, 4, 1), (2, 0, 4), (1, 0, 0), (0, 0, 0)])
    ancestors, tokens = jnp.array([3, 3, 1, 0]), jnp.array([1, 2, 1, 4])
    everyone = jnp.ones(4, bool)
    elsewhere = grammar(BALANCED).bind(Context(LM, 6))
    found = elsewhere.update(elsewhere.fork(state, ancestors), tokens, everyone)
    wanted = states_of(potential, [(0, 0, 0, 1), (0, 0, 0, 2), (2, 0, 4, 1), (0, 4, 1, 4)])
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.slow
def test_same_runs_under_vmap_with_one_call_a_step(monkeypatch):
    program = ponder.Generation(LM, [0], max_new_tokens=5, potential=grammar(BALANCED))
    algorithm = ponder.inference.smc(program, 4)
    keys = jax.random.split(jax.random.key(3), 3)
    alone = [algorithm.run(key) for key in keys]
    shapes, original = [], Matchers.__call__

    def counted(self, tokens, lengths, needed):
        shapes.append(lengths.shape)
        return original(self, tokens, lengths, needed)

    monkeypatch.setattr(Matchers, "__call__", counted)
    together = jax.jit(jax.vmap(algorithm.run))(keys)
    np.testing.assert_array_equal(together.tokens, jnp.stack([p.tokens for p in alone]))
    np.testing.assert_allclose(together.log_evidence, [p.log_evidence for p in alone], atol=1e-5)
    assert 0 < len(shapes) <= 5 and {int(np.prod(shape)) for shape in shapes} == {12}


def test_compiles_once_for_the_same_grammar():
    traced = []

    @jax.jit
    def run(potential, state):
        traced.append(None)
        return potential.log_complete(state)

    for _ in range(2):
        bound = grammar(BALANCED).bind(Context(LM, 3))
        run(bound, bound.init(2))
    other = grammar(ACCENTS).bind(Context(LM, 3))
    run(other, other.init(2))
    assert len(traced) == 2


def test_terminals_are_greedy():
    """As documented: a terminal is not cut short, a rule is."""
    lm = letters((b"a", b"b"))
    for text, expected in (('start: A "ab"\nA: /a+/', False), ('start: A+ "ab"\nA: "a"', True)):
        state = states_of(grammar(text).bind(Context(lm, 4)), [(0, 0, 1)])
        assert bool(state.accepts[0]) is expected


def test_refuses_what_the_engine_refuses():
    for text, message in (
        ('start: "a', "lexer error"),
        ("start: nowhere", "unknown name"),
        ('rule: "a"', "no start rule"),
        ("start: <|special|>", "unknown special token"),
    ):
        with pytest.raises(
            ValueError, match=rf"grammar\(.*the engine refuses the grammar: .*{message}"
        ) as caught:
            grammar(text).bind(Context(LM, 4))
        assert "no_forcing" not in str(caught.value)


def test_says_when_no_text_is_within_reach():
    for text, limit in (('start: "z"', 4), ('start: "(a)"', 1), ('start: "a"', 0)):
        with pytest.raises(
            ValueError, match=rf"grammar\(.*\) cannot be generated within max_new_tokens={limit}"
        ):
            grammar(text).bind(Context(LM, limit))


AMBIGUOUS = "\n".join(
    [f'start: "a" ({" | ".join(f"r{i}" for i in range(2100))})', *(f'r{i}: "a" "a"' for i in range(2100))]
)
"""The engine refuses rows of more than 2000 items: this grammar makes them at once, and does not hang."""


def test_a_limit_of_the_engine_is_an_error():
    lm = letters((b"a", b"b"))
    with pytest.raises(EngineLimitError, match=r"grammar\(.*the engine gave up: .*2000"), reraised():
        potential = grammar(AMBIGUOUS).bind(Context(lm, 8))
        jax.block_until_ready(states_of(potential, [(0, 0, 0)]))


def test_a_run_raises_the_error_of_the_engine_itself():
    program = ponder.Generation(letters((b"a", b"b")), [0], max_new_tokens=8, potential=grammar(AMBIGUOUS))
    with pytest.raises(EngineLimitError, match=r"the engine gave up: .*max is 2000") as raised:
        ponder.inference.smc(program, 8).run(jax.random.key(0))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ['start: "a" b\nfoo: (', "start: xx\n", "start: /(/", 'start: "a"\n' * 3])
def test_refusals_are_one_line(text):
    with pytest.raises(ValueError, match=r"the engine refuses the grammar: .*[0-9]\([0-9]+\)") as raised:
        grammar(text).bind(Context(letters((b"a", b"b")), 4))
    assert "\n" not in str(raised.value)


def test_validates_its_arguments():
    with pytest.raises(TypeError, match=r"grammar\(text\): expected a str, got bytes"):
        grammar(b"start:")
    for empty in ("", " \n"):
        with pytest.raises(ValueError, match=r"grammar\(text\): expected rules"):
            grammar(empty)
    with pytest.raises(ValueError, match=r"grammar\(text\): expected Unicode text, got lone surrogates"):
        grammar('start: "\ud800"')
    with pytest.raises(ValueError, match=r"rules with ::= are GBNF"):
        grammar('root ::= "a"').bind(Context(LM, 4))
    with pytest.raises(ValueError, match=r"lm\.tokenizer is None"):
        grammar(BALANCED).bind(Context(dataclasses.replace(LM, tokenizer=None), 4))
    assert not hasattr(grammar(BALANCED), "init")  # it has to be bound


def test_names_the_extra_to_install(monkeypatch):
    original = builtins.__import__

    def without_engine(name, *args, **kwargs):
        if name.startswith("llguidance"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_engine)
    with pytest.raises(ImportError, match=r"pip install 'ponder-ppl\[grammar\]'"):
        grammar(BALANCED).bind(Context(LM, 4))


CALCULATION = """
start: " " sum " = " NUMBER "."
sum: product (" + " product)*
product: atom (" * " atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /[1-9][0-9]{0,2}/
"""


@pytest.mark.slow
def test_real_model_writes_sentences_of_the_grammar(smollm2):
    program = ponder.Generation(smollm2, "A hard sum:", max_new_tokens=20, potential=grammar(CALCULATION))
    posterior = ponder.inference.smc(program, num_particles=4).run(jax.random.key(0))
    written = [text for text, w in zip(posterior.text, np.exp(posterior.log_weights), strict=True) if w > 0]
    assert written and np.isfinite(posterior.log_evidence)
    for text in written:
        match = re.fullmatch(r" ([0-9+*() ]+) = [1-9][0-9]{0,2}\.", text)
        assert match and isinstance(eval(match[1]), int), text


def test_real_vocabulary_allows_every_token_that_fits(smollm2):
    """The mask against trying all tokens one by one, at prefixes that are cut as no tokenizer would."""
    pieces = token_pieces(smollm2, "test")
    accepts = re.compile(r'\{"[a-zé ]*("(: ?([0-9]+\}?)?)?)?|\{|')
    text = 'start: "{" KEY ":" " "? /[0-9]+/ "}"\nKEY: /"[a-zé ]*"/'
    potential = grammar(text).bind(Context(smollm2, 16))
    for prefix in ("", '{"', '{"ab', '{"a": ', '{"a":1'):
        tokens = [smollm2.tokenizer.encode(letter)[0] for letter in prefix]
        guide = np.asarray(potential.token_logits(states_of(potential, [tokens]))[0] == 0)
        for token, piece in enumerate(pieces):
            if token in smollm2.eos_token_ids or not piece:
                assert not guide[token]
                continue
            try:
                fits = accepts.fullmatch(prefix + piece.decode()) is not None
            except UnicodeDecodeError:
                continue  # half a character: see the toy with two halves
            assert guide[token] == fits, (prefix, piece)
