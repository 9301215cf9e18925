"""Every benchmark script starts: its imports are right, and it explains its options."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted(
    path for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith(("test_", "conftest"))
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help(path, monkeypatch, capsys):
    if path.stem == "decode":
        pytest.importorskip("typer")
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(path), run_name="__main__")
    assert left.value.code == 0
    assert capsys.readouterr().out.lstrip().lower().startswith("usage: ")
