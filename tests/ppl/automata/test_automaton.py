import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.automata import automaton as module
from ponder.automata.automaton import TokenAutomaton, merge_columns
from ponder.automata.lifting import lift

# Over tokens 0, 1, 2: a 0, then any number of 1, then a 2. State 70 is a dead end, 80 cannot be reached.
TRANSITIONS = {
    10: {0: 500, 1: 70},
    500: {1: 500, 2: 30, 0: 70},
    70: {0: 70},
    80: {0: 30},
}


@pytest.fixture
def automaton():
    return TokenAutomaton.from_transitions(TRANSITIONS, 10, {30}, 4)


def run(automaton, tokens):
    state = automaton.init(1)
    for token in tokens:
        state = automaton.advance(state, jnp.array([token]))
    return state


def test_reads_the_language(automaton):
    for tokens in itertools.chain(*(itertools.product(range(4), repeat=n) for n in range(5))):
        inside = len(tokens) >= 2 and tokens[0] == 0 and tokens[-1] == 2 and set(tokens[1:-1]) <= {1}
        assert bool(automaton.accepts(run(automaton, tokens))[0]) == inside, tokens


def test_is_trimmed(automaton):
    assert automaton.next_state.shape == (3, 4)  # tokens 0, 1, 2 and the useless 3 differ
    assert int(run(automaton, [1])[0]) == -1
    assert int(run(automaton, [1, 0])[0]) == -1


def test_distances(automaton):
    never = np.iinfo(np.uint8).max
    assert automaton.to_go.dtype == jnp.uint8
    assert [int(automaton.tokens_needed(run(automaton, t))[0]) for t in ([], [0], [0, 1], [0, 2])] == [
        2,
        1,
        1,
        0,
    ]
    states = jnp.concatenate([run(automaton, t) for t in ([], [0], [0, 2], [2])])
    expected = [[1, never, never, never], [never, 1, 0, never], [never] * 4, [never] * 4]
    np.testing.assert_array_equal(automaton.tokens_to_go(states), expected)


def test_nothing_accepted_is_one_dead_state():
    automaton = TokenAutomaton.from_transitions({0: {0: 1}}, 0, [], 2)
    assert automaton.next_state.shape == (1, 1)
    assert int(automaton.tokens_needed(automaton.init(1))[0]) == np.iinfo(np.int32).max
    assert int(run(automaton, [0])[0]) == -1


@pytest.mark.parametrize(("length", "dtype"), [(254, "uint8"), (256, "uint16")])
def test_long_distances_use_a_wider_type(length, dtype):
    automaton = TokenAutomaton.from_transitions({i: {0: i + 1} for i in range(length)}, 0, [length], 2)
    assert automaton.to_go.dtype == dtype
    assert int(automaton.distance[automaton.initial]) == length
    assert int(automaton.tokens_to_go(automaton.init(1))[0, 0]) == length - 1


def test_works_under_jit_as_an_argument(automaton):
    advance = jax.jit(lambda a, state, tokens: a.advance(state, tokens))
    tokens = jnp.array([0, 1, 2, 3])
    state = automaton.init(4)
    np.testing.assert_array_equal(advance(automaton, state, tokens), automaton.advance(state, tokens))


def test_merge_columns_matches_sorting():
    table = np.random.default_rng(0).integers(-1, 2, size=(4, 200)).astype(np.int32)
    distinct, column = merge_columns(table)
    np.testing.assert_array_equal(distinct[:, column], table)
    assert distinct.shape[1] == np.unique(table, axis=1).shape[1]


def test_lift_walks_every_token_through_the_bytes():
    rng = np.random.default_rng(1)
    table = np.where(rng.random((5, 256)) < 0.3, -1, rng.integers(0, 5, (5, 256)) * (np.arange(256) < 4))
    pieces = [bytes(rng.integers(0, 6, size=n).tolist()) for n in rng.integers(0, 7, size=300)] + [None]
    lifted, token_class = lift(table.astype(np.int32), pieces)
    for start, (token, piece) in itertools.product(range(5), enumerate(pieces)):
        state = -1 if piece is None else start
        for byte in piece or b"":
            state = -1 if state < 0 else table[state, byte]
        assert lifted[start, token_class[token]] == state


def test_refuses_foreign_tokens():
    with pytest.raises(ValueError, match=r"tokens from 0 to 1 \(vocab_size=2\), got 1 to 2 in state 0"):
        TokenAutomaton.from_transitions({0: {1: 0, 2: 0}}, 0, [0], 2)


def test_refuses_large_tables(monkeypatch):
    monkeypatch.setattr(module, "TABLE_LIMIT", 2**20)
    with pytest.raises(ValueError, match=r"has 300 states: .* would take 2 MiB, above the limit of 1 MiB"):
        TokenAutomaton.from_transitions({i: {0: i + 1} for i in range(299)}, 0, [299], 2000)


def test_builds_millions_of_transitions_quickly():
    row = np.arange(30_000).tolist()
    transitions = {i: dict.fromkeys(row, i + 1) for i in range(200)}
    start = time.perf_counter()
    automaton = TokenAutomaton.from_transitions(transitions, 0, [200], 49152)
    assert automaton.next_state.shape == (201, 2)
    assert time.perf_counter() - start < 20  # about 1 s on an idle core
