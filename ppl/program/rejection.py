"""Adaptive weighted rejection sampling, for constraints that are expensive to check; the weights are exact.

References:
    Lipkin et al. (2025), Fast Controlled Generation from Language Models with Adaptive Weighted Rejection
    Sampling, arXiv:2504.05410.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["adaptive_rejection"]


class _Trials(NamedTuple):
    """State of the loop, a row a particle.

    Attributes:
        round: int32[]; trials so far.
        log_pool: float32[N, V]; log q of the tokens not rejected yet.
        log_odds: float32[N]; log Σ_i 1 / c_i, with c_i the mass left after i rejections.
        token: int32[N]; the first accepted token.
        accepted: int32[N]; accepted trials, at most 2.
        active: bool[N]; rows that need another trial.
    """

    round: jax.Array
    log_pool: jax.Array
    log_odds: jax.Array
    token: jax.Array
    accepted: jax.Array
    active: jax.Array


def adaptive_rejection(
    draw: Callable[[jax.Array, jax.Array], jax.Array],
    accepts: Callable[[jax.Array, jax.Array], jax.Array],
    log_q: jax.Array,
    active: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Draw a token a row from q restricted to what is accepted, with an unbiased estimate of its mass.

    Candidates are drawn until two are accepted (the second only serves the estimate and may be the first one
    again); a rejected one leaves the pool. The first accepted token has the distribution q restricted to the
    accepted set A. Let c_i = Σ q over the pool after i rejections, and k the number of rejections in all:
    then E[1 / Σ_{i=0..k} 1 / c_i | token] = Σ_{v ∈ A} q(v). (The first trial's indicator times c_0 is
    unbiased; given the rejected tokens in order, the first acceptance comes after j of them with probability
    proportional to 1 / c_j, and this is the conditional mean.)

    Args:
        draw: `(round, log_weights[N, V]) -> int32[N]`; fresh randomness each round.
        accepts: `(tokens[N], rows[N]) -> bool[N]`; asked only for the rows that are true, the others mean
            nothing. It has to give the same answer each time.
        log_q: [N, V]; not necessarily normalised.
        active: bool[N]; the rows that need a token.

    Returns:
        Tokens int32[N], and the log of the estimate, float32[N]: -inf where nothing is acceptable.
    """
    rows = jnp.arange(active.shape[0], dtype=jnp.int32)

    def trial(state: _Trials) -> _Trials:
        candidate = draw(state.round, state.log_pool)
        again = (state.accepted == 1) & (candidate == state.token)
        fresh = state.active & ~again
        verdict = jax.lax.cond(
            fresh.any(),
            lambda: accepts(candidate, fresh),
            lambda: jnp.zeros(active.shape, bool),
        )
        accept = state.active & (again | verdict)
        reject = state.active & ~accept
        at_candidate = state.log_pool[rows, candidate]
        pool = state.log_pool.at[rows, candidate].set(jnp.where(reject, -jnp.inf, at_candidate))
        left = jax.nn.logsumexp(pool, axis=-1)
        accepted = state.accepted + accept.astype(jnp.int32)
        return _Trials(
            state.round + 1,
            pool,
            jnp.where(reject, jnp.logaddexp(state.log_odds, -left), state.log_odds),
            jnp.where(accept & (state.accepted == 0), candidate, state.token),
            accepted,
            state.active & (accepted < 2) & (left > -jnp.inf),
        )

    left = jax.nn.logsumexp(log_q, axis=-1)
    start = _Trials(
        round=jnp.int32(0),
        log_pool=log_q,
        log_odds=-left,
        token=jnp.zeros(active.shape, jnp.int32),
        accepted=jnp.zeros(active.shape, jnp.int32),
        active=active & (left > -jnp.inf),
    )
    end = jax.lax.while_loop(lambda state: state.active.any(), trial, start)
    # NaN for a q that is NaN: no mass would hide it.
    return end.token, jnp.where((end.accepted > 0) | jnp.isnan(left), -end.log_odds, -jnp.inf)
