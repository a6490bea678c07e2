"""Start-up: `import lorashelf` and `lorashelf --help` against `import numpy`.

    python benchmarks/start.py

Whole processes, from start to exit, interleaved. Bytecode is compiled before, as pip does when it installs, and the
children may write theirs.
"""

from __future__ import annotations

import compileall
import importlib.util
import sys
from pathlib import Path

import common
from common import child, paired, spread, times


def main() -> int:
    options = common.arguments(__doc__).parse_args()
    rounds = options.rounds or 15
    common.heading("Start-up, whole processes", options.threads, ["typer"])
    package = importlib.util.find_spec("lorashelf")
    assert package
    assert package.origin
    compileall.compile_dir(Path(package.origin).parent, quiet=2)
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -c 'import numpy'": [sys.executable, "-c", "import numpy"],
        "python -c 'import lorashelf'": [sys.executable, "-c", "import lorashelf"],
        "python -m lorashelf --help": [sys.executable, "-m", "lorashelf", "--help"],
    }
    sides = {name: lambda command=command: child(command, options.threads) for name, command in commands.items()}
    common.interleaved(sides, 1)  # compiles what else is imported
    runs = common.interleaved(sides, rounds)
    walls = {name: [run.wall for run in found] for name, found in runs.items()}
    bare, imported, helped = (walls[name] for name in list(commands)[1:])
    ratios = {name: paired(found, bare) for name, found in walls.items()}
    rows = [
        [name, *spread(walls[name]), common.seconds(min(run.cpu for run in runs[name])), times(ratios[name])]
        for name in commands
    ]
    common.table(["", "wall min", "median", "CPU min", "to numpy, median of pairs"], rows)
    return common.verdicts(
        [
            ("import lorashelf, times import numpy", paired(imported, bare), "<=", 2),
            ("lorashelf --help, times import numpy", paired(helped, bare), "<=", 3.5),
        ],
        options.threads,
    )


if __name__ == "__main__":
    sys.exit(main())
