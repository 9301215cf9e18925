"""The policy as its own judge: P(Yes) against P(No) when asked whether a step is right.

After each step a question is put to the language model behind the trace, and the logits of the answer give
the score. The question is forgotten at once: the next step continues the trace, not the question.

References:
    Kadavath et al. (2022), Language models (mostly) know what they know, arXiv:2207.05221, on P(True); Xie
    et al. (2023), Self-evaluation guided beam search for reasoning, arXiv:2305.00633, which scores steps so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ponder.arguments import lacking
from ponder.models.protocols import Cache, LanguageModel, RewardModel, capabilities
from ponder.models.pytrees import pytree, static

__all__ = ["SelfEvaluation", "SelfEvaluationCache", "self_evaluation"]

TEMPLATE = "\n\nQuestion: Is this step correct?\nAnswer (Yes or No):"
"""It goes on in the turn that the trace is in, for instance that of a chat's assistant.

Of ten wordings tried on SmolLM2-135M-Instruct it is the one within the turn after which " Yes" and " No" have
the most mass, 0.58 on average over nine steps; where they have little, the score compares two rare words.
"""

_CHUNK = 16  # tokens that are read at once
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.nextafter(np.float32(1), np.float32(0)))


class SelfEvaluationCache(NamedTuple):
    """What the model has read of N traces.

    Attributes:
        model: the language model's cache, of the trace alone.
        lengths: int32[N]; tokens read after the prompt.
    """

    model: Cache
    lengths: jax.Array


@pytree
class SelfEvaluation:
    """A `RewardModel` that asks a language model; see `self_evaluation`.

    Attributes:
        lm: the language model.
        question: token ids put behind the trace.
        yes: the id whose probability counts for the step.
        no: the id that counts against it.
    """

    lm: Any  # a LanguageModel; its optional methods are used
    question: tuple[int, ...] = static()
    yes: int = static()
    no: int = static()

    def __repr__(self) -> str:
        return f"SelfEvaluation({self.lm!r}, question of {len(self.question)} tokens)"

    @property
    def vocab_size(self) -> int:
        """The language model's."""
        return self.lm.vocab_size

    @property
    def tokenizer(self):
        """The language model's."""
        return self.lm.tokenizer

    @property
    def max_length(self) -> int | None:
        """What the question leaves of the model's context; None if the model has no limit."""
        limit = capabilities(self.lm).max_length
        return None if limit is None else limit - len(self.question)

    @property
    def padded_prompts(self) -> bool:
        """Whether `prefill` takes a `length`: where that of the language model does."""
        return capabilities(self.lm).padded_prompts

    def prefill(
        self, tokens: jax.Array, num_particles: int, max_new_tokens: int, length: jax.Array | None = None
    ) -> tuple[SelfEvaluationCache, jax.Array]:
        """Read the prompt `int32[P]` and ask; return the cache and scores float32[N].

        `length` is the number of real tokens of a prompt that is padded on the right.
        """
        padded = {} if length is None else {"length": length}
        cache, _ = self.lm.prefill(tokens, num_particles, max_new_tokens + len(self.question), **padded)
        return self._begin(cache, num_particles)

    @property
    def prefill_many(self) -> Callable[..., tuple[SelfEvaluationCache, jax.Array]] | None:
        """Read several prompts; None where the model cannot."""
        return self._prefill_many if capabilities(self.lm).many_prompts else None

    def extend(self, cache: SelfEvaluationCache, tokens: jax.Array) -> tuple[SelfEvaluationCache, jax.Array]:
        """Append one token `int32[N]` a particle and ask; return the cache and scores float32[N]."""
        return self.extend_block(cache, tokens[:, None], jnp.ones(tokens.shape[0], jnp.int32))

    def extend_block(
        self, cache: SelfEvaluationCache, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[SelfEvaluationCache, jax.Array]:
        """Append the first `lengths[n]` of `tokens int32[N, C]` and ask; return the cache and scores [N].

        The work is that of the longest row and the question, read in chunks.
        """
        tokens, lengths = tokens.astype(jnp.int32), lengths.astype(jnp.int32)
        question = jnp.asarray(self.question, jnp.int32)
        last = jnp.full_like(lengths, self.question[-1])  # read by itself: no other logits are needed
        count = cache.lengths + lengths
        if capabilities(self.lm).rewinds:
            # Trace and question are read in one go, in place; then the question is rewound.
            size = len(self.question) - 1
            columns = jnp.arange(tokens.shape[1] + size, dtype=jnp.int32)
            places = columns[None] - lengths[:, None]  # 0: the question starts
            asked = question[jnp.clip(places, 0, size)]
            block = jnp.where(places < 0, jnp.pad(tokens, ((0, 0), (0, size))), asked)
            model = self.lm.truncate(cache.model, cache.lengths)
            model = _append(self.lm, model, block, lengths + size)
            model, logits = self.lm.extend(model, last)
            return SelfEvaluationCache(self.lm.truncate(model, count), count), self._score(logits)
        model = _append(self.lm, cache.model, tokens, lengths)
        block = jnp.tile(question[None, :-1], (tokens.shape[0], 1))
        copy = _append(self.lm, model, block, jnp.full_like(lengths, block.shape[1]))
        _, logits = self.lm.extend(copy, last)
        return SelfEvaluationCache(model, count), self._score(logits)

    def fork(self, cache: SelfEvaluationCache, ancestors: jax.Array) -> SelfEvaluationCache:
        """Let row n continue from what was row `ancestors[n]`."""
        return SelfEvaluationCache(self.lm.fork(cache.model, ancestors), cache.lengths[ancestors])

    def _prefill_many(self, tokens: jax.Array, lengths: jax.Array, num_particles: int, max_new_tokens: int):
        cache, _ = self.lm.prefill_many(tokens, lengths, num_particles, max_new_tokens + len(self.question))
        return self._begin(cache, tokens.shape[0] * num_particles)

    def _begin(self, model: Cache, rows: int) -> tuple[SelfEvaluationCache, jax.Array]:
        """Ask about the prompts, after which no step stands yet."""
        none = jnp.zeros(rows, jnp.int32)
        return self.extend_block(SelfEvaluationCache(model, none), jnp.zeros((rows, 0), jnp.int32), none)

    def _score(self, logits: jax.Array) -> jax.Array:
        """P(yes) / (P(yes) + P(no)), clipped so that its logarithm and that of 1 - score are finite."""
        logits = logits.astype(jnp.float32)
        score = jax.nn.sigmoid(logits[:, self.yes] - logits[:, self.no])
        return jnp.clip(score, _SMALLEST, _LARGEST)


def self_evaluation(
    lm: LanguageModel, template: str = TEMPLATE, *, yes: str = " Yes", no: str = " No"
) -> RewardModel:
    """Let a language model judge the steps of a trace: r = P(yes) / (P(yes) + P(no)) after a question.

    The scores are those of a model that asks itself, and small models are poor judges: calibrate them on
    outcomes before they count as probabilities. The question is not kept in the context of later steps. It
    costs its own tokens at every step, in a cache with room for it behind the trace, and where the model
    cannot `truncate`, a copy of that cache.

    Args:
        lm: the judge, with a tokenizer and `extend_block`; as a rule the program's own model.
        template: the question, put behind the trace as it stands. For a chat the default goes on in the
            assistant's turn; special tokens may be spelt out to put it into a turn of the user.
        yes: the answer that speaks for the step, with the blank or line break that the tokenizer makes part
            of a word. Only its first token is compared.
        no: the answer against it.

    Returns:
        A `RewardModel`; scores are float32, strictly inside (0, 1).

    Raises:
        TypeError: `lm` is no language model with `extend_block`, or `template`, `yes` or `no` is no text.
        ValueError: `lm` has no tokenizer, one of the texts has no tokens, or `yes` and `no` begin with the
            same token.
    """
    if isinstance(lm, type) or not isinstance(lm, LanguageModel):
        raise TypeError(
            "lm: expected a LanguageModel (see ponder.models.load), " + lacking(lm, LanguageModel)
        )
    if not capabilities(lm).blocks:
        raise TypeError(f"lm: expected a model with extend_block; {type(lm).__name__} has none")
    if lm.tokenizer is None:
        raise ValueError("lm: expected a model with a tokenizer, but lm.tokenizer is None")
    ids = {}
    for name, text in (("template", template), ("yes", yes), ("no", no)):
        if not isinstance(text, str):
            raise TypeError(f"{name}: expected a str, got {text!r}")
        ids[name] = list(lm.tokenizer.encode(text))
        if not ids[name]:
            raise ValueError(f"{name}: expected text of at least one token, got {text!r}")
    if ids["yes"][0] == ids["no"][0]:
        raise ValueError(
            f"yes, no: expected answers whose first tokens differ, but {yes!r} is {ids['yes'][:4]} and "
            f"{no!r} is {ids['no'][:4]} to this tokenizer; try them with or without the blank"
        )
    return SelfEvaluation(lm, tuple(ids["template"]), ids["yes"][0], ids["no"][0])


def _append(lm: Any, cache: Cache, tokens: jax.Array, lengths: jax.Array) -> Cache:
    """Append the first `lengths[n]` of `tokens[N, C]`, in chunks up to the longest row."""
    if tokens.shape[1] == 0:
        return cache
    chunk = min(_CHUNK, tokens.shape[1])
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % chunk)))
    longest = lengths.max()

    def read(carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
        done, cache = carry
        part = jax.lax.dynamic_slice_in_dim(tokens, done, chunk, axis=1)
        # The logits are not used, so the compiler leaves out the product with the vocabulary.
        cache, _ = lm.extend_block(cache, part, jnp.clip(lengths - done, 0, chunk))
        return done + chunk, cache

    carry = (jnp.int32(0), cache)
    # Ragged rows may change the type of a cache (a scalar length to a vector), which a loop cannot.
    types = [[(x.shape, x.dtype) for x in jax.tree.leaves(c)] for c in (carry, jax.eval_shape(read, carry))]
    if types[0] != types[1]:
        carry = read(carry)
    return jax.lax.while_loop(lambda carry: carry[0] < longest, read, carry)[1]
