"""The program: its arguments, its prompts, and the traces it draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import register_dataclass

import ponder
import ponder.potentials.power
from ponder import inference
from ponder.enumeration import enumerate_traces
from ponder.models import Decoder, DecoderConfig, DecoderLM, LanguageModel, PieceTokenizer, TableLM
from ponder.protocols import Move, StateSpaceModel
from ponder.testing import check_algorithm

T = 4


def program(lm, potential=None, **kwargs):
    return ponder.Generation(lm, [1, 2], max_new_tokens=T, potential=potential, **kwargs)


@functools.partial(jax.jit, static_argnums=2)
def run(model, key, num_particles, forced=None):
    """Propagate to the end without resampling; return the state, and the moves and weights of all steps.

    `forced = (mask, moves)` replays moves of an earlier run.
    """

    def step(state, inputs):
        t, move = inputs
        state, move, log_weight = model.propagate(
            jax.random.fold_in(key, t), state, None if forced is None else (forced[0], move)
        )
        return state, (move, log_weight)

    moves = None if forced is None else forced[1]
    state, (moves, weights) = jax.lax.scan(
        step, model.init(key, num_particles), (jnp.arange(model.num_steps), moves)
    )
    return state, moves, weights


class Minimal:
    """A model that is no pytree and has only what the protocol asks for; its table lies on the host."""

    vocab_size = 4
    eos_token_ids = (3,)
    tokenizer = None

    def __init__(self, lm):
        self.table = np.asarray(lm.table)

    def prefill(self, tokens, num_particles, max_new_tokens):
        cache = jnp.broadcast_to(tokens[-2:], (num_particles, 2))
        return cache, jnp.asarray(self.table)[cache[:, 0], cache[:, 1]]

    def extend(self, cache, tokens):
        cache = jnp.stack([cache[:, 1], tokens], 1)
        return cache, jnp.asarray(self.table)[cache[:, 0], cache[:, 1]]

    def fork(self, cache, ancestors):
        return cache[ancestors]


class ShortContext(Minimal):
    max_length = 6


class WithTokenizer(Minimal):
    tokenizer = PieceTokenizer((b"a", b"b", b"c", b""))


@dataclasses.dataclass(frozen=True)
class StartingTokenizer(PieceTokenizer):
    """Adds a beginning-of-sequence token to text, as Llama's does."""

    adds_bos: bool = True
    bos_token_id: int = 3


GOOD = {"prompt": [1, 2], "max_new_tokens": T}
NO_EOS = {"eos_token_ids": ()}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lm": object()}, TypeError, r"lm: expected a LanguageModel .*got object"),
        ({"lm": "smollm2-135m-instruct"}, TypeError, "lm: .*got str"),
        ({"lm": None}, TypeError, "lm"),
        ({"lm": TableLM}, TypeError, "lm: .* got the class"),
        ({"prompt": []}, ValueError, "prompt: expected at least one token, got none"),
        ({"prompt": ""}, ValueError, "prompt: expected at least one token"),
        ({"prompt": np.zeros(0, np.int32)}, ValueError, "prompt: expected at least one token"),
        ({"prompt": [0, 4]}, ValueError, r"prompt: expected token ids in \[0, 4\), got \[4\]"),
        ({"prompt": [-1, 0]}, ValueError, r"prompt: .* got \[-1\]"),
        ({"prompt": [0.5, 1.0]}, TypeError, "prompt: expected a str, chat messages or .* float64"),
        ({"prompt": [True, False]}, TypeError, "prompt: .* bool"),
        ({"prompt": np.zeros((1, 2), int)}, TypeError, r"prompt: .* shape \(1, 2\)"),
        ({"prompt": [[0, 1], [2.5]]}, TypeError, "prompt 1 of 2"),
        ({"prompt": [0, "a"]}, TypeError, "prompt"),
        ({"prompt": ["a", 1]}, TypeError, "prompt 1 of 2"),
        ({"prompt": 3}, TypeError, "prompt: .* got int"),
        ({"prompt": None}, TypeError, "prompt: .* got NoneType"),
        ({"prompt": b"ab"}, TypeError, "prompt: .* got bytes"),
        ({"prompt": {"role": "user", "content": "a"}}, TypeError, "prompt: .* got dict"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected an integer >= 1, got 0"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 2.0}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": True}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": None}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": "4"}, ValueError, "max_new_tokens"),
        ({"potential": "a+"}, TypeError, r"potential: expected a ponder\.Potential or None, got str"),
        ({"potential": lambda texts: texts}, TypeError, "potential: .* got function"),
        ({"potential": ponder.power}, TypeError, "potential: .* got function"),
        ({"potential": ponder.potentials.power.Power}, TypeError, "potential: .* got the class"),
        ({"proposal": "prior"}, TypeError, "proposal: expected a function, 'rejection' or None, got 'prior'"),
        ({"unit": "step"}, ValueError, "unit: expected 'token' or a ponder.Step, got 'step'"),
        ({"overflow": "error"}, ValueError, "overflow: expected 'truncate' or 'force_eos', got 'error'"),
        ({"temperature": 0}, ValueError, "temperature: expected a finite number > 0, got 0"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"temperature": float("inf")}, ValueError, "temperature"),
        ({"temperature": -0.5}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": 1.5}, ValueError, "top_k"),
        ({"top_p": 0}, ValueError, "top_p"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"min_p": 0}, ValueError, "min_p"),
        ({"min_p": 2}, ValueError, "min_p"),
        ({"stop": ""}, ValueError, "stop: expected a string of at least one character"),
        ({"stop": 4}, ValueError, "stop: expected a token id from 0 to 3, got 4"),
        ({"stop": [0.5]}, TypeError, "stop: expected strings and token ids"),
        ({"include_stop": None}, TypeError, "include_stop: expected a bool, got None"),
    ],
)
def test_bad_arguments(toy, arguments, error, message):
    with pytest.raises(error, match=message):
        ponder.Generation(**({"lm": toy} | GOOD | arguments))


