"""A cached conversion is complete or absent, whatever happens to the process that makes it."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from ponder.models import conversion_cache
from ponder.models.conversion_cache import cache_root, converted


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PONDER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


def copy(path, directory):
    (directory / "copy").write_bytes(path.read_bytes())


def not_again(path, directory):
    raise AssertionError("converted a second time")


def start(source, body):
    """Run `converted(source, convert)` in a process of its own; `body` is the body of convert."""
    program = (
        "import pathlib, sys, time\nfrom ponder.models.conversion_cache import converted\n"
        f"def convert(path, directory):\n{textwrap.indent(body, '    ')}\n"
        "print(converted(sys.argv[1], convert), flush=True)"
    )
    return subprocess.Popen([sys.executable, "-c", program, str(source)], stdout=subprocess.PIPE, text=True)


def partials(cache):
    return sorted(path.name for path in cache.glob("*.partial-*"))


def test_converts_once(source, cache):
    first = converted(source, copy)
    assert (first / "copy").read_bytes() == b"weights"
    assert first.parent == cache
    assert converted(source, not_again) == first
    assert partials(cache) == []


def test_key(source, tmp_path):
    first = converted(source, copy)
    # The same file elsewhere is the same file.
    (tmp_path / "elsewhere").mkdir()
    moved = source.rename(tmp_path / "elsewhere" / source.name)
    assert converted(moved, not_again) == first
    # Another time, size, content or name is another file.
    stat = moved.stat()
    os.utime(moved, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    keys = {first, converted(moved, copy)}
    moved.write_bytes(b"weights!")
    keys.add(converted(moved, copy))
    moved.write_bytes(b"Weights!")
    os.utime(moved, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    keys.add(converted(moved, copy))
    keys.add(converted(moved.rename(tmp_path / "other.gguf"), copy))
    assert len(keys) == 5


def test_format_version_is_part_of_the_key(source, monkeypatch):
    first = converted(source, copy)
    monkeypatch.setattr(conversion_cache, "FORMAT_VERSION", conversion_cache.FORMAT_VERSION + 1)
    assert converted(source, copy) != first


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_nothing(error, source, cache):
    def fail(path, directory):
        copy(path, directory)
        raise error("halfway")

    with pytest.raises(error, match="halfway"):
        converted(source, fail)
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    assert (converted(source, copy) / "copy").exists()


def test_killed_process(source, cache):
    halfway = '(directory / "copy").write_bytes(b"wei")\nprint("halfway", flush=True)\ntime.sleep(60)'
    process = start(source, halfway)
    assert process.stdout is not None and process.stdout.readline() == "halfway\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(partials(cache)) == 1
    assert [path.name for path in cache.iterdir() if path.is_dir()] == partials(cache)

    assert (converted(source, copy) / "copy").read_bytes() == b"weights"
    assert partials(cache) == []


def test_work_of_others_is_removed_only_if_abandoned(source, cache, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"other")
    wait = 'print("halfway", flush=True)\nsys.stdin.read()\n(directory / "copy").write_bytes(b"done")'
    process = start(other, wait.replace("sys.stdin.read()", "time.sleep(3)"))
    assert process.stdout is not None and process.stdout.readline() == "halfway\n"
    converted(source, copy)
    assert len(partials(cache)) == 1  # alive: left alone
    process.kill()
    process.communicate()
    third = tmp_path / "third.gguf"
    third.write_bytes(b"third")
    converted(third, copy)
    assert partials(cache) == []


def test_concurrent_processes_convert_once(source, tmp_path):
    log = tmp_path / "log"
    body = (
        f'with open({str(log)!r}, "a") as file: file.write("x")\ntime.sleep(0.5)\n(directory / "a").touch()'
    )
    processes = [start(source, body) for _ in range(3)]
    outputs = {process.communicate(timeout=120)[0] for process in processes}
    assert len(outputs) == 1
    assert all(process.returncode == 0 for process in processes)
    assert log.read_text() == "x"


def test_threads_convert_once(source):
    calls, results = [], []

    def slow(path, directory):
        calls.append(directory)
        copy(path, directory)

    threads = [threading.Thread(target=lambda: results.append(converted(source, slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(set(results)) == 1 and len(results) == 4


def test_without_locks_the_first_to_finish_wins(source, cache, monkeypatch):
    monkeypatch.setattr(conversion_cache, "fcntl", None)

    def overtaken(path, directory):
        converted(source, lambda _, inner: (inner / "winner").touch())
        (directory / "loser").touch()

    result = converted(source, overtaken)
    assert [path.name for path in result.iterdir()] == ["winner"]
    assert partials(cache) == []


def test_where_the_cache_is(tmp_path, monkeypatch):
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("PONDER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "ponder"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "ponder"


def test_errors(source, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="path: expected a file to convert"):
        converted(tmp_path / "absent.gguf", copy)
    monkeypatch.setenv("PONDER_CACHE", str(source))  # a file, so no directory can be made in it
    with pytest.raises(OSError, match="Set PONDER_CACHE to a directory that is"):
        converted(source, copy)
