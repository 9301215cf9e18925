"""Load malformed models in a process of its own: `fuzz_child.py BASE WORK START STOP [SECONDS]`.

Prints `<seed> <outcome>` for every seed, flushed before and after, so that whoever started the process can
tell which seed it died of. Exit codes: 0 all well, 3 a wrong outcome; a hang ends in faulthandler's exit 1.
"""

import dataclasses
import faulthandler
import os
import resource
import sys
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import jax
import jax.numpy as jnp
from mutations import make_case

from ponder.models import load

EXPECTED = (ValueError, OSError, NotImplementedError)
HEADROOM = 1 << 30
MAX_MESSAGE = 2000

FORBIDDEN = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.putenv",
    "pty.",
    "pickle.find_class",
    "socket.",
    "urllib.",
    "http.",
    "ctypes.dlopen",
    "ctypes.call_function",
    "webbrowser.",
)
watched: list[str] | None = None
using = False
model_folder = ""


def audit(event, args):
    """Note what loading a model must not do: start or call anything, or write."""
    if watched is None:
        return
    if event.startswith(FORBIDDEN):
        watched.append(f"{event} {args!r:.200}")
    elif event == "exec":
        # Late imports run module code from installed files; anything else is code that came with the model.
        # Jinja runs a chat template so, in its sandbox: not by loading it, but by using it.
        name = getattr(args[0], "co_filename", "?")
        if name == "<template>" and using:
            return
        if name.startswith(model_folder) or not (name.startswith("<frozen") or os.path.isabs(name)):
            watched.append(f"exec {name}")
    elif event == "open" and isinstance(args[0], str | bytes):
        writes = args[2] is not None and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and os.fsdecode(args[0]) != os.devnull:
            watched.append(f"open for writing {args[0]!r}")
    elif event in (
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.symlink",
        "os.link",
        "shutil.rmtree",
    ):
        watched.append(f"{event} {args!r:.200}")


@jax.jit
def score(lm, tokens):
    return lm.score(tokens)


def use(lm):
    """What a program does with a model; fails where it is not usable."""
    bare = dataclasses.replace(lm, tokenizer=None, eos_token_ids=(), name="case")
    logits = score(bare, jnp.array([1, 2, 3], jnp.int32))
    assert logits.shape == (3, lm.vocab_size)
    assert lm.max_length > 0 and all(0 <= i < lm.vocab_size for i in lm.eos_token_ids)
    assert not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(lm.decoder))
    if lm.tokenizer is not None:
        lm.tokenizer.decode(lm.tokenizer.encode("hello  12 <|im_end|>"))
        lm.tokenizer.adds_bos  # noqa: B018
        if lm.tokenizer.has_chat_template:
            try:
                lm.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
            except ValueError as error:
                return f"loaded; {error!r:.80}"
    return "loaded"


def attempt(path):
    """Load and use; return the outcome and whether it is a right one."""
    global watched, using
    watched = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lm = load(path)
        using = True
        outcome, right = use(lm), True
    except EXPECTED as error:
        message = str(error)
        outcome = f"{type(error).__name__}: {message.replace(str(path.parent), ''):.160}"
        right = bool(message) and len(message) < MAX_MESSAGE and "\n" not in message
        right = right and (type(error) is not ValueError or path.name in message)
    except BaseException:
        outcome, right = traceback.format_exc(), False
    seen, watched, using = watched, None, False
    return (f"{outcome} BUT {seen}", False) if seen else (outcome, right)


def main(base, work, start, stop, seconds=20.0):
    global model_folder
    model_folder = str(work)
    # Everything that is imported late gets imported now, and what compiles gets compiled.
    for path in sorted(base.iterdir()):
        print("base", path.name, use(load(path)), flush=True)
    sys.addaudithook(audit)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, used + HEADROOM))
    wrong = 0
    for seed in range(start, stop):
        print(seed, end=" ", flush=True)
        path = make_case(base, work / "case", seed)
        faulthandler.dump_traceback_later(seconds, exit=True)
        outcome, right = attempt(path)
        faulthandler.cancel_dump_traceback_later()
        wrong += not right
        print("" if right else "WRONG ", outcome.replace("\n", " | "), sep="", flush=True)
    sys.exit(3 if wrong else 0)


if __name__ == "__main__":
    base, work, start, stop, *seconds = sys.argv[1:]
    main(Path(base), Path(work), int(start), int(stop), *map(float, seconds))
