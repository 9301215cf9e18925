"""What README and notebooks show must run; both load the real model, so these are slow."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_readme_program_prints_what_it_says():
    """Same program, same shape of output; the figures may differ in the last digits between machines."""
    readme = (ROOT / "README.md").read_text()
    program = re.search(r"```python\n(.*?)```", readme, re.S).group(1)
    shown = re.search(r"```text\n(.*?)```", readme, re.S).group(1)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "README.md", "exec"), {})
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
