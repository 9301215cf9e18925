"""Compiled programs that the command line keeps, so that a second start need not compile them again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax

__all__ = ["cache_root", "keep_compilations"]

_MIN_SECONDS = 0.5
_NUM_KEPT = 200  # of about 200 kB each


def keep_compilations() -> None:
    """Let JAX keep what it compiles in the cache folder, under `xla`; do nothing where that is impossible.

    Programs that call the host, such as `ponder.text`, are never kept. A folder that the user gave JAX
    (`JAX_COMPILATION_CACHE_DIR`) stays the one in use. JAX's own limit on the size is not used, since a
    process killed between its two files would make every later one warn.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    try:
        folder = cache_root() / "xla" / _processor()
    except RuntimeError:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            return
        for entry in sorted(folder.glob("*-cache"), key=lambda path: path.stat().st_mtime)[:-_NUM_KEPT]:
            entry.unlink(missing_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
        # A damaged entry, or a full disk, costs a compilation and nothing else.
        warnings.filterwarnings("ignore", message=".*persistent compilation cache entry.*")


def cache_root() -> Path:
    """Return `$PONDER_CACHE`, else `$XDG_CACHE_HOME/ponder`, else `~/.cache/ponder`.

    Raises:
        RuntimeError: There is no home directory where one is needed.
    """
    if own := os.environ.get("PONDER_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "ponder"
    return Path.home() / ".cache" / "ponder"


def _processor() -> str:
    """Name the instruction set: machines that share a home folder must not run each other's programs."""
    features = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        features += next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return hashlib.sha256(features.encode()).hexdigest()[:16]
