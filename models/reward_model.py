"""A decoder with a scoring head as a `RewardModel`: prompt read once, steps appended and judged.

A process reward model (PRM) reads a trace like a language model; at the end of a step of reasoning, or at a
separator after it, a small head turns the hidden state into the probability that the trace so far is right.

Axes: B prompts, N particles, C tokens of a block, S tokens of the separator, M model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import register_dataclass

from ponder.models.cache import LayerCache, ParticleCache, fork, poison, truncate
from ponder.models.decoder import Decoder, linear, rms_norm
from ponder.models.protocols import Tokenizer
from ponder.models.step_form import StepForm

__all__ = ["RewardDecoder", "RewardHead"]

CHUNK = 16
"""Tokens of a step that `extend_block` reads at once; a step costs its length rounded up to chunks."""

SMALLEST_SCORE = float(np.finfo(np.float32).tiny)
LARGEST_SCORE = float(np.nextafter(np.float32(1), np.float32(0)))
"""Scores are clipped to these, so that log r and log(1 - r) are finite."""


class RewardHead(nnx.Module):
    """Dense layers with ReLU between them, from a hidden state to one logit or two.

    One logit z gives the score sigmoid(z); two give softmax(z)[positive].

    Args:
        weights: `[out, in]` of each layer.
        biases: `[out]` of each, or None.
        positive: the class of two that means right.
    """

    def __init__(self, weights: Sequence[jax.Array], biases: Sequence[jax.Array | None], positive: int = 1):
        outputs = weights[-1].shape[0]
        if outputs not in (1, 2):
            raise ValueError(f"weights: expected a last layer with 1 or 2 outputs, got {outputs}")
        if positive not in (0, 1):
            raise ValueError(f"positive: expected 0 or 1, got {positive!r}")
        self.weights = nnx.List([nnx.Param(weight) for weight in weights])
        self.biases = nnx.List([None if bias is None else nnx.Param(bias) for bias in biases])
        self.positive = positive

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return scores float32[...] in (0, 1) of normalised hidden states float32[..., M]."""
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = linear(x if index == 0 else jax.nn.relu(x), weight, bias)
        logit = x[..., 0] if x.shape[-1] == 1 else x[..., self.positive] - x[..., 1 - self.positive]
        # A certain head rounds to 0 or 1, where a likelihood is zero or its odds infinite. NaN stays NaN.
        return jnp.clip(jax.nn.sigmoid(logit), SMALLEST_SCORE, LARGEST_SCORE)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RewardDecoder:
    """A `RewardModel` over a `Decoder`; a pytree whose leaves are the weights.

    Every score is read after the separator, where there is one. `extend_block` leaves it in the cache, as
    after every step in training; `prefill` and `extend` judge the trace as if a step ended there, and leave
    no separator behind. Scores lie strictly in (0, 1), clipped to `SMALLEST_SCORE ... LARGEST_SCORE`, and are
    NaN in rows that outgrew their cache.

    Attributes:
        decoder: the trunk; its own head is not used.
        head: hidden state to score.
        separator: token ids after each step; may be empty.
        tokenizer: text to ids and back, or None.
        layout: the kind of checkpoint, for messages.
        name: where it was loaded from, for messages.
        form: how steps were written in training, without the separator; None: as the trace has them.
    """

    decoder: Decoder
    head: RewardHead
    separator: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    tokenizer: Tokenizer | None = dataclasses.field(default=None, metadata={"static": True})
    layout: str = dataclasses.field(default="classification", metadata={"static": True})
    name: str = dataclasses.field(default="reward", metadata={"static": True})
    form: StepForm | None = dataclasses.field(default=None, metadata={"static": True})

    def __repr__(self) -> str:
        config = self.decoder.config
        count = sum(x.size for x in jax.tree.leaves((self.decoder, self.head)))
        return (
            f"RewardDecoder({self.name!r}, {self.layout}, {count / 1e6:.1f}M parameters, "
            f"{config.num_hidden_layers} layers, vocabulary {config.vocab_size}, separator {self.separator})"
        )

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; ids that the tokenizer leaves unused are included."""
        return self.decoder.config.vocab_size

    @property
    def max_length(self) -> int:
        """Context: prompt, steps and separators together may not exceed it."""
        return self.decoder.config.max_position_embeddings

    def prefill(
        self, tokens: jax.Array, num_particles: int, max_new_tokens: int, length: jax.Array | None = None
    ) -> tuple[ParticleCache, jax.Array]:
        """Read the prompt `int32[P]` once; return the cache and scores float32[N].

        `length` is the number of real tokens where the prompt is padded on the right. `max_new_tokens` counts
        the separators of all steps too.
        """
        lengths = jnp.reshape(tokens.shape[0] if length is None else length, (1,))
        return self.prefill_many(tokens[None], lengths, num_particles, max_new_tokens)

    def prefill_many(
        self, tokens: jax.Array, lengths: jax.Array, num_particles: int, max_new_tokens: int
    ) -> tuple[ParticleCache, jax.Array]:
        """Read B prompts `int32[B, P]`, padded on the right to `lengths[B]`; see `prefill`."""
        prompts, lengths = tokens.shape[0], lengths.astype(jnp.int32)
        x, read = self.decoder.read(tokens)
        x = x[jnp.arange(prompts, dtype=jnp.int32), lengths - 1]
        if self.separator:
            # On rows of its own, one a prompt, which are then forgotten.
            rows = self.decoder.empty_layers(prompts, len(self.separator), read)
            after, _ = self.decoder(self._separators(prompts), rows, lengths, jnp.int32(0))
            x = after[:, -1]
        # `extend` needs room for a separator that it does not keep.
        room = max_new_tokens + len(self.separator)
        layers = self.decoder.empty_layers(prompts * num_particles, room, read)
        cache = ParticleCache(layers, lengths, jnp.int32(0))
        return cache, jnp.repeat(self._score(x), num_particles, axis=0)

    def extend(self, cache: ParticleCache, tokens: jax.Array) -> tuple[ParticleCache, jax.Array]:
        """Append one token `int32[N]` a particle; return the cache and scores float32[N].

        The separator is read along, in slots that the next token overwrites.
        """
        block = jnp.concatenate(
            [tokens[:, None].astype(jnp.int32), self._separators(tokens.shape[0])], axis=1
        )
        x, layers = self.decoder(block, cache.layers, cache.prefix_length, cache.length)
        overflow = cache.length + block.shape[1] > cache.capacity
        scores = poison(self._score(x[:, -1]), overflow)
        return cache._replace(layers=layers, length=cache.length + 1), scores

    def extend_block(
        self, cache: ParticleCache, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[ParticleCache, jax.Array]:
        """Append a step: the first `lengths[n]` of `tokens int32[N, C]` and the separator; judge it.

        Returns the cache and scores float32[N], read at the last token of the separator, or without one at
        the last token of the step. Rows of length 0 keep their cache, and their score means nothing.

        The work is that of the longest row, in chunks: padding beyond it is not read. It is done in place, in
        a loop whose number of trips is traced.
        """
        n, lengths = tokens.shape[0], lengths.astype(jnp.int32)
        totals = jnp.where(lengths > 0, lengths + len(self.separator), 0)
        block = self._with_separator(tokens.astype(jnp.int32), lengths)
        chunk = min(CHUNK, block.shape[1])
        block = jnp.pad(block, ((0, 0), (0, -block.shape[1] % chunk)))
        # The loop's carry needs one shape of `length` from the start.
        cache = truncate(cache, cache.length)
        start = cache.length

        def read(carry: tuple[jax.Array, tuple[LayerCache, ...], jax.Array]):
            done, layers, hidden = carry
            part = jax.lax.dynamic_slice_in_dim(block, done, chunk, axis=1)
            # What shorter rows write lies beyond their length, and is overwritten later.
            x, layers = self.decoder(part, layers, cache.prefix_length, start + done)
            place = totals - 1 - done  # [N]; of the last token, in this chunk
            here = x[jnp.arange(n, dtype=jnp.int32), jnp.clip(place, 0, chunk - 1)]
            hidden = jnp.where(((place >= 0) & (place < chunk))[:, None], here, hidden)
            return done + chunk, layers, hidden

        hidden = jnp.zeros((n, self.decoder.config.hidden_size), jnp.float32)
        longest = totals.max()
        carry = (jnp.int32(0), cache.layers, hidden)
        _, layers, hidden = jax.lax.while_loop(lambda carry: carry[0] < longest, read, carry)
        cache = cache._replace(layers=layers, length=start + totals)
        return cache, poison(self._score(hidden), cache.length > cache.capacity)

    def fork(self, cache: ParticleCache, ancestors: jax.Array) -> ParticleCache:
        """Let row n continue from what was row `ancestors[n]`."""
        return fork(cache, ancestors)

    def _score(self, x: jax.Array) -> jax.Array:
        """Scores float32[...] of the residual stream [..., M]."""
        return self.head(rms_norm(x, self.decoder.norm[...], self.decoder.config.rms_norm_eps))

    def _separators(self, rows: int) -> jax.Array:
        """One separator a row, int32[rows, S]."""
        return jnp.tile(jnp.asarray(self.separator, jnp.int32)[None], (rows, 1))

    def _with_separator(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Put the separator after the first `lengths[n]` tokens of row n, int32[N, C + S]."""
        size = len(self.separator)
        if not size:
            return tokens
        columns = jnp.arange(tokens.shape[1] + size, dtype=jnp.int32)
        places = columns[None] - lengths[:, None]  # 0 where the separator starts
        separator = jnp.asarray(self.separator, jnp.int32)[jnp.clip(places, 0, size - 1)]
        return jnp.where(places < 0, jnp.pad(tokens, ((0, 0), (0, size))), separator)
