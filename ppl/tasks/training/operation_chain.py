"""Train the operation-chain reasoner and its reward model: `python -m ponder.tasks.training.operation_chain`.

    policy  teacher forcing on right traces, stopped while it still slips
    prm     exact labels: are all steps so far right

The prm is a language model that was taught the right step after whatever value was written before; a logistic
of the probabilities that it gives to a step judges it (`ponder.models.likelihood_reward`). A head that reads
off whether all is right, trained for as long, ordered traces worse.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from ponder.models.decoder import Decoder, linear
from ponder.models.language_model import DecoderLM
from ponder.models.loading.checkpoint_export import encoder, export_policy
from ponder.models.loading.loading import load
from ponder.models.loading.shipped import CHECKPOINTS
from ponder.tasks import operation_chain
from ponder.tasks.operation_chain import NUM_STEPS, OPERATIONS, PIECES, SPLIT, Problem, Step, apply_term
from ponder.tasks.training.fitting import deepen, hidden_states, options
from ponder.tasks.training.policy_traces import parse_trace, policy_traces
from ponder.tasks.training.reward_gates import check_gates
from ponder.tasks.training.run import TrainingRun, next_token_loss, train, train_policy, trainable

__all__ = ["main"]

MAX_LENGTH = 128
PROMPT_LENGTH = 3 + 2 * NUM_STEPS
STEP_LENGTH = 6
encode = encoder(PIECES, SPLIT)


def train_chain_policy(run: TrainingRun, batch_size: int = 96) -> None:
    """Train on right traces; few steps make it imperfect."""

    def draw_row(rng: np.random.Generator) -> list[int]:
        problem = operation_chain.draw_problem(rng, held_out=False)
        return [*_row(problem, operation_chain.solution(problem)), operation_chain.EOS_ID]

    train_policy(run, operation_chain, draw_row, max_length=MAX_LENGTH, batch_size=batch_size)


def train_reward(run: TrainingRun, policy: DecoderLM, batch_size: int = 96) -> None:
    """Train the policy with one more block to say what every step should be, most of them after mistakes."""
    rng = np.random.default_rng(run.seed)
    drawn = policy_traces(policy, operation_chain, 500, 8, run.seed)
    judged = [(problem, parse_trace(operation_chain, ids)) for problem, traces in drawn for ids in traces]
    pool = [(problem, steps) for problem, steps in judged if steps is not None]
    print(f"{len(pool)} traces of the policy", flush=True)
    decoder = deepen(policy.decoder, 5, run.seed) if run.start is None else load(run.start).decoder
    values, build = trainable(decoder)

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
        return next_token_loss(build(values), batch["tokens"], batch["correct"]), {}

    def save(values: Any) -> None:
        decoder = build(values)
        settings = {"layout": "likelihood", "coefficients": fit_coefficients(decoder, pool[:1000])}
        export_policy(run.out, decoder, PIECES, SPLIT, ponder_reward=settings)

    train(run, values, loss_fn, batch_fn, save, learning_rate=1e-3)
    check_gates(policy, run.out, operation_chain)


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
    run = TrainingRun.of(chosen)
    if chosen.model == "policy":
        train_chain_policy(run)
    else:
        train_reward(run, load(chosen.policy))


if __name__ == "__main__":
    main()
