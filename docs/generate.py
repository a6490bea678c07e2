"""Writes what can be generated: cli.md from the commands' own help, the table of methods, the drawing of the layers,
the tables and the picture of measured suites.

`--check` only compares.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import tables

from lorashelf import METHODS, documents
from lorashelf.cli.app import MODULES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "src" / "lorashelf"
CLI_HEAD = """# Command line

Generated from the commands' own help by `docs/generate.py`. ADAPTER is a PEFT folder, a hub id in the local cache
(owner/name or owner/name@revision), a file of `compress`, or NAME=one of these; a task's name is NAME, else `--task`,
else the name of the folder, or of the file without `.lsc`.
`--json` prints one JSON document on stdout; progress and notices go to stderr.

Exit codes: 0 done · 1 a bug · 2 usage, unknown name, missing extra, taken or bad task name · 3 adapter refused ·
4 shelf (refused, stale, locked, corrupt, over budget, newer format), disk, output that cannot be written · 5 model ·
6 the format of an export cannot hold an adapter ·
128 + the signal's number when interrupted (130 Ctrl-C, 143 SIGTERM, 129 SIGHUP; what was committed stays) ·
141 the reader of stdout closed the pipe.
Under `--json` an error prints `{"error": {"kind", "message", "where", "cure"}}`: what happened, the file or folder (or
null), and what helps (or null), a line for each cure. That of a refused adapter has its `faults` too, and the cure of
each in `cures`. Where a document has a table below its command's help, those keys stay, and more may be added; a
document without a table may change. The document of `eval` is in [evaluation](evaluation.md#the-json-document).
`--bytes` takes `1600000`, `1.6MB` (kB, MB, GB, TB are powers of 1000) or `1.5MiB` (KiB, MiB, GiB, TiB: of 1024); sizes
are printed in powers of 1000. `~` is replaced in every path.
"""


def help_of(command: str) -> str:
    """The help text, 100 columns wide and without colours."""
    environment = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    run = [sys.executable, "-m", "lorashelf", *command.split(), "--help"]
    text = subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def commands() -> Iterator[str]:
    """Every command as it is typed."""
    for name in MODULES:
        module = import_module(f"lorashelf.cli.{name}")
        group = "" if tuple(module.COMMANDS) == tuple(MODULES[name]) else f"{name} "
        yield from (group + command for command in module.COMMANDS)


def cli() -> str:
    """docs/cli.md."""
    parts = []
    for command in commands():
        tables = "".join(map(keys_of, documents.DOCUMENTS.get(command, ())))
        parts.append(f"\n## {command}\n\n```text\n{help_of(command)}\n```\n{tables}")
    return CLI_HEAD + "".join(parts)


def keys_of(document: Any) -> str:
    """A table of the keys of a JSON document, from the class that declares them."""
    rows = ["| key | meaning |", "|---|---|"]
    for key in document.__annotations__:
        rare = "" if key in document.__required_keys__ else "may be absent; "
        rows.append(f"| `{key}` | {rare}{meanings(document.__module__, document.__name__)[key]} |")
    return f"\n{document.__doc__}\n\n" + "\n".join(rows) + "\n"


@cache
def meanings(module: str, name: str) -> dict[str, str]:
    """Key → the text below its declaration, those of the base classes included."""
    tree = ast.parse(inspect.getsource(import_module(module)))
    classes = {each.name: each for each in tree.body if isinstance(each, ast.ClassDef)}
    found: dict[str, str] = {}
    for base in classes[name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            found |= meanings(module, base.id)
    for declared, text in itertools.pairwise(classes[name].body):
        if isinstance(declared, ast.AnnAssign) and isinstance(declared.target, ast.Name):
            found[declared.target.id] = ast.literal_eval(ast.unparse(text))
    return found


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
    return tables.replaced(text, "layers", "end layers", "\n".join(["```", *rows[1:], "```"]))


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
    return tables.replaced(text, "methods", "end", "\n".join(rows))


PARTS = {
    "methods.md": [methods],
    "architecture.md": [layers],
    "results.md": [
        tables.results,
        tables.merges,
        tables.frontier,
        tables.scores,
        tables.longer,
        tables.peers,
        tables.bases,
        tables.seeds,
        tables.published,
        tables.score_types,
        tables.similarities,
        tables.purity,
        tables.guide,
        tables.shown,
    ],
    "coded.md": [tables.predicted],
    "../README.md": [tables.proof],
}


def main() -> int:
    """Write, or with --check compare and print what is stale."""
    wanted = {HERE / "cli.md": cli()}
    for name, writers in PARTS.items():
        wanted[HERE / name] = reduce(lambda text, write: write(text), writers, (HERE / name).read_text())
    wanted |= tables.pictures()
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
