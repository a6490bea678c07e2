"""Measuring the losses and answers of tasks with their adapters; every task is checked before the first measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from ..errors import MissingExtra, TaskNameError, UnknownName, UsageError
from ..lora.adapter import Adapter
from ..models.protocol import Answers, Loss, Question, ReadsOnce, Scores, capable
from ..names import task_name
from ..result_store import ResultStore
from ..shelf.settings import LARGEST
from ..tasks.folders import ExampleSet, Task
from .compare import Evaluation, Measured
from .metrics import Metric, metric, scored


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit of measurement and of the journal: the losses or the answers of a task with an adapter."""

    what: str
    task: Task
    adapter: Adapter | None
    examples: ExampleSet

    @property
    def place(self) -> tuple[str, str]:
        """Its kind and task: no two units of an evaluation share both."""
        return self.what, self.task.name

    def key(self, backend: Scores) -> dict[str, Any]:
        """Return all that the result depends on."""
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

    def fits(self, result: object) -> bool:
        """Return whether a result has the form of one from `measured`."""
        if not isinstance(result, list) or len(result) != len(self.examples.examples):
            return False
        if self.what == "answers":
            return all(isinstance(answer, str) for answer in result)
        return all(isinstance(loss, list) and len(loss) == 2 and _is_loss(*loss) for loss in result)

    def questions(self) -> list[Question]:
        """Return what is to be answered."""
        instruction, most = self.examples.instruction, self.task.max_new_tokens
        return [Question(instruction, example.input, most) for example in self.examples.examples]


@dataclass(frozen=True, slots=True)
class Ready:
    """A task that passed all checks, with the examples that fit and its metric."""

    task: Task
    adapter: Adapter | None
    examples: ExampleSet
    dropped: int
    metric: Metric | None

    def units(self) -> list[Unit]:
        """Return the units to measure: losses, and answers if the task has a metric."""
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
    """Return each task's metric, None for the loss alone, after all checks that need no model.

    Raises MissingExtra, or UsageError naming every task without such a split, without examples or of unknown metric.
    """
    faults = []
    if limit is not None and limit < 1:
        faults.append(f"limit is {limit}, at least 1 is needed")
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
    """An evaluation ready to start: the checked tasks, the settings, and the tasks left out."""

    ready: Sequence[Ready]
    settings: Mapping[str, Any]
    left_out: Mapping[str, str]

    def measured(
        self,
        backend: Scores,
        journal: ResultStore | None = None,
        watch: Callable[[Sequence[Unit]], Iterable[Unit]] | None = None,
    ) -> Evaluation:
        """Measure; see `evaluate`."""
        journal = ResultStore() if journal is None else journal
        most = backend.together if isinstance(backend, Answers) else 1
        groups = _groups(self.ready, most, both=isinstance(backend, ReadsOnce))

        def lacking(units: Iterable[Unit]) -> list[Unit]:
            return [unit for unit in units if journal.get(unit.key(backend), unit.fits) is None]

        missing = lacking(unit for r in self.ready for unit in r.units())
        last = {id(groups[unit.place]): unit.place for unit in missing}
        for unit in missing if watch is None else watch(missing):
            whole = groups[unit.place]  # measured with its last unit: then the share that is done is right
            if unit.place == last[id(whole)] and (group := lacking(whole)):
                for member, result in zip(group, _results(backend, group), strict=True):
                    journal.put(member.key(backend), result)
        tasks, notes = {}, []
        for r in sorted(self.ready, key=lambda r: r.task.name):
            name, count = r.task.name, len(r.task.splits[self.settings["split"]])
            tasks[name] = _measured(r, [journal.get(u.key(backend)) for u in r.units()], self.settings["seed"])
            if r.dropped:
                beyond = f"{r.dropped} of {count} examples are longer than the model's context"
                notes.append(f"{name}: {beyond} and are left out")
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
    """Check everything that `evaluate` needs; tasks served by one adapter are grouped together.

    Raises as `metrics_of`; UsageError if no task has both an adapter and data, or for tasks without an example that
    fits the context; ShapeMismatch.
    """
    names = sorted(adapters.keys() & tasks.keys())
    if not names:
        have, want = ", ".join(sorted(adapters)) or "none", ", ".join(sorted(tasks)) or "none"
        raise UsageError(f"no task in common: adapters {have}; data {want}", cure="name data folders after tasks")
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
    served: dict[Hashable, list[str]] = {}
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
    """Measure every task that has an adapter (None: the bare base) and data; see `compare` for the equations.

    `limit` draws that many examples of the split by (seed, task); `seed` also seeds the bootstrap. Results in
    the journal are not measured again; `watch` wraps the units that are. Raises as `prepare`, ModelError, DiskError.
    """
    prepared = prepare(backend, adapters, tasks, split=split, limit=limit, seed=seed, loss_only=loss_only)
    return prepared.measured(backend, journal, watch)


