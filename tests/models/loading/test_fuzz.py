"""A thousand malformed models: each is loaded and usable, or refused with one clear line.

The cases run in processes of their own (`fuzz_child.py`), under limits of time and memory and an audit hook
that sees code, processes, sockets and files. Every case follows from its seed: see `mutations.make_case`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent.parent / "fixtures"
CHILD = Path(__file__).parent / "fuzz_child.py"


@pytest.fixture
def base(write_gguf, tmp_path):
    """Sound models to mutate: three GGUF files, a directory with a tokenizer, and two without."""
    from safetensors.numpy import save_file

    from ponder.models.loading.gguf import open_gguf

    folder = tmp_path / "base"
    folder.mkdir()
    for name, architecture in (
        ("tiny_llama_sharded", "llama"),
        ("tiny_qwen2", "qwen2"),
        ("tiny_qwen3", "qwen3"),
    ):
        quantize = ("token_embd.weight",) if architecture == "llama" else ()
        path = write_gguf(name, architecture=architecture, quantize=quantize, file=f"{architecture}.gguf")
        shutil.move(path, folder / path.name)
    checkpoint, hub = open_gguf(folder / "llama.gguf"), folder / "with_tokenizer"
    checkpoint.read_tokenizer().hub_tokenizer.save_pretrained(hub, save_jinja_files=False)
    save_file(dict(checkpoint.tensors), hub / "model.safetensors")
    (hub / "config.json").write_text(json.dumps(checkpoint.raw_config, indent=2))
    for name in ("tiny_llama_sharded", "tiny_llama3_bf16"):
        shutil.copytree(FIXTURES / name, folder / name, ignore=shutil.ignore_patterns("*.npz"))
    return folder


def run(base, work, start, stop, timeout):
    """Run the seeds; return the outcome of each, failing on the first that ends the process."""
    work.mkdir()
    command = [sys.executable, str(CHILD), str(base), str(work), str(start), str(stop)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        out = (error.stdout or b"").decode(errors="replace")
        pytest.fail(f"hangs at seed {out.splitlines()[-1:]}")
    lines = result.stdout.splitlines()
    wrong = [line for line in lines if " WRONG " in line]
    assert not wrong, "\n".join([*wrong, result.stdout[-3000:]])
    assert result.returncode == 0, (
        f"process ended with {result.returncode} at seed {lines[-1:]}: {result.stderr}"
    )
    outcomes = [line.partition(" ")[2] for line in lines if line.split(" ")[0].isdigit()]
    assert len(outcomes) == stop - start
    return outcomes


SABOTAGE = """
import os, pathlib, pickle, socket, sys, time
sys.path.insert(0, sys.argv[1])
import fuzz_child
work = pathlib.Path(sys.argv[2])
print_nothing = b"cposix\\nsystem\\n(S'true'\\ntR."
deeds = [
    lambda: os.system("true"),
    lambda: pickle.loads(print_nothing),
    lambda: socket.socket().close(),
    lambda: exec(compile("1", "<model>", "exec")),
    lambda: open(work.parent / "outside", "w").close(),
    lambda: bytearray(1 << 33),
    lambda: [][0],
    lambda: (_ for _ in ()).throw(ValueError("two\\nlines")),
    lambda: time.sleep(600),
]
fuzz_child.make_case = lambda base, out, seed: pathlib.Path(str(seed))
fuzz_child.use = lambda lm: "loaded"
fuzz_child.load = lambda path: deeds[int(path.name)]()
fuzz_child.main(work / "base", work, 0, len(deeds), seconds=2.0)
"""


def test_misdeeds_are_noticed(tmp_path):
    """The power of the tests below: each misdeed of a loader is a wrong outcome, and a hang ends."""
    work = tmp_path / "work"
    (work / "base").mkdir(parents=True)
    command = [sys.executable, "-c", SABOTAGE, str(CHILD.parent), str(work)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = result.stdout.splitlines()
    assert result.returncode == 1 and lines[-1] == "8 ", result.stderr
    words = ["os.system", "pickle.find_class", "socket.", "exec <model>", "open for writing"]
    words += ["MemoryError", "IndexError", "two"]
    wrong = [line for line in lines if " WRONG " in line]
    assert [line.split()[0] for line in wrong] == [str(i) for i in range(8)]
    assert all(word in line for word, line in zip(words, wrong, strict=True))


def test_fifty_malformed_models(base, tmp_path):
    outcomes = run(base, tmp_path / "work", 0, 50, timeout=300)
    loaded = sum(outcome.startswith("loaded") for outcome in outcomes)
    # A mutator that breaks everything at the first byte, or nothing, would test little.
    assert 2 <= loaded <= 40


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 3000, 500))
def test_two_thousand_malformed_models(start, base, tmp_path):
    outcomes = run(base, tmp_path / "work", start, start + 500, timeout=1800)
    assert len({outcome[:70] for outcome in outcomes}) > 60
