"""Train the countdown reasoners and their process reward models: `python -m ponder.tasks.training.countdown`.

policy       teacher forcing on random traces; what they leave is the target (hindsight)
policy-five  the same for problems of five numbers
prm          exact labels: is everything right so far, and can the target be reached
rollout-prm  the literature's way: labels are outcomes of the policy's own continuations, nothing else
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ponder.models.decoder import Decoder, linear
from ponder.models.language_model import DecoderLM
from ponder.models.loading.checkpoint_export import export_policy, export_reward
from ponder.models.loading.loading import load
from ponder.models.loading.shipped import CHECKPOINTS
from ponder.tasks import countdown, countdown_five
from ponder.tasks.countdown import NUM_STEPS, PIECES, SPLIT
from ponder.tasks.training.countdown_inputs import (
    MAX_LENGTH,
    PROMPT_LENGTH,
    encode,
    encode_trace,
    parse_trace,
    policy_traces,
    with_features,
)
from ponder.tasks.training.countdown_labels import NEWLINES
from ponder.tasks.training.countdown_reward import train_reward
from ponder.tasks.training.fitting import (
    apply_head,
    binary_cross_entropy,
    cross_entropy,
    fit,
    hidden_states,
    new_heads,
    options,
    sample_traces,
    small_config,
)
from ponder.tasks.training.reward_gates import check_gates, policy_accuracy

__all__ = ["main"]


def train_policy(
    out: Path,
    task: Any,
    num_steps: int,
    minutes: float | None,
    seed: int,
    *,
    start: Path | None = None,
    batch_size: int = 128,
) -> None:
    """Train on random traces with hindsight targets: imperfect on purpose, and by this choice of data.

    Args:
        out: directory to write.
        task: the module of the task, countdown with some number of numbers.
        num_steps: of training.
        minutes: shorten the training to this.
        seed: of weights and data.
        start: a policy to train further.
        batch_size: traces in a step.
    """
    if start is None:
        decoder = Decoder(small_config(len(PIECES), 4, MAX_LENGTH), rngs=nnx.Rngs(seed))
    else:
        decoder = load(start).decoder
    values, build = with_features(decoder)
    rng = np.random.default_rng(seed)

    def batch_fn(_: int) -> np.ndarray:
        rows = []
        for _row in range(batch_size):
            problem, steps = task.draw_problem(rng, held_out=False)
            rows.append([*encode_trace(problem, steps), task.EOS_ID])
        return np.asarray(rows, np.int32)

    def loss_fn(values: Any, tokens: jax.Array) -> tuple[jax.Array, dict]:
        decoder = build(values)
        labels = tokens[:, -task.MAX_NEW_TOKENS :]
        x = hidden_states(decoder, tokens[:, :-1])[:, -task.MAX_NEW_TOKENS :]
        assert decoder.head is not None
        return cross_entropy(linear(x, decoder.head), labels, jnp.ones(labels.shape)), {}

    def save(values: Any) -> None:
        export_policy(out, build(values), PIECES, SPLIT)

    save(fit(values, loss_fn, batch_fn, num_steps=num_steps, minutes=minutes, save_fn=save))
    print(policy_accuracy(load(out), task))


def train_rollout_reward(
    out: Path, policy: DecoderLM, num_steps: int, minutes: float | None, seed: int, batch_size: int = 128
) -> None:
    """Train the policy's own network on the share of its continuations that turn out right."""
    rng = np.random.default_rng(seed)
    tokens, shares = rollout_labels(policy, num_problems=1000, num_samples=4, num_rollouts=4, seed=seed)
    print(f"{len(tokens)} traces; share of right outcomes by step {shares.mean(0)}", flush=True)
    graph, parameters = nnx.split(nnx.clone(policy.decoder))
    size = policy.decoder.config.hidden_size
    values = {"decoder": parameters} | new_heads(size, score=1)

    def batch_fn(_: int) -> tuple[np.ndarray, np.ndarray]:
        rows = rng.integers(len(tokens), size=batch_size)
        return tokens[rows], shares[rows]

    def loss_fn(values: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, dict]:
        x = hidden_states(nnx.merge(graph, values["decoder"]), batch[0])[:, PROMPT_LENGTH:]
        score = binary_cross_entropy(apply_head(values, "score", x[:, np.asarray(NEWLINES)]), batch[1]).mean(
            0
        )
        return score.mean(), {f"score{i + 1}": score[i] for i in range(NUM_STEPS)}

    def save(values: Any) -> None:
        weight, bias = np.asarray(values["score_weight"]), np.asarray(values["score_bias"])
        export_reward(out, nnx.merge(graph, values["decoder"]), weight, bias, PIECES, SPLIT)

    save(
        fit(values, loss_fn, batch_fn, num_steps=num_steps, learning_rate=5e-4, minutes=minutes, save_fn=save)
    )
    check_gates(policy, out, countdown, strict=False)


def rollout_labels(
    policy: DecoderLM, num_problems: int, num_samples: int, num_rollouts: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows int[R, P + T] and for each of their steps the share of continuations that are right."""
    rows, problems = [], []
    for problem, traces in policy_traces(policy, num_problems, num_samples, seed):
        whole = [ids for ids in traces if parse_trace(ids) is not None]
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
    rest = (chosen.steps, chosen.minutes, chosen.seed)
    if chosen.model == "policy":
        train_policy(chosen.out, countdown, *rest, start=chosen.start)
    elif chosen.model == "policy-five":
        train_policy(chosen.out, countdown_five, *rest, start=chosen.start)
    elif chosen.model == "prm":
        train_reward(chosen.out, load(chosen.policy), *rest, start=chosen.start)
    else:
        train_rollout_reward(chosen.out, load(chosen.policy), *rest)


if __name__ == "__main__":
    main()