def test_the_context_is_limited(toy):
    lm = ShortContext(toy)
    assert isinstance(lm, LanguageModel)
    ponder.Generation(lm, [1, 2], max_new_tokens=4)
    with pytest.raises(
        ValueError, match="prompt: 3 tokens and max_new_tokens=4 exceed the model's context of 6"
    ):
        ponder.Generation(lm, [1, 2, 0], max_new_tokens=4)


def test_text_needs_a_tokenizer(toy):
    for prompt in ("ab", [{"role": "user", "content": "ab"}]):
        with pytest.raises(ValueError, match="prompt: this model has no tokenizer; pass token ids"):
            ponder.Generation(Minimal(toy), prompt, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"stop='ab' needs .* lm\.tokenizer is None"):
        ponder.Generation(Minimal(toy), [0], max_new_tokens=4, stop="ab")


def test_force_eos_needs_an_end(toy):
    lm = dataclasses.replace(toy, eos_token_ids=())
    with pytest.raises(
        ValueError, match="overflow: 'force_eos' needs a model with EOS tokens or a stop string"
    ):
        program(lm, overflow="force_eos")
    program(lm, overflow="force_eos", stop="a")


def test_errors_come_before_any_compilation(toy):
    """A regular expression that does not fit the limit, and one that no tokenizer could write."""
    with pytest.raises(ValueError, match="max_new_tokens=4"):
        program(toy, ponder.regex("a{5}"))
    with pytest.raises(ValueError, match="max_new_tokens=3"):
        program(toy, ponder.regex("a{4}"), overflow="force_eos")  # the last token has to be EOS
    program(toy, ponder.regex("a{4}"), overflow="force_eos", stop="aaaa")


@pytest.mark.parametrize(
    "prompt",
    [
        "bca",
        [1, 2, 0],
        (1, 2, 0),
        np.array([1, 2, 0], np.uint8),
        jnp.array([1, 2, 0]),
        [np.int64(1), np.int32(2), 0],
        range(1, 3),
        [{"role": "system", "content": "b"}, {"role": "user", "content": "ca"}],
        ({"role": "user", "content": "bca"},),
    ],
    ids=lambda x: type(x).__name__,
)
def test_prompts(toy, prompt):
    model = ponder.Generation(toy, prompt, max_new_tokens=T)
    assert isinstance(model, StateSpaceModel)
    expected = [1, 2] if isinstance(prompt, range) else [1, 2, 0]
    assert model.prompt.tolist() == [expected] and model.prompt.dtype == jnp.int32
    assert model.prompt_length.item() == len(expected)
    assert model.num_steps == T and model.tokenizer is toy.tokenizer
    assert f"prompt of {len(expected)} tokens" in repr(model)


