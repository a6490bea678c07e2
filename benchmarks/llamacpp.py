"""Swapping tasks on llama.cpp, from coded slots and from f16 files; bytes and memory of both.

    python benchmarks/llamacpp.py

SmolLM2-135M-Instruct (Q4_1); the adapters of examples/zoo on a shelf of coded slots (quality 0.99) and on one of f16
slots, exported. A swap ends when the context is ready to read a text with the new adapter. Adapter by adapter the sides
alternate: the engine llamacpp from the coded slot alone, with the LoRA file in the cache folder, with the adapter in
memory; llama.cpp's own functions with an exported f16 file; llama_cpp.Llama(lora_path=…), which opens the model anew.
Every swap starts from a freshly read shelf, but for the adapter in memory. Memory is the process's anonymous memory.
Where other work takes most of the machine, CPU seconds are a better measure than wall seconds.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
from common import megabytes, seconds

ROOT = Path(__file__).parent.parent
CODED, CACHED, HELD = "coded slot: decode, write, load", "coded slot: decode, load the cached file", "in memory"
LOADED, ANEW = "llama.cpp alone: load an f16 file", "llama_cpp.Llama: the model anew, with an f16 file"
COUNT = 31  # at most
MOST = 50.0  # ms
Spent = tuple[float, float]
"""Wall and CPU seconds."""


def main() -> int:
    options = common.arguments(__doc__).parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    common.heading("Swapping tasks on llama.cpp", options.threads, ["llama-cpp-python", "gguf"])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORASHELF_CACHE"] = f"{folder}/cache"
        swaps, sizes, memory = _measured(Path(folder))
    common.table(
        ["a swap", "wall min", "wall median", "CPU median"],
        [
            [side, *common.spread([wall for wall, _ in spent]), seconds(statistics.median(cpu for _, cpu in spent))]
            for side, spent in swaps.items()
        ],
    )
    common.table(["the adapters on disk", "bytes", "of f16"], sizes)
    common.table(["anonymous memory of llama.cpp's process", "bytes"], memory)
    median = 1e3 * statistics.median(cpu for _, cpu in swaps[CODED])
    return common.verdicts([("swap from a coded slot, median, CPU ms", median, "<=", MOST)], options.threads)


def _measured(folder: Path) -> tuple[Mapping[str, Sequence[Spent]], list[list[str]], list[list[str]]]:
    """What every swap took, by side; the rows of both tables."""
    from lorashelf import export_shelf
    from lorashelf.models.base_model import gguf_file
    from lorashelf.models.llama_adapters import LlamaAdapters
    from lorashelf.models.llamacpp import HELD as MOST_HELD
    from lorashelf.models.llamacpp import LlamaCppBackend

    coded, plain = _shelf(folder / "coded", encoding="coded", quality=0.99), _shelf(folder / "plain", dtype="f16")
    base, _ = gguf_file(None)
    outputs = {
        outtype: export_shelf(plain.snapshot(), folder / outtype, "gguf", {"base": str(base), "outtype": outtype})
        for outtype in ("f16", "q8_0")
    }
    model = LlamaCppBackend.open()
    model._begin(None, 64, None)
    start = common.anonymous()
    swaps: dict[str, list[Spent]] = {side: [] for side in (CODED, CACHED, HELD, LOADED, ANEW)}
    for task, path in outputs["f16"]["routes"].items():
        for side in (CODED, CACHED):
            model.adapters = LlamaAdapters(model._model, model.adapters._base, MOST_HELD)  # which holds none
            swaps[side].append(_timed(partial(_serve, model, coded, task)))
        adapter = coded.snapshot().adapter(task)
        model._begin(adapter, 64, None)
        model._begin(None, 64, None)
        swaps[HELD].append(_timed(partial(model._begin, adapter, 64, None)))
        swaps[LOADED].append(_timed(partial(_load, model, folder / "f16" / path)))
        swaps[ANEW].append(_timed(partial(_open, base, folder / "f16" / path)))
    f16 = sum(slot.object.bytes for slot in plain.snapshot().manifest.slots)
    held = sum(slot.object.bytes for slot in coded.snapshot().manifest.slots)
    rows = {"PEFT folders, f16": f16}
    rows |= {f"LoRA files of llama.cpp, {t}": sum(o["bytes"] for o in d["objects"]) for t, d in outputs.items()}
    rows |= {"coded slots": held, "the whole coded shelf": coded.snapshot().bytes}
    return (
        swaps,
        [[name, megabytes(size), f"{size / f16:.1%}"] for name, size in rows.items()],
        _memory(folder / "f16", outputs["f16"]["routes"], coded, start),
    )


def _memory(folder: Path, routes: Mapping[str, str], coded: Any, bare: int) -> list[list[str]]:
    """The memory of all f16 files at once, and of the engine after it has served every task."""
    from lorashelf.models.llamacpp import HELD as MOST_HELD
    from lorashelf.models.llamacpp import LlamaCppBackend

    everything, engine = LlamaCppBackend.open(), LlamaCppBackend.open()
    for model in (everything, engine):
        model._begin(None, 64, None)
    before = common.anonymous()
    for path in routes.values():
        everything._model.load_adapter(folder / path)
    loaded = common.anonymous()
    for task in routes:
        _serve(engine, coded, task)
    served = common.anonymous()
    return [
        ["the bare base, its context and this benchmark", megabytes(bare)],
        [f"more with {len(routes)} f16 files loaded", megabytes(loaded - before)],
        [f"more after {len(routes)} coded tasks: the latest {MOST_HELD}, in f32", megabytes(served - loaded)],
    ]


def _shelf(path: Path, **options: Any) -> Any:
    """A shelf with a slot for each adapter of the zoo."""
    from lorashelf import Shelf, new_settings, plan_add, read_adapter

    folders = sorted(each for each in (ROOT / "examples" / "zoo").iterdir() if each.is_dir())[:COUNT]
    shelf = Shelf.create(path, new_settings(len(folders), policy="kmerge", **options))
    for folder in folders:
        shelf.commit(plan_add(shelf.snapshot(), read_adapter(folder), folder.name))
    return shelf


def _serve(model: Any, shelf: Any, task: str) -> None:
    """Read the shelf anew, and put the task's adapter on the base."""
    model._begin(shelf.snapshot().adapter(task), 64, None)


def _load(model: Any, path: Path) -> None:
    model._model.begin(model._model.load_adapter(path), 64)


def _open(base: Path, path: Path) -> None:
    import llama_cpp

    llama_cpp.Llama(str(base), lora_path=str(path), n_ctx=512, verbose=False).close()


def _timed(work: Callable[[], None]) -> Spent:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    sys.exit(main())
