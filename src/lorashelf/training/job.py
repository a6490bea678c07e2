"""A task on a base, ready for training: the examples that fit, the hyperparameters, the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..digest import canonical_json, digest
from ..errors import TaskDataError
from ..models.base_model import BaseModel
from ..models.hf import HFBackend
from ..tasks.folders import ExampleSet, Task
from .config import Hyperparameters, TrainSettings
from .trainer import peft_library, target_layers


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """One task on one base, ready for training: the examples that fit, the hyperparameters, the layers."""

    train: ExampleSet
    validation: ExampleSet
    dropped: Mapping[str, int]
    hyperparameters: Hyperparameters
    layers: tuple[str, ...]
    settings: TrainSettings
    base: Mapping[str, str]

    @property
    def task(self) -> str:
        """The task's name."""
        return self.train.task

    @property
    def identity(self) -> dict[str, Any]:
        """All that the result depends on: a run resumes only from a state with the same identity."""
        data = {"training data": self.train.digest, "validation data": self.validation.digest}
        layers = digest([canonical_json(sorted(self.layers))])
        return {**self.base, **data, "layers": layers, "stored as": self.settings.dtype, **asdict(self.hyperparameters)}

    @property
    def targets(self) -> list[str]:
        """The last components of the layers' names."""
        return sorted({path.rpartition(".")[2] for path in self.layers})

    @property
    def summary(self) -> str:
        """One line on how the task will be trained, including what was scaled to the data."""
        c = self.hyperparameters
        lost = ", ".join(f"{n} {split} too long" for split, n in self.dropped.items() if n)
        looks = f"validation on {len(self.validation.examples)} every {c.every} steps, patience {c.patience}"
        return "; ".join(
            [
                f"{self.task}: {c.examples} examples" + (f" ({lost})" if lost else ""),
                f"r {c.rank}, alpha {c.alpha:g}, dropout {c.dropout:g} on {' '.join(self.targets)}",
                f"{c.steps} steps of {c.batch} ({c.epochs:.1f} epochs), peak learning rate {c.rate:.2g}, cosine",
                looks if self.validation.examples else "no validation: the last weights are kept",
            ]
        )


def training_jobs(
    tasks: Mapping[str, Task], base: BaseModel, settings: TrainSettings | None = None
) -> list[TrainingJob]:
    """Return one job per task, before any training: the examples that fit, the hyperparameters and the layers.

    Raises MissingExtra, UsageError for targets that the base lacks, TaskDataError naming every task that cannot be
    trained.
    """
    peft_library()
    settings = settings or TrainSettings()
    backend = HFBackend(base)
    layers = tuple(target_layers(base.model, settings.targets))
    dtype = str(base.model.dtype).removeprefix("torch.")
    known = {"base": base.name, "weights": backend.weights, "computed in": dtype, "prompt": base.template.id}
    jobs: list[TrainingJob] = []
    faults: dict[str, str] = {}
    for name, task in sorted(tasks.items()):
        if "train" not in task.splits:
            faults[f"{name}: there are no training examples (train.jsonl)"] = "add train.jsonl"
            continue
        fitting = {split: backend.fitting(task.examples(split), settings.max_length) for split in task.splits}
        train = fitting["train"][0]
        if not train.examples:
            cure = "raise --max-length" if settings.max_length else "shorten them to the model's context"
            faults[f"{name}: all {fitting['train'][1]} training examples are too long"] = cure
            continue
        kept = replace(task, splits={"validation": (), **{split: s.examples for split, (s, _) in fitting.items()}})
        jobs.append(
            TrainingJob(
                train=train,
                validation=kept.examples("validation", settings.validation_limit, settings.seed),
                dropped={split: fitting[split][1] for split in ("train", "validation") if split in fitting},
                hyperparameters=Hyperparameters.of(name, len(train.examples), settings),
                layers=layers,
                settings=settings,
                base=known,
            )
        )
    if faults:
        raise TaskDataError(faults)
    return jobs