def test_text_starts_with_bos_where_the_tokenizer_adds_one(toy):
    pieces = toy.tokenizer.pieces
    lm = dataclasses.replace(toy, tokenizer=StartingTokenizer(pieces))
    assert ponder.Generation(lm, "ab", max_new_tokens=T).prompt.tolist() == [[3, 0, 1]]
    assert ponder.Generation(lm, "", max_new_tokens=T).prompt.tolist() == [[3]]
    chat = [{"role": "user", "content": "ab"}]  # a template writes its own
    assert ponder.Generation(lm, chat, max_new_tokens=T).prompt.tolist() == [[0, 1]]
    assert ponder.Generation(lm, [0, 1], max_new_tokens=T).prompt.tolist() == [[0, 1]]
    lm = dataclasses.replace(toy, tokenizer=StartingTokenizer(pieces, adds_bos=False))
    assert ponder.Generation(lm, "ab", max_new_tokens=T).prompt.tolist() == [[0, 1]]


def log_prior_of(lm, tokens, history=(1, 2)):
    table, history, total = np.asarray(lm.table, float), list(history), 0.0
    for token in tokens:
        row = table[history[-2], history[-1]]
        total += row[token] - np.logaddexp.reduce(row)
        history.append(token)
    return total


@pytest.mark.parametrize(
    "settings",
    [{}, {"stop": ("ab", 2)}, {"overflow": "force_eos"}, {"overflow": "force_eos", "stop": "ab"}],
    ids=lambda s: "-".join(s) or "plain",
)
def test_traces_end_where_they_should(toy, settings):
    model = program(toy, **settings)
    state, _, weights = run(model, jax.random.key(0), 400)
    assert np.asarray(model.is_done(state)).all()
    traces = jax.tree.map(np.asarray, model.traces(state))
    stops = "stop" in settings
    seen = set()
    for tokens, length, log_prior, log_weight in zip(
        traces.tokens, traces.lengths, traces.log_prior, np.asarray(weights).sum(0), strict=True
    ):
        trace, padding = tokens[:length].tolist(), tokens[length:]
        assert (padding == 3).all()
        assert 3 not in trace[:-1]
        text = toy.tokenizer.decode(trace)
        at_stop = stops and (
            text.endswith("ab") or ("ab" in settings["stop"] and trace[-1] == 2 and 2 in settings["stop"])
        )
        before = toy.tokenizer.decode(trace[:-1])
        assert not (stops and "ab" in before)
        reason = "eos" if trace[-1] == 3 else "stop" if at_stop else "limit"
        assert reason != "limit" or length == T
        seen.add(reason)
        if log_weight > -np.inf:
            assert settings.get("overflow") != "force_eos" or reason != "limit"
            assert log_prior == pytest.approx(log_prior_of(toy, trace), abs=1e-5)
    expected = {"eos"} | ({"stop"} if stops else set()) | (set() if "overflow" in settings else {"limit"})
    assert seen == expected  # the text keeps its stop, and a forced end is really drawn
    if "overflow" in settings:  # the last token is proposed among the ends and weighed with p(end)
        assert (weights[:-1] == 0).all() and (weights[-1] <= 1e-6).all() and (weights[-1] < -0.1).any()
    else:
        assert (weights == 0).all()


@pytest.mark.slow
def test_every_end_of_a_model_with_several(toy):
    lm = dataclasses.replace(toy, eos_token_ids=(2, 3))
    model = program(lm, ponder.regex("(a|b)*"), overflow="force_eos")
    traces = enumerate_traces(model)
    found = {
        tuple(t[:n].tolist()): p
        for t, n, p in zip(traces.tokens, traces.lengths, traces.log_prior, strict=True)
    }
    expected = {}
    for length in range(T):
        for body in np.ndindex(*(2,) * length):
            for end in (2, 3):
                expected[*body, end] = log_prior_of(lm, [*body, end])
    assert found.keys() == expected.keys()
    for trace, value in expected.items():
        assert found[trace] == pytest.approx(value, abs=1e-5)
    check_algorithm(inference.smc(model, 3), model, num_runs=1000)
    # The padding is an end too, so that what is padded is never read as text.
    assert (traces.tokens[np.arange(T)[None] >= traces.lengths[:, None]] == 2).all()


