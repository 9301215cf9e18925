"""The training scripts: they understand the commands of the models' card, and a short run ends well."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import ponder
from ponder.models.loading.shipped import CHECKPOINTS, SHIPPED_MODELS
from ponder.tasks.training import countdown, operation_chain
from ponder.tasks.training.policy_traces import policy_traces
from ponder.tasks.training.run import TrainingRun

SCRIPTS = {"countdown": countdown, "operation_chain": operation_chain}
COMMANDS = re.findall(
    r"^\| (\S+) \| `(\w+) ([^`]+)`", (CHECKPOINTS / "README.md").read_text(encoding="utf-8"), re.M
)


def test_the_card_has_a_command_for_every_model():
    assert sorted(name for name, _, _ in COMMANDS) == sorted(SHIPPED_MODELS)


@pytest.mark.parametrize(("name", "script", "options"), COMMANDS, ids=[name for name, _, _ in COMMANDS])
def test_commands_of_the_card(monkeypatch, tmp_path, name, script, options):
    module, runs = SCRIPTS[script], []
    for function in [value for value in vars(module) if value.startswith("train_")]:
        monkeypatch.setattr(module, function, lambda run, *_, function=function: runs.append((function, run)))
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(options), "--out", str(tmp_path)])
    module.main()
    ((function, run),) = runs
    assert ("reward" in function) == name.endswith("prm") and run.out == tmp_path and run.num_steps >= 140


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(Path(SCRIPTS[script].__file__)), run_name="__main__")
    assert left.value.code == 0
    assert f"python -m ponder.tasks.training.{script}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_policy_and_a_reward_model_of_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("ponder.tasks.training.run.policy_accuracy", lambda *_: "not measured")
    monkeypatch.setattr(operation_chain, "check_gates", lambda *_: None)
    few = lambda policy, task, _, __, seed: policy_traces(policy, task, 8, 2, seed)  # noqa: E731
    monkeypatch.setattr(operation_chain, "policy_traces", few)
    operation_chain.train_chain_policy(TrainingRun(tmp_path / "policy", 2), batch_size=4)
    assert "not measured" in capsys.readouterr().out
    policy = ponder.models.load("chain-tiny")  # the new one writes no whole trace
    operation_chain.train_reward(TrainingRun(tmp_path / "prm", 2), policy, batch_size=4)
    reward = ponder.models.load_reward(tmp_path / "prm")
    assert (policy.vocab_size, reward.vocab_size) == (17, 17)
    again = TrainingRun(tmp_path / "again", 1, start=tmp_path / "policy")
    operation_chain.train_chain_policy(again, batch_size=4)
    scores = [ponder.models.load(tmp_path / name).score(np.arange(9)) for name in ("policy", "again")]
    assert np.isfinite(scores).all() and not np.array_equal(*scores)
