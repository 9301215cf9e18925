import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder.bases import BasePotential
from ponder.foreign import ForeignPotential, as_evidence, as_potential
from ponder.models import PieceTokenizer, TableLM
from ponder.potentials.combining import Product, Tempered, UnboundProduct, UnboundTempered
from ponder.potentials.power import Power
from ponder.protocols import Context
from ponder.testing import check_potential


class Vowels:
    """What a user may write: no base class, no pytree, no operators; exp(-0.5) for every token a."""

    def init(self, num_particles):
        return jnp.zeros(num_particles)

    def update(self, state, tokens, active):
        return state - jnp.where(active & (tokens == 0), 0.5, 0.0)

    def log_prefix(self, state):
        return state

    def log_complete(self, state):
        return 2.0 * state

    def token_logits(self, state):
        return None

    def fork(self, state, ancestors):
        return state[ancestors]


class ComposableVowels(Vowels, ponder.Composable):
    """The same with operators."""


@pytest.fixture(scope="module")
def two_ends():
    """Four tokens, of which the last two end a trace."""
    tokenizer = PieceTokenizer((b"a", b"b", b"", b""))
    return TableLM.random(jax.random.key(2), 4, eos_token_ids=(2, 3), tokenizer=tokenizer)


POTENTIALS = {
    "tokens, allow": lambda scores: ponder.tokens(allow=[0, 1]),
    "tokens, forbid": lambda scores: ponder.tokens(forbid=[1, 3]),
    "power": lambda scores: ponder.power(2.5),
    "power below 1": lambda scores: ponder.power(0.5),
    "tempered": lambda scores: ponder.regex("(a|b)*") ** 0.5,
    "tempered to nothing": lambda scores: ponder.tokens(forbid=[0]) ** 0,
    "product": lambda scores: ponder.tokens(forbid=[2]) * scores * ponder.power(1.5),
    "product of the product": lambda scores: (ponder.regex("a*b*") * ponder.power(2.0)) ** 0.3 * Vowels(),
    "user": lambda scores: Vowels(),
    "text": lambda scores: ponder.text(
        lambda texts: ["b" not in t for t in texts], prefix=lambda texts: ["bb" not in t for t in texts]
    ),
}


@pytest.mark.parametrize("name", POTENTIALS)
def test_laws(toy, scores, name):
    check_potential(POTENTIALS[name](scores), toy, num_particles=4, num_steps=3, num_tokens=3)


def test_laws_with_two_ends(two_ends):
    potential = ponder.tokens(forbid=[3]) * ponder.power(2.0) * ponder.regex("(ab)*")
    check_potential(potential, two_ends, num_particles=4, num_steps=3, num_tokens=3)


def values(potential, lm, trace):
    """Log Φ of a trace as prefix and as complete, with the prior of `lm` after the prompt (0)."""
    potential = as_evidence(potential).bind(Context(lm, 8))
    state = potential.init(1)
    cache, logits = lm.prefill(jnp.zeros(1, jnp.int32), 1, 8)
    for token in trace:
        state = potential.observe(state, jax.nn.log_softmax(logits))
        state = potential.update(state, jnp.array([token]), jnp.array([True]))
        cache, logits = lm.extend(cache, jnp.array([token]))
    return float(potential.log_prefix(state)[0]), float(potential.log_complete(state)[0])


def test_values(toy, scores):
    assert values(Vowels(), toy, [0, 1, 0]) == (-1.0, -2.0)
    assert values(ponder.tokens(allow=[0]), toy, [0, 3]) == (0.0, 0.0)  # EOS stays allowed
    assert values(ponder.tokens(allow=[0]), toy, [0, 1, 0]) == (-np.inf, -np.inf)
    assert values(ponder.tokens(forbid=[3]), toy, [0, 3])[1] == -np.inf
    assert values(ponder.tokens(allow=[0, 1], forbid=[1]), toy, [1])[1] == -np.inf
    log_p, history = 0.0, [0, 0]
    for token in (2, 0, 3):
        row = np.asarray(toy.table, float)[history[-2], history[-1]]
        log_p += row[token] - np.logaddexp.reduce(row)
        history.append(token)
    for alpha in (0.5, 1.0, 3.0):
        assert values(ponder.power(alpha), toy, [2, 0, 3])[1] == pytest.approx((alpha - 1) * log_p, abs=1e-5)


