"""What a reward model must show before it is used: it orders traces of one problem, and best-of-n profits.

An area under the curve over all problems together can be high for a model that only knows which problems are
hard; best-of-n then *falls* with n.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ponder.models.language_model import DecoderLM
from ponder.models.loading.checkpoint_export import encoder
from ponder.models.loading.reward_loading import load_reward
from ponder.models.protocols import RewardModel
from ponder.tasks.training.fitting import best_of_n, sample_traces, within_problem_auc

__all__ = ["check_gates", "policy_accuracy", "step_scores"]

LEAST_AUC = 0.85
COUNTS = (1, 4, 16, 64)


def policy_accuracy(policy: DecoderLM, task: Any, num_problems: int = 200, num_samples: int = 16) -> str:
    """Return the sampled and greedy accuracy on held-out problems, as a line.

    Args:
        policy: the model.
        task: the module of the task, such as `ponder.tasks.countdown`.
        num_problems: of them.
        num_samples: for each.
    """
    prompts, ids = _prompts(task, num_problems)
    sampled = sample_traces(policy, ids, num_samples, task.MAX_NEW_TOKENS, seed=1)
    greedy = sample_traces(policy, ids, 0, task.MAX_NEW_TOKENS, seed=1)
    shares = [_correct(task, prompts, traces).mean() for traces in (sampled, greedy)]
    return f"accuracy on {num_problems} held-out problems: sampled {shares[0]:.3f}, greedy {shares[1]:.3f}"


def check_gates(
    policy: DecoderLM, reward: Path, task: Any, num_problems: int = 150, *, strict: bool = True
) -> dict[str, Any]:
    """Print and check the gates of an exported reward model on the policy's held-out traces.

    Args:
        policy: draws the traces, 64 a problem.
        reward: directory of the reward model.
        task: the module of the task.
        num_problems: of them.
        strict: False prints only.

    Returns:
        "auc" after each step, "best_of_n" by n, and "scores" and exact "values" float[B, N, steps], where NaN
        is a step that was not written.

    Raises:
        ValueError: an area is below 0.85 or unknown, or best-of-n does not rise with n; or a score is NaN.
    """
    prompts, ids = _prompts(task, num_problems)
    traces = sample_traces(policy, ids, max(COUNTS), task.MAX_NEW_TOKENS, seed=2)
    correct = _correct(task, prompts, traces)
    scores = step_scores(load_reward(reward), ids, traces, task)
    values = _values(task, prompts, traces)
    areas = [within_problem_auc(scores[..., i], values[..., i] > 0.5) for i in range(task.NUM_STEPS)]
    last = np.nan_to_num(scores[..., -1], nan=0.0)
    accuracies = best_of_n(last, correct, COUNTS)
    kept = ~np.isnan(scores)
    brier = float(np.mean((scores[kept] - values[kept]) ** 2))
    for i, (area, count) in enumerate(areas):
        print(f"within-problem AUC after step {i + 1}: {area:.3f} over {count} problems")
    product = np.nan_to_num(scores, nan=0.0).prod(-1)
    for name, found in (("last score", accuracies), ("product", best_of_n(product, correct, COUNTS))):
        figures = ", ".join(f"{n}: {a:.3f}" for n, a in zip(COUNTS, found, strict=True))
        print(f"best of n by the {name}: {figures}")
    print(f"solved by some trace of {max(COUNTS)}: {correct.any(1).mean():.3f}; Brier score {brier:.4f}")
    if strict:
        if not all(area >= LEAST_AUC for area, _ in areas):  # NaN does not pass
            raise ValueError(f"AUC: expected at least {LEAST_AUC} after every step, got {areas}")
        if not all(a < b for a, b in itertools.pairwise(accuracies)):
            raise ValueError(f"best-of-n: expected it to rise with n, got {accuracies}")
    return {
        "auc": [area for area, _ in areas],
        "best_of_n": dict(zip(COUNTS, accuracies, strict=True)),
        "scores": scores,
        "values": values,
    }


def step_scores(reward: RewardModel, prompts: np.ndarray, traces: np.ndarray, task: Any) -> np.ndarray:
    """Return the rewards float[B, N, steps] at the end of each step; NaN for steps that are not written.

    Args:
        reward: with `extend_block`.
        prompts: int[B, P].
        traces: int[B, N, T].
        task: the module of the task.

    Raises:
        ValueError: the score of a step that was written is NaN.
    """
    newline, width = task.PIECES.index("\n"), traces.shape[2]
    start = jax.jit(lambda prompt: reward.prefill(prompt, traces.shape[1], width)[0])
    read = jax.jit(reward.extend_block)  # pyright: ignore[reportAttributeAccessIssue]
    out = np.full((*traces.shape[:2], task.NUM_STEPS), np.nan)
    for b, rows in enumerate(traces):
        cache = start(jnp.asarray(prompts[b], jnp.int32))
        begins = np.zeros(len(rows), int)
        for i in range(task.NUM_STEPS):
            ends = [
                np.flatnonzero(row[begin:] == newline)[:1] for row, begin in zip(rows, begins, strict=True)
            ]
            lengths = np.asarray([end[0] + 1 if len(end) else 0 for end in ends], np.int32)
            columns = np.minimum(begins[:, None] + np.arange(width), width - 1)
            step = jnp.asarray(np.take_along_axis(rows, columns, axis=1), jnp.int32)
            cache, scores = read(cache, step, jnp.asarray(lengths))
            if np.isnan(scores)[lengths > 0].any():
                raise ValueError(f"reward: the score of a step is NaN, in traces of prompt {b}")
            out[b, :, i] = np.where(lengths > 0, scores, np.nan)
            begins = np.where(lengths > 0, begins + lengths, width)
    return out


def _prompts(task: Any, num_problems: int) -> tuple[list[str], np.ndarray]:
    prompts = [task.prompt_text(problem) for problem in task.problems(123, num_problems)]
    encode = encoder(task.PIECES, task.SPLIT)
    return prompts, np.asarray([encode(prompt) for prompt in prompts])


def _text(task: Any, ids: Sequence[int]) -> str:
    return "".join(task.PIECES[i] for i in ids)


def _correct(task: Any, prompts: list[str], traces: np.ndarray) -> np.ndarray:
    return np.asarray(
        [
            [task.grade(prompt, _text(task, row)).correct for row in rows]
            for prompt, rows in zip(prompts, traces, strict=True)
        ]
    )


def _values(task: Any, prompts: list[str], traces: np.ndarray) -> np.ndarray:
    """Exact values [B, N, steps]."""
    out = np.zeros((*traces.shape[:2], task.NUM_STEPS))
    for b, rows in enumerate(traces):
        for n, row in enumerate(rows):
            lines = _text(task, row).splitlines(keepends=True)
            for i in range(min(task.NUM_STEPS, len(lines))):
                out[b, n, i] = task.exact_value(prompts[b], "".join(lines[: i + 1]))
    return out
