"""Kill conversions at every step that touches a file: `kill_child.py MODEL.gguf CACHE`.

One process imports everything and forks. A first child converts undisturbed and counts its file events (seen
by an audit hook) and written tensors; then, for each of them, a child is killed with SIGKILL right before it,
and a second child has to end up with the same files as the first. Prints the number of events; exits with 1
on the first difference.
"""

import hashlib
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import gguf  # noqa: F401 - imported here once, and not in every child
import safetensors  # noqa: F401
import tokenizers  # noqa: F401

from ponder.models.loading.loading import resolve

warnings.simplefilter("ignore")  # jax warns of any fork; no array exists yet
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def forked(body):
    """Run `body` in a child; return its exit status."""
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(9)
    return os.waitpid(child, 0)[1]


def contents(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def main(model, cache):
    os.environ["PONDER_CACHE"] = str(cache)
    report = cache / "report"

    def convert_until(limit):
        count = 0

        def step(*_):
            nonlocal count
            count += 1
            if count == limit:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # the signal is on its way

        sys.addaudithook(lambda event, args: event in EVENTS and str(cache) in str(args[0]) and step())
        directory = resolve(model, progress=step)
        report.write_text(f"{count}\n{contents(directory)}")

    def fresh():
        for path in sorted(cache.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    cache.mkdir()
    assert forked(lambda: convert_until(None)) == 0
    num_events, expected = report.read_text().split("\n")
    for limit in range(1, int(num_events) + 1):
        fresh()
        status = forked(lambda limit=limit: convert_until(limit))
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (limit, status)
        assert forked(lambda: convert_until(None)) == 0, limit
        assert report.read_text().split("\n")[1] == expected, limit
        left = [path.name for path in (cache / "converted").iterdir() if ".partial-" in path.name]
        assert not left, (limit, left)
    print(num_events)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