def test_a_model_without_end(toy):
    model = program(dataclasses.replace(toy, eos_token_ids=()))
    state, _, weights = run(model, jax.random.key(0), 50)
    assert (state.lengths == T).all() and (weights == 0).all()
    assert np.asarray(state.tokens == 3).any()  # a token like any other


def test_a_proposal_of_the_wrong_shape(toy):
    model = program(toy, proposal=lambda prior, guide: prior[:, :-1])
    with pytest.raises(ValueError, match=r"proposal: expected .*shape \(2, 4\), got \(2, 3\)"):
        inference.smc(model, 2).run(jax.random.key(0))


@pytest.mark.slow
def test_the_prior_as_proposal_changes_nothing(toy, scores):
    """Without a potential it is the default; with one that guides, it is less clever and as right."""
    key = jax.random.key(5)
    plain, _, _ = run(program(toy), key, 64)
    named, _, weights = run(program(toy, proposal=lambda prior, guide: prior + 3.0), key, 64)
    np.testing.assert_array_equal(plain.tokens, named.tokens)
    np.testing.assert_allclose(weights, 0.0, atol=1e-5)  # log q need not be normalised
    np.testing.assert_allclose(plain.log_prior, named.log_prior, atol=1e-5)

    potential = ponder.tokens(forbid=[1]) * scores
    blind = program(toy, potential, proposal=lambda prior, guide: prior)
    check_algorithm(inference.smc(blind, 4), program(toy, potential), num_runs=1000)


def test_a_proposal_is_shown_prior_and_guide(toy, scores):
    seen = []

    def proposal(prior, guide):
        seen.append((prior.shape, None if guide is None else guide.shape))
        return prior

    for potential in (scores, ponder.tokens(forbid=[1])):
        model, key = program(toy, potential, proposal=proposal), jax.random.key(0)
        jax.eval_shape(lambda model=model, key=key: model.propagate(key, model.init(key, 2)))
    assert seen == [((2, 4), None), ((2, 4), (2, 4))]


@pytest.mark.parametrize("settings", [{}, {"overflow": "force_eos", "stop": "ab"}], ids=["plain", "forced"])
def test_forced_moves_are_replayed(toy, scores, settings):
    model = program(toy, scores * ponder.tokens(forbid=[2]), **settings)
    n = 16
    state, moves, weights = run(model, jax.random.key(0), n)

    def same(rows, found, found_moves, found_weights):
        for name in ("tokens", "lengths", "done", "log_prior", "log_potential"):
            a, b = np.asarray(getattr(state, name)), np.asarray(getattr(found, name))
            np.testing.assert_array_equal(a[rows], b[rows])
        np.testing.assert_array_equal(np.asarray(weights)[:, rows], np.asarray(found_weights)[:, rows])
        for a, b in zip(moves, found_moves, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[:, rows], np.asarray(b)[:, rows])

    other = jax.random.key(9)
    same(np.arange(n), *run(model, other, n, (np.ones(n, bool), moves)))
    mask = np.arange(n) % 3 == 0
    partly = run(model, other, n, (mask, moves))
    same(np.flatnonzero(mask), *partly)
    assert not np.array_equal(np.asarray(partly[0].tokens)[~mask], np.asarray(state.tokens)[~mask])
    # The rows that are not forced draw what they draw without any being forced.
    free, _, _ = run(model, other, n)
    np.testing.assert_array_equal(np.asarray(partly[0].tokens)[~mask], np.asarray(free.tokens)[~mask])


def test_forcing_a_token_that_is_never_proposed_kills_the_trace(toy):
    model = program(toy, ponder.tokens(forbid=[2]))
    forced = (jnp.array([True, False]), Move(jnp.array([2, 2]), jnp.zeros(2)))
    key = jax.random.key(0)
    state = model.init(key, 2)
    state, move, log_weight = jax.jit(lambda state: model.propagate(key, state, forced))(state)
    assert float(log_weight[0]) == -np.inf and np.isfinite(float(log_weight[1]))
    assert int(move.tokens[0]) == 2 != int(move.tokens[1])


