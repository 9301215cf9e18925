"""The law that evidence on text does not depend on tokens: one text, cut in several ways, has one value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ponder.bases import BasePotential, UnboundPotential
from ponder.foreign import as_evidence, as_potential
from ponder.models.protocols import LanguageModel
from ponder.potentials.combining import Product
from ponder.program.step import CompiledStep, Step, compile_step
from ponder.protocols import Context, Potential

__all__ = ["check_texts", "cuts", "is_of_text"]

_NUM_CUTS = 5


def is_of_text(potential: Any) -> bool:
    """Whether a potential, or what it wraps, says that it is a function of the text: `of_text` is true."""
    while not hasattr(potential, "of_text") and hasattr(potential, "potential"):
        potential = potential.potential
    return bool(getattr(potential, "of_text", False))


def check_texts(
    potential: Potential | UnboundPotential,
    lm: LanguageModel,
    unit: str | Step,
    key: jax.Array,
    *,
    num_texts: int,
    num_pieces: int,
    atol: float,
) -> None:
    """Check law 7 of `ponder.testing.check_potential`, where the potential is `of_text`.

    Args:
        potential: what to check; of a product, every factor by itself.
        lm: its vocabulary cuts the texts.
        unit: of the program, "token" for the whole text as one unit.
        key: of the texts.
        num_texts: how many.
        num_pieces: tokens and runs of delimiters in each.
        atol: largest difference of log values that counts as equal.

    Raises:
        AssertionError: two tokenisations of a text have different values.
    """
    if lm.tokenizer is None:
        return
    pieces = [lm.tokenizer.token_bytes(token) for token in range(lm.vocab_size)]
    tokens: dict[bytes, int] = {}
    for token, piece in enumerate(pieces):
        if piece and token not in lm.eos_token_ids:
            tokens.setdefault(piece, token)
    if not tokens:
        return
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).astype(np.uint32))
    texts = [_text(rng, list(tokens), unit, num_pieces) for _ in range(num_texts)]
    limit = max(map(len, texts))
    step = compile_step(unit, lm, limit)
    settings: dict[str, Any] = {}
    if step is not None:
        settings = {"max_unit_tokens": step.max_tokens, "delimiters": step.delimiters}
    bound = as_potential(as_evidence(potential).bind(Context(lm, limit, ((0,),), **settings)))
    for factor in bound.potentials if isinstance(bound, Product) else (bound,):
        if not is_of_text(factor):
            continue
        reader = _reader(factor, step)
        for text in texts:
            if rows := cuts(text, tokens, rng, _NUM_CUTS):
                _compare(*reader(rows, limit), rows, pieces, atol)


def _reader(
    potential: BasePotential, step: CompiledStep | None
) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """A function of rows of tokens and their limit: the values [N], and where steps end [N, T]."""

    @jax.jit
    def read(state: Any, watch: jax.Array, token: jax.Array, active: jax.Array) -> Any:
        state, ends = potential.update(state, token, active), jnp.zeros(token.shape, bool)
        if step is not None:
            watch = jnp.where(active, step.delimiter.advance(watch, token), watch)
            ends = active & step.delimiter.is_stopped(watch)
            state = potential.commit(state, ends)
            watch = jnp.where(ends, step.delimiter.init(token.shape[0]), watch)
        return state, watch, ends

    @jax.jit
    def finish(state: Any, rows: jax.Array) -> jax.Array:
        return potential.log_complete(potential.commit(state, rows))

    def run(rows: list[list[int]], limit: int) -> tuple[np.ndarray, np.ndarray]:
        padded = np.zeros((len(rows), limit), np.int32)
        for line, row in zip(padded, rows, strict=True):
            line[: len(row)] = row
        active = np.arange(limit) < np.array([[len(row)] for row in rows])
        state, ended = potential.init(len(rows)), []
        watch = jnp.zeros(len(rows), jnp.int32) if step is None else step.delimiter.init(len(rows))
        for token, reads in zip(padded.T, active.T, strict=True):
            state, watch, ends = read(state, watch, jnp.asarray(token), jnp.asarray(reads))
            ended.append(np.asarray(ends))
        return np.asarray(finish(state, jnp.ones(len(rows), bool))), np.stack(ended, axis=1)

    return run


def _compare(
    values: np.ndarray, ended: np.ndarray, rows: list[list[int]], pieces: list[bytes], atol: float
) -> None:
    """Refuse different values of rows that have the same steps."""
    first: dict[tuple[str, ...], int] = {}
    for index, row in enumerate(rows):
        other = first.setdefault(_steps(row, ended[index], pieces), index)
        same = np.isclose(values[index], values[other], rtol=1e-5, atol=atol)
        assert same or values[index] == values[other], (
            f"text {b''.join(pieces[token] for token in row)!r}: log_complete is {values[other]} cut as "
            f"{[pieces[token] for token in rows[other]]}, and {values[index]} cut as "
            f"{[pieces[token] for token in row]}; expected a function of the text"
        )


def cuts(text: bytes, tokens: dict[bytes, int], rng: np.random.Generator, count: int) -> list[list[int]]:
    """Cut a text into tokens in `count` ways: the shortest tokens, the longest, and random ones.

    Returns an empty list where the tokens cannot spell the text.
    """
    longest = max(map(len, tokens))
    # Pieces with which a text can begin at each place and be spelt to its end.
    begins: list[list[bytes]] = [[] for _ in text]
    for place in reversed(range(len(text))):
        for end in range(place + 1, min(place + longest, len(text)) + 1):
            if text[place:end] in tokens and (end == len(text) or begins[end]):
                begins[place].append(text[place:end])
    if not text or not begins[0]:
        return []

    def cut(way: int) -> list[int]:
        row, place = [], 0
        while place < len(text):
            fits = begins[place]  # the shortest first
            piece = fits[0] if way == 0 else fits[-1] if way == 1 else fits[rng.integers(len(fits))]
            row.append(tokens[piece])
            place += len(piece)
        return row

    return [cut(way) for way in range(count)]


def _text(rng: np.random.Generator, pieces: list[bytes], unit: str | Step, count: int) -> bytes:
    """Random tokens and, with steps, runs of one to three delimiters."""
    delimiters = [] if isinstance(unit, str) else unit.delimiter
    strings = [delimiters] if isinstance(delimiters, str) else delimiters
    strings = [item.encode() for item in np.atleast_1d(np.array(strings, object)) if isinstance(item, str)]
    text = b""
    for _ in range(count):
        if strings and rng.random() < 0.5:
            text += strings[rng.integers(len(strings))] * int(rng.integers(1, 4))
        else:
            text += pieces[rng.integers(len(pieces))]
    return text


def _steps(row: list[int], ended: np.ndarray, pieces: list[bytes]) -> tuple[str, ...]:
    """The visible texts of the steps that a row of tokens falls into."""
    steps, step = [], b""
    for token, ends in zip(row, ended, strict=False):
        step += pieces[token]
        if ends:
            steps, step = [*steps, step], b""
    texts = [text.decode(errors="replace").strip() for text in [*steps, step]]
    return tuple(text for text in texts if text)
