"""Potential computed by a Python function on the decoded text, outside the compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ponder.host.calls import call_host
from ponder.models.pytrees import pytree, static
from ponder.potentials.combining import Bound, Unbound
from ponder.protocols import Context

__all__ = ["Text", "TextFunction", "TextPotential", "TextState", "text"]

TextFunction = Callable[[list[str]], Any]
"""From texts to one log potential each, or one bool each (True for 0, False for -inf)."""


def text(fn: TextFunction, *, prefix: TextFunction | None = None) -> Text:
    """Weigh traces by a Python function of their text: a test, a verifier, a score.

    The function sees what was generated, without the prompt and without EOS. It is called from compiled code,
    for all particles at once, whenever some trace has finished; it has to be a function of each text alone,
    and it must not call JAX, which may be waiting for it. Texts of unfinished traces come along; their values
    are not used.

    Args:
        fn: log Φ of finished traces, from a list of texts to as many values (or bools). -inf forbids.
            Without `prefix` it is a terminal score, weighed when all particles have ended.
        prefix: the same for unfinished traces, called whenever they are weighed. It steers the search and
            does not change the posterior, as long as it is -inf (or False) only where no text that begins so
            has Φ > 0: what it forbids is lost, also with `proposal="rejection"`, and nothing tells of it but
            `ponder.testing.check_potential`. None: 1.

    Raises:
        TypeError: an argument cannot be called, or cannot be hashed.

    Example:
        >>> import ponder
        >>> short = ponder.text(lambda texts: [len(text) < 20 for text in texts])
    """
    for name, function in (("fn", fn), ("prefix", prefix)):
        if function is None and name == "prefix":
            continue
        if not callable(function):
            raise TypeError(f"text({name}): expected a function of a list of texts, got {function!r}")
        try:
            hash(function)
        except TypeError as error:
            raise TypeError(f"text({name}): expected a hashable function, got {function!r}") from error
    return Text(fn, prefix)


class TextState(NamedTuple):
    """State of N traces.

    Attributes:
        tokens: int32[N, T]; the tokens before EOS, padded with 0.
        lengths: int32[N]; how many there are.
    """

    tokens: jax.Array
    lengths: jax.Array


@pytree
class Text(Unbound):
    """What `text` returns: functions of texts, whatever the model's tokens.

    Attributes:
        fn: log Φ of finished traces.
        prefix: log Φ of unfinished traces, or None for 0.
    """

    fn: TextFunction = static()
    prefix: TextFunction | None = static(default=None)

    def bind(self, context: Context) -> TextPotential:
        """Keep what decodes a model's tokens.

        Raises:
            ValueError: the model has no tokenizer.
        """
        lm = context.lm
        if lm.tokenizer is None:
            raise ValueError(f"{self!r} needs text, but lm.tokenizer is None")
        # The method, not the tokenizer: methods are compared by identity, so that any tokenizer can be
        # a constant of the compiled program.
        eos_token_ids = tuple(int(token) for token in lm.eos_token_ids)
        return TextPotential(self, lm.tokenizer.decode, eos_token_ids, context.max_new_tokens)

    def __repr__(self) -> str:
        return f"text({getattr(self.fn, '__name__', self.fn)!s})"


@pytree
class TextPotential(Bound):
    """Functions of the text that a model's tokens spell.

    Attributes:
        unbound: the functions.
        decode: the tokenizer's method.
        eos_token_ids: tokens that end a trace and are no part of its text.
        max_new_tokens: the length limit.
    """

    unbound: Text
    decode: Callable[[Sequence[int]], str] = static()
    eos_token_ids: tuple[int, ...] = static()
    max_new_tokens: int = static()

    @property
    def withholds(self) -> bool:
        """A terminal score unless there is a function of unfinished texts."""
        return self.unbound.prefix is None

    def init(self, num_particles: int) -> TextState:
        """Return the state of empty traces."""
        tokens = jnp.zeros((num_particles, self.max_new_tokens), jnp.int32)
        return TextState(tokens, jnp.zeros(num_particles, jnp.int32))

    def update(self, state: TextState, tokens: jax.Array, active: jax.Array) -> TextState:
        """Append tokens other than EOS."""
        eos = jnp.asarray(self.eos_token_ids, jnp.int32)
        reads = active & ~(tokens[:, None] == eos[None, :]).any(1)
        rows = jnp.arange(len(tokens), dtype=jnp.int32)
        column = jnp.where(reads, state.lengths, self.max_new_tokens)  # past the end: not written
        buffer = state.tokens.at[rows, column].set(tokens.astype(jnp.int32), mode="drop")
        return TextState(buffer, state.lengths + reads.astype(jnp.int32))

    def log_prefix(self, state: TextState) -> jax.Array:
        """Return the values of `prefix`, or 0 where there is none."""
        return self.judge_prefix(state, jnp.ones(state.lengths.shape, bool))

    def log_complete(self, state: TextState) -> jax.Array:
        """Return the values of `fn`."""
        return self.judge(state, jnp.ones(state.lengths.shape, bool))

    def judge(self, state: TextState, ends: jax.Array) -> jax.Array:
        """Return the values of `fn` where `ends`; it is not called for the other rows."""
        return self._call("fn", self.unbound.fn, state, ends)

    def judge_prefix(self, state: TextState, rows: jax.Array) -> jax.Array:
        """Return the values of `prefix` in some rows; it is not called for the others."""
        if self.unbound.prefix is None:
            return jnp.zeros(state.lengths.shape, jnp.float32)
        return self._call("prefix", self.unbound.prefix, state, rows)

    def __repr__(self) -> str:
        return repr(self.unbound)

    def _call(self, name: str, function: TextFunction, state: TextState, needed: jax.Array) -> jax.Array:
        """Decode on the host and apply a function to all rows that need it at once; the others get 0."""
        host = functools.partial(_evaluate, name, function, self.decode)
        shape = jax.ShapeDtypeStruct(state.lengths.shape, jnp.float32)
        return call_host(host, shape, state.tokens, state.lengths, needed)


def _evaluate(
    name: str,
    function: TextFunction,
    decode: Callable[[Sequence[int]], str],
    tokens: jax.Array,
    lengths: jax.Array,
    needed: jax.Array,
) -> np.ndarray:
    """Run on the host: one call for the texts of `tokens[..., T]` that are needed; 0 for the others."""
    counts, wanted = np.asarray(lengths), np.asarray(needed)
    rows = np.asarray(tokens).reshape(counts.size, -1)[wanted.ravel()]
    values = np.zeros(counts.shape, np.float32)
    if not len(rows):
        return values
    traces = [tuple(row[:count].tolist()) for row, count in zip(rows, counts[wanted], strict=True)]
    decoded = {trace: decode(trace) for trace in dict.fromkeys(traces)}  # resampling makes many equal
    values_of_texts = function([decoded[trace] for trace in traces])
    if isinstance(values_of_texts, list | tuple):
        verdicts = sum(isinstance(value, bool | np.bool_) for value in values_of_texts)
        if 0 < verdicts < len(values_of_texts):
            raise TypeError(f"text({name}): expected all numbers or all bools, got a mixture")
    result = np.asarray(values_of_texts)
    if result.shape != (len(traces),):
        raise ValueError(
            f"text({name}): expected one value for each of {len(traces)} texts, got shape {result.shape}"
        )
    if result.dtype == np.bool_:
        result = np.where(result, 0.0, -np.inf)
    elif not np.issubdtype(result.dtype, np.floating) and not np.issubdtype(result.dtype, np.integer):
        raise TypeError(f"text({name}): expected numbers or bools, got dtype {result.dtype}")
    with np.errstate(over="ignore"):  # below the range of float32 is -inf
        values[wanted] = result
    return values
