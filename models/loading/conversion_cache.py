"""Convert a file once and keep the result, safely under crashes and concurrent processes.

A finished conversion is a directory that appears under its final name in one rename, so a name that exists
was complete once. A manifest in it, written last, holds size and checksum of the beginning of every file, so
that what was damaged later is found out and converted again. Work in progress lives beside it as
`<name>.partial-<random>`; a lock file that the system releases with the process tells abandoned work from
work still going on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no lock, so processes may work twice, but the rename still decides
    fcntl = None

__all__ = ["UnwritableCacheError", "cache_root", "converted"]

FORMAT_VERSION = 2
"""Part of every cache key: raise it when a converter writes something different."""

MANIFEST = "conversion.json"

_HEADER_BYTES = 1 << 20
_CHECKED_BYTES = 1 << 24  # tokenizer files whole, and of the weights the header
_PARTIAL = ".partial-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UnwritableCacheError(OSError):
    """No conversion can be kept, because the cache directory cannot be written to."""


def cache_root() -> Path:
    """Return `$PONDER_CACHE`, else `$XDG_CACHE_HOME/ponder`, else `~/.cache/ponder`.

    Raises:
        UnwritableCacheError: Neither is set, and there is no home directory.
    """
    if own := os.environ.get("PONDER_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "ponder"
    try:
        return Path.home() / ".cache" / "ponder"
    except RuntimeError as error:
        raise UnwritableCacheError(
            f"There is no cache ({error}). Set PONDER_CACHE to a directory."
        ) from error


def converted(path: str | os.PathLike, convert: Callable[[Path, Path], object]) -> Path:
    """Return the directory that `convert(path, directory)` makes, from the cache if it is there.

    The file is known by its name, size, modification time and first MiB, not by its folder. A conversion
    that no longer agrees with its manifest is replaced, with a `RuntimeWarning`. The middle of the weights is
    not read for that, so a flipped bit there stays unseen.

    Args:
        path: The file to convert.
        convert: Fills the empty directory given as its second argument. If it raises, nothing is kept.

    Raises:
        FileNotFoundError: `path` is no file.
        UnwritableCacheError: The cache directory cannot be written to.
        OSError: The disk is full.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a file to convert, got {str(path)!r}, which is not one.")
    root = cache_root() / "converted"
    target = root / _key(path)
    if target.is_dir() and _damage(target) is None:
        return target
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            locked = stack.enter_context(_lock(target, wait=True))
            if os.path.lexists(target):
                if (damage := _damage(target)) is None:  # another process finished while this one waited
                    return target
                warnings.warn(
                    f"The cached conversion of {path.name} is damaged ({damage}); converting again.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                _discard(target)
            if locked:
                _remove_abandoned(root, holding=target)
            partial = target.with_name(target.name + _PARTIAL + uuid.uuid4().hex)
            partial.mkdir()
        except OSError as error:
            raise UnwritableCacheError(
                f"The conversion of {path.name} needs a writable cache, but {str(root)!r} is not ({error}). "
                "Set PONDER_CACHE to a directory that is."
            ) from error
        try:
            return _convert_into(partial, target, path, convert)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise OSError(
                error.errno,
                f"the conversion of {path.name} needs more room than the cache has ({error.strerror}); "
                "set PONDER_CACHE to a directory on another disk",
                str(root),
            ) from error


def _key(path: Path) -> str:
    stat = path.stat()
    digest = hashlib.sha256(f"{FORMAT_VERSION}\0{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    with path.open("rb") as file:
        digest.update(file.read(_HEADER_BYTES))
    return f"{path.stem}-{digest.hexdigest()[:16]}"


def _convert_into(partial: Path, target: Path, path: Path, convert: Callable[[Path, Path], object]) -> Path:
    try:
        convert(path, partial)
        _write_manifest(partial)
        for entry in [*partial.rglob("*"), partial]:
            _fsync(entry)
        try:
            partial.rename(target)
        except OSError:
            # Only a non-empty directory refuses the rename: without locks, another process was first.
            if not target.is_dir():
                raise
        else:
            _fsync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_manifest(directory: Path) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    found = {path.relative_to(directory).as_posix(): _fingerprint(path) for path in files}
    (directory / MANIFEST).write_text(json.dumps({"files": found}, indent=2) + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.sha256(file.read(_CHECKED_BYTES)).hexdigest()]


def _damage(directory: Path) -> str | None:
    """Say what differs from the manifest, or None where nothing does."""
    name = MANIFEST
    try:
        recorded = json.loads((directory / name).read_text(encoding="utf-8"))["files"]
        for name, fingerprint in recorded.items():
            if _fingerprint(directory / name) != fingerprint:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{name} cannot be read: {type(error).__name__}"
    return None


def _discard(target: Path) -> None:
    """Take a damaged conversion out of the way: in one rename, so that no reader meets half of it."""
    rubbish = target.with_name(target.name + _PARTIAL + uuid.uuid4().hex)
    with contextlib.suppress(FileNotFoundError):  # without locks, another process was first
        target.rename(rubbish)
        _remove(rubbish)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(target: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a target; yield False where that is impossible or, without `wait`, it is taken.

    The lock file is removed with the lock. Whoever waited for it meanwhile holds a file that nobody else can
    find, and goes for the new one.
    """
    path = target.with_name(target.name + ".lock")
    while True:
        with path.open("a") as file:
            locked = _flock(file.fileno(), wait)
            if locked and not _is_at(path, file.fileno()):
                continue
            try:
                yield locked
            finally:
                if locked:
                    with contextlib.suppress(OSError):
                        path.unlink()
            return


def _flock(descriptor: int, wait: bool) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # taken, or a file system without locks
        return False
    return True  # until the file is closed


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_abandoned(root: Path, *, holding: Path) -> None:
    """Remove work in progress whose process is gone, that is whose lock is free (or ours)."""
    for partial in root.glob(f"*{_PARTIAL}*"):
        owner = root / partial.name.rpartition(_PARTIAL)[0]
        if owner == holding:
            _remove(partial)
            continue
        with contextlib.suppress(OSError), _lock(owner, wait=False) as locked:
            if locked:
                _remove(partial)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