def test_products_and_powers(toy, scores):
    trace = [0, 2, 0]
    a, b, c = (values(p, toy, trace) for p in (scores, ponder.power(2.0), Vowels()))
    for product in (scores * ponder.power(2.0) * Vowels(), Vowels() * (scores * ponder.power(2.0))):
        np.testing.assert_allclose(values(product, toy, trace), np.add(np.add(a, b), c), rtol=1e-5)
    np.testing.assert_allclose(values(scores**0.3, toy, trace), 0.3 * np.array(a), rtol=1e-5)
    np.testing.assert_allclose(
        values((scores * Vowels()) ** 2 * scores, toy, trace), 3 * np.array(a) + 2 * np.array(c), rtol=1e-5
    )


def test_products_are_flat(scores):
    a, b, c = scores, ponder.power(2.0), ponder.tokens(forbid=[1])
    user = Vowels()
    for product, factors in (
        (a * b * c, (a, b, c)),
        (a * (b * c), (a, b, c)),
        ((a * b) * (b * c), (a, b, b, c)),
        (user * a, (user, a)),
        (a * user, (a, user)),
        (user * (a * b), (user, a, b)),
        ((a * b) * user, (a, b, user)),
    ):
        assert isinstance(product, UnboundProduct if c in factors else Product)
        assert len(product.potentials) == len(factors)
        own = [f.potential if isinstance(f, ForeignPotential) else f for f in product.potentials]
        assert all(x is y for x, y in zip(own, factors, strict=True))
    power = (a * user) ** 2
    assert isinstance(power, Tempered) and isinstance(power.potential, Product)


def test_products_and_powers_of_what_is_unbound_are_unbound(toy, scores):
    """None of a potential's methods is there before `bind`, and all are after it."""
    ban = ponder.tokens(forbid=[1])
    for potential, made in (
        (ban * scores, Product),
        (scores * ban, Product),
        (Vowels() * ban, Product),
        (ban**0.5, Tempered),
        ((scores * ban) ** 0.5, Tempered),
    ):
        assert isinstance(potential, UnboundProduct | UnboundTempered)
        assert not isinstance(potential, ponder.Potential | BasePotential)
        with pytest.raises(AttributeError, match="has to be bound first"):
            potential.init(2)
        bound = potential.bind(Context(toy, 4))
        assert isinstance(bound, made) and isinstance(bound, ponder.Potential)
        # Bound again, it fits another program.
        other = TableLM.random(jax.random.key(0), 6, eos_token_ids=(5,))
        state = bound.bind(Context(other, 4)).init(2)
        assert bound.bind(Context(other, 4)).log_prefix(state).shape == (2,)


@pytest.mark.parametrize("other", [2.0, None, "a", lambda texts: texts])
def test_only_potentials_multiply(scores, other):
    with pytest.raises(TypeError, match=r"unsupported operand|can't multiply"):
        scores * other
    with pytest.raises(TypeError, match=r"unsupported operand|can't multiply"):
        other * scores
    if not isinstance(other, float):
        with pytest.raises(TypeError, match="unsupported operand"):
            scores**other


def test_tempering_to_nothing_and_to_itself(toy):
    ban = ponder.tokens(forbid=[0])
    assert values(ban**0, toy, [0, 1]) == (0.0, 0.0)  # 0 to the power of 0 is 1: no constraint is left
    assert values(ban**0.0, toy, [1]) == (0.0, 0.0)
    for trace in ([0, 1], [1, 3]):
        assert values(ban**1, toy, trace) == values(ban, toy, trace)
    bound = (ban**0).bind(Context(toy, 4))
    np.testing.assert_array_equal(bound.token_logits(bound.init(2)), 0.0)
    np.testing.assert_array_equal(bound.complete_logits(bound.init(2)), 0.0)


def test_the_exponent_may_be_traced(toy):
    state = jnp.array([-1.0, -2.0])
    found = jax.jit(lambda s: (ComposableVowels() ** s).log_prefix(state))(jnp.float32(0.5))
    np.testing.assert_allclose(found, [-0.5, -1.0])
    slope = jax.grad(lambda s: (ComposableVowels() ** s).log_prefix(state).sum())(0.5)
    assert float(slope) == -3.0


@pytest.mark.parametrize(
    "exponent", [-1, -0.5, float("nan"), float("inf"), np.float32(-1.0), np.array([1.0, -1.0])]
)
def test_bad_exponents(scores, exponent):
    with pytest.raises(ValueError, match="exponent: expected a finite number >= 0"):
        scores**exponent


@dataclasses.dataclass(frozen=True, eq=False)
class Expensive(Vowels):
    """Judges only the rows that ended and counts how often it was asked."""

    calls: list

    def judge(self, state, ends):
        self.calls.append(np.asarray(ends).tolist())
        return jnp.where(ends, self.log_complete(state), 99.0)


