"""Task files: what a task is, beside its adapter (prompt, type, language, metric, length)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FIELDS: dict[str, type] = {"prompt": str, "type": str, "language": str, "metric": str, "max_new_tokens": int}


def read_task_file(path: str | Path) -> dict[str, Any]:
    """The fields of a task.toml: prompt, type, language, metric (strings), max_new_tokens (int); all optional.

    Raises UsageError naming every unknown or mistyped field.
    """
    path = Path(path)
    try:
        fields = tomllib.loads(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"the task file cannot be read: {error}", where=str(path), cure="give a TOML file") from error
    faults = [f"unknown field {name!r}" for name in fields if name not in FIELDS]
    faults += [
        f"{name} is {fields[name]!r}, not {'a string' if kind is str else 'a whole number'}"
        for name, kind in FIELDS.items()
        if name in fields and type(fields[name]) is not kind
    ]
    if faults:
        raise UsageError("; ".join(faults), where=str(path), cure=f"the fields are {', '.join(FIELDS)}")
    return fields
