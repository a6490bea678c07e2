"""Losses with an adapter on the base, against the bare base's forward pass on the same batches.

    python benchmarks/nll.py

SmolLM2-135M-Instruct, q, k, v, o adapted at rank 32 (the papers' shape), every example of examples/fewshot, one call of
`nll` a task. The bare side runs the model alone on the very batches, tokenised before, logits at the same positions.
Task by task the sides alternate. Padding is what `nll` saw over the whole run; memory is the process's own peak (VmHWM)
in a run of either side.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import common
from common import megabytes, paired, seconds, spread, timed, times

ROOT = Path(__file__).parent.parent
LAYERS, HIDDEN, KEYS, RANK = 30, 576, 192, 32
SHAPES = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (KEYS, HIDDEN), "v_proj": (KEYS, HIDDEN), "o_proj": (HIDDEN, HIDDEN)}


def main() -> int:
    options = common.arguments(__doc__).parse_args()
    rounds = options.rounds or 3
    common.heading("Losses with an adapter against the bare base", options.threads, ["torch", "transformers"])
    import torch

    from lorashelf.models.hf import HFBackend
    from lorashelf.models.hooks import AdapterPool
    from lorashelf.tasks.folders import ExampleSet, read_tasks

    torch.set_num_threads(options.threads)
    backend = HFBackend.open(dtype="f32")
    adapters = list(common.random_adapters(2, LAYERS, SHAPES))
    sets = [
        ExampleSet(name, task.prompt, tuple(e for split in task.splits.values() for e in split))
        for name, task in read_tasks(ROOT / "examples" / "fewshot").items()
    ]
    batches = {s.task: _tokenised(backend, s) for s in sets}
    backend.nll([(adapters[0], sets[0])])  # warm
    ours: list[float] = []
    bare: list[float] = []
    for _ in range(rounds):
        mine = alone = 0.0
        for examples in sets:
            alone += timed(lambda examples=examples: [backend._forward(None, b) for b in batches[examples.task]])[0]
            mine += timed(lambda examples=examples: backend.nll([(adapters[0], examples)]))[0]
        ours.append(mine)
        bare.append(alone)
    backend.positions.update(tokens=0, padding=0)
    backend.nll([(adapters[0], examples) for examples in sets])
    tokens, padding = backend.positions["tokens"], backend.positions["padding"]
    swaps = [timed(lambda i=i: _swap(AdapterPool(backend.base, 1), adapters[i % 2]))[0] for i in range(20)]
    alone_peak = _peak(lambda: [backend._forward(None, b) for bs in batches.values() for b in bs])
    our_peak = _peak(lambda: backend.nll([(adapters[1], examples) for examples in sets]))
    common.table(
        ["", "wall min", "median", "tokens a second"],
        [
            [name, *spread(values), f"{tokens / min(values):.0f}"]
            for name, values in (
                ("bare base, forward only", bare),
                ("nll, rank 32, float32, tokenising included", ours),
            )
        ],
    )
    ratio = paired(bare, ours)
    forward_passes = sum(map(len, batches.values()))
    print(
        f"{len(sets)} tasks, {sum(len(s.examples) for s in sets)} examples, {forward_passes} batches of at most ",
        end="",
    )
    print(f"{backend.batch} positions, {tokens} tokens, padding {padding / (tokens + padding):.1%}")
    print(f"median of {rounds} pairs: nll at {times(ratio)} of the bare forward pass")
    print(f"swap of an adapter: median {seconds(sorted(swaps)[len(swaps) // 2])}, most {seconds(max(swaps))}")
    print(f"peak: {megabytes(alone_peak)} base and its largest batch; {megabytes(our_peak)} all of nll\n")
    size = 4 * adapters[1].parameters
    return common.verdicts(
        [
            ("nll, share of the bare forward's throughput", ratio, ">=", 0.85),
            ("padding, share of all positions", padding / (tokens + padding), "<=", 0.1),
            ("adapter swap, ms", 1e3 * max(swaps), "<=", 30),
            ("peak over base + one batch + the adapter", our_peak / (alone_peak + size), "<=", 1.05),
        ],
        options.threads,
    )


def _tokenised(backend: Any, examples: Any) -> list[list[Any]]:
    tokens = [backend.tokens(examples, e) for e in examples.examples]
    return [[tokens[i] for i in members] for members in backend.batches(tokens)]


def _swap(pool: Any, adapter: Any) -> None:
    """Put an adapter on the base that was not there, and take it off again."""
    with pool.on_base(adapter):
        pass


def _peak(work: Any) -> float:
    """The process's peak resident bytes while it works."""
    Path("/proc/self/clear_refs").write_text("5")
    work()
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


if __name__ == "__main__":
    sys.exit(main())
