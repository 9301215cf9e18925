"""The reasoning benchmarks run: a small job of each kind, through the command line."""

import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "reward", "methods", "expected"),
    [
        ("chain", "exact", "posterior", "expected calibration error"),
        ("countdown-five", "overconfident", "best_of_n,vote,entropic", "entropic - best_of_n at N=2"),
        ("countdown", "learned", "filter_sampled", "filter_sampled"),
    ],
)
def test_a_small_job(task, reward, methods, expected, load_script, tmp_path, monkeypatch, capsys):
    words = ["--task", task, "--reward", reward, "--methods", methods, "--particles", "2", "--problems", "3"]
    files = ["--json", str(tmp_path / "out.json")]
    if methods == "posterior":
        files += ["--calibration", str(tmp_path / "calibration.png")]
    monkeypatch.setattr(sys, "argv", ["reasoning.py", *words, "--seeds", "1", *files])

    load_script("reasoning").main()

    assert expected in capsys.readouterr().out
    assert (tmp_path / "out.json").exists()
    assert (tmp_path / "calibration.png").exists() == (methods == "posterior")
