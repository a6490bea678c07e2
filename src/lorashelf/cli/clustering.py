"""The command `cluster`: K slots from many adapters, with or without examples."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import atomic
from ..errors import DiskError, ModelError, UsageError
from ..locks import sole
from ..lora.adapter import Adapter
from ..merging import METHODS
from ..merging.spec import MergeSpec
from ..placement.clustering import Clustering
from ..placement.clustering import cluster as cluster_adapters
from ..placement.partition_methods import PartitionMethod
from ..placement.partitioners import PARTITIONERS
from ..search.cluster import cluster_by_loss, drawn
from ..shelf import routing
from ..shelf.creation import check_vacant
from ..shelf.plans import plan_cluster, together
from ..shelf.settings import new_settings
from ..shelf.shelf import Shelf
from ..tasks.folders import Task, fields_for, read_tasks
from . import arguments as arg
from .output import counted, note, show, table

if TYPE_CHECKING:
    from ..models.protocol import Scores

LOSSES = {  # options read only by methods that use losses, besides their own parameters
    "per_task": "--examples-per-task",
    "journal": "--journal",
    "base_model": "--base",
    "engine": "--engine",
    "device": "--device",
    "model_dtype": "--model-dtype",
    "template_arg": "--template-arg",
}
PARAMETERS = {name: "--" + "-".join(name.split("_")) for method in PARTITIONERS.values() for name in method.parameters}


def cluster(
    context: typer.Context,
    adapters: arg.Adapters,
    output: arg.NewShelf,
    slots: arg.Slots,
    method: Annotated[
        str,
        typer.Option("--method", help=f"One of {', '.join(sorted(PARTITIONERS))}.", show_default=False),
    ],
    merge: Annotated[
        str | None,
        typer.Option(
            "--merge",
            help="Merge method of the clusters (docs/methods.md), default linear, for d2c ties; and of later adds, "
            "which use linear if it does not average.",
            show_default=False,
        ),
    ] = None,
    parameter: arg.Parameters = None,
    seed: arg.Seed = 0,
    examples: Annotated[
        Path | None,
        typer.Option(
            "--examples",
            help="Task folders named like the adapters: d2c searches on their examples; all methods store prompts.",
        ),
    ] = None,
    base_model: arg.Base = None,
    iterations: Annotated[int, typer.Option("--iterations", help="d2c: T, the number of moves to try.", min=0)] = 200,
    propose: Annotated[
        str,
        typer.Option(
            "--propose",
            help="d2c: moves drawn uniformly (uniform), or moves and swaps from which a forward pass per task promises "
            "a gain (guided).",
        ),
    ] = "uniform",
    per_task: Annotated[
        int,
        typer.Option("--examples-per-task", help="d2c: n, the number of examples drawn from each train split.", min=1),
    ] = 10,
    accept: Annotated[
        str,
        typer.Option(
            "--accept", help="d2c: the loss that must fall: of the moved task (task), or of both blocks (both)."
        ),
    ] = "task",
    init: Annotated[
        str,
        typer.Option(
            "--init", help="d2c: the first partition: random, agglomerative, or guided: the one that promises most."
        ),
    ] = "random",
    restarts: Annotated[
        int, typer.Option("--restarts", help="d2c: further searches from random partitions; the best is kept.", min=0)
    ] = 0,
    keep_best: Annotated[
        bool, typer.Option("--keep-best", help="d2c: end at the lowest total loss found; measures more.")
    ] = False,
    budget: Annotated[
        int, typer.Option("--budget", help="d2c: the most losses that proposals may request; 0: no limit.", min=0)
    ] = 0,
    journal: Annotated[
        Path | None,
        typer.Option("--journal", help="d2c: the file of measured losses; default: OUTPUT.d2c.jsonl until done."),
    ] = None,
    engine: arg.Engine = "hf",
    device: arg.Device = None,
    model_dtype: arg.ModelDtype = None,
    template_arg: arg.TemplateArgs = None,
    bytes: arg.Bytes = None,
    policy: Annotated[str, typer.Option("--policy", help="The policy of later adds.")] = "kmerge++",
    threshold: arg.Threshold = None,
    held_out: arg.HeldOut = None,
    rank: arg.Rank = None,
    dtype: arg.Dtype = None,
    keep: arg.Keep = 1,
    base: arg.BaseName = None,
    base_alias: arg.Aliases = None,
    assume_base: arg.AssumeBase = False,
    restore_norm: arg.RestoreNorm = False,
    encoding: arg.Encoding = "peft",
    quality: arg.Quality = 0.99,
    json: arg.Json = False,
) -> None:
    """Cluster many adapters into K slots, and merge each cluster."""
    check_vacant(output)
    chosen = PARTITIONERS[method]
    blocks = MergeSpec(merge or chosen.merge, parameters=arg.parameters(parameter))
    METHODS[blocks.method].checked(blocks.parameters)
    settings = new_settings(
        slots,
        bytes=bytes,
        policy=policy,
        threshold=arg.threshold(threshold, held_out, policy),
        merge=blocks.later.method,
        seed=seed,
        rank=rank,
        dtype=dtype,
        keep=keep,
        parameters=blocks.later.parameters,
        base=base,
        base_aliases=tuple(base_alias or ()),
        restore_norm=restore_norm,
        encoding=encoding,
        quality=quality,
    )
    blocks = replace(settings.merge, method=blocks.method, parameters=blocks.parameters)
    parameters = {name: value for name, value in context.params.items() if name in chosen.parameters}
    _check(chosen, examples, parameters, arg.stated(context, {**LOSSES, **PARAMETERS}))
    named = arg.read_named(adapters)
    arg.note_adapters(named)
    arg.note_untrained(named)
    together(named, settings, assume_base=assume_base)
    tasks = read_tasks(examples) if examples else {}
    kept = journal or output.with_name(f"{output.name}.{method}.jsonl")
    if chosen.by_loss:
        backend = partial(_opened, base_model, engine, device, model_dtype, template_arg)
        with _alone(kept):
            clustering = _searched(named, slots, blocks, tasks, per_task, backend, method, kept, parameters)
    else:
        clustering = cluster_adapters(named, slots, method=method, seed=seed, **parameters)
    details = {name: fields_for(examples, name) for name in named} if examples else {}
    made, plan = Shelf.create_with(
        output,
        settings,
        lambda snapshot: plan_cluster(
            snapshot,
            named,
            clustering,
            merge=blocks,
            types={name: task.type for name, task in tasks.items()},
            details=details,
            assume_base=assume_base,
        ),
    )
    if chosen.by_loss and journal is None:
        atomic.remove(kept)
    for slot, in_common in plan.report["shared"].items():
        arg.note_few_shared(f"slot {slot}", in_common)
    members = Counter(plan.report["partition"].values())
    cosines = plan.report.get("init_similarity", {})
    arg.note_shared_init({f"slot {slot}": (cosine, members[int(slot)]) for slot, cosine in cosines.items()})
    show({**plan.report, "slots": routing.slot_documents(made), "head": made.head}, json, _clustered)


def _check(method: PartitionMethod, examples: Path | None, parameters: Mapping[str, Any], given: Sequence[str]) -> None:
    """Refuse contradictory options before anything is read; `given` are those on the command line."""
    if unread := [option for option in given if option not in _read(method)]:
        readers = sorted(name for name, other in PARTITIONERS.items() if set(unread) & _read(other))
        what = f"--method {method.name} does not use {', '.join(unread)} (only {', '.join(readers)})"
        raise UsageError(what, cure=f"omit {', '.join(unread)}, or give --method {readers[0]}")
    method.check_losses(examples is not None)
    faults = [f"--{fault}" for name, value in parameters.items() if (fault := method.parameters[name].fault(value))]
    if faults:
        raise UsageError("; ".join(faults), cure="lorashelf cluster --help")


def _read(method: PartitionMethod) -> set[str]:
    """Return the options that a method reads."""
    return {*(LOSSES.values() if method.by_loss else ()), *(PARAMETERS[name] for name in method.parameters)}


def _searched(
    named: Mapping[str, Adapter],
    slots: int,
    spec: MergeSpec,
    tasks: Mapping[str, Task],
    per_task: int,
    opened: Callable[[], Scores],
    method: str,
    journal: Path,
    parameters: Mapping[str, Any],
) -> Clustering:
    """Search on examples of the train splits; also report on the validation splits, if every task has one."""
    absent = sorted(set(named) - set(tasks))
    if absent:
        cure = "give one task folder per task, with the task's name; NAME=ADAPTER names an adapter"
        raise UsageError(f"no examples for {', '.join(absent)}", cure=cure)
    backend = opened()
    backend.fits(named)
    seed = spec.seed
    sets, dropped = drawn(tasks, named, backend.fitting, "train", per_task, seed)
    others = None
    if all("validation" in tasks[task].splits for task in named):
        others, beyond = drawn(tasks, named, backend.fitting, "validation", per_task, seed)
        dropped += beyond
    if dropped:
        note(f"{dropped} examples are longer than the model's context and were left out")
    return cluster_by_loss(
        named,
        slots,
        spec,
        backend,
        sets,
        method=method,
        held_out=others,
        journal=journal,
        watch=lambda steps: counted(steps, lambda step: f"D2C: trying move {step + 1} of {len(steps)}"),
        **parameters,
    )


def _opened(
    name: str | None, engine: str, device: str | None, dtype: str | None, template: Sequence[str] | None
) -> Scores:
    from ..models.protocol import Scores
    from .base import open_named

    return open_named(name, Scores, engine=engine, device=device, dtype=dtype, template=template)


@contextlib.contextmanager
def _alone(journal: Path) -> Iterator[None]:
    """Lock the journal for the block; on an interrupt, print where the losses are. Raises UsageError, DiskError."""
    lock, cure = journal.with_name(journal.name + ".lock"), "wait until it is done, or give another --journal"
    with sole(lock, "another search is writing to this journal", journal, cure):
        try:
            yield
        except (ModelError, DiskError, KeyboardInterrupt):
            if journal.exists():
                note(f"the losses measured so far are in {journal}: run the same command again to continue")
            raise
        finally:
            atomic.remove(lock)  # before the release: the next process creates a new one


def _clustered(document: dict[str, Any]) -> list[Any]:
    rows = [(slot["slot"], slot["members"]) for slot in document["slots"]]
    shown: list[Any] = [table([">slot", "members"], rows)]
    if document["merge"] != document["later_merge"]:
        shown.append(f"merged by {document['merge']}; later adds by {document['later_merge']} (merge in shelf.toml)")
    if "losses" in document:
        loss, counts = document["loss"], document["losses"]
        others = "" if loss["held_out"] is None else f", {loss['held_out']:.4f} on others"
        shown.append(
            f"{document['accepted']} of {document['proposals']} moves accepted; mean loss on the search examples "
            f"{loss['start']:.4f} before and {loss['search']:.4f} after{others}\n{counts['asked']} losses requested, "
            f"{counts['distinct']} distinct, {document['evaluations']} measured in this run"
        )
    return shown


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "cluster": (cluster, "lorashelf cluster adapters/* -o my.shelf --slots 5 --method d2c --examples tasks/"),
}
