"""Writes what can be generated: cli.md from the commands' own help, the table of methods, the drawing of the layers,
the tables of measured suites.

`--check` only compares.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

from lorashelf import METHODS
from lorashelf.bench import page
from lorashelf.bench.results import read_results
from lorashelf.bench.suite import read_suite

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "src" / "lorashelf"
SHELF = [
    "demo",
    "init",
    "add",
    "update",
    "cluster",
    "pack",
    "remove",
    "route",
    "ls",
    "set",
    "log",
    "verify",
    "undo",
    "redo",
    "gc",
]
BENCH = ["bench run", "bench status", "bench table", "bench plot"]
COMMANDS = [
    *SHELF,
    "show",
    "compare",
    "plan",
    "threshold",
    "merge",
    "compress",
    "extract",
    "train",
    "eval",
    "generate",
    *BENCH,
]
CLI_HEAD = """# Command line

Generated from the commands' own help by `docs/generate.py`. ADAPTER is a PEFT folder, a hub id in the local cache, or
NAME=either; a task's name is NAME, else `--task`, else the folder's name. `--json` prints one JSON document on stdout;
progress and notices go to stderr.

Exit codes: 0 done · 1 a bug · 2 usage, unknown name, missing extra, taken or bad task name · 3 adapter refused ·
4 shelf (refused, stale, locked, corrupt, over budget, newer format), disk, output that cannot be written · 5 model ·
128 + the signal's number when interrupted (130 Ctrl-C, 143 SIGTERM, 129 SIGHUP; what was committed stays) ·
141 whoever reads stdout went away.
Under `--json` an error prints `{"error": {"kind", "message", "where", "cure"}}`: what happened, the file or folder (or
null), and what helps (or null), a line for each cure. That of a refused adapter has its `faults` too, and the cure of
each in `cures`. `add` prints `{"added": [ITEM, …]}` for any number of adapters, with `error` beside it where one failed
or was refused, and with `skipped` under `--skip-existing`;
ITEM: `{"task", "decision": "open" | "fold" | "refuse", "slot", "scores", "threshold", "members", "merged", "head",
"reversible"}`, the last false where an exact `remove` will not be possible.
`--bytes` takes `1600000`, `1.6MB` (kB, MB, GB, TB are powers of 1000) or `1.5MiB` (KiB, MiB, GiB, TiB: of 1024); sizes
are printed in powers of 1000. `~` is replaced in every path.
"""


def help_of(command: str) -> str:
    """The help text, 100 columns wide and without colours."""
    environment = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    run = [sys.executable, "-m", "lorashelf", *command.split(), "--help"]
    text = subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def cli() -> str:
    """docs/cli.md."""
    parts = [f"\n## {command}\n\n```text\n{help_of(command)}\n```\n" for command in COMMANDS]
    return CLI_HEAD + "".join(parts)


def layers(text: str) -> str:
    """docs/architecture.md with its drawing of the layers that pyproject.toml declares, the highest first."""
    (contract, *_) = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rows = []
    for layer in contract["layers"]:
        names = re.split(r" [|:] ", layer)
        folders = [name for name in names if (PACKAGE / name).is_dir()]
        if not folders and len(names) > 1:
            rows += ["", f"{'ground':<12} {' '.join(f'{name}.py' for name in names)}"]
        for name in folders:
            sentence = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text())) or ""
            inside = [path.name + "/" * path.is_dir() for path in sorted((PACKAGE / name).iterdir())]
            files = " ".join(each for each in inside if not each.startswith("__"))
            rows += ["", f"{name + '/':<12} {sentence.splitlines()[0]}", f"{'':<12} {files}"]
    drawn = "\n".join(["<!-- generated: layers -->", "```", *rows[1:], "```", "<!-- end layers -->"])
    return re.sub(r"<!-- generated: layers -->.*?<!-- end layers -->", lambda _: drawn, text, flags=re.DOTALL)


def methods(text: str) -> str:
    """docs/methods.md with its table of methods."""
    rows = [
        "| method | space | default weights | gauge | copies | inverse | parameters | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, method in sorted(METHODS.items(), key=lambda item: (item[1].space, item[0])):
        parameters = ", ".join(f"`{p.name}={p.default}`" for p in method.parameters.values()) or "–"
        weights = "1/n" if method.weights == "mean" else "1"
        laws = ["yes" if law else "–" for law in (method.gauge, method.duplicate, method.mean_power is not None)]
        rows.append(f"| `{name}` | {method.space} | {weights} | {' | '.join(laws)} | {parameters} | {method.cites} |")
    table = "<!-- generated: methods -->\n" + "\n".join(rows) + "\n<!-- end -->"
    return re.sub(r"<!-- generated: methods -->.*?<!-- end -->", lambda _: table, text, flags=re.DOTALL)


def results(text: str) -> str:
    """docs/results.md with the tables of the suites whose results are committed."""

    def measured(match: re.Match[str]) -> str:
        suite = read_suite(HERE.parent / "suites" / f"{match[1]}.toml")
        found = read_results(suite, suite.folder)
        count = f"{len(found)} of {len(suite.cells)} cells are measured. " if len(found) < len(suite.cells) else ""
        return f"<!-- generated: suite {match[1]} -->\n{count}{page.table(suite, found)}\n<!-- end suite -->"

    return re.sub(r"<!-- generated: suite (\w+) -->.*?<!-- end suite -->", measured, text, flags=re.DOTALL)


PARTS = {"methods.md": methods, "architecture.md": layers, "results.md": results}


def main() -> int:
    """Write, or with --check compare and print what is stale."""
    wanted = {HERE / "cli.md": cli()}
    wanted |= {HERE / name: write((HERE / name).read_text()) for name, write in PARTS.items()}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.name} is stale: run docs/generate.py (make fix)", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
