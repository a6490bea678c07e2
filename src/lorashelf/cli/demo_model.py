"""The demo's second half: the same adapters on a real language model; a short D2C, a table of losses, answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from ..lora.adapter import Adapter
from ..merging.blocks import merger
from ..merging.spec import MergeSpec
from ..models.engines import open_model
from ..models.protocol import LanguageModel, mean_loss
from ..placement.partitioners import balanced
from ..search.cluster import cluster_by_loss
from ..shelf.arrival import plan_add
from ..shelf.settings import new_settings
from ..shelf.shelf import Shelf
from ..tasks.folders import ExampleSet, Task, read_tasks
from .demo_coded import packed
from .output import progress, table

SLOTS, ITERATIONS = 4, 60
SHOWN = "tone-en"
DOZEN = (
    "gec-en",
    "gec-es",
    "gec-it",
    "qa-en",
    "qa-es",
    "qa-fr",
    "reply-en",
    "reply-fr",
    "sum-en",
    "sum-fr",
    "tone-en",
    "tone-fr",
)
Serving = Mapping[str, Adapter | None]


def show_model(console: Console, zoo: Mapping[str, Adapter], examples: Path, folder: Path, seed: int) -> None:
    """Search on six examples per task, report on the other six; all merge by `linear` into as many slots, but for the
    coding, which takes the bytes of one.
    """
    tasks = read_tasks(examples)
    names = [name for name in DOZEN if name in zoo and name in tasks]
    adapters = {name: zoo[name] for name in names}
    console.rule(f"On a language model: {len(names)} adapters, {SLOTS} slots", align="left")
    model = open_model()
    console.print(f"  {model.name}, {model.dtype}", markup=False)
    sets = {split: {name: tasks[name].examples(split) for name in names} for split in ("train", "validation")}
    spec = MergeSpec("linear", seed=seed)
    found = cluster_by_loss(
        adapters,
        SLOTS,
        spec,
        model,
        sets["train"],
        iterations=ITERATIONS,
        watch=lambda steps: progress(steps, "  D2C"),
    )
    labels = balanced(len(names), SLOTS, seed)
    drawn = [[n for n, label in zip(names, labels, strict=True) if label == c] for c in range(SLOTS)]
    served: dict[str, Serving] = {
        "zero-shot": dict.fromkeys(names),
        "own adapter": adapters,
        "random": _serving(drawn, merger(adapters, spec)),
        "K-Merge++": _arrived(folder / "model.shelf", adapters, seed),
        "D2C": _serving(found.blocks, merger(adapters, spec)),
        "coded, 1 slot": _packed(adapters, folder / "coded.shelf"),
    }
    blocks = "  ·  ".join(" ".join(block) for block in found.blocks)
    report = found.report
    console.print(
        f"  D2C: {report['accepted']} of {report['proposals']} moves accepted; "
        f"{report['losses']['asked']} losses requested, {report['evaluations']} measured; slots: {blocks}",
        markup=False,
    )
    _loss_table(console, model, served, sets["validation"])
    _answers(console, model, served, tasks[SHOWN if SHOWN in names else names[0]])


def _serving(blocks: Sequence[Sequence[str]], merged: Callable[[Sequence[str]], Adapter]) -> Serving:
    return {name: adapter for block in blocks for adapter in [merged(block)] for name in block}


def _packed(adapters: Mapping[str, Adapter], path: Path) -> Serving:
    """Return the adapter of each task after all were coded into the bytes of one slot."""
    snapshot = packed(adapters, 1, path)
    return {name: snapshot.adapter(name) for name in adapters}


def _arrived(path: Path, adapters: Mapping[str, Adapter], seed: int) -> Serving:
    """Return the adapter of each task after all have arrived at a new shelf, in random order, under K-Merge++."""
    snapshot = Shelf.create(path, new_settings(SLOTS, seed=seed)).snapshot()
    for name in random.Random(seed).sample(sorted(adapters), len(adapters)):
        snapshot = snapshot.after(plan_add(snapshot, adapters[name], name))
    return {name: snapshot.adapter(name) for name in snapshot.manifest.tasks}


def _loss_table(
    console: Console, model: LanguageModel, served: Mapping[str, Serving], sets: Mapping[str, ExampleSet]
) -> None:
    console.rule("Loss of the answers, nats per token (examples not used in the search)", align="left")
    losses: dict[str, list[float]] = {method: [] for method in served}
    for name in progress(list(sets), "  measuring"):
        found = model.nll([(serving[name], sets[name]) for serving in served.values()])
        for method, each in zip(served, found, strict=True):
            losses[method].append(mean_loss(each))
    rows = [(name, *(f"{losses[m][i]:.3f}" for m in served)) for i, name in enumerate(sets)]
    rows.append(("mean", *(f"{sum(values) / len(values):.3f}" for values in losses.values())))
    console.print(table(["task", *(f">{method}" for method in served)], rows))


def _answers(console: Console, model: LanguageModel, served: Mapping[str, Serving], task: Task) -> None:
    example = task.splits["validation"][0]
    console.rule(f"One answer each, {task.name}", align="left")
    console.print(f"  {task.prompt} {example.input}", markup=False)
    for method, serving in served.items():
        [answer] = model.answers(serving[task.name], task.prompt, [example.input], max_new_tokens=task.max_new_tokens)
        console.print(f"  {method:13} → {answer!r}", markup=False)
    console.print(f"  {'reference':13} → {example.output!r}", markup=False)
