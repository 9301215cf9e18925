"""Importance sampling: independent traces from the proposal, weighed once.

Target: π(x) ∝ p(x | prompt) Φ(x). The evidence estimate is unbiased on the linear scale for every N;
posterior expectations are consistent as N grows. It is SMC that never resamples.
"""

from __future__ import annotations

from ponder.inference.particles.smc import SMC, build
from ponder.protocols import StateSpaceModel

__all__ = ["importance_sampling"]


def importance_sampling(program: StateSpaceModel, num_particles: int = 32) -> SMC:
    """Build importance sampling from the program's proposal.

    Args:
        program: `ponder.Generation` or any other `StateSpaceModel`.
        num_particles: N >= 1.

    Raises:
        TypeError, ValueError: an argument is out of range or of the wrong kind.
    """
    return build(program, num_particles, "systematic", 0.0, "importance_sampling")
