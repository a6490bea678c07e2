"""The result of a cell as a JSON document, and statistics over several documents.

A document holds the contribution of every example (summed negative log-likelihood in nats, tokens, and the statistics
of its score), so that means, ratios and paired intervals follow from committed files, without a model.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import atomic
from ..errors import UsageError
from ..evaluation.compare import Evaluation, Measured
from ..evaluation.metrics import FORMULAS, metric
from ..evaluation.metrics.kept import LEAST_GAIN, LEAST_SCORE
from ..version import VERSION
from .assignment import Assignment
from .suite import Cell, Suite

FORMAT = 1
DRAWS = 1000
_LIBRARIES = ("numpy", "torch", "transformers", "peft", "vlora-dev", "lorashare")
Vector = NDArray[np.float64]


def path_of(cell: Cell, folder: Path) -> Path:
    """Return the path of a cell's result."""
    return folder / f"{cell.method}-{cell.id}.json"


def conditions(suite: Suite) -> dict[str, Any]:
    """Return a suite's conditions of measurement; results under different conditions are not mixed."""
    return {
        "base": suite.base,
        "model_dtype": suite.model_dtype,
        "split": suite.split,
        "limit": suite.limit,
        "seed": suite.seed,
        "tasks": None if suite.tasks is None else list(suite.tasks),
        **({"measured_tasks": list(suite.measured_tasks)} if suite.measured_tasks else {}),
    }


def document(
    suite: Suite, cell: Cell, assignment: Assignment, evaluation: Evaluation, sizes: Mapping[str, int], seconds: float
) -> dict[str, Any]:
    """Return the result of a cell as a document; values per example are rounded to 4 decimals."""
    return {
        "format": FORMAT,
        "suite": {"name": suite.name, "digest": suite.digest},
        "cell": {**cell.document(), "measure": list(cell.measure)},
        "conditions": conditions(suite),
        "model": {name: evaluation.settings[name] for name in ("base", "prompt", "backend")},
        "provenance": dict(assignment.provenance),
        **sizes,
        "tasks": {
            name: {**assignment.coded.get(name, {}), **_task(measured)} for name, measured in evaluation.tasks.items()
        },
        "versions": {"lorashelf": VERSION, "python": platform.python_version(), **_versions()},
        "hardware": {"processor": _processor(), "cores": os.cpu_count()},
        "seconds": round(seconds, 1),
    }


def _task(measured: Measured) -> dict[str, Any]:
    found: dict[str, Any] = {
        "adapter": measured.adapter,
        "examples": measured.examples.digest,
        "nll": [round(loss.nll, 4) for loss in measured.losses],
        "tokens": [loss.tokens for loss in measured.losses],
    }
    task = measured.task
    if measured.answers is not None and task.metric is not None:
        chosen = metric(task.metric, task.language)
        pairs = zip(measured.examples.examples, measured.answers, strict=True)
        statistics = [[round(x, 4) for x in chosen.statistics(example, answer)] for example, answer in pairs]
        found |= {"metric": chosen.label, "formula": chosen.formula, "statistics": statistics}
    return found


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version  # needed only when measuring

    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """Return the processor's name as Linux reports it."""
    try:
        rows = atomic.read_file(Path("/proc/cpuinfo")).decode().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((row.split(":")[1].strip() for row in rows if row.startswith("model name")), platform.machine())


def write_result(result: Mapping[str, Any], path: Path) -> None:
    """Write a document atomically, one line per task. Raises DiskError."""
    head = {name: value for name, value in result.items() if name != "tasks"}
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(task)}" for name, task in result["tasks"].items())
    text = json.dumps(head, indent=1)[:-2] + ',\n "tasks": {\n' + rows + "\n }\n}\n"
    atomic.replace_file(path, text.encode(), path.parent)


EXAMPLES = ("split", "limit", "seed", "measured_tasks")
"""The conditions that determine which examples are measured; adapters are assigned alike under any."""


