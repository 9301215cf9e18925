"""A posterior as one safetensors file, which is read back without the model that drew it.

The tensors are the posterior's arrays under their names, those of its stats as `stats.<name>`; an array that
is None is left out. The header's metadata has one entry, "ponder": a JSON document with the format and its
version, the method, the text of each trace, and the stops that the texts leave out. Nothing in the file is
executed.
"""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ponder.models.protocols import Tokenizer
from ponder.posterior.arrays import (
    PosteriorArrays,
    Stats,
    check_single,
    cut_id,
    decode,
    text_of,
    trim,
)

__all__ = ["FORMAT_VERSION", "RecordedText", "load", "replacing", "save", "sync"]

FORMAT = "ponder posterior"
FORMAT_VERSION = 1
"""Raised when a file means something else than before, so that an older ponder refuses it."""

_ENTRY = "ponder"
_STATS = "stats."

# Kind of number and shape of every array: N traces of at most T tokens, S steps. The sizes are those that the
# first array with the letter has; N comes from the weights, which are never empty.
_LAYOUT = {
    "log_weights": ("float", "N"),
    "tokens": ("int", "NT"),
    "lengths": ("int", "N"),
    "log_evidence": ("float", ""),
    "log_prior": ("float", "N"),
    "log_potential": ("float", "N"),
    "stats.num_steps": ("int", ""),
    "stats.ess": ("float", "S"),
    "stats.resampled": ("bool", "S"),
    "stats.ancestors": ("int", "SN"),
    "stats.log_evidence": ("float", "S"),
    "stats.num_tokens": ("int", "SN"),
    "stats.tokens_generated": ("int", ""),
    "stats.tokens_discarded": ("int", ""),
    "stats.model_calls": ("int", ""),
    "stats.reward_calls": ("int", ""),
    "stats.acceptance": ("float", ""),
    "stats.degenerate": ("bool", ""),
    "stats.invalid": ("bool", ""),
    "stats.ess_threshold": ("float", ""),
}
_REQUIRED = frozenset(name for name in _LAYOUT if not name.startswith(_STATS)) | {"stats.num_steps"}
_DTYPES = {"float": ("float32", "float64"), "int": ("int32", "int64"), "bool": ("bool",)}


class RecordedText:
    """The tokenizer of a loaded posterior: it knows the text of the stored traces, and nothing else."""

    def __init__(self, traces: Sequence[np.ndarray], texts: Sequence[str]):
        self._texts = {tuple(t.tolist()): text for t, text in zip(traces, texts, strict=True)}

    def __repr__(self) -> str:
        return f"RecordedText({len(self._texts)} traces)"

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a stored trace; other tokens are a ValueError."""
        try:
            return self._texts[tuple(int(i) for i in ids)]
        except KeyError:
            raise ValueError(
                f"ids: expected the tokens of one of the {len(self._texts)} stored traces, got others "
                f"({list(ids)[:8]}...); {_GIVE_TOKENIZER}"
            ) from None

    def encode(self, text: str) -> list[int]:
        """Raise ValueError: only the model's tokenizer encodes."""
        raise ValueError(f"a loaded posterior cannot encode text; {_GIVE_TOKENIZER}")

    def token_bytes(self, token_id: int) -> bytes:
        """Raise ValueError: only the model's tokenizer knows its tokens."""
        raise ValueError(f"a loaded posterior does not know single tokens; {_GIVE_TOKENIZER}")

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Raise ValueError: only the model's tokenizer has a template."""
        raise ValueError(f"a loaded posterior has no chat template; {_GIVE_TOKENIZER}")


_GIVE_TOKENIZER = "give the model's tokenizer: Posterior.load(path, tokenizer=lm.tokenizer)"


def save(posterior: PosteriorArrays, path: str | os.PathLike) -> None:
    """Write a posterior; a file of that name is replaced once the new one is complete.

    Raises:
        ValueError: it is a batch of posteriors, or its arrays do not fit together.
        OSError: the file cannot be written.
    """
    _check_path(path)
    if isinstance(posterior.tokens, Tracer):
        raise ValueError("posterior: expected values, got tracers: save it outside of jit")
    check_single(posterior)
    arrays = {name: np.asarray(value) for name, value in _arrays(posterior).items() if value is not None}
    _check(arrays)
    tokenizer, rows = posterior.tokenizer, trim(arrays["tokens"], arrays["lengths"])
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "method": posterior.method,
        "origin": posterior.origin,
        "texts": None if tokenizer is None else [text_of(posterior, tokens) for tokens in rows],
        "cut": list(posterior.cut),
    }
    from safetensors import SafetensorError
    from safetensors.numpy import save as to_bytes

    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        # As ASCII, so that lone surrogates, which UTF-8 cannot hold, come back as they were.
        data = to_bytes(contiguous, metadata={_ENTRY: json.dumps(document, ensure_ascii=True)})
    except SafetensorError as error:
        raise ValueError(f"posterior: its texts are too long for the header of the file ({error})") from error
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(data)


