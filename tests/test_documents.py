"""What README, docs and notebooks show must run; they load the real model, so these are slow."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


README = (ROOT / "README.md").read_text()
PROGRAMS = {
    f"{path.name}-{number}": program
    for path in (ROOT / "README.md", ROOT / "docs" / "reasoning.md")
    for number, program in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S))
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_run(name):
    """The README's first program prints what is shown: figures may differ in the last digits."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(PROGRAMS[name], name, "exec"), {})
    if name == "README.md-0":
        shown = re.search(r"```text\n(.*?)```", README, re.S).group(1)
        shape = [re.sub(r"[\d.]+", "0", line)[:24] for line in shown.splitlines()]
        assert [re.sub(r"[\d.]+", "0", line)[:24] for line in out.getvalue().splitlines()] == shape


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
