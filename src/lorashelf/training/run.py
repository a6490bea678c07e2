"""Training: task folders in, one PEFT adapter per task out, each with a record of its training.

A run can be interrupted at any moment: finished tasks are complete in the output folder, the current one has its state
in `.training/`, and the same call resumes from there and ends at the same weights. Needs the extra `llm`.
"""

from __future__ import annotations

import io
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from .. import atomic
from ..errors import AdapterFormatError, ModelError, UsageError
from ..formats.peft import write_adapter
from ..locks import sole
from ..lora.adapter import Adapter, Factors
from ..models.base_model import BaseModel
from ..models.hf import HFBackend
from ..models.loading import libraries
from ..models.protocol import mean_loss
from ..tasks.folders import Task
from ..version import VERSION
from .config import TrainSettings
from .job import TrainingJob, training_jobs
from .trainer import LoraTrainer

RECORD_FILE = "training.json"
STATE_FOLDER = ".training"
LOCK = ".lock"  # held while a training writes into the folder; not deleted
# A kill or a power cut loses at most this much work, or that since the last validation; Ctrl-C loses none.
SAVE_SECONDS = 60.0
_NUMBERS = ("steps", "best_step", "zero_shot", "loss", "seconds")  # of a record, besides those of its settings
_PACKAGES = ("torch", "transformers", "peft", "numpy")
Watch = Callable[["Moment"], None]


class Trained(NamedTuple):
    """A trained adapter, rounded as stored, and the record of its training."""

    adapter: Adapter
    record: dict[str, Any]


class Moment(NamedTuple):
    """A training's progress after a step: the step's loss, and the validation loss if one was measured."""

    task: str
    step: int
    steps: int
    loss: float
    validation: float | None


def train(
    task: Task,
    base: BaseModel,
    settings: TrainSettings | None = None,
    *,
    watch: Watch | None = None,
    state: str | Path | None = None,
) -> Trained:
    """Train an adapter for one task; the base is left unchanged.

    `state` is a file, which need not exist yet, that an interrupted run resumes from; it is kept up to date and not
    deleted. Raises MissingExtra, TaskDataError, UsageError (also for the state of another job), ModelError.
    """
    (job,) = training_jobs({task.name: task}, base, settings)
    return run_job(job, base, watch=watch, state=state)


def train_into(
    folder: str | Path, jobs: Sequence[TrainingJob], base: BaseModel, *, watch: Watch | None = None
) -> dict[str, dict[str, Any]]:
    """Run every job into `folder/<task>`, a PEFT folder with its training.json; returns the records by task.

    Finished tasks are not trained again, an interrupted one resumes. Raises UsageError, before any training, naming
    everything in the folder that was begun with other data, base or settings, or if another training writes into the
    folder; else as `train`.
    """
    folder = Path(folder)
    _finished(folder, jobs)  # before anything is made
    atomic.make_parents(folder / LOCK)
    cure = "wait until it is done, or choose another output folder"
    with sole(folder / LOCK, "another training writes into this folder", folder, cure):
        return _run_jobs(folder, jobs, base, watch)


def _run_jobs(
    folder: Path, jobs: Sequence[TrainingJob], base: BaseModel, watch: Watch | None
) -> dict[str, dict[str, Any]]:
    records, states = _finished(folder, jobs), _states(folder, jobs)
    for job in jobs:
        state = states[job.task]
        if job.task not in records:
            atomic.make_parents(state)
            adapter, record = run_job(job, base, watch=watch, state=state)
            content = json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n"
            write_adapter(adapter, folder / job.task, extra_files={RECORD_FILE: content})
            records[job.task] = record
        atomic.remove(state)
    if not any((folder / STATE_FOLDER).glob("*.pt")):
        atomic.remove(folder / STATE_FOLDER)
    return dict(sorted(records.items()))


def run_job(
    job: TrainingJob, base: BaseModel, *, watch: Watch | None = None, state: str | Path | None = None
) -> Trained:
    """Run one job; arguments and errors are those of `train`."""
    begun = _read_state(Path(state)) if state is not None and Path(state).exists() else None
    if begun is not None and (changes := _changes(job, begun["identity"])):
        raise UsageError("; ".join(changes), where=str(state), cure="delete this file to start again")
    run = _Run(job, base, watch, None if state is None else Path(state))
    try:
        run.go(begun)
    except BaseException:
        run.save()
        raise
    finally:
        run.trainer.close()
    return run.outcome()


