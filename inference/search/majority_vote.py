"""Majority vote (self-consistency): draw N traces side by side, and keep those of the most frequent answer.

A heuristic search: every trace has one vote whatever its Φ, so that the result does not follow
p(x | prompt) Φ(x), and only the winner is kept, so that it does not follow p either. The vote estimates the
most probable answer under the program's proposal, which is p where nothing guides the tokens. There is no
evidence. One forward pass a token.

References:
    Wang et al. (2023), Self-consistency improves chain of thought reasoning in language models,
    arXiv:2203.11171.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np

from ponder.inference.search.selection import Selection, alternatives, check_extract, eligible, select
from ponder.posterior.posterior import Posterior
from ponder.protocols import StateSpaceModel

__all__ = ["Majority", "majority_vote"]


@dataclasses.dataclass(frozen=True)
class Majority:
    """Chooses all traces of the most frequent answer."""

    extract: Callable[[str], Hashable | None] | None

    def __call__(self, drawn: Posterior) -> jax.Array:
        """Return bool[N], false everywhere if no trace has positive density."""
        chosen = np.zeros(len(drawn), bool)
        groups = alternatives(drawn, self.extract, eligible(drawn))
        if groups:
            chosen[max(groups, key=len)] = True  # ties go to the answer of the first row
        return jnp.asarray(chosen)


def majority_vote(
    program: StateSpaceModel,
    num_particles: int = 16,
    extract: Callable[[str], Hashable | None] | None = None,
) -> Selection:
    """Build the majority vote, a heuristic without a stated target: see the module docstring.

    Args:
        program: `ponder.Generation` or any other `StateSpaceModel` that tells its traces. They come from its
            own proposal; those of density zero have no vote, the others one each.
        num_particles: N >= 1.
        extract: maps a text to its answer, or None if it has none; by default the whole text is the answer.
            Traces without an answer have no vote unless no trace has one. Ties go to the answer of the first
            row. It is called on the host, so that `run` cannot be traced.

    Returns:
        An algorithm whose posterior holds the N traces, those of the winner with equal weights and the others
        with none; its `log_evidence` is NaN, and the tokens of the others count as discarded.

    Raises:
        TypeError, ValueError: an argument is out of range or of the wrong kind.
    """
    check_extract(extract)
    return select(program, num_particles, Majority(extract), "majority_vote")