def load(path: str | os.PathLike, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Read what `save` wrote.

    Args:
        path: the file.
        tokenizer: of the language model; without it, `RecordedText` shows the stored texts.

    Returns:
        The fields of the posterior by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, no saved posterior, or written by a newer ponder; or the tokenizer
            gives other texts than the stored ones.
    """
    path = _check_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a saved posterior, got {str(path)!r}, which is no file")
    try:
        document, arrays = _read(path)
        _check(arrays)
        texts = _checked_texts(document, len(arrays["log_weights"]))
    except ValueError as error:
        raise ValueError(f"path: {str(path)!r} cannot be read as a saved posterior: {error}") from error
    cut = tuple(document["cut"])
    if texts is not None:
        rows = trim(arrays["tokens"], arrays["lengths"])
        if tokenizer is None:
            tokenizer = RecordedText([cut_id(row, cut) for row in rows], texts)
        elif [decode(tokenizer, tokens, cut) for tokens in rows] != texts:
            raise ValueError("tokenizer: expected that of the traces' model, got one that gives other texts")
    values = jax.device_put(arrays)
    stats = {name.removeprefix(_STATS): v for name, v in values.items() if name.startswith(_STATS)}
    fields = {name: v for name, v in values.items() if not name.startswith(_STATS)}
    named = {"method": document["method"], "origin": document["origin"], "cut": cut}
    return fields | {"tokenizer": tokenizer} | named | {"stats": Stats(**stats)}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file next to `path` that takes its place once it is complete, or vanishes.

    Raises:
        OSError: there can be no such file; the error names it, and not the temporary one.
    """
    path = path.resolve()  # through a link, its target is replaced
    _check_place(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file is on the disk: a rename may else survive a power cut, and the content not."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _check_path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected the path of a file, got {path!r}")
    return Path(path)


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected the path of a file, got a folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder does not exist", str(path.parent))
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "the folder is not writable", str(path.parent))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _arrays(posterior: PosteriorArrays) -> dict[str, Any]:
    """Return every array by its name in the file."""
    own = {name: getattr(posterior, name) for name in _LAYOUT if not name.startswith(_STATS)}
    return own | {_STATS + name: value for name, value in posterior.stats._asdict().items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            document = _document((file.metadata() or {}).get(_ENTRY))
            names = list(file.keys())
            if unknown := sorted(set(names) - set(_LAYOUT)):
                raise ValueError(f"unknown array {unknown[0]!r}")
            return document, {name: np.array(file.get_tensor(name)) for name in names}
    except (SafetensorError, TypeError, AttributeError) as error:  # the latter two: dtypes that NumPy lacks
        raise ValueError(f"it is damaged or no safetensors file ({error})") from error


def _document(text: str | None) -> dict[str, Any]:
    """Parse and check the JSON document, except for the texts."""
    if text is None:
        raise ValueError("it holds no posterior (its header has no entry 'ponder')")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"its header does not name the format {FORMAT!r}")
    version = document.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"its format version is {version!r:.40}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"it was written by a newer ponder (format version {version}; this one reads up to "
            f"{FORMAT_VERSION})"
        )
    for name in ("method", "origin"):
        if not isinstance(document.get(name), str):
            raise ValueError(f"the header's {name!r} is no text")
    cut = document.setdefault("cut", [])  # files of older versions have none
    whole = isinstance(cut, list) and all(isinstance(c, str | int) and not isinstance(c, bool) for c in cut)
    if not whole or "" in cut:
        raise ValueError("the header's 'cut' are no stop strings and token ids")
    return document


def _checked_texts(document: Mapping[str, Any], num_traces: int) -> list[str] | None:
    texts = document.get("texts")
    if texts is None:
        return None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("the header's 'texts' are no list of texts")
    if len(texts) != num_traces:
        raise ValueError(f"expected {num_traces} texts, got {len(texts)}")
    return texts


def _check(arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse arrays that are missing, of the wrong kind or shape, or hold what would break later use."""
    if missing := [name for name in _LAYOUT if name in _REQUIRED and name not in arrays]:
        raise ValueError(f"the array {missing[0]!r} is missing")
    sizes: dict[str, int] = {}
    for name, (kind, letters) in _LAYOUT.items():
        if name not in arrays:
            continue
        array = arrays[name]
        if array.dtype.name not in _DTYPES[kind]:
            raise ValueError(f"{name}: expected {_DTYPES[kind][0]}, got {array.dtype}")
        if array.ndim != len(letters):
            raise ValueError(f"{name}: expected {len(letters)} axes, got shape {array.shape}")
        for letter, size in zip(letters, array.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{name}: expected {letter}={sizes[letter]} from other arrays, got shape {array.shape}"
                )
    log_weights = arrays["log_weights"]
    if not len(log_weights) or not math.isfinite(log_weights.max()):
        raise ValueError("log_weights: expected at least one finite number, and neither NaN nor +inf")
    _check_range("lengths", arrays["lengths"], sizes["T"])
    _check_range("stats.num_steps", arrays["stats.num_steps"], sizes.get("S"))
    if "stats.ancestors" in arrays:
        _check_range("stats.ancestors", arrays["stats.ancestors"], sizes["N"] - 1)


def _check_range(name: str, array: np.ndarray, high: int | None) -> None:
    if array.size and (array.min() < 0 or (high is not None and array.max() > high)):
        expected = ">= 0" if high is None else f"in [0, {high}]"
        raise ValueError(f"{name}: expected integers {expected}, got {array.min()} to {array.max()}")
