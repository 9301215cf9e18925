"""Drawing the next token of each particle from the program's proposal."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ponder.program.rejection import adaptive_rejection
from ponder.program.sampling import draw, log_prior
from ponder.program.state import GenerationState, Program
from ponder.program.weighing import checked, weigh

__all__ = ["Drawn", "Forced", "fold_in", "propose"]

Forced = tuple[jax.Array, jax.Array, jax.Array | None]
"""`(mask[N], tokens[N], log_q[N] or None)`: replay these tokens in some rows. `log_q` was recorded with them,
for a proposal whose normaliser is an estimate."""


class Drawn(NamedTuple):
    """One token a row; rows that are not running hold padding and zeros.

    Attributes:
        tokens: int32[N].
        log_p: float32[N]; log probability under the prior; -inf where the token may not stand there.
        log_q: float32[N]; under the proposal; -inf where that has no mass, NaN where it has a NaN.
        stuck: bool[N]; rows whose proposal has no mass.
        ends: bool[N]; the trace ends with this token.
        stop: int32[N] or None; new progress through the stop strings.
        potential: the potential's state, after the token.
    """

    tokens: jax.Array
    log_p: jax.Array
    log_q: jax.Array
    stuck: jax.Array
    ends: jax.Array
    stop: jax.Array | None
    potential: Any


class _Proposed(NamedTuple):
    """What a proposal gives: tokens int32[N], log q of them float32[N], and rows without mass, bool[N]."""

    tokens: jax.Array
    log_q: jax.Array
    stuck: jax.Array


def propose(
    program: Program,
    key: jax.Array,
    state: GenerationState,
    running: jax.Array,
    last: jax.Array,
    forced: Forced | None,
) -> Drawn:
    """Draw a token in each row of `running[N]`, from q or as forced, and show it to the potential.

    Args:
        program: whose prior, proposal and potential.
        key: one key, or one for each of several prompts.
        state: with the logits of the next token.
        running: bool[N]; the rows that draw.
        last: bool[N]; the trace ends with this token in any case; with `overflow="force_eos"` it has to end
            by itself.
        forced: what is replayed.
    """
    prior = log_prior(state.logits, program.settings)
    potential = state.potential
    if program.potential is not None:
        potential = program.potential.observe(potential, prior)
    log_q = _log_proposal(program, state, potential, prior, last)
    if program.proposal == "rejection":
        at = state._replace(potential=potential)
        found = _by_rejection(program, key, at, prior if log_q is None else log_q, running, last, forced)
    elif log_q is None:
        found = _from_prior(program, key, prior, forced)
    else:
        found = _from_guide(program, key, log_q, forced)

    tokens = jnp.where(running, found.tokens, program.padding)
    log_p = _at(prior, tokens)
    ends, stop = _ends(program, state, tokens, running)
    if program.overflow == "force_eos":
        log_p = jnp.where(last & ~ends, -jnp.inf, log_p)
    if program.potential is not None:
        potential = program.potential.update(potential, tokens, running)
    return Drawn(
        tokens=tokens,
        log_p=jnp.where(running, log_p, 0.0),
        log_q=jnp.where(running, found.log_q, 0.0),
        stuck=running & found.stuck,
        ends=running & (ends | last),
        stop=stop,
        potential=potential,
    )


def fold_in(program: Program, key: jax.Array, i: jax.Array) -> jax.Array:
    """Derive the i-th key, of each prompt's where there are several."""
    return (jax.random.fold_in if program.num_prompts is None else jax.vmap(jax.random.fold_in, (0, None)))(
        key, i
    )


def _eos_mask(program: Program) -> jax.Array:
    """Which tokens are EOS, bool[1, V]."""
    mask = np.zeros((1, program.lm.vocab_size), bool)
    mask[0, list(program.lm.eos_token_ids)] = True
    return jnp.asarray(mask)


def _from_prior(program: Program, key: jax.Array, prior: jax.Array, forced: Forced | None) -> _Proposed:
    """Draw from p, which is normalised."""
    tokens = _replayed(_draw(program, key, prior), forced)
    return _Proposed(tokens, _at(prior, tokens), jnp.zeros(tokens.shape, bool))


