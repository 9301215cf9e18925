"""Who descends from whom: the particles of a run as a graph of segments, ready to be drawn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ponder.posterior.arrays import PosteriorArrays, history, linear_weights

__all__ = ["Genealogy", "Segments", "ancestral_mass", "genealogy"]


class Segments(NamedTuple):
    """Lines from level `level`, row `start` to level `until`, row `stop`; K of them.

    Attributes:
        level: int[K].
        start: int[K].
        until: int[K]; the next level, or a later one where a particle keeps its row.
        stop: int[K].
        mass: float[K]; final weight that descends through the line.
    """

    level: np.ndarray
    start: np.ndarray
    until: np.ndarray
    stop: np.ndarray
    mass: np.ndarray


class Genealogy(NamedTuple):
    """The particles' family tree; S steps, hence S + 1 levels, the empty traces being level 0.

    Attributes:
        num_steps: S.
        num_roots: rows of the first step that the particles with weight descend from.
        moves: lines of particles that drew a token.
        waits: lines of finished particles that wait to be copied into another row later.
        end_level: int[E]; where traces ended, by EOS, a stop, or the length limit.
        end_row: int[E].
        end_mass: float[E]; final weight of each ended trace, its copies included.
        copy_level: int[C]; where copies of ended traces came to rest.
        copy_row: int[C].
        resampled: int[R]; levels at which the particles were resampled.
    """

    num_steps: int
    num_roots: int
    moves: Segments
    waits: Segments
    end_level: np.ndarray
    end_row: np.ndarray
    end_mass: np.ndarray
    copy_level: np.ndarray
    copy_row: np.ndarray
    resampled: np.ndarray


def genealogy(posterior: PosteriorArrays) -> Genealogy:
    """Walk the ancestors of a posterior back from its final weights.

    Raises:
        ValueError: the posterior does not tell its ancestors, or is a batch of posteriors.
    """
    stats = posterior.stats
    if stats.ancestors is None or stats.num_tokens is None:
        raise ValueError(
            f"posterior: expected one with the ancestors of its particles, got one of method "
            f"{posterior.method!r} without; only particle methods record them, and merging or redrawing "
            "traces with unique() or sample() loses them: plot the posterior that run() returned"
        )
    if stats.ancestors.ndim != 2:
        raise ValueError(
            f"posterior: expected one posterior, got a batch with ancestors of shape {stats.ancestors.shape}"
        )
    stats = history(stats)
    assert stats.ancestors is not None and stats.num_tokens is not None  # as above
    ancestors, moved = np.asarray(stats.ancestors), np.asarray(stats.num_tokens) > 0
    num_steps, n = ancestors.shape
    rows = np.arange(n)

    mass = ancestral_mass(ancestors, linear_weights(posterior))
    waits_on = np.zeros(mass.shape, bool)  # finished here, copied into another row later
    for t in reversed(range(num_steps)):
        copied = (mass[t + 1] > 0) & ~moved[t, ancestors[t]] & ((ancestors[t] != rows) | waits_on[t + 1])
        waits_on[t, ancestors[t][copied]] = True

    level = np.broadcast_to(np.arange(num_steps)[:, None], ancestors.shape)
    stop = np.broadcast_to(rows, ancestors.shape)
    starts_moving = moved[level, ancestors]
    waiting = ~starts_moving & (mass[1:] > 0) & ((ancestors != stop) | waits_on[1:])

    def segments(where: np.ndarray) -> Segments:
        return _joined(
            Segments(level[where], ancestors[where], level[where] + 1, stop[where], mass[1:][where])
        )

    # A trace ended where it came by drawing a token and then drew no more.
    ended = np.zeros(mass.shape, bool)
    ended[1:] = starts_moving
    ended[:-1] &= ~moved
    end_level, end_row = np.nonzero(ended)
    rests = waiting & ~waits_on[1:]
    return Genealogy(
        num_steps=num_steps,
        num_roots=int((mass[0] > 0).sum()),
        moves=segments(starts_moving),
        waits=segments(waiting),
        end_level=end_level,
        end_row=end_row,
        end_mass=mass[end_level, end_row],
        copy_level=level[rests] + 1,
        copy_row=stop[rests],
        resampled=np.flatnonzero([] if stats.resampled is None else stats.resampled) + 1,
    )


def ancestral_mass(ancestors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the final weight that descends from each row of each step, float[S + 1, N].

    Args:
        ancestors: int[S, N].
        weights: float[N]; linear. They are the last row of what is returned.
    """
    mass = np.zeros((len(ancestors) + 1, len(weights)))
    mass[-1] = weights
    for t in reversed(range(len(ancestors))):
        np.add.at(mass[t], ancestors[t], mass[t + 1])
    return mass


def _joined(segments: Segments) -> Segments:
    """Join lines that continue each other in one row with the same mass: long lines draw better than many."""
    level, start, until, stop, mass = (x[np.lexsort((segments.level, segments.stop))] for x in segments)
    straight = start == stop
    goes_on = np.zeros(len(level), bool)  # the line continues the one before it
    goes_on[1:] = (
        straight[1:]
        & straight[:-1]
        & (stop[1:] == stop[:-1])
        & (level[1:] == until[:-1])
        & (mass[1:] == mass[:-1])
    )
    first = np.nonzero(~goes_on)[0]
    last = np.append(first[1:], len(level)) - 1 if len(first) else first
    return Segments(level[first], start[first], until[last], stop[first], mass[first])
