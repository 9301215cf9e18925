"""The house: which room may import which (imports for types included), no circles, and what is installed.

`docs/house.md` says the same in words. A change of the table needs its reason there.
"""

import ast
import graphlib
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"ponder": ROOT / "ppl", "ponder.models": ROOT / "models", "ponder.inference": ROOT / "inference"}


def modules():
    """Dotted name and path of every module."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(inner[:-1] if inner[-1] == "__init__" else inner)])] = path
    return found


MODULES = modules()
PACKAGES = sorted(name for name, path in MODULES.items() if path.stem == "__init__")

# Model code that may be used without knowing any model.
NEUTRAL = [
    "ponder.models.protocols",
    "ponder.models.pytrees",
    "ponder.models.rows",
    "ponder.models.step_form",
]
WORDS = [*NEUTRAL, "ponder.arguments", "ponder.protocols", "ponder.bases", "ponder.foreign"]
KERNELS = [*WORDS, "ponder.host", "ponder.posterior", "ponder.inference.running"]

ANYTHING = object()

# Room or module, and which rooms or modules it may import besides itself. The most specific name counts.
TABLE = {
    "ponder": [],
    "ponder.arguments": [],
    "ponder.protocols": NEUTRAL,
    "ponder.bases": [*NEUTRAL, "ponder.arguments", "ponder.protocols"],
    "ponder.foreign": [*NEUTRAL, "ponder.arguments", "ponder.protocols", "ponder.bases"],
    "ponder.host": [],
    "ponder.automata": NEUTRAL,
    "ponder.program": [*WORDS, "ponder.host", "ponder.automata"],
    "ponder.potentials": [*WORDS, "ponder.host", "ponder.automata", "ponder.program"],
    "ponder.posterior": WORDS,
    "ponder.rewards": [
        *WORDS,
        "ponder.host",
        "ponder.automata",
        "ponder.program",
        "ponder.potentials",
        "ponder.posterior.figure",
    ],
    "ponder.calibration": ["ponder.rewards"],
    "ponder.enumeration": [*WORDS, "ponder.program"],
    "ponder.testing": [
        *WORDS,
        "ponder.host",
        "ponder.program",
        "ponder.potentials",
        "ponder.posterior",
        "ponder.enumeration",
        "ponder.tokenisations",
    ],
    "ponder.tokenisations": [*WORDS, "ponder.program", "ponder.potentials"],
    "ponder.models": [],
    "ponder.models.loading": ["ponder.models"],
    "ponder.inference": [
        "ponder.inference.running",
        "ponder.inference.particles",
        "ponder.inference.chains",
        "ponder.inference.search",
        "ponder.inference.exhaustive",
        "ponder.inference.resampling",
    ],
    "ponder.inference.running": [*WORDS, "ponder.host", "ponder.posterior"],
    "ponder.inference.particles": KERNELS,
    "ponder.inference.chains": [*KERNELS, "ponder.inference.particles"],
    "ponder.inference.search": [*KERNELS, "ponder.inference.particles"],
    "ponder.inference.exhaustive": [
        *KERNELS,
        "ponder.inference.particles",
        "ponder.program",
        "ponder.enumeration",
    ],
    "ponder.inference.resampling": ["ponder.inference.particles"],
    # Applications may use anything, and nothing else may use them.
    "ponder.tasks": ANYTHING,
    "ponder.cli": ANYTHING,
    "ponder.__main__": ANYTHING,
}


def within(name, room):
    return name == room or name.startswith(room + ".")


def room_of(module):
    """The row of the table that a module belongs to."""
    return max((room for room in TABLE if within(module, room)), key=len)


def imports(tree):
    """Absolute names of what the code imports or reads as attributes of `ponder`, wherever it stands."""
    found, aliases = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
            # `import a.b` binds `a`, `import a.b as c` binds `a.b`.
            for alias in node.names:
                top = alias.name.split(".")[0]
                aliases[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if aliases.get(node.value.id) == "ponder" and f"ponder.{node.attr}" in MODULES:
                found.add(f"ponder.{node.attr}")
    return {name for name in found if name.split(".")[0] in ("ponder", "ppl", "models", "inference")}


def forbidden(module, imported):
    """Those of the imported modules that a module must not know."""
    room = room_of(module)
    return {name for name in imported if not may_import(room, name)}


def may_import(room, name):
    if name.split(".")[0] != "ponder":
        return False  # `ppl`, `models` and `inference` are names of folders
    allowed = TABLE[room]
    return allowed is ANYTHING or room_of(name) in {room, *allowed} or name in allowed


@pytest.mark.parametrize("module", MODULES)
def test_import_direction(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert not forbidden(module, imports(tree)), f"{room_of(module)} may import {TABLE[room_of(module)]}"


@pytest.mark.parametrize(
    ("module", "code", "wrong"),
    [
        ("ponder.models.cache", "def f():\n    from ponder.protocols import Move", {"ponder.protocols"}),
        ("ponder.models.cache", "import ponder", {"ponder"}),
        (
            "ponder.models.cache",
            "from ponder.models.loading.hub import snapshot",
            {"ponder.models.loading.hub"},
        ),
        ("ponder.models.loading.hub", "from ponder.models.config import DecoderConfig", set()),
        ("ponder.program.step", "from ponder.models import TableLM", {"ponder.models"}),
        ("ponder.program.step", "from ponder.models import decoder", {"ponder.models.decoder"}),
        ("ponder.program.step", "from ponder.models import rows, protocols", set()),
        (
            "ponder.program.step",
            "import ponder\nx = lambda: ponder.inference.smc",
            {"ponder", "ponder.inference"},
        ),
        (
            "ponder.program.step",
            "if TYPE_CHECKING:\n    from ponder.potentials.combining import Power",
            {"ponder.potentials.combining"},
        ),
        ("ponder.potentials.text", "from ponder.program.generation import Generation", set()),
        ("ponder.potentials.text", "from ponder.cli.entry import main", {"ponder.cli.entry"}),
        ("ponder.rewards.links", "from ponder.posterior.figure import new_figure", set()),
        ("ponder.rewards.links", "from ponder.posterior.saving import load", {"ponder.posterior.saving"}),
        ("ponder.posterior.saving", "if True:\n    from ponder import inference", {"ponder.inference"}),
        ("ponder.inference.running.driver", "from ponder.models.cache import fork", {"ponder.models.cache"}),
        ("ponder.inference.running.driver", "from ponder.posterior.posterior import Posterior", set()),
        (
            "ponder.inference.running.driver",
            "from ponder.inference.particles.smc import SMC",
            {"ponder.inference.particles.smc"},
        ),
        ("ponder.inference.chains.particle_gibbs", "from ponder.inference.particles.smc import SMC", set()),
        ("ponder.inference.particles.smc", "from ppl.posterior import Posterior", {"ppl.posterior"}),
        ("ponder.cli.sample", "from ponder.models import TableLM", set()),
        ("ponder.tasks.countdown", "import ponder", set()),
        ("ponder.testing", "from ponder.tasks.countdown import problems", {"ponder.tasks.countdown"}),
    ],
)
def test_the_direction_is_noticed(module, code, wrong):
    assert forbidden(module, imports(ast.parse(code))) == wrong


def test_the_table_has_a_row_for_every_room():
    assert set(PACKAGES) - {"ponder.tasks.training"} <= set(TABLE)
    assert set(TABLE) <= set(MODULES)


def test_no_import_circles():
    """Of modules, imports inside functions and for types included; a room's `__init__` only hands on."""
    graph = {}
    for module, path in MODULES.items():
        if path.stem != "__init__":
            found = imports(ast.parse(path.read_text(encoding="utf-8")))
            graph[module] = {name for name in found if name in MODULES and name not in PACKAGES}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_every_room_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert sorted(settings["tool"]["setuptools"]["packages"]) == PACKAGES


def test_every_room_says_what_it_is():
    for package in PACKAGES:
        assert ast.get_docstring(ast.parse(MODULES[package].read_text(encoding="utf-8"))), package


def test_tests_mirror_the_rooms():
    rooms = {path.parent for path in MODULES.values()}
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")} - {ROOT / "tests"}
    mirrored = {ROOT / folder.relative_to(ROOT / "tests") for folder in folders}
    assert mirrored <= rooms | {ROOT / "benchmarks"}


def test_optax_is_known_where_training_is():
    for module, path in MODULES.items():
        if not within(module, "ponder.tasks.training"):
            names = [
                name.name if isinstance(node, ast.Import) else node.module or ""
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in node.names
            ]
            assert not [name for name in names if name.split(".")[0] == "optax"], module
