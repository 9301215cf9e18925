"""Potentials of one's own: three methods are enough, and objects that only follow the protocol are taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.bases import BasePotential, UnboundPotential
from ponder.foreign import ForeignPotential, as_evidence, as_potential
from ponder.models import TableLM
from ponder.models.pytrees import pytree, static
from ponder.protocols import Context, Move
from ponder.testing import check_algorithm, check_potential

A, EOS = 0, 3
PROMPT, T = [1], 3


class FewA(ponder.Composable):
    """What a user has to write: Φ is exp(-0.7) for every token a."""

    def init(self, num_particles):
        return {"count": jnp.zeros(num_particles, jnp.int32)}

    def update(self, state, tokens, active):
        return {"count": state["count"] + (active & (tokens == A)).astype(jnp.int32)}

    def log_complete(self, state):
        return -0.7 * state["count"].astype(jnp.float32)


class Foreign:
    """The same, of somebody who knows the protocol alone: no base class, no pytree, all six methods."""

    withholds = True  # `log_prefix` says nothing, which cannot be seen from outside
    init, update, log_complete = FewA.init, FewA.update, FewA.log_complete

    def log_prefix(self, state):
        return jnp.zeros(state["count"].shape, jnp.float32)

    def token_logits(self, state):
        return None

    def fork(self, state, ancestors):
        return {"count": state["count"][ancestors]}


def program(lm, potential, prompt=PROMPT, **settings):
    return ponder.Generation(lm, prompt, max_new_tokens=T, potential=potential, **settings)


def same(one, other):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.log_weights, other.log_weights)
    np.testing.assert_array_equal(one.log_evidence, other.log_evidence)


@pytest.mark.parametrize("potential", [FewA(), Foreign()], ids=["three methods", "six of the protocol"])
def test_the_laws_hold(toy, potential):
    check_potential(potential, toy, num_particles=4, num_steps=3, num_tokens=4)
    check_potential(ponder.tokens(forbid=[1]) * potential, toy, num_particles=4, num_steps=3, num_tokens=4)


@pytest.mark.parametrize("potential", [FewA(), Foreign()], ids=["three methods", "six of the protocol"])
@pytest.mark.parametrize("unit", ["token", ponder.Step("b", max_tokens=2)], ids=["token", "step"])
def test_the_evidence_is_exact(toy, potential, unit):
    """Σ p(x) exp(-0.7 · number of a) over all traces, with p(x) by enumeration under no evidence."""
    prior = inference.exact(program(toy, None)).run()
    inside = np.arange(T)[None] < np.asarray(prior.lengths)[:, None]
    counts = ((np.asarray(prior.tokens) == A) & inside).sum(axis=1)
    expected = np.log((np.exp(np.asarray(prior.log_weights, np.float64)) * np.exp(-0.7 * counts)).sum())
    found = inference.exact(program(toy, potential, unit=unit)).run()
    assert float(found.log_evidence) == pytest.approx(expected, abs=1e-5)


def test_smc_is_proper(toy):
    model = program(toy, FewA())
    check_algorithm(inference.smc(model, 4, ess_threshold=1.0), model, num_runs=1000)


def test_defaults(toy):
    """They say nothing of unfinished traces, offer no guide, and take no notice of what goes on."""
    potential, rows = FewA(), jnp.array([True, False])
    state = potential.update(potential.init(2), jnp.array([A, A], jnp.int32), rows)
    np.testing.assert_array_equal(potential.log_complete(state), np.float32([-0.7, 0.0]))
    np.testing.assert_array_equal(potential.judge(state, rows), potential.log_complete(state))
    for value in (potential.log_prefix(state), potential.judge_prefix(state, rows)):
        np.testing.assert_array_equal(value, np.zeros(2))
        assert value.dtype == jnp.float32
    assert potential.token_logits(state) is None and potential.complete_logits(state) is None
    assert potential.observe(state, jnp.zeros((2, 4))) is state and potential.commit(state, rows) is state
    np.testing.assert_array_equal(potential.fork(state, jnp.array([1, 0]))["count"], [0, 1])
    assert potential.bind(Context(toy, T)) is potential and potential.num_reward_models == 0
    assert isinstance(potential, ponder.Potential)


@pytest.mark.parametrize("missing", ["init", "update", "log_complete"])
def test_what_is_missing_is_told_at_once(missing):
    methods = {name: vars(FewA)[name] for name in ("init", "update", "log_complete") if name != missing}
    with pytest.raises(TypeError, match=f"abstract.*{missing}"):
        type("Mine", (ponder.Composable,), methods)()


def test_an_unbound_potential_needs_bind():
    with pytest.raises(TypeError, match=r"abstract.*bind"):
        type("Mine", (UnboundPotential,), {})()


class Half(FewA):
    """Values of another float type, as JAX's 64-bit mode gives them to those who do not name one."""

    def log_complete(self, state):
        return super().log_complete(state).astype(jnp.float16)


