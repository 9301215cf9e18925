"""One training run of a small decoder: what every script is told, how it begins, and how it saves.

Axes: B rows, C tokens of a row, T tokens after the prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ponder.models.decoder import Decoder, linear
from ponder.models.loading.checkpoint_export import export_policy
from ponder.models.loading.loading import load
from ponder.tasks.training.fitting import cross_entropy, fit, hidden_states, small_config
from ponder.tasks.training.reward_gates import policy_accuracy

__all__ = ["Trainable", "TrainingRun", "next_token_loss", "train", "train_policy", "trainable"]

Trainable = tuple[Any, Callable[[Any], Decoder]]
"""Values to train, and a function that builds the decoder from them."""


class TrainingRun(NamedTuple):
    """Where to, how long, and from where.

    Attributes:
        out: directory to write.
        num_steps: of training.
        minutes: shorten the training to this, or None.
        seed: of weights and data.
        start: a model to train further, or None for a new one.
    """

    out: Path
    num_steps: int
    minutes: float | None = None
    seed: int = 0
    start: Path | None = None

    @classmethod
    def of(cls, chosen: argparse.Namespace) -> TrainingRun:
        """Take what the command line of a script says: see `fitting.options`."""
        return cls(chosen.out, chosen.steps, chosen.minutes, chosen.seed, chosen.start)


def trainable(decoder: Decoder) -> Trainable:
    """Return the decoder's own parameters as the values to train."""
    graph, parameters = nnx.split(decoder)
    return {"decoder": parameters}, lambda values: nnx.merge(graph, values["decoder"])


def next_token_loss(decoder: Decoder, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean of -log p(label) over the last T places of rows.

    Args:
        decoder: with a head of its own.
        tokens: int32[B, C]; prompts and traces, read by teacher forcing.
        labels: int32[B, T]; what should stand in the last T places, which need not be what does.
    """
    x = hidden_states(decoder, tokens[:, :-1])[:, -labels.shape[1] :]
    assert decoder.head is not None
    return cross_entropy(linear(x, decoder.head), labels, jnp.ones(labels.shape, jnp.float32))


def train(
    run: TrainingRun,
    values: Any,
    loss_fn: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]],
    batch_fn: Callable[[int], Any],
    save: Callable[[Any], None],
    **settings: Any,
) -> None:
    """Fit and write the model, also now and then on the way; see `fitting.fit` for the settings."""
    save(
        fit(
            values,
            loss_fn,
            batch_fn,
            num_steps=run.num_steps,
            minutes=run.minutes,
            save_fn=save,
            **settings,
        )
    )


def train_policy(
    run: TrainingRun,
    task: Any,
    draw_row: Callable[[np.random.Generator], list[int]],
    *,
    max_length: int,
    batch_size: int,
    trainable: Callable[[Decoder], Trainable] = trainable,
) -> None:
    """Train on traces by teacher forcing, write the model, and print its accuracy.

    Args:
        run: see there.
        task: the module of the task.
        draw_row: draws the tokens of a prompt, a trace and EOS; always as many.
        max_length: longest row that a new model can read.
        batch_size: rows in a step.
        trainable: takes the decoder apart.
    """
    if run.start is None:
        decoder = Decoder(small_config(len(task.PIECES), 4, max_length), rngs=nnx.Rngs(run.seed))
    else:
        decoder = load(run.start).decoder
    values, build = trainable(decoder)
    rng = np.random.default_rng(run.seed)

    def batch_fn(_: int) -> np.ndarray:
        return np.asarray([draw_row(rng) for _ in range(batch_size)], np.int32)

    def loss_fn(values: Any, tokens: jax.Array) -> tuple[jax.Array, dict]:
        return next_token_loss(build(values), tokens, tokens[:, -task.MAX_NEW_TOKENS :]), {}

    def save(values: Any) -> None:
        export_policy(run.out, build(values), task.PIECES, task.SPLIT)

    train(run, values, loss_fn, batch_fn, save)
    print(policy_accuracy(load(run.out), task))
