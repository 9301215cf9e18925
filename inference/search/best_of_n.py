"""Best-of-N: draw N traces side by side, and keep the one that is judged best.

A heuristic search: the trace that it keeps is no draw from p(x | prompt) Φ(x) or any other stated target, its
distribution changes with N, and there is no evidence. What it costs is one forward pass a token.

The traces come from the program's own proposal, as those of `importance_sampling`: from p where nothing
guides the tokens, and from p guided step by step where a potential offers `token_logits`, so that a hard
constraint holds. Their importance weights are not used, but traces of density zero are never chosen.

References:
    Cobbe et al. (2021), Training verifiers to solve math word problems, arXiv:2110.14168;
    weighted: Li et al. (2023), Making language models better reasoners with step-aware verifier,
    arXiv:2206.02336; Snell et al. (2024), Scaling LLM test-time compute optimally, arXiv:2408.03314.
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

__all__ = ["Best", "best_of_n"]

SCORES = ("potential", "prior", "joint")


@dataclasses.dataclass(frozen=True)
class Best:
    """Chooses the trace of the highest score, or the best trace of the answer with the highest total."""

    score: str
    weighted: bool
    extract: Callable[[str], Hashable | None] | None

    def __call__(self, drawn: Posterior) -> jax.Array:
        """Return bool[N], true in one row, or in none if no trace has positive density."""
        scores = drawn.log_prior if self.score == "prior" else drawn.log_potential
        if self.score == "joint":
            scores = drawn.log_prior + drawn.log_potential
        allowed = eligible(drawn)
        if self.weighted:
            allowed = allowed & self._of_heaviest_answer(drawn, allowed, scores)
        best = jnp.argmax(jnp.where(allowed, scores, -jnp.inf))  # ties go to the first row
        return allowed & (jnp.arange(len(drawn), dtype=jnp.int32) == best)

    def _of_heaviest_answer(self, drawn: Posterior, allowed: jax.Array, scores: jax.Array) -> jax.Array:
        groups = alternatives(drawn, self.extract, allowed)
        log_scores, chosen = np.asarray(scores, np.float64), np.zeros(len(drawn), bool)
        if groups:
            chosen[max(groups, key=lambda rows: np.logaddexp.reduce(log_scores[rows]))] = True
        return jnp.asarray(chosen)


def best_of_n(
    program: StateSpaceModel,
    num_particles: int = 16,
    *,
    score: str = "potential",
    weighted: bool = False,
    extract: Callable[[str], Hashable | None] | None = None,
) -> Selection:
    """Build best-of-N, a heuristic without a stated target: see the module docstring.

    Args:
        program: `ponder.Generation` or any other `StateSpaceModel` that tells its traces.
        num_particles: N >= 1.
        score: what the chosen trace maximises: "potential", log Φ(x), which with a process reward model and
            `link="ratio"` is the log of its last judgement; "prior", log p(x); or "joint", their sum. A trace
            without text is never judged and has Φ = 1: where traces may be empty, such a trace can win.
        weighted: choose the answer with the largest sum of exp(score) over its traces, then the best of
            these. Traces without an answer are ignored unless no trace has one. The answers are read on the
            host after the compiled run, so that `run` cannot be traced.
        extract: for `weighted`: maps a text to its answer, or None; by default the whole text is the answer.

    Returns:
        An algorithm whose posterior holds the N traces, the chosen one with all the weight; its
        `log_evidence` is NaN, and the tokens of the others count as discarded.

    Raises:
        TypeError, ValueError: an argument is out of range or of the wrong kind.
    """
    if score not in SCORES:
        raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
    if not isinstance(weighted, bool):
        raise TypeError(f"weighted: expected a bool, got {weighted!r}")
    check_extract(extract)
    if extract is not None and not weighted:
        raise ValueError("extract: only used with weighted=True, got it with weighted=False")
    return select(program, num_particles, Best(score, weighted, extract), "best_of_n")
