"""What ponder asks of a language model, and of a process reward model: pure functions and a few facts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

__all__ = ["Cache", "Capabilities", "LanguageModel", "RewardModel", "Tokenizer", "bos_of", "capabilities"]

Cache = Any
"""Any pytree; only the model that made it looks inside."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    Optional: `adds_bos` and `bos_token_id`, where a text prompt begins with that token.
    """

    def encode(self, text: str) -> list[int]:
        """Encode text as it stands, with no special tokens added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; special tokens leave no text behind."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one token adds to the text; empty for special and unused ids."""
        ...

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Render chat messages and the start of the assistant's turn, as token ids."""
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """An autoregressive model over `vocab_size` tokens, batched over particles.

    The functions are pure and jit-traceable. An implementation that is a pytree (a flax `nnx.Module`, a
    registered dataclass) is passed to compiled code as an argument; any other object is a compile-time
    constant, compared by identity.

    Shapes: N particles, V vocabulary, P prompt length. Logits are unnormalised float32 for the next token.

    Optional methods are used where present: `extend_block(cache, tokens[N, C], lengths[N])` returns
    `(cache, logits[N, C, V])`, appending the first `lengths[n]` tokens of row n and scoring after each;
    `truncate(cache, lengths[N])` rewinds row n to `lengths[n]` generated tokens; and
    `prefill_many(tokens[B, P], lengths[B], num_particles, max_new_tokens)` reads B prompts, padded on the
    right, for as many blocks of `num_particles` rows. `prefill` may take an optional `length` (traced int32
    scalar): the number of real tokens in a prompt padded on the right, which lets prompts of similar length
    share one compilation. `max_length`: the most tokens of a prompt and a trace together. `capabilities`
    tells what a model has.
    """

    @property
    def vocab_size(self) -> int:
        """V, the number of logits."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a trace; may be empty."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Text to ids and back, if the model has text."""
        ...

    def prefill(self, tokens: jax.Array, num_particles: int, max_new_tokens: int) -> tuple[Cache, jax.Array]:
        """Read the prompt `int32[P]` once for all particles; return the cache and `logits[N, V]`."""
        ...

    def extend(self, cache: Cache, tokens: jax.Array) -> tuple[Cache, jax.Array]:
        """Append one token `int32[N]` a particle; return the cache and `logits[N, V]`."""
        ...

    def fork(self, cache: Cache, ancestors: jax.Array) -> Cache:
        """Let row n continue from what was row `ancestors[n]`, for any `int32[N]` of row numbers."""
        ...


@runtime_checkable
class RewardModel(Protocol):
    """A process reward model (PRM): it reads a trace as a language model does, and gives scores for logits.

    A score is in (0, 1): the probability that the trace so far is right. What "right" means (correct so far,
    or bound to succeed) is the model's training; `ponder.process_reward` makes a likelihood of it.

    The functions are pure and jit-traceable, and the model is best a pytree, as with `LanguageModel`.

    Optional, used where present: `extend_block(cache, tokens[N, C], lengths[N])` returns `(cache,
    scores[N])`: it appends the first `lengths[n]` tokens of row n as one step of reasoning, with whatever
    separator the model wants after a step, and judges the trace after it; rows of length 0 keep their cache,
    and their score means nothing. `separator`: ids of that separator, which take room in the cache. And
    `prefill_many`, as in `LanguageModel`.
    """

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids that it reads."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Text to ids and back, if the model has text."""
        ...

    def prefill(self, tokens: jax.Array, num_particles: int, max_new_tokens: int) -> tuple[Cache, jax.Array]:
        """Read the prompt `int32[P]` once for all particles; return the cache and `scores[N]`."""
        ...

    def extend(self, cache: Cache, tokens: jax.Array) -> tuple[Cache, jax.Array]:
        """Append one token `int32[N]` a particle; return the cache and `scores[N]`."""
        ...

    def fork(self, cache: Cache, ancestors: jax.Array) -> Cache:
        """Let row n continue from what was row `ancestors[n]`, for any `int32[N]` of row numbers."""
        ...


class Capabilities(NamedTuple):
    """What a language or reward model has beyond its protocol.

    Attributes:
        blocks: `extend_block`.
        rewinds: `truncate`.
        many_prompts: `prefill_many`.
        padded_prompts: `prefill` takes the `length` of a padded prompt.
        max_length: the most tokens of a prompt and a trace together; None: no limit.
        separator: ids that a reward model reads after each step.
    """

    blocks: bool
    rewinds: bool
    many_prompts: bool
    padded_prompts: bool
    max_length: int | None
    separator: tuple[int, ...]


def capabilities(model: LanguageModel | RewardModel) -> Capabilities:
    """Tell what a model has beyond its protocol: the one place that looks."""
    return Capabilities(
        blocks=hasattr(model, "extend_block"),
        rewinds=hasattr(model, "truncate"),
        many_prompts=hasattr(model, "prefill_many"),
        padded_prompts="length" in inspect.signature(model.prefill).parameters,
        max_length=getattr(model, "max_length", None),
        separator=tuple(getattr(model, "separator", ())),
    )


def bos_of(tokenizer: Tokenizer) -> list[int]:
    """Return the token that a text prompt begins with, if it does."""
    adds = getattr(tokenizer, "adds_bos", False)
    return [tokenizer.bos_token_id] if adds else []  # pyright: ignore[reportAttributeAccessIssue]
