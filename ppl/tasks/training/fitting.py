"""Train small decoders on one core: teacher forcing, a training loop, a sampler, and the gates of a verifier.

Trainable values are a plain dict of pytrees, with the decoder's parameters under "decoder"; a loss rebuilds
the decoder from it. Traces of one task have equal lengths or are padded, so that a batch is one array.

Axes: B problems or rows, C tokens of a row, M model, N samples of one problem, T new tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ponder.models.cache import without_cache
from ponder.models.config import DecoderConfig
from ponder.models.decoder import Decoder, rms_norm, rotation_at
from ponder.models.language_model import DecoderLM

__all__ = [
    "apply_head",
    "best_of_n",
    "binary_cross_entropy",
    "cross_entropy",
    "deepen",
    "fit",
    "hidden_states",
    "last_two_states",
    "new_heads",
    "options",
    "sample_traces",
    "small_config",
    "within_problem_auc",
]


def small_config(vocab_size: int, num_layers: int, max_length: int) -> DecoderConfig:
    """Return the shape that all shipped reasoners share: width 128, four heads, an untied head."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=max_length,
    )


def hidden_states(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    """Return normalised hidden states float32[B, C, M] of rows of tokens; what the head is applied to."""
    return last_two_states(decoder, tokens)[1]


def last_two_states(
    decoder: Decoder, tokens: jax.Array, branches: np.ndarray | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return normalised hidden states float32[B, C, M] before and after the last block.

    Args:
        decoder: of any family; its blocks run without a cache.
        tokens: int32[B, C].
        branches: int[C]; rows may hold several continuations of one beginning, side by side. -1 for the
            tokens of the beginning, which come first, and the number of its continuation for every other
            one. A token sees the beginning and its own continuation, and its position is counted in them.
    """
    config = decoder.config
    branches = np.full(tokens.shape[1], -1) if branches is None else branches
    seen = np.tri(len(branches), dtype=bool) & ((branches == -1) | (branches[:, None] == branches))  # [C, C]
    positions = seen.sum(1) - 1  # [C]
    if config.sliding_window is not None:
        seen &= positions[:, None] - positions < config.sliding_window
    rotation, attention = rotation_at(config, positions[None]), without_cache(seen)
    x = before = decoder.embed(tokens)
    for block in decoder.blocks:
        before, (x, _) = x, block(x, rotation, attention)
    unscaled = jnp.ones(x.shape[-1], jnp.float32)
    return rms_norm(before, unscaled, config.rms_norm_eps), rms_norm(
        x, decoder.norm[...], config.rms_norm_eps
    )


def cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the weighted mean of -log softmax(logits)[labels]; weights 0 leave a position out."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (losses * weights).sum() / jnp.maximum(weights.sum(), 1.0)


def new_heads(size: int, **rows: int) -> dict[str, jax.Array]:
    """Return trainable linear heads by name, all zero, with as many outputs as given for each."""
    values = {}
    for name, count in rows.items():
        values[f"{name}_weight"] = jnp.zeros((count, size), jnp.float32)
        values[f"{name}_bias"] = jnp.zeros(count, jnp.float32)
    return values


def apply_head(values: Mapping[str, Any], name: str, x: jax.Array) -> jax.Array:
    """Return the outputs [..., rows] of a head of `new_heads`; one output has no axis of its own."""
    out = x @ values[f"{name}_weight"].T + values[f"{name}_bias"]
    return out[..., 0] if out.shape[-1] == 1 else out


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the loss of each logit; labels may lie between 0 and 1."""
    return optax.sigmoid_binary_cross_entropy(logits, labels)


def fit(
    values: Any,
    loss_fn: Callable[[Any, Any], tuple[jax.Array, Mapping[str, jax.Array]]],
    batch_fn: Callable[[int], Any],
    *,
    num_steps: int,
    learning_rate: float = 1.5e-3,
    warmup: int = 100,
    minutes: float | None = None,
    log: Callable[[str], None] = print,
    save_fn: Callable[[Any], None] | None = None,
) -> Any:
    """Minimise a loss by AdamW with warm-up, a cosine to zero and clipped gradients.

    Args:
        values: pytree of float32 arrays to train.
        loss_fn: of the values and a batch; returns the loss and named figures for the log.
        batch_fn: of the step's number; returns a batch (any pytree of arrays of constant shapes).
        num_steps: steps of the schedule.
        learning_rate: the highest.
        warmup: steps of linear increase.
        minutes: shorten the schedule to what fits, judged by the first steps; the result then depends on
            the machine.
        log: called with a line now and then.
        save_fn: called with the values every five minutes or so.

    Returns:
        The trained values.
    """
    if minutes is not None:
        num_steps = min(num_steps, _steps_in(minutes, values, loss_fn, batch_fn))
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
    warmup = min(warmup, num_steps // 5)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, num_steps)
    optimizer = _optimizer(schedule)
    step = _step_fn(optimizer, loss_fn)
    values = jax.tree.map(jnp.copy, values)  # the buffers are given away with every step
    state = optimizer.init(values)
    begun = saved = time.monotonic()
    for i in range(num_steps):
        values, state, loss, figures = step(values, state, batch_fn(i))
        if i % 50 == 0 or i == num_steps - 1:
            named = " ".join(f"{name} {float(value):.3f}" for name, value in figures.items())
            log(f"step {i}/{num_steps} {time.monotonic() - begun:.0f} s loss {float(loss):.4f} {named}")
        if save_fn is not None and time.monotonic() - saved > 300:
            save_fn(values)
            saved = time.monotonic()
    return values


def _optimizer(schedule: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.01)
    )


def _step_fn(optimizer: optax.GradientTransformation, loss_fn: Any) -> Callable:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(values, state, batch):
        (loss, figures), grads = jax.value_and_grad(loss_fn, has_aux=True)(values, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
            updates, state = optimizer.update(grads, state, values)
        return optax.apply_updates(values, updates), state, loss, figures

    return step


def _steps_in(minutes: float, values: Any, loss_fn: Any, batch_fn: Any, num_timed: int = 8) -> int:
    """Count the steps that fit, from the time that some take on a copy."""
    optimizer = _optimizer(1e-3)
    step = _step_fn(optimizer, loss_fn)
    values = jax.tree.map(jnp.copy, values)
    state = optimizer.init(values)
    begun = 0.0
    for i in range(num_timed + 1):
        values, state, loss, _ = step(values, state, batch_fn(i))
        loss.block_until_ready()
        if i == 0:  # compiled
            begun = time.monotonic()
    return max(1, int(minutes * 60 * num_timed / (time.monotonic() - begun)))


def deepen(decoder: Decoder, num_layers: int, seed: int) -> Decoder:
    """Return a copy with more blocks on top, which begin as the identity."""
    config = dataclasses.replace(decoder.config, num_hidden_layers=num_layers)
    deeper = Decoder(config, rngs=nnx.Rngs(seed))
    copied = nnx.clone(decoder)
    deeper.embedding, deeper.norm, deeper.head = copied.embedding, copied.norm, copied.head
    for i, block in enumerate(deeper.blocks):
        if i < len(copied.blocks):
            deeper.blocks[i] = copied.blocks[i]
        else:
            block.o.set_value(jnp.zeros_like(block.o[...]))
            block.down.set_value(jnp.zeros_like(block.down[...]))
    return deeper


def sample_traces(
    lm: DecoderLM, prompts: np.ndarray, num_samples: int, max_new_tokens: int, seed: int, *, rows: int = 1024
) -> np.ndarray:
    """Draw traces of prompts of one length at temperature 1.

    Args:
        lm: the policy; after its first EOS a trace repeats EOS.
        prompts: int[B, P].
        num_samples: draws for each prompt; 0 means one greedy trace.
        max_new_tokens: T.
        seed: of the random numbers.
        rows: traces that are drawn at once, at most.

    Returns:
        int32[B, N, T].
    """
    draws = max(1, num_samples)
    at_once = max(1, min(rows // draws, len(prompts)))
    out = []
    for i in range(0, len(prompts), at_once):
        block = prompts[i : i + at_once]
        padded = np.concatenate([block, np.repeat(block[:1], at_once - len(block), axis=0)])
        key = jax.random.fold_in(jax.random.key(seed), i)
        traces = _sample(lm, jnp.asarray(padded, jnp.int32), key, draws, max_new_tokens, num_samples == 0)
        out.append(np.asarray(traces).reshape(at_once, draws, -1)[: len(block)])
    return np.concatenate(out)


@functools.partial(jax.jit, static_argnames=("draws", "max_new_tokens", "greedy"))
def _sample(
    lm: DecoderLM, prompts: jax.Array, key: jax.Array, draws: int, max_new_tokens: int, greedy: bool
) -> jax.Array:
    eos = lm.eos_token_ids[0]
    lengths = jnp.full(prompts.shape[0], prompts.shape[1], jnp.int32)
    cache, logits = lm.prefill_many(prompts, lengths, draws, max_new_tokens)

    def body(carry, key):
        cache, logits, done = carry
        tokens = logits.argmax(-1) if greedy else jax.random.categorical(key, logits)
        tokens = jnp.where(done, eos, tokens).astype(jnp.int32)
        cache, logits = lm.extend(cache, tokens)
        return (cache, logits, done | (tokens == eos)), tokens

    start = (cache, logits, jnp.zeros(logits.shape[0], bool))
    _, tokens = jax.lax.scan(body, start, jax.random.split(key, max_new_tokens))
    return tokens.T


def within_problem_auc(scores: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
    """Return how often a good trace outscores a bad one *of the same problem*, and over how many problems.

    An area under the curve over all problems together rewards knowing which problems are easy; only the
    order within a problem helps a search. Ties count half; each problem with both kinds counts once.

    Args:
        scores: float[B, N].
        labels: bool[B, N]; NaN scores are left out.
    """
    areas = []
    for row, label in zip(scores, np.asarray(labels, bool), strict=True):
        kept = ~np.isnan(row)
        good, bad = row[kept & label], row[kept & ~label]
        if len(good) and len(bad):
            difference = good[:, None] - bad[None, :]
            areas.append(np.mean((difference > 0) + 0.5 * (difference == 0)))
    return (float(np.mean(areas)) if areas else float("nan")), len(areas)


def best_of_n(scores: np.ndarray, correct: np.ndarray, counts: Sequence[int]) -> list[float]:
    """Return the accuracy of the best-scored of n traces, averaged over all subsets of the N drawn.

    Args:
        scores: float[B, N].
        correct: bool[B, N].
        counts: values of n, at most N.
    """
    total = scores.shape[1]
    if max(counts) > total:
        raise ValueError(f"counts: expected at most {total} (the traces of a problem), got {max(counts)}.")
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(correct, order, axis=1).mean(axis=0)
    accuracies = []
    for n in counts:
        # The i-th best is the best of a subset if the n - 1 others come from the total - 1 - i below it.
        chance = np.zeros(total)
        chance[0] = n / total
        for i in range(1, total - n + 1):
            chance[i] = chance[i - 1] * (total - n - i + 1) / (total - i)
        accuracies.append(float(chance @ ranked))
    return accuracies


def options(module: str, about: str, policy: Path, steps: Mapping[str, int]) -> argparse.Namespace:
    """Read the command line of a training script.

    Args:
        module: name of the script.
        about: what it does.
        policy: the policy that a reward model judges, unless another is given.
        steps: of training, by the name of each model that the script can train.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=tuple(steps))
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--start", type=Path, help="a model to train further, in place of a new one")
    parser.add_argument("--policy", default=policy, help="whose traces a reward model judges")
    parser.add_argument(
        "--steps", type=int, help="of training; the card says how many made the shipped model"
    )
    parser.add_argument("--minutes", type=float, help="shorten the training to this")
    parser.add_argument("--seed", type=int, default=0)
    found = parser.parse_args()
    if found.steps is None:
        found.steps = steps[found.model]
    if found.start is not None and found.model.startswith("rollout"):
        parser.error("--start: a rollout model begins as the policy")
    return found