def read_results(suite: Suite, folder: Path, any_of: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Read cell id → document of the suite's cells that were measured under its conditions, except those in `any_of`,
    here or in a folder that the suite shares.

    Raises UsageError for a file that is not a result.
    """

    def wanted(stated: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in stated.items() if name not in any_of}

    found: dict[str, dict[str, Any]] = {}
    for cell, path in ((cell, path_of(cell, each)) for cell in suite.cells for each in (folder, *suite.shared)):
        if cell.id in found or not path.exists():
            continue
        with _as_result(path):
            result = json.loads(atomic.read_file(path))
            sound = result["format"] == FORMAT and wanted(result["conditions"]) == wanted(conditions(suite))
            measured = bool(any_of) or set(cell.measure) <= set(result["cell"]["measure"])
        if sound and measured:
            found[cell.id] = result
    return found


def read_named(name: str, folders: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Read the result METHOD-ID from the first folder that has it, as cell id → document; empty if none has.

    Raises UsageError for a file that is not a result.
    """
    for path in (each / f"{name}.json" for each in folders):
        if path.exists():
            with _as_result(path):
                result = json.loads(atomic.read_file(path))
                if result["format"] == FORMAT and isinstance(result["provenance"], dict):
                    return {name.rpartition("-")[2]: result}
    return {}


@contextlib.contextmanager
def _as_result(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"this is not a result: {error!r}", where=str(path), cure="delete it") from error


@dataclass(frozen=True)
class Sample:
    """Results of one method (several seeds) on the same examples, resampled together.

    Resample d draws every task's examples with replacement, the same ones for every method, since every generator is
    seeded by the task's name: differences between two samples are paired.
    """

    results: tuple[Mapping[str, Any], ...]

    @property
    def tasks(self) -> list[str]:
        """The tasks that all results have, sorted."""
        return sorted(set.intersection(*(set(result["tasks"]) for result in self.results)))

    @cached_property
    def losses(self) -> Mapping[str, Vector]:
        """Task → (1 + DRAWS,) loss in nats per token, mean over seeds: first on all examples, then per resample."""
        return {task: self._mean(task, "loss") for task in self.tasks}

    @cached_property
    def scores(self) -> Mapping[str, Vector]:
        """Task → (1 + DRAWS,) score, 0 to 100, for tasks with answers."""
        return {
            task: self._mean(task, "score")
            for task in self.tasks
            if all("statistics" in result["tasks"][task] for result in self.results)
        }

    def alone(self) -> Iterator[tuple[Mapping[str, Vector], Mapping[str, Vector]]]:
        """Yield the losses and the scores of each result, on all examples only: (1,) per task."""
        for result in self.results:
            rows = {task: result["tasks"][task] for task in self.tasks}
            once = {task: np.ones((1, len(row["nll"]))) for task, row in rows.items()}
            losses = {task: _loss(row, once[task]) for task, row in rows.items()}
            yield losses, {task: _score(rows[task], once[task]) for task in self.scores}

    def _mean(self, task: str, what: str) -> Vector:
        records = [result["tasks"][task] for result in self.results]
        counts = _counts(task, len(records[0]["nll"]))
        return np.asarray(
            np.mean([(_loss if what == "loss" else _score)(record, counts) for record in records], axis=0)
        )


@lru_cache(maxsize=256)
def _counts(task: str, n: int) -> Vector:
    """Return (1 + DRAWS, n): how often each example counts; in the first row once each."""
    rng = np.random.default_rng(list(task.encode()))
    return np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), size=DRAWS)]).astype(float)


def _loss(record: Mapping[str, Any], counts: Vector) -> Vector:
    return np.asarray((counts @ np.array(record["nll"])) / (counts @ np.array(record["tokens"])))


def _score(record: Mapping[str, Any], counts: Vector) -> Vector:
    formula = FORMULAS[record["formula"]]
    return np.array([formula(sums) for sums in counts @ np.array(record["statistics"])])


def mean_over_tasks(values: Mapping[str, Vector]) -> Vector | None:
    """Return the mean over tasks, (1 + DRAWS,); None without tasks."""
    return np.asarray(np.mean(list(values.values()), axis=0)) if values else None


def shares_kept(
    losses: Mapping[str, Vector], own: Mapping[str, Vector], zero: Mapping[str, Vector]
) -> dict[str, Vector]:
    """Return task → loss kept, (zero − loss) / (zero − own), all three on the same resample, for the tasks where own
    gains at least 0.02 nats per token on all examples (a smaller gain on a resample is raised to 0.02).
    """
    gains = {task: zero[task] - own[task] for task in losses if task in own and task in zero}
    return {
        task: (zero[task] - losses[task]) / np.maximum(gain, LEAST_GAIN)
        for task, gain in gains.items()
        if gain[0] >= LEAST_GAIN
    }


def normalised_score(scores: Mapping[str, Vector], own: Mapping[str, Vector]) -> Vector | None:
    """Return S: the mean of score / own score on the same resample, over the tasks whose own score is at least 1.0 of
    100 on all examples (a lower score on a resample is raised to 1.0).
    """
    shared = [task for task in scores if task in own and own[task][0] >= LEAST_SCORE]
    return mean_over_tasks({task: scores[task] / np.maximum(own[task], LEAST_SCORE) for task in shared})


def interval(values: Vector) -> tuple[float, float]:
    """Return the 95 % percentile interval over the resamples."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return float(low), float(high)


def sampled(results: Sequence[Mapping[str, Any]]) -> Sample:
    """Return the sample of several results. Raises UsageError unless all were measured with one model."""
    models = {json.dumps(result["model"], sort_keys=True) for result in results}
    if len(models) > 1:
        raise UsageError("the results come from several models: " + "; ".join(sorted(models)), cure="measure again")
    return Sample(tuple(results))
