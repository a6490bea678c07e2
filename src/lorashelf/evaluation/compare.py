r"""What adapters are worth on their tasks: loss, score, and the share of the tasks' own adapters that is kept.

Per task, over the examples i of a split, y_i the answer with its end of turn and x_i the prompt and the input:

    loss      = Σ_i −log p(y_i | x_i) / Σ_i |y_i|           nats per token, the prompt masked (D2C, arXiv 2601.17441)
    score     = the task's metric of the greedy answers, 0 to 100, with a 95 % bootstrap interval (see `metrics`)

and over tasks, "own" being each task's own adapter and "zero" the bare base:

    average   = mean of score
    S         = mean of score / own score, where the own score is ≥ 1.0                     (K-Merge, arXiv 2510.13537)
    loss kept = mean of (zero loss − loss) / (zero loss − own loss), where own gains ≥ 0.02 nats
    storage   = bytes of the slots / bytes of all adapters, at equal dtype
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import MissingExtra, TaskNameError, UnknownName, UsageError
from ..lora.adapter import Adapter
from ..models.protocol import Answers, Loss, Scores, capable, mean_loss
from ..names import task_name
from ..result_store import ResultStore
from ..shelf.settings import LARGEST
from ..tasks.folders import ExampleSet, Task
from ..version import VERSION
from .metrics import Metric, Score, loss_kept, metric, normalised, scored


@dataclass(frozen=True, slots=True)
class Unit:
    """What is measured at once, and kept in the journal: the losses or the answers of a task under an adapter."""

    what: str
    task: Task
    adapter: Adapter | None
    examples: ExampleSet

    def key(self, backend: Scores) -> dict[str, Any]:
        """Everything that the result depends on."""
        return {
            "what": self.what,
            "task": self.task.name,
            "adapter": self.adapter.digest if self.adapter else None,
            "examples": self.examples.digest,
            "base": backend.name,
            "prompt": backend.prompt_id,
            "backend": backend.id,
            "max_new_tokens": self.task.max_new_tokens if self.what == "answers" else None,
        }

    def fits(self, result: Any) -> bool:
        """Whether a result has the shape of what `measured` gives."""
        if not isinstance(result, list) or len(result) != len(self.examples.examples):
            return False
        if self.what == "answers":
            return all(isinstance(answer, str) for answer in result)
        return all(isinstance(loss, list) and len(loss) == 2 and _is_loss(*loss) for loss in result)

    def measured(self, backend: Scores) -> list[Any]:
        """[nll, tokens] of each example, or its answer."""
        if self.what == "loss":
            return [list(loss) for loss in backend.nll([(self.adapter, self.examples)])[0]]
        texts = [example.input for example in self.examples.examples]
        most, instruction = self.task.max_new_tokens, self.examples.instruction
        return capable(backend, Answers).answers(self.adapter, instruction, texts, max_new_tokens=most)


@dataclass(frozen=True, slots=True)
class Measured:
    """One task under its adapter (a digest, None for the bare base): each example's loss and, where scored, answer."""

    task: Task
    adapter: str | None
    examples: ExampleSet
    dropped: int
    """How many examples of the split were left out because they are longer than the context."""
    losses: tuple[Loss, ...]
    answers: tuple[str, ...] | None = None
    score: Score | None = None

    @property
    def loss(self) -> float:
        """Σ NLL / Σ tokens, in nats per token."""
        return mean_loss(self.losses)

    def document(self) -> dict[str, Any]:
        """The task's entry in the JSON document; numbers of a score are null without one."""
        score = self.score
        return {
            "loss": self.loss,
            "score": score.value if score else None,
            "low": score.low if score else None,
            "high": score.high if score else None,
            "metric": score.label if score else None,
            "n": len(self.losses),
            "tokens": sum(loss.tokens for loss in self.losses),
            "dropped": self.dropped,
            "adapter": self.adapter,
            "examples": self.examples.digest,
            "max_new_tokens": self.task.max_new_tokens,
        }

    def records(self) -> list[dict[str, Any]]:
        """Each example with its prediction and loss, for reading."""
        answers: Sequence[str | None] = self.answers or [None] * len(self.losses)
        return [
            {
                "input": example.input,
                "prediction": answer,
                "output": example.output,
                "references": list(example.references),
                "nll": loss.nll,
                "tokens": loss.tokens,
            }
            for example, answer, loss in zip(self.examples.examples, answers, self.losses, strict=True)
        ]


