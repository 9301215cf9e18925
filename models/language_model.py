"""A decoder as a `LanguageModel`: prompt read once, particles extended, forked and rewound."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from ponder.models.cache import ParticleCache, fork, poison, truncate
from ponder.models.decoder import Decoder
from ponder.models.protocols import Tokenizer

__all__ = ["DecoderLM"]


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DecoderLM:
    """A `LanguageModel` over a `Decoder`; a pytree whose leaves are the weights.

    Attributes:
        decoder: the network.
        tokenizer: text to ids and back, or None.
        eos_token_ids: tokens that end a trace.
        name: where it was loaded from, for messages.
    """

    decoder: Decoder
    tokenizer: Tokenizer | None = dataclasses.field(default=None, metadata={"static": True})
    eos_token_ids: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    name: str = dataclasses.field(default="decoder", metadata={"static": True})

    def __repr__(self) -> str:
        config = self.decoder.config
        count = sum(x.size for x in jax.tree.leaves(self.decoder))
        return (
            f"DecoderLM({self.name!r}, {count / 1e6:.1f}M parameters, {config.num_hidden_layers} layers, "
            f"vocabulary {config.vocab_size})"
        )

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; ids that the tokenizer leaves unused are included."""
        return self.decoder.config.vocab_size

    @property
    def max_length(self) -> int:
        """Context: prompt and new tokens together may not exceed it."""
        return self.decoder.config.max_position_embeddings

    def prefill(
        self, tokens: jax.Array, num_particles: int, max_new_tokens: int, length: jax.Array | None = None
    ) -> tuple[ParticleCache, jax.Array]:
        """Read the prompt `int32[P]` once; see `LanguageModel`.

        `length` is the number of real tokens where the prompt is padded on the right.
        """
        lengths = jnp.reshape(tokens.shape[0] if length is None else length, (1,))
        return self.prefill_many(tokens[None], lengths, num_particles, max_new_tokens)

    def prefill_many(
        self, tokens: jax.Array, lengths: jax.Array, num_particles: int, max_new_tokens: int
    ) -> tuple[ParticleCache, jax.Array]:
        """Read B prompts `int32[B, P]`, padded on the right to `lengths[B]`; see `LanguageModel`."""
        prompts, lengths = tokens.shape[0], lengths.astype(jnp.int32)
        x, read = self.decoder.read(tokens)
        layers = self.decoder.empty_layers(prompts * num_particles, max_new_tokens, read)
        logits = self.decoder.logits(x[jnp.arange(prompts, dtype=jnp.int32), lengths - 1])
        return ParticleCache(layers, lengths, jnp.int32(0)), jnp.repeat(logits, num_particles, axis=0)

    def extend(self, cache: ParticleCache, tokens: jax.Array) -> tuple[ParticleCache, jax.Array]:
        """Append one token `int32[N]` a particle; return the cache and logits float32[N, V].

        Beyond the cache's capacity the logits are NaN, which kernels flag.
        """
        x, layers = self.decoder(tokens[:, None], cache.layers, cache.prefix_length, cache.length)
        x = poison(x[:, 0], cache.length >= cache.capacity)
        return cache._replace(layers=layers, length=cache.length + 1), self.decoder.logits(x)

    def extend_block(
        self, cache: ParticleCache, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[ParticleCache, jax.Array]:
        """Append the first `lengths[n]` of `tokens int32[N, C]`; return the cache and logits [N, C, V].

        `logits[n, c]` follow token c; those at and beyond `lengths[n]` mean nothing.
        """
        lengths = lengths.astype(jnp.int32)
        start = jnp.broadcast_to(cache.length, lengths.shape)
        x, layers = self.decoder(tokens, cache.layers, cache.prefix_length, start)
        x = poison(x, start + lengths > cache.capacity)
        return cache._replace(layers=layers, length=start + lengths), self.decoder.logits(x)

    def fork(self, cache: ParticleCache, ancestors: jax.Array) -> ParticleCache:
        """Let row n continue from what was row `ancestors[n]`."""
        return fork(cache, ancestors)

    def truncate(self, cache: ParticleCache, lengths: jax.Array) -> ParticleCache:
        """Rewind particle n to its first `lengths[n]` generated tokens."""
        return truncate(cache, lengths)

    def score(self, tokens: jax.Array) -> jax.Array:
        """Return the logits float32[P, V] after each token of `int32[P]`, by teacher forcing."""
        x, _ = self.decoder.read(tokens[None])
        return self.decoder.logits(x[0])
