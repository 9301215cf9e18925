"""What README, docs and notebooks say: programs run and print what is shown, names and links lead somewhere.

The programs load real models, so they are slow.
"""

import contextlib
import io
import re
from importlib import import_module
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.M | re.S)


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    """Programs of a page in order, with the line where each starts and what it prints, if that is shown."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        language, content = match.groups()
        if language == "python":
            found.append((text[: match.start()].count("\n") + 1, content, None))
        else:
            line, program, shown = found.pop()
            assert shown is None, f"{name_of(page)}: two outputs of the program in line {line}"
            found.append((line, program, content))
    return found


def shape(output):
    """The start of each line, whatever its figures: these differ in the last digits between machines."""
    return [re.sub(r"[\d.]+", "0", line)[:24] for line in output.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_programs_run(page, tmp_path, monkeypatch):
    """The programs of a page run in order, as one reads them: later ones may use what earlier ones made.

    With JAX's own settings, which a reader has, and not with the strict ones of the tests.
    """
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for line, program, shown in blocks(page):
        out = io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
        ):
            # Line breaks in front, so that a traceback names the page's own lines.
            exec(compile("\n" * line + program, name_of(page), "exec"), names)
        if shown is not None:
            assert shape(out.getvalue()) == shape(shown), f"{name_of(page)}, line {line}"
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_notebook_runs(path):
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    # An estimate of the evidence is compared with the exact one in the last cell.
    assert abs(float(notebook.cells[-1].outputs[-1]["data"]["text/plain"])) < 5


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    """Those of README too, which the build of the site does not see."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_public_names_are_in_the_reference():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", pages, re.M))
    for package in ("ponder", "ponder.models", "ponder.inference", "ponder.calibration", "ponder.testing"):
        module = import_module(package)
        names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
        for name in names:
            value = getattr(module, name)
            of_ponder = str(getattr(value, "__module__", "")).startswith("ponder")
            if callable(value) and of_ponder:
                assert f"{package}.{name}" in shown, f"{package}.{name} is in no page of docs/reference"


SPAN = r"`[^`\n]+`"
NAMES_IN_FILE = re.compile(rf"((?:{SPAN}(?:,| and)\s+)*{SPAN})\s+in\s+`([^`\s]+\.py)`")


def test_the_map_names_what_exists():
    """All rooms, and no files, functions or classes that are gone: docs/house.md leads through them."""
    text = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    spans = {span.strip("`") for span in re.findall(SPAN, text)}
    files = {span for span in spans if "/" in span or span.endswith((".py", ".md", ".toml"))}
    assert not [file for file in files if not (ROOT / file).exists()]
    folders = [ROOT / name for name in ("ppl", "models", "inference", "tests")]
    rooms = {name_of(path.parent) for folder in folders for path in folder.rglob("*/__init__.py")}
    assert rooms <= files | {"ppl", "models", "inference"}
    sources = [path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")]
    words = {word for source in sources for word in re.findall(r"\w+", source)}
    for span in spans - files:
        assert not re.fullmatch(r"[\w.]+", span) or set(span.split(".")) <= words, span
    for names, file in NAMES_IN_FILE.findall(text):
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"(\w+)`", names):
            assert re.search(rf"^\s*(?:def|class) {name}\b|^{name}\b.* = ", source, re.M), f"{name} in {file}"
