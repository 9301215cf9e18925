"""Model directories in hub format: config.json, safetensors weights, tokenizer files.

Only safetensors are read. A pickled checkpoint can run code when it is opened, so it is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy; safetensors fails on bf16 without it
import numpy as np

from ponder.models.config import FAMILY_DEFAULTS, SUPPORTED_FAMILIES, DecoderConfig
from ponder.models.loading.checkpoint import Checkpoint
from ponder.models.loading.tokenizer import HubTokenizer, has_tokenizer
from ponder.models.messages import errors_name, quoted
from ponder.models.weights import LazyTensors

__all__ = ["eos_token_ids", "open_directory", "read_config", "read_json", "read_tensors", "snapshot"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_JSON_BYTES = 1 << 26  # the index of the largest models is below 2^22

_ALLOW_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
# Subfolders and `consolidated` files hold a second copy of the weights in the publisher's own format.
_IGNORE_PATTERNS = ["*/*", "consolidated*"]


def open_directory(directory: str | os.PathLike) -> Checkpoint:
    """Open a directory in hub format; only headers are read of the weights.

    Raises:
        FileNotFoundError: There is no config.json, or weights are missing.
        ValueError: A file is damaged, or the index of the shards contradicts them.
        NotImplementedError: The architecture or a quantisation is not supported.
    """
    directory = Path(directory)

    def read_tokenizer() -> HubTokenizer | None:
        return HubTokenizer.from_directory(directory) if has_tokenizer(directory) else None

    raw_config = read_config(directory)
    with errors_name(str(directory)):
        _refuse_quantised(raw_config)
        return Checkpoint(
            file=str(directory),
            raw_config=raw_config,
            config=DecoderConfig.from_hf(raw_config),
            eos_token_ids=eos_token_ids(directory, raw_config),
            tensors=read_tensors(directory),
            read_tokenizer=lambda: (
                HubTokenizer.from_directory(directory) if has_tokenizer(directory) else None
            ),
        )


def _refuse_quantised(raw_config: Mapping[str, Any]) -> None:
    if method := raw_config.get("quantization_config"):
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise NotImplementedError(
            f"the model is quantised ({textwrap.shorten(str(kind), 40)}), which is not supported in "
            "safetensors; use the unquantised checkpoint or a .gguf file."
        )


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """Return config.json as a dict.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: It is not a JSON object.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        found = sorted(entry.name for entry in Path(directory).iterdir())[:10]
        raise FileNotFoundError(
            f"A model directory in hub format needs config.json; {str(directory)!r} has "
            f"{quoted(found) if found else 'no files'}."
        )
    return read_json(path)


def eos_token_ids(directory: str | os.PathLike, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids that end a generation: from generation_config.json, else from `config`, else none.

    generation_config.json goes first because chat models end a turn with a token that config.json of the
    same repository often does not name. Where config.json lacks the key, its family's default holds.
    """
    path = Path(directory) / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    family = config.get("model_type")
    if family in SUPPORTED_FAMILIES and "eos_token_id" not in config:
        config = {"eos_token_id": FAMILY_DEFAULTS[family]["eos_token_id"]}
    for where, source in (("generation_config.json", generation), ("config.json", config)):
        ids = source.get("eos_token_id")
        if ids is None or ids == []:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(
                f"eos_token_id in {where}: expected token ids, an int or a list, got {quoted(ids)}."
            )
        return tuple(dict.fromkeys(ids))
    return ()


def read_tensors(directory: str | os.PathLike) -> LazyTensors:
    """Return the tensors of a model, from one safetensors file or from the shards that an index names.

    Only headers are read here. A tensor has the dtype that is stored (bfloat16 as `ml_dtypes.bfloat16`).

    Raises:
        FileNotFoundError: No safetensors, or a shard that the index names is missing.
        ValueError: A file is damaged, or the index names a tensor its shard lacks or a file elsewhere.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, Path] = {}
    for path, names in _files(Path(directory)):
        with _opened(path) as file:
            stored = set(file.keys())
            if missing := [name for name in names or () if name not in stored]:
                raise ValueError(
                    f"{INDEX_FILE} places {quoted(missing[:3])} in {path.name!r}, which does not hold "
                    f"{'it' if len(missing) == 1 else f'these {len(missing)} tensors'}."
                )
            for name in sorted(stored) if names is None else names:
                shapes[name], places[name] = tuple(file.get_slice(name).get_shape()), path

    def read(name: str) -> np.ndarray:
        with _opened(places[name]) as file:
            return file.get_tensor(name)

    return LazyTensors(shapes, read)


