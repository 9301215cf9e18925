"""Train the countdown reasoners and their process reward models: `python -m ponder.tasks.training.countdown`.

policy       teacher forcing on random traces; what they leave is the target (hindsight)
policy-five  the same for problems of five numbers
prm          exact labels: is everything right so far, and can the target be reached
rollout-prm  the literature's way: labels are outcomes of the policy's own continuations, nothing else
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from ponder.models.language_model import DecoderLM
from ponder.models.loading.loading import load
from ponder.models.loading.shipped import CHECKPOINTS
from ponder.tasks import countdown, countdown_five
from ponder.tasks.countdown import NUM_STEPS, PIECES
from ponder.tasks.training.countdown_inputs import (
    MAX_LENGTH,
    PROMPT_LENGTH,
    encode,
    encode_trace,
    parse_steps,
    with_features,
)
from ponder.tasks.training.countdown_labels import NEWLINES
from ponder.tasks.training.countdown_reward import save_reward, train_reward
from ponder.tasks.training.fitting import (
    apply_head,
    binary_cross_entropy,
    hidden_states,
    new_heads,
    options,
    sample_traces,
)
from ponder.tasks.training.policy_traces import policy_traces
from ponder.tasks.training.reward_gates import check_gates
from ponder.tasks.training.run import TrainingRun, train, train_policy, trainable

__all__ = ["main"]


def train_countdown_policy(run: TrainingRun, task: Any, batch_size: int = 128) -> None:
    """Train on random traces with hindsight targets: imperfect on purpose, and by this choice of data.

    Args:
        run: see there.
        task: the module of the task, countdown with some number of numbers.
        batch_size: traces in a step.
    """

    def draw_row(rng: np.random.Generator) -> list[int]:
        return [*encode_trace(*task.draw_problem(rng, held_out=False)), task.EOS_ID]

    train_policy(run, task, draw_row, max_length=MAX_LENGTH, batch_size=batch_size, trainable=with_features)


def train_rollout_reward(run: TrainingRun, policy: DecoderLM, batch_size: int = 128) -> None:
    """Train the policy's own network on the share of its continuations that turn out right."""
    rng = np.random.default_rng(run.seed)
    tokens, shares = rollout_labels(policy, num_problems=1000, num_samples=4, num_rollouts=4, seed=run.seed)
    print(f"{len(tokens)} traces; share of right outcomes by step {shares.mean(0)}", flush=True)
    values, build = trainable(nnx.clone(policy.decoder))
    values |= new_heads(policy.decoder.config.hidden_size, score=1)

    def batch_fn(_: int) -> tuple[np.ndarray, np.ndarray]:
        rows = rng.integers(len(tokens), size=batch_size)
        return tokens[rows], shares[rows]

    def loss_fn(values: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, dict]:
        x = hidden_states(build(values), batch[0])[:, PROMPT_LENGTH:]
        logits = apply_head(values, "score", x[:, np.asarray(NEWLINES)])
        score = binary_cross_entropy(logits, batch[1]).mean(0)
        return score.mean(), {f"score{i + 1}": score[i] for i in range(NUM_STEPS)}

    save = functools.partial(save_reward, run.out, build)
    train(run, values, loss_fn, batch_fn, save, learning_rate=5e-4)
    check_gates(policy, run.out, countdown, strict=False)


def rollout_labels(
    policy: DecoderLM, num_problems: int, num_samples: int, num_rollouts: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows int[R, P + T] and for each of their steps the share of continuations that are right."""
    rows, problems = [], []
    for problem, traces in policy_traces(policy, countdown, num_problems, num_samples, seed):
        whole = [ids for ids in traces if parse_steps(ids) is not None]
        rows += [encode(countdown.prompt_text(problem)) + ids for ids in whole]
        problems += [problem] * len(whole)
    tokens = np.asarray(rows, np.int32)
    shares = np.zeros((len(rows), NUM_STEPS), np.float32)
    for step in range(NUM_STEPS):
        start = PROMPT_LENGTH + NEWLINES[step] + 1
        prefixes = tokens[:, :start]
        left = tokens.shape[1] - start
        if left:
            ends = sample_traces(policy, prefixes, num_rollouts, left, seed + 1 + step)
        else:
            ends = np.zeros((len(rows), 1, 0), np.int32)
        for i, problem in enumerate(problems):
            texts = ["".join(PIECES[t] for t in (*prefixes[i, PROMPT_LENGTH:], *end)) for end in ends[i]]
            prompt = countdown.prompt_text(problem)
            shares[i, step] = np.mean([countdown.grade(prompt, text).correct for text in texts])
    return tokens, shares


def main() -> None:
    """Train one model, write it, and print how good it is."""
    steps = {"policy": 800, "policy-five": 1600, "prm": 2900, "rollout-prm": 200}
    chosen = options("ponder.tasks.training.countdown", __doc__ or "", CHECKPOINTS / "countdown-tiny", steps)
    run = TrainingRun.of(chosen)
    if chosen.model == "policy":
        train_countdown_policy(run, countdown)
    elif chosen.model == "policy-five":
        train_countdown_policy(run, countdown_five)
    elif chosen.model == "prm":
        train_reward(run, load(chosen.policy))
    else:
        train_rollout_reward(run, load(chosen.policy))


if __name__ == "__main__":
    main()