@dataclass(frozen=True)
class _Past:
    """A run's history so far. Every step makes a new instance, so that an interrupt always finds a complete one."""

    step: int = 0
    losses: tuple[float, ...] = ()
    looks: tuple[tuple[int, float], ...] = ()
    tokens: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best validation after the first step."""
        return min((look for look in self.looks if look[0]), key=lambda look: (look[1], look[0]), default=None)

    def patient(self, patience: int) -> bool:
        """Return whether fewer than `patience` validations have followed the best one."""
        return self.best is None or sum(step > self.best[0] for step, _ in self.looks) < patience


class _Run:
    """One job being run: `past`, the best adapter so far, and the state to resume from."""

    def __init__(self, job: TrainingJob, base: BaseModel, watch: Watch | None, file: Path | None) -> None:
        self.job, self.past, self.trainer = (
            job,
            _Past(),
            LoraTrainer(HFBackend(base), job.hyperparameters, job.layers),
        )
        self._watch, self._file = watch, file
        self._tokens = [self.trainer.backend.tokens(job.train, example) for example in job.train.examples]
        self._best: Adapter | None = None
        self._state: dict[str, Any] = {}
        self._saved = (0, time.monotonic())

    def go(self, begun: Mapping[str, Any] | None) -> None:
        """Take the remaining steps, or stop early."""
        c = self.job.hyperparameters
        began = time.monotonic()
        if begun is not None:
            self._restore(begun)
        elif (loss := self._look(0, None)) is not None:
            self.past = _Past(looks=((0, loss),), seconds=time.monotonic() - began)
        while self.past.step < c.steps and self.past.patient(c.patience):
            self._step()
            if self.past.step % c.every == 0 or time.monotonic() - self._saved[1] > SAVE_SECONDS:
                self.save()
        self.save()

    def _step(self) -> None:
        c, before, began = self.job.hyperparameters, self.past, time.monotonic()
        members = c.batch_at(before.step)
        batch = [self._tokens[i] for i in members]
        sums = self.trainer.learn(batch, c.seed_at(before.step))
        for i, loss in zip(members, sums, strict=True):
            if not math.isfinite(loss):
                raise self._diverged("the loss", f"example {i + 1}: {self.job.train.examples[i].input[:60]!r}")
        if not math.isfinite(self.trainer.update(c.rate_at(before.step))):
            raise self._diverged("the gradient", f"examples {', '.join(str(i + 1) for i in sorted(members))}")
        step, looks, best = before.step + 1, before.looks, self._best
        looked: float | None = None
        if step % c.every == 0 or step == c.steps:
            try:
                adapter = self.trainer.adapter(self.job.settings.dtype)
            except AdapterFormatError as error:
                raise self._diverged("a weight", f"{error.faults[0]}") from error
            looked = self._look(step, adapter)
            if looked is None or before.best is None or looked < before.best[1]:
                best = adapter
            looks = looks if looked is None else (*looks, (step, looked))
        past = _Past(
            step=step,
            losses=(*before.losses, sum(sums) / sum(len(answer) for _, answer in batch)),
            looks=looks,
            tokens=before.tokens + sum(len(query) + len(answer) for query, answer in batch),
            seconds=before.seconds + time.monotonic() - began,
        )
        self._state = {"past": past, "best": best, **self.trainer.state()}
        self.past, self._best = past, best
        if self._watch is not None:
            self._watch(Moment(self.job.task, step, c.steps, past.losses[-1], looked))

    def _look(self, step: int, adapter: Adapter | None) -> float | None:
        """Return the validation loss; None without a validation split."""
        if not self.job.validation.examples:
            return None
        try:
            return mean_loss(self.trainer.measure(adapter, self.job.validation))
        except ModelError as error:
            what = f"{error.what} (validation after step {step})"
            raise ModelError(what, where=error.where, cure="lower --lr; check these examples") from error

    def _diverged(self, what: str, where: str) -> ModelError:
        place = f"{self.job.task}, step {self.past.step + 1}, {where}"
        return ModelError(f"{what} is not finite", where=place, cure="lower --lr; check the base and this text")

    # the state on disk --------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Save the state after the last complete step, if there is a file for it that does not hold it yet."""
        if self._file is None or not self._state or self._saved[0] == self._state["past"].step:
            return
        torch, _ = libraries()
        state = self._state
        best = {} if state["best"] is None else state["best"].modules
        document = {"identity": self.job.identity, "past": asdict(state["past"])}
        buffer = io.BytesIO()
        torch.save(
            {
                "document": json.dumps(document),
                "best": {path: tuple(map(torch.from_numpy, (f.a, f.b))) for path, f in best.items()},
                "parameters": state["parameters"],
                "optimizer": state["optimizer"],
            },
            buffer,
        )
        atomic.replace_file(self._file, buffer.getvalue(), self._file.parent)
        self._saved = (state["past"].step, time.monotonic())

    def _restore(self, begun: Mapping[str, Any]) -> None:
        self.past = begun["past"]
        self.trainer.restore(begun)
        now = self.trainer.adapter(self.job.settings.dtype)
        if begun["best"]:
            scales = now.modules.scales
            self._best = now.with_factors(
                {path: Factors(a.numpy(), b.numpy(), scales[path]) for path, (a, b) in begun["best"].items()}
            )

    # the outcome --------------------------------------------------------------------------------------------------

    def outcome(self) -> Trained:
        """Return the best adapter, or without a validation split the last, and the record."""
        job, past, best = self.job, self.past, self.past.best
        adapter = self._best
        if adapter is None:  # for mypy: the last step always sets it
            raise ModelError("no step was taken", where=job.task)
        from importlib.metadata import version  # a slow import: it loads an e-mail parser

        zero = past.looks[0][1] if past.looks else None
        record = {
            "task": job.task,
            "settings": job.identity,
            "targets": job.targets,
            "init_seed": job.hyperparameters.init_seed,
            "examples": {"train": len(job.train.examples), "validation": len(job.validation.examples)},
            "dropped": dict(job.dropped),
            "steps": past.step,
            "epochs": _short(past.step * job.hyperparameters.batch / job.hyperparameters.examples),
            "best_step": best[0] if best else past.step,
            "stopped_early": past.step < job.hyperparameters.steps,
            "zero_shot": _short(zero),
            "loss": _short(best[1] if best else None),
            "improved": best[1] < zero if best and zero is not None else None,
            "losses": self._losses(),
            "tokens": past.tokens,
            "seconds": round(past.seconds, 1),
            "adapter": adapter.digest,
            "device": str(self.trainer.backend.base.model.device),
            "versions": {"lorashelf": VERSION, "python": platform.python_version()}
            | {name: version(name) for name in _PACKAGES},
        }
        return Trained(adapter, record)

    def _losses(self) -> list[dict[str, Any]]:
        """Return the losses over time, in nats per token: the training mean since the previous row, and validation."""
        c, past = self.job.hyperparameters, self.past
        looks = dict(past.looks)
        marks = sorted({*range(c.every, past.step + 1, c.every), past.step})
        rows = [{"step": 0, "train": None, "validation": _short(looks.get(0))}]
        for before, step in zip([0, *marks], marks, strict=False):
            mean = sum(past.losses[before:step]) / (step - before)
            rows.append({"step": step, "train": _short(mean), "validation": _short(looks.get(step))})
        return rows


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _states(folder: Path, jobs: Sequence[TrainingJob]) -> dict[str, Path]:
    return {job.task: folder / STATE_FOLDER / f"{job.task}.pt" for job in jobs}