def snapshot(name: str, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """Return the local copy of a hub repository, downloading what is missing.

    `HF_HUB_OFFLINE=1` or `local_files_only` restrict it to what is already downloaded.

    Raises:
        OSError: The repository is neither downloaded nor reachable.
    """
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=_ALLOW_PATTERNS,
                ignore_patterns=_IGNORE_PATTERNS,
            )
        )
    except huggingface_hub.errors.HFValidationError as error:
        raise ValueError(f"name_or_path: {name!r} is not a valid hub id: {error}") from error
    except OSError as error:
        offline = local_files_only or huggingface_hub.constants.HF_HUB_OFFLINE
        why = "downloads are switched off" if offline else "the hub could not provide it"
        at = "" if revision is None else f" at revision {revision!r}"
        raise OSError(
            f"The model {name!r}{at} is not among the downloaded ones, and {why} ({type(error).__name__}: "
            f"{str(error).strip()}). Without a network, pass a local model directory or a .gguf file."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, with an error that names the file."""
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{str(path)!r}: expected at most {_MAX_JSON_BYTES} bytes of JSON, got {size}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r}: expected a JSON object, got {type(value).__name__}.")
    return value


def _files(directory: Path) -> list[tuple[Path, list[str] | None]]:
    """List the safetensors files with the tensors wanted from each; None is all of them."""
    if (directory / SINGLE_FILE).is_file():
        return [(directory / SINGLE_FILE, None)]
    if not (directory / INDEX_FILE).is_file():
        raise FileNotFoundError(_no_weights_message(directory))
    files: list[tuple[Path, list[str] | None]] = []
    for file_name, names in _shards(directory / INDEX_FILE).items():
        path = _path_inside(directory, file_name)
        if not path.is_file():
            raise FileNotFoundError(
                f"{INDEX_FILE} names the shard {quoted(file_name)}, but {str(directory)!r} has no such file."
            )
        files.append((path, names))
    return files


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file, whose pages count as this process's memory only as long as it is open."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, TypeError) as error:  # TypeError: a dtype that numpy does not have
        reason = textwrap.shorten(str(error), 300)
        raise ValueError(f"{str(path)!r} is damaged or not a safetensors file: {reason}") from error


def _shards(index_path: Path) -> dict[str, list[str]]:
    """Invert the index: file name -> names of its tensors, so that each file is opened once."""
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{str(index_path)!r}: expected 'weight_map' from tensor names to file names.")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        shards.setdefault(file, []).append(name)
    return shards


def _path_inside(directory: Path, file_name: str) -> Path:
    """Join, refusing names that lead out of the directory.

    The check is on the name alone: files of a downloaded snapshot are links to a store elsewhere.
    """
    posix, windows = PurePosixPath(file_name), PureWindowsPath(file_name)
    if posix.is_absolute() or windows.anchor or ".." in (*posix.parts, *windows.parts):
        raise ValueError(
            f"{INDEX_FILE} names the shard {quoted(file_name)}, which lies outside of {str(directory)!r}."
        )
    return directory / file_name


def _no_weights_message(directory: Path) -> str:
    message = f"No weights in {str(directory)!r}: expected {SINGLE_FILE} or {INDEX_FILE}"
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    if pickled:
        return (
            f"{message}, found {pickled[0]!r}. Pickled checkpoints are not read, because opening one can run "
            "code: save the model as safetensors (save_pretrained does)."
        )
    if gguf := sorted(p.name for p in directory.glob("*.gguf")):
        return f"{message}, found {gguf[0]!r}. Pass the path of the .gguf file itself."
    return f"{message}."
