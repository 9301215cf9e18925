"""A run that is cut short and taken up again is the run that was not cut short."""

import functools
import os
import re
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
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


class Threshold:
    def __init__(self, value):
        self.value = value

    def __call__(self, texts):
        return [self.value] * len(texts)

    def method(self, texts):
        return self(texts)


def helper(texts):
    return [float("a" in text) for text in texts]


def other_helper(texts):
    return [float("b" in text) for text in texts]


def closing_over(value):
    return lambda texts: [value] * len(texts)


def with_defaults(first, second):
    def score(texts, scale=first, *, offset=second):
        return [scale * len(text) + offset for text in texts]

    return score


def calling(name):
    # The same code but for a global name.
    return eval(f"lambda texts: {name}(texts)", globals())


DIFFERENT = {
    "attribute": (Threshold(1.0), Threshold(2.0)),
    "method": (Threshold(1.0).method, Threshold(2.0).method),
    "nested object": (Threshold(Threshold(1)), Threshold(Threshold(2))),
    "closure": (closing_over(1), closing_over(2)),
    "type": (closing_over(1), closing_over(True)),
    "dict": (closing_over({"a": 1}), closing_over({"a": 2})),
    "set": (closing_over({"a", "b"}), closing_over({"a", "c"})),
    "function": (closing_over(helper), closing_over(other_helper)),
    "pattern": (closing_over(re.compile("a")), closing_over(re.compile("b"))),
    "array": (closing_over(np.arange(2)), closing_over(np.arange(2) + 1)),
    "objects in an array": (closing_over(np.array([1, "a"], object)), closing_over(np.array([1, 2], object))),
    "native": (closing_over(jnp.sin), closing_over(jnp.cos)),
    "ufunc": (closing_over(np.sin), closing_over(np.cos)),
    "comprehension": (lambda texts: [1 for _ in texts], lambda texts: [2 for _ in texts]),
    "name": (lambda texts: list(map(len, texts)), lambda texts: list(map(hash, texts))),
    "default": (with_defaults(1, 0), with_defaults(2, 0)),
    "keyword default": (with_defaults(1, 0), with_defaults(1, 1)),
    "helper": (calling("helper"), calling("other_helper")),
    "partial": (functools.partial(max, key=len), functools.partial(max, key=hash)),
    "jitted": (jax.jit(lambda x: x + 1), jax.jit(lambda x: x + 2)),
    "proposal": (lambda p, g: jnp.sin(p), lambda p, g: jnp.cos(p)),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_a_function_does_decides_its_fingerprint(case, toy):
    def run_of(function):
        if case == "proposal":
            program = ponder.Generation(toy, [1], max_new_tokens=2, proposal=function)
        else:
            program = ponder.Generation(toy, [1], max_new_tokens=2, potential=ponder.text(function))
        return fingerprint(inference.smc(program, 2), jax.random.key(0))

    first, second = map(run_of, DIFFERENT[case])
    assert run_of(DIFFERENT[case][0]) == first != second


def test_the_code_of_a_potential_counts():
    def potential(value):
        class Constant(ponder.Composable):
            def log_complete(self, state):
                return state + (1.0 if value else 2.0)

        return jax.tree_util.register_static(Constant)()

    assert fingerprint(potential(True)) == fingerprint(potential(True)) != fingerprint(potential(False))


def test_fingerprints_are_bounded_and_see_no_caches():
    ring = Threshold([])
    ring.value.append(ring)
    deep = []
    for _ in range(10_000):
        deep = [deep]
    assert fingerprint(ring) == fingerprint(ring)
    assert fingerprint(closing_over(deep)) != fingerprint(closing_over(1))

    class Lazy(Threshold):
        @functools.cached_property
        def doubled(self):
            return 2 * self.value

    used, fresh = Lazy(1), Lazy(1)
    assert used.doubled == 2 and fingerprint(used) == fingerprint(fresh)


def test_use_leaves_the_fingerprint_as_it_was(toy):
    pytest.importorskip("llguidance")
    potential = ponder.grammar('start: ("a" | "b")*') * ponder.text(helper)
    algorithm = inference.smc(ponder.Generation(toy, [1], max_new_tokens=3, potential=potential), 4)
    before = fingerprint(algorithm)
    algorithm.run(jax.random.key(0))
    assert fingerprint(algorithm) == before


FINGERPRINT = """
    import re, jax, numpy as np, ponder
    from ponder.inference.running.fingerprint import fingerprint

    class Words:
        LONG = 3
        def __init__(self, words):
            self.words, self.pattern = words, re.compile("|".join(sorted(words)))
        def __call__(self, texts):
            return [bool(self.pattern.search(text)) or text in {"x", "y", "z"} for text in texts]

    held = Words({"red", "green", "blue", "black"}), jax.jit(lambda x: np.sin(x)), object(), frozenset("abc")
    print(fingerprint(ponder.text(Words(set("abcdef"))), ponder.text(lambda texts: held)))
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
