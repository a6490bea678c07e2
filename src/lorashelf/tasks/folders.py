"""Tasks: what belongs to a task besides its adapter, and its examples.

A task folder is `<type>-<language>/` with `task.toml` and `{train,validation,test}.jsonl`; a line is
`{"input": str, "output": str}` and optionally `"references": [str, …]`. A task of your own has the same form: a prompt,
and a metric or none.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import expanded, read_file
from ..digest import canonical_json, digest
from ..errors import TaskDataError, UnknownName, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "task.toml"
SPLITS = ("train", "validation", "test")
FIELDS: dict[str, type] = {"prompt": str, "type": str, "language": str, "metric": str, "max_new_tokens": int}


@dataclass(frozen=True, slots=True)
class Example:
    """One example: a user's text, the wanted answer, and other answers that are equally good."""

    input: str
    output: str
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """Examples of one task and their common instruction: what a loss is measured on."""

    task: str
    instruction: str
    examples: tuple[Example, ...]

    @property
    def digest(self) -> str:
        """Identifies instruction and examples, in order."""
        records = [[e.input, e.output, *e.references] for e in self.examples]
        return digest([canonical_json([self.instruction, records])])

    def drawn(self, limit: int | None, seed: int = 0) -> ExampleSet:
        """Return `limit` of the examples, drawn by (seed, task), in their order; all if there are no more."""
        if limit is None or limit >= len(self.examples):
            return self
        rng = np.random.default_rng([seed, *self.task.encode()])
        chosen = rng.choice(len(self.examples), size=limit, replace=False)
        return replace(self, examples=tuple(self.examples[i] for i in sorted(chosen)))


@dataclass(frozen=True, slots=True)
class Task:
    """A task and its examples by split; with `metric` None only the loss is measured."""

    name: str
    prompt: str
    type: str
    language: str = ""
    metric: str | None = None
    max_new_tokens: int = 64
    splits: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)

    def examples(self, split: str, limit: int | None = None, seed: int = 0) -> ExampleSet:
        """Return a split's examples, or `limit` of them drawn by (seed, task), in their order. Raises UnknownName."""
        if split not in self.splits:
            raise UnknownName(f"split of {self.name}", split, list(self.splits))
        return ExampleSet(self.name, self.prompt, self.splits[split]).drawn(limit, seed)


def read_task_file(path: str | Path) -> dict[str, Any]:
    """Return the fields of a task.toml: prompt, type, language, metric (strings), max_new_tokens (int); all optional.

    Raises UsageError naming every unknown or mistyped field.
    """
    fields, faults = _fields(expanded(path))
    if faults:
        cure = "; ".join(dict.fromkeys(faults.values()))
        raise UsageError("; ".join(faults), where=str(path), cure=cure)
    return fields