def test_values_may_be_of_another_float_type(toy):
    ban = ponder.tokens(forbid=[1])
    batch = program(toy, [(ban * Half()) ** 0.5, Half()], [[1], [2]])
    first, second = inference.smc(batch, 4).run(jax.random.key(0))
    for posterior in (first, second):
        assert posterior.log_weights.dtype == jnp.float32 and np.isfinite(posterior.log_evidence)


# Foreign objects


def test_a_foreign_object_is_wrapped_once():
    own, foreign = FewA(), Foreign()
    assert as_potential(own) is own
    wrapped = as_potential(foreign)
    assert isinstance(wrapped, ForeignPotential) and wrapped.potential is foreign
    assert as_potential(wrapped) is wrapped and as_evidence(wrapped) is wrapped
    assert repr(wrapped) == repr(foreign)
    unbound = ponder.regex("a")
    assert as_evidence(unbound) is unbound


def test_a_foreign_object_does_what_one_of_ours_does(toy):
    """In a program, a product, a power and for one of several prompts: the same numbers."""
    ban = ponder.tokens(forbid=[1])

    def run(potential):
        batch = program(toy, [(ban * potential) ** 0.5, potential], [[1], [2]])
        return inference.smc(batch, 8).run(jax.random.key(1))

    for one, other in zip(run(FewA()), run(Foreign()), strict=True):
        same(one, other)


class Everything(Foreign):
    """A foreign object with all that is optional; it notes who was called."""

    num_reward_models = 2

    def __init__(self):
        self.called = []

    def bind(self, context):
        self.called.append(("bind", context.max_new_tokens))
        return self

    def observe(self, state, log_prior):
        self.called.append(("observe", log_prior.shape))
        return state

    def complete_logits(self, state):
        self.called.append(("complete_logits",))

    def judge(self, state, ends):
        self.called.append(("judge", ends.shape))
        return self.log_complete(state)

    def judge_prefix(self, state, rows):
        self.called.append(("judge_prefix", rows.shape))
        return self.log_prefix(state)

    def commit(self, state, rows):
        self.called.append(("commit", rows.shape))
        return state


OPTIONAL = {"bind", "observe", "complete_logits", "judge", "judge_prefix", "commit"}


def test_what_a_foreign_object_has_beyond_the_protocol_is_used():
    foreign = Everything()
    potential = as_potential(foreign).bind(Context(TableLM(jnp.zeros((4, 4))), T))
    state, rows = potential.init(2), jnp.ones(2, bool)
    state = potential.commit(potential.observe(state, jnp.zeros((2, 4))), rows)
    assert potential.complete_logits(state) is None
    np.testing.assert_array_equal(potential.judge(state, rows), potential.judge_prefix(state, rows))
    assert {name for name, *_ in foreign.called} == OPTIONAL
    assert potential.num_reward_models == 2


@pytest.mark.parametrize(
    "wrap",
    [lambda p: p, lambda p: p * ponder.tokens(forbid=[1]), lambda p: (p * FewA()) ** 0.5],
    ids=["alone", "product", "power"],
)
def test_a_program_uses_it_too(toy, wrap):
    """All but `complete_logits`, which only matters beside a guide."""
    foreign = Everything()
    model = program(toy, wrap(foreign))
    assert model.num_reward_models == 2
    inference.smc(model, 4).run(jax.random.key(0))
    assert {name for name, *_ in foreign.called} >= OPTIONAL - {"complete_logits"}
    assert ("bind", T) in foreign.called and ("observe", (4, 4)) in foreign.called


def test_one_of_several_prompts_may_have_a_foreign_potential(toy):
    foreign = Everything()
    model = program(toy, [FewA(), foreign], [[1], [2]])
    assert model.num_reward_models == 2
    inference.smc(model, 4).run(jax.random.key(0))
    assert ("judge", (4,)) in foreign.called  # its own block


def test_bind_may_return_another_foreign_object(toy):
    class Description(Foreign):
        def bind(self, context):
            return Foreign()

    bound = as_potential(Description()).bind(Context(toy, T))
    assert isinstance(bound, ForeignPotential) and type(bound.potential) is Foreign

    class Forgets(ponder.Composable):
        init, update, log_complete = FewA.init, FewA.update, FewA.log_complete

        def bind(self, context):
            pass

    with pytest.raises(TypeError, match="got NoneType, which has no fork, init"):
        program(toy, Forgets())


@dataclasses.dataclass(frozen=True, eq=False)
class Weighted(Foreign):
    """Notes each time that it is traced; compared by identity."""

    weight: float
    traced: list

    def log_complete(self, state):
        self.traced.append(type(self.weight).__name__)
        return -self.weight * state["count"].astype(jnp.float32)


def test_an_object_that_is_no_pytree_is_a_constant_compared_by_identity(toy):
    traced = []
    one, other = Weighted(0.7, traced), Weighted(0.7, traced)
    wrapped = as_potential(one)
    assert jax.tree.leaves(wrapped) == [one]
    for potential, is_new in ((one, True), (one, False), (other, True)):
        before = len(traced)
        inference.smc(program(toy, potential), 4).run(jax.random.key(0))
        assert (len(traced) > before) == is_new
    assert set(traced) == {"float"}


