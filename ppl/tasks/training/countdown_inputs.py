"""What models of countdown read: tokens of prompts and traces, and features of numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ponder.models.decoder import Decoder
from ponder.models.loading.checkpoint_export import encoder
from ponder.tasks import countdown
from ponder.tasks.countdown import NUM_STEPS, PIECES, SPLIT, Problem, Step
from ponder.tasks.training.policy_traces import parse_trace

__all__ = [
    "MAX_LENGTH",
    "PROMPT_LENGTH",
    "encode",
    "encode_trace",
    "parse_steps",
    "with_features",
]

MAX_LENGTH = 64
PROMPT_LENGTH = 10
"""Tokens of a prompt of four numbers."""

encode = encoder(PIECES, SPLIT)


def encode_trace(problem: Problem, steps: Sequence[Step]) -> list[int]:
    """Return the tokens of a prompt and the steps after it, without EOS."""
    return encode(countdown.prompt_text(problem) + "".join(map(countdown.step_text, steps)))


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
    empty = jnp.zeros((features.shape[1], decoder.config.hidden_size), jnp.float32)
    values = {"decoder": parameters, "features": empty, "head_features": empty}

    def build(values: Any) -> Decoder:
        decoder = nnx.merge(graph, values["decoder"])
        decoder.embedding.set_value(decoder.embedding[...] + features @ values["features"])
        assert decoder.head is not None
        decoder.head.set_value(decoder.head[...] + features @ values["head_features"])
        return decoder

    return values, build


def parse_steps(ids: Sequence[int]) -> list[Step] | None:
    """Return the steps of a trace, or None if it is not three lines of the usual lengths."""
    steps = parse_trace(countdown, ids)
    usual = list(range(NUM_STEPS, 0, -1))  # numbers that a step writes
    return steps if steps is not None and [len(step.written) for step in steps] == usual else None
