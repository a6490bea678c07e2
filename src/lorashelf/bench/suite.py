"""A suite of experiments: what is measured on which tasks, as a TOML file.

format = 1
title = "Forty tasks in five slots"
adapters = "../zoo"                       # one PEFT folder per task; relative to this file
data = "../tasks"                         # one task folder per task
limit = 20                                # examples per task, drawn by (seed, task)
reference = "random"                      # other methods with the same merge are compared with this one
shares = ["first_table"]                  # cells that this suite beside it has measured count as measured

[[cells]]
serve = ["base", "own"]                   # the bare base, and each task's own adapter
[[cells]]
code = "coded"                            # each task's own adapter, compressed; or another code: peers.py
percent = [12.5, 1]                       # of the bytes of all adapters in 16 bits
[[cells]]
cluster = ["random", "agglomerative"]     # or arrive = policies, search = "d2c"
slots = 5
merge = ["linear", "ties"]
seed = [0, 22, 44]                        # a list makes one cell per element
measure = ["loss", "answers"]
priority = 1                              # cells of a lower number are measured first
hours = 0.8                               # estimated, per cell, on one idle core
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..atomic import read_file
from ..digest import canonical_json, digest
from ..errors import LorashelfError, UsageError
from ..formats.coded import LEVELS
from ..lora.similarity import METRICS
from ..merging import METHODS
from ..placement.partitioners import PARTITIONERS
from ..placement.policies import COSINE, POLICIES
from .peers import PEERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT = 1
How = Literal["serve", "code", "cluster", "arrive", "search"]
MEASURES = ("loss", "answers")
BY = ("type", "language")
"""The clusterings with one block per problem type, as an oracle would know, or per language, as metadata may state."""
DIRICHLET = "dirichlet"
"""The clustering whose blocks each draw shares of the problem types or languages from a Dirichlet distribution."""
BLOCKS_OF = "blocks_of"
"""The clustering with the blocks of another cell's result, so that merges are compared on the same blocks."""
METHODS_OF: Mapping[How, Sequence[str]] = {
    "serve": ("base", "own"),
    "code": ("coded", *PEERS),
    "cluster": (*BY, DIRICHLET, BLOCKS_OF, *(name for name, method in PARTITIONERS.items() if not method.by_loss)),
    "arrive": tuple(POLICIES),
    "search": tuple(name for name, method in PARTITIONERS.items() if method.by_loss),
}
_COMMON: dict[str, Any] = {
    "slots": 5,
    "merge": "linear",
    "parameters": {},
    "rank": None,
    "dtype": "f32",
    "seed": 0,
    "restore_norm": False,
    "adapter_rank": None,
}
_SEARCH = {name: p for method in METHODS_OF["search"] for name, p in PARTITIONERS[method].parameters.items()}
_OPTIONS: Mapping[How, Mapping[str, Any]] = {
    "serve": {"adapter_rank": None},
    "code": {"percent": None, "levels": LEVELS, "fit": 0},
    "cluster": {**_COMMON, "alpha": 1, "over": "type", "result": None},
    "arrive": {**_COMMON, "order": "random", "threshold": "auto", "similarity": COSINE, "after": None},
    "search": {**_COMMON, **{name: p.default for name, p in _SEARCH.items()}, "examples_per_task": 10},
}
"""The options of each kind of cell, with defaults (`percent` and `result` have none); merges are stored in float32
unless `dtype` is set.
"""
_ONLY_OF: Mapping[str, str] = {"alpha": DIRICHLET, "over": DIRICHLET, "result": BLOCKS_OF}
"""Option → the only clustering that has it."""
_UNNAMED = ("similarity", "after", "restore_norm", "budget", "fit", "adapter_rank")
"""Options that a cell names only if they differ from the default, so that results from before them are still found."""
OVER = ("type", "language")
ORDERS = ("random", "worst", "name")
"""Orders of arrival: drawn by the seed; all tasks of a type in a row, types and tasks drawn; sorted by name."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One assignment of adapters to tasks to measure: how it is made, by which method, with which options."""

    how: How
    method: str
    options: Mapping[str, Any]
    measure: tuple[str, ...]
    priority: int = 1
    hours: float | None = None
    """Estimated by the suite; None: by the measured cells of the same kind."""

    def document(self) -> dict[str, Any]:
        """Return what distinguishes this cell from others; `measure`, `priority` and `hours` do not."""
        return {"how": self.how, "method": self.method, **self.options}

    @property
    def id(self) -> str:
        """A short digest of the document: the name of the cell's result."""
        return digest([canonical_json(self.document())]).removeprefix("b2-")[:16]

    @property
    def label(self) -> str:
        """The cell in one line: the method, and the options that differ from the defaults."""
        return " ".join([self.method, *self.particulars()])

    def particulars(self, but: Sequence[str] = ()) -> list[str]:
        """Return the options that differ from the defaults, except those in `but`, as name=value."""
        defaults = _defaults(self.how, self.method)
        return [
            f"{name}={value}" for name, value in self.options.items() if value != defaults[name] and name not in but
        ]


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite: the folders of adapters and tasks, how examples are drawn, and the cells in order of priority."""

    path: Path
    title: str
    reference: str | None
    adapters: Path | None
    data: Path | None
    tasks: tuple[str, ...] | None
    base: str | None
    model_dtype: str
    split: str
    limit: int | None
    seed: int
    cells: tuple[Cell, ...]
    measured_tasks: tuple[str, ...] | None = None
    """The tasks that are measured, if not all that adapters are assigned to."""
    shared: tuple[Path, ...] = ()
    """The folders of results of other suites, in which cells of this one may already be measured."""

    @property
    def name(self) -> str:
        """The file's name without extension."""
        return self.path.stem

    @property
    def folder(self) -> Path:
        """The default folder for results: beside the file."""
        return self.path.with_suffix(".results")

    @property
    def digest(self) -> str:
        """Identifies what the suite measures; the title and the order of cells do not count."""
        fields: dict[str, Any] = {"tasks": self.tasks, "base": self.base, "model_dtype": self.model_dtype}
        fields |= {"split": self.split, "limit": self.limit, "seed": self.seed}
        fields |= {"measured_tasks": self.measured_tasks} if self.measured_tasks else {}
        cells = sorted((cell.document() for cell in self.cells), key=canonical_json)
        return digest([canonical_json({**fields, "cells": cells})])


