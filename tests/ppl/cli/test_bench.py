"""`ponder bench`: what it measures on a tiny decoder, what it prints, and how it fails. Nothing is timed."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("outlines_core")

from typer.testing import CliRunner

import ponder
from ponder.cli import bench as cli_bench
from ponder.cli import measure as cli_measure
from ponder.cli.app import app
from ponder.cli.checks import Failure
from ponder.cli.measure import Floor, Run
from ponder.cli.workload import JOBS, Workload
from ponder.models import PieceTokenizer

CHECKPOINT = Path(__file__).parents[2] / "models" / "fixtures" / "tiny_qwen2"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tiny():
    lm = ponder.models.load(CHECKPOINT)
    letters = [bytes([byte]) for byte in range(32, 32 + lm.vocab_size)]
    return dataclasses.replace(lm, tokenizer=PieceTokenizer(tuple(letters)))


@pytest.fixture(scope="module")
def entry(tiny):
    """All jobs on two layers, four particles and four new tokens."""
    stages = []
    workload = Workload("tiny", None, 4, 8, 4, 2, tuple(JOBS))
    found = cli_measure.measure(tiny, workload, stages.append)
    assert stages == [
        *(f"compiling {name}" for name in JOBS),
        "compiling the matrix products",
        "run 1 of 2",
        "run 2 of 2",
    ]
    return found


@pytest.fixture
def children(monkeypatch):
    """Workloads that were given to child processes, which answer at once; or fail where told to."""
    calls, failures = [], {}

    def run_child(workload, prefix, report):
        report(f"{prefix}loading")
        calls.append(workload)
        if workload.particles in failures:
            raise failures[workload.particles]
        runs = {name: [Run(2.0, 10.0, 5.0, 100, 3)] for name in workload.jobs}
        floors = {name: [Floor(6.0, 7.0, 8.0)] for name in workload.jobs}
        return {
            "particles": workload.particles,
            "prompt_tokens": workload.prompt_tokens,
            "new_tokens": workload.new_tokens,
            "load_seconds": 1.0,
            "load_peak_memory_mb": None,
            "peak_memory_mb": 2345.6,
            **cli_measure.summary({name: of_job[0] for name, of_job in runs.items()}, runs, floors, 1000),
        }

    monkeypatch.setattr(cli_bench, "_run_child", run_child)
    run_child.calls, run_child.failures = calls, failures
    return run_child


def invoke(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)])


@pytest.mark.slow
def test_every_job_is_measured(entry, tiny):
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    assert (entry["particles"], entry["prompt_tokens"], entry["new_tokens"]) == (4, 8, 4)
    assert entry["peak_memory_mb"] is None or entry["peak_memory_mb"] > 10
    # All matrices of the decoder but an embedding that the head does not share: looking up is no product.
    weights = sum(leaf.size for leaf in jax.tree.leaves(tiny.decoder) if leaf.ndim == 2)
    weights -= 0 if tiny.decoder.head is None else tiny.decoder.embedding.size
    assert entry["gemm"]["flop_per_step"] == 2 * 4 * weights
    assert list(entry["jobs"]) == list(JOBS)
    for name, job in entry["jobs"].items():
        assert job["tokens_per_second"] > 0 and job["ms_per_step"] > 0 and job["share_of_gemm_floor"] > 0
        assert len(job["seconds"]) == 2
        assert (job["overhead_percent"] is None) == (name == "plain")
    # The last step is never followed by resampling.
    resampled = {
        name: entry["jobs"][name]["resamplings"] for name in ("plain", "smc_every_step", "regex", "text")
    }
    assert resampled == {"plain": 0, "smc_every_step": 3, "regex": 3, "text": 3}


def test_ratios_are_taken_between_neighbours():
    """The second round is ten times as slow in all respects, as on a machine that others use too."""
    slow = 10.0
    runs = {
        "plain": [Run(1.0, 10.0, 1.0, 64, 0), Run(slow, 10.0 * slow, 1.0, 64, 0)],
        "smc": [Run(1.1, 11.0, 1.0, 64, 5), Run(1.1 * slow, 11.0 * slow, 1.0, 64, 7)],
    }
    floors = {name: [Floor(5.0, 8.0, 6.0), Floor(5.0 * slow, 8.0 * slow, 6.0 * slow)] for name in runs}
    first = {name: Run(9.0, 1.0, 1.0, 64, 0) for name in runs}
    found = cli_measure.summary(first, runs, floors, flop=10**9)
    plain, smc = found["jobs"]["plain"], found["jobs"]["smc"]
    assert plain["share_of_gemm_floor"] == pytest.approx(0.5)
    assert plain["share_of_gemm_chain"] == pytest.approx(0.6)
    assert smc["share_of_gemm_floor"] == pytest.approx(5 / 11)
    assert plain["overhead_percent"] is None and smc["overhead_percent"] == pytest.approx(10.0)
    assert plain["tokens_per_second"] == pytest.approx((64 + 6.4) / 2)
    assert smc["resamplings"] == 6
    assert plain["compile_seconds"] == pytest.approx(9.0 - 5.5)
    assert found["gemm"]["gflop_per_second"]["weights_left"] == pytest.approx(1000 / 27.5)
    assert found["gemm"]["floor_ms_per_step"] == pytest.approx(27.5)


def test_a_model_without_a_tokenizer_or_room_is_refused(tiny):
    workload = Workload("tiny", None, 2, 8, 4, 1, ("plain",))
    with pytest.raises(ValueError, match="no tokenizer"):
        cli_measure.measure(dataclasses.replace(tiny, tokenizer=None), workload, lambda _: None)
    with pytest.raises(ValueError, match="exceed the model's context"):
        cli_measure.measure(tiny, dataclasses.replace(workload, prompt_tokens=4096), lambda _: None)


def test_the_default_grid(children):
    result = invoke()
    assert result.exit_code == 0, result.output
    *calls, batch = children.calls
    assert (batch.prompts, batch.particles, batch.prompt_tokens, batch.jobs) == (8, 16, 64, ("plain",))
    assert {(w.particles, w.prompt_tokens) for w in calls} == {
        (n, p) for n in (1, 8, 32, 64) for p in (64, 512)
    }
    assert {(w.new_tokens, w.repeats, w.model) for w in calls} == {(64, 3, "smollm2-135m-instruct")}
    for w in calls:
        everything = (w.particles, w.prompt_tokens) == (32, 64)
        assert w.jobs == (tuple(JOBS) if everything else ("plain", "smc"))
    assert "[8/9] 64 particles, prompt of 512 tokens: loading" in result.stderr
    assert "[8/9] 64 particles, prompt of 512 tokens: plain 10.0, smc 10.0 ms a step" in result.stderr
    assert "…" not in result.stderr  # no column is cut at 80 characters


def test_json_on_stdout_and_the_table_on_stderr(children, tmp_path):
    out = tmp_path / "out.json"
    result = invoke("--quick", "--json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert json.loads(out.read_text(encoding="utf-8")) == found
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert found["ponder"] == ponder.__version__ and found["dtype"] == "float32"
    assert set(found["machine"]) == {"system", "processor", "cores"}
    (entry,) = found["workloads"]
    assert (entry["particles"], entry["prompt_tokens"], list(entry["jobs"])) == (32, 64, ["plain", "smc"])
    header, *rows = result.stderr.partition(" N prompt")[2].splitlines()
    assert header.split() == ["job", "tok/s", "ms/step", "cost", "floor", "chain", "compile", "MB"]
    assert [row.split() for row in rows[:2]] == [
        ["32", "64", "plain", "50", "10.0", "0.60", "0.80", "0.0", "2346"],
        ["32", "64", "smc", "50", "10.0", "+0.0%", "0.60", "0.80", "0.0", "2346"],
    ]
    assert "floor:" in result.stderr


def test_options_choose_the_grid(children):
    result = invoke(
        "--particles", 2, "--particles", 2, "--prompt-tokens", 9, "--jobs", "text", "--dtype", "bfloat16"
    )
    assert result.exit_code == 0, result.output
    assert children.calls == [Workload("smollm2-135m-instruct", "bfloat16", 2, 9, 64, 3, ("plain", "text"))]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--particles", "0"], ["--particles", ">= 1", "0"]),
        (["--prompt-tokens", "-3"], ["--prompt-tokens", ">= 1", "-3"]),
        (["--new-tokens", "1"], ["--new-tokens", ">= 2", "1"]),
        (["--repeats", "0"], ["--repeats", ">= 1", "0"]),
        (["--jobs", "magic"], ["--jobs", "smc_every_step", "'magic'"]),
        (["--dtype", "int8"], ["--dtype", "int8"]),
        (["--json", "missing/out.json"], ["--json", "missing"]),
    ],
)
def test_bad_options_are_refused_before_anything_runs(children, options, words):
    result = invoke(*options)
    assert result.exit_code == 2, result.output
    assert not children.calls and not result.stdout
    assert all(word in result.stderr for word in words), result.stderr


def test_a_failure_at_the_first_point_ends_it(children):
    children.failures[1] = Failure("no such model", exit_code=2)
    result = invoke()
    assert (result.exit_code, result.stdout, len(children.calls)) == (2, "", 1)
    assert result.stderr.splitlines()[-1] == "Error: 1 particles, prompt of 64 tokens: no such model"


def test_a_later_failure_leaves_the_other_points(children):
    children.failures[64] = Failure("killed")
    result = invoke("--prompt-tokens", 64)
    assert result.exit_code == 1
    entries = json.loads(result.stdout)["workloads"]
    assert ["error" in entry for entry in entries] == [False, False, False, True, False]
    assert entries[3] == {"particles": 64, "prompt_tokens": 64, "new_tokens": 64, "error": "killed"}
    assert "64 particles, prompt of 64 tokens: killed" in result.stderr


def test_interrupt_is_one_line(children):
    children.failures[8] = KeyboardInterrupt()
    result = invoke()
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == "ponder: interrupted"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('print(\'{"error": "no room"}\')', "no room"),
        ("import sys; sys.exit('first\\nlast words')", "last words"),
        ("import sys; sys.exit(3)", "exit code 3"),
    ],
)
def test_a_child_that_fails_says_why(monkeypatch, code, message):
    answer(monkeypatch, code)
    with pytest.raises(Failure, match=message):
        cli_bench._run_child(Workload("m", None, 1, 1, 2, 1, ("plain",)), "", lambda _: None)


def test_foreign_lines_of_a_child_are_skipped(monkeypatch):
    answer(monkeypatch, "print('warning'); print('[1]'); print('{\"other\": 1}'); print('{\"result\": {}}')")
    assert cli_bench._run_child(Workload("m", None, 1, 1, 2, 1, ("plain",)), "", lambda _: None) == {}


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_a_child_that_is_killed_is_told_of(monkeypatch):
    answer(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(Failure, match="SIGKILL"):
        cli_bench._run_child(Workload("m", None, 1, 1, 2, 1, ("plain",)), "", lambda _: None)


def test_the_child_does_not_outlive_an_interrupt(monkeypatch):
    started = answer(monkeypatch, 'print(\'{"stage": "loading"}\', flush=True); import time; time.sleep(600)')

    def interrupt(stage):
        assert stage == "here: loading"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cli_bench._run_child(Workload("m", None, 1, 1, 2, 1, ("plain",)), "here: ", interrupt)
    (child,) = started
    assert child.returncode is not None


def answer(monkeypatch, code):
    """Put some code in the place of the child; return the processes started."""
    started, popen = [], subprocess.Popen

    def start(command, **options):
        assert command[1:4] == ["-P", "-m", "ponder.cli.measure"]
        started.append(popen([sys.executable, "-c", code], **options))
        return started[-1]

    monkeypatch.setattr(cli_bench.subprocess, "Popen", start)
    return started


def test_help_names_the_jobs():
    result = CliRunner().invoke(app, ["bench", "--help"])
    assert result.exit_code == 0
    assert all(name in result.output for name in JOBS)


@pytest.mark.slow
def test_the_script_measures_every_job_in_a_process_of_its_own(tmp_path):
    """On a model whose vocabulary is smaller than its width, in a folder without the sources."""
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "decode.py"), "--particles", "2"]
    command += ["--model", "chain-tiny", "--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (entry,) = json.loads(result.stdout)["workloads"]
    assert list(entry["jobs"]) == list(JOBS)
    config = ponder.models.load("chain-tiny").decoder.config
    width, vocab_size = config.hidden_size, config.vocab_size
    block = 4 * width**2 + 3 * width * config.intermediate_size
    weights = config.num_hidden_layers * block + width * vocab_size
    assert entry["gemm"]["flop_per_step"] == 2 * 2 * weights
    assert entry["load_seconds"] > 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent the POSIX way")
def test_ctrl_c_from_the_shell():
    import signal

    # A runner in the background has SIGINT ignored, and children inherit that.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += "from ponder.cli.entry import main; main()"
    command = [sys.executable, "-c", start, "bench", "--quick"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "compiling" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "ponder: interrupted" and not stdout
