"""Train the countdown reasoner and its process reward models: `python -m ponder.models.train_countdown`.

    policy       teacher forcing on random traces; what they leave is the target (hindsight)
    policy-five  the same for problems of five numbers
    prm          exact labels: is everything right so far, and can the target be reached
    rollout-prm  the literature's way: labels are outcomes of the policy's own continuations, nothing else

A plain head for right or wrong does not learn arithmetic, and then prefers whatever looks likely. The prm is
therefore made to *predict* the right result at the equals sign and the numbers that remain, to know which
targets the written numbers reach, and to say at every token whether all is right so far. These heads are
dropped at export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ponder.models import countdown, countdown_five
from ponder.models.checkpoint_export import encoder, export_policy, export_reward, read_reward
from ponder.models.countdown import NUM_STEPS, PIECES, SPLIT, Problem, Step
from ponder.models.countdown_labels import LENGTHS, NEWLINES, corrupted_trace, label_trace
from ponder.models.decoder import Decoder, linear
from ponder.models.language_model import DecoderLM
from ponder.models.loading import load
from ponder.models.reward_gates import check_gates, policy_accuracy
from ponder.models.shipped import CHECKPOINTS
from ponder.models.training import (
    apply_head,
    binary_cross_entropy,
    cross_entropy,
    deepen,
    fit,
    hidden_states,
    new_heads,
    options,
    sample_traces,
    small_config,
)

__all__ = ["main"]

MAX_LENGTH = 64
PROMPT_LENGTH = 10
TRACE_LENGTH = sum(LENGTHS)
encode = encoder(PIECES, SPLIT)


def number_features() -> np.ndarray:
    """Return features float32[V, K] of the number tokens: magnitude, residues as angles, and digits."""
    n = np.arange(100)
    columns = [n / 50, np.log1p(n) / 2, np.sqrt(n) / 5]
    for modulus in (2, 3, 4, 5, 7, 8, 9, 10, 11, 13, 20, 25, 50, 100):
        columns += [np.sin(2 * np.pi * n / modulus), np.cos(2 * np.pi * n / modulus)]
    digits = [n // 10 == d for d in range(10)] + [n % 10 == d for d in range(10)]
    features = np.zeros((len(PIECES), len(columns) + len(digits)), np.float32)
    features[:100] = np.stack([*columns, *digits], axis=1)
    return features


def with_features(decoder: Decoder) -> tuple[Any, Callable[[Any], Decoder]]:
    """Return trainable values and a function that builds the decoder from them.

    Embedding and head have a part that is linear in the number's features, so that what is learnt about a
    number serves its neighbours; building adds it in, and an exported table is plain.
    """
    features = number_features()
    graph, parameters = nnx.split(decoder)
    empty = jnp.zeros((features.shape[1], decoder.config.hidden_size))
    values = {"decoder": parameters, "features": empty, "head_features": empty}

    def build(values: Any) -> Decoder:
        decoder = nnx.merge(graph, values["decoder"])
        decoder.embedding.set_value(decoder.embedding[...] + features @ values["features"])
        assert decoder.head is not None
        decoder.head.set_value(decoder.head[...] + features @ values["head_features"])
        return decoder

    return values, build


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
            text = task.prompt_text(problem) + "".join(map(task.step_text, steps))
            rows.append([*encode(text), task.EOS_ID])
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


def train_reward(
    out: Path,
    policy: DecoderLM,
    num_steps: int,
    minutes: float | None,
    seed: int,
    *,
    start: Path | None = None,
    batch_size: int = 128,
) -> None:
    """Train the policy with two more blocks on exact labels, most of them on traces that go wrong."""
    rng = np.random.default_rng(seed)
    pool = [
        (problem, steps)
        for problem, traces in policy_traces(policy, num_problems=1200, num_samples=12, seed=seed)
        for steps in map(parse_trace, traces)
        if steps is not None
    ]
    print(f"{len(pool)} traces of the policy", flush=True)
    size = policy.decoder.config.hidden_size
    heads: dict[str, Any] = new_heads(size, score=1, valid=1, target=1, reach=100, result=100)
    if start is None:
        values, build = with_features(deepen(policy.decoder, 6, seed))
    else:
        decoder, heads["score_weight"], heads["score_bias"] = read_reward(start, head=policy.decoder.head)
        values, build = with_features(decoder)
    values |= heads

    def batch_fn(_: int) -> dict[str, np.ndarray]:
        rows: list[tuple[Problem, list[Step]]] = []
        for i in range(batch_size):
            kind = i / batch_size
            if kind < 0.2:
                rows.append(countdown.draw_problem(rng, held_out=False))
            elif kind < 0.4:  # right steps towards another target of the same numbers
                rows.append(_astray(rng))
            elif kind < 0.7:
                rows.append(corrupted_trace(rng))
            else:
                rows.append(pool[rng.integers(len(pool))])
        tokens = [encode(countdown.prompt_text(p) + "".join(map(countdown.step_text, s))) for p, s in rows]
        labels = [label_trace(problem, steps) for problem, steps in rows]
        stacked = {name: np.stack([label[name] for label in labels]) for name in labels[0]}
        return stacked | {"tokens": np.asarray(tokens, np.int32)}

    def loss_fn(values: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
        decoder = build(values)
        x = hidden_states(decoder, batch["tokens"])[
            :, PROMPT_LENGTH - 1 :
        ]  # the prompt's end, then the trace
        assert decoder.head is not None
        predicted = cross_entropy(linear(x[:, :-1], decoder.head), batch["correct"], batch["correct_weight"])
        after, ends = x[:, 1:], x[:, 1:][:, np.asarray(NEWLINES)]
        result = cross_entropy(apply_head(values, "result", after), batch["result"], batch["result_weight"])
        valid = binary_cross_entropy(apply_head(values, "valid", after), batch["valid"]).mean()
        reach = binary_cross_entropy(apply_head(values, "reach", ends), batch["reach"]).sum(-1).mean(0) / 10
        target = binary_cross_entropy(apply_head(values, "target", ends), batch["target"]).mean(0)
        score = binary_cross_entropy(apply_head(values, "score", ends), batch["viable"]).mean(0)
        figures = {"lm": predicted, "result": result, "valid": valid}
        for name, losses in (("reach", reach), ("target", target), ("score", score)):
            figures |= {f"{name}{i + 1}": losses[i] for i in range(NUM_STEPS)}
        return predicted + 0.5 * result + valid + reach.mean() + 2 * target.mean() + 2 * score.mean(), figures

    def save(values: Any) -> None:
        weight, bias = np.asarray(values["score_weight"]), np.asarray(values["score_bias"])
        export_reward(out, build(values), weight, bias, PIECES, SPLIT)

    save(
        fit(values, loss_fn, batch_fn, num_steps=num_steps, learning_rate=1e-3, minutes=minutes, save_fn=save)
    )
    check_gates(policy, out, countdown)


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


def policy_traces(
    policy: DecoderLM, num_problems: int, num_samples: int, seed: int
) -> list[tuple[Problem, list[list[int]]]]:
    """Draw the policy's traces of training problems, as ids."""
    found = countdown.problems(seed, num_problems, held_out=False)
    prompts = np.asarray([encode(countdown.prompt_text(problem)) for problem in found])
    traces = sample_traces(policy, prompts, num_samples, TRACE_LENGTH, seed)
    return [(problem, rows.tolist()) for problem, rows in zip(found, traces, strict=True)]


