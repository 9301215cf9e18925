"""Compiling functions of arguments that mix arrays with other objects; a trace of the function is counted."""

import dataclasses
import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import register_dataclass

from ponder.inference.running.static import jit


class Constant:
    """A user's object that is no pytree and cannot be compared or hashed."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        raise RuntimeError("compared")

    __hash__ = None


@register_dataclass
@dataclasses.dataclass
class Pair:
    array: jax.Array
    other: object


def counted(fn, **kwargs):
    """The compiled function, and a list that grows with every compilation."""
    traces = []

    def body(*args):
        traces.append(args)
        return fn(*args)

    return jit(body, **kwargs), traces


def test_arrays_are_traced():
    f, traces = counted(lambda x, tree: x + tree["a"] * tree["b"])
    for k in range(3):
        tree = {"a": np.full(2, 2.0 + k, np.float32), "b": np.float32(3.0)}
        np.testing.assert_allclose(f(jnp.full(2, 1.0 * k), tree), [k + 3 * (2 + k)] * 2)
    assert len(traces) == 1
    assert all(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(traces[0]))
    f(jnp.zeros(3), {"a": jnp.zeros(3), "b": jnp.float32(0)})
    assert len(traces) == 2  # another shape


@pytest.mark.parametrize(
    ("first", "same", "other"),
    [(2, 1 + 1, 3), (2.0, 4.0 / 2, 2.5), ("ab", "".join(["a", "b"]), "b"), (True, 2 > 1, False)],
    ids=["int", "float", "str", "bool"],
)
def test_numbers_and_strings_are_static_by_value(first, same, other):
    f, traces = counted(lambda x, c: x * float(len(c) if isinstance(c, str) else c))
    values = [float(f(jnp.float32(3.0), c)) for c in (first, same, other)]
    assert values[0] == values[1] != values[2]
    assert len(traces) == 2
    assert traces[0][1] == first and type(traces[0][1]) is type(first)


def test_types_are_told_apart():
    """1, 1.0 and True are equal and not the same constant."""
    f, traces = counted(lambda x, c: (x, type(c) is float))
    for c in (1, 1.0, True, 1, 1.0, True):
        assert f(jnp.zeros(()), c)[0] == 0
    assert [type(c) for _, c in traces] == [int, float, bool]


def test_none_is_structure():
    f, traces = counted(lambda x, y: x if y is None else x + y)
    assert float(f(jnp.float32(1), None)) == 1
    assert float(f(jnp.float32(1), jnp.float32(2))) == 3
    assert float(f(jnp.float32(5), None)) == 5
    assert len(traces) == 2


def test_other_objects_are_static_by_identity():
    f, traces = counted(lambda x, pair: x + pair.array * pair.other.value)
    one, two = Constant(10.0), Constant(10.0)
    for pair, count in (
        (Pair(jnp.ones(()), one), 1),
        (Pair(jnp.zeros(()), one), 1),
        (Pair(jnp.ones(()), two), 2),
    ):
        assert float(f(jnp.float32(1), pair)) == 1 + 10 * float(pair.array)
        assert len(traces) == count
    assert traces[0][1].other is one and traces[1][1].other is two
    two.value = 20.0  # a constant is read when it is compiled, as with any closure
    assert float(f(jnp.float32(1), Pair(jnp.ones(()), two))) == 11


def test_functions_are_static_by_identity():
    f, traces = counted(lambda fn, x: fn(x))
    double = lambda x: 2 * x  # noqa: E731
    assert float(f(double, jnp.float32(3))) == 6
    assert float(f(double, jnp.float32(4))) == 8
    assert float(f(lambda x: 2 * x, jnp.float32(4))) == 8
    assert len(traces) == 2


def test_a_constant_lives_while_it_is_a_key():
    """Else a new object at the same address would be taken for it."""
    f, _ = counted(lambda x, c: x + c.value)
    constants = weakref.WeakSet()
    for value in range(8):
        constant = Constant.__new__(Held)
        constant.value = float(value)
        constants.add(constant)
        assert float(f(jnp.float32(0), constant)) == value
        del constant
        gc.collect()
    assert len(constants) == 8


class Held(Constant):
    """Can be in a weak set."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


def test_donated_buffers_are_reused():
    """Those of the argument that is given away, next to which static leaves may stand."""
    f, traces = counted(lambda x, carry: (carry[0] + x * carry[1], carry[2] + 1), donate=(1,))
    x, total, step = jnp.ones(1000), jnp.zeros(1000), jnp.arange(5)
    where = total.unsafe_buffer_pointer()
    for k in range(1, 4):
        given = (total, 2.0, step)
        total, step = f(x, given)
        assert given[0].is_deleted() and given[2].is_deleted() and not x.is_deleted()
        assert float(total[0]) == 2 * k and step.tolist() == [k, k + 1, k + 2, k + 3, k + 4]
    assert total.unsafe_buffer_pointer() == where
    assert len(traces) == 1


def test_nothing_is_donated_unless_asked():
    f, _ = counted(lambda x, y: x + y)
    x, y = jnp.ones(3), jnp.ones(3)
    f(x, y)
    assert not x.is_deleted() and not y.is_deleted()


def test_inside_another_trace():
    """Under jit, vmap and grad nothing is donated, and the values are the same."""
    f, _ = counted(lambda c, x: jnp.sin(x) * c.value, donate=(1,))
    constant, x = Constant(2.0), jnp.arange(3.0)
    expected = 2 * np.sin(np.arange(3.0))
    np.testing.assert_allclose(jax.jit(lambda x: f(constant, x))(x), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda x: f(constant, x))(x), expected, rtol=1e-6)
    assert float(jax.grad(lambda x: f(constant, x))(0.0)) == pytest.approx(2.0)
    np.testing.assert_allclose(f(constant, x + 0), expected, rtol=1e-6)
    assert not x.is_deleted()


def test_keys_of_both_kinds_pass():
    f, traces = counted(lambda key: jax.random.uniform(key))
    for key in (jax.random.key(0), jax.random.key(1), jax.random.PRNGKey(0), jax.random.PRNGKey(1)):
        assert float(f(key)) == float(jax.random.uniform(key))
    assert len(traces) == 2


def test_keeps_name_and_documentation():
    def documented(x):
        """Return x."""
        return x

    assert jit(documented).__name__ == "documented" and jit(documented).__doc__ == "Return x."


def test_classes_with_the_same_fields_are_not_confused():
    """JAX 0.10 compares the structures of dataclasses by their fields alone."""

    def make(factor):
        cls = type(
            f"Scale{factor}", (), {"__annotations__": {"x": Any}, "apply": lambda self: factor * self.x}
        )
        return register_dataclass(dataclasses.dataclass(frozen=True, eq=False)(cls))

    apply = jit(lambda scale: scale.apply())
    for factor in range(1, 40):
        assert apply(make(factor)(jnp.float32(1))) == factor
