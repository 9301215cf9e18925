"""A process reward computed by a Python function on the decoded trace, outside the compiled program.

For exact value functions, verifiers and synthetic reward models. `ponder.process_reward` makes a likelihood
of it, as of any reward model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ponder.host.calls import call_host
from ponder.models.pytrees import pytree, static
from ponder.protocols import Context
from ponder.rewards.blanks import without_excess

__all__ = ["ScoreFunction", "TextReward", "TextScorer", "text_reward"]

ScoreFunction = Callable[[str, list[str]], Any]
"""From a prompt and texts of traces so far to one score each."""


_BUCKET = 64
"""Prompts are padded to a multiple of so many bytes."""


class TextRewardCache(NamedTuple):
    """The traces so far.

    Attributes:
        tokens: int32[N, T]; padded with 0.
        lengths: int32[N].
    """

    tokens: jax.Array
    lengths: jax.Array


@pytree
class TextReward:
    """What `text_reward` returns, and an `UnboundScorer`.

    Attributes:
        fn: the scores.
        own_prompts: texts that `fn` gets instead of the program's prompt, or None.
    """

    fn: ScoreFunction = static()
    own_prompts: tuple[str, ...] | None = static(default=None)

    def with_prompt(self, prompt: Any) -> TextReward:
        """Give the function another prompt than the program's: text, or one text for each prompt.

        Raises:
            TypeError: `prompt` is something else.
        """
        texts = (prompt,) if isinstance(prompt, str) else tuple(prompt) if isinstance(prompt, list) else ()
        if not texts or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"prompt: a text_reward takes text or a list of texts, got {prompt!r}")
        return dataclasses.replace(self, own_prompts=texts)

    def bind(self, context: Context) -> TextScorer:
        """See `UnboundScorer`.

        Raises:
            ValueError: the program's model has no tokenizer, or another number of prompts than was given.
        """
        tokenizer = context.lm.tokenizer
        if tokenizer is None:
            raise ValueError("text_reward: needs text, but lm.tokenizer is None")
        prompts = self.own_prompts
        if prompts is None:
            sources = context.sources or (None,) * len(context.prompts)
            # As the user wrote it: decoding would drop special tokens that the text spells out.
            prompts = tuple(
                source if isinstance(source, str) else tokenizer.decode(ids)
                for source, ids in zip(sources, context.prompts, strict=True)
            ) or ("",)
        elif len(prompts) not in (1, max(len(context.prompts), 1)):
            raise ValueError(
                f"prompt: expected one text, or one for each of the program's {len(context.prompts)} "
                f"prompts, got {len(prompts)}"
            )
        encoded = [prompt.encode(errors="surrogatepass") for prompt in prompts]
        lengths = [len(prompt) for prompt in encoded]
        width = max(lengths) + -max(lengths) % _BUCKET
        with jax.ensure_compile_time_eval():
            table = jnp.asarray([list(prompt.ljust(width, b"\0")) for prompt in encoded], jnp.uint8)
            counts = jnp.asarray(lengths, jnp.int32)
        return TextScorer(
            self,
            table.reshape(len(encoded), width),
            counts,
            tokenizer.decode,
            context.max_new_tokens,
            context.delimiters,
        )

    def __repr__(self) -> str:
        return f"text_reward({getattr(self.fn, '__name__', self.fn)!s})"


@pytree
class TextScorer:
    """A Python function of prompt and texts as a `Scorer`.

    Attributes:
        unbound: the function, whatever the program.
        prompts: uint8[B, L]; what it gets, as UTF-8. An array, so that programs with other prompts share a
            compilation.
        prompt_lengths: int32[B]; bytes of each.
        decode: method of the program's tokenizer.
        max_new_tokens: T.
        delimiters: what ends a unit.
    """

    unbound: TextReward
    prompts: jax.Array
    prompt_lengths: jax.Array
    decode: Callable[[Sequence[int]], str] = static()
    max_new_tokens: int = static()
    delimiters: tuple[str | int, ...] = static()

    @property
    def of_text(self) -> bool:
        """See `Scorer`."""
        return True

    def start(self, num_rows: int) -> TextRewardCache:
        """See `Scorer`."""
        tokens = jnp.zeros((num_rows, self.max_new_tokens), jnp.int32)
        return TextRewardCache(tokens, jnp.zeros(num_rows, jnp.int32))

    def read(
        self, cache: TextRewardCache, tokens: jax.Array, lengths: jax.Array, visible: jax.Array
    ) -> tuple[TextRewardCache, jax.Array, jax.Array]:
        """See `Scorer`; what is not visible is part of the text that is scored next."""
        num_rows, width = tokens.shape
        place = jnp.arange(width, dtype=jnp.int32)[None, :]
        columns = jnp.where(place < lengths[:, None], cache.lengths[:, None] + place, self.max_new_tokens)
        rows = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
        traces = cache.tokens.at[rows, columns].set(tokens, mode="drop")
        cache = TextRewardCache(traces, cache.lengths + lengths)
        judged = (lengths > 0) & visible
        shape = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
        prompts = (self.prompts, self.prompt_lengths)
        scores = call_host(self._on_host, shape, prompts, cache, judged)
        return cache, scores, judged

    def fork(self, cache: TextRewardCache, ancestors: jax.Array) -> TextRewardCache:
        """See `Scorer`."""
        return jax.tree.map(lambda x: x[ancestors], cache)

    def _on_host(self, table: tuple[Any, Any], cache: TextRewardCache, needed: Any) -> np.ndarray:
        """Score the traces that need it, one call a prompt; 0 for the others."""
        # Under vmap every run has the same prompts.
        bytes_of, lengths = np.asarray(table[0]), np.asarray(table[1])
        lengths = lengths.reshape(-1, lengths.shape[-1])[0]
        bytes_of = bytes_of.reshape(-1, *bytes_of.shape[-2:])[0]
        prompts = [
            row[:length].tobytes().decode(errors="surrogatepass")
            for row, length in zip(bytes_of, lengths, strict=True)
        ]
        counts, tokens, wanted = np.asarray(cache.lengths), np.asarray(cache.tokens), np.asarray(needed)
        scores = np.zeros(counts.shape, np.float32)
        block = max(counts.shape[-1] // len(prompts), 1)
        rows_of: list[dict[tuple[int, ...], list[tuple]]] = [{} for _ in prompts]
        for row in zip(*np.nonzero(wanted), strict=True):
            trace = tuple(tokens[row][: counts[row]].tolist())
            rows_of[row[-1] // block].setdefault(trace, []).append(row)  # resampling makes many equal
        for prompt, rows in zip(prompts, rows_of, strict=True):
            if not rows:
                continue
            text_of = {trace: self._text(trace) for trace in rows}
            texts = list(dict.fromkeys(text_of.values()))
            found = dict(zip(texts, self._score(prompt, texts), strict=True))
            for trace, places in rows.items():
                for place in places:
                    scores[place] = found[text_of[trace]]
        return scores

    def _text(self, trace: Sequence[int]) -> str:
        """What the function gets of a trace."""
        return without_excess(self.decode(trace), self.delimiters)

    def _score(self, prompt: str, texts: list[str]) -> np.ndarray:
        result = np.asarray(self.unbound.fn(prompt, list(texts)))
        if result.shape != (len(texts),):
            raise ValueError(
                f"text_reward: expected one score for each of {len(texts)} texts, got shape {result.shape}"
            )
        if result.dtype.kind not in "biuf":
            raise TypeError(f"text_reward: expected numbers in [0, 1], got dtype {result.dtype}")
        wrong = ~((result >= 0) & (result <= 1))
        if wrong.any():
            text = texts[int(np.argmax(wrong))]
            raise ValueError(
                f"text_reward: expected scores in [0, 1], got {result[wrong][0]!r} for {text[-60:]!r}"
            )
        return result.astype(np.float32)


def text_reward(fn: ScoreFunction) -> TextReward:
    """Make a process reward model of a Python function of the text, to give to `ponder.process_reward`.

    The function sees the prompt, as the user wrote it where it was text and decoded otherwise, and a list of
    the distinct texts so far, without the prompt and without EOS; a text ends with the delimiter of its last
    step, also where a token has blanks beyond it. It is called from compiled code when a unit ends, once a
    prompt for all particles that have new visible text; it has to be a function of its arguments alone,
    and it must not call JAX, which may be waiting for it.

    Args:
        fn: `fn(prompt, texts)` gives one score in [0, 1] for each text: the probability that the trace so far
            is right. 0 and 1 count as 2^-24 and 1 - 2^-24.

    Raises:
        TypeError: `fn` cannot be called, or cannot be hashed.
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a function of a prompt and a list of texts, got {fn!r}")
    try:
        hash(fn)
    except TypeError as error:
        raise TypeError(f"fn: expected a hashable function, got {fn!r}") from error
    return TextReward(fn)
