"""Process rewards: links and aggregates by hand, the laws, who is called when, translation, and evidence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ponder
from ponder import inference
from ponder.models import Decoder, DecoderConfig, PieceTokenizer, RewardDecoder, TableLM, TableReward
from ponder.models.reward_model import RewardHead
from ponder.protocols import Context
from ponder.rewards.links import SMALLEST
from ponder.testing import check_algorithm, check_potential

LINKS = ("bernoulli", "odds", "ratio", "exp")
AGGREGATES = ("last", "min", "prod", "mean")
T = 3
PROMPT = [1, 2]
A, B, C, EOS = range(4)


@pytest.fixture(scope="module")
def prm():
    """A reward model over the toy's ids that looks at the last two tokens."""
    return TableReward.random(jax.random.key(5), 4, order=2)


@pytest.fixture(scope="module")
def scripted():
    """Scores by the last token: a 0.8, b 0.5, c 0.9."""
    return TableReward(jnp.array([0.8, 0.5, 0.9, 0.123]))


@dataclasses.dataclass(frozen=True)
class NoBlocks:
    """A reward model with only what the protocol asks for, and a separator."""

    prm: TableReward
    separator: tuple[int, ...] = ()
    tokenizer = None

    @property
    def vocab_size(self):
        return self.prm.vocab_size

    def prefill(self, tokens, num_particles, max_new_tokens):
        return self.prm.prefill(tokens, num_particles, max_new_tokens)

    def extend(self, cache, tokens):
        return self.prm.extend(cache, tokens)

    def fork(self, cache, ancestors):
        return self.prm.fork(cache, ancestors)


def context(lm, prompts=((1, 2),), max_new_tokens=4, **kwargs):
    return Context(lm, max_new_tokens, tuple(map(tuple, prompts)), **kwargs)


def read(potential, units, num_rows=1, state=None):
    """Feed units (lists of tokens) to all rows, with a commit after each."""
    state = potential.init(num_rows) if state is None else state
    everyone = jnp.ones(num_rows, bool)
    for unit in units:
        for token in unit:
            state = potential.update(state, jnp.full(num_rows, token, jnp.int32), everyone)
        state = potential.commit(state, everyone)
    return state


def log_value(lm, potential, units, **kwargs):
    potential = potential.bind(context(lm, **kwargs))
    return float(potential.log_complete(read(potential, units))[0])


