"""Products and contrasts of experts: the laws, the exact target, and what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.models import PieceTokenizer, TableLM
from ponder.protocols import Context
from ponder.testing import check_algorithm, check_potential

T = 3
PROMPT, OTHER = [1, 2], [2, 0]


@pytest.fixture(scope="module")
def other(toy):
    """A second model over the toy's vocabulary."""
    return TableLM.random(jax.random.key(11), 4, scale=1.3, eos_token_ids=(3,), tokenizer=toy.tokenizer)


@pytest.fixture(scope="module")
def partial(other):
    """The second model, which never writes b."""
    return dataclasses.replace(other, table=other.table.at[..., 1].set(-jnp.inf))


class NoPytree:
    """A model with only what the protocol asks for."""

    tokenizer = None
    max_length = 5

    def __init__(self, lm, vocab_size=4):
        self.lm, self.vocab_size, self.eos_token_ids = lm, vocab_size, lm.eos_token_ids

    def prefill(self, tokens, num_particles, max_new_tokens):
        return self.lm.prefill(tokens, num_particles, max_new_tokens)

    def extend(self, cache, tokens):
        return self.lm.extend(cache, tokens)

    def fork(self, cache, ancestors):
        return self.lm.fork(cache, ancestors)


def program(lm, potential=None, **kwargs):
    return ponder.Generation(lm, PROMPT, max_new_tokens=T, potential=potential, **kwargs)


def log_prob(lm, prompt, trace):
    """Log probability of a trace after a prompt, read off the table of order 2."""
    history, total = [0, 0, *prompt], 0.0
    for token in trace:
        row = np.asarray(lm.table, np.float64)[history[-2], history[-1]]
        total += row[token] - np.logaddexp.reduce(row)
        history.append(int(token))
    return total


def traces(num_tokens=T, eos=3):
    """Every trace: ended by EOS, or of full length."""
    unfinished = [()]
    for step in range(num_tokens):
        longer = [(*x, v) for x in unfinished for v in range(4)]
        yield from (x for x in longer if x[-1] == eos or step == num_tokens - 1)
        unfinished = [x for x in longer if x[-1] != eos]


SMALL = {"num_particles": 3, "num_steps": 2, "num_tokens": 2}


@pytest.mark.parametrize("weight", [1, 0.5, -0.5, 0])
def test_laws(toy, other, weight):
    check_potential(ponder.expert(other, weight=weight), toy, **SMALL)


def test_laws_where_the_expert_excludes_tokens(toy, partial):
    check_potential(ponder.expert(partial, [2], -0.7), toy, **SMALL)


def test_laws_of_products_and_powers(toy, other):
    check_potential(ponder.expert(other, weight=-0.8) ** 0.5 * ponder.expert(toy, OTHER), toy, **SMALL)


@pytest.mark.parametrize("prompt", [None, OTHER, "ca"])
@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_the_evidence_is_that_of_the_product(toy, other, prompt, weight):
    """Z = Σ p(x) p_e(x)^w by hand, each trace with its own prompt."""
    expert_prompt = PROMPT if prompt is None else OTHER
    exact = sum(
        np.exp(log_prob(toy, PROMPT, x) + weight * log_prob(other, expert_prompt, x)) for x in traces()
    )
    posterior = inference.exact(program(toy, ponder.expert(other, prompt, weight))).run()
    assert float(posterior.log_evidence) == pytest.approx(np.log(exact), abs=1e-5)


def test_tempering_and_products_with_other_potentials(toy, other):
    potential = ponder.expert(other, weight=-0.8) ** 0.5 * ponder.regex("(a|b)*") * ponder.expert(toy, OTHER)
    exact = sum(
        np.exp(log_prob(toy, PROMPT, x) - 0.4 * log_prob(other, PROMPT, x) + log_prob(toy, OTHER, x))
        for x in traces()
        if 2 not in x
    )
    posterior = inference.exact(program(toy, potential)).run()
    assert float(posterior.log_evidence) == pytest.approx(np.log(exact), abs=1e-5)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("build", "weight"),
    [
        (inference.smc, -0.5),
        pytest.param(inference.smc, 0.5, marks=SLOW),
        pytest.param(inference.importance_sampling, -0.5, marks=SLOW),
        pytest.param(inference.importance_sampling, 0.5, marks=SLOW),
    ],
)
def test_kernels_are_unbiased(toy, other, build, weight):
    model = program(toy, ponder.expert(other, OTHER, weight))
    check_algorithm(build(model, num_particles=4), model, num_runs=1000)


def test_another_weight_is_noticed(toy, other):
    wrong, right = (program(toy, ponder.expert(other, OTHER, w)) for w in (0.5, 0.6))
    with pytest.raises(AssertionError, match="evidence"):
        check_algorithm(inference.smc(wrong, num_particles=4), right, num_runs=1000)


