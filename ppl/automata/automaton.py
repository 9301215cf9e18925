"""Deterministic automata over tokens, as tables that work inside jit.

A constraint on text becomes a table `state x token -> state`. Tokens whose columns are equal share a class,
so that the transitions stay small. What a sampler reads at every step, how many tokens are still needed after
each candidate, is kept uncompressed, so that one gather of rows gives the mask of allowed tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ponder.models.pytrees import pytree, static

__all__ = [
    "TABLE_LIMIT",
    "AutomatonError",
    "TokenAutomaton",
    "check_table_size",
    "dense_table",
    "merge_columns",
]

TABLE_LIMIT = 2**30
"""Largest tables that are built, in bytes."""

_NEVER = np.iinfo(np.int32).max


class AutomatonError(ValueError):
    """A language has no automaton here: it is not regular, not in the engine's words, or too large."""


@pytree
class TokenAutomaton:
    """A deterministic automaton over tokens, trimmed: a state that cannot reach acceptance is dead.

    Letters: S states, C classes of tokens, V vocabulary, N particles. A state is an int32; -1 is dead.

    Attributes:
        next_state: int32[S, C]; the state that follows, -1 for dead.
        token_class: int32[V]; the column of each token in `next_state`.
        to_go: uint8[S, V] (uint16 or int32 if need be); fewest further tokens to acceptance after taking
            token v in state s; the largest value of its dtype means never.
        distance: int32[S]; fewest tokens from s to acceptance; the largest int32 means never.
        initial: the state of the empty sequence.
    """

    next_state: jax.Array
    token_class: jax.Array
    to_go: jax.Array
    distance: jax.Array
    initial: int = static()

    @classmethod
    def from_transitions(
        cls,
        transitions: Mapping[int, Mapping[int, int]],
        initial: int,
        finals: Iterable[int],
        vocab_size: int,
    ) -> TokenAutomaton:
        """Build from sparse transitions `{state: {token: state}}` with any integers as states.

        Raises:
            ValueError: a token is outside the vocabulary, or the tables would exceed `TABLE_LIMIT`.
        """
        table, initial, final_states = dense_table(transitions, initial, finals, vocab_size)
        return cls.from_table(table, np.arange(vocab_size), initial, final_states)

    @classmethod
    def from_table(
        cls, table: np.ndarray, token_class: np.ndarray, initial: int, finals: Iterable[int]
    ) -> TokenAutomaton:
        """Build from a table `int[S, C]` (-1 dead) and the column of each token, `int[V]`.

        Columns may repeat and states may be useless: equal columns are merged, states that no sequence
        reaches or that cannot reach acceptance are dropped.
        """
        table, column_class = merge_columns(np.asarray(table, np.int32))
        token_class = column_class[token_class]
        sources, targets = _edges(table)
        reached = _search(len(table), sources, targets, [initial]) != _NEVER
        distance = _search(len(table), targets, sources, finals)
        keep = reached & (distance != _NEVER)
        keep[initial] = True  # an automaton that accepts nothing is still one state

        number = np.full(len(table) + 1, -1, np.int32)  # the last entry renumbers -1 to itself
        number[:-1][keep] = np.arange(keep.sum())
        table, distance = number[table[keep]], distance[keep]
        table, column_class = merge_columns(table)  # dropped states can make more columns equal
        token_class = column_class[token_class]
        return cls(
            next_state=jnp.asarray(table),
            token_class=jnp.asarray(token_class, jnp.int32),
            to_go=jnp.asarray(_tokens_to_go(table, distance, token_class)),
            distance=jnp.asarray(distance),
            initial=int(number[initial]),
        )

    @property
    def num_bytes(self) -> int:
        """Size of the tables in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def init(self, num_particles: int) -> jax.Array:
        """Return the states of empty sequences, `int32[N]`."""
        return jnp.full(num_particles, self.initial, jnp.int32)

    def advance(self, state: jax.Array, tokens: jax.Array) -> jax.Array:
        """Take `tokens[N]` from `state[N]`; what is dead stays dead."""
        following = self.next_state[jnp.maximum(state, 0), self.token_class[tokens]]
        return jnp.where(state < 0, -1, following)

    def tokens_needed(self, state: jax.Array) -> jax.Array:
        """Fewest tokens from `state[N]` to acceptance, `int32[N]`; the largest int32 for never."""
        return jnp.where(state < 0, _NEVER, self.distance[jnp.maximum(state, 0)])

    def accepts(self, state: jax.Array) -> jax.Array:
        """Tell whether the sequences read so far are accepted, `bool[N]`."""
        return self.tokens_needed(state) == 0

    def tokens_to_go(self, state: jax.Array) -> jax.Array:
        """Fewest further tokens after each token, rows of `to_go`: `[N, V]`."""
        never = jnp.iinfo(self.to_go.dtype).max
        rows = self.to_go[jnp.maximum(state, 0)]
        return jnp.where((state < 0)[:, None], jnp.asarray(never, rows.dtype), rows)


def dense_table(
    transitions: Mapping[int, Mapping[int, int]], initial: int, finals: Iterable[int], vocab_size: int
) -> tuple[np.ndarray, int, list[int]]:
    """Renumber sparse transitions to a table `int32[S, vocab_size]`, the initial and the final states."""
    rows = {
        state: (np.fromiter(row.keys(), np.int64, len(row)), np.fromiter(row.values(), np.int64, len(row)))
        for state, row in transitions.items()
    }
    finals = list(finals)
    named = np.array([initial, *finals, *rows], np.int64)
    ids = np.unique(np.concatenate([named, *(np.unique(targets) for _, targets in rows.values())]))
    check_table_size(len(ids), vocab_size, len(ids) * vocab_size * 4)

    table = np.full((len(ids), vocab_size), -1, np.int32)
    for state, (tokens, targets) in rows.items():
        if tokens.size and not (0 <= tokens.min() and tokens.max() < vocab_size):
            raise ValueError(
                f"transitions: expected tokens from 0 to {vocab_size - 1} (vocab_size={vocab_size}), "
                f"got {tokens.min()} to {tokens.max()} in state {state}"
            )
        table[np.searchsorted(ids, state), tokens] = np.searchsorted(ids, targets)
    return table, int(np.searchsorted(ids, initial)), np.searchsorted(ids, finals).tolist()


def merge_columns(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge equal columns of `int32[S, C]`: return the distinct ones and the new column of each old one."""
    # Hashing the columns and checking the answer is far quicker than sorting them (np.unique, axis=1).
    for seed in itertools.count():
        rng = np.random.default_rng(seed)
        digest = np.zeros(table.shape[1], np.uint64)
        for row, factor in zip(table, rng.integers(2**63, size=len(table), dtype=np.uint64), strict=True):
            digest += row.astype(np.uint64) * (factor | np.uint64(1))
        _, first, column_class = np.unique(digest, return_index=True, return_inverse=True)
        distinct = table[:, first]
        if all(np.array_equal(a[column_class], b) for a, b in zip(distinct, table, strict=True)):
            return distinct, column_class.astype(np.int32)
    raise AssertionError("unreachable")


