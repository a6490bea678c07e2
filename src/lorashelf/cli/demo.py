"""`lorashelf demo`: real adapters are coded into the bytes of five, and of one; then they arrive at a shelf of five
slots, which shows everything that a shelf does.
"""

from __future__ import annotations

import itertools
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from ..errors import MissingExtra, UsageError
from ..lora.adapter import Adapter
from ..lora.similarity import similarity
from ..placement.clustering import cluster
from ..report.numbers import size
from ..shelf import routing
from ..shelf.arrival import plan_add
from ..shelf.plans import plan_cluster
from ..shelf.settings import new_settings
from ..shelf.shelf import Shelf
from ..shelf.snapshot import Snapshot
from . import arguments as arg
from .demo_coded import cosines, show_coded
from .output import table

if TYPE_CHECKING:
    from rich.console import Console

SLOTS = 5
Blocks = Sequence[Sequence[str]]


def demo(
    seed: Annotated[int, typer.Option("--seed", help="Order of arrival.")] = 0,
    zoo: Annotated[Path, typer.Option("--zoo", help="A folder of PEFT folders.")] = Path("examples/zoo"),
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the shelf; default: a new temporary folder.")
    ] = None,
    llm: Annotated[
        bool, typer.Option("--llm/--no-llm", help="Also run a language model (minutes); without it: seconds, no torch.")
    ] = True,
    examples: Annotated[
        Path | None, typer.Option("--examples", help="Task folders; default: examples/fewshot.", show_default=False)
    ] = None,
) -> None:
    """Show lorashelf on real adapters: the shelf in seconds, then losses and answers of a language model."""
    if examples is not None and not llm:
        raise UsageError("--examples is for the language model", cure="omit --examples or --no-llm")
    if not zoo.is_dir():
        cure = "run it in a checkout of lorashelf, or give --zoo a folder of PEFT folders of one base"
        raise UsageError("the demo's adapters are missing", where=str(zoo), cure=cure)
    from rich.console import Console  # here: other commands should not wait for it

    console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
    named = arg.adapters_in(zoo)
    shelf = Shelf.create(output or Path(tempfile.mkdtemp(prefix="lorashelf-")) / "demo.shelf", new_settings(SLOTS))
    matrix = similarity(list(named.values()))
    show_coded(console, named)
    console.rule(f"{len(named)} adapters arrive, {SLOTS} slots (K-Merge++, seed {seed})", align="left")
    order = random.Random(seed).sample(sorted(named), len(named))
    for task in order:
        _arrive(console, shelf, task, named[task])
    online = [slot.members for slot in shelf.snapshot().manifest.slots]
    _shelf_table(console, shelf.snapshot(), named, matrix)
    served = {task: shelf.snapshot().adapter(task) for task in named}
    console.print(f"  cosine of what serves a task to its own ΔW: {cosines(served, named)}")
    offline = _offline(console, named)
    console.rule("Do slots follow problem types?", align="left")
    _purities(console, {"online, K-Merge++": online, **offline}, list(named), seed)
    _route_and_undo(console, shelf, order[-1])
    if llm:
        _on_a_model(console, named, examples or Path("examples/fewshot"), seed)
    console.rule("Try it yourself", align="left")
    program = "lorashelf" if shutil.which("lorashelf") else sys.argv[0]
    for command in ("ls", "log", "route", "verify", "undo"):
        console.print(f"  {program} {command} {shelf.path}", markup=False)


def _on_a_model(console: Console, named: Mapping[str, Adapter], examples: Path, seed: int) -> None:
    """Run the second half; if the language model's packages are not installed, print how to install them."""
    try:
        from .demo_model import show_model

        with tempfile.TemporaryDirectory(prefix="lorashelf-") as folder:
            show_model(console, named, examples, Path(folder), seed)
    except UsageError as error:
        console.rule("On a language model: not installed", align="left")
        console.print(f"  {error.what}: {error.cure}", markup=False)


