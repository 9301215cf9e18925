"""A language model and a reward model given by tables: small enough to enumerate, to check kernels with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from ponder.models.messages import check_messages
from ponder.models.protocols import Tokenizer

__all__ = ["PieceTokenizer", "TableLM", "TableReward"]


@dataclasses.dataclass(frozen=True)
class PieceTokenizer:
    """A tokenizer given by the bytes of each token; encoding takes the longest piece that fits.

    Attributes:
        pieces: bytes of token 0, 1, ...; b"" for special tokens.
    """

    pieces: tuple[bytes, ...]

    def encode(self, text: str) -> list[int]:
        """Encode greedily; text that no piece starts is a ValueError."""
        data, ids = text.encode(), []
        while data:
            fits = [i for i, piece in enumerate(self.pieces) if piece and data.startswith(piece)]
            if not fits:
                raise ValueError(f"text: no token starts {data.decode(errors='replace')!r}")
            ids.append(max(fits, key=lambda i: len(self.pieces[i])))
            data = data[len(self.pieces[ids[-1]]) :]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Join the pieces; bytes that are not UTF-8 become replacement characters."""
        return b"".join(self.pieces[int(i)] for i in ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the piece."""
        return self.pieces[token_id]

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Encode the contents one after another; there are no role marks.

        Raises:
            TypeError: `messages` is not a sequence of dicts with "role" and "content".
        """
        check_messages(messages)
        return self.encode("".join(message["content"] for message in messages))


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TableLM:
    """A `LanguageModel` whose logits are looked up by the last tokens.

    Attributes:
        table: float32[V, ..., V]; logits of the next token, indexed by the last `table.ndim - 1` tokens,
            oldest first. Before the first token of the prompt stand tokens 0.
        eos_token_ids: tokens that end a trace.
        tokenizer: optional.
    """

    table: jax.Array
    eos_token_ids: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    tokenizer: Tokenizer | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def random(cls, key: jax.Array, vocab_size: int, order: int = 2, scale: float = 1.0, **kwargs) -> TableLM:
        """Return a model whose logits are independent normals with standard deviation `scale`."""
        return cls(scale * jax.random.normal(key, (vocab_size,) * (order + 1), jnp.float32), **kwargs)

    def __repr__(self) -> str:
        return f"TableLM(vocab_size={self.vocab_size}, order={self.table.ndim - 1})"

    @property
    def vocab_size(self) -> int:
        """Rows of the table."""
        return self.table.shape[-1]

    def prefill(self, tokens: jax.Array, num_particles: int, max_new_tokens: int):
        """Start every particle after the prompt `int32[P]`; the cache is the last tokens [N, order]."""
        lengths = jnp.full(1, tokens.shape[0], jnp.int32)
        return self.prefill_many(tokens[None], lengths, num_particles, max_new_tokens)

    def prefill_many(self, tokens: jax.Array, lengths: jax.Array, num_particles: int, max_new_tokens: int):
        """Start `num_particles` rows after each of the prompts `int32[B, P]`, padded to `lengths[B]`."""
        cache = jnp.repeat(_last_tokens(tokens, lengths, self.table.ndim - 1), num_particles, axis=0)
        return cache, self._logits(cache)

    def extend(self, cache: jax.Array, tokens: jax.Array):
        """Append a token to each context."""
        cache = jnp.concatenate([cache, tokens[:, None].astype(jnp.int32)], axis=1)[:, 1:]
        return cache, self._logits(cache)

    def fork(self, cache: jax.Array, ancestors: jax.Array) -> jax.Array:
        """Gather contexts."""
        return cache[ancestors]

    def _logits(self, cache: jax.Array) -> jax.Array:
        logits = self.table[tuple(cache.T)].astype(jnp.float32)
        return jnp.broadcast_to(logits, (cache.shape[0], self.vocab_size))  # order 0: one row for all


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TableReward:
    """A `RewardModel` whose scores are looked up by the last tokens; it wants no separator.

    Attributes:
        table: float32[V, ..., V]; the score in (0, 1) of a trace, indexed by its last `table.ndim` tokens,
            the prompt's among them, oldest first. Before the first token of the prompt stand tokens 0.
        tokenizer: optional.
    """

    table: jax.Array
    tokenizer: Tokenizer | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def random(cls, key: jax.Array, vocab_size: int, order: int = 2, **kwargs) -> TableReward:
        """Return a model that reads `order` tokens and whose scores are uniform on (0.05, 0.95)."""
        return cls(jax.random.uniform(key, (vocab_size,) * order, jnp.float32, 0.05, 0.95), **kwargs)

    def __repr__(self) -> str:
        return f"TableReward(vocab_size={self.vocab_size}, order={self.table.ndim})"

    @property
    def vocab_size(self) -> int:
        """Rows of the table."""
        return self.table.shape[-1]

    def prefill(self, tokens: jax.Array, num_particles: int, max_new_tokens: int):
        """Start every particle after the prompt `int32[P]`; the cache is the last tokens [N, order]."""
        lengths = jnp.full(1, tokens.shape[0], jnp.int32)
        return self.prefill_many(tokens[None], lengths, num_particles, max_new_tokens)

    def prefill_many(self, tokens: jax.Array, lengths: jax.Array, num_particles: int, max_new_tokens: int):
        """Start `num_particles` rows after each of the prompts `int32[B, P]`, padded to `lengths[B]`."""
        cache = jnp.repeat(_last_tokens(tokens, lengths, self.table.ndim), num_particles, axis=0)
        return cache, self._scores(cache)

    def extend(self, cache: jax.Array, tokens: jax.Array):
        """Append a token to each context."""
        return self.extend_block(cache, tokens[:, None], jnp.ones(tokens.shape[0], jnp.int32))

    def extend_block(self, cache: jax.Array, tokens: jax.Array, lengths: jax.Array):
        """Append the first `lengths[n]` of `tokens int32[N, C]`; return the contexts and `scores[N]`."""
        history = jnp.concatenate([cache, tokens.astype(jnp.int32)], axis=1)
        cache = _last_tokens(history, self.table.ndim + lengths, self.table.ndim)
        return cache, self._scores(cache)

    def fork(self, cache: jax.Array, ancestors: jax.Array) -> jax.Array:
        """Gather contexts."""
        return cache[ancestors]

    def _scores(self, cache: jax.Array) -> jax.Array:
        return self.table[tuple(cache.T)].astype(jnp.float32)


def _last_tokens(tokens: jax.Array, lengths: jax.Array, order: int) -> jax.Array:
    """Return the `order` tokens before place `lengths[b]` of `tokens [B, P]`, 0 for what is not there."""
    padded = jnp.pad(tokens.astype(jnp.int32), ((0, 0), (order, 0)))
    # `order` columns were put in front.
    places = lengths.astype(jnp.int32)[:, None] + jnp.arange(order, dtype=jnp.int32)[None, :]
    return jnp.take_along_axis(padded, places, axis=1)
