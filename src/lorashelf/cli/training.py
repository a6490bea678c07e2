"""The command `train`: from task folders to one PEFT folder per task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UnknownName, UsageError, numbered
from ..models.base_model import open_base
from ..tasks.folders import Task, read_tasks
from ..training.config import PAPERS, TrainSettings
from ..training.job import TrainingJob, training_jobs
from ..training.run import Moment, Watch, train_into
from . import arguments as arg
from .base import explained, note_system_turn
from .output import Meter, note, show, table


def train(
    context: typer.Context,
    data: Annotated[
        Path,
        typer.Argument(help="A task folder, or a folder of task folders.", metavar="DATA_DIR", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Folder for the adapters; an interrupted run resumes there.", show_default=False
        ),
    ],
    base: arg.Base = None,
    task: Annotated[list[str] | None, typer.Option("--task", help="Only this task; may be repeated.")] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="LoRA rank; default: 32 from 1000 examples on, else 8.")
    ] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="LoRA alpha; default: four times the rank.")] = None,
    dropout: Annotated[float, typer.Option("--dropout", help="LoRA dropout.")] = 0.05,
    target: Annotated[
        list[str] | None, typer.Option("--target", help="A layer's name; default: the attention's linear layers.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Peak learning rate; default: by the steps, 1e-3 at 50.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Number of steps; default: by the examples.")] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Instead of --steps: passes over the examples.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Examples per step; default: 8, fewer for small data.")
    ] = None,
    warmup: Annotated[int, typer.Option("--warmup", help="Warm-up steps, at most a fifth of all.")] = 5,
    patience: Annotated[int, typer.Option("--patience", help="Stop after this many validations without gain.")] = 3,
    validation_limit: Annotated[
        int,
        typer.Option("--validation-limit", help="Number of validation examples, drawn by the seed; 0: no early stop."),
    ] = 24,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="Leave out examples with more tokens; default: the context.")
    ] = None,
    seed: arg.Seed = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="Dtype of the stored file: f32, f16 or bf16.")] = "f16",
    device: arg.Device = None,
    model_dtype: arg.ModelDtype = None,
    template_arg: arg.TemplateArgs = None,
    json: arg.Json = False,
) -> None:
    """Train a LoRA adapter for every task, on the answers only. After an interrupt, run it again to resume."""
    if not validation_limit and arg.stated(context, {"patience": "--patience"}):
        raise UsageError("--patience needs a validation loss, and --validation-limit is 0", cure="omit one of them")
    settings = TrainSettings(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=tuple(target) if target else None,
        rate=lr,
        steps=steps,
        epochs=epochs,
        batch=batch,
        warmup=warmup,
        patience=patience,
        max_length=max_length,
        validation_limit=validation_limit,
        seed=seed,
        dtype=dtype,
    )
    tasks = _chosen(read_tasks(data), task)
    arguments = arg.template_arguments(template_arg)
    with explained(base):
        model = open_base(base, device=device, dtype=model_dtype, template_arguments=arguments)
    note_system_turn(model.template)
    jobs = training_jobs(tasks, model, settings)
    note(f"rank, steps and learning rate, unless set by options, are scaled to the data (the papers: {PAPERS})")
    for job in jobs:
        note(job.summary)
    with Meter(sum(job.hyperparameters.steps for job in jobs)) as meter:
        records = train_into(output, jobs, model, watch=_progress(jobs, meter))
    for name, record in records.items():
        if record["improved"] is False:
            note(f"{name}: the validation loss is not below that of the bare base; try more data or another --lr")
    document = {"output": str(output), "tasks": records}
    show(
        document,
        json,
        lambda d: [_trained(d["tasks"]), f"{output}: {numbered(len(records), 'adapter')}, each with training.json"],
    )


def _chosen(tasks: dict[str, Task], names: Sequence[str] | None) -> dict[str, Task]:
    for name in names or ():
        if name not in tasks:
            raise UnknownName("task", name, list(tasks))
    return {name: task for name, task in tasks.items() if not names or name in names}


def _progress(jobs: Sequence[TrainingJob], meter: Meter) -> Watch:
    """Return a watch that shows the progress of all jobs together."""
    lengths = [job.hyperparameters.steps for job in jobs]
    before = dict(zip([job.task for job in jobs], accumulate([0, *lengths]), strict=False))
    latest: dict[str, float] = {}

    def watch(moment: Moment) -> None:
        if moment.validation is not None:
            latest[moment.task] = moment.validation
        validation = f"  validation {latest[moment.task]:.3f}" if moment.task in latest else ""
        text = f"{moment.task}  step {moment.step}/{moment.steps}  loss {moment.loss:.3f}{validation}"
        last = moment.step == moment.steps
        meter.at(before[moment.task] + moment.step, text, moment.validation is not None or last)

    return watch


def _trained(records: dict[str, dict[str, Any]]) -> Any:
    columns = ["task", ">examples", ">rank", ">steps", ">best", ">zero-shot", ">validation", ">seconds"]
    rows = [
        (
            name,
            record["examples"]["train"],
            record["settings"]["rank"],
            record["steps"],
            record["best_step"],
            record["zero_shot"],
            record["loss"],
            record["seconds"],
        )
        for name, record in records.items()
    ]
    return table(columns, rows)


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "train": (train, "lorashelf train tasks/ --base HuggingFaceTB/SmolLM2-135M-Instruct -o adapters/"),
}
