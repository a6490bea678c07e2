"""Which adapter serves which task, with provenance: computed from a cell of a suite, in memory."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..errors import UsageError
from ..formats.peft import encode
from ..lora.adapter import Adapter, in_16_bits
from ..lora.algebra import compress
from ..merging.blocks import merger
from ..merging.spec import MergeSpec
from ..models.protocol import GainGradients, Scores, capable
from ..placement.clustering import cluster
from ..placement.d2c import replayed
from ..placement.partitioners import PARTITIONERS
from ..result_store import ResultStore
from ..search.cluster import cluster_by_loss, drawn
from ..shelf.arrival import plan_add
from ..shelf.settings import new_settings
from ..shelf.shelf import Shelf
from ..tasks.folders import Task
from ..training.gains import RATE, STEPS, fitted_gains
from .peers import PEERS
from .suite import BLOCKS_OF, BY, DIRICHLET, Cell


@dataclass(frozen=True)
class Assignment:
    """Task → adapter (None: the bare base), and how the assignment was made."""

    serving: Mapping[str, Adapter | None]
    provenance: Mapping[str, Any]
    """`blocks` (tasks that share an adapter), `order` of arrival, and the report of a search."""
    coded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Task → `energy_kept`, and the `bytes` of its file and of its `levels` if it has them; empty unless coded."""
    stored: int | None = None
    """The bytes of everything that a code stores."""

    def bytes(self, dtype: str) -> int:
        """Return the bytes of a code, else of the distinct adapters as PEFT folders of this dtype, whatever dtype they
        have.
        """
        if self.stored is not None:
            return self.stored
        return bytes_of({x.digest: x for x in self.serving.values() if x is not None}.values(), dtype)


@dataclass(frozen=True)
class Inputs:
    """The inputs of cells: the tasks' own adapters, their examples, a language model, a folder for journals."""

    adapters: Mapping[str, Adapter]
    tasks: Mapping[str, Task]
    backend: Scores
    folder: Path
    watch: Callable[[Sequence[int]], Iterable[int]] = iter
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The results measured so far, by the cell's id: a search may be the beginning of a longer one."""
    split: str = "validation"
    """The split that is measured."""
    measured_tasks: Collection[str] | None = None
    """The tasks that are measured; None: all."""


def bytes_of(adapters: Iterable[Adapter], dtype: str) -> int:
    """Return the bytes of adapters as PEFT folders of this dtype."""
    return sum(encode(replace(x, dtype=dtype)).size for x in adapters)


def assign(cell: Cell, inputs: Inputs) -> Assignment:
    """Compute the assignment of a cell. Raises what merging, placing and searching raise."""
    if rank := cell.options.get("adapter_rank"):
        inputs = replace(inputs, adapters={task: compress(x, rank)[0] for task, x in inputs.adapters.items()})
    adapters = inputs.adapters
    if cell.how == "serve":
        own = cell.method == "own"
        return Assignment({task: adapters[task] if own else None for task in adapters}, {})
    if cell.how == "code":
        return _by_a_peer(cell, inputs) if cell.method in PEERS else _coded(cell, inputs)
    if cell.how == "cluster":
        return _merged(cell, inputs, _clustered(cell, inputs), {})
    if cell.how == "arrive":
        return _arrived(cell, inputs)
    return _searched(cell, inputs)


def _coded(cell: Cell, inputs: Inputs) -> Assignment:
    """Code every task's own adapter as a file of levels, all files within a share of the adapters' 16-bit size."""
    from ..formats.coded.decoder import decode  # only for coded cells
    from ..formats.coded.encoder import Encoder
    from ..formats.coded.files import encode_together

    size = int(in_16_bits(sum(x.parameters for x in inputs.adapters.values())) * cell.options["percent"] / 100)

    def encoded(factors: Mapping[str, Mapping[str, float]]) -> tuple[dict[str, Encoder], dict[str, Adapter]]:
        encoders = {task: Encoder(x, factors.get(task)) for task, x in inputs.adapters.items()}
        files = encode_together(list(encoders.values()), size, cell.options["levels"])
        return encoders, {task: decode(levels) for task, levels in zip(encoders, files, strict=True)}

    encoders, served = encoded({})
    if cell.options.get("fit"):
        encoders, served = encoded(_gains(cell, inputs, served))
    coded = {
        task: {"bytes": each.size, "levels": [len(level) for level in each.levels], "energy_kept": round(each.kept, 4)}
        for task, each in encoders.items()
    }
    return Assignment(served, {}, coded, sum(each.size for each in encoders.values()))


