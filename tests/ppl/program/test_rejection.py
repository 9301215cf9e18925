import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.program.rejection import adaptive_rejection
from ponder.program.sampling import draw
from ponder.testing import MAX_Z, check_algorithm, z_scores

V, ROWS = 6, 20_000
LOG_Q = jnp.log(jnp.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.02]))  # sums to 0.98: q need not be normalised


def weighted_tokens(accepted, draw_round=None):
    """Estimates of the mass of each token, float[ROWS, V]; and the tokens."""
    log_q = jnp.broadcast_to(LOG_Q, (ROWS, V))
    allowed = jnp.isin(jnp.arange(V), jnp.array(accepted, jnp.int32))

    def fresh(i, log_pool):
        return draw(jax.random.fold_in(jax.random.key(5), i), log_pool)

    tokens, log_mass = jax.jit(
        lambda: adaptive_rejection(
            draw_round or fresh, lambda tokens, rows: allowed[tokens], log_q, jnp.ones(ROWS, bool)
        )
    )()
    return np.exp(log_mass)[:, None] * np.eye(V)[tokens], np.asarray(tokens)


@pytest.mark.parametrize("accepted", [[0], [1, 3], [5], [0, 1, 2, 3, 4, 5], [4, 5]])
def test_weighted_tokens_are_unbiased(accepted):
    masses, tokens = weighted_tokens(accepted)
    exact = np.where(np.isin(np.arange(V), accepted), np.exp(LOG_Q), 0.0)
    assert np.isin(tokens, accepted).all()
    assert np.abs(z_scores(masses, exact)).max() < MAX_Z
    # The token alone has the distribution q restricted to A.
    assert np.abs(z_scores(np.eye(V)[tokens], exact / exact.sum())).max() < MAX_Z


def test_the_check_has_power():
    """Drawing rejected tokens again, as if with replacement, makes the same estimate wrong."""
    masses, _ = weighted_tokens(
        [1, 3], lambda i, pool: draw(jax.random.fold_in(jax.random.key(5), i), pool * 0)
    )
    exact = np.where(np.isin(np.arange(V), [1, 3]), np.exp(LOG_Q), 0.0)
    assert np.abs(z_scores(masses, exact)).max() > MAX_Z


def test_nothing_acceptable_has_no_mass():
    masses, _ = weighted_tokens([])
    assert (masses == 0).all()


def test_rows_that_are_not_active_are_not_asked():
    asked = []

    def accepts(tokens, rows):
        asked.append(np.asarray(rows).copy())
        return jnp.ones(3, bool)

    with jax.disable_jit():
        tokens, log_mass = adaptive_rejection(
            lambda i, pool: draw(jax.random.fold_in(jax.random.key(0), i), pool),
            accepts,
            jnp.broadcast_to(LOG_Q, (3, V)),
            jnp.array([True, False, True]),
        )
    assert asked and not any(rows[1] for rows in asked)
    np.testing.assert_allclose(np.exp(log_mass), [0.98, 0.0, 0.98], rtol=1e-5)
    assert tokens.shape == (3,)


class Rule(ponder.Composable):
    """Letters a, b, c (tokens 0, 1, 2): no b right after an a; a complete trace ends in c."""

    def init(self, num_particles):
        return jnp.zeros((num_particles, 2), jnp.int32).at[:, 0].set(-1)  # last token, 1 if broken

    def update(self, state, tokens, active):
        last = jnp.where(tokens == 3, state[:, 0], tokens)
        broken = state[:, 1] | ((state[:, 0] == 0) & (tokens == 1)).astype(jnp.int32)
        return jnp.where(active[:, None], jnp.stack([last, broken], 1), state)

    def log_prefix(self, state):
        return jnp.where(state[:, 1] == 1, -jnp.inf, 0.0)

    def log_complete(self, state):
        return jnp.where((state[:, 1] == 1) | (state[:, 0] != 2), -jnp.inf, 0.0)

    def token_logits(self, state):
        return None

    def fork(self, state, ancestors):
        return state[ancestors]