@pytest.mark.slow
def test_models_that_are_no_pytrees(toy):
    """They run as constants of the compiled program, each with its own numbers."""
    negative = dataclasses.replace(toy, table=-toy.table)
    models = [Minimal(toy), Minimal(negative)]
    first, second = (inference.smc(program(lm), 8).run(jax.random.key(3)) for lm in models)
    for found, lm in ((first, toy), (second, negative)):
        expected = inference.smc(program(lm), 8).run(jax.random.key(3))
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_allclose(found.log_evidence, expected.log_evidence, atol=1e-6)
    assert found.tokenizer is None
    assert not np.array_equal(first.log_prior, second.log_prior)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Unpadded:
    """A decoder without the optional `length` of `prefill`, so that its prompts are not padded."""

    lm: DecoderLM
    vocab_size: int = dataclasses.field(default=50, metadata={"static": True})
    eos_token_ids: tuple = dataclasses.field(default=(0,), metadata={"static": True})
    tokenizer: None = dataclasses.field(default=None, metadata={"static": True})

    def prefill(self, tokens, num_particles, max_new_tokens):
        return self.lm.prefill(tokens, num_particles, max_new_tokens)

    def extend(self, cache, tokens):
        return self.lm.extend(cache, tokens)

    def fork(self, cache, ancestors):
        return self.lm.fork(cache, ancestors)


@pytest.mark.slow
def test_padding_the_prompt_changes_no_number():
    config = DecoderConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    lm = DecoderLM(jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))(), eos_token_ids=(0,))
    prompt = [7, 3, 49, 0, 12]
    padded, plain = (
        ponder.Generation(model, prompt, max_new_tokens=6, potential=ponder.power(2.0))
        for model in (lm, Unpadded(lm))
    )
    assert padded.prompt.shape == (1, 32) and plain.prompt.shape == (1, 5)
    assert padded.prompt_length.item() == plain.prompt_length.item() == 5
    (found, _, weights), (expected, _, expected_weights) = (
        run(model, jax.random.key(0), 8) for model in (padded, plain)
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-4)
    np.testing.assert_allclose(found.log_prior, expected.log_prior, atol=1e-4)
    # The likelihood is that of teacher forcing.
    tokens = jnp.concatenate([jnp.asarray(prompt), found.tokens[0]])
    log_p = np.asarray(jax.nn.log_softmax(jax.jit(lm.score)(tokens)))[4:-1]
    length = int(found.lengths[0])
    expected = log_p[np.arange(length), np.asarray(found.tokens[0, :length])].sum()
    assert float(found.log_prior[0]) == pytest.approx(expected, abs=1e-4)


def test_is_a_pytree(toy, scores):
    model = program(toy, scores, stop="ab", temperature=0.7)
    leaves, treedef = jax.tree.flatten(model)
    again = jax.tree.unflatten(treedef, leaves)
    assert again.settings == model.settings and again.num_steps == T and again.overflow == "truncate"
    assert (
        jax.tree.structure(again)
        == treedef
        == jax.tree.structure(program(toy, scores, stop="ab", temperature=0.7))
    )
    assert treedef != jax.tree.structure(program(toy, scores, stop="ab"))
    assert treedef != jax.tree.structure(program(toy, scores, stop="ab", temperature=0.7, top_k=2))
    doubled = jax.tree.map(lambda x: x, model)
    run(doubled, jax.random.key(0), 2)


def test_texts_may_leave_out_the_stop():
    """Through merged tokens, in progress too; the target and the tokens are the same."""
    pieces = (b"a", b"b", b"a.", b".b", b"")
    lm = TableLM.random(jax.random.key(2), 5, order=1, eos_token_ids=(4,), tokenizer=PieceTokenizer(pieces))
    settings = {"max_new_tokens": 3, "stop": (stop for stop in (".", 1))}
    seen = []
    model = ponder.Generation(lm, [0], include_stop=False, **settings)
    assert model.cut == (".", 1) and model.stop is not None
    found = inference.exact(model).run(progress=lambda report: seen.extend(report.texts))
    wholes = [lm.tokenizer.decode(row[:n]) for row, n in zip(found.tokens, found.lengths, strict=True)]
    wanted = [whole.partition(".")[0].removesuffix("b") for whole in wholes]
    assert found.text == seen == wanted
    assert {".b", "a.b", "ab"} & set(wholes) and max(map(len, wanted)) == 3
    default = ponder.Generation(lm, [0], max_new_tokens=3, stop=[".", 1])
    assert default.cut == () and ponder.foreign.as_program(default) is default
