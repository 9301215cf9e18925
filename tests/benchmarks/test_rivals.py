"""The pure parts of the comparison: medians, ratios, table, and failures that are shown."""

import sys
from pathlib import Path

import pytest

import ponder

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def rivals(load_script):
    return load_script("rivals")


@pytest.fixture(scope="module")
def rival_jobs(load_script):
    return load_script("rival_jobs")


def run(system, seconds, new_tokens=16, job="smc", **more):
    measured = {"seconds": seconds, "cpu_seconds": [2 * s for s in seconds], "peak_memory_mb": 100.0}
    facts = {"system": system, "job": job, "particles": 32, "new_tokens": new_tokens}
    return facts | measured | {"load_average_before": 0.5} | more


def test_medians_and_ratios(rivals):
    ours, theirs = rivals.summarise([run("ponder", [1.0, 9.0, 2.0]), run("other", [10.0, 8.0, 90.0])])

    assert ours["median_seconds"] == 2.0
    assert ours["tokens_per_second"] == 32 * 16 / 2.0
    assert ours["ponder_is_faster"] == 1.0
    assert theirs["ponder_is_faster"] == 5.0
    assert theirs["ponder_needs_less_cpu"] == 5.0


def test_only_the_same_job_at_the_same_length_is_compared(rivals):
    runs = [run("ponder", [1.0], new_tokens=64), run("ponder", [1.0], job="plain"), run("other", [8.0])]

    assert "ponder_is_faster" not in rivals.summarise(runs)[2]


def test_a_failure_is_shown_and_stops_no_other(rivals):
    failed = {"system": "broken", "job": "smc", "new_tokens": 16, "particles": 32, "error": "a | b\nc"}

    runs = rivals.summarise([run("ponder", [1.0], log_evidence=[1.0, 2.0]), failed, run("other", [3.0])])
    lines = rivals.table(runs).splitlines()

    assert len(lines) == 5
    assert "failed: a \\| b c" in lines[3]
    assert "3x" in lines[4]
    assert "1.50" in lines[2]
    assert {line.replace("\\|", "").count("|") for line in lines} == {12}


def test_env_must_be_new_or_ours_and_outside_the_repository(rivals, tmp_path):
    (tmp_path / "precious").write_text("kept")

    with pytest.raises(ValueError, match="one that this script made"):
        rivals.build_env(tmp_path)
    with pytest.raises(ValueError, match="outside the repository"):
        rivals.build_env(HERE / "env")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_finished_env_is_used_again(rivals, tmp_path, monkeypatch):
    commands = []

    def install(command, timeout=None):
        commands.append([str(part) for part in command])
        if "llamppl==0.2.3" in command:
            raise OSError("no such wheel")

    monkeypatch.setattr(rivals, "run", install)
    monkeypatch.setattr(rivals.venv, "create", lambda folder, with_pip: None)

    _, errors = rivals.build_env(tmp_path)
    assert errors["torch"] is None and errors["genlm-control"] is None
    assert "no such wheel" in errors["llamppl"]
    assert len(commands) == 3

    rivals.build_env(tmp_path)
    assert len(commands) == 4  # only what failed is tried again


def test_a_process_that_fails_gives_its_error(rivals, tmp_path):
    task = {"particles": 1, "new_tokens": 1, "repeats": 1}

    assert "KeyError" in rivals.do(sys.executable, "unknown", task, tmp_path, 60)["error"]
    assert "FileNotFoundError" in rivals.do(tmp_path / "python", "unknown", task, tmp_path, 60)["error"]


def test_measure_leaves_the_warm_up_out_and_refuses_short_traces(rival_jobs):
    task = {"particles": 2, "new_tokens": 3, "repeats": 4}

    def start(tokens):
        return lambda task: (lambda seed: {"tokens": tokens, "log_evidence": float(seed)}, {"dtype": "x"})

    seen = rival_jobs.measure(task, start(6))
    assert len(seen["seconds"]) == 4
    assert seen["log_evidence"] == [1.0, 2.0, 3.0, 4.0]
    assert seen["dtype"] == "x"
    with pytest.raises(RuntimeError, match="drew 5 tokens instead of 6"):
        rival_jobs.measure(task, start(5))


@pytest.mark.parametrize("name", ["ponder_plain", "ponder_smc"])
def test_the_jobs_of_ponder_run_and_fill_every_trace(rival_jobs, toy, monkeypatch, name):
    monkeypatch.setattr(ponder.models, "load", {"here": toy}.__getitem__)  # a table compiles sooner
    task = {"directory": "here", "prompt_tokens": [1, 2], "particles": 2, "new_tokens": 3}

    seen = rival_jobs.measure(task | {"repeats": 1}, rival_jobs.TASKS[name])

    assert len(seen["seconds"]) == 1
    assert ("log_evidence" in seen) == (name == "ponder_smc")