@dataclass(frozen=True)
class Evaluation:
    """Tasks measured with one base under one rendering; `compared` adds what is kept of the tasks' own adapters."""

    tasks: Mapping[str, Measured]
    settings: Mapping[str, Any]
    """base, prompt, backend (their ids), split, limit, seed, loss_only."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Task → why it was not measured."""
    warnings: tuple[str, ...] = ()
    storage: float | None = None
    """Bytes of the adapters in use over those of all adapters, at equal dtype."""
    kept: Mapping[str, Any] | None = None
    """S and loss kept, over all tasks and task by task, and the tasks that each leaves out."""

    @property
    def average(self) -> float | None:
        """The mean score over the tasks that have one."""
        return _mean([m.score.value for m in self.tasks.values() if m.score])

    @property
    def average_loss(self) -> float | None:
        """The mean loss over the tasks, in nats per token."""
        return _mean([m.loss for m in self.tasks.values()])

    def document(self) -> dict[str, Any]:
        """The JSON document of `eval`."""
        kept = self.kept or {"tasks": {}}
        tasks = {name: m.document() | kept["tasks"].get(name, {}) for name, m in self.tasks.items()}
        return {
            "tasks": tasks,
            "average": self.average,
            "average_loss": self.average_loss,
            "normalised": {name: kept[name] for name in ("S", "loss_kept", "left_out")} if self.kept else None,
            "storage": self.storage,
            **self.settings,
            "left_out": dict(self.left_out),
            "warnings": list(self.warnings),
            "version": VERSION,
        }

    def compared(self, own: Mapping[str, Any] | None = None, zero_shot: Mapping[str, Any] | None = None) -> Evaluation:
        """With S and loss kept, against the documents of the tasks' own adapters and of the bare base.

        Where base, prompt or split differ a warning says so; a task whose examples differ is left out, and for S one
        whose metric or max_new_tokens does. S needs `own`, loss kept both.
        """
        notes: list[str] = []
        mine = self.document()
        owns = _comparable(mine, own, "own", notes)
        zeros = _comparable(mine, zero_shot, "zero-shot", notes)
        if own is None:
            notes += ["S and loss kept need the tasks' own adapters (--own)"] if zero_shot is not None else []
            return replace(self, warnings=(*self.warnings, *notes))
        scores = {name: m.score.value for name, m in self.tasks.items() if m.score}
        own_scores = _like_scored(mine, owns, notes)
        losses = {name: m.loss for name, m in self.tasks.items()}
        own_losses, zero_losses = ({name: d["loss"] for name, d in found.items()} for found in (owns, zeros))
        share, unscored = normalised(scores, own_scores)
        gain, unkept = loss_kept(losses, own_losses, zero_losses) if zero_shot is not None else (None, [])
        tasks = {
            name: {
                "own_loss": own_losses.get(name),
                "own_score": own_scores.get(name),
                "zero_shot_loss": zero_losses.get(name),
                "S": normalised({name: scores[name]}, own_scores)[0] if name in scores else None,
                "loss_kept": loss_kept({name: losses[name]}, own_losses, zero_losses)[0],
            }
            for name in self.tasks
        }
        left_out = {"S": unscored, "loss_kept": unkept}
        kept = {"S": share, "loss_kept": gain, "left_out": left_out, "tasks": tasks}
        return replace(self, kept=kept, warnings=(*self.warnings, *notes))


@dataclass(frozen=True, slots=True)
class Ready:
    """A task that can be measured: checked, with its examples that fit and its metric."""

    task: Task
    adapter: Adapter | None
    examples: ExampleSet
    dropped: int
    metric: Metric | None

    def units(self) -> list[Unit]:
        """Its losses, and its answers if it has a metric."""
        kinds = ["loss", "answers"] if self.metric else ["loss"]
        return [Unit(what, self.task, self.adapter, self.examples) for what in kinds]


