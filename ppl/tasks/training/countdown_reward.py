"""Train the countdown PRM on exact labels; `python -m ponder.tasks.training.countdown prm` runs this.

A plain head for right or wrong does not learn arithmetic, and then prefers whatever looks likely. So this
model is made to *predict* the right result at the equals sign and the numbers that remain, to say at every
token whether all is right so far, and to know which targets the written numbers reach; the block below the
last has to know it, so that the last one can look the target up. These heads are dropped at export.

What is hard is the first step: which of three numbers reach a target. So each batch has, besides whole
traces, many first steps of one problem side by side, which share the prompt and do not see each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ponder.models.decoder import Decoder, linear
from ponder.models.language_model import DecoderLM
from ponder.models.loading.checkpoint_export import export_reward, read_reward
from ponder.tasks import countdown
from ponder.tasks.countdown import NUM_STEPS, PIECES, SPLIT, Problem, Step
from ponder.tasks.training.countdown_inputs import PROMPT_LENGTH, encode_trace, parse_steps, with_features
from ponder.tasks.training.countdown_labels import LENGTHS, NEWLINES, corrupt, corrupted_trace, label_trace
from ponder.tasks.training.fitting import (
    apply_head,
    binary_cross_entropy,
    cross_entropy,
    deepen,
    last_two_states,
    new_heads,
)
from ponder.tasks.training.policy_traces import policy_traces
from ponder.tasks.training.reward_gates import check_gates
from ponder.tasks.training.run import TrainingRun, train

__all__ = ["save_reward", "train_reward"]

NUM_TRACES = 64
NUM_PROBLEMS = 48
NUM_BRANCHES = 8
"""First steps of each problem."""

BRANCHES = np.repeat(np.arange(-1, NUM_BRANCHES), [PROMPT_LENGTH, *[LENGTHS[0]] * NUM_BRANCHES])

Batch = dict[str, np.ndarray]


def train_reward(run: TrainingRun, policy: DecoderLM) -> None:
    """Train the policy with two more blocks on exact labels, most of them of traces that go wrong.

    Args:
        run: see there.
        policy: whose traces it will judge; a new model begins as this one.

    Raises:
        ValueError: the finished model, which is written by then, does not pass the gates.
    """
    rng = np.random.default_rng(run.seed)
    traces: list[tuple[Problem, list[Step]]] = []
    first_steps: list[tuple[Problem, list[Step]]] = []
    for problem, rows in policy_traces(policy, countdown, 2000, 24, run.seed):
        found = [steps for steps in map(parse_steps, rows) if steps is not None]
        traces += [(problem, steps) for steps in found]
        first_steps.append((problem, list(dict.fromkeys(steps[0] for steps in found))))
    print(f"{len(traces)} traces of the policy", flush=True)
    size = policy.decoder.config.hidden_size
    heads: dict[str, Any] = new_heads(size, score=1, valid=1, target=1, reach=100, result=100)
    if run.start is None:
        values, build = with_features(deepen(policy.decoder, 6, run.seed))
    else:
        decoder, heads["score_weight"], heads["score_bias"] = read_reward(run.start, head=policy.decoder.head)
        values, build = with_features(decoder)
    values |= heads

    def loss_fn(values: Any, batch: dict[str, dict[str, jax.Array]]) -> tuple[jax.Array, dict]:
        decoder = build(values)
        whole = _losses(values, decoder, batch["traces"], None)
        first = _losses(values, decoder, batch["first_steps"], BRANCHES)
        loss = whole["target"].mean() + 2 * whole["score"][..., 1:].mean()
        loss += 2 * first["target"].mean() + 2 * first["score"].mean()
        for part in (whole, first):
            loss += part["lm"] + 0.5 * part["result"] + part["valid"] + part["reach"].mean()
        figures = {name: first[name].mean() for name in ("lm", "valid", "reach", "target", "score")}
        return loss, figures | {f"score{i + 1}": whole["score"][:, i].mean() for i in range(NUM_STEPS)}

    def batch_fn(_: int) -> dict[str, Batch]:
        return {"traces": _trace_batch(rng, traces), "first_steps": _first_step_batch(rng, first_steps)}

    train(run, values, loss_fn, batch_fn, functools.partial(save_reward, run.out, build))
    check_gates(policy, run.out, countdown)


def save_reward(out: Path, build: Callable[[Any], Decoder], values: Any) -> None:
    """Write a reward model of countdown: the decoder and its head "score"."""
    weight, bias = np.asarray(values["score_weight"]), np.asarray(values["score_bias"])
    export_reward(out, build(values), weight, bias, PIECES, SPLIT)


def _losses(
    values: Any, decoder: Decoder, batch: dict[str, jax.Array], branches: np.ndarray | None
) -> dict[str, jax.Array]:
    """Return losses: means, but of "reach", "target" and "score" one for each end of a step."""
    middle, last = last_two_states(decoder, batch["tokens"], branches)
    lead = batch["valid"].shape  # [B, C], or with branches [B, K, C]
    after, known = (x[:, PROMPT_LENGTH:].reshape(*lead, -1) for x in (last, middle))
    prompt = last[:, PROMPT_LENGTH - 1].reshape(-1, *[1] * (len(lead) - 1), last.shape[-1])
    before = jnp.concatenate([jnp.broadcast_to(prompt, after[..., :1, :].shape), after[..., :-1, :]], axis=-2)
    ends = np.asarray(NEWLINES[: batch["target"].shape[-1]])
    assert decoder.head is not None

    def judge(name: str, states: jax.Array, labels: str) -> jax.Array:
        return binary_cross_entropy(apply_head(values, name, states), batch[labels])

    result = apply_head(values, "result", known)
    return {
        "lm": cross_entropy(linear(before, decoder.head), batch["correct"], batch["correct_weight"]),
        "result": cross_entropy(result, batch["result"], batch["result_weight"]),
        "valid": judge("valid", known, "valid").mean(),
        "reach": judge("reach", known[..., ends, :], "reach").sum(-1) / 10,
        "target": judge("target", after[..., ends, :], "target"),
        "score": judge("score", after[..., ends, :], "viable"),
    }


def _trace_batch(rng: np.random.Generator, traces: list[tuple[Problem, list[Step]]]) -> Batch:
    """Draw whole traces: right ones, ones towards another target, corrupted ones, and the policy's."""
    rows: list[tuple[Problem, list[Step]]] = []
    for i in range(NUM_TRACES):
        kind = i / NUM_TRACES
        if kind < 0.15:
            rows.append(countdown.draw_problem(rng, held_out=False))
        elif kind < 0.3:
            rows.append(_astray(rng))
        elif kind < 0.6:
            rows.append(corrupted_trace(rng))
        else:
            rows.append(traces[rng.integers(len(traces))])
    tokens = [encode_trace(problem, steps) for problem, steps in rows]
    labels = [label_trace(problem, steps) for problem, steps in rows]
    return _stacked(labels) | {"tokens": np.asarray(tokens, np.int32)}