def test_the_own_model_as_expert_is_a_power(toy):
    posteriors = [
        inference.smc(program(toy, potential), num_particles=8, ess_threshold=1.0).run(jax.random.key(0))
        for potential in (ponder.expert(toy, weight=1.5), ponder.power(2.5))
    ]
    assert posteriors[0].stats.resampled.any()
    for name in ("tokens", "lengths", "log_weights", "log_evidence", "log_prior", "log_potential"):
        found, expected = (np.asarray(getattr(p, name), np.float64) for p in posteriors)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("weight", [0.5, -0.5, 0.0])
def test_what_the_expert_never_writes_has_weight_zero(toy, partial, weight):
    """Also for a contrast, whose power would be infinite there; w = 0 makes the expert no evidence at all."""
    potential = ponder.expert(partial, weight=weight).bind(Context(toy, T, (tuple(PROMPT),)))
    state = potential.init(2)
    found = potential.token_logits(state)
    assert not (np.isnan(found) | (found == np.inf)).any()
    np.testing.assert_array_equal(found[:, 1], 0.0 if weight == 0 else -np.inf)
    state = potential.update(state, jnp.array([1, 0]), jnp.ones(2, bool))
    for value in (potential.log_prefix(state), potential.log_complete(state)):
        assert float(value[0]) == (0.0 if weight == 0 else -np.inf)
        assert np.isfinite(value[1])
    model = program(toy, ponder.expert(partial, OTHER, weight))
    posterior = inference.smc(model, num_particles=8).run(jax.random.key(1))  # a warning would be an error
    assert np.isfinite(posterior.log_evidence)
    if weight:
        assert not (posterior.tokens == 1).any()
        log_probs, context = jnp.array([-jnp.inf, -2.0]), Context(toy, T, (tuple(PROMPT),))
        slope = jax.grad(lambda w: ponder.expert(partial, weight=w).bind(context)._raise(log_probs)[1])
        assert float(slope(weight)) == -2.0


def test_rows_that_go_on_after_a_rest_are_not_silently_wrong(toy, other):
    potential = ponder.expert(other).bind(Context(toy, 8, (tuple(PROMPT),)))
    rest, everyone = jnp.array([True, False]), jnp.ones(2, bool)
    state = potential.update(potential.init(2), jnp.array([0, 1]), everyone)
    state = potential.update(state, jnp.array([0, 3]), rest)
    state = potential.update(state, jnp.array([2, 2]), everyone)
    expected = [log_prob(other, PROMPT, [0, 0, 2]), log_prob(other, PROMPT, [1, 2])]
    np.testing.assert_allclose(potential.log_prefix(state), expected, rtol=1e-5)
    state = potential.update(state, jnp.array([0, 0]), everyone)
    assert np.isfinite(potential.log_prefix(state)[0]) and np.isnan(potential.log_prefix(state)[1])


def test_forced_ends_are_within_the_experts_capacity(toy, other):
    potential = ponder.expert(other, weight=-0.5)
    posterior = inference.exact(program(toy, potential, overflow="force_eos")).run()
    exact = sum(
        np.exp(log_prob(toy, PROMPT, x) - 0.5 * log_prob(other, PROMPT, x)) for x in traces() if x[-1] == 3
    )
    assert float(posterior.log_evidence) == pytest.approx(np.log(exact), abs=1e-5)


def test_the_weight_may_be_traced_and_needs_no_new_compilation(toy, other):
    @jax.jit
    def evidence(weight):
        model = program(toy, ponder.expert(other, OTHER, weight))
        return inference.smc(model, num_particles=8).run(jax.random.key(0)).log_evidence

    for weight in (0.5, -0.5):
        model = program(toy, ponder.expert(other, OTHER, weight))
        direct = inference.smc(model, num_particles=8).run(jax.random.key(0)).log_evidence
        np.testing.assert_allclose(evidence(weight), direct, rtol=1e-5)
    assert evidence._cache_size() == 1


@SLOW
def test_models_that_are_no_pytrees_are_experts_too(toy, other):
    runs = [
        inference.smc(program(toy, ponder.expert(lm, OTHER, -0.5)), num_particles=8).run(jax.random.key(0))
        for lm in (other, NoPytree(other))
    ]
    np.testing.assert_allclose(runs[0].log_evidence, runs[1].log_evidence, rtol=1e-5)


@pytest.mark.parametrize(
    "weight",
    [
        float("nan"),
        -float("inf"),
        1e39,
        True,
        np.True_,
        "1",
        None,
        [1.0],
        1j,
        np.ones(2),
        jnp.float32(np.nan),
    ],
    ids=repr,
)
def test_bad_weights(toy, weight):
    with pytest.raises(ValueError, match="weight: expected a finite number, got"):
        ponder.expert(toy, weight=weight)