def _finished(folder: Path, jobs: Sequence[TrainingJob]) -> dict[str, dict[str, Any]]:
    """Return the records of a folder's finished tasks. Raises UsageError for whatever prevents the others."""
    states = _states(folder, jobs)
    records, faults = {}, []
    if folder.exists() and not folder.is_dir():
        faults.append("the output is a file, not a folder")
    for job in jobs:
        task, made = job.task, folder / job.task
        if made.exists():
            try:
                records[task] = _record(made / RECORD_FILE)
                faults += _changes(job, records[task]["settings"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                faults.append(f"{task} already exists, without a {RECORD_FILE} of lorashelf")
        elif states[task].exists():
            faults += _changes(job, _read_state(states[task])["identity"])
    if faults:
        cure = "give the data and options of that training, or another output folder"
        raise UsageError("; ".join(faults), where=str(folder), cure=cure)
    return records


def _record(file: Path) -> dict[str, Any]:
    """Read a training's record. Raises what reading raises, and ValueError for a record of another form."""
    record: dict[str, Any] = json.loads(atomic.read_file(file))
    shown = [record["examples"]["train"], record["settings"]["rank"], *(record[name] for name in _NUMBERS)]
    if any(value is not None and type(value) not in (int, float) for value in shown):
        raise ValueError(file)
    if record["improved"] not in (True, False, None):
        raise ValueError(file)
    return record


def _changes(job: TrainingJob, begun: Mapping[str, Any]) -> list[str]:
    """Return how a training that was begun differs from a job, as at most one sentence."""
    now = job.identity
    differing = [name for name in now if name not in begun or begun[name] != now[name]]
    if not differing:
        return []
    changes = [
        f"other {name}"
        if name in ("training data", "validation data", "layers")
        else f"{name} {begun.get(name)}, now {now[name]}"
        for name in differing
    ]
    return [f"{job.task} was trained with {', '.join(changes)}"]


def _read_state(file: Path) -> dict[str, Any]:
    """Read a state written by `save`. Raises UsageError."""
    torch, _ = libraries()
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(atomic.read_file(file)), map_location="cpu", weights_only=True)
        document: dict[str, Any] = json.loads(state.pop("document"))
        identity, past = dict(document["identity"]), _Past(**document["past"])
        looks = tuple((int(step), float(loss)) for step, loss in past.looks)
        past = replace(past, losses=tuple(map(float, past.losses)), looks=looks)
        kept = {name: dict(state[name]) for name in ("best", "parameters", "optimizer")}
    except Exception as error:  # torch has no error class for a file that is not a state
        cure = "delete this file: the training starts again"
        raise UsageError("the state of a training cannot be read", where=str(file), cure=cure) from error
    return {"identity": identity, "past": past, **kept}