def _gains(cell: Cell, inputs: Inputs, coded: Mapping[str, Adapter]) -> dict[str, dict[str, float]]:
    """Fit the gains of the measured tasks' codes to `fit` examples of each train split, the step chosen by as many of
    the split that is not measured, validation or test; those fitted so far are in the folder.
    """
    backend = capable(inputs.backend, GainGradients)
    if inputs.measured_tasks is not None:
        coded = {task: x for task, x in coded.items() if task in inputs.measured_tasks}
    check = "test" if inputs.split == "validation" else "validation"
    sets, checks = (
        drawn(inputs.tasks, coded, backend.fitting, split, cell.options["fit"], 0)[0] for split in ("train", check)
    )
    kept = ResultStore(inputs.folder / f"gains-{cell.id}.jsonl")
    found, tasks = {}, sorted(coded)
    for place in inputs.watch(range(len(tasks))):
        task = tasks[place]
        unit = {"task": task, "code": coded[task].digest, "backend": backend.id}
        unit |= {"examples": sets[task].digest, "check": checks[task].digest, "by": f"{STEPS} steps at {RATE}"}
        if (factors := kept.get(unit)) is None:
            factors = fitted_gains(backend, coded[task], sets[task], checks[task])
            kept.put(unit, factors)
        found[task] = factors
    return found


def _by_a_peer(cell: Cell, inputs: Inputs) -> Assignment:
    kept = PEERS[cell.method].rule(inputs.adapters, **cell.options)
    return Assignment(kept.adapters, {}, kept.described(inputs.adapters), kept.bytes)


def arrival(cell: Cell, types: Mapping[str, str]) -> list[str]:
    """Return the order in which tasks (name → problem type) arrive: by name, drawn by the seed, or `worst`: all tasks
    of a type in a row.
    """
    ordered, rng = sorted(types), random.Random(cell.options["seed"])
    if cell.options["order"] == "name":
        return ordered
    if cell.options["order"] == "random":
        return rng.sample(ordered, len(ordered))
    kinds = sorted(set(types.values()))
    rng.shuffle(kinds)
    groups = [[name for name in ordered if types[name] == kind] for kind in kinds]
    return [name for group in groups for name in rng.sample(group, len(group))]


def _spec(cell: Cell) -> MergeSpec:
    names = ("parameters", "rank", "dtype", "seed", "restore_norm")
    return MergeSpec(cell.options["merge"], **{name: cell.options[name] for name in names if name in cell.options})


def _clustered(cell: Cell, inputs: Inputs) -> list[list[str]]:
    names = sorted(inputs.adapters)
    if cell.method in BY:
        groups = {name: getattr(inputs.tasks[name], cell.method) for name in names}
        ordered = sorted(names, key=lambda name: (groups[name], name))
        return [list(group) for _, group in itertools.groupby(ordered, key=groups.__getitem__)]
    if cell.method == DIRICHLET:
        over = {name: getattr(inputs.tasks[name], cell.options["over"]) for name in names}
        return dirichlet_blocks(over, cell.options["slots"], cell.options["alpha"], cell.options["seed"])
    if cell.method == BLOCKS_OF:
        return _blocks_of(cell.options["result"], inputs)
    found = cluster(inputs.adapters, cell.options["slots"], method=cell.method, seed=cell.options["seed"])
    return [list(block) for block in found.blocks]


def _blocks_of(name: str, inputs: Inputs) -> list[list[str]]:
    """Return the blocks of a result METHOD-ID. Raises UsageError without it, or if it has other tasks."""
    result = inputs.results.get(name.rpartition("-")[2])
    blocks: list[list[str]] = result["provenance"].get("blocks", []) if result else []
    if sorted(itertools.chain(*blocks)) != sorted(inputs.adapters):
        what = f"{name} has blocks of other tasks" if blocks else f"there is no result {name} with blocks"
        raise UsageError(what, cure="list its cell with a lower priority, or share a suite that has measured the cell")
    return blocks