@pytest.mark.parametrize("weight", [2, -1.5, np.float32(0.5), np.int8(-1), np.array(2.0), jnp.float32(0.5)])
def test_good_weights(toy, weight):
    assert float(ponder.expert(toy, weight=weight).weight) == float(weight)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lm": "smollm2"}, TypeError, r"lm: expected a LanguageModel .*got str"),
        ({"lm": TableLM}, TypeError, "lm: .*got the class"),
        ({"prompt": ""}, ValueError, "prompt: expected at least one token"),
        ({"prompt": [4]}, ValueError, r"prompt: expected token ids in \[0, 4\), got \[4\]"),
        ({"prompt": 0.5}, TypeError, "prompt: expected a str, chat messages or"),
    ],
)
def test_bad_arguments(toy, arguments, error, message):
    with pytest.raises(error, match=message):
        ponder.expert(**({"lm": toy} | arguments))


def test_another_vocabulary_is_refused(toy, other):
    pieces = PieceTokenizer((b"a", b"b", b"x", b""))
    larger = TableLM.random(jax.random.key(0), 5, eos_token_ids=(3,))
    for lm, message in (
        (larger, "expected the program's vocabulary of 4 tokens, got 5"),
        (
            dataclasses.replace(other, tokenizer=pieces),
            "token 2 is b'x' in the expert and b'c' in the program",
        ),
        (
            dataclasses.replace(other, eos_token_ids=(2,)),
            "expected the program's eos_token_ids (3,), got (2,)",
        ),
    ):
        with pytest.raises(ValueError, match="expert: .*" + re.escape(message)):
            program(toy, ponder.expert(lm))
    program(toy, ponder.expert(dataclasses.replace(other, tokenizer=PieceTokenizer(toy.tokenizer.pieces))))
    program(toy, ponder.expert(dataclasses.replace(other, tokenizer=None, eos_token_ids=())))


def test_the_context_of_the_expert_is_limited(toy, other):
    lm = NoPytree(other)
    program(toy, ponder.expert(lm))
    with pytest.raises(
        ValueError, match="expert: prompt: 3 tokens and max_new_tokens=3 exceed the model's context of 5"
    ):
        program(toy, ponder.expert(lm, [0, 1, 2]))


def test_the_programs_prompt_must_be_known(toy, other):
    with pytest.raises(ValueError, match="prompt=None takes the program's prompt, but the context has none"):
        ponder.expert(other).bind(Context(toy, T))
    ponder.expert(other, [1]).bind(Context(toy, T))
    with pytest.raises(TypeError, match="several prompts need a model with prefill_many; NoPytree has none"):
        ponder.expert(NoPytree(other)).bind(Context(toy, T, ((0,), (1,))))


def test_it_has_to_be_bound(other):
    for prompt in (None, [1]):
        assert not hasattr(ponder.expert(other, prompt), "init")


def test_a_bound_expert_can_be_bound_again(toy, other):
    """With the new program's prompt, or still its own."""
    for prompt, expected in ((None, [2]), (OTHER, OTHER)):
        bound = ponder.expert(other, prompt).bind(Context(toy, T, (tuple(PROMPT),)))
        again = bound.bind(Context(toy, T + 1, ((2,),)))
        state = again.update(again.init(1), jnp.array([0]), jnp.array([True]))
        assert float(again.log_prefix(state)[0]) == pytest.approx(log_prob(other, expected, [0]), abs=1e-5)


@pytest.mark.slow
def test_against_teacher_forcing(smollm2):
    """The expert's own prompt, of another length than the program's; log Φ of each trace by one long read."""
    uniform = TableLM(jnp.zeros(smollm2.vocab_size), smollm2.eos_token_ids, smollm2.tokenizer)
    prompt = smollm2.tokenizer.encode("In the evening the fishermen came home and said that")
    model = ponder.Generation(uniform, [0], max_new_tokens=8, potential=ponder.expert(smollm2, prompt, 0.75))
    algorithm = inference.smc(model, num_particles=4, ess_threshold=1.0)
    posterior = algorithm.run(jax.random.key(3))
    assert posterior.stats.resampled.any()
    score = jax.jit(lambda lm, tokens: jax.nn.log_softmax(lm.score(tokens)))
    for tokens, length, found in zip(
        posterior.tokens, posterior.lengths, posterior.log_potential, strict=True
    ):
        text = jnp.concatenate(
            [jnp.asarray(prompt), tokens]
        )  # causal: padding behind the end does not matter
        rows = score(smollm2, text)[len(prompt) - 1 :]
        expected = 0.75 * sum(float(rows[i, tokens[i]]) for i in range(int(length)))
        assert float(found) == pytest.approx(expected, abs=1e-3)
    again = algorithm.run(jax.random.key(3))  # nothing of the program was given away by the first run
    np.testing.assert_array_equal(posterior.tokens, again.tokens)
