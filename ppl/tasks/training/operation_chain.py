"""Train the operation-chain reasoner and its reward model: `python -m ponder.tasks.training.operation_chain`.

    policy  teacher forcing on right traces, stopped while it still slips
    prm     exact labels: are all steps so far right

The prm is a language model that was taught the right step after whatever value was written before; a logistic
of the probabilities that it gives to a step judges it (`ponder.models.likelihood_reward`). A head that reads
off whether all is right, trained for as long, ordered traces worse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.optimize import minimize

from ponder.models.decoder import Decoder, linear
from ponder.models.language_model import DecoderLM
from ponder.models.loading.checkpoint_export import encoder, export_policy
from ponder.models.loading.loading import load
from ponder.models.loading.shipped import CHECKPOINTS
from ponder.tasks import operation_chain
from ponder.tasks.operation_chain import NUM_STEPS, OPERATIONS, PIECES, SPLIT, Problem, Step, apply_term
from ponder.tasks.training.fitting import (
    cross_entropy,
    deepen,
    fit,
    hidden_states,
    options,
    sample_traces,
    small_config,
)
from ponder.tasks.training.reward_gates import check_gates, policy_accuracy

__all__ = ["main"]

MAX_LENGTH = 128
PROMPT_LENGTH = 3 + 2 * NUM_STEPS
STEP_LENGTH = 6
encode = encoder(PIECES, SPLIT)


def train_policy(
    out: Path,
    num_steps: int,
    minutes: float | None,
    seed: int,
    *,
    start: Path | None = None,
    batch_size: int = 96,
) -> None:
    """Train on right traces; few steps make it imperfect."""
    if start is None:
        decoder = Decoder(small_config(len(PIECES), 4, MAX_LENGTH), rngs=nnx.Rngs(seed))
    else:
        decoder = load(start).decoder
    graph, parameters = nnx.split(decoder)
    rng = np.random.default_rng(seed)

    def batch_fn(_: int) -> np.ndarray:
        rows = []
        for _ in range(batch_size):
            problem = operation_chain.draw_problem(rng, held_out=False)
            rows.append([*_row(problem, operation_chain.solution(problem)), operation_chain.EOS_ID])
        return np.asarray(rows, np.int32)

    def loss_fn(values: Any, tokens: jax.Array) -> tuple[jax.Array, dict]:
        decoder = nnx.merge(graph, values["decoder"])
        x = hidden_states(decoder, tokens[:, :-1])[:, PROMPT_LENGTH - 1 :]
        labels = tokens[:, PROMPT_LENGTH:]
        assert decoder.head is not None
        return cross_entropy(linear(x, decoder.head), labels, jnp.ones(labels.shape)), {}

    def save(values: Any) -> None:
        export_policy(out, nnx.merge(graph, values["decoder"]), PIECES, SPLIT)

    values = {"decoder": parameters}
    save(fit(values, loss_fn, batch_fn, num_steps=num_steps, minutes=minutes, save_fn=save))
    print(policy_accuracy(load(out), operation_chain))


def train_reward(
    out: Path,
    policy: DecoderLM,
    num_steps: int,
    minutes: float | None,
    seed: int,
    *,
    start: Path | None = None,
    batch_size: int = 96,
) -> None:
    """Train the policy with one more block to say what every step should be, most of them after mistakes."""
    rng = np.random.default_rng(seed)
    pool = policy_traces(policy, num_problems=500, num_samples=8, seed=seed)
    print(f"{len(pool)} traces of the policy", flush=True)
    if start is None:
        decoder = deepen(policy.decoder, 5, seed)
    else:
        decoder = load(start).decoder
    graph, parameters = nnx.split(decoder)

    def batch_fn(_: int) -> dict[str, np.ndarray]:
        rows = []
        for i in range(batch_size):
            kind = i / batch_size
            if kind < 0.3:
                problem = operation_chain.draw_problem(rng, held_out=False)
                rows.append((problem, operation_chain.solution(problem)))
            elif kind < 0.75:
                rows.append(corrupted_trace(rng))
            else:
                rows.append(pool[rng.integers(len(pool))])
        return {
            "correct": np.stack([right_tokens(problem, steps) for problem, steps in rows]),
            "tokens": np.asarray([_row(*row) for row in rows], np.int32),
        }

    def loss_fn(values: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
        decoder = nnx.merge(graph, values["decoder"])
        x = hidden_states(decoder, batch["tokens"][:, :-1])[:, PROMPT_LENGTH - 1 :]
        assert decoder.head is not None
        logits = linear(x, decoder.head)
        return cross_entropy(logits, batch["correct"], jnp.ones(batch["correct"].shape)), {}

    def save(values: Any) -> None:
        decoder = nnx.merge(graph, values["decoder"])
        settings = {"layout": "likelihood", "coefficients": fit_coefficients(decoder, pool[:1000])}
        export_policy(out, decoder, PIECES, SPLIT, ponder_reward=settings)

    values = {"decoder": parameters}
    save(
        fit(values, loss_fn, batch_fn, num_steps=num_steps, learning_rate=1e-3, minutes=minutes, save_fn=save)
    )
    check_gates(policy, out, operation_chain)


def fit_coefficients(decoder: Decoder, judged: list[tuple[Problem, list[Step]]]) -> list[float]:
    """Fit the logistic of `ponder.models.likelihood_reward` on single steps of the policy.

    Returns:
        b, c_sum, c_min: of whether a step is right after what was written before it. A little shrinkage keeps
        them finite where the model tells every step.
    """

    @jax.jit
    def spoken(tokens: jax.Array) -> jax.Array:
        x = hidden_states(decoder, tokens[:, :-1])[:, PROMPT_LENGTH - 1 :]
        assert decoder.head is not None
        log_p = jax.nn.log_softmax(linear(x, decoder.head))
        return jnp.take_along_axis(log_p, tokens[:, PROMPT_LENGTH:, None], axis=2)[:, :, 0]

    rows = np.asarray([_row(*row) for row in judged], np.int32)
    log_p = np.concatenate([np.asarray(spoken(jnp.asarray(part))) for part in np.array_split(rows, 10)])
    log_p = log_p.reshape(-1, STEP_LENGTH)
    right = np.asarray([right_tokens(problem, steps) for problem, steps in judged]).reshape(-1, STEP_LENGTH)
    written = rows[:, PROMPT_LENGTH:].reshape(-1, STEP_LENGTH)
    labels = (right == written).all(axis=1)
    features = np.stack([np.ones(len(log_p)), log_p.sum(1), log_p.min(1)], axis=1)

    def loss(coefficients: np.ndarray) -> float:
        signed = np.where(labels, 1.0, -1.0) * (features @ coefficients)
        return np.logaddexp(0, -signed).mean() + 1e-4 * (coefficients**2).sum()

    bounds = [(None, None), (0, None), (0, None)]  # more probable is never worse
    return [round(float(c), 4) for c in minimize(loss, np.array([2.0, 0.5, 0.5]), bounds=bounds).x]


def policy_traces(
    policy: DecoderLM, num_problems: int, num_samples: int, seed: int
) -> list[tuple[Problem, list[Step]]]:
    """Draw the policy's traces of training problems; what is not eight steps is left out."""
    found = operation_chain.problems(seed, num_problems, held_out=False)
    prompts = np.asarray([encode(operation_chain.prompt_text(problem)) for problem in found])
    traces = sample_traces(policy, prompts, num_samples, STEP_LENGTH * NUM_STEPS, seed)
    pool = []
    for problem, rows in zip(found, traces, strict=True):
        for row in rows:
            lines = "".join(PIECES[i] for i in row).split("\n")
            steps = [operation_chain.parse_step(line) for line in lines[:-1]]
            kept = [step for step in steps if step is not None]
            if len(kept) == len(steps) == NUM_STEPS and not lines[-1]:
                pool.append((problem, kept))
    return pool


