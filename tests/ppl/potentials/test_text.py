import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.potentials.text import text
from ponder.protocols import Context, Potential


@dataclasses.dataclass
class ToyTokenizer:
    pieces: list  # a plain dataclass: it cannot be hashed

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


@dataclasses.dataclass
class ToyModel:
    tokenizer: ToyTokenizer | None
    vocab_size: int = 4
    eos_token_ids: tuple = (3,)


LM = ToyModel(ToyTokenizer(["a", "b", "cc", "<eos>"]))
LIMIT = 5


def lengths(texts):
    return [float(len(t)) for t in texts]


def states_of(potential, rows):
    state = potential.init(len(rows))
    for tokens in np.array(rows, np.int32).T:
        state = potential.update(state, jnp.asarray(tokens), jnp.ones(len(rows), bool))
    return state


def test_gives_the_text_before_eos():
    seen = []
    potential = text(lambda texts: seen.append(texts) or lengths(texts)).bind(Context(LM, LIMIT))
    assert isinstance(potential, Potential)
    state = states_of(potential, [[0, 1, 2], [2, 0, 3], [3, 0, 0]])
    np.testing.assert_array_equal(potential.log_complete(state), [4, 3, 2])
    assert seen == [["abcc", "cca", "aa"]]
    assert potential.token_logits(state) is None


def test_inactive_rows_do_not_change():
    potential = text(lengths).bind(Context(LM, LIMIT))
    state = potential.update(potential.init(2), jnp.array([2, 2]), jnp.array([True, False]))
    np.testing.assert_array_equal(potential.log_complete(state), [2, 0])
    state = potential.update(state, jnp.array([0, 1]), jnp.array([False, True]))
    np.testing.assert_array_equal(potential.log_complete(state), [2, 1])


def test_fork_gathers():
    potential = text(lengths).bind(Context(LM, LIMIT))
    state = potential.fork(states_of(potential, [[0, 1], [2, 2]]), jnp.array([1, 1]))
    np.testing.assert_array_equal(potential.log_complete(state), [4, 4])


def test_bools_forbid_and_values_pass_through():
    state_rows = [[0], [1]]
    verdict = text(lambda texts: [t == "a" for t in texts]).bind(Context(LM, LIMIT))
    np.testing.assert_array_equal(verdict.log_complete(states_of(verdict, state_rows)), [0, -np.inf])
    wild = text(lambda texts: np.array([np.nan, np.inf])).bind(Context(LM, LIMIT))
    np.testing.assert_array_equal(wild.log_complete(states_of(wild, state_rows)), [np.nan, np.inf])
    counts = text(lambda texts: np.array([1, 2])).bind(Context(LM, LIMIT))
    assert counts.log_complete(states_of(counts, state_rows)).dtype == jnp.float32


def test_prefix_is_one_unless_given():
    calls = []
    plain = text(lambda texts: calls.append(texts) or lengths(texts)).bind(Context(LM, LIMIT))
    np.testing.assert_array_equal(plain.log_prefix(states_of(plain, [[0], [1]])), [0, 0])
    assert calls == []
    guided = text(lengths, prefix=lambda texts: [-float(len(t)) for t in texts]).bind(Context(LM, LIMIT))
    np.testing.assert_array_equal(guided.log_prefix(states_of(guided, [[0], [2]])), [-1, -2])


def test_equal_traces_are_decoded_once():
    decoded = []

    class Counting(ToyTokenizer):
        def decode(self, ids):
            decoded.append(tuple(ids))
            return super().decode(ids)

    potential = text(lengths).bind(Context(ToyModel(Counting(LM.tokenizer.pieces)), LIMIT))
    state = states_of(potential, [[0, 1]] * 6 + [[1, 1]])
    np.testing.assert_array_equal(potential.log_complete(state), [2] * 7)
    assert sorted(decoded) == [(0, 1), (1, 1)]


