"""The package as a whole: what `import ponder` costs, and its public names."""

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import ponder

ROOT = Path(__file__).parent.parent
FOLDERS = {"ponder": ROOT / "ppl", "ponder.models": ROOT / "models", "ponder.inference": ROOT / "inference"}
MODULES = {
    f"{package}.{path.stem}" if path.stem != "__init__" else package: path
    for package, folder in FOLDERS.items()
    for path in sorted(folder.glob("*.py"))
}
FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS.values() for path in folder.rglob("*.py"))
MAX_LINES = 400

LIGHT = """
import sys
import ponder
assert "jax" not in sys.modules
light = set(ponder.__all__) - {"calibration", "inference", "models", "tasks", "testing"}
assert all(getattr(ponder, name) for name in light)
heavy = [m for m in ("transformers", "flax", "numpyro", "matplotlib", "rich", "typer", "optax", "safetensors",
                     "tokenizers", "outlines_core", "llguidance", "jsonschema", "regex", "gguf", "jinja2")
         if m in sys.modules]
assert not heavy, heavy
loaded = [m for m in sys.modules if m.startswith(("ponder.models.", "ponder.inference"))]
light = ("protocols", "pytrees", "rows", "step_form")
assert set(loaded) <= {f"ponder.models.{name}" for name in light}, loaded
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
assert {"regex", "inference", "models", "testing"} <= set(dir(ponder))
assert not xla_bridge._backends
import jax
assert jax.live_arrays() == []
assert ponder.inference.smc and ponder.models.TableLM and ponder.testing.check_potential
assert not [m for m in ("transformers", "flax") if m in sys.modules]
assert jax.live_arrays() == []
"""


def test_import_is_light():
    """No heavy library, no device, no array; neither do the kernels and a table model need flax."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIGHT], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", FILES, ids=str)
def test_modules_are_short(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_packages_are_installed():
    for package in FOLDERS:
        assert import_module(package).__name__ == package
    assert (ROOT / "ppl" / "py.typed").exists()
    assert ponder.__version__.count(".") == 2


def public_names(package):
    module = import_module(package)
    return [n for n in getattr(module, "__all__", dir(module)) if not n.startswith("_")]


@pytest.mark.parametrize("package", FOLDERS)
def test_public_names_are_documented(package):
    module = import_module(package)
    assert module.__doc__
    for name in public_names(package):
        value = getattr(module, name)
        if name == "annotations" or (inspect.ismodule(value) and not value.__name__.startswith("ponder")):
            continue
        if type(value).__module__ == "typing":  # an alias: documented where it stands
            continue
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), f"{package}.{name}"
        if inspect.isclass(value):
            for attribute, member in vars(value).items():
                if callable(member) and not attribute.startswith("_"):
                    assert inspect.getdoc(getattr(value, attribute)), f"{package}.{name}.{attribute}"


def test_no_public_name_is_that_of_a_module():
    """Whoever imports `ponder.inference.exact` as a module would get another thing than the function."""
    for package in FOLDERS:
        module = import_module(package)
        for name in public_names(package):
            if f"{package}.{name}" in MODULES:
                assert inspect.ismodule(getattr(module, name)), name


def test_unknown_names_are_attribute_errors():
    for package in ("ponder", "ponder.models"):
        with pytest.raises(AttributeError, match=f"{package} attribute nonsense"):
            import_module(package).nonsense  # noqa: B018
    assert {"inference", "models", "testing", "Generation"} <= set(dir(ponder))


CONTRACT = {
    "ponder.Generation": "lm prompt max_new_tokens potential proposal temperature unit stop overflow",
    "ponder.regex": "pattern",
    "ponder.choice": "options",
    "ponder.json_schema": "schema",
    "ponder.tokens": "allow forbid",
    "ponder.text": "fn",
    "ponder.power": "alpha",
    "ponder.testing.check_potential": "potential lm",
    "ponder.testing.check_algorithm": "algorithm program",
    "ponder.models.load": "name_or_path dtype revision local_files_only",
    "ponder.inference.smc": "program num_particles resampling ess_threshold",
    "ponder.inference.importance_sampling": "program num_particles",
    "ponder.inference.exact": "program",
    **{
        f"ponder.inference.resampling.{name}": "key log_weights num_samples"
        for name in ("multinomial", "stratified", "systematic", "residual")
    },
    # Methods; self is left out.
    "ponder.models.LanguageModel.prefill": "tokens num_particles max_new_tokens",
    "ponder.models.LanguageModel.extend": "cache tokens",
    "ponder.models.LanguageModel.fork": "cache ancestors",
    "ponder.StateSpaceModel.init": "key num_particles",
    "ponder.StateSpaceModel.propagate": "key state forced",
    "ponder.StateSpaceModel.fork": "state ancestors",
    "ponder.StateSpaceModel.is_done": "state",
    "ponder.Potential.init": "num_particles",
    "ponder.Potential.update": "state tokens active",
    "ponder.Potential.log_prefix": "state",
    "ponder.Potential.log_complete": "state",
    "ponder.Potential.token_logits": "state",
    "ponder.Potential.fork": "state ancestors",
    "ponder.Posterior.expectation": "f",
    "ponder.Posterior.sample": "key n",
    "ponder.Posterior.mode": "",
    "ponder.Posterior.unique": "",
    "ponder.Posterior.summary": "",
    "ponder.Posterior.plot_genealogy": "",
    "ponder.inference.Algorithm.init": "key",
    "ponder.inference.Algorithm.step": "key state",
    "ponder.inference.Algorithm.run": "key",
}
# The other parameters must have defaults, so that calls by the contract stay possible.
DEFAULTS = {
    "ponder.Generation": {
        "potential": None,
        "proposal": None,
        "temperature": 1.0,
        "unit": "token",
        "stop": (),
        "overflow": "truncate",
    },
    "ponder.inference.smc": {"num_particles": 32, "resampling": "systematic", "ess_threshold": 0.5},
    "ponder.models.load": {"dtype": None, "revision": None, "local_files_only": False},
}


def resolve(dotted):
    value = ponder
    for part in dotted.split(".")[1:]:
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", CONTRACT)
def test_contract(name):
    parameters = dict(inspect.signature(resolve(name)).parameters)
    parameters.pop("self", None)
    wanted = CONTRACT[name].split()
    assert [p for p in parameters if p in wanted] == wanted  # in this order
    optional = [p for p in parameters.values() if p.name not in wanted]
    assert all(p.default is not p.empty for p in optional)
    for parameter, default in DEFAULTS.get(name, {}).items():
        assert parameters[parameter].default == default


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("ponder.Posterior", "tokens lengths log_weights log_evidence text ess stats _repr_html_"),
        ("ponder.posterior.Stats", "ess resampled ancestors tokens_generated tokens_discarded model_calls"),
        ("ponder.models.Tokenizer", "encode decode token_bytes apply_chat_template"),
        ("ponder.models.LanguageModel", "vocab_size eos_token_ids tokenizer"),
        ("ponder.StateSpaceModel", "num_steps"),
    ],
)
def test_contract_attributes(name, attributes):
    value = resolve(name)
    found = {*dir(value), *getattr(value, "__annotations__", {}), *getattr(value, "_fields", ())}
    assert set(attributes.split()) <= found