def check_table_size(num_states: int, vocab_size: int, num_bytes: int) -> None:
    """Refuse tables above `TABLE_LIMIT`.

    Raises:
        AutomatonError: names the size.
    """
    if num_bytes > TABLE_LIMIT:
        raise AutomatonError(
            f"the automaton has {num_states} states: its tables over a vocabulary of {vocab_size} would take "
            f"{num_bytes / 2**20:.0f} MiB, above the limit of {TABLE_LIMIT / 2**20:.0f} MiB; lower the "
            "bounds of its repetitions, use ASCII classes such as [a-z] in place of \\w, or fewer options"
        )


def _edges(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs (state, next state) of a table."""
    sources, columns = np.nonzero(table >= 0)
    pairs = np.unique(sources * len(table) + table[sources, columns])
    return pairs // len(table), pairs % len(table)


def _search(num_states: int, sources: np.ndarray, targets: np.ndarray, start: Iterable[int]) -> np.ndarray:
    """Fewest edges from the start states to every state, by breadth-first search, `int32[S]`."""
    order = np.argsort(sources, kind="stable")
    targets = targets[order]
    first = np.searchsorted(sources[order], np.arange(num_states + 1))
    distance = np.full(num_states, _NEVER, np.int32)
    frontier = np.unique(np.fromiter(start, np.int64))
    for depth in itertools.count():
        if not frontier.size:
            return distance
        distance[frontier] = depth
        near = np.unique(np.concatenate([targets[first[s] : first[s + 1]] for s in frontier]))
        frontier = near[distance[near] == _NEVER]
    raise AssertionError("unreachable")


def _tokens_to_go(table: np.ndarray, distance: np.ndarray, token_class: np.ndarray) -> np.ndarray:
    """Distance to acceptance after every token, in the smallest type that has room for never."""
    finite = distance[distance != _NEVER]
    types = map(np.dtype, (np.uint8, np.uint16, np.int32))
    dtype = next(t for t in types if finite.max(initial=0) < np.iinfo(t).max)
    num_states, vocab_size = len(table), len(token_class)
    num_bytes = num_states * vocab_size * dtype.itemsize + table.nbytes + 4 * vocab_size
    check_table_size(num_states, vocab_size, num_bytes)
    never = np.iinfo(dtype).max
    by_class = np.where(distance == _NEVER, never, distance).astype(dtype)[table]
    return np.where(table < 0, never, by_class).astype(dtype)[:, token_class]