def dirichlet_blocks(groups: Mapping[str, str], k: int, alpha: float, seed: int) -> list[list[str]]:
    """Draw k blocks of equal size (± 1) of tasks (name → problem type or language): each block draws shares of the
    groups from a symmetric Dirichlet distribution, then its tasks one by one, by these shares, from what is left. Small
    `alpha`: blocks of one group; large: all groups in every block.
    """
    rng = np.random.default_rng(seed)
    kinds = sorted(set(groups.values()))
    left = [[name for name in sorted(groups) if groups[name] == kind] for kind in kinds]
    blocks: list[list[str]] = []
    for size in (len(part) for part in np.array_split(np.arange(len(groups)), k)):
        shares = rng.dirichlet([alpha] * len(kinds)) + 1e-9  # a share of 0 only if nothing else is left
        block = []
        for _ in range(size):
            open_shares = shares * [bool(names) for names in left]
            names = left[rng.choice(len(kinds), p=open_shares / open_shares.sum())]
            block.append(names.pop(rng.integers(len(names))))
        blocks.append(sorted(block))
    return [block for block in blocks if block]


def _merged(cell: Cell, inputs: Inputs, blocks: Sequence[Sequence[str]], more: Mapping[str, Any]) -> Assignment:
    merge = merger(inputs.adapters, _spec(cell))
    serving = {task: x for block in blocks for x in [merge(block)] for task in block}
    return Assignment(serving, {"blocks": [sorted(block) for block in blocks], **more})


def _arrived(cell: Cell, inputs: Inputs) -> Assignment:
    """Let the adapters arrive one by one at an empty shelf; nothing is committed to it."""
    options = dict(cell.options)
    types = {name: inputs.tasks[name].type for name in inputs.adapters}
    order = arrival(cell, types)
    options.pop("order")
    options.pop("adapter_rank", None)
    order = order[: options.pop("after", None)]
    with TemporaryDirectory() as folder:
        settings = new_settings(options.pop("slots"), policy=cell.method, **options)
        snapshot = Shelf.create(Path(folder) / "a.shelf", settings).snapshot()
        for task in order:
            snapshot = snapshot.after(plan_add(snapshot, inputs.adapters[task], task, type=types[task]))
        slots = snapshot.manifest.slots
        serving = {task: snapshot.adapter(task) for task in order}
    return Assignment(serving, {"blocks": [sorted(slot.members) for slot in slots], "order": order})


def _searched(cell: Cell, inputs: Inputs) -> Assignment:
    """Search by loss on examples of the train split; the losses measured so far are kept in the folder."""
    options = cell.options
    if known := _known_search(cell, inputs.results):
        found = known["provenance"]
        blocks = replayed(found["start"], found["moves"], options["iterations"])
        return _merged(cell, inputs, blocks, {"replayed": known["cell"]["iterations"]})
    backend = inputs.backend
    sets, _ = drawn(
        inputs.tasks, inputs.adapters, backend.fitting, "train", options["examples_per_task"], options["seed"]
    )
    clustering = cluster_by_loss(
        inputs.adapters,
        options["slots"],
        _spec(cell),
        backend,
        sets,
        method=cell.method,
        journal=inputs.folder / f"search-{cell.id}.jsonl",
        watch=inputs.watch,
        **{name: options[name] for name in PARTITIONERS[cell.method].parameters if name in options},
    )
    whole = not (options.get("restarts") or options.get("keep_best"))
    way: dict[str, Any] = (
        {"start": [*map(list, clustering.start)], "moves": [*map(list, clustering.moves)]} if whole else {}
    )
    return _merged(cell, inputs, clustering.blocks, {"search": dict(clustering.report), **way})


def _known_search(cell: Cell, results: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the result of the cell's search, else of the longest one that differs in more iterations only, with its
    moves, if there is one: searches on different processors part where losses differ in their last digits, so all
    shorter ones are read off from one.
    """
    wanted = cell.options["iterations"]

    def fits(result: Mapping[str, Any]) -> bool:
        other = {name: value for name, value in result["cell"].items() if name != "measure"}
        same = {**other, "iterations": wanted} == cell.document()
        return same and other["iterations"] >= wanted and "moves" in result["provenance"]

    def length(result: Mapping[str, Any]) -> tuple[bool, int]:
        iterations = result["cell"]["iterations"]
        return iterations == wanted, iterations

    return max(filter(fits, results.values()), key=length, default=None)