def _arrive(console: Console, shelf: Shelf, task: str, adapter: Adapter) -> None:
    plan = plan_add(shelf.snapshot(), adapter, task)
    shelf.commit(plan)
    report = plan.report
    scores = " ".join(f"{slot}:{value:.3f}" for slot, value in report["scores"].items())
    limit = "-" if report["threshold"] is None else f"{report['threshold']:.3f}"
    verb = "opens" if report["decision"] == "open" else "joins"
    beside = ", ".join(member for member in report["members"] if member != task)
    console.print(
        f"  {task:9} {verb} slot {report['slot']}   threshold {limit:5}   scores {scores or '-':40} {beside}",
        markup=False,
    )


def _shelf_table(console: Console, snapshot: Snapshot, named: Mapping[str, Adapter], matrix: np.ndarray) -> None:
    console.rule("The shelf", align="left")
    index = {name: i for i, name in enumerate(named)}
    rows = []
    for slot in snapshot.manifest.slots:
        inside = [matrix[index[a], index[b]] for a, b in itertools.combinations(slot.members, 2)]
        others = [name for name in named if name not in slot.members]
        between = [matrix[index[a], index[b]] for a in slot.members for b in others]
        rows.append((slot.id, _mean(inside), _mean(between), size(slot.object.bytes), slot.members))
    console.print(table([">slot", ">similarity inside", ">to the others", ">size", "members"], rows))


def _offline(console: Console, named: Mapping[str, Adapter]) -> Mapping[str, Blocks]:
    """Cluster the same adapters offline; if a package is not installed, print how to install it."""
    console.rule("The same adapters clustered offline (average linkage)", align="left")
    try:
        return {"offline, agglomerative": _cluster(console, named)}
    except MissingExtra as error:
        console.print(f"  left out: {error.what}: {error.cure}")
        return {}


def _cluster(console: Console, named: Mapping[str, Adapter]) -> Blocks:
    with tempfile.TemporaryDirectory(prefix="lorashelf-") as folder:
        made, _ = Shelf.create_with(
            Path(folder) / "clustered.shelf",
            new_settings(SLOTS),
            lambda snapshot: plan_cluster(snapshot, named, cluster(named, SLOTS, method="agglomerative")),
        )
    console.print(table([">slot", "members"], [(slot.id, slot.members) for slot in made.manifest.slots]))
    return [slot.members for slot in made.manifest.slots]


def purity(blocks: Blocks) -> float:
    """Return the share of tasks that have their slot's most common type."""
    commonest = [Counter(task.split("-")[0] for task in block).most_common(1)[0][1] for block in blocks]
    return sum(commonest) / sum(len(block) for block in blocks)


def chance_purity(blocks: Blocks, tasks: Sequence[str], seed: int, draws: int = 200) -> float:
    """Return the mean purity of random blocks of the same sizes."""
    rng = random.Random(seed)
    total = 0.0
    for _ in range(draws):
        shuffled = iter(rng.sample(list(tasks), len(tasks)))
        total += purity([list(itertools.islice(shuffled, len(block))) for block in blocks])
    return total / draws


def _purities(console: Console, found: Mapping[str, Blocks], tasks: Sequence[str], seed: int) -> None:
    for name, blocks in found.items():
        expected = chance_purity(blocks, tasks, seed)
        console.print(
            f"  {name}: purity {purity(blocks):.2f}, by chance {expected:.2f} (blocks of the same sizes)", markup=False
        )


def _route_and_undo(console: Console, shelf: Shelf, task: str) -> None:
    console.rule("Route a task, load its slot, undo an add", align="left")
    snapshot = shelf.snapshot()
    answer = routing.route(snapshot, task)
    loaded = snapshot.adapter(task)
    console.print(
        f"  {task} is served by slot {answer['slot']}: a PEFT folder of {len(loaded.modules)} modules",
        markup=False,
    )
    console.print(f"  {answer['path']}", markup=False)
    before = len(snapshot.manifest.tasks)
    shelf.undo()
    console.print(
        f"  undo: {before} tasks, now {len(shelf.snapshot().manifest.tasks)} (without {task}); redo:",
        markup=False,
    )
    shelf.redo()
    problems = shelf.verify()
    console.print(
        f"  {len(shelf.snapshot().manifest.tasks)} tasks; verify: {'; '.join(problems) or 'ok'}", markup=False
    )


def _mean(values: Sequence[float]) -> str:
    return f"{float(np.mean(values)):.4f}" if len(values) else "-"


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "demo": (demo, "lorashelf demo --seed 3"),
}
