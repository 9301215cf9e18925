"""Convert a file once and keep the result, safely under crashes and concurrent processes.

A finished conversion is a directory that appears under its final name in one rename, so a name that exists
is always complete. Work in progress lives beside it as `<name>.partial-<random>`; a lock file that the
system releases with the process tells abandoned work from work still going on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no lock, so processes may work twice, but the rename still decides
    fcntl = None

__all__ = ["cache_root", "converted"]

FORMAT_VERSION = 1
"""Part of every cache key: raise it when a converter writes something different."""

_HEADER_BYTES = 1 << 20
_PARTIAL = ".partial-"


def cache_root() -> Path:
    """Return `$PONDER_CACHE`, else `$XDG_CACHE_HOME/ponder`, else `~/.cache/ponder`."""
    if own := os.environ.get("PONDER_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "ponder"
    return Path.home() / ".cache" / "ponder"


def converted(path: str | os.PathLike, convert: Callable[[Path, Path], object]) -> Path:
    """Return the directory that `convert(path, directory)` makes, from the cache if it is there.

    The file is known by its name, size, modification time and first MiB, not by its folder.

    Args:
        path: The file to convert.
        convert: Fills the empty directory given as its second argument. If it raises, nothing is kept.

    Raises:
        FileNotFoundError: `path` is no file.
        OSError: The cache directory cannot be written to.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a file to convert, got {str(path)!r}, which is not one.")
    root = cache_root() / "converted"
    target = root / _key(path)
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock_file = _lock_file(target).open("a")
    except OSError as error:
        raise OSError(
            f"The conversion of {path.name} needs a writable cache, but {str(root)!r} is not ({error}). "
            "Set PONDER_CACHE to a directory that is."
        ) from error
    with lock_file, _locked(lock_file.fileno(), wait=True) as locked:
        if target.is_dir():  # another process finished while this one waited
            return target
        if locked:
            _remove_abandoned(root, holding=target)
        return _convert_into(target, path, convert)


def _key(path: Path) -> str:
    stat = path.stat()
    digest = hashlib.sha256(f"{FORMAT_VERSION}\0{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    with path.open("rb") as file:
        digest.update(file.read(_HEADER_BYTES))
    return f"{path.stem}-{digest.hexdigest()[:16]}"


def _convert_into(target: Path, path: Path, convert: Callable[[Path, Path], object]) -> Path:
    partial = target.with_name(target.name + _PARTIAL + uuid.uuid4().hex)
    partial.mkdir()
    try:
        convert(path, partial)
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


def _lock_file(target: Path) -> Path:
    return target.with_name(target.name + ".lock")


@contextlib.contextmanager
def _locked(descriptor: int, *, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock; yield False where that is impossible or, without `wait`, it is taken."""
    locked = False
    if fcntl is not None:
        with contextlib.suppress(OSError):  # taken, or a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
    yield locked  # closing the file, which every caller does next, gives the lock back


def _remove_abandoned(root: Path, *, holding: Path) -> None:
    """Remove work in progress whose process is gone, that is whose lock is free (or ours)."""
    for partial in root.glob(f"*{_PARTIAL}*"):
        owner = root / partial.name.rpartition(_PARTIAL)[0]
        if owner == holding:
            shutil.rmtree(partial, ignore_errors=True)
            continue
        with contextlib.suppress(OSError), _lock_file(owner).open("a") as lock_file:
            with _locked(lock_file.fileno(), wait=False) as locked:
                if locked:
                    shutil.rmtree(partial, ignore_errors=True)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