def test_a_pytree_stays_one(toy):
    """New values need no new compilation."""

    @pytree
    class Registered(Foreign):
        weight: jax.Array
        traced: list = static()

        def log_complete(self, state):
            self.traced.append(isinstance(self.weight, jax.core.Tracer))
            return -self.weight * state["count"].astype(jnp.float32)

    traced = _Notes()
    light, heavy = (Registered(jnp.float32(weight), traced) for weight in (0.1, 0.7))
    (leaf,) = jax.tree.leaves(as_potential(light))
    assert leaf is light.weight
    first = inference.smc(program(toy, light), 4).run(jax.random.key(0))
    count = len(traced)
    second = inference.smc(program(toy, heavy), 4).run(jax.random.key(0))
    assert all(traced) and len(traced) == count > 0
    assert float(second.log_evidence) < float(first.log_evidence)


class _Notes(list):
    """A list that may be static: hashed by identity."""

    __hash__ = object.__hash__


@pytest.mark.parametrize("place", [lambda lm, p: program(lm, p), lambda lm, p: check_potential(p, lm)])
def test_what_is_no_potential_is_refused(toy, place):
    class Partly:
        def init(self, num_particles):
            return None

    with pytest.raises(TypeError, match="got Partly, which has no fork, log_complete, log_prefix, token_lo"):
        place(toy, Partly())
    with pytest.raises(TypeError, match="the class Foreign itself and not an instance"):
        place(toy, Foreign)


def test_the_base_class_has_the_whole_contract():
    """What wrappers pass on is all that there is: none of them forgets a method of the base class."""
    from ponder.potentials.combining import Product, Tempered
    from ponder.program.per_prompt import PerPrompt

    contract = {name for name in vars(BasePotential) if not name.startswith("_")}
    assert contract == {
        *("init", "update", "log_prefix", "log_complete", "token_logits", "fork"),
        *OPTIONAL,
        "judge_apart",
        "num_reward_models",
        "withholds",
    }
    for wrapper in (ForeignPotential, Product, Tempered, PerPrompt):
        missing = contract - set(vars(wrapper))
        assert missing <= ({"bind"} if wrapper is PerPrompt else set()), wrapper


def test_an_unbound_potential_says_what_is_missing():
    with pytest.raises(
        AttributeError, match=r"regex\('a'\) has to be bound first: ponder.Generation does it"
    ):
        ponder.regex("a").log_prefix(None)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(ponder.regex("a"), "nonsense")  # noqa: B009


def test_values_of_factors_are_checked_one_by_one(toy):
    class Verdict(FewA):
        def log_complete(self, state):
            return state["count"] > 0

    class Column(FewA):
        def log_complete(self, state):
            return jnp.zeros((state["count"].shape[0], 1), jnp.float32)

    for potential in (Verdict() * FewA(), Verdict() ** 2.0, [Verdict(), FewA()]):
        prompt = [PROMPT, PROMPT] if isinstance(potential, list) else PROMPT
        with pytest.raises(TypeError, match=r"expected real numbers \(natural logs\), got dtype bool"):
            ponder.inference.smc(program(toy, potential, prompt), 2).run(jax.random.key(0))
    with pytest.raises(ValueError, match="expected factors with values of one shape"):
        ponder.inference.smc(program(toy, Column() * FewA()), 2).run(jax.random.key(0))
    with pytest.raises(TypeError, match="expected one for the single prompt, got a list of 2"):
        program(toy, [FewA(), FewA()])


class Walk:
    """A state-space model of somebody who knows the protocol alone."""

    num_steps = 3

    def init(self, key, num_particles):
        return jnp.zeros(num_particles, jnp.int32)

    def propagate(self, key, state, forced=None):
        return state + 1, Move(state, jnp.zeros(state.shape)), jnp.zeros(state.shape)

    def fork(self, state, ancestors):
        return state[ancestors]

    def is_done(self, state):
        return state >= 3


def test_programs_are_asked_for_one_value_a_particle():
    class Column(Walk):
        def propagate(self, key, state, forced=None):
            return state + 1, Move(state, jnp.zeros(state.shape)), jnp.zeros((*state.shape, 1))

    class Whole(Walk):
        def is_done(self, state):
            return jnp.all(state >= 3)

    class Never(Walk):
        num_steps = 0

    ponder.inference.smc(Walk(), 2).run(jax.random.key(0))
    for wrong, method, shape in ((Column, "propagate", r"\(2, 1\)"), (Whole, "is_done", r"\(\)")):
        with pytest.raises(ValueError, match=rf"program.{method}: expected one value .*got shape {shape}"):
            ponder.inference.smc(wrong(), 2).run(jax.random.key(0))
    with pytest.raises(ValueError, match=r"program\.num_steps: expected an integer >= 1, got 0"):
        ponder.inference.smc(Never(), 2)
