"""What a Python function raises inside compiled code reaches the caller as it was raised."""

import logging
import threading

import jax
import jax.numpy as jnp
import pytest

import ponder
from ponder import inference
from ponder.host import errors as host_errors
from ponder.host.errors import guarded, reraised
from ponder.testing import check_potential


@pytest.fixture(autouse=True)
def nothing_pending():
    host_errors._pending.clear()  # of tests that ran before


class Refusal(Exception):
    """An error of the user's own."""


def call(fn, value):
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.pure_callback(guarded(fn), shape, value, vmap_method="sequential")


def refuse(value):
    try:
        raise KeyError("inner")
    except KeyError as error:
        raise Refusal(float(value)) from error


def run(kernel, toy, fn, **settings):
    program = ponder.Generation(toy, [1], max_new_tokens=3, potential=ponder.text(fn))
    return kernel(program, **settings).run(jax.random.key(0))


@pytest.mark.parametrize(
    "kernel",
    [
        "smc",
        pytest.param("importance_sampling", marks=pytest.mark.slow),
        pytest.param("particle_gibbs", marks=pytest.mark.slow),
        "exact",
    ],
)
def test_every_kernel_raises_the_error_itself(kernel, toy):
    kernel = getattr(inference, kernel)
    with pytest.raises(ValueError, match=r"^text\(fn\): expected one value for each") as raised:
        run(kernel, toy, lambda texts: 1.0)
    assert isinstance(raised.value.__context__, jax.errors.JaxRuntimeError)
    with pytest.raises(TypeError, match=r"^text\(fn\): expected numbers or bools"):
        run(kernel, toy, lambda texts: ["a"] * len(texts))

    def refuse_texts(texts):
        refuse(len(texts))

    with pytest.raises(Refusal) as raised:
        run(kernel, toy, refuse_texts)
    assert isinstance(raised.value.__cause__, KeyError)
    assert not host_errors._pending


@pytest.mark.slow
def test_also_between_slices_and_for_several_prompts(toy):
    potential = ponder.text(lambda texts: [0.0] * len(texts), prefix=refuse)
    batch = ponder.Generation(toy, [[1], [2]], max_new_tokens=3, potential=potential)
    single = ponder.Generation(toy, [1], max_new_tokens=3, potential=potential)
    for program in (batch, single):
        with pytest.raises(TypeError):  # float(list of texts)
            inference.smc(program, 2).run(jax.random.key(0), progress=lambda _: None)


def test_a_second_run_of_the_same_program_has_its_own_error(toy):
    count = iter(range(9))

    def fail(texts):
        raise Refusal(next(count))

    algorithm = inference.smc(ponder.Generation(toy, [1], max_new_tokens=3, potential=ponder.text(fail)), 2)
    for expected in range(3):
        with pytest.raises(Refusal) as raised:
            algorithm.run(jax.random.key(0))
        assert raised.value.args == (expected,)


def test_threads_get_their_own_errors():
    compiled = jax.jit(lambda value: call(refuse, value))
    found = {}

    def work(number):
        try:
            with reraised():
                jax.block_until_ready(compiled(jnp.float32(number)))
        except Refusal as error:
            found[number] = error.args[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: float(number) for number in range(8)}
    assert not host_errors._pending


def test_an_interrupt_is_not_lost():
    def interrupt(value):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), reraised():
        jax.block_until_ready(call(interrupt, jnp.float32(1)))


def test_without_reraised_the_text_says_all_and_little_is_kept(caplog):
    with caplog.at_level(logging.ERROR):
        for _ in range(host_errors._CAPACITY + 3):
            with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?s)KeyError: 'inner'.*Refusal: 1\.0"):
                jax.block_until_ready(jax.jit(lambda value: call(refuse, value))(jnp.float32(1)))
    assert len(host_errors._pending) == host_errors._CAPACITY
    assert not caplog.records  # JAX would log the traceback a second time


def test_other_errors_pass():
    def unguarded(value):
        raise Refusal

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError), reraised():
        jax.block_until_ready(jax.pure_callback(unguarded, shape, 1.0, vmap_method="sequential"))
    with pytest.raises(ValueError, match="mine"), reraised():
        raise ValueError("mine")


def test_checks_of_potentials_raise_it_too(toy):
    with pytest.raises(Refusal):
        check_potential(ponder.text(lambda texts: refuse(len(texts))), toy)
