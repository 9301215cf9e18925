"""Every kernel with every unit and potential: lowered for GPU and TPU (without a device), run in 64 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import ponder
from ponder import inference
from ponder.models import Decoder, DecoderConfig, DecoderLM, TableReward

KERNELS = {
    "smc": lambda program: inference.smc(program, 4, "residual"),
    "importance_sampling": lambda program: inference.importance_sampling(program, 4),
    "entropic_smc": lambda program: inference.entropic_smc(program, 4, rule="target", lookahead=True),
    "particle_gibbs": lambda program: inference.particle_gibbs(program, 3),
    "best_of_n": lambda program: inference.best_of_n(program, 4),
    "majority_vote": lambda program: inference.majority_vote(program, 4),
    "exact": lambda program: inference.exact(program),
}
UNITS = {"token": "token", "step": ponder.Step("b", max_tokens=2)}
POTENTIALS = {
    "none": lambda lm: None,
    "tokens": lambda lm: ponder.tokens(forbid=[0]),
    "regex": lambda lm: ponder.regex("(a|bc)*"),
    "choice": lambda lm: ponder.choice(["ab", "c"]),
    "power": lambda lm: ponder.power(2.0),
    "expert": lambda lm: ponder.expert(lm, [1], weight=0.5),
    "process_reward": lambda lm: ponder.process_reward(TableReward.random(jax.random.key(1), 4)),
    "after": lambda lm: ponder.after("b", ponder.expert(lm, [1], weight=0.5)),
    "product": lambda lm: ponder.regex("(a|bc)*") ** 0.5 * ponder.power(2.0),
}
ON_THE_HOST = {
    "text": lambda lm: ponder.text(count_letters),
    "text with prefix": lambda lm: ponder.text(count_letters, prefix=count_letters),
    "grammar": lambda lm: ponder.grammar('start: ("a" | "bc")*'),
    "text_reward": lambda lm: ponder.process_reward(ponder.text_reward(share_of_letters)),
}


def count_letters(texts):
    return [0.5 * text.count("a") for text in texts]


def share_of_letters(prompt, texts):
    return [0.5 + 0.1 * min(text.count("a"), 3) for text in texts]


def lower(algorithm):
    """Lower both functions of the pure layer for both platforms."""
    key = jax.random.PRNGKey(0)  # as raw data: keys with a type cannot be exported
    for fn, arguments in (
        (algorithm.init, (key,)),
        (algorithm.step, (key, jax.eval_shape(algorithm.init, key))),
    ):
        lowered = export.export(jax.jit(fn), platforms=("cuda", "tpu"))(*arguments)
        assert set(lowered.platforms) == {"cuda", "tpu"} and "callback" not in lowered.mlir_module()


def program(lm, potential, unit):
    evidence = (POTENTIALS | ON_THE_HOST)[potential](lm)
    return ponder.Generation(lm, [1, 2], max_new_tokens=4, potential=evidence, unit=UNITS[unit])


GRID = [(k, u, p) for k in KERNELS for u in UNITS for p in POTENTIALS]
FAST = [case for case in GRID if case[0] == "smc" or case[2] == "product"]


@pytest.mark.parametrize(
    ("kernel", "unit", "potential"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in GRID],
)
def test_it_can_be_lowered(toy, kernel, unit, potential):
    lower(KERNELS[kernel](program(toy, potential, unit)))


@pytest.mark.parametrize("unit", ["token", ponder.Step([3], max_tokens=2)], ids=["token", "step"])
def test_so_can_the_decoder_and_a_batch_of_prompts(unit):
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    lm = DecoderLM(Decoder(config, rngs=nnx.Rngs(0)), None, (0,))
    batch = ponder.Generation(lm, [[1, 2], [3]], max_new_tokens=4, unit=unit)
    algorithm = inference.smc(batch, 4)
    keys = jnp.stack([jax.random.PRNGKey(0)] * 2)
    state = jax.eval_shape(algorithm.init, keys)
    lowered = export.export(jax.jit(algorithm.step), platforms=("cuda", "tpu"))(keys, state)
    assert set(lowered.platforms) == {"cuda", "tpu"}


EACH_POTENTIAL = [("smc", unit, potential) for unit in UNITS for potential in POTENTIALS | ON_THE_HOST]
EACH_KERNEL = [(kernel, unit, "text") for unit in UNITS for kernel in KERNELS]
NUMBERS = dict.fromkeys(EACH_POTENTIAL + EACH_KERNEL)


@pytest.mark.parametrize(
    ("kernel", "unit", "potential"),
    [
        pytest.param(*case, marks=() if case == ("smc", "step", "none") else pytest.mark.slow)
        for case in NUMBERS
    ],
)
def test_64_bit_mode_gives_the_32_bit_numbers(toy, kernel, unit, potential):
    """As NumPyro's users have it; users' own functions rely on JAX's usual promotions."""

    def run():
        posterior = KERNELS[kernel](program(toy, potential, unit)).run(jax.random.key(0))
        return posterior, posterior.tokens.dtype, posterior.log_weights.dtype

    found, *dtypes = run()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide, *wide_dtypes = run()
    assert dtypes == wide_dtypes
    np.testing.assert_array_equal(wide.tokens, found.tokens)
    np.testing.assert_allclose(wide.log_weights, found.log_weights, atol=1e-5)
    np.testing.assert_allclose(wide.log_evidence, found.log_evidence, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "unit", "potential"), GRID)
def test_it_can_be_traced_in_64_bit_mode(toy, kernel, unit, potential):
    with jax.enable_x64(True):
        algorithm = KERNELS[kernel](program(toy, potential, unit))
        state = jax.eval_shape(algorithm.init, jax.random.key(0))
        after, _ = jax.eval_shape(algorithm.step, jax.random.key(0), state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
