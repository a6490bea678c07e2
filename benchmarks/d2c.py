"""D2C with its memory of losses against the plain algorithm, which asks the model every time.

    python benchmarks/d2c.py [--zoo DIR] [--data DIR] [--seeds 0,1,2,3,4] [--plain 0]

20 adapters, K = 5, T = 200, n = 8 examples a task, merge `ties`, SmolLM2-135M-Instruct. For every seed: the losses that
the plain run asks for, how many of them are distinct, and how often the model was asked. Both take the same moves. The
plain run is timed for the seeds of --plain (minutes each).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import common
from common import seconds, times

if TYPE_CHECKING:
    from lorashelf import Adapter
    from lorashelf.placement.d2c import Block
    from lorashelf.tasks.folders import ExampleSet

    Pairs = Sequence[tuple[Block, str]]

ROOT = Path(__file__).parent.parent
COUNT, K, ITERATIONS, EXAMPLES = 20, 5, 200, 8


def chosen(zoo: Path, data: Path) -> tuple[dict[str, Adapter], dict[str, ExampleSet]]:
    """Twenty adapters drawn by seed 0, and eight examples of each task from both splits."""
    import numpy as np

    from lorashelf import read_adapter
    from lorashelf.tasks.folders import ExampleSet, read_tasks

    tasks = read_tasks(data)
    there = sorted(path.name for path in zoo.iterdir() if path.name in tasks)
    names = sorted(np.random.default_rng(0).permutation(there)[:COUNT].tolist())
    sets = {}
    for name in names:
        pool = [e for split in ("train", "validation") for e in tasks[name].splits[split]]
        drawn = np.random.default_rng([0, *name.encode()]).permutation(len(pool))[:EXAMPLES]
        sets[name] = ExampleSet(name, tasks[name].prompt, tuple(pool[i] for i in sorted(drawn)))
    return {name: read_adapter(zoo / name) for name in names}, sets


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--zoo", type=Path, default=ROOT / "examples" / "zoo")
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "fewshot")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--plain", default="0", help="seeds whose plain run is timed too")
    options = parser.parse_args()
    common.heading("D2C: a memory of losses against asking every time", options.threads, ["torch", "transformers"])
    import torch

    from lorashelf import MergeSpec
    from lorashelf.merging.blocks import merger
    from lorashelf.models.hf import HFBackend
    from lorashelf.models.protocol import mean_loss
    from lorashelf.placement.d2c import search
    from lorashelf.search.block_loss import BlockLoss

    torch.set_num_threads(options.threads)
    adapters, sets = chosen(options.zoo, options.data)
    names = sorted(adapters)
    backend = HFBackend.open(dtype="f32")
    merge = merger(adapters, MergeSpec(method="ties", dtype="f32"))
    rows, equal, ratios = [], True, []
    for seed in map(int, options.seeds.split(",")):
        asked: list[object] = []
        objective = BlockLoss(adapters, sets, backend, merge)

        def remembered(pairs: Pairs, objective: BlockLoss = objective, asked: list[object] = asked) -> Sequence[float]:
            asked.extend(pairs)
            return objective(pairs)

        def plain(pairs: Pairs) -> list[float]:
            return [mean_loss(backend.nll([(merge(tuple(sorted(block))), sets[task])])[0]) for block, task in pairs]

        started = time.perf_counter()
        found = search(names, K, remembered, iterations=ITERATIONS, seed=seed)
        wall = time.perf_counter() - started
        equal &= objective.measured == len(set(asked))
        timed = "-"
        if str(seed) in options.plain.split(","):
            started = time.perf_counter()
            same = search(names, K, plain, iterations=ITERATIONS, seed=seed)
            took = time.perf_counter() - started
            equal &= same == found
            ratios.append(took / wall)
            timed = seconds(took)
        counts = [found.proposals, len(found.moves), len(asked), len(set(asked)), objective.measured]
        rows.append([f"seed {seed}", *map(str, counts), seconds(wall), timed])
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    common.table(
        ["", "proposals", "moves", "losses asked", "distinct", "model evaluations", "wall", "plain wall"], rows
    )
    print(f"{COUNT} adapters of {options.zoo.name}, {EXAMPLES} examples a task")
    print(f"plain / remembered, wall: {', '.join(map(times, ratios))}\n")
    return common.verdicts(
        [("evaluations are the distinct losses, moves the plain run's", equal, ">=", 1)], options.threads
    )


if __name__ == "__main__":
    sys.exit(main())
