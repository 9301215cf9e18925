"""The package as a whole: who imports whom, what `import ponder` costs, and the public names of stage 1."""

import ast
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
MAX_LINES = 400

# Model code that may be used without knowing any model.
NEUTRAL = {"ponder.models.protocols", "ponder.models.rows"}


def is_command_line(module):
    return module.startswith("ponder.cli") or module == "ponder.__main__"


def imports(tree, inside_functions=True):
    """Absolute names of the modules of ponder that the code imports or reads as attributes of `ponder`."""
    found, names = set(), {}

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children = node.orelse
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not inside_functions:
            children = []
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
            names.update({alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if names.get(node.value.id) == "ponder" and f"ponder.{node.attr}" in MODULES:
                found.add(f"ponder.{node.attr}")
        for child in children:
            visit(child)

    visit(tree)
    return {name for name in found if name.split(".")[0] in ("ponder", "ppl", "models", "inference")}


def package_of(module):
    """The folder that a module lives in."""
    return next(
        p for p in ("ponder.models", "ponder.inference", "ponder") if (module + ".").startswith(p + ".")
    )


def forbidden(module, imported):
    """Those of the imported modules that a module must not know."""
    package = package_of(module)
    if is_command_line(module):
        return {name for name in imported if name.split(".")[0] != "ponder"}
    allowed = {
        "ponder.models": lambda name: package_of(name) == "ponder.models",
        "ponder": lambda name: package_of(name) == "ponder" or name in NEUTRAL,
        "ponder.inference": lambda name: (
            package_of(name) in ("ponder", "ponder.inference") or name in NEUTRAL
        ),
    }[package]
    return {
        name
        for name in imported
        if name.split(".")[0] != "ponder" or not allowed(name) or (is_command_line(name) and name != module)
    }


@pytest.mark.parametrize("module", MODULES)
def test_import_direction(module):
    imported = imports(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    assert not forbidden(module, imported)


@pytest.mark.parametrize(
    ("module", "code", "wrong"),
    [
        ("ponder.models.cache", "def f():\n    from ponder.protocols import Move", {"ponder.protocols"}),
        ("ponder.models.cache", "import ponder", {"ponder"}),
        ("ponder.generation", "from ponder.models import TableLM", {"ponder.models"}),
        ("ponder.generation", "from ponder.models import decoder", {"ponder.models.decoder"}),
        ("ponder.generation", "from ponder.models import rows, protocols", set()),
        ("ponder.generation", "import ponder\nx = lambda: ponder.inference.smc", {"ponder.inference"}),
        ("ponder.generation", "from ponder.inference.driver import run", {"ponder.inference.driver"}),
        ("ponder.generation", "from ponder.cli import main", {"ponder.cli"}),
        ("ponder.inference.driver", "from ponder.models.cache import fork", {"ponder.models.cache"}),
        ("ponder.inference.driver", "from ponder.posterior import Posterior", set()),
        ("ponder.inference.driver", "from ppl.posterior import Posterior", {"ppl.posterior"}),
        ("ponder.cli_sample", "from ponder.models import TableLM", set()),
        ("ponder.posterior", "if TYPE_CHECKING:\n    from ponder import inference", set()),
    ],
)
def test_the_direction_is_noticed(module, code, wrong):
    assert forbidden(module, imports(ast.parse(code))) == wrong


LIGHT = """
import sys
import ponder
assert "jax" not in sys.modules
assert all(getattr(ponder, name) for name in ponder._HOMES)
heavy = [m for m in ("transformers", "flax", "numpyro", "matplotlib", "rich", "typer", "optax", "safetensors",
                     "tokenizers", "outlines_core", "llguidance", "gguf", "jinja2") if m in sys.modules]
assert not heavy, heavy
loaded = [m for m in sys.modules if m.startswith(("ponder.models.", "ponder.inference"))]
assert set(loaded) == {"ponder.models.protocols", "ponder.models.rows"}, loaded
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


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_packages_are_flat_and_installed():
    for package, folder in FOLDERS.items():
        assert not [p for p in folder.iterdir() if p.is_dir() and (p / "__init__.py").exists()]
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


@pytest.mark.parametrize("package", FOLDERS)
def test_no_public_name_is_that_of_a_module(package):
    """Importing such a module would put it in the place of the function: `ponder.regex` is no module."""
    for name in public_names(package):
        if f"{package}.{name}" in MODULES:
            assert inspect.ismodule(getattr(import_module(package), name)), name


def test_unknown_names_are_attribute_errors():
    for package in ("ponder", "ponder.models"):
        with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nonsense'"):
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
