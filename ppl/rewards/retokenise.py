"""One text in the tokens of two models: when ids can be shared, and the translation on the host when not."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ponder.host.calls import call_host
from ponder.models.protocols import LanguageModel, RewardModel
from ponder.models.step_form import StepForm
from ponder.rewards.blanks import without_excess

__all__ = ["Leftover", "Retokeniser", "reads_same_ids"]


def reads_same_ids(reader: RewardModel, lm: LanguageModel) -> bool:
    """Tell whether the ids that a language model writes mean the same to a reader.

    They do with one tokenizer for both, and with equal sizes and bytes of every token. Where one of the two
    has no tokenizer, ids are all there is, and equal sizes have to do.

    Raises:
        ValueError: one has no tokenizer, and the sizes differ.
    """
    if reader.tokenizer is None or lm.tokenizer is None:
        if reader.vocab_size != lm.vocab_size:
            raise ValueError(
                f"prm: expected the program's vocabulary of {lm.vocab_size} tokens, or a tokenizer on both "
                f"sides to translate with; got a vocabulary of {reader.vocab_size}, and "
                f"{'no tokenizer' if reader.tokenizer is None else 'a program without one'}"
            )
        return True
    if reader.tokenizer is lm.tokenizer:
        return reader.vocab_size >= lm.vocab_size
    if reader.vocab_size != lm.vocab_size:
        return False
    found, expected = reader.tokenizer.token_bytes, lm.tokenizer.token_bytes
    return all(found(token) == expected(token) for token in range(lm.vocab_size))


_AS_IT_IS = StepForm()
_TAIL = 32
"""Bytes that may wait for the next unit; of more blanks than that, the last ones."""


class Leftover(NamedTuple):
    """What a `Retokeniser` remembers of each row between units.

    Attributes:
        tail: uint8[N, 32]; the text that waits for the next unit, padded with 0.
        used: int32[N]; tokens of the reader so far.
    """

    tail: jax.Array
    used: jax.Array


@dataclasses.dataclass(frozen=True)
class Retokeniser:
    """Translates units of text from a writer's tokens to a reader's, on the host, batched.

    What the reader gets is a function of the text: blanks that the last token of a unit has beyond the
    delimiter belong to the next unit, and so do the blanks of a unit without visible text, which has no
    tokens, and the bytes of a character that the end of a unit cuts. Steps are written in the reader's form.

    Attributes:
        token_bytes: method of the writer's tokenizer. Methods are compared by identity, so that any tokenizer
            can be a constant of a compiled program.
        encode: method of the reader's tokenizer.
        max_step_tokens: the most tokens of the reader that a unit may have.
        max_tokens: the most that a trace may have.
        form: how the reader wants its steps.
        delimiters: what ends a unit.
    """

    token_bytes: Callable[[int], bytes]
    encode: Callable[[str], list[int]]
    max_step_tokens: int
    max_tokens: int
    form: StepForm = _AS_IT_IS
    delimiters: tuple[str | int, ...] = ()

    def init(self, num_rows: int) -> Leftover:
        """Return the memory of empty traces."""
        return Leftover(jnp.zeros((num_rows, _TAIL), jnp.uint8), jnp.zeros(num_rows, jnp.int32))

    def translate(
        self, leftover: Leftover, tokens: jax.Array, lengths: jax.Array, visible: jax.Array
    ) -> tuple[Leftover, jax.Array, jax.Array]:
        """Return the memory, `int32[N, max_step_tokens]` and `lengths[N]` of units `tokens[N, C]`.

        Units that are not `visible[N]` have no tokens.

        A unit or trace that does not fit is an error, raised by the host while the program runs.
        """
        num_rows = tokens.shape[0]
        translated = jnp.zeros((num_rows, self.max_step_tokens), jnp.int32)
        shapes = jax.eval_shape(lambda: (self.init(num_rows), translated, lengths.astype(jnp.int32)))
        return call_host(self._on_host, shapes, leftover, tokens, lengths, visible)

    def _on_host(
        self, leftover: Leftover, tokens: Any, lengths: Any, visible: Any
    ) -> tuple[Leftover, np.ndarray, np.ndarray]:
        counts, shown = np.asarray(lengths), np.asarray(visible)
        tails, used = np.array(leftover.tail), np.array(leftover.used)
        translated = np.zeros((*counts.shape, self.max_step_tokens), np.int32)
        new_lengths = np.zeros(counts.shape, np.int32)
        rows = np.asarray(tokens)
        known: dict[tuple[bytes, bool, bool], tuple[list[int], bytes]] = {}  # resampling makes many equal
        for row in zip(*np.nonzero(counts), strict=True):
            data = bytes(tails[row]).rstrip(b"\0")
            data += b"".join(self.token_bytes(int(token)) for token in rows[row][: counts[row]])
            key = data, bool(shown[row]), int(used[row]) == 0
            if key not in known:
                known[key] = self._read(*key)
            ids, tail = known[key]
            self._check(len(ids), int(used[row]), data)
            translated[row][: len(ids)] = ids
            new_lengths[row] = len(ids)
            used[row] += len(ids)
            tails[row] = np.frombuffer(tail.ljust(_TAIL, b"\0"), np.uint8)
        return Leftover(tails, used), translated, new_lengths  # pyright: ignore[reportArgumentType]

    def _read(self, data: bytes, visible: bool, is_first: bool) -> tuple[list[int], bytes]:
        """The reader's ids of the bytes of a unit, and the bytes that wait for the next one."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(data)
        step = without_excess(text, self.delimiters)
        waits = text[len(step) :] if step.strip() else text
        while len(waits.encode(errors="replace")) > _TAIL - 3:
            waits = waits[1:]
        tail = waits.encode(errors="replace") + decoder.getstate()[0]
        step = self.form.trimmed(step) if visible else ""
        return self.form.encode_step(self.encode, step, is_first) if step else [], tail

    def _check(self, length: int, used: int, data: bytes) -> None:
        shown = data[:60].decode(errors="replace")
        if length > self.max_step_tokens:
            raise ValueError(
                f"process_reward: a step has {length} tokens of the reward model, more than "
                f"max_step_tokens={self.max_step_tokens}: {shown!r}; pass a larger max_step_tokens="
            )
        if used + length > self.max_tokens:
            raise ValueError(
                f"process_reward: a trace has {used + length} tokens of the reward model or more; there is "
                f"room for {self.max_tokens}: {shown!r}; pass a larger max_step_tokens="
            )
