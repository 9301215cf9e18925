"""Evidence that begins after a marker: think freely, then follow a schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ponder.arguments import check_flag, lacking
from ponder.automata.automaton import AutomatonError
from ponder.bases import (
    BasePotential,
    Evidence,
    ForeignPotential,
    UnboundPotential,
    as_evidence,
    as_potential,
)
from ponder.models.pytrees import pytree, static
from ponder.potentials.automaton_potential import AutomatonPotential, LanguagePotential, fit_automaton
from ponder.potentials.combining import Bound, Product, Tempered, Unbound, UnboundProduct, log_indicator
from ponder.potentials.engines import EngineChoice
from ponder.potentials.marker import Marker, MarkerTables, tables_after, tokens_after
from ponder.program.stop import sort_stops
from ponder.protocols import Context, Potential, PotentialState

__all__ = ["After", "AfterPotential", "AfterState", "after"]


def after(
    marker: str | int | Sequence[str | int],
    potential: Potential | UnboundPotential,
    *,
    required: bool = True,
) -> After:
    r"""Let evidence begin after a marker: the model thinks freely, and what follows is judged.

    Φ(x) = Φ_inner(the text after the first marker in x). A trace without the marker has Φ = 0, or 1 with
    `required=False`; an unfinished one has 1 as long as the marker can still be written in the tokens that
    remain. The text is what counts: the marker may be split between tokens, and it may end inside one (">4"
    ends "</think>"); what that token has beyond the marker belongs to the inner potential.

    For `regex`, `choice` and `json_schema` on the engine "automaton", marker and language become one
    automaton: the mask of tokens is exact inside jit, knows the length limit, and works as for the language
    alone. Every other potential, one on the engine "host" among them, starts from its empty state when the
    marker has been read, and sees the tokens from there on. A token that the marker ends in is shown to it as
    the fewest tokens that write the rest: to a potential of text that makes no difference, and one of token
    ids (`tokens`, `expert`) is defined by these. A process reward reads the prompt and then what follows the
    marker, and judges only that. The guide of such a potential is exact where the rest is one token; where it
    takes several, it is that of the first of them.

    `after(m, a * b)` is `after(m, a) * after(m, b)`.

    Args:
        marker: a string, a token id (for special tokens, which have no text), or several of which the first
            that is read counts.
        potential: the evidence on what follows. Not one that asks for the probability of the next token
            under the prior, as `power` does: that is not of the text after the marker alone.
        required: whether a trace has to have the marker.

    Raises:
        TypeError: `marker` holds something else than strings and token ids, or `potential` is none.
        ValueError: `marker` is empty. When the program is built: an id outside the vocabulary, a marker that
            no tokens write within `max_new_tokens`, or a potential that cannot be judged so.

    Example:
        >>> import ponder
        >>> ponder.after("</think>", ponder.regex(r"\s*\d+"))
        after('</think>', regex('\\s*\\d+'))
    """
    strings, ids = sort_stops(marker, 2**31, "after(marker)")
    if not strings and not ids:
        raise ValueError(f"after(marker): expected a string or token ids, got {marker!r}")
    if isinstance(potential, type) or not isinstance(potential, Potential | UnboundPotential):
        raise TypeError("after(potential): expected a ponder.Potential, " + lacking(potential, Potential))
    check_flag("after(required)", required)
    return After(as_evidence(potential), (*strings, *ids), required)


@pytree
class After(Unbound):
    """What `after` returns.

    Attributes:
        potential: the evidence on what follows the marker.
        marker: strings and token ids.
        required: whether a trace has to have the marker.
    """

    potential: Evidence
    marker: Marker = static()
    required: bool = static()

    def bind(self, context: Context) -> BasePotential:
        """Make the tables of the marker for a model's vocabulary, and bind the potential.

        Raises:
            ValueError: see `after`. Others come from the potential's own `bind`.
        """
        inner = self.potential
        if isinstance(inner, Bound):
            inner = inner.unbound
        if isinstance(inner, Product | UnboundProduct):
            each = [After(factor, self.marker, self.required) for factor in inner.potentials]
            return Product(tuple(factor.bind(context) for factor in each))
        joined = self._joined(inner, context) if isinstance(inner, LanguagePotential) else None
        if joined is not None:
            return joined
        tables = tables_after(self.marker, context.lm, repr(self))
        needed, limit = int(tables.needed[0]), context.max_new_tokens
        if needed > limit:
            raise ValueError(f"{self!r}: the marker takes {needed} tokens, more than max_new_tokens={limit}")
        # The rest of one token may be several.
        more = tables.rests.shape[1] - 1
        unit = limit if context.max_unit_tokens is None else context.max_unit_tokens
        # At least 2: rows begin at different tokens, so caches cannot advance in lock step.
        own = context._replace(max_new_tokens=limit + more, max_unit_tokens=max(2, unit + more))
        bound = as_potential(inner.bind(own))
        if _observes(bound):
            raise ValueError(
                f"{self!r}: the potential asks for the prior of the next token, which is not of the text "
                "after the marker alone"
            )
        is_eos = np.isin(np.arange(context.lm.vocab_size), context.lm.eos_token_ids)
        arrays = MarkerTables(*map(jnp.asarray, tables))
        return AfterPotential(bound, arrays, jnp.asarray(is_eos), self.marker, self.required, limit)

    def _joined(self, inner: LanguagePotential, context: Context) -> AutomatonPotential | None:
        """Make one automaton of the marker and a language; None where it is for the host."""
        engine = inner.engine if isinstance(inner, EngineChoice) else "automaton"
        if engine == "host" or inner.language is None:
            return None
        try:
            language = inner.language.byte_automaton()
            automaton = tokens_after(self.marker, language, self.required, context.lm, repr(self))
        except AutomatonError:
            if engine == "automaton":
                raise
            return None
        return fit_automaton(self, automaton, context)

    def on_engine(self, engine: str) -> str:
        """Name the engine of the inner potential."""
        inner = self.potential
        shown = inner.on_engine(engine) if isinstance(inner, Unbound) else repr(inner)
        return _words(self.marker, shown, self.required)

    def __repr__(self) -> str:
        return _words(self.marker, repr(self.potential), self.required)


def _words(marker: Marker, inner: str, required: bool) -> str:
    named = marker[0] if len(marker) == 1 else list(marker)
    return f"after({named!r}, {inner}{'' if required else ', required=False'})"


class AfterState(NamedTuple):
    """State of N traces.

    Attributes:
        place: int32[N]; state of the search for the marker, -1 once it has been read.
        remaining: int32[N]; tokens that may still be generated.
        inner: the inner potential's: of empty traces until then.
    """

    place: jax.Array
    remaining: jax.Array
    inner: PotentialState


@pytree
class AfterPotential(Bound):
    """A potential of what follows a marker, for one program; see `after`.

    Attributes:
        inner: the potential, bound.
        tables: of the search for the marker.
        is_eos: bool[V]; which tokens end a trace.
        marker: strings and token ids.
        required: whether a trace has to have the marker.
        max_new_tokens: the length limit.
    """

    inner: BasePotential
    tables: MarkerTables
    is_eos: jax.Array
    marker: Marker = static()
    required: bool = static()
    max_new_tokens: int = static()

    @property
    def unbound(self) -> After:
        """What it was made of."""
        inner = self.inner.unbound if isinstance(self.inner, Bound) else self.inner
        return After(inner, self.marker, self.required)

    @property
    def num_reward_models(self) -> int:
        """Those of the inner potential."""
        return self.inner.num_reward_models

    @property
    def withholds(self) -> bool:
        """Whether the inner potential does."""
        return self.inner.withholds

    def init(self, num_particles: int) -> AfterState:
        """Return the state of empty traces."""
        place = jnp.zeros(num_particles, jnp.int32)
        remaining = jnp.full(num_particles, self.max_new_tokens, jnp.int32)
        return AfterState(place, remaining, self.inner.init(num_particles))

    def update(self, state: AfterState, tokens: jax.Array, active: jax.Array) -> AfterState:
        """Search for the marker; behind it, show the tokens to the inner potential."""
        begun = state.place < 0
        to = self.tables.moves[jnp.maximum(state.place, 0), tokens]
        ends = active & ~begun & (to >= self._num_states)
        rest = self.tables.rests[jnp.where(ends, to - self._num_states, 0)]
        shown = jnp.where(begun, tokens, jnp.maximum(rest[:, 0], 0))
        inner = self.inner.update(state.inner, shown, (active & begun) | (ends & (rest[:, 0] >= 0)))
        inner = self._show_more(inner, rest, ends)
        place = jnp.where(active & ~begun, jnp.where(ends, -1, to), state.place)
        reads = active & ~self.is_eos[tokens]
        return AfterState(place, state.remaining - reads.astype(jnp.int32), inner)

    def commit(self, state: AfterState, rows: jax.Array) -> AfterState:
        """Tell the inner potential, in the rows that have reached it."""
        return state._replace(inner=self.inner.commit(state.inner, rows & (state.place < 0)))

    def log_prefix(self, state: AfterState) -> jax.Array:
        """Return the inner potential's, or before the marker 0 while it can still come, else -inf."""
        return jnp.where(state.place < 0, self.inner.log_prefix(state.inner), self._log_reachable(state))

    def log_complete(self, state: AfterState) -> jax.Array:
        """Return the inner potential's, or what a trace without the marker has."""
        return jnp.where(state.place < 0, self.inner.log_complete(state.inner), self._log_missing)

    def judge(self, state: AfterState, ends: jax.Array) -> jax.Array:
        """See `log_complete`; the inner potential judges only the rows that have reached it."""
        begun = state.place < 0
        return jnp.where(begun, self.inner.judge(state.inner, ends & begun), self._log_missing)

    def judge_apart(self, state: AfterState, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `BasePotential`: that the marker is missing is weighed at once."""
        begun = state.place < 0
        at_once, withheld = self.inner.judge_apart(state.inner, ends & begun)
        return jnp.where(begun, at_once, self._log_missing), jnp.where(begun, withheld, 0.0)

    def judge_prefix(self, state: AfterState, rows: jax.Array) -> jax.Array:
        """See `log_prefix`, likewise."""
        begun = state.place < 0
        return jnp.where(
            begun, self.inner.judge_prefix(state.inner, rows & begun), self._log_reachable(state)
        )

    def token_logits(self, state: AfterState) -> jax.Array | None:
        """Return the inner potential's; before the marker, 0 for tokens that leave room for it.

        None where the inner potential has none.
        """
        guide = self.inner.token_logits(state.inner)
        if guide is None:
            return None
        to = self.tables.moves[jnp.maximum(state.place, 0)]
        fits = self.tables.needed[jnp.minimum(to, self._num_states - 1)] < state.remaining[:, None]
        before = log_indicator(fits) if self.required else jnp.zeros(to.shape, jnp.float32)
        ends = to >= self._num_states
        begins = self.inner.log_prefix(state.inner)[:, None]
        value = jnp.where(ends, self._first_of_rest(to, begins, begins + guide), before)
        value = jnp.where(self.is_eos[None, :], self._log_missing, value)
        return jnp.where((state.place < 0)[:, None], guide, value)

    def complete_logits(self, state: AfterState) -> jax.Array | None:
        """See `BasePotential`; None where the inner potential has none."""
        guide, prefix_guide = self.inner.complete_logits(state.inner), self.inner.token_logits(state.inner)
        if guide is None or prefix_guide is None:
            return None
        to = self.tables.moves[jnp.maximum(state.place, 0)]
        begins = self.inner.log_prefix(state.inner)[:, None]
        value = self._first_of_rest(to, self.inner.log_complete(state.inner)[:, None], begins + guide)
        if self.tables.rests.shape[1] > 1:
            # Complete after the first token of several it need not be: what can still become so is kept.
            several = self.tables.rests[jnp.maximum(to - self._num_states, 0), 1] >= 0
            value = jnp.where(several, self._first_of_rest(to, begins, begins + prefix_guide), value)
        value = jnp.where((to >= self._num_states) & ~self.is_eos[None, :], value, self._log_missing)
        return jnp.where((state.place < 0)[:, None], guide, value)

    def fork(self, state: AfterState, ancestors: jax.Array) -> AfterState:
        """See `Potential`."""
        inner = self.inner.fork(state.inner, ancestors)
        return AfterState(state.place[ancestors], state.remaining[ancestors], inner)

    def _show_more(self, inner: PotentialState, rest: jax.Array, ends: jax.Array) -> PotentialState:
        """Show the tokens of the rests [N, K] after the first; mostly there are none, and no trip is made."""
        counts = jnp.where(ends, (rest >= 0).sum(axis=1, dtype=jnp.int32), 0)

        def show(k: Any, inner: PotentialState) -> PotentialState:
            tokens = jax.lax.dynamic_index_in_dim(rest, k, axis=1, keepdims=False)
            return self.inner.update(inner, jnp.maximum(tokens, 0), k < counts)

        if rest.shape[1] == 1:
            return inner
        if isinstance(counts, Tracer):
            return jax.lax.fori_loop(jnp.int32(1), counts.max(), show, inner)
        for k in range(1, int(counts.max())):  # outside jit every loop would be compiled anew
            inner = show(k, inner)
        return inner

    @property
    def _num_states(self) -> int:
        return self.tables.moves.shape[0]

    @property
    def _log_missing(self) -> jax.Array:
        """Log Φ of a complete trace without the marker."""
        return jnp.float32(-jnp.inf if self.required else 0.0)

    def _log_reachable(self, state: AfterState) -> jax.Array:
        if not self.required:
            return jnp.zeros(state.place.shape, jnp.float32)
        return log_indicator(self.tables.needed[jnp.maximum(state.place, 0)] <= state.remaining)

    def __repr__(self) -> str:
        return _words(self.marker, repr(self.inner), self.required)

    def _first_of_rest(self, to: jax.Array, nothing: jax.Array, values: jax.Array) -> jax.Array:
        """For each token, the value [N, V] of the first token of its rest; `nothing[N, 1]` without a rest."""
        first = self.tables.rests[jnp.maximum(to - self._num_states, 0), 0]
        return jnp.where(first < 0, nothing, jnp.take_along_axis(values, jnp.maximum(first, 0), axis=1))


def _observes(potential: BasePotential) -> bool:
    """Whether a potential wants to know the prior of the next token."""
    if isinstance(potential, Product):
        return any(map(_observes, potential.potentials))
    if isinstance(potential, Tempered):
        return _observes(potential.potential)
    if isinstance(potential, ForeignPotential):
        return hasattr(potential.potential, "observe")
    return type(potential).observe is not BasePotential.observe
