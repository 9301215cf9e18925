"""A cached conversion is complete or absent, whatever happens to the process that makes it."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from ponder.models.loading import conversion_cache
from ponder.models.loading.conversion_cache import UnwritableCacheError, cache_root, converted


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


def start(source, body, **settings):
    """Run `converted(source, convert)` in a process of its own; `body` is the body of convert."""
    program = (
        "import pathlib, sys, time\nfrom ponder.models.loading.conversion_cache import converted\n"
        f"def convert(path, directory):\n{textwrap.indent(body, '    ')}\n"
        "print(converted(sys.argv[1], convert), flush=True)"
    )
    command = [sys.executable, "-c", program, str(source)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **settings)


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
    assert list(cache.iterdir()) == []
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


def test_a_lock_file_that_was_removed_locks_nothing(source, cache):
    """Who waits for a lock whose file goes with it shares the new file with those that come later."""
    target = cache / "name"
    cache.mkdir(parents=True)
    order, holds = [], threading.Lock()

    def work(number):
        with conversion_cache._lock(target, wait=True) as locked:
            assert locked and holds.acquire(blocking=False)
            order.append(number)
            holds.release()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(order) == list(range(32)) and list(cache.iterdir()) == []


def test_without_locks_the_first_to_finish_wins(source, cache, monkeypatch):
    monkeypatch.setattr(conversion_cache, "fcntl", None)

    def overtaken(path, directory):
        converted(source, lambda _, inner: (inner / "winner").touch())
        (directory / "loser").touch()

    result = converted(source, overtaken)
    assert sorted(path.name for path in result.iterdir()) == ["conversion.json", "winner"]
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
    with pytest.raises(UnwritableCacheError, match="Set PONDER_CACHE to a directory that is"):
        converted(source, copy)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_step(write_gguf, tmp_path):
    """A real conversion, killed with SIGKILL before each file event and tensor, and then done again."""
    path = write_gguf("tiny_llama_sharded", architecture="llama")
    child = Path(__file__).parent / "kill_child.py"
    command = [sys.executable, str(child), str(path), str(tmp_path / "killed")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 30


@pytest.mark.parametrize("keep", [0, 3, -1])
def test_truncated_conversion_is_done_again(keep, source):
    first = converted(source, copy)
    (first / "copy").write_bytes((first / "copy").read_bytes()[:keep])
    with pytest.warns(RuntimeWarning, match=r"conversion of model.gguf is damaged \(copy has changed\)"):
        assert converted(source, copy) == first
    assert (first / "copy").read_bytes() == b"weights"
    assert converted(source, not_again) == first


@pytest.mark.parametrize(
    "damage",
    [
        lambda directory: (directory / "copy").write_bytes(b"Weights"),
        lambda directory: (directory / "copy").unlink(),
        lambda directory: (directory / "conversion.json").unlink(),
        lambda directory: (directory / "conversion.json").write_text("{"),
        lambda directory: (directory / "conversion.json").write_text("[]"),
        lambda directory: (directory / "conversion.json").write_text('{"files": []}'),
        lambda directory: (directory / "conversion.json").write_text('{"files": {"copy": 3}}'),
        lambda directory: (directory / "conversion.json").write_bytes(b"\xff"),
        lambda directory: (directory / "conversion.json").write_text("[" * 100_000),
        lambda directory: (shutil.rmtree(directory), directory.write_text("a file")),
        lambda directory: (shutil.rmtree(directory), directory.symlink_to("nowhere")),
    ],
)
def test_damaged_conversion_is_done_again(damage, source, cache):
    first = converted(source, copy)
    damage(first)
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert converted(source, copy) == first
    assert (first / "copy").read_bytes() == b"weights" and partials(cache) == []


def test_damage_beyond_the_checked_beginning_is_seen_by_size_only(source, monkeypatch):
    """What the docstring says; the power of the checks above."""
    monkeypatch.setattr(conversion_cache, "_CHECKED_BYTES", 4)
    first = converted(source, copy)
    (first / "copy").write_bytes(b"weigHTS")
    assert converted(source, not_again) == first


def test_full_disk(source, cache):
    def fill(path, directory):
        (directory / "copy").write_bytes(b"wei")
        raise OSError(errno.ENOSPC, "No space left on device", str(directory / "copy"))

    with pytest.raises(OSError, match=r"needs more room .*No space left.*; set PONDER_CACHE") as caught:
        converted(source, fill)
    assert caught.value.errno == errno.ENOSPC
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    assert (converted(source, copy) / "copy").exists()


def test_full_disk_is_seen_before_the_work(tmp_path, monkeypatch):
    from ponder.models.loading.safetensors_writer import write_safetensors

    usage = shutil.disk_usage(tmp_path)._replace(free=999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    path = tmp_path / "x.safetensors"
    with pytest.raises(OSError, match="need 0 MB, but only 0 MB are free"):
        write_safetensors(path, {"x": (250,)}, {"x": lambda: pytest.fail("computed in vain")})
    assert not path.exists()


def test_file_size_limit(source, cache):
    """A real limit of the system on what a process may write, which is a full disk to it."""
    body = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        '(directory / "copy").write_bytes(bytes(5000))'
    )
    process = start(source, body, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "needs more room than the cache has" in errors
    assert [path for path in cache.iterdir() if path.is_dir()] == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directory(source, cache):
    cache.mkdir(parents=True)
    cache.chmod(0o500)
    try:
        with pytest.raises(UnwritableCacheError, match="needs a writable cache"):
            converted(source, copy)
    finally:
        cache.chmod(0o700)


def test_no_home(monkeypatch):
    monkeypatch.delenv("PONDER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", no_home)
    with pytest.raises(UnwritableCacheError, match="Set PONDER_CACHE to a directory"):
        cache_root()
