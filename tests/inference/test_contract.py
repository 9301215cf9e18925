"""What every kernel promises: one test each, over all kernels. A new kernel joins by a line of `KERNELS`."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ponder
from ponder import inference
from ponder.models import PieceTokenizer, TableLM
from ponder.testing import MAX_Z, z_scores

KERNELS = {
    "smc": lambda program: inference.smc(program, 4),
    "smc, always resampled": lambda program: inference.smc(program, 4, "residual", 1.0),
    "importance_sampling": lambda program: inference.importance_sampling(program, 4),
    "entropic_smc": lambda program: inference.entropic_smc(program, 4, lookahead=True),
    "particle_gibbs": lambda program: inference.particle_gibbs(program, 2, num_sweeps=3, warmup=1),
    "best_of_n": lambda program: inference.best_of_n(program, 4),
    "majority_vote": lambda program: inference.majority_vote(program, 4),
    "exact": lambda program: inference.exact(program),
}
# What a kernel cannot do, and the message that says so.
REFUSES_PROMPTS = {"particle_gibbs": "expected one prompt", "exact": "expected one prompt"}
CHOOSES_ON_THE_HOST = {"majority_vote"}

every_kernel = pytest.mark.parametrize("name", KERNELS)


@pytest.fixture(scope="module")
def program(toy, scores):
    return ponder.Generation(toy, [1, 2], max_new_tokens=4, potential=scores)


def assert_equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@every_kernel
def test_init_and_step_are_pure(name, program):
    """Under jit as without, from the same key the same, and the state keeps its type."""
    algorithm, key = KERNELS[name](program), jax.random.key(3)
    assert isinstance(algorithm, inference.Algorithm)
    state = jax.jit(algorithm.init)(key)
    assert_equal(state, jax.jit(algorithm.init)(key))
    step = jax.jit(algorithm.step)
    after, info = step(key, state)
    assert_equal((after, info), step(key, state))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
    eager, _ = algorithm.step(key, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), eager, after)


@every_kernel
def test_same_key_same_bits(name, program):
    algorithm = KERNELS[name](program)
    first, again = algorithm.run(jax.random.key(0)), KERNELS[name](program).run(jax.random.key(0))
    assert_equal(first, again)
    assert first.method == name.partition(",")[0]
    assert np.isclose(first.weights.sum(), 1.0) and len(first.text) == len(first)
    assert not any(np.isnan(np.asarray(x)).any() for x in (first.tokens, first.log_weights))


class Cut(Exception):
    pass


@every_kernel
def test_progress_and_checkpoints(name, program, tmp_path):
    """Watched, cut short and taken up again, a run gives what it gives unbroken; no file is left."""
    algorithm, key, path = KERNELS[name](program), jax.random.key(1), tmp_path / "run"
    wanted, seen, told = algorithm.run(key), [], []

    def watch(report):
        seen.append(report)
        told.extend(report.texts)

    def cut(report):
        watch(report)
        raise Cut

    with pytest.raises(Cut):
        algorithm.run(key, progress=cut, progress_every=1, checkpoint=path, checkpoint_every=1)
    assert isinstance(seen[0], inference.Progress) and seen[0].step == 1 <= seen[0].num_steps
    assert 0 <= seen[0].num_done <= seen[0].num_particles
    found = algorithm.run(key, progress=watch, progress_every=1, checkpoint=path)
    assert_equal(found, wanted)
    assert [report.step for report in seen] == list(range(1, len(seen) + 1))
    assert os.listdir(tmp_path) == []
    assert told[-len(found) :] == found.text  # the last that is told is the result


@pytest.mark.slow
@every_kernel
def test_keys_side_by_side(name, program):
    """`jax.vmap(run)(keys)` gives what each key gives alone, or a kernel says why not."""
    algorithm, keys = KERNELS[name](program), jax.random.split(jax.random.key(2), 2)
    if name in CHOOSES_ON_THE_HOST:
        with pytest.raises(ValueError, match="tracers"):
            jax.vmap(algorithm.run)(keys)
        return
    together = jax.vmap(algorithm.run)(keys)
    for i, key in enumerate(keys):
        alone = algorithm.run(key)
        one = jax.tree.map(lambda x, i=i: x[i], together)
        n = len(alone)
        kept = np.argsort(np.asarray(one.log_weights) == -np.inf, kind="stable")[:n]
        np.testing.assert_array_equal(np.asarray(one.tokens)[np.sort(kept)], alone.tokens)
        np.testing.assert_allclose(np.asarray(one.log_weights)[np.sort(kept)], alone.log_weights, atol=1e-5)


@every_kernel
def test_several_prompts(name, toy, scores, program):
    """Each prompt gets the numbers that it gets alone with its key, or a kernel refuses a batch."""
    batch = ponder.Generation(toy, [[1, 2], [2, 0]], max_new_tokens=4, potential=scores)
    if name in REFUSES_PROMPTS:
        with pytest.raises(TypeError, match=REFUSES_PROMPTS[name]):
            KERNELS[name](batch)
        return
    key = jax.random.key(5)
    found = KERNELS[name](batch).run(key)
    assert len(found) == 2
    alone = KERNELS[name](program).run(jax.random.split(key, 2)[0])
    np.testing.assert_array_equal(found[0].tokens, alone.tokens)
    np.testing.assert_allclose(found[0].log_weights, alone.log_weights, atol=1e-5)


@every_kernel
def test_bad_keys_and_pauses(name, program, tmp_path):
    algorithm = KERNELS[name](program)
    with pytest.raises(TypeError, match="key: expected a single PRNG key"):
        algorithm.run(0)
    for setting in ("progress_every", "checkpoint_every"):
        with pytest.raises(ValueError, match=f"{setting}: expected an integer >= 1, got 0"):
            algorithm.run(jax.random.key(0), **{setting: 0})
    with pytest.raises(ValueError, match="checkpoint: expected a file in a folder that exists"):
        algorithm.run(jax.random.key(0), checkpoint=tmp_path / "missing" / "run")


@every_kernel
def test_bad_programs(name, toy):
    for wrong in (3, toy, ponder.Generation):
        with pytest.raises(TypeError, match="program: expected a"):
            KERNELS[name](wrong)


class Terminal(ponder.Composable):
    """A score of complete traces alone."""

    def init(self, num_particles):
        return jnp.zeros(num_particles, jnp.int32)

    def update(self, state, tokens, active):
        return state + (active & (tokens == 1)).astype(jnp.int32)

    def log_complete(self, state):
        return 1.5 * state.astype(jnp.float32)


@pytest.mark.slow
@every_kernel
def test_a_terminal_score_is_weighed(name, toy):
    """A kernel that withholds and never settles would have the evidence of another program."""
    program = ponder.Generation(toy, [1, 2], max_new_tokens=4, potential=Terminal())
    algorithm, exact = KERNELS[name](program), inference.exact(program).run()
    if name in CHOOSES_ON_THE_HOST or np.isnan(algorithm.run(jax.random.key(0)).log_evidence):
        pytest.skip("this kernel estimates no evidence")
    runs = jax.vmap(lambda key: algorithm.run(key).log_evidence)(jax.random.split(jax.random.key(0), 4000))
    evidence = np.exp(np.asarray(runs, np.float64))[:, None]
    if name == "exact":
        np.testing.assert_allclose(np.log(evidence[0, 0]), exact.log_evidence, atol=1e-5)
    else:
        assert np.abs(z_scores(evidence, np.exp(np.float64([exact.log_evidence])))).max() < MAX_Z


DOUBLE = """
import sys
sys.path.insert(0, {folder!r})
import jax
from test_contract import numbers
assert jax.config.jax_enable_x64
print(numbers())
"""


def numbers():
    """What every kernel gives on a program whose tokens are drawn from the prior, in words."""
    tokenizer = PieceTokenizer((b"a", b"b", b"c", b""))
    lm = TableLM.random(jax.random.key(7), 4, scale=1.3, eos_token_ids=(3,), tokenizer=tokenizer)
    program = ponder.Generation(lm, [1, 2], max_new_tokens=3, potential=ponder.text(count_letters))
    found = {name: build(program).run(jax.random.key(0)) for name, build in KERNELS.items()}
    return {
        name: (np.asarray(x.tokens).tolist(), np.round(np.asarray(x.log_weights, float), 3).tolist())
        for name, x in found.items()
    }


def count_letters(texts):
    return [0.5 * text.count("a") for text in texts]


@pytest.mark.slow
def test_64_bit_mode_gives_the_same_numbers():
    script = DOUBLE.format(folder=os.path.dirname(__file__))
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_ENABLE_X64": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(numbers())
