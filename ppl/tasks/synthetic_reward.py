"""Synthetic process rewards: exact values seen through noise of a chosen strength, for controlled studies.

Nothing here is learnt. Real process reward models err in ways that cannot be set; these can, and so tell what
an algorithm owes to the quality of its rewards.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence

import numpy as np

__all__ = ["clipped", "noise_for_auc", "noisy_scores"]

OVERCONFIDENT_STEPS = 2
OVERCONFIDENCE = 4.0
_MARGIN = 1e-7  # so that scores stay below 1 as float32


def clipped(values: Sequence[float], epsilon: float) -> np.ndarray:
    """Return values clipped to [epsilon, 1 - epsilon]; a reward of exactly 0 or 1 could not be outweighed."""
    if not 0 < epsilon < 0.5:
        raise ValueError(f"epsilon: expected a number between 0 and 0.5, got {epsilon!r}.")
    found = np.asarray(values, dtype=np.float64)
    if not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"values: expected numbers in [0, 1], got {found}")
    return np.clip(found, epsilon, 1 - epsilon)


def noisy_scores(
    prompt: str,
    prefixes: Sequence[str],
    values: Sequence[float],
    *,
    noise: float,
    overconfidence: bool = False,
    epsilon: float = 0.1,
    seed: int = 0,
) -> np.ndarray:
    r"""Return sigmoid(logit of the clipped value + noise) for each prefix.

    The noise is normal and a function of the seed, the prompt and the prefix: the same trace has the same
    score wherever and whenever it is scored.

    Args:
        prompt: the problem.
        prefixes: steps written so far, each with its "\n".
        values: exact value of each prefix, in [0, 1].
        noise: standard deviation in logits; see `noise_for_auc`.
        overconfidence: noise is early only: after steps 1 and 2 the noisy logit is multiplied by 4, and all
            traces with the same first step share the noise; later scores have none. A search that trusts such
            scores commits to few lineages early, and learns too late which were right.
        epsilon: exact values are clipped to [epsilon, 1 - epsilon] before the noise.
        seed: of the noise; another seed is another synthetic model.

    Returns:
        float64[len(prefixes)] in (0, 1).
    """
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise: expected a non-negative number, got {noise!r}.")
    if len(prefixes) != len(values):
        raise ValueError(f"values: expected one for each of {len(prefixes)} prefixes, got {len(values)}.")
    exact = clipped(values, epsilon)
    logits = np.log(exact / (1 - exact))
    for i, prefix in enumerate(prefixes):
        early = overconfidence and 1 <= prefix.count("\n") <= OVERCONFIDENT_STEPS
        seen = prefix[: prefix.index("\n") + 1] if early else prefix
        if early or not overconfidence:
            logits[i] += noise * _normal(f"{seed}\0{prompt}\0{seen}")
        logits[i] *= OVERCONFIDENCE if early else 1.0
    scores = 0.5 * (1 + np.tanh(0.5 * logits))
    return np.clip(scores, _MARGIN, 1 - _MARGIN)


def noise_for_auc(auc: float, *, epsilon: float = 0.1) -> float:
    """Return the noise with which a good trace outscores a bad one with probability `auc`."""
    if not 0.5 < auc < 1:
        raise ValueError(f"auc: expected a number between 0.5 and 1, got {auc!r}.")
    if not 0 < epsilon < 0.5:
        raise ValueError(f"epsilon: expected a number between 0 and 0.5, got {epsilon!r}.")
    distance = 2 * math.log((1 - epsilon) / epsilon)
    return distance / (math.sqrt(2) * statistics.NormalDist().inv_cdf(auc))


def _normal(text: str) -> float:
    """Return a standard normal number that is a function of the text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "little") + 0.5) / 2.0**64
    return statistics.NormalDist().inv_cdf(min(max(uniform, 1e-16), 1 - 1e-16))