def metrics_of(
    tasks: Mapping[str, Task],
    *,
    split: str = "validation",
    limit: int | None = None,
    seed: int = 0,
    loss_only: bool = False,
) -> dict[str, Metric | None]:
    """Each task's metric, None for the loss alone; all that can be checked without a model.

    Raises MissingExtra, or UsageError naming every task without such a split, without examples, of unknown metric.
    """
    faults = []
    if limit is not None and limit < 1:
        faults.append(f"limit is {limit}, not at least 1")
    if not 0 <= seed <= LARGEST:
        faults.append(f"seed is {seed}, not 0 to 2^53 − 1")
    missing: list[MissingExtra] = []
    found: dict[str, Metric | None] = {}
    for name, task in sorted(tasks.items()):
        try:
            task_name(name)
        except TaskNameError as error:
            faults.append(error.what)
        if not task.splits.get(split):
            faults.append(f"{name}: no examples in split {split!r} (it has {', '.join(task.splits) or 'none'})")
        try:
            found[name] = metric(task.metric, task.language) if task.metric and not loss_only else None
        except UnknownName as error:
            faults.append(f"{name}: {error.what} ({error.cure})")
        except MissingExtra as error:
            missing.append(error)
    if faults:
        raise _cannot_start([*faults, *(f"{error.what}: {error.cure}" for error in missing)])
    if missing:
        raise missing[0]
    return found


@dataclass(frozen=True, slots=True)
class Prepared:
    """An evaluation that can begin: every task checked, and with it what was left out."""

    ready: Sequence[Ready]
    settings: Mapping[str, Any]
    left_out: Mapping[str, str]

    def measured(
        self,
        backend: Scores,
        journal: ResultStore | None = None,
        watch: Callable[[Sequence[Unit]], Iterable[Unit]] | None = None,
    ) -> Evaluation:
        """The evaluation; see `evaluate`."""
        journal = ResultStore() if journal is None else journal
        missing = [unit for r in self.ready for unit in r.units() if journal.get(unit.key(backend), unit.fits) is None]
        for unit in missing if watch is None else watch(missing):
            journal.put(unit.key(backend), unit.measured(backend))
        tasks, notes = {}, []
        for r in sorted(self.ready, key=lambda r: r.task.name):
            name, count = r.task.name, len(r.task.splits[self.settings["split"]])
            tasks[name] = _measured(r, [journal.get(u.key(backend)) for u in r.units()], self.settings["seed"])
            if r.dropped:
                beyond = f"{r.dropped} of {count} examples are longer than the model's context"
                notes.append(f"{name}: {beyond}: left out")
        return Evaluation(tasks, self.settings, self.left_out, tuple(notes))


def prepare(
    backend: Scores,
    adapters: Mapping[str, Adapter | None],
    tasks: Mapping[str, Task],
    *,
    split: str = "validation",
    limit: int | None = None,
    seed: int = 0,
    loss_only: bool = False,
) -> Prepared:
    """Everything that `evaluate` checks before it measures; tasks of one adapter (a slot's) come together.

    Raises as `metrics_of`; UsageError if no task has both an adapter and data, or for tasks none of whose examples fits
    the context; ShapeMismatch.
    """
    names = sorted(adapters.keys() & tasks.keys())
    if not names:
        have, want = ", ".join(sorted(adapters)) or "none", ", ".join(sorted(tasks)) or "none"
        raise UsageError(f"no task in common: adapters {have}; data {want}", cure="a task's folder bears its name")
    options: dict[str, Any] = {"split": split, "limit": limit, "seed": seed, "loss_only": loss_only}
    metrics = metrics_of({name: tasks[name] for name in names}, **options)
    if any(metrics.values()):
        capable(backend, Answers)
    ready, faults = [], []
    for name in names:
        fitting, dropped = backend.fitting(tasks[name].examples(split))
        if not fitting.examples:
            faults.append(f"{name}: all {dropped} examples are longer than the model's context")
        ready.append(Ready(tasks[name], adapters[name], fitting.drawn(limit, seed), dropped, metrics[name]))
    if faults:
        raise _cannot_start(faults)
    served: dict[Any, list[str]] = {}
    for name in names:
        served.setdefault(_identity(adapters[name]), []).append(name)
    together = {", ".join(group): adapters[group[0]] for group in served.values()}
    backend.fits({label: adapter for label, adapter in together.items() if adapter is not None})
    ready.sort(key=lambda r: (served[_identity(r.adapter)], r.task.name))
    base = {"base": backend.name, "prompt": backend.prompt_id, "backend": backend.id}
    without = dict.fromkeys(tasks.keys() - adapters.keys(), "no adapter of this name")
    without |= dict.fromkeys(adapters.keys() - tasks.keys(), "no data")
    return Prepared(ready, base | options, dict(sorted(without.items())))