def parse_trace(ids: Sequence[int]) -> list[Step] | None:
    """Return the steps of a trace, or None if it is not three lines of the usual lengths."""
    lines = "".join(PIECES[i] for i in ids).split("\n")
    steps = [countdown.parse_step(line) for line in lines[:-1]]
    widths = [1 + NUM_STEPS - 1 - i for i in range(NUM_STEPS)]
    found = [step for step in steps if step is not None]
    fits = len(steps) == len(found) == NUM_STEPS and not lines[-1]
    return found if fits and [len(step.written) for step in found] == widths else None


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


def _astray(rng: np.random.Generator) -> tuple[Problem, list[Step]]:
    """Draw a problem with a solution, and other right steps from the same numbers."""
    while True:
        problem, _ = countdown.draw_problem(rng, held_out=False)
        state, steps = problem.numbers, []
        while len(steps) < NUM_STEPS and (step := countdown.draw_step(rng, state)) is not None:
            steps.append(step)
            state = step.written
        if len(steps) == NUM_STEPS:
            return problem, steps


def main() -> None:
    """Train one model, write it, and print how good it is."""
    steps = {"policy": 800, "policy-five": 1600, "prm": 1000, "rollout-prm": 300}
    chosen = options("ponder.models.train_countdown", __doc__ or "", CHECKPOINTS / "countdown-tiny", steps)
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
