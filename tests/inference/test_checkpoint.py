"""A run that is cut short and taken up again is the run that was not cut short."""

import os
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.inference.checkpoint import fingerprint


@pytest.fixture
def algorithm(toy, scores):
    endless = ponder.tokens(forbid=[3])
    return inference.smc(ponder.Generation(toy, [1, 2], max_new_tokens=12, potential=endless * scores), 8)


class Cut(Exception):
    pass


def cut_at(step):
    def progress(report):
        if report.step >= step:
            raise Cut

    return progress


def assert_equal(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("step", [2, 5, 6])
def test_a_resumed_run_equals_an_unbroken_one(algorithm, tmp_path, step):
    path, key = tmp_path / "run.safetensors", jax.random.key(11)
    wanted = algorithm.run(key)
    assert int(wanted.stats.num_steps) == 12
    with pytest.raises(Cut):
        algorithm.run(key, progress=cut_at(step), progress_every=1, checkpoint=path, checkpoint_every=2)
    assert os.listdir(tmp_path) == [path.name]
    steps = []
    found = algorithm.run(
        key, progress=lambda report: steps.append(report.step), progress_every=1, checkpoint=path
    )
    assert_equal(found, wanted)
    assert steps[0] == 2 * (step // 2) + 1  # what was done was not done again
    assert os.listdir(tmp_path) == []


def test_checkpoints_alone_change_nothing(algorithm, tmp_path):
    key = jax.random.key(3)
    found = algorithm.run(key, checkpoint=tmp_path / "run", checkpoint_every=3)
    assert_equal(found, algorithm.run(key))


def test_only_the_same_run_resumes(algorithm, toy, scores, tmp_path):
    path, key = tmp_path / "run", jax.random.key(0)
    with pytest.raises(Cut):
        algorithm.run(key, progress=cut_at(4), progress_every=1, checkpoint=path, checkpoint_every=2)

    def program(prompt=(1, 2), **changes):
        settings = {"max_new_tokens": 12, "potential": ponder.tokens(forbid=[3]) * scores, **changes}
        return ponder.Generation(toy, list(prompt), **settings)

    others = [
        (inference.smc(program(), 8), jax.random.key(1)),
        (inference.smc(program(), 8, ess_threshold=0.6), key),
        (inference.smc(program(), 8, resampling="residual"), key),
        (inference.smc(program(prompt=[2, 2]), 8), key),
        (inference.smc(program(temperature=1.1), 8), key),
        (inference.smc(program(potential=ponder.power(2.0)), 8), key),
        (inference.smc(program(), 4), key),
    ]
    for other, other_key in others:
        with pytest.raises(ValueError, match=r"checkpoint: .*belongs to another program, settings or key"):
            other.run(other_key, checkpoint=path)
    inference.smc(program(), 8).run(key, checkpoint=path)  # built anew, but the same


def test_damaged_and_foreign_files_are_refused(algorithm, tmp_path):
    path = tmp_path / "run"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint: .*cannot be read"):
        algorithm.run(jax.random.key(0), checkpoint=path)
    from safetensors.numpy import save_file

    save_file({"0": np.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"checkpoint: .*is no checkpoint"):
        algorithm.run(jax.random.key(0), checkpoint=path)


@pytest.mark.parametrize("path", ["missing/run", "."])
def test_bad_paths_are_refused_before_any_work(algorithm, tmp_path, path):
    with pytest.raises(ValueError, match="checkpoint: expected a file in a folder that exists"):
        algorithm.run(jax.random.key(0), checkpoint=tmp_path / path)
    with pytest.raises(TypeError, match="checkpoint: expected the path of a file, got 3"):
        algorithm.run(jax.random.key(0), checkpoint=3)


def test_objects_and_functions_count_by_what_they_hold():
    class Threshold:
        def __init__(self, value):
            self.value = value

    def longer_than(value):
        return ponder.text(lambda texts: [len(text) > value for text in texts])

    assert fingerprint(Threshold(1)) == fingerprint(Threshold(1)) != fingerprint(Threshold(2))
    assert fingerprint(longer_than(1)) == fingerprint(longer_than(1)) != fingerprint(longer_than(2))


def test_bad_arguments(algorithm, tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every: expected an integer >= 1, got 0"):
        algorithm.run(jax.random.key(0), checkpoint=tmp_path / "run", checkpoint_every=0)
    with pytest.raises(ValueError, match="checkpoint: not possible inside jit"):
        jax.jit(lambda key: algorithm.run(key, checkpoint=tmp_path / "run").log_evidence)(jax.random.key(0))


SCRIPT = """
    import sys, time
    import jax, ponder
    from ponder import inference
    from ponder.models import TableLM, PieceTokenizer

    path, slow = sys.argv[1], sys.argv[2] == "slow"
    tokenizer = PieceTokenizer((b"a", b"b", b"c", b""))
    lm = TableLM.random(jax.random.key(7), 4, eos_token_ids=(3,), tokenizer=tokenizer)

    def prefix(texts):
        if slow and len(texts[0]) > 8:
            time.sleep(60)
        return [0.3 * text.count("a") for text in texts]

    potential = ponder.tokens(forbid=[3]) * ponder.text(prefix, prefix=prefix)
    program = ponder.Generation(lm, [1, 2], max_new_tokens=12, potential=potential)
    checkpoint = None if path == "none" else path
    posterior = inference.smc(program, 4).run(jax.random.key(5), checkpoint=checkpoint, checkpoint_every=4)
    print(posterior.text, posterior.log_weights, posterior.log_evidence)
"""


def test_resuming_after_kill_9(tmp_path):
    path = tmp_path / "run"
    script = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    first = subprocess.Popen([*script, str(path), "slow"])
    try:
        # The second checkpoint comes after eight steps; the ninth and later ones hang.
        while not path.exists():
            assert first.poll() is None
        first.send_signal(signal.SIGKILL)
    finally:
        first.kill()
        first.wait()
    resumed = subprocess.run([*script, str(path), "fast"], capture_output=True, text=True, check=True)
    unbroken = subprocess.run([*script, "none", "fast"], capture_output=True, text=True, check=True)
    assert resumed.stdout == unbroken.stdout and resumed.stdout
    assert not path.exists()