def _fields(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the fields of a task.toml, and its faults with their cures."""
    try:
        fields = tomllib.loads(read_file(path).decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        return {}, dict([_unread("the task file", error)])
    except (ValueError, RecursionError) as error:
        return {}, {f"the task file is not TOML: {error}": 'a line is name = value, text in quotes: prompt = "…"'}
    return fields, _field_faults(fields)


def checked_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a task's fields. Raises UsageError naming every unknown or mistyped one and an empty prompt."""
    faults = _field_faults(fields)
    if "prompt" in fields and not str(fields["prompt"]).strip():
        faults["the prompt is empty"] = "give a prompt"
    if faults:
        raise UsageError("; ".join(faults), cure="; ".join(dict.fromkeys(faults.values())))
    return dict(fields)


def _field_faults(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the unknown and mistyped fields, with their cures."""
    known = f"the fields are {', '.join(FIELDS)}"
    faults = {f"unknown field {name!r}": known for name in fields if name not in FIELDS}
    for name, kind in FIELDS.items():
        if name in fields and type(fields[name]) is not kind:
            wanted = "a string" if kind is str else "a whole number"
            faults[f"{name} is {fields[name]!r}, not {wanted}"] = f"give {name} as {wanted}"
    if type(fields.get("max_new_tokens", 1)) is int and not 0 < fields.get("max_new_tokens", 1) < 2**31:
        faults[f"max_new_tokens is {fields['max_new_tokens']}"] = "give max_new_tokens as 1 or more, below 2^31"
    return faults


def _unread(what: str, error: OSError | UnicodeDecodeError) -> tuple[str, str]:
    """Return the fault of a file that cannot be read, and its cure."""
    if isinstance(error, UnicodeDecodeError):
        return f"{what} is not UTF-8: {error}", "save it as UTF-8 (iconv -t UTF-8)"
    cure = "add it" if isinstance(error, FileNotFoundError) else "check the permissions"
    return f"{what} cannot be read: {error.strerror}", cure


def fields_for(path: str | Path, task: str) -> dict[str, Any]:
    """Return the fields of a task.toml, of a task folder, or of a task's folder in a folder of tasks ({} if not there).

    Raises UsageError.
    """
    path = expanded(path)
    if not os.path.isdir(path):
        return read_task_file(path)
    found = next((file for file in (path / FILE, path / task / FILE) if file.exists()), None)
    return read_task_file(found) if found else {}


def read_task(folder: str | Path) -> Task:
    """Read a task folder. Raises TaskDataError with file, line and field of all faults."""
    folder = expanded(folder)
    fields, faults = _fields(folder / FILE)
    if not faults and not fields.get("prompt"):
        faults["the task has no prompt"] = f'add prompt = "…" to {FILE}'
    faults = {f"{FILE}: {fault}": cure for fault, cure in faults.items()}
    splits = {
        split: _read_lines(folder / f"{split}.jsonl", faults)
        for split in SPLITS
        if (folder / f"{split}.jsonl").exists()
    }
    if not splits:
        files = [f"{split}.jsonl" for split in SPLITS]
        faults[f"there is no {' or '.join(files)}"] = f"add {' or '.join(files)}"
    if faults:
        raise TaskDataError(faults, where=str(folder))
    name = os.path.basename(os.path.abspath(folder))  # a link's own name, as for adapters
    kind = fields.pop("type", name.split("-")[0])
    return Task(name=name, type=kind, splits=splits, **fields)


def read_tasks(folder: str | Path) -> dict[str, Task]:
    """Read every task folder in a folder, or the folder itself if it is one; returns tasks by name.

    Raises TaskDataError with the faults of all folders, UsageError if none is found.
    """
    folder = expanded(folder)
    if (folder / FILE).exists():
        task = read_task(folder)
        return {task.name: task}
    found = sorted(path.parent for path in folder.glob(f"*/{FILE}"))
    if not found:
        raise UsageError("no task folder here", where=str(folder), cure=f"a task folder holds {FILE} and JSONL files")
    tasks: dict[str, Task] = {}
    faults: dict[str, str] = {}
    for path in found:
        try:
            tasks[path.name] = read_task(path)
        except TaskDataError as error:
            faults |= {f"{path.name}: {fault}": cure for fault, cure in error.cures.items()}
    if faults:
        raise TaskDataError(faults, where=str(folder))
    return tasks


_LINE = 'a line is {"input": "…", "output": "…"}'
_REFERENCES = '"references" is a list of strings: ["…", "…"]'
_HALF = "write the character itself, or both surrogates"


def _read_lines(path: Path, faults: dict[str, str]) -> tuple[Example, ...]:
    examples = []
    try:
        text = read_file(path).decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        fault, cure = _unread(path.name, error)
        faults[fault] = cure
        return ()
    lines = text.rstrip("\r\n").split("\n") if text.strip() else []  # U+2028 and the like may occur inside a text
    for number, line in enumerate(lines, 1):
        example = _example(line, f"{path.name} line {number}", faults)
        if example:
            examples.append(example)
    if not text.strip():
        faults[f"{path.name} is empty"] = f"add lines to {path.name}, or delete it"
    return tuple(examples)


def _example(line: str, where: str, faults: dict[str, str]) -> Example | None:
    before = len(faults)
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        faults[f"{where} is not JSON: {error}"] = _LINE
        return None
    if not isinstance(record, dict):
        faults[f"{where} is not a JSON object"] = _LINE
        return None
    for name in ("input", "output"):
        if not isinstance(record.get(name), str) or not record[name].strip():
            faults[f"{where}: {name!r} is {record.get(name)!r}; a non-empty string is needed"] = _LINE
        elif _broken(record[name]):
            faults[f"{where}: {name!r} contains an unpaired surrogate, which UTF-8 cannot encode"] = _HALF
    references = record.get("references", [])
    if not isinstance(references, list) or not all(isinstance(item, str) and item.strip() for item in references):
        faults[f"{where}: 'references' is not a list of non-empty strings"] = _REFERENCES
    elif any(map(_broken, references)):
        faults[f"{where}: 'references' contains an unpaired surrogate, which UTF-8 cannot encode"] = _HALF
    if len(faults) > before:
        return None
    return Example(record["input"], record["output"], tuple(references))


def _broken(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)
