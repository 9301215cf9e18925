"""Drawing the next token of each particle from the program's proposal, and weighing what was drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ponder.program.rejection import adaptive_rejection
from ponder.program.sampling import draw, log_prior
from ponder.protocols import commit, complete_logits, judge, judge_prefix, observe

if TYPE_CHECKING:
    from ponder.program.generation import Generation, GenerationState

__all__ = ["Drawn", "eos_mask", "fold_in", "propose", "weigh"]


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


def propose(
    program: Generation,
    key: jax.Array,
    state: GenerationState,
    running: jax.Array,
    last: jax.Array,
    forced: tuple[jax.Array, jax.Array, jax.Array | None] | None,
) -> Drawn:
    """Draw a token in each row of `running[N]`, from q or as forced, and show it to the potential.

    Args:
        program: whose prior, proposal and potential.
        key: one key, or one for each of several prompts.
        state: with the logits of the next token.
        running: bool[N]; the rows that draw.
        last: bool[N]; the trace ends with this token in any case; with `overflow="force_eos"` it has to end
            by itself.
        forced: `(mask[N], tokens[N], log_q[N] or None)`: replay these in some rows. `log_q` was recorded with
            the tokens, for a proposal whose normaliser is an estimate.
    """
    prior = log_prior(state.logits, program.settings)
    potential = state.potential
    if program.potential is not None:
        potential = observe(program.potential, potential, prior)

    log_q = _log_proposal(program, state, potential, prior, last)
    is_prior = log_q is None
    log_q = prior if log_q is None else log_q
    if program.proposal == "rejection":
        tokens, normaliser = _reject(program, key, state, potential, log_q, running, last)
    else:
        tokens = _draw(program, key, log_q)
        normaliser = jnp.zeros(running.shape) if is_prior else jax.nn.logsumexp(log_q, axis=-1)
    if forced is not None:
        mask, replayed, recorded = forced
        tokens = jnp.where(mask, replayed, tokens)
        if program.proposal == "rejection" and recorded is not None:
            normaliser = jnp.where(mask, _at(log_q, tokens) - recorded, normaliser)
    if not is_prior:
        # Asked directly: of a NaN that is a constant XLA makes a normaliser of -inf, which is no fault.
        normaliser = jnp.where(jnp.isnan(log_q).any(-1), jnp.nan, normaliser)
    tokens = jnp.where(running, tokens, program.padding)

    log_p = _at(prior, tokens)
    ends, stop = _ends(program, state, tokens, running)
    if program.overflow == "force_eos":
        log_p = jnp.where(last & ~ends, -jnp.inf, log_p)
    if program.potential is not None:
        potential = program.potential.update(potential, tokens, running)
    stuck = normaliser == -jnp.inf
    return Drawn(
        tokens=tokens,
        log_p=jnp.where(running, log_p, 0.0),
        log_q=jnp.where(running, jnp.where(stuck, -jnp.inf, _at(log_q, tokens) - normaliser), 0.0),
        stuck=running & stuck,
        ends=running & (ends | last),
        stop=stop,
        potential=potential,
    )


def weigh(
    program: Generation, potential: Any, rows: jax.Array, ends: jax.Array, closes: bool = True
) -> tuple[Any, jax.Array]:
    """Return the potential's state and log Φ[N]: of the complete trace where it ends, else of the prefix.

    Args:
        program: whose potential.
        potential: its state.
        rows: bool[N]; the rows that are weighed; the others mean nothing.
        ends: bool[N]; of these, the ones whose trace has ended.
        closes: whether a unit has ended in these rows, and not merely a candidate is looked at.
    """
    judged = program.potential
    if judged is None:
        return None, jnp.zeros(rows.shape, jnp.float32)
    if closes:
        potential = commit(judged, potential, rows)
    # A branch, since judging complete traces may call the host.
    complete = jax.lax.cond(
        ends.any(),
        lambda state: _checked("potential.log_complete", judge(judged, state, ends), rows.shape),
        lambda _: jnp.zeros(rows.shape, jnp.float32),
        potential,
    )
    prefix = judge_prefix(judged, potential, rows & ~ends)
    prefix = _checked("potential.log_prefix", prefix, rows.shape)
    return potential, jnp.where(ends, complete, prefix)


def fold_in(program: Generation, key: jax.Array, i: jax.Array) -> jax.Array:
    """Derive the i-th key, of each prompt's where there are several."""
    return (jax.random.fold_in if program.num_prompts is None else jax.vmap(jax.random.fold_in, (0, None)))(
        key, i
    )


