"""Build a language model from its files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ponder.models.language_model import DecoderLM
from ponder.models.loading.checkpoint import Checkpoint
from ponder.models.loading.finding import EMBEDDED_MODEL, find
from ponder.models.loading.gguf import open_gguf
from ponder.models.loading.hub import open_directory
from ponder.models.messages import errors_name, quoted
from ponder.models.weights import check_shapes, from_weights

__all__ = ["load", "open_checkpoint", "reading_progress", "weight_dtype"]


def load(
    name_or_path: str | os.PathLike = EMBEDDED_MODEL,
    *,
    dtype: Any = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> DecoderLM:
    """Load a language model.

    Weights are read one tensor at a time, those of a GGUF file (the embedded model is one) dequantised on the
    way, and nothing is written.

    Files are not trusted: only safetensors and GGUF are read, never pickles, and code that comes with a
    model is never run, except for the chat template, which runs in jinja's sandbox.

    Args:
        name_or_path: "smollm2-135m-instruct" (the embedded default), a model that ponder ships, such as
            "countdown-tiny", a local directory in hub format, a .gguf file, or a hub id such as
            "owner/name". A local path goes before a hub id.
        dtype: Of the weight matrices: "float32" (the default) or "bfloat16", or a dtype.
        revision: Branch, tag or commit of a hub id; no other model has one.
        local_files_only: Never download: a hub id must be in the hub's cache already.
        progress: Called with the name of the stage, which is "reading", and the fraction of the weights that
            is on the device, 0 to 1. What it raises ends the loading.

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
    dtype, report = weight_dtype(dtype), reading_progress(progress)
    checkpoint = open_checkpoint(find(name_or_path, revision=revision, local_files_only=local_files_only))
    config, eos = checkpoint.config, checkpoint.eos_token_ids
    with errors_name(checkpoint.file):
        # What cannot fit is refused before the tokenizer is read, which takes a second.
        check_shapes(config, checkpoint.tensors.shapes)
        tokenizer = checkpoint.read_tokenizer()
        if not eos and tokenizer is not None and tokenizer.eos_token_id is not None:
            eos = (tokenizer.eos_token_id,)
        if outside := [i for i in eos if i >= config.vocab_size]:
            raise ValueError(
                f"eos_token_id {quoted(outside)} lies beyond the vocabulary of {config.vocab_size} tokens."
            )
        decoder = from_weights(config, checkpoint.tensors, dtype=dtype, progress=report)
    return DecoderLM(decoder, tokenizer, eos, name=str(name_or_path))


def open_checkpoint(path: Path) -> Checkpoint:
    """Open what `find` returns; errors are those of `open_directory` and `open_gguf`."""
    return open_directory(path) if path.is_dir() else open_gguf(path)


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


def reading_progress(progress: Callable[[str, float], None] | None) -> Callable[[float], None] | None:
    """Return the `progress` that a user gives to `load` as a function of the fraction read."""
    if progress is None:
        return None
    if not callable(progress):
        raise TypeError(f"progress: expected a function of a stage and a fraction, got {progress!r}.")
    return functools.partial(progress, "reading")
