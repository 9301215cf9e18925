"""What ponder asks of a language model, and of a process reward model: pure functions and a few facts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from ponder.models.step_form import StepForm

__all__ = ["Cache", "Capabilities", "LanguageModel", "RewardModel", "Tokenizer", "bos_of", "capabilities"]

Cache = Any
"""Any pytree; only the model that made it looks inside."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    Optional: `adds_bos: bool`, whether a prompt of text begins with the token `bos_token_id: int`;
    `apply_chat_template` may take keyword arguments, the variables of the template.
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
        """Render chat messages and the start of the assistant's turn, as token ids.

        A last message of the assistant is not closed: what is generated goes on from it.
        """
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """An autoregressive model over `vocab_size` tokens, batched over particles.

    The functions are pure and jit-traceable. An implementation that is a pytree (a flax `nnx.Module`, a
    registered dataclass) is passed to compiled code as an argument; any other object is a compile-time
    constant, compared by identity.

    Shapes: N particles, V vocabulary, P prompt length. Logits are unnormalised float32 for the next token.

    Optional members, which `capabilities` finds; one that is None is not there:
        `extend_block(cache, tokens[N, C], lengths[N]) -> (cache, logits[N, C, V])`: append the first
            `lengths[n]` tokens of row n, and score after each.
        `truncate(cache, lengths[N]) -> cache`: rewind row n to `lengths[n]` generated tokens.
        `prefill_many(tokens[B, P], lengths[B], num_particles, max_new_tokens) -> (cache, logits[N, V])`: read
            B prompts, padded on the right, for as many blocks of `num_particles` rows.
        `length`, a further argument of `prefill`: how many tokens of a prompt that is padded on the right are
            real, a traced int32[]. Prompts of similar length then share one compilation. A wrapper that can
            take it only for some models says so: `padded_prompts: bool`.
        `max_length: int`: the most tokens of a prompt and a trace together.
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

    Optional members, which `capabilities` finds; one that is None is not there:
        `extend_block(cache, tokens[N, C], lengths[N]) -> (cache, scores[N])`: append the first `lengths[n]`
            tokens of row n as one step of reasoning, with whatever separator the model wants after a step,
            and judge the trace after it. Rows of length 0 keep their cache, and their score means nothing.
        `separator: tuple[int, ...]`: ids of that separator, which take room in the cache.
        `form: StepForm`: how steps were written in its training; whoever feeds it writes them so. None: it
            reads traces as they are.
        `prefill_many`, `length` and `max_length`, as of a `LanguageModel`; separators count as tokens.
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
        blocks: it has `extend_block`.
        rewinds: it has `truncate`.
        many_prompts: it has `prefill_many`.
        padded_prompts: its `prefill` takes the `length` of a padded prompt.
        max_length: the most tokens of a prompt and a trace together; None: no limit.
        separator: ids that a reward model reads after each step; may be empty.
        form: how a reward model wants its steps; None: as they are.
    """

    blocks: bool
    rewinds: bool
    many_prompts: bool
    padded_prompts: bool
    max_length: int | None
    separator: tuple[int, ...]
    form: StepForm | None = None


def capabilities(model: LanguageModel | RewardModel) -> Capabilities:
    """Tell what a model has beyond its protocol: the one place that looks."""
    separator, padded = getattr(model, "separator", None), getattr(model, "padded_prompts", None)
    return Capabilities(
        blocks=getattr(model, "extend_block", None) is not None,
        rewinds=getattr(model, "truncate", None) is not None,
        many_prompts=getattr(model, "prefill_many", None) is not None,
        padded_prompts="length" in inspect.signature(model.prefill).parameters if padded is None else padded,
        max_length=getattr(model, "max_length", None),
        separator=() if separator is None else tuple(separator),
        form=getattr(model, "form", None),
    )


def bos_of(tokenizer: Tokenizer) -> list[int]:
    """Return the token that a prompt of text begins with, if it does: a list of one id, or of none."""
    adds = getattr(tokenizer, "adds_bos", False)
    return [tokenizer.bos_token_id] if adds else []  # pyright: ignore[reportAttributeAccessIssue]
