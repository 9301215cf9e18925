import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.host.calls import call_host


def test_arguments_of_any_size_arrive_whole_and_results_keep_their_structure():
    seen = []

    def host(pair, flag):
        assert all(isinstance(x, np.ndarray) for x in (*pair.values(), flag))
        seen.append((pair["a"].shape, pair["b"].shape, flag.shape))
        return {"sum": np.float32(pair["a"].sum()), "flag": flag}

    shapes = {"sum": jax.ShapeDtypeStruct((), jnp.float32), "flag": jax.ShapeDtypeStruct((3,), jnp.bool_)}
    a, b, flag = jnp.ones((70_000, 2)), jnp.zeros((0, 5)), jnp.asarray([True, False, True])

    out = jax.jit(lambda *args: call_host(host, shapes, *args))({"a": a, "b": b}, flag)

    assert float(out["sum"]) == 140_000
    assert out["flag"].tolist() == [True, False, True]
    assert seen == [((70_000, 2), (0, 5), (3,))]


@pytest.mark.parametrize("nested", [False, True])
def test_runs_side_by_side_share_one_call(nested):
    calls = []

    def host(x, y):
        calls.append((x.shape, y.shape))
        return (x + y).sum(-1)

    def add(x, y):
        return call_host(host, jax.ShapeDtypeStruct((), jnp.float32), x, y)

    y = jnp.ones(4)
    fn, x = jax.vmap(add, (0, None)), jnp.arange(12.0).reshape(3, 4)
    if nested:
        fn, x = jax.vmap(fn, (0, None)), jnp.stack([x, x + 1])

    out = jax.jit(fn)(x, y)

    assert calls == [(x.shape, x.shape)]
    np.testing.assert_allclose(out, (x + 1).sum(-1))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot pin a process to one core")
def test_a_machine_with_one_core_does_not_wait_for_itself():
    """Large arguments are copied by a thread of JAX's pool: here the only one, and it runs the callback."""
    program = """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import jax, numpy as np
        import ponder
        from ponder.tasks import operation_chain

        lm = ponder.models.load("chain-tiny")
        prm = ponder.text_reward(lambda prompt, texts: np.full(len(texts), 0.5))
        program = ponder.Generation(
            lm,
            operation_chain.prompt_text(operation_chain.problems(0, 1)[0]),
            max_new_tokens=12,
            potential=ponder.process_reward(prm, link="odds"),
            unit=ponder.Step("\\n", max_tokens=12, max_steps=3),
        )
        for seed in range(3):
            posterior = ponder.inference.smc(program, 4096, "multinomial", 1.0).run(jax.random.key(seed))
            assert abs(float(posterior.log_evidence)) < 1e-3
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=300)