def generate(potential, tokens):
    """Feed `tokens[N, LIMIT]`; weigh each trace in a loop, as a program does, when it has finished."""

    def body(carry):
        step, state, done, log_weight = carry
        state = potential.update(state, tokens[:, step], ~done)
        finished = ~done & ((tokens[:, step] == 3) | (step == LIMIT - 1))
        value = jax.lax.cond(
            finished.any(),
            lambda: potential.log_complete(state),
            lambda: jnp.zeros(len(done), jnp.float32),
        )
        return step + 1, state, done | finished, jnp.where(finished, value, log_weight)

    count = len(tokens)
    start = (0, potential.init(count), jnp.zeros(count, bool), jnp.zeros(count, jnp.float32))
    return jax.lax.while_loop(lambda carry: ~carry[2].all(), body, start)[-1]


TRACES = jnp.array([[0, 3, 0, 0, 0], [2, 2, 1, 3, 0], [1, 1, 1, 1, 2], [2, 3, 1, 1, 1]])


def test_inside_a_compiled_loop_only_when_a_trace_finishes():
    calls = []
    potential = text(lambda texts: calls.append(texts) or lengths(texts)).bind(Context(LM, LIMIT))
    np.testing.assert_array_equal(jax.jit(generate)(potential, TRACES), [1, 5, 6, 2])
    assert len(calls) == 3  # two traces finish together
    assert calls[-1] == ["a", "ccccb", "bbbbcc", "cc"]


def test_under_vmap_all_runs_share_a_call():
    calls = []
    potential = text(lambda texts: calls.append(len(texts)) or lengths(texts)).bind(Context(LM, LIMIT))
    runs = jnp.stack([TRACES, TRACES[::-1], TRACES])
    values = jax.jit(jax.vmap(generate, in_axes=(None, 0)))(potential, runs)
    np.testing.assert_array_equal(values, [[1, 5, 6, 2], [2, 6, 5, 1], [1, 5, 6, 2]])
    assert set(calls) == {12}


def test_large_batches_do_not_deadlock():
    count, limit = 64, 1024
    potential = text(lengths).bind(Context(LM, limit))

    def body(step, carry):
        state, total = carry
        state = potential.update(state, jnp.full(count, step % 3), jnp.ones(count, bool))
        return state, total + potential.log_complete(state)

    run = jax.jit(lambda: jax.lax.fori_loop(0, 20, body, (potential.init(count), jnp.zeros(count)))[1])
    expected = np.cumsum(np.array([1, 1, 2] * 7)[:20]).sum()
    np.testing.assert_array_equal(run(), [expected] * count)


@pytest.mark.parametrize("values", [lambda texts: 1.0, lambda texts: [0.0], lambda texts: ["a", "b"]])
def test_wrong_results_name_the_function(values):
    potential = text(values).bind(Context(LM, LIMIT))
    state = states_of(potential, [[0], [1]])
    with pytest.raises(Exception, match=r"text\(fn\): expected"):
        jax.block_until_ready(potential.log_complete(state))


def test_compiles_once_for_the_same_function():
    potential = text(lengths)
    traced = []

    @jax.jit
    def run(potential, state):
        traced.append(None)
        return potential.log_complete(state)

    for _ in range(2):
        bound = potential.bind(Context(LM, LIMIT))
        run(bound, bound.init(2))
    assert len(traced) == 1


def test_validates():
    with pytest.raises(TypeError, match=r"text\(fn\): expected a function"):
        text("abc")
    with pytest.raises(TypeError, match=r"text\(fn\): expected a function"):
        text(None)
    with pytest.raises(TypeError, match=r"text\(prefix\): expected a function"):
        text(lengths, prefix=3)
    assert not hasattr(text(lengths), "init")  # it has to be bound
    with pytest.raises(ValueError, match=r"lm\.tokenizer is None"):
        text(lengths).bind(Context(ToyModel(None), LIMIT))