def read_suite(path: str | Path) -> Suite:
    """Read a suite's TOML file. Raises UsageError naming every unknown, mistyped or impossible value."""
    path = Path(path)
    try:
        document = tomllib.loads(read_file(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        cure = "give a suite's TOML file; docs/experiments.md has the keys"
        raise UsageError(f"the suite cannot be read: {error}", where=str(path), cure=cure) from error
    faults: list[str] = []
    tables = document.pop("cells", [])
    fields = _fields(document, faults)
    cells: list[Cell] = []
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        faults.append("[[cells]] is missing")
        tables = []
    for number, table in enumerate(tables, 1):
        cells += _cells(dict(table), f"cells {number}", faults)
    if faults:
        raise UsageError("; ".join(faults), where=str(path), cure="docs/experiments.md has the keys")
    first = {cell.id: place for place, cell in reversed(list(enumerate(cells)))}
    unique: dict[str, Cell] = {}
    for cell in sorted(cells, key=lambda cell: cell.priority):
        unique.setdefault(cell.id, cell)
        if len(cell.measure) > len(unique[cell.id].measure):
            unique[cell.id] = replace(unique[cell.id], measure=cell.measure, hours=cell.hours)
    ordered = sorted(unique.values(), key=lambda cell: (cell.priority, first[cell.id]))
    shared = tuple(path.parent / f"{name}.results" for name in fields.pop("shares"))
    folders = {name: path.parent / fields.pop(name) if fields[name] else fields.pop(name) for name in _FOLDERS}
    return Suite(path=path, cells=tuple(ordered), shared=shared, **folders, **fields)


_FOLDERS = ("adapters", "data")
_KEYS: Mapping[str, tuple[type, Any]] = {
    "title": (str, ""),
    "reference": (str, None),
    "shares": (list, []),
    "adapters": (str, None),
    "data": (str, None),
    "tasks": (list, None),
    "measured_tasks": (list, None),
    "base": (str, None),
    "model_dtype": (str, "f32"),
    "split": (str, "validation"),
    "limit": (int, None),
    "seed": (int, 0),
}


def _fields(document: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    version = document.pop("format", None)
    if version != FORMAT:
        faults.append(f"format is {version!r}, not {FORMAT}")
    faults += [f"unknown key {name!r}" for name in document if name not in _KEYS]
    found: dict[str, Any] = {name: document.get(name, default) for name, (_, default) in _KEYS.items()}
    for name, (kind, default) in _KEYS.items():
        if found[name] != default and type(found[name]) is not kind:
            faults.append(f"{name} is {found[name]!r}, not {'a whole number' if kind is int else f'a {kind.__name__}'}")
    for name in ("tasks", "measured_tasks"):
        tasks: Any = found[name]
        if isinstance(tasks, list):
            found[name] = tuple(task for task in tasks if isinstance(task, str))
            if not tasks or len(found[name]) < len(tasks):
                faults.append(f"{name} is not a list of names")
    if isinstance(found["tasks"], tuple) and isinstance(found["measured_tasks"], tuple):
        beyond = sorted({*found["measured_tasks"]} - {*found["tasks"]})
        faults += [f"measured_tasks has {task!r}, which tasks lacks" for task in beyond]
    if not isinstance(found["shares"], list) or not all(isinstance(name, str) for name in found["shares"]):
        faults.append("shares is not a list of names of suites")
        found["shares"] = []
    if isinstance(found["limit"], int) and found["limit"] < 1:
        faults.append(f"limit is {found['limit']}, at least 1 is needed")
    return found


def _cells(table: dict[str, Any], where: str, faults: list[str]) -> Iterator[Cell]:
    """Yield a cell per element of the product of a table's lists; a table with faults, added to `faults`, has none."""
    before = len(faults)
    kinds = [how for how in get_args(How) if how in table]
    if len(kinds) != 1:
        faults.append(f"{where}: give one of {', '.join(get_args(How))}")
        return
    how: How = kinds[0]
    methods = _listed(table.pop(how))
    faults += [
        f"{where}: {how} is {m!r}; choose from {', '.join(METHODS_OF[how])}"
        for m in methods
        if m not in METHODS_OF[how]
    ]
    methods = list(map(str, methods))
    measure, priority = table.pop("measure", ["loss"]), table.pop("priority", 1)
    if not isinstance(measure, list) or not measure or not all(item in MEASURES for item in measure):
        faults.append(f"{where}: measure is {measure!r}, not a list of {', '.join(MEASURES)}")
    hours = table.pop("hours", None)
    if hours is not None and (type(hours) not in (int, float) or not hours >= 0):
        faults.append(f"{where}: hours is {hours!r}, not a number of at least 0")
    if type(priority) is not int:
        faults.append(f"{where}: priority is {priority!r}, not a whole number")
    known = {method: _defaults(how, method) for method in methods}
    faults += [f"{where}: {how} has no option {name!r}" for name in table if not any(name in d for d in known.values())]
    options = {m: {n: _listed(table.get(n, default)) for n, default in known[m].items()} for m in methods}
    found = (_fault(m, n, v) for m in methods for n, values in options[m].items() for v in values)
    faults += dict.fromkeys(f"{where}: {fault}" for fault in found if fault)
    if len(faults) > before:
        return
    for method in methods:
        for combination in itertools.product(*options[method].values()):
            chosen: dict[str, Any] = dict(zip(options[method], combination, strict=True))
            left_out = {name for name in _UNNAMED if name in chosen and chosen[name] == known[method][name]}
            chosen = {name: value for name, value in chosen.items() if name not in left_out}
            if how in ("cluster", "arrive", "search"):
                try:
                    METHODS[chosen["merge"]].checked(chosen["parameters"])
                except LorashelfError as error:
                    faults.append(f"{where}: {error.what}")
                    continue
            yield Cell(how, method, chosen, tuple(dict.fromkeys(["loss", *measure])), priority, hours)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _defaults(how: How, method: Any) -> Mapping[str, Any]:
    """Return the options of a method with their defaults; of an unknown one those of its kind."""
    if how == "code" and method in PEERS:
        return {name: p.default for name, p in PEERS[method].parameters.items()}
    absent = {name for name, only in _ONLY_OF.items() if method != only}
    absent |= {"adapter_rank"} if method == "base" else set()
    absent |= {"slots"} if method in (*BY, BLOCKS_OF) else set()  # as many blocks as types, or as the result has
    return {name: default for name, default in _OPTIONS[how].items() if name not in absent}


def _fault(method: Any, name: str, value: Any) -> str | None:
    """Return what is wrong with the value of a method's option, or None."""
    if method in PEERS:
        return PEERS[method].parameters[name].fault(value)
    if name in _SEARCH:
        return _SEARCH[name].fault(value)
    choices: dict[str, Sequence[Any]] = {
        "dtype": ("f32", "f16", "bf16"),
        "order": ORDERS,
        "merge": tuple(METHODS),
        "over": OVER,
        "similarity": tuple(METRICS),
    }
    if name in choices:
        return None if value in choices[name] else f"{name} is {value!r}; choose from {', '.join(choices[name])}"
    if name == "parameters":
        return None if isinstance(value, dict) else f"parameters is {value!r}, not a table"
    if name == "restore_norm":
        return None if isinstance(value, bool) else f"restore_norm is {value!r}, not true or false"
    if name == "result":
        return None if isinstance(value, str) else f"result is {value!r}, not the name of a result, METHOD-ID"
    if name == "threshold":
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1
        return None if value == "auto" or number else f"threshold is {value!r}, not 'auto' or from -1 to 1"
    if name == "percent":
        number = type(value) in (int, float) and 0 < value <= 100
        return None if number else f"percent is {value!r}, not a number above 0 and at most 100"
    if name == "alpha":
        number = type(value) in (int, float) and 0 < value < math.inf
        return None if number else f"alpha is {value!r}, not a positive number"
    if name in ("rank", "after", "adapter_rank") and value is None:
        return None
    least = 0 if name in ("seed", "fit") else 1
    return None if type(value) is int and value >= least else f"{name} is {value!r}, not a whole number from {least}"
