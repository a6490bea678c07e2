"""An evaluation on disk: the document, the predictions, a table for spreadsheets.

FOLDER/result.json                  the JSON document of `eval`
FOLDER/predictions/<task>.jsonl     one line per example: input, prediction, output, references, nll, tokens
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import atomic
from ..errors import UsageError
from ..names import task_name
from .compare import Evaluation

FILE = "result.json"
PREDICTIONS = "predictions"
COLUMNS = (
    *("task", "n", "tokens", "dropped", "loss", "score", "low", "high", "metric"),
    *("own_loss", "own_score", "zero_shot_loss", "S", "loss_kept"),
)
_STATED = {"base": str, "prompt": str, "backend": str, "split": str}
_OF_A_TASK = {"loss": float, "examples": str, "max_new_tokens": int}


def write_result(evaluation: Evaluation, folder: Path) -> None:
    """Write predictions and then the document into a folder, replacing those of an earlier run.

    Raises TaskNameError for a task name that is not valid as a file name; DiskError.
    """
    texts = {f"{task_name(name)}.jsonl": _lines(m.records()) for name, m in evaluation.tasks.items()}
    predictions = folder / PREDICTIONS
    for path in (folder, predictions):
        if not path.exists():
            atomic.make_parents(path)
            atomic.make_folder(path)
    atomic.remove(folder / FILE)
    with atomic.refusals(predictions, "read"):
        old = [path for path in predictions.iterdir() if path.name not in texts]
    for path in old:
        atomic.remove(path)
    for name, text in texts.items():
        atomic.replace_file(predictions / name, text, predictions)
    document = json.dumps(evaluation.document(), ensure_ascii=False, indent=1) + "\n"
    atomic.replace_file(folder / FILE, document.encode(), folder)


def write_csv(document: Mapping[str, Any], path: Path) -> None:
    """Write one row per task; unknown values are empty. Raises DiskError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"task": name, **record} for name, record in document["tasks"].items())
    atomic.replace_file(path, text.getvalue().encode(), path.absolute().parent)


def read_result(path: Path) -> dict[str, Any]:
    """Read the document of an earlier evaluation from its JSON file or its output folder.

    Raises UsageError naming all that is missing or mistyped.
    """
    file = path / FILE if path.is_dir() else path
    cure = "give the output of `lorashelf eval --json`, or the folder given to -o"
    try:
        document = json.loads(atomic.read_file(file))
        tasks = dict(document["tasks"])
    except OSError as error:
        what = f"the earlier evaluation cannot be read: {error.strerror}"
        raise UsageError(what, where=str(file), cure=cure) from error
    except (ValueError, RecursionError) as error:
        what = f"this is not an evaluation: it is not JSON ({error})"
        raise UsageError(what, where=str(file), cure=cure) from error
    except (KeyError, TypeError) as error:
        raise UsageError("this is not an evaluation: it has no tasks", where=str(file), cure=cure) from error
    faults = [
        f"{name} is {document.get(name)!r}" for name, kind in _STATED.items() if not _is(document.get(name), kind)
    ]
    for task, record in tasks.items():
        known = record if isinstance(record, dict) else {}
        faults += [
            f"{task}: {name} is {known.get(name)!r}"
            for name, kind in _OF_A_TASK.items()
            if not _is(known.get(name), kind)
        ]
        if known.get("score") is not None and not _is(known["score"], float):
            faults.append(f"{task}: score is {known['score']!r}")
    if faults:
        raise UsageError("this is not an evaluation: " + "; ".join(faults), where=str(file), cure=cure)
    return {**document, "tasks": {task: {"score": None, "metric": None, **record} for task, record in tasks.items()}}


def _is(value: object, kind: type) -> bool:
    """Return whether a JSON value is of a type; integers are numbers, booleans and NaN are not."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not isinstance(value, bool)


def _lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
