"""`lorashelf add` into eight filled slots against the dense procedure of K-Merge.

    python benchmarks/add.py

An adapter of Llama-3.2-1B's shape (16 layers of q, k, v, o; r 32; f32; 27 MB) arrives at a shelf of eight. Every figure
comes from a child process of its own; page cache warm; stages are timed inside the child after its imports, from the
folders on disk to their result. The dense procedure runs in two forms: both ΔW built for every slot, and, as K-Merge's
code is released, the newcomer's once and each slot's in turn.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
from common import BASE, RANK, SCALE, TENSORS, Run, child, megabytes, paired, seconds, spread, times

SLOTS = 8
LORASHELF = [sys.executable, "-m", "lorashelf"]


# sides: each runs in a child and prints one JSON line ---------------------------------------------------------------


def released(output: Path, new: Path, *slots: Path, again: bool = False, double: bool = False) -> dict[str, Any]:
    """K-Merge's procedure on torch tensors: ΔW = B A built densely, the cosine per module, the mean; then PEFT's
    `linear` with weights ½, ½ into the best slot; saved. `again`: the newcomer's ΔW built anew for every slot.
    """
    import torch
    from safetensors.torch import load_file, save_file

    precision = torch.float64 if double else torch.float32

    def deltas(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        halves = [name for name in tensors if ".lora_A." in name]
        return {
            name: torch.matmul(tensors[name.replace("lora_A", "lora_B")].to(precision), tensors[name].to(precision))
            for name in halves
        }

    started = time.perf_counter(), time.process_time()
    loaded, held = load_file(new / TENSORS), [load_file(slot / TENSORS) for slot in slots]
    arrived, scores = deltas(loaded), []
    for i, tensors in enumerate(held):
        if again and i:
            arrived = deltas(loaded)
        present = deltas(tensors)
        cosines = [
            torch.nn.functional.cosine_similarity(arrived[name].flatten(), present[name].flatten(), dim=0).item()
            for name in arrived
        ]
        scores.append(sum(cosines) / len(cosines))
    similarity = time.perf_counter() - started[0]

    best = max(range(len(slots)), key=scores.__getitem__)
    share = math.sqrt(0.5 * SCALE)
    merged = {name: share * held[best][name] + share * loaded[name] for name in loaded}
    output.mkdir()
    save_file(merged, output / TENSORS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": BASE, "r": RANK, "lora_alpha": RANK}
    (output / "adapter_config.json").write_text(json.dumps(config | {"target_modules": sorted(common.SHAPES)}))
    return {"best": best, "all": time.perf_counter() - started[0]} | finished(scores, started, similarity)


def rebuilt(output: Path, *paths: Path) -> dict[str, Any]:
    """Both ΔW built for every slot."""
    return released(output, *paths, again=True)


def reference(output: Path, *paths: Path) -> dict[str, Any]:
    """The procedure in float64, not timed: what the scores of all sides are held against."""
    return released(output, *paths, double=True)


def dense(new: Path, *slots: Path) -> dict[str, Any]:
    """The scores alone, densely but with care: module by module, two buffers reused, one pass over the slots."""
    import numpy as np
    from safetensors import safe_open

    started = time.perf_counter(), time.process_time()
    first, *others = [safe_open(path / TENSORS, framework="numpy") for path in (new, *slots)]
    names = [name for name in list(first.keys()) if ".lora_A." in name]  # not a mapping
    buffers: dict[tuple[int, int], Any] = {}
    scores = np.zeros(len(slots))

    def build(file: Any, name: str, which: int) -> Any:
        b, a = file.get_tensor(name.replace("lora_A", "lora_B")), file.get_tensor(name)
        shape = len(b), a.shape[1]
        if shape not in buffers:
            buffers[shape] = np.empty((2, *shape), np.float32)
        return np.matmul(b, a, out=buffers[shape][which]).ravel()

    for name in names:
        x = build(first, name, 0)
        squared = np.vdot(x, x)
        for i, file in enumerate(others):
            y = build(file, name, 1)
            scores[i] += np.vdot(x, y) / np.sqrt(squared * np.vdot(y, y))
    return finished((scores / len(names)).tolist(), started)


def ours(new: Path, shelf: Path) -> dict[str, Any]:
    """The scores alone, by lorashelf: the newcomer read and checked, the shelf opened, as `lorashelf add` does."""
    for name in ("concurrent.futures.thread", "threadpoolctl"):  # at the first use of threads
        importlib.import_module(name)
    from lorashelf import Shelf, read_adapter, similarity

    started = time.perf_counter(), time.process_time()
    adapter, snapshot = read_adapter(new), Shelf(shelf).snapshot()
    scores = similarity([adapter], [snapshot.stored(slot) for slot in snapshot.manifest.slots])[0]
    return finished(scores.tolist(), started)


def folders(new: Path, *slots: Path) -> dict[str, Any]:
    """Likewise of folders, without the squared norms that a shelf stores."""
    for name in ("concurrent.futures.thread", "threadpoolctl"):
        importlib.import_module(name)
    from lorashelf import read_adapter, similarity

    started = time.perf_counter(), time.process_time()
    scores = similarity([read_adapter(new)], [read_adapter(slot, check_values=False) for slot in slots])[0]
    return finished(scores.tolist(), started)


def finished(scores: list[float], started: tuple[float, float], similarity: float | None = None) -> dict[str, Any]:
    cpu, wall = time.process_time() - started[1], time.perf_counter() - started[0]
    return {"scores": scores, "cpu": cpu, "similarity": similarity or wall}


SIDES = {side.__name__: side for side in (released, rebuilt, reference, dense, ours, folders)}


# the benchmark ------------------------------------------------------------------------------------------------------


class Bench:
    """Eight adapters on a shelf, a ninth beside it, and how each side is run on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.copy, self.saved = folder, folder / "copy.shelf", folder / "saved"
        *held, self.new = common.write_adapters(folder, SLOTS + 1)
        self.shelf = folder / "full.shelf"
        self.call("init", self.shelf, "--slots", SLOTS, "--policy", "kmerge")
        self.call("add", self.shelf, *held)
        self.slots = [slot["path"] for slot in self.call("ls", self.shelf)["slots"]]

    def call(self, *words: object) -> Any:
        command = [*LORASHELF, *map(str, words), "--json"]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)

    def run(self, side: str, threads: int, watch: bool = False) -> Run:
        if side == "add":
            self.copy_shelf()
            found = child([*LORASHELF, "add", self.copy, self.new, "--json"], threads, watch=watch)
            return replace(found, result=found.result["added"][0])
        shutil.rmtree(self.saved, ignore_errors=True)
        output = [] if side in ("dense", "ours", "folders") else [self.saved]
        held = [self.shelf] if side == "ours" else self.slots
        return child([sys.executable, __file__, "--side", side, *output, self.new, *held], threads, watch=watch)

    def copy_shelf(self) -> None:
        """A fresh copy of the shelf in place of the last one; its tensor files, which nothing changes, are linked."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.shelf, self.copy, ignore=shutil.ignore_patterns("*.safetensors"))
        for path in self.shelf.glob(f"objects/*/{TENSORS}"):
            os.link(path, self.copy / path.relative_to(self.shelf))

    def floor(self) -> float:
        """Seconds to copy the adapter's file and fsync it: no add can be faster."""
        target = self.folder / "floor"
        os.sync()
        started = time.perf_counter()
        with (self.new / TENSORS).open("rb") as reader, target.open("wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
            os.fsync(writer.fileno())
        taken = time.perf_counter() - started
        target.unlink()
        return taken

    def check(self, runs: Mapping[str, list[Run]]) -> str:
        """Assert that all sides agree: on the scores, the slot, the merged factors. In words, how closely."""
        self.run("released", 1)
        routed = self.call("route", self.copy, self.new.name)
        factors = difference(self.saved, Path(routed["path"]))
        exact = self.run("reference", 1).result
        errors = {}
        for side, found in runs.items():
            scores = [run.result["scores"] for run in found]
            rows = [list(row.values()) if isinstance(row, dict) else row for row in scores]
            errors[side] = max(abs(a - b) for row in rows for a, b in zip(row, exact["scores"], strict=True))
        assert errors["add"] < 1e-6, errors
        assert max(errors["ours"], errors["folders"]) < 1e-6, errors
        assert max(errors.values()) < 1e-4, errors
        assert factors < 1e-6, factors
        for run in runs["add"]:
            assert (run.result["decision"], run.result["slot"]) == ("fold", exact["best"]), run.result
        return (
            f"scores {min(exact['scores']):.4f} to {max(exact['scores']):.4f}, off the procedure in float64 by "
            f"{errors['add']:.0e} (lorashelf), {errors['released']:.0e} (released, float32), "
            f"{errors['dense']:.0e} (dense with care);\nthe merged factors differ by {factors:.0e}"
        )


def difference(one: Path, other: Path) -> float:
    """The largest difference of two folders' tensors, relative to the largest value of the tensor."""
    import numpy as np
    from safetensors.numpy import load_file

    x, y = load_file(one / TENSORS), load_file(other / TENSORS)
    assert x.keys() == y.keys()
    return max(float(np.abs(x[name] - y[name]).max() / np.abs(x[name]).max()) for name in x)


def main() -> int:
    options = common.arguments(__doc__).parse_args()
    if options.side:
        print(json.dumps(SIDES[options.side[0]](*map(Path, options.side[1:]))))
        return 0
    common.heading("Adding an adapter to eight filled slots", options.threads, ["torch", "safetensors"])
    with tempfile.TemporaryDirectory(prefix="lorashelf-bench-") as name:
        return measured(Bench(Path(name)), options.rounds or 5, options.threads)


def measured(bench: Bench, rounds: int, threads: int) -> int:
    sides = ("rebuilt", "add", "released", "ours", "dense", "folders")
    calls: dict[str, Any] = {side: lambda side=side: bench.run(side, threads) for side in sides}
    found = common.interleaved({**calls, "floor": bench.floor}, rounds)
    floors = found.pop("floor")
    single = {side: bench.run(side, 1) for side in sides}
    peaks = {side: bench.run(side, threads, watch=True).peak for side in sides}
    agreement = bench.check({side: [*found[side], single[side]] for side in sides})

    similarity = {side: [run.result["similarity"] for run in found[side]] for side in sides if side != "add"}
    stages = {side: [run.result["all"] for run in found[side]] for side in ("rebuilt", "released")}
    whole = {side: [run.wall for run in found[side]] for side in sides}
    rows = [
        ("similarity: dense, both built for every slot", similarity["rebuilt"]),
        ("similarity: dense, as released (newcomer's once)", similarity["released"]),
        ("similarity: dense with care (NumPy, buffers reused)", similarity["dense"]),
        ("similarity: lorashelf, of folders", similarity["folders"]),
        ("similarity: lorashelf, of a shelf's slots", similarity["ours"]),
        ("similarity, merge, save: both built for every slot", stages["rebuilt"]),
        ("similarity, merge, save: as released", stages["released"]),
        ("whole process: both built for every slot", whole["rebuilt"]),
        ("whole process: as released", whole["released"]),
        ("whole process: lorashelf add", whole["add"]),
        ("floor: copy and fsync of the adapter's file", floors),
    ]
    common.table(["wall time", "min", "median"], [[name, *spread(values)] for name, values in rows])
    size = (bench.new / TENSORS).stat().st_size
    labels = {
        "rebuilt": "both built for every slot",
        "released": "as released",
        "dense": "dense with care, scores only",
        "folders": "lorashelf of folders, scores only",
        "ours": "lorashelf, scores only",
        "add": "lorashelf add",
    }
    costs = []
    for side, label in labels.items():
        inner = seconds(single[side].result["cpu"]) if side != "add" else ""
        written = megabytes(single[side].written)
        costs.append([label, inner, seconds(single[side].cpu), megabytes(peaks[side]), megabytes(9 * size), written])
    columns = ["one thread; peak at all", "CPU after imports", "CPU whole", "peak anonymous", "files read", "written"]
    common.table(columns, costs)
    print(f"{agreement}\n")
    targets = [
        ("similarity, times faster than both built for every slot", paired(similarity["rebuilt"], similarity["ours"])),
        ("whole add, times faster than the same after imports", paired(stages["rebuilt"], whole["add"])),
    ]
    others = [
        ("similarity: as released / lorashelf", paired(similarity["released"], similarity["ours"])),
        ("similarity: dense with care / lorashelf", paired(similarity["dense"], similarity["ours"])),
        ("as released, after imports / whole add", paired(stages["released"], whole["add"])),
        ("as released, whole process / whole add", paired(whole["released"], whole["add"])),
        ("both built for every slot, whole process / whole add", paired(whole["rebuilt"], whole["add"])),
        ("whole add / floor", paired(whole["add"], floors)),
    ]
    common.table([f"ratio, median of {rounds} pairs", ""], [[name, times(ratio)] for name, ratio in others])
    return common.verdicts(
        [
            (*targets[0], ">=", 40),
            (*targets[1], ">=", 10),
            ("peak anonymous memory of add, MB", peaks["add"] / 1e6, "<=", 150),
        ],
        threads,
    )


if __name__ == "__main__":
    sys.exit(main())
