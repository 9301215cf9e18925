import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.models import PieceTokenizer
from ponder.program.stop import compile_stop, sort_stops


@dataclasses.dataclass
class ToyModel:
    tokenizer: PieceTokenizer | None
    vocab_size: int
    eos_token_ids: tuple = (0,)


# EOS, a special token in the middle of the text, plain, merged and partial ones.
PIECES = [b"", b"", b"\n", b".\n\n", b".\n", b"\nA", b"A", b"\xc3", b"\xa9"]
LM = ToyModel(PieceTokenizer(PIECES), len(PIECES))


@pytest.mark.parametrize(
    "stop", ["\n\n", ("\n\n", "A"), ("A\n", "\nA\n", "\n.\n"), ("é",), ("AAA", 4), (7, 8), 3, ("AA", "A.\nA")]
)
def test_finds_every_stop_however_it_is_cut(stop):
    automaton = compile_stop(stop, LM)
    items = (stop,) if isinstance(stop, str | int) else stop

    def is_stopped(tokens):
        text = b"".join(PIECES[token] for token in tokens)
        return any(item.encode() in text if isinstance(item, str) else item in tokens for item in items)

    for length in range(5):
        sequences = list(itertools.product(range(1, len(PIECES)), repeat=length))
        state = automaton.init(len(sequences))
        for tokens in np.array(sequences, np.int32).reshape(len(sequences), -1).T:
            state = automaton.advance(state, jnp.asarray(tokens))
        np.testing.assert_array_equal(automaton.is_stopped(state), [is_stopped(s) for s in sequences])
        if length < 3:
            expected = [[is_stopped((*s, token)) for token in range(len(PIECES))] for s in sequences]
            np.testing.assert_array_equal(automaton.stops_now(state), expected)


def test_nothing_to_stop_at():
    assert compile_stop((), LM) is None


def test_a_stop_that_no_token_can_write_never_stops():
    automaton = compile_stop("xyz", LM)
    state = automaton.advance(automaton.init(2), jnp.array([2, 6]))
    assert not automaton.is_stopped(state).any()
    assert not automaton.stops_now(state).any()


def test_token_ids_need_no_tokenizer():
    automaton = compile_stop([2], ToyModel(None, 3))
    state = automaton.advance(automaton.init(3), jnp.array([0, 1, 2]))
    np.testing.assert_array_equal(automaton.is_stopped(state), [False, False, True])
    np.testing.assert_array_equal(automaton.stops_now(state), [[False, False, True]] * 2 + [[True] * 3])


def test_is_a_pytree_argument_of_jit():
    automaton = compile_stop("\n\n", LM)
    run = jax.jit(
        lambda automaton, tokens: automaton.is_stopped(automaton.advance(automaton.init(2), tokens))
    )
    np.testing.assert_array_equal(run(automaton, jnp.array([3, 4])), [True, False])


def test_validates():
    with pytest.raises(ValueError, match="stop: expected a string of at least one character"):
        compile_stop(("a", ""), LM)
    with pytest.raises(ValueError, match="stop: expected Unicode text, got lone surrogates"):
        compile_stop(["\ud800"], LM)
    with pytest.raises(ValueError, match="stop: expected a token id from 0 to 8, got 9"):
        compile_stop(9, LM)
    with pytest.raises(ValueError, match=r"stop='a' needs the bytes .* lm\.tokenizer is None"):
        compile_stop("a", ToyModel(None, 3))
    assert sort_stops(jnp.array([1, 2]), 9, "stop") == sort_stops((1, np.int64(2)), 9, "stop") == ([], [1, 2])
    for bad in (True, (1.5,), None, (b"a",), (None,), jnp.array([True]), np.array([True])):
        with pytest.raises(TypeError, match="stop: expected strings and token ids"):
            compile_stop(bad, LM)