def _identity(adapter: Adapter | None) -> Hashable:
    """Return a key that is equal for tasks of one adapter, even if the adapter was read several times."""
    return None if adapter is None else (adapter.digest, adapter.base)


def _groups(ready: Iterable[Ready], together: int, *, both: bool) -> dict[tuple[str, str], list[Unit]]:
    """Return, by kind and task, the units that are measured together: answers with the same adapter, with `both` also
    the losses of these tasks.

    They depend on the evaluation alone, not on what a journal holds: an answer in bf16 depends on its batch.
    """
    groups: dict[tuple[str, str], list[Unit]] = {}
    last: list[Unit] = []
    for r in ready:
        loss, *answers = r.units()
        groups[loss.place] = [loss]
        if not answers:
            continue
        full = sum(len(unit.examples.examples) for unit in last if unit.what == "answers") >= together
        last = [] if full or not last or _identity(last[0].adapter) != _identity(r.adapter) else last
        for unit in [loss, *answers] if both else answers:
            last.append(unit)
            groups[unit.place] = last
    return groups


def _results(backend: Scores, group: Sequence[Unit]) -> list[list[Any]]:
    """Measure [nll, tokens] or the answer of each example of units with the same adapter."""
    adapter, kinds = group[0].adapter, {unit.what for unit in group}
    if kinds == {"loss"}:
        return [[list(loss) for loss in losses] for losses in backend.nll([(adapter, u.examples) for u in group])]
    if kinds == {"answers"}:
        questions = [unit.questions() for unit in group]
        found = iter(capable(backend, Answers).answered(adapter, [question for some in questions for question in some]))
        return [list(islice(found, len(some))) for some in questions]
    tasks = {unit.task.name: (unit.examples, unit.task.max_new_tokens) for unit in group}
    both = dict(zip(tasks, capable(backend, ReadsOnce).losses_and_answers(adapter, [*tasks.values()]), strict=True))
    return [[list(x) for x in both[u.task.name][0]] if u.what == "loss" else both[u.task.name][1] for u in group]


def _measured(ready: Ready, results: Sequence[Any], seed: int) -> Measured:
    losses = tuple(Loss(float(nll), tokens) for nll, tokens in results[0])
    digest = ready.adapter.digest if ready.adapter else None
    plain = Measured(ready.task, digest, ready.examples, ready.dropped, losses)
    if ready.metric is None:
        return plain
    score = scored(ready.metric, ready.examples.examples, results[1], seed=seed)
    return replace(plain, answers=tuple(results[1]), score=score)


def _is_loss(nll: object, tokens: object) -> bool:
    finite = isinstance(nll, int | float) and type(nll) is not bool and math.isfinite(nll)
    return finite and type(tokens) is int and tokens > 0


def _cannot_start(faults: Sequence[str]) -> UsageError:
    shown = "".join(f"\n  - {fault}" for fault in faults)
    return UsageError(f"the evaluation cannot start:{shown}", cure="correct these, or choose others: --tasks, --split")
