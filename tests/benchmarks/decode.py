"""Every job of `ponder bench` at every point of its grid: JSON on stdout, progress and a table on stderr.

    python tests/benchmarks/decode.py > bench.json

Takes the options of `ponder bench`. Compare ratios within one run: machines differ and are noisy. Never a
test.
"""

import sys

from ponder.cli.app import app
from ponder.cli.workload import JOBS

if __name__ == "__main__":
    app(["bench", *(word for name in JOBS for word in ("--jobs", name)), *sys.argv[1:]], prog_name="ponder")
