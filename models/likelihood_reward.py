"""A language model as a reward model: what it thinks of the words of each step.

A model that knows what a right step says gives little probability to a wrong one. The score after t steps is

    r_t = Π_{s ≤ t} sigmoid(b + c_sum · Σ log p(token) + c_min · min log p(token)),

with the sum and the minimum over the tokens of step s, each given all that stands before it, and with
coefficients fitted by logistic regression on judged steps. This reads a trace as a verifier that solves the
task itself and compares: the recipe for tasks in which one step is right.

Axes: N particles, C tokens of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ponder.models.protocols import LanguageModel, Tokenizer, capabilities
from ponder.models.pytrees import pytree, static

__all__ = ["LikelihoodReward", "LikelihoodRewardCache"]

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.nextafter(np.float32(1), np.float32(0)))


class LikelihoodRewardCache(NamedTuple):
    """What the model has read of N traces.

    Attributes:
        model: the language model's cache.
        log_probs: float32[N, V]; of the next token.
        log_score: float32[N]; log r of the steps so far.
    """

    model: Any
    log_probs: jax.Array
    log_score: jax.Array


@pytree
class LikelihoodReward:
    """A `RewardModel` over a language model with `extend_block`; see the module for its score.

    Scores are clipped to the open interval (0, 1) of float32.

    Attributes:
        lm: the language model.
        coefficients: float32[3]; b, c_sum and c_min, on the logit of a step.
        name: where it was loaded from, for messages.
    """

    lm: LanguageModel
    coefficients: jax.Array
    name: str = static(default="likelihood")

    def __repr__(self) -> str:
        return f"LikelihoodReward({self.name!r}, {self.lm!r})"

    @property
    def vocab_size(self) -> int:
        """That of the language model."""
        return self.lm.vocab_size

    @property
    def tokenizer(self) -> Tokenizer | None:
        """That of the language model."""
        return self.lm.tokenizer

    @property
    def max_length(self) -> int | None:
        """Context of the language model, None if it has no limit."""
        return capabilities(self.lm).max_length

    @property
    def padded_prompts(self) -> bool:
        """Whether `prefill` takes a `length`: where that of the language model does."""
        return capabilities(self.lm).padded_prompts

    def prefill(
        self, tokens: jax.Array, num_particles: int, max_new_tokens: int, length: jax.Array | None = None
    ) -> tuple[LikelihoodRewardCache, jax.Array]:
        """Read the prompt `int32[P]`; nothing is judged yet, and the scores float32[N] are 1.

        `length` is the number of real tokens of a prompt that is padded on the right.
        """
        padded: dict[str, Any] = {} if length is None else {"length": length}
        return self._start(*self.lm.prefill(tokens, num_particles, max_new_tokens, **padded))

    @property
    def prefill_many(self) -> Callable[..., tuple[LikelihoodRewardCache, jax.Array]] | None:
        """Read B prompts `int32[B, P]`, padded on the right to `lengths[B]`; None where the model cannot."""
        return self._prefill_many if capabilities(self.lm).many_prompts else None

    def extend(
        self, cache: LikelihoodRewardCache, tokens: jax.Array
    ) -> tuple[LikelihoodRewardCache, jax.Array]:
        """Append a step of one token `int32[N]`; return the cache and scores float32[N]."""
        return self.extend_block(cache, tokens[:, None], jnp.ones(tokens.shape[0], jnp.int32))

    def extend_block(
        self, cache: LikelihoodRewardCache, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[LikelihoodRewardCache, jax.Array]:
        """Append a step: the first `lengths[n]` of `tokens int32[N, C]`; return the cache and scores [N].

        Rows of length 0 keep what they have.
        """
        lengths = lengths.astype(jnp.int32)
        block = self.lm.extend_block  # pyright: ignore[reportAttributeAccessIssue]
        model, logits = block(cache.model, tokens, lengths)
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        # Token c is predicted after token c - 1; the first one before the step began.
        before = jnp.concatenate([cache.log_probs[:, None], log_probs[:, :-1]], axis=1)
        spoken = jnp.take_along_axis(before, tokens[:, :, None], axis=2)[:, :, 0]
        inside = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
        total = jnp.where(inside, spoken, 0.0).sum(axis=1)
        least = jnp.where(inside, spoken, 0.0).min(axis=1)
        bias, c_sum, c_min = self.coefficients.astype(jnp.float32)
        judged = lengths > 0
        log_score = cache.log_score + jax.nn.log_sigmoid(bias + c_sum * total + c_min * least)
        log_score = jnp.where(judged, log_score, cache.log_score)
        last = log_probs[jnp.arange(tokens.shape[0], dtype=jnp.int32), jnp.maximum(lengths - 1, 0)]
        after = LikelihoodRewardCache(model, jnp.where(judged[:, None], last, cache.log_probs), log_score)
        return after, _score(log_score)

    def fork(self, cache: LikelihoodRewardCache, ancestors: jax.Array) -> LikelihoodRewardCache:
        """Let row n continue from what was row `ancestors[n]`."""
        return LikelihoodRewardCache(
            self.lm.fork(cache.model, ancestors), cache.log_probs[ancestors], cache.log_score[ancestors]
        )

    def _prefill_many(self, tokens: jax.Array, lengths: jax.Array, num_particles: int, max_new_tokens: int):
        many = self.lm.prefill_many  # pyright: ignore[reportAttributeAccessIssue]
        return self._start(*many(tokens, lengths, num_particles, max_new_tokens))

    def _start(self, cache: Any, logits: jax.Array) -> tuple[LikelihoodRewardCache, jax.Array]:
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        log_score = jnp.zeros(logits.shape[0], jnp.float32)
        return LikelihoodRewardCache(cache, log_probs, log_score), _score(log_score)


def _score(log_score: jax.Array) -> jax.Array:
    return jnp.clip(jnp.exp(log_score), _SMALLEST, _LARGEST)