def test_products_and_powers_pass_judgement_on():
    calls = []
    potential = Product((as_potential(Expensive(calls)), as_potential(Vowels())))
    state = potential.update(potential.init(2), jnp.array([0, 1]), jnp.ones(2, bool))
    found = Tempered(potential, 0.5).judge(state, jnp.array([True, False]))
    assert float(found[0]) == -1.0
    assert calls == [[True, False]]


def test_guides_of_a_product(toy, scores):
    """The sum over the factors that guide; completions only where all of these can tell them."""
    allow, forbid = ponder.tokens(allow=[0, 1]), ponder.tokens(forbid=[1])
    bound = (allow * scores * forbid).bind(Context(toy, 4))
    state = bound.init(1)
    np.testing.assert_array_equal(bound.token_logits(state), [[0, -np.inf, -np.inf, 0]])
    np.testing.assert_array_equal(bound.complete_logits(state), [[0, -np.inf, -np.inf, 0]])
    unguided = (scores * Vowels()).bind(Context(toy, 4))
    assert unguided.token_logits(unguided.init(1)) is None
    assert unguided.complete_logits(unguided.init(1)) is None

    class GuidesOnly(Vowels):
        def token_logits(self, state):
            return jnp.zeros((len(state), 4))

    partly = (allow * GuidesOnly()).bind(Context(toy, 4))
    assert partly.complete_logits(partly.init(1)) is None
    assert partly.token_logits(partly.init(1)) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "tokens: expected allow= or forbid=, got neither"),
        ({"forbid": []}, "got neither"),
        ({"allow": "ab"}, "allow: expected token ids, got the string 'ab'"),
        ({"forbid": "ab"}, "forbid: expected token ids, got the string 'ab'"),
        ({"forbid": 3}, "forbid: expected token ids, got 3"),
        ({"allow": 3}, "allow: expected token ids, got 3"),
        ({"allow": [0.5]}, "allow: expected integers"),
        ({"forbid": [True]}, "forbid: expected integers"),
        ({"forbid": ["a"]}, "forbid: expected integers"),
    ],
    ids=str,
)
def test_bad_tokens(arguments, message):
    with pytest.raises(ValueError, match=message):
        ponder.tokens(**arguments)


@pytest.mark.parametrize(("name", "ids"), [("allow", [0, 4]), ("forbid", [-1])])
def test_tokens_outside_the_vocabulary(toy, name, ids):
    with pytest.raises(ValueError, match=rf"{name}: expected token ids in \[0, 4\), got \[{ids[-1]}\]"):
        ponder.Generation(toy, [0], max_new_tokens=2, potential=ponder.tokens(**{name: ids}))


def test_tokens_take_any_iterable_of_integers(toy):
    for ids in ({0, 1}, range(2), np.array([0, 1]), (i for i in (0, 1)), jnp.array([0, 1])):
        assert sorted(ponder.tokens(allow=ids).allow) == [0, 1]


def test_tokens_need_a_vocabulary():
    assert not hasattr(ponder.tokens(forbid=[1]), "token_logits")


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), np.float32(-2), "2", None])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match="alpha: expected a finite number > 0"):
        ponder.power(alpha)


def test_alpha_may_be_traced(toy):
    assert isinstance(jax.jit(ponder.power)(2.0), Power)
    assert isinstance(ponder.power(jnp.float32(2.0)), Power)


def test_power_needs_the_prior():
    potential = ponder.power(2.0)
    with pytest.raises(ValueError, match="power: the prior was not observed"):
        potential.token_logits(potential.init(2))
    with pytest.raises(ValueError, match="power: the prior was not observed"):
        potential.update(potential.init(2), jnp.array([0, 1]), jnp.ones(2, bool))


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_power_of_what_the_prior_excludes_is_zero(alpha):
    """0^α is 0 for α < 1 too, where Φ alone would be infinite."""
    potential = ponder.power(alpha)
    log_prior = jnp.log(jnp.array([[0.5, 0.5, 0.0]], jnp.float32))
    state = potential.observe(potential.init(1), log_prior)
    np.testing.assert_allclose(
        potential.token_logits(state), [[(alpha - 1) * np.log(0.5)] * 2 + [-np.inf]], rtol=1e-6
    )
    dead = potential.update(state, jnp.array([2]), jnp.array([True]))
    assert float(potential.log_prefix(dead)[0]) == -np.inf