def _from_guide(program: Program, key: jax.Array, log_q: jax.Array, forced: Forced | None) -> _Proposed:
    """Draw from unnormalised log q, the locally optimal proposal or the user's."""
    tokens = _replayed(_draw(program, key, log_q), forced)
    return _normalised(log_q, tokens, jax.nn.logsumexp(log_q, axis=-1))


def _by_rejection(
    program: Program,
    key: jax.Array,
    state: GenerationState,
    log_q: jax.Array,
    running: jax.Array,
    last: jax.Array,
    forced: Forced | None,
) -> _Proposed:
    """Draw from q where log Φ > -inf; the normaliser, log Σ q there, is estimated without bias."""
    judged = program.potential

    def draw_round(i: jax.Array, log_pool: jax.Array) -> jax.Array:
        return _draw(program, fold_in(program, key, i), log_pool)

    def accepts(tokens: jax.Array, rows: jax.Array) -> jax.Array:
        if judged is None:
            return rows
        ends = rows & (_ends(program, state, tokens, rows)[0] | last)
        # A NaN counts as accepted, so that its weight shows it.
        after = judged.update(state.potential, tokens, rows)
        return weigh(judged, after, rows, ends, closes=False).log_potential != -jnp.inf

    wanted = running & (state.log_potential > -jnp.inf)
    tokens, normaliser = adaptive_rejection(draw_round, accepts, log_q, wanted)
    tokens = _replayed(tokens, forced)
    if forced is not None and forced[2] is not None:
        normaliser = jnp.where(forced[0], _at(log_q, tokens) - forced[2], normaliser)
    return _normalised(log_q, tokens, normaliser)


def _normalised(log_q: jax.Array, tokens: jax.Array, normaliser: jax.Array) -> _Proposed:
    # Asked directly: of a NaN that is a constant XLA makes a normaliser of -inf, which is no fault.
    normaliser = jnp.where(jnp.isnan(log_q).any(-1), jnp.nan, normaliser)
    stuck = normaliser == -jnp.inf
    return _Proposed(tokens, jnp.where(stuck, -jnp.inf, _at(log_q, tokens) - normaliser), stuck)


def _replayed(tokens: jax.Array, forced: Forced | None) -> jax.Array:
    return tokens if forced is None else jnp.where(forced[0], forced[1], tokens)


def _draw(program: Program, key: jax.Array, log_q: jax.Array) -> jax.Array:
    """Draw a token a row; with several prompts from a key for each, as if it were run alone."""
    if program.num_prompts is None:
        return draw(key, log_q)
    blocks = log_q.reshape(program.num_prompts, -1, log_q.shape[-1])
    return jax.vmap(draw)(key, blocks).reshape(-1)


def _log_proposal(
    program: Program, state: GenerationState, potential: Any, prior: jax.Array, last: jax.Array
) -> jax.Array | None:
    """Unnormalised log q [N, V]; None where q is the prior itself."""
    last = last[:, None]
    guide = None
    if program.potential is not None:
        guide = program.potential.token_logits(potential)
        if guide is not None:
            guide = checked("potential.token_logits", guide, prior.shape)
    stops = None if program.stop is None or state.stop is None else program.stop.stops_now(state.stop)
    if guide is not None and program.potential is not None:
        complete = program.potential.complete_logits(potential)
        if complete is not None:
            finishes = (last if stops is None else stops | last) & ~_eos_mask(program)
            guide = jnp.where(finishes, complete, guide)
    if callable(program.proposal):
        log_q = checked("proposal", program.proposal(prior, guide), prior.shape)
    elif guide is not None:
        log_q = prior + guide
    elif program.overflow == "force_eos":
        log_q = prior
    else:
        return None
    if program.overflow == "force_eos":
        may_end = _eos_mask(program) if stops is None else _eos_mask(program) | stops
        log_q = jnp.where(last & ~may_end, -jnp.inf, log_q)
    return log_q


def _ends(
    program: Program, state: GenerationState, tokens: jax.Array, running: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Which traces end with these tokens by EOS or a stop, and the new progress of the stops."""
    ends = _eos_mask(program)[0, tokens]
    if program.stop is None or state.stop is None:
        return ends, None
    stop = jnp.where(running, program.stop.advance(state.stop, tokens), state.stop)
    return ends | program.stop.is_stopped(stop), stop


def _at(table: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, tokens[:, None], axis=1)[:, 0]
