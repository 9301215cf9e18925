"""A hook of mkdocs: the three folders under the one name that they are imported by.

The API reference is read from the source files. They are `ppl`, `models` and `inference` here, and `ponder`
only once they are installed; links make the one of the other, so that nothing has to be installed.
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
TREE = ROOT / "build" / "tree"


def on_startup(command, dirty):
    """Lay out `build/tree/ponder`, where mkdocs.yml looks for the package."""
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "ponder"
    package.mkdir(parents=True)
    links = {path.name: path for path in (ROOT / "ppl").iterdir() if path.name != "__pycache__"}
    links |= {name: ROOT / name for name in ("models", "inference")}
    for name, path in links.items():
        (package / name).symlink_to(path)