def _first_step_batch(rng: np.random.Generator, first_steps: list[tuple[Problem, list[Step]]]) -> Batch:
    """Draw problems with several first steps each: of the policy and right ones, a few of them corrupted."""
    rows, labels = [], []
    for i in range(NUM_PROBLEMS):
        if i < NUM_PROBLEMS // 2:
            problem, found = first_steps[rng.integers(len(first_steps))]
            steps = [found[j] for j in rng.permutation(len(found))[: NUM_BRANCHES - 2]]
        else:
            problem, _ = countdown.draw_problem(rng, held_out=False)
            steps = []
        while len(steps) < NUM_BRANCHES:
            step = countdown.draw_step(rng, problem.numbers)
            assert step is not None  # the sum of two numbers, if nothing else
            steps.append(corrupt(rng, step, problem.numbers) if rng.random() < 0.12 else step)
        rows.append(encode_trace(problem, steps))
        labels.append(_stacked([label_trace(problem, [step]) for step in steps]))
    return _stacked(labels) | {"tokens": np.asarray(rows, np.int32)}


def _stacked(labels: list[Batch]) -> Batch:
    return {name: np.stack([label[name] for label in labels]) for name in labels[0]}


def _astray(rng: np.random.Generator) -> tuple[Problem, list[Step]]:
    """Draw a problem with a solution, and other right steps from the same numbers."""
    while True:
        problem, _ = countdown.draw_problem(rng, held_out=False)
        steps = countdown.draw_steps(rng, problem.numbers)
        if steps is not None:
            return problem, steps