def evaluate(
    backend: Scores,
    adapters: Mapping[str, Adapter | None],
    tasks: Mapping[str, Task],
    *,
    split: str = "validation",
    limit: int | None = None,
    seed: int = 0,
    loss_only: bool = False,
    journal: ResultStore | None = None,
    watch: Callable[[Sequence[Unit]], Iterable[Unit]] | None = None,
) -> Evaluation:
    """Measure every task that has an adapter (None: the bare base) and data; see the module's head for the equations.

    `limit` draws that many examples of the split by (seed, task); `seed` also draws the bootstrap. What the journal
    holds is not measured again; `watch` wraps the units that are. Raises as `prepare`, ModelError, DiskError.
    """
    prepared = prepare(backend, adapters, tasks, split=split, limit=limit, seed=seed, loss_only=loss_only)
    return prepared.measured(backend, journal, watch)


def _identity(adapter: Adapter | None) -> Any:
    """What tasks that one adapter serves have in common, also where it was read several times."""
    return None if adapter is None else (adapter.digest, adapter.base)


def _measured(ready: Ready, results: Sequence[Any], seed: int) -> Measured:
    losses = tuple(Loss(float(nll), tokens) for nll, tokens in results[0])
    digest = ready.adapter.digest if ready.adapter else None
    plain = Measured(ready.task, digest, ready.examples, ready.dropped, losses)
    if ready.metric is None:
        return plain
    score = scored(ready.metric, ready.examples.examples, results[1], seed=seed)
    return replace(plain, answers=tuple(results[1]), score=score)


def _comparable(
    mine: Mapping[str, Any], other: Mapping[str, Any] | None, name: str, notes: list[str]
) -> dict[str, Mapping[str, Any]]:
    """The tasks of another document that were measured on the same examples; notes say what differs."""
    if other is None:
        return {}
    for key in ("base", "prompt", "split"):
        if mine[key] != other[key]:
            notes.append(f"the {name} evaluation has another {key}: {other[key]}, here {mine[key]}")
    if mine["backend"] != other["backend"] and all(mine[key] == other[key] for key in ("base", "prompt")):
        notes.append(f"the {name} evaluation ran as {other['backend']}, here {mine['backend']}")
    shared = [task for task in mine["tasks"] if task in other["tasks"]]
    absent = [task for task in mine["tasks"] if task not in other["tasks"]]
    differing = [t for t in shared if mine["tasks"][t]["examples"] != other["tasks"][t]["examples"]]
    if absent:
        notes.append(f"the {name} evaluation lacks {', '.join(absent)}: left out of what is kept")
    if differing:
        notes.append(f"the {name} evaluation has other examples of {', '.join(differing)}: left out of what is kept")
    return {task: other["tasks"][task] for task in shared if task not in differing}


def _like_scored(mine: Mapping[str, Any], owns: Mapping[str, Mapping[str, Any]], notes: list[str]) -> dict[str, float]:
    """The own scores that were measured as ours were."""
    both = [t for t, d in owns.items() if d["score"] is not None and mine["tasks"][t]["score"] is not None]
    unlike = [t for t in both if any(owns[t][k] != mine["tasks"][t][k] for k in ("metric", "max_new_tokens"))]
    if unlike:
        notes.append(f"the own evaluation scored {', '.join(unlike)} by another metric or length: left out of S")
    return {t: float(owns[t]["score"]) for t in both if t not in unlike}


def _is_loss(nll: Any, tokens: Any) -> bool:
    return type(nll) in (int, float) and math.isfinite(nll) and type(tokens) is int and tokens > 0


def _cannot_start(faults: Sequence[str]) -> UsageError:
    shown = "".join(f"\n  - {fault}" for fault in faults)
    return UsageError(f"the evaluation cannot start:{shown}", cure="mend these, or choose others: --tasks, --split")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
