"""Constructors name their dtype: in 64-bit mode the default is another, and a loop's carry no longer fits."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Constructors of arrays, and how many positional arguments come before the dtype.
CONSTRUCTORS = {"zeros": 1, "ones": 1, "empty": 1, "full": 2, "identity": 1, "eye": 3, "tri": 3}
RANGES = {"arange", "linspace", "logspace"}
FROM_VALUES = {"array": 1, "asarray": 1}


def without_dtype(source):
    """Calls of `jnp` that leave the dtype to the default, as source text."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if ast.unparse(node.func.value) != "jnp" or any(keyword.arg == "dtype" for keyword in node.keywords):
            continue
        name, count = node.func.attr, len(node.args)
        literal = count and isinstance(node.args[0], ast.Constant | ast.List | ast.Tuple | ast.UnaryOp)
        if (
            name in RANGES
            or (name in CONSTRUCTORS and count <= CONSTRUCTORS[name])
            or (name in FROM_VALUES and literal and count <= 1)
        ):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("folder", ["ppl", "models", "inference"])
def test_constructors_name_their_dtype(folder):
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (lines := list(without_dtype(path.read_text(encoding="utf-8"))))
    }
    assert not found


def test_the_rule_notices():
    wrong = [
        "zeros(3)",
        "ones((2, n))",
        "arange(n)",
        "full(n, 1.0)",
        "array([1, 2])",
        "asarray(0.5)",
        "eye(3)",
    ]
    right = ["zeros(3, jnp.int32)", "full(n, 1.0, dtype)", "arange(n, dtype=jnp.int32)", "asarray(x)"]
    assert all(list(without_dtype(f"jnp.{call}")) for call in wrong)
    assert not any(list(without_dtype(f"jnp.{call}")) for call in [*right, "zeros_like(x)"])
    assert not list(without_dtype("np.zeros(3)"))
