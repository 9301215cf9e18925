import dataclasses
import gc
import os
import shutil
import tempfile

import jax
import jax.numpy as jnp
import pytest
from jax.tree_util import register_dataclass

import ponder
from ponder.models import PieceTokenizer, TableLM


def pytest_configure(config):
    """Mixed dtypes and ranks are errors: a program that relies on JAX's promotions breaks in 64-bit mode.

    What is compiled is kept for the session, in a folder that the workers share: many tests build the same
    program anew.
    """
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="ponder-tests-xla-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ["PONDER_TESTS_XLA"] = folder  # the workers inherit it
    jax.config.update("jax_compilation_cache_dir", os.environ["PONDER_TESTS_XLA"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_let_go():
    """After a module: what its tests compiled serves no other one, and a worker would grow to gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model in float32, loaded once."""
    return ponder.models.load("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def toy():
    """Four tokens a, b, c, EOS with random logits given the last two: 121 traces of at most four tokens."""
    tokenizer = PieceTokenizer((b"a", b"b", b"c", b""))
    return TableLM.random(jax.random.key(7), 4, scale=1.3, eos_token_ids=(3,), tokenizer=tokenizer)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Scores(ponder.Composable):
    """Log Φ of a prefix is the sum of the tokens' scores; of a complete trace, another function of that."""

    scores: jax.Array

    def init(self, num_particles):
        return jnp.zeros(num_particles)

    def update(self, state, tokens, active):
        return state + jnp.where(active, self.scores[tokens], 0.0)

    def log_prefix(self, state):
        return state

    def log_complete(self, state):
        return state - 0.4 * jnp.sin(3.0 * state)

    def token_logits(self, state):
        return None

    def fork(self, state, ancestors):
        return state[ancestors]


@pytest.fixture(scope="session")
def scores():
    """A potential whose prefix weights are informative, not exact, and not offered token by token."""
    return Scores(jnp.array([0.9, -0.8, 0.4, -0.3]))
