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
from ponder.inference.running.fingerprint import fingerprint


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


def score(texts):
    return [float("a" in text) for text in texts]


def other_score(texts):
    return [float("b" in text) for text in texts]


def test_what_is_told_by_value_decides_the_fingerprint(toy, scores):
    def run_of(potential, **settings):
        program = ponder.Generation(toy, [1], max_new_tokens=2, potential=potential, **settings)
        return fingerprint(inference.smc(program, 2), jax.random.key(0))

    found = [
        run_of(scores),
        run_of(scores**0.5),
        run_of(ponder.power(2.0)),
        run_of(ponder.power(3.0)),
        run_of(ponder.text(score)),
        run_of(ponder.text(other_score)),
        run_of(scores, temperature=0.5),
        run_of(scores, proposal=lambda prior, guide: prior),
        run_of(scores, overflow="force_eos"),
    ]
    assert len(set(found)) == len(found)
    assert run_of(ponder.text(score)) == found[4]


def test_code_is_told_apart_by_a_run_id(algorithm, tmp_path):
    path, key = tmp_path / "run", jax.random.key(0)
    with pytest.raises(Cut):
        algorithm.run(
            key, progress=cut_at(4), progress_every=1, checkpoint=path, checkpoint_every=2, run_id="v1"
        )
    with pytest.raises(ValueError, match="belongs to another"):
        algorithm.run(key, checkpoint=path, run_id="v2")
    assert_equal(algorithm.run(key, checkpoint=path, run_id="v1"), algorithm.run(key))
    with pytest.raises(TypeError, match="run_id: expected a string, got 1"):
        algorithm.run(key, run_id=1)


def test_use_leaves_the_fingerprint_as_it_was(toy):
    pytest.importorskip("llguidance")
    potential = ponder.grammar('start: ("a" | "b")*') * ponder.text(score)
    algorithm = inference.smc(ponder.Generation(toy, [1], max_new_tokens=3, potential=potential), 4)
    before = fingerprint(algorithm)
    algorithm.run(jax.random.key(0))
    assert fingerprint(algorithm) == before


FINGERPRINT = """
    import jax, ponder
    from ponder.inference.running.fingerprint import fingerprint

    class Scorer:
        def __call__(self, texts):
            return [len(text) for text in texts]

    lm = ponder.models.load("countdown-tiny")
    potential = ponder.regex("[0-9]{3}") * ponder.text(lambda texts: [0.0]) * ponder.text(Scorer())
    program = ponder.Generation(lm, "1 2", max_new_tokens=4, potential=potential, stop="3")
    print(fingerprint(ponder.inference.smc(program, 4), jax.random.key(0)))
"""


def test_fingerprints_agree_between_processes():
    found = set()
    for seed in ("1", "2"):
        script, environment = textwrap.dedent(FINGERPRINT), os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", script]
        found.add(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert len(found) == 1 and len(found.pop().strip()) == 64


def test_a_flipped_bit_is_noticed(algorithm, tmp_path):
    path, key = tmp_path / "run", jax.random.key(0)
    with pytest.raises(Cut):
        algorithm.run(key, progress=cut_at(4), progress_every=1, checkpoint=path, checkpoint_every=2)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"checkpoint: .* is damaged \(its checksum is wrong\)"):
        algorithm.run(key, checkpoint=path)


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


@pytest.mark.slow
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


def test_objects_count_by_their_attributes():
    class Judge:
        def __init__(self, scale, fn=len):
            self.scale, self.fn = scale, fn

    assert fingerprint(Judge(1.0)) == fingerprint(Judge(1.0)) != fingerprint(Judge(2.0))
    assert fingerprint(Judge(1.0)) != fingerprint(Judge(1.0, sum))
    assert fingerprint(Judge(np.arange(3))) != fingerprint(Judge(np.arange(4)))