def corrupted_trace(rng: np.random.Generator) -> tuple[Problem, list[Step]]:
    """Draw a trace with one wrong value, or rarely a wrong term, whose error is carried on."""
    problem = operation_chain.draw_problem(rng, held_out=False)
    value, steps = problem.start, []
    wrong = int(rng.integers(NUM_STEPS))
    for i, (operation, digit) in enumerate(problem.terms):
        before, value = value, apply_term(value, operation, digit)
        if i == wrong:
            kind = rng.random()
            if kind < 0.1:
                digit = int(rng.integers(2, 10))
                operation = OPERATIONS[rng.integers(3)] if kind < 0.05 else operation
                value = apply_term(before, operation, digit)
            elif kind < 0.5:  # one digit is wrong
                place = 10 if rng.random() < 0.6 else 1
                value = value - value // place % 10 * place + int(rng.integers(10)) * place
            elif kind < 0.8:  # off by a little, or by a carry
                value = (value + int(rng.choice([-20, -10, -2, -1, 1, 2, 10, 20]))) % 100
            else:
                value = int(rng.integers(100))
        steps.append(Step(operation, digit, value))
    return problem, steps


def right_tokens(problem: Problem, steps: list[Step]) -> np.ndarray:
    """Return what should stand in each place, given what was written before, int32[48].

    A wrong value is taken as written in the next step. Within a step the value is that of the problem's term,
    and where its first digit is wrong the second is still the right one.
    """
    found, before = [], problem.start
    for term, step in zip(problem.terms, steps, strict=True):
        value = apply_term(before, step.operation, step.digit)
        found += encode(operation_chain.step_text(Step(*term, value)))
        before = step.value
    return np.asarray(found, np.int32)


def _row(problem: Problem, steps: list[Step]) -> list[int]:
    text = operation_chain.prompt_text(problem) + "".join(map(operation_chain.step_text, steps))
    return encode(text)


def main() -> None:
    """Train one model, write it, and print how good it is."""
    steps = {"policy": 400, "prm": 468}
    chosen = options(
        "ponder.tasks.training.operation_chain", __doc__ or "", CHECKPOINTS / "chain-tiny", steps
    )
    rest = (chosen.steps, chosen.minutes, chosen.seed)
    if chosen.model == "policy":
        train_policy(chosen.out, *rest, start=chosen.start)
    else:
        train_reward(chosen.out, load(chosen.policy), *rest, start=chosen.start)


if __name__ == "__main__":
    main()