def eos_mask(program: Generation) -> jax.Array:
    """Which tokens are EOS, bool[1, V]."""
    mask = np.zeros((1, program.lm.vocab_size), bool)
    mask[0, list(program.lm.eos_token_ids)] = True
    return jnp.asarray(mask)


def _draw(program: Generation, key: jax.Array, log_q: jax.Array) -> jax.Array:
    """Draw a token a row; with several prompts from a key for each, as if it were run alone."""
    if program.num_prompts is None:
        return draw(key, log_q)
    blocks = log_q.reshape(program.num_prompts, -1, log_q.shape[-1])
    return jax.vmap(draw)(key, blocks).reshape(-1)


def _reject(
    program: Generation,
    key: jax.Array,
    state: GenerationState,
    potential: Any,
    log_q: jax.Array,
    running: jax.Array,
    last: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Draw from q where log Φ > -inf; return the tokens and an estimate of log Σ q there."""
    judged = program.potential

    def draw_round(i: jax.Array, log_pool: jax.Array) -> jax.Array:
        return _draw(program, fold_in(program, key, i), log_pool)

    def accepts(tokens: jax.Array, rows: jax.Array) -> jax.Array:
        if judged is None:
            return rows
        ends = rows & (_ends(program, state, tokens, rows)[0] | last)
        # A NaN counts as accepted, so that its weight shows it.
        after = judged.update(potential, tokens, rows)
        return weigh(program, after, rows, ends, closes=False)[1] != -jnp.inf

    return adaptive_rejection(draw_round, accepts, log_q, running & (state.log_potential > -jnp.inf))


def _log_proposal(
    program: Generation, state: GenerationState, potential: Any, prior: jax.Array, last: jax.Array
) -> jax.Array | None:
    """Unnormalised log q [N, V]; None where q is the prior itself."""
    last = last[:, None]
    guide = None
    if program.potential is not None:
        guide = program.potential.token_logits(potential)
        if guide is not None:
            guide = _checked("potential.token_logits", guide, prior.shape)
    stops = None if program.stop is None or state.stop is None else program.stop.stops_now(state.stop)
    if guide is not None and program.potential is not None:
        complete = complete_logits(program.potential, potential)
        if complete is not None:
            finishes = (last if stops is None else stops | last) & ~eos_mask(program)
            guide = jnp.where(finishes, complete, guide)
    if callable(program.proposal):
        log_q = _checked("proposal", program.proposal(prior, guide), prior.shape)
    elif guide is not None:
        log_q = prior + guide
    elif program.overflow == "force_eos":
        log_q = prior
    else:
        return None
    if program.overflow == "force_eos":
        may_end = eos_mask(program) if stops is None else eos_mask(program) | stops
        log_q = jnp.where(last & ~may_end, -jnp.inf, log_q)
    return log_q


def _ends(
    program: Generation, state: GenerationState, tokens: jax.Array, running: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Which traces end with these tokens by EOS or a stop, and the new progress of the stops."""
    ends = eos_mask(program)[0, tokens]
    if program.stop is None or state.stop is None:
        return ends, None
    stop = jnp.where(running, program.stop.advance(state.stop, tokens), state.stop)
    return ends | program.stop.is_stopped(stop), stop


def _checked(name: str, value: Any, shape: tuple[int, ...]) -> jax.Array:
    """Return what a user's function gave as float32, or say what is wrong with its shape or dtype."""
    array = jnp.asarray(value)
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: expected real numbers (natural logs), got dtype {array.dtype}")
    return array.astype(jnp.float32)


def _at(table: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, tokens[:, None], axis=1)[:, 0]