@pytest.mark.parametrize("overflow", ["truncate", "force_eos"])
@pytest.mark.parametrize("num_particles", [2, 4, 16])
def test_smc_with_rejection_is_exact(toy, overflow, num_particles):
    program = ponder.Generation(
        toy, [1, 2], max_new_tokens=4, potential=Rule(), proposal="rejection", overflow=overflow
    )
    check_algorithm(inference.smc(program, num_particles), program, num_runs=1000)


def test_rejection_next_to_a_guide_and_scores(toy, scores):
    """What a factor guides is drawn from; what it does not is checked or weighed."""
    program = ponder.Generation(
        toy, [1, 2], max_new_tokens=4, potential=ponder.power(1.5) * scores * Rule(), proposal="rejection"
    )
    check_algorithm(inference.smc(program, 4), program, num_runs=1000)


@pytest.mark.slow
def test_a_few_texts_are_checked_rather_than_the_vocabulary(smollm2):
    seen = []

    def no_e(texts):
        seen.extend(texts)
        return ["e" not in text for text in texts]

    program = ponder.Generation(
        smollm2, "Today", max_new_tokens=4, potential=ponder.text(no_e, prefix=no_e), proposal="rejection"
    )
    posterior = inference.smc(program, 4).run(jax.random.key(1))
    assert all("e" not in text for text in posterior.text)
    assert len(seen) < 4 * 4 * 200
    assert -30 < float(posterior.log_evidence) < 0


def test_a_dead_end_has_evidence_zero(toy):
    impossible = ponder.text(lambda texts: [False] * len(texts), prefix=lambda texts: [False] * len(texts))
    program = ponder.Generation(toy, [1], max_new_tokens=3, potential=impossible, proposal="rejection")
    with pytest.warns(RuntimeWarning, match="weight zero"):
        posterior = inference.smc(program, 4).run(jax.random.key(0))
    assert posterior.log_evidence == -jnp.inf and bool(posterior.stats.degenerate)


def test_forced_moves_keep_their_weight(toy):
    """Replaying a move gives the estimate that was made with it: a retained path needs that."""
    program = ponder.Generation(toy, [1, 2], max_new_tokens=4, potential=Rule(), proposal="rejection")
    state = program.init(jax.random.key(0), 8)
    after, move, log_weight = program.propagate(jax.random.key(1), state)
    mask = jnp.arange(8) < 4
    replayed, again, log_weight_again = program.propagate(jax.random.key(2), state, (mask, move))
    np.testing.assert_array_equal(replayed.tokens[:4], after.tokens[:4])
    np.testing.assert_allclose(log_weight_again[:4], log_weight[:4], rtol=1e-5)
    np.testing.assert_allclose(again.log_proposal[:4], move.log_proposal[:4], rtol=1e-5)


class Broken(Rule):
    """Not a number after token 1."""

    def log_prefix(self, state):
        return jnp.where(state[:, 0] == 1, jnp.nan, 0.0)

    log_complete = log_prefix


def test_nan_is_flagged_and_not_rejected(toy):
    broken_lm = dataclasses.replace(toy, table=toy.table.at[1].set(jnp.nan))
    for lm, potential in ((toy, Broken()), (broken_lm, None)):
        program = ponder.Generation(lm, [2, 2], max_new_tokens=3, potential=potential, proposal="rejection")
        with pytest.warns(RuntimeWarning, match="NaN"):
            posterior = inference.smc(program, 64).run(jax.random.key(0))
        assert bool(posterior.stats.invalid) and not np.isnan(posterior.log_evidence)


def test_bad_proposal(toy):
    with pytest.raises(TypeError, match="proposal: expected a function, 'rejection' or None, got 'reject'"):
        ponder.Generation(toy, [1], max_new_tokens=2, proposal="reject")
