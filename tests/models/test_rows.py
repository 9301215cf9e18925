"""Forking rows against gathering them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.models.rows import fork_rows


def tree_of(num_rows, rng):
    return {
        "matrix": jnp.asarray(rng.normal(size=(num_rows, 3, 2)), jnp.float32),
        "ids": (jnp.asarray(rng.integers(99, size=num_rows), jnp.int32), None),
        "flags": jnp.asarray(rng.random((num_rows, 5)) < 0.5),
        "empty": jnp.zeros((num_rows, 0)),
    }


def check(tree, forked, ancestors):
    assert jax.tree.structure(forked) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(forked), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(y, np.asarray(x)[ancestors])


def test_every_map_of_four_rows():
    """In-place layouts, permutations, cycles and all else; vmapped, so both loops run with any count."""
    maps = np.array(list(itertools.product(range(4), repeat=4)), np.int32)
    tree = tree_of(4, np.random.default_rng(0))
    batch = jax.jit(jax.vmap(fork_rows, in_axes=(None, 0)))(tree, maps)
    single = jax.jit(fork_rows)
    for i, ancestors in enumerate(maps):
        check(tree, jax.tree.map(lambda x, i=i: x[i], batch), ancestors)
        check(tree, single(tree, ancestors), ancestors)


@pytest.mark.parametrize("num_rows", [1, 33])
def test_random_maps(num_rows):
    rng = np.random.default_rng(1)
    tree, fork = tree_of(num_rows, rng), jax.jit(fork_rows)
    for _ in range(20):
        check(tree, fork(tree, (a := rng.integers(num_rows, size=num_rows).astype(np.int32))), a)
        check(tree, fork(tree, (a := rng.permutation(num_rows).astype(np.int32))), a)
        kept = np.unique(rng.integers(num_rows, size=num_rows))
        a = rng.choice(kept, num_rows).astype(np.int32)
        a[kept] = kept  # survivors keep their rows
        check(tree, fork(tree, a), a)


def test_forks_can_follow_each_other():
    tree, fork = tree_of(5, np.random.default_rng(2)), jax.jit(fork_rows)
    first, second = np.array([1, 1, 4, 3, 0]), np.array([4, 1, 1, 2, 4])
    check(tree, fork(fork(tree, first), second), first[second])


def test_a_tree_without_arrays():
    assert fork_rows((None, ()), jnp.array([1, 0])) == (None, ())
