import functools
import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def load_script():
    """A function that imports a benchmark script of this folder by name, once."""
    return _load


@functools.cache
def _load(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
