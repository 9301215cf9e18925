"""Where the command line keeps what it compiles."""

import pytest

from ponder.cli.compilation import cache_root, keep_compilations


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PONDER_CACHE", str(tmp_path / "cache"))
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("PONDER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "ponder"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "ponder"


def test_no_home_means_no_cache(monkeypatch):
    monkeypatch.delenv("PONDER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    with pytest.raises(RuntimeError, match="home directory"):
        cache_root()
    settings = {}
    monkeypatch.setattr("jax.config.update", settings.__setitem__)
    keep_compilations()
    assert not settings