# Scores 0.8, 0.5, 0.9. Judgements: last the same; min .8 .5 .5; prod .8 .4 .36; mean .8 .65 2.2/3.
BY_HAND = {
    ("bernoulli", "last"): 0.36,
    ("bernoulli", "min"): 0.2,
    ("bernoulli", "prod"): 0.8 * 0.4 * 0.36,
    ("bernoulli", "mean"): 0.8 * 0.65 * 2.2 / 3,
    ("odds", "last"): 4 * 1 * 9,
    ("odds", "min"): 4 * 1 * 1,
    ("odds", "prod"): 4 * (2 / 3) * (0.36 / 0.64),
    ("odds", "mean"): 4 * (0.65 / 0.35) * 2.75,
    ("ratio", "last"): 0.9,
    ("ratio", "min"): 0.5,
    ("ratio", "prod"): 0.36,
    ("ratio", "mean"): 2.2 / 3,
    ("exp", "last"): np.exp(2 * 0.9),
    ("exp", "min"): np.exp(2 * 0.5),
    ("exp", "prod"): np.exp(2 * 0.36),
    ("exp", "mean"): np.exp(2 * 2.2 / 3),
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_links_and_aggregates_by_hand(toy, scripted, link, aggregate):
    scale = 2.0 if link == "exp" else 1.0
    potential = ponder.process_reward(scripted, link=link, aggregate=aggregate, scale=scale)
    found = log_value(toy, potential, [[A], [B], [C]])
    assert found == pytest.approx(np.log(BY_HAND[link, aggregate]), abs=1e-5)


def test_scale_and_offset_act_on_the_logit(toy, scripted):
    """Odds 4 of a become 4² · 3 = 48."""
    found = [
        log_value(toy, ponder.process_reward(scripted, link=link, scale=2.0, offset=np.log(3)), [[A]])
        for link in ("bernoulli", "odds", "ratio")
    ]
    np.testing.assert_allclose(found, np.log([48 / 49, 48, 48 / 49]), atol=1e-5)


def test_calibration_comes_before_scale_and_offset(toy, scripted):
    """0.8 is calibrated to 0.64, of odds 16/9; squared (256/81) and halved."""
    potential = ponder.process_reward(
        scripted, link="odds", calibration=lambda r: r * r, scale=2.0, offset=-np.log(2)
    )
    assert log_value(toy, potential, [[A]]) == pytest.approx(np.log(128 / 81), abs=1e-5)


def test_units_of_several_tokens_are_judged_once(toy, scripted):
    potential = ponder.process_reward(scripted, link="odds")
    assert log_value(toy, potential, [[A, B], [A, C]]) == pytest.approx(np.log(1 * 9), abs=1e-5)


def test_the_empty_trace_and_units_of_eos_are_not_judged(toy, scripted):
    potential = ponder.process_reward(scripted)
    assert log_value(toy, potential, []) == 0.0
    assert log_value(toy, potential, [[EOS]]) == 0.0
    assert log_value(toy, potential, [[A], [EOS]]) == log_value(toy, potential, [[A]])
    assert log_value(toy, potential, [[A, EOS]]) == log_value(toy, potential, [[A]])


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_scores_of_0_and_1_are_finite(toy, aggregate):
    edge = TableReward(jnp.array([0.0, 1.0, 0.5, 0.5]))
    for link in ("bernoulli", "odds", "ratio"):
        potential = ponder.process_reward(edge, link=link, aggregate=aggregate)
        low, high = log_value(toy, potential, [[A]]), log_value(toy, potential, [[B]])
        assert low == pytest.approx(np.log(SMALLEST), rel=1e-6)
        expected = np.log1p(-SMALLEST) - (np.log(SMALLEST) if link == "odds" else 0)
        assert high == pytest.approx(expected, rel=1e-5)


def test_small_products_keep_their_digits(toy):
    """0.01^30 is below float32."""
    potential = ponder.process_reward(TableReward(jnp.full(4, 0.01)), link="ratio", aggregate="prod")
    found = log_value(toy, potential, [[A]] * 30, max_new_tokens=30)
    assert found == pytest.approx(30 * np.log(0.01), rel=1e-5)


def test_a_nan_score_shows(toy):
    potential = ponder.process_reward(TableReward(jnp.array([jnp.nan, 0.5, 0.5, 0.5])))
    assert np.isnan(log_value(toy, potential, [[A]]))
    assert not np.isnan(log_value(toy, potential, [[B]]))


SMALL = {"num_particles": 3, "num_steps": 2, "num_tokens": 2}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_laws(toy, prm, link, aggregate):
    check_potential(ponder.process_reward(prm, link=link, aggregate=aggregate), toy, **SMALL)


@pytest.mark.slow
def test_laws_without_blocks(toy, prm):
    check_potential(ponder.process_reward(NoBlocks(prm, (2,)), scale=0.7, offset=-0.3), toy, **SMALL)


def test_laws_of_text_rewards(toy):
    lengths = ponder.text_reward(lambda prompt, texts: [1 / (1 + len(text)) for text in texts])
    check_potential(ponder.process_reward(lengths, link="odds") ** 0.5, toy, **SMALL)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_judging_on_the_fly_is_what_commit_keeps(toy, prm, link, aggregate):
    potential = ponder.process_reward(prm, link=link, aggregate=aggregate).bind(context(toy))
    state = read(potential, [[A], [C]], num_rows=2)
    tokens = jnp.array([[B, A], [C, C]], jnp.int32)
    for column in tokens.T:
        state = potential.update(state, column, jnp.ones(2, bool))
    fly = potential.log_prefix(state)
    committed = potential.commit(state, jnp.array([True, False]))
    np.testing.assert_allclose(potential.log_prefix(committed), fly, rtol=1e-6)
    # Row 1 was not committed: its tokens wait, and its cache is as it was.
    both = potential.commit(committed, jnp.ones(2, bool))
    np.testing.assert_allclose(potential.judge(both, jnp.ones(2, bool)), fly, rtol=1e-6)
    np.testing.assert_array_equal(both.num_pending, [0, 0])
    assert potential.token_logits(both) is None


def test_models_without_blocks_score_the_same(toy, prm):
    units = [[A, B], [EOS], [C]]
    expected = log_value(toy, ponder.process_reward(prm), units)
    assert log_value(toy, ponder.process_reward(NoBlocks(prm)), units) == pytest.approx(expected, abs=1e-6)
    apart = [[A, B, C], [C, C]]  # with the separator c after each step
    expected = log_value(toy, ponder.process_reward(prm), apart, max_new_tokens=8)
    found = log_value(toy, ponder.process_reward(NoBlocks(prm, (C,))), [[A, B], [C]])
    assert found == pytest.approx(expected, abs=1e-6)


def test_rows_of_different_lengths(toy, prm):
    """Each row as if it were alone, also where only some end their unit."""
    for model in (prm, NoBlocks(prm)):
        potential = ponder.process_reward(model).bind(context(toy))
        state = potential.init(2)
        both, first = jnp.array([True, True]), jnp.array([True, False])
        state = potential.update(state, jnp.array([A, B], jnp.int32), both)
        state = potential.commit(state, first)
        state = potential.update(state, jnp.array([C, C], jnp.int32), first)
        state = potential.commit(state, both)
        found = potential.log_prefix(state)
        expected = [log_value(toy, ponder.process_reward(prm), units) for units in ([[A], [C]], [[B]])]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_fork(toy, prm):
    potential = ponder.process_reward(prm, aggregate="mean").bind(context(toy))
    state = potential.update(potential.init(3), jnp.array([A, B, C], jnp.int32), jnp.ones(3, bool))
    state = potential.commit(state, jnp.array([True, True, False]))
    ancestors = jnp.array([2, 0, 2], jnp.int32)
    later = [read(potential, [[B]], 3, s) for s in (state, potential.fork(state, ancestors))]
    before, after = (np.asarray(potential.log_prefix(s)) for s in later)
    np.testing.assert_allclose(after, before[ancestors], rtol=1e-6)


def test_lost_tokens_show(toy, prm):
    """More tokens than a unit may have, and no commit."""
    potential = ponder.process_reward(prm).bind(context(toy, max_unit_tokens=1))
    state = potential.init(2)
    for active in ([True, True], [True, False]):
        state = potential.update(state, jnp.array([A, B], jnp.int32), jnp.array(active))
    np.testing.assert_array_equal(np.isnan(potential.log_prefix(state)), [True, False])


# Prompts


@pytest.mark.parametrize("model", ["table", "text"])
def test_several_prompts_are_as_many_alone(toy, prm, model):
    calls = []

    def fn(prompt, texts):
        calls.append(prompt)
        return [0.2 + 0.1 * len(prompt) + 0.05 * len(text) for text in texts]

    reward = prm if model == "table" else ponder.text_reward(fn)
    prompts = [[1, 2], [0]]
    potential = ponder.process_reward(reward).bind(context(toy, prompts))
    found = potential.log_prefix(read(potential, [[A], [C]], num_rows=4))
    alone = [
        log_value(toy, ponder.process_reward(reward), [[A], [C]], prompts=[prompt]) for prompt in prompts
    ]
    np.testing.assert_allclose(found, np.repeat(alone, 2), atol=1e-6)
    assert alone[0] != alone[1]
    assert set(calls) == ({"bc", "a"} if model == "text" else set())


def test_another_prompt(toy, prm):
    expected = log_value(toy, ponder.process_reward(prm), [[B]], prompts=[[0, 0]])
    for prompt in ([0, 0], [[0, 0]]):
        found = log_value(toy, ponder.process_reward(prm, prompt=prompt), [[B]])
        assert found == pytest.approx(expected, abs=1e-6)
    several = ponder.process_reward(prm, prompt=[[0, 0], [1]])
    with pytest.raises(ValueError, match="one for each of the program's 1, got 2"):
        several.bind(context(toy))


# Tokenizers


@pytest.fixture(scope="module")
def wide():
    """A reward model that spells the toy's text with other tokens."""
    pieces = PieceTokenizer((b"ab", b"c", b"a", b"b", b"cc"))
    return TableReward.random(jax.random.key(6), 5, order=2, tokenizer=pieces)


def test_another_tokenizer_reads_the_text(toy, wide):
    """Units "ab" and "cc" after the prompt "bc"."""
    potential = ponder.process_reward(wide).bind(context(toy, sources=("bc",)))
    state = read(potential, [[A, B], [EOS], [C, C]], num_rows=2)
    scores = wide.table[1, 0], wide.table[0, 4]  # c|ab, ab|cc
    np.testing.assert_allclose(potential.log_prefix(state), np.log(scores).sum(), atol=1e-6)
    # Without sources the ids are decoded; a chat takes the reward model's template.
    for sources in ((), ([{"role": "user", "content": "bc"}],)):
        found = log_value(toy, ponder.process_reward(wide), [[A, B], [C, C]], sources=sources)
        assert found == pytest.approx(np.log(scores).sum(), abs=1e-6)


def test_laws_with_another_tokenizer(toy, wide):
    check_potential(ponder.process_reward(wide, link="odds"), toy, **SMALL)


def test_a_character_that_a_unit_cuts_waits_for_the_next():
    lm = TableLM(
        jnp.zeros((4, 4)),
        eos_token_ids=(3,),
        tokenizer=PieceTokenizer((b"\xc3", b"\xa9", b"x", b"")),
    )
    reward = TableReward(jnp.array([0.2, 0.4]), tokenizer=PieceTokenizer(("é".encode(), b"x")))
    potential = ponder.process_reward(reward, link="odds")
    for units, odds in (
        ([[2, 0], [1]], (2 / 3, 0.25)),
        ([[2, 0]], (2 / 3,)),
        ([[0], [1], [2]], (0.25, 2 / 3)),
    ):
        found = log_value(lm, potential, units, prompts=[[2]])
        assert found == pytest.approx(np.log(odds).sum(), abs=1e-5)


def test_a_step_that_does_not_fit_is_an_error(capfd):
    lm = TableLM(jnp.zeros((2, 2)), tokenizer=PieceTokenizer((b"aaaa", b"b")))
    letters = TableReward(jnp.full(3, 0.5), tokenizer=PieceTokenizer((b"a", b"b", b"c")))
    with pytest.raises(
        Exception, match="a step has 4 tokens of the reward model, more than max_step_tokens=3"
    ):
        log_value(lm, ponder.process_reward(letters, max_step_tokens=3), [[0]], prompts=[[1]])
    with pytest.raises(Exception, match=r"a trace has 28 tokens .* there is room for 24"):
        log_value(lm, ponder.process_reward(letters), [[0]] * 7, prompts=[[1]])
    assert np.isfinite(log_value(lm, ponder.process_reward(letters), [[0]] * 4, prompts=[[1]]))
    capfd.readouterr()


def test_equal_tokenizers_share_ids(toy):
    """No call to the host: ids of another object with the same bytes are the same ids."""
    same = TableReward(jnp.full(4, 0.5), tokenizer=PieceTokenizer(toy.tokenizer.pieces))
    assert ponder.process_reward(same).bind(context(toy)).scorer.translation is None
    swapped = TableReward(jnp.full(4, 0.5), tokenizer=PieceTokenizer((b"b", b"a", b"c", b"")))
    assert ponder.process_reward(swapped).bind(context(toy)).scorer.translation is not None


# Who is called


class Counter:
    """Scores by length; keeps what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompt, texts):
        self.calls.append((prompt, sorted(texts)))
        return np.array([1 / (2 + len(text)) for text in texts])


def test_the_host_is_called_once_a_unit_for_distinct_texts(toy):
    counter = Counter()
    potential = ponder.process_reward(ponder.text_reward(counter)).bind(context(toy, sources=("b c",)))
    commit, update = jax.jit(potential.commit), jax.jit(potential.update)
    everyone = jnp.ones(3, bool)
    state = update(potential.init(3), jnp.array([A, A, B], jnp.int32), everyone)
    state = commit(state, everyone)
    jax.block_until_ready(state)
    assert counter.calls == [("b c", ["a", "b"])]
    # Nothing new, EOS alone, and a row that does not end its unit: no call.
    state = commit(state, everyone)
    state = commit(update(state, jnp.full(3, EOS, jnp.int32), everyone), everyone)
    state = update(state, jnp.full(3, C, jnp.int32), jnp.array([True, False, False]))
    state = commit(state, jnp.array([False, True, True]))
    jax.block_until_ready((state, potential.judge(state, everyone)))
    assert len(counter.calls) == 1
    state = commit(state, everyone)
    values = jax.block_until_ready(jax.jit(potential.log_complete)(state))
    assert counter.calls[1:] == [("b c", ["ac"])]
    np.testing.assert_allclose(values, np.log([1 / 12, 1 / 3, 1 / 3]), rtol=1e-6)


def test_in_a_program_finished_traces_are_not_judged_again(toy):
    counter = Counter()
    program = ponder.Generation(
        toy, "bc", max_new_tokens=4, potential=ponder.process_reward(ponder.text_reward(counter))
    )
    posterior = inference.smc(program, num_particles=16, ess_threshold=1.0).run(jax.random.key(1))
    jax.block_until_ready(posterior.log_weights)
    assert 1 <= len(counter.calls) <= 4
    for step, (prompt, texts) in enumerate(counter.calls):
        assert prompt == "bc"
        assert all(len(text) == step + 1 for text in texts)
        assert len(texts) == len(set(texts))


def test_under_vmap_runs_share_a_call(toy):
    counter = Counter()
    potential = ponder.process_reward(ponder.text_reward(counter)).bind(context(toy))

    def run(tokens):
        state = potential.update(potential.init(2), tokens, jnp.ones(2, bool))
        return potential.log_prefix(potential.commit(state, jnp.ones(2, bool)))

    values = jax.block_until_ready(jax.vmap(run)(jnp.array([[A, B], [B, C]], jnp.int32)))
    np.testing.assert_allclose(values, np.full((2, 2), np.log(1 / 3)), rtol=1e-6)
    assert [texts for _, texts in counter.calls if texts] == [["a", "b", "c"]]


# Traced scale and offset


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("aggregate", ["last", "prod"])
def test_scale_may_be_traced_and_has_a_gradient(toy, prm, link, aggregate):
    units = [[A], [B, C], [EOS]]

    def value(scale, offset=0.0):
        offset = {} if link == "exp" else {"offset": offset}
        potential = ponder.process_reward(
            prm, link=link, aggregate=aggregate, scale=scale, improper=True, **offset
        )
        potential = potential.bind(context(toy))
        return potential.log_complete(read(potential, units, num_rows=2)).sum()

    found, slope = jax.jit(jax.value_and_grad(value))(1.3)
    assert float(found) == pytest.approx(float(value(1.3)), rel=1e-5)
    numeric = (float(value(1.31)) - float(value(1.29))) / 0.02
    assert float(slope) == pytest.approx(numeric, rel=1e-2, abs=1e-3)
    if link != "exp":
        assert np.isfinite(jax.grad(value, argnums=1)(1.3, 0.2))


def test_a_program_with_a_traced_scale(toy, prm):
    def log_evidence(scale):
        potential = ponder.process_reward(prm, scale=scale)
        program = ponder.Generation(toy, PROMPT, max_new_tokens=T, potential=potential)
        return inference.smc(program, num_particles=4).run(jax.random.key(0)).log_evidence

    assert float(jax.jit(log_evidence)(0.7)) == pytest.approx(float(log_evidence(0.7)), abs=1e-5)


def test_a_latent_scale_of_exp_is_refused(prm):
    with pytest.raises(ValueError, match="improper=True"):
        jax.jit(lambda beta: ponder.process_reward(prm, link="exp", scale=beta).likelihood.scale)(1.0)
    allowed = jax.jit(
        lambda beta: ponder.process_reward(prm, link="exp", scale=beta, improper=True).likelihood.scale
    )
    assert float(allowed(1.5)) == 1.5


# Evidence


def traces(num_tokens=T):
    """Every trace: ended by EOS, or of full length."""
    unfinished = [()]
    for step in range(num_tokens):
        longer = [(*x, v) for x in unfinished for v in range(4)]
        yield from (x for x in longer if x[-1] == EOS or step == num_tokens - 1)
        unfinished = [x for x in longer if x[-1] != EOS]


def joint(lm, prm, trace, link):
    """p(x) Φ(x), a judgement a token, read off the tables."""
    history, density, phi = [0, 0, *PROMPT], 1.0, 1.0
    for token in trace:
        row = np.asarray(lm.table, np.float64)[history[-2], history[-1]]
        density *= np.exp(row[token] - np.logaddexp.reduce(row))
        history.append(token)
        if token != EOS:
            r = float(prm.table[history[-2], history[-1]])
            phi = {"bernoulli": phi * r, "odds": phi * r / (1 - r), "ratio": r, "exp": np.exp(r)}[link]
    return density * phi


@pytest.mark.parametrize("link", LINKS)
def test_evidence(toy, prm, link):
    """Enumeration gives the sum by hand, and SMC is unbiased for it."""
    potential = ponder.process_reward(prm, link=link)
    program = ponder.Generation(toy, PROMPT, max_new_tokens=T, potential=potential)
    exact = sum(joint(toy, prm, x, link) for x in traces())
    report = check_algorithm(inference.smc(program, 4), program, num_runs=1000)
    assert report.exact_log_evidence == pytest.approx(np.log(exact), abs=1e-5)


def test_another_likelihood_is_noticed(toy, prm):
    wrong, right = (
        ponder.Generation(
            toy, PROMPT, max_new_tokens=T, potential=ponder.process_reward(prm, link="odds", scale=s)
        )
        for s in (1.0, 1.5)
    )
    with pytest.raises(AssertionError, match="exact"):
        check_algorithm(inference.smc(wrong, 4), right, num_runs=1000)


def test_steps_of_a_program_are_the_units(toy, scripted):
    """Unit c|... : traces in steps that end with c, each judged once; c alone is no step."""
    potential = ponder.process_reward(scripted, link="odds")
    unit = ponder.Step(C, max_tokens=2)
    program = ponder.Generation(toy, PROMPT, max_new_tokens=T, potential=potential, unit=unit)
    posterior = inference.exact(program).run()
    bound = potential.bind(context(toy, max_new_tokens=T, delimiters=(C,)))
    for tokens, length, found in zip(
        np.asarray(posterior.tokens), posterior.lengths, posterior.log_potential, strict=True
    ):
        units, unit = [], []
        for token in tokens[:length]:
            unit.append(int(token))
            if token == C or len(unit) == 2:
                units, unit = [*units, unit], []
        state = read(bound, [*units, unit] if unit else units)
        assert float(found) == pytest.approx(float(bound.log_prefix(state)[0]), abs=1e-5)


@pytest.mark.parametrize("num_prompts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_decoder_judges_every_step_behind_its_separator(toy, num_prompts):
    """SMC, whose forks move the cache of the reward model, against reading each trace anew."""
    config = DecoderConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    head = RewardHead([jax.random.normal(jax.random.key(2), (1, 16))], [jnp.zeros(1)])
    letters = PieceTokenizer((b"a", b"b", b"c", b"", b"", b""))
    prm = RewardDecoder(Decoder(config, rngs=nnx.Rngs(0)), head, (5,), letters)
    prompts = ["bc", "a"][:num_prompts]
    program = ponder.Generation(
        toy,
        prompts if num_prompts > 1 else prompts[0],
        max_new_tokens=8,
        potential=ponder.process_reward(prm, link="odds"),
        unit=ponder.Step("c", max_tokens=3),
    )
    found = inference.smc(program, num_particles=6, ess_threshold=1.0).run(jax.random.key(0))
    reread = jax.jit(lambda ids, length: prm.prefill(ids, 1, 1, length=length)[1][0])
    for prompt, posterior in zip(prompts, found if num_prompts > 1 else [found], strict=True):
        for text, log_phi in zip(posterior.text, np.asarray(posterior.log_potential), strict=True):
            read, total, unit = letters.encode(prompt), 0.0, []
            for i, token in enumerate(letters.encode(text)):
                unit.append(token)
                if unit == [C]:
                    unit = []  # nothing but the delimiter
                elif token == C or len(unit) == 3 or i == len(text) - 1:
                    read, unit = [*read, *unit], []
                    # `prefill` judges behind a separator of its own.
                    r = float(reread(jnp.asarray([*read, *[0] * (32 - len(read))]), len(read)))
                    total += np.log(r / (1 - r))
                    read.append(5)
            assert float(log_phi) == pytest.approx(total, abs=2e-4)


def test_odds_give_the_weights_of_the_published_filter(toy, scripted):
    """Softmax of logit r over the particles: scores .8, .5, .9 have odds 4, 1, 9."""
    potential = ponder.process_reward(scripted, link="odds").bind(context(toy))
    state = read(potential, [[A]], num_rows=3)  # the same past: it cancels in the increment
    before = potential.log_prefix(state)
    state = potential.update(state, jnp.array([A, B, C], jnp.int32), jnp.ones(3, bool))
    increment = potential.log_prefix(potential.commit(state, jnp.ones(3, bool))) - before
    np.testing.assert_allclose(jax.nn.softmax(increment), np.array([4, 1, 9]) / 14, rtol=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"link": "softmax"}, ValueError, "link: expected one of 'bernoulli', 'odds', 'ratio', 'exp'"),
        ({"aggregate": "max"}, ValueError, "aggregate: expected one of 'last', 'min', 'prod', 'mean'"),
        ({"calibration": 0.5}, TypeError, "calibration: expected a map"),
        ({"scale": 0.0}, ValueError, "scale: expected a number > 0, got 0.0"),
        ({"scale": -1}, ValueError, "scale: expected a number > 0"),
        ({"scale": np.nan}, ValueError, "scale: expected a finite number"),
        ({"scale": "1"}, TypeError, "scale: expected a real scalar"),
        ({"scale": jnp.ones(2)}, TypeError, "scale: expected a real scalar"),
        ({"offset": np.inf}, ValueError, "offset: expected a finite number"),
        ({"link": "exp", "offset": 1.0}, ValueError, "offset: the link 'exp' has none"),
        ({"improper": 1}, TypeError, "improper: expected a bool"),
        ({"max_step_tokens": 0}, ValueError, "max_step_tokens: expected an integer >= 1"),
        ({"prompt": []}, ValueError, "prompt: expected at least one token"),
        ({"prompt": [9]}, ValueError, r"prompt: expected token ids in \[0, 4\)"),
        ({"prompt": "abc"}, ValueError, "no tokenizer"),
    ],
)
def test_wrong_arguments(prm, kwargs, error, message):
    with pytest.raises(error, match=message):
        ponder.process_reward(prm, **kwargs)


def test_wrong_models(toy, prm):
    for wrong in (toy.tokenizer, TableReward, None):
        with pytest.raises(TypeError, match="prm: expected a RewardModel"):
            ponder.process_reward(wrong)
    other = TableReward(jnp.full(5, 0.5))
    with pytest.raises(ValueError, match=r"vocabulary of 4 tokens.*got a vocabulary of 5, and no tokenizer"):
        ponder.process_reward(other).bind(context(toy))
    with pytest.raises(TypeError, match="prefill_many"):
        ponder.process_reward(NoBlocks(prm)).bind(context(toy, [[1], [2]]))
    assert not hasattr(ponder.process_reward(prm), "init")  # it has to be bound
    with pytest.raises(ValueError, match="context has none"):
        ponder.process_reward(prm).bind(context(toy, []))


def test_a_cache_that_cannot_be_held_is_refused(toy, prm):
    class Counting(NoBlocks):
        """Counts its tokens for all rows at once."""

        def prefill(self, tokens, num_particles, max_new_tokens):
            cache, scores = self.prm.prefill(tokens, num_particles, max_new_tokens)
            return (cache, jnp.int32(0)), scores

        def extend(self, cache, tokens):
            rows, scores = self.prm.extend(cache[0], tokens)
            return (rows, cache[1] + 1), scores

    with pytest.raises(TypeError, match="extend_block"):
        ponder.process_reward(Counting(prm)).bind(context(toy))


def test_the_context_of_the_reward_model(toy, prm):
    class Short(NoBlocks):
        max_length = 9

    separated = Short(prm, (1, 1))
    with pytest.raises(ValueError, match="prompt of 2 tokens, 4 tokens of text and 2 separators of 2 tokens"):
        ponder.process_reward(separated).bind(context(toy, max_units=2))
    ponder.process_reward(separated).bind(context(toy, max_units=1))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda prompt, texts: [0.5], "one score for each of 2 texts"),
        (lambda prompt, texts: [0.5, 1.5], "scores in"),
        (lambda prompt, texts: [0.5, np.nan], "scores in"),
        (lambda prompt, texts: ["a", "b"], "expected numbers"),
    ],
)
def test_wrong_scores_of_a_text_reward(toy, fn, message):
    potential = ponder.process_reward(ponder.text_reward(fn)).bind(context(toy))
    state = potential.update(potential.init(2), jnp.array([A, B], jnp.int32), jnp.ones(2, bool))
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(potential.commit(state, jnp.ones(2, bool)))


def test_wrong_text_rewards(toy, prm):
    with pytest.raises(TypeError, match="fn: expected a function"):
        ponder.text_reward(0.5)
    reward = ponder.text_reward(lambda prompt, texts: [len(prompt) / 10 for _ in texts])
    assert log_value(toy, ponder.process_reward(reward, prompt="12345"), [[A]]) == pytest.approx(np.log(0.5))
    with pytest.raises(TypeError, match="takes text or a list of texts"):
        ponder.process_reward(reward, prompt=[1, 2])
    with pytest.raises(ValueError, match="max_step_tokens"):
        ponder.process_reward(reward, max_step_tokens=3)
    with pytest.raises(ValueError, match="one for each"):
        ponder.process_reward(reward, prompt=["a", "b"]).bind(context(toy))
    with pytest.raises(ValueError, match="tokenizer is None"):
        ponder.process_reward(reward).bind(context(TableLM(jnp.zeros((4, 4)))))
