"""Merging eight adapters against PEFT's `add_weighted_adapter`.

    python benchmarks/merge.py

N = 8, r 32, modules of 2048 x 2048, all adapters in memory on both sides, one process; PEFT works on a model of bare
linear layers, and deleting its result is not timed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import common
from common import SCALE, paired, spread, timed, times

COUNT, LAYERS, SIZE = 8, 2, 2048
ROUNDS = {"svd": 3, "ties": 15, "linear": 25}
TARGETS = {"svd": 10, "ties": 1, "linear": 1}
SETTLE = 0.2  # seconds between two runs, so that one side's waiting threads are asleep when the other starts


def model(adapters: list[Any]) -> Any:
    """A PEFT model of LAYERS bare linear layers that holds the adapters under the names "0", "1" …"""
    import torch
    from peft import LoraConfig, get_peft_model

    class Projection(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(SIZE, SIZE, bias=False)

    base = torch.nn.Module()
    base.layers = torch.nn.ModuleList(Projection() for _ in range(LAYERS))
    config = LoraConfig(r=common.RANK, lora_alpha=int(SCALE * common.RANK), target_modules=["q_proj"])
    wrapped: Any = get_peft_model(base, config, adapter_name="0")
    for i in range(1, len(adapters)):
        wrapped.add_adapter(str(i), config)
    for i, adapter in enumerate(adapters):
        for layer, factors in zip(wrapped.base_model.model.layers, adapter.modules.values(), strict=True):
            layer.q_proj.lora_A[str(i)].weight.data = torch.tensor(factors.a)
            layer.q_proj.lora_B[str(i)].weight.data = torch.tensor(factors.b)
    return wrapped


def settled(work: Callable[[], Any]) -> tuple[float, Any]:
    time.sleep(SETTLE)
    return timed(work)


def measured(method: str, adapters: list[Any], wrapped: Any, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of every round on both sides, and the relative difference of the two merges' ΔW."""
    import numpy as np

    from lorashelf import merge

    params: dict[str, Any] = {"density": 0.5} if method == "ties" else {}
    weights = [1.0 if method == "ties" else 1 / COUNT] * COUNT
    names = [str(i) for i in range(COUNT)]

    def theirs() -> None:
        wrapped.add_weighted_adapter(names, weights, "merged", combination_type=method, **params)

    seconds: dict[str, list[float]] = {"peft": [], "lorashelf": []}
    for _ in range(rounds):
        seconds["peft"].append(settled(theirs)[0])
        layers = [layer.q_proj for layer in wrapped.base_model.model.layers]
        expected = [layer.get_delta_weight("merged").detach().numpy() for layer in layers]
        wrapped.delete_adapter("merged")
        taken, merged = settled(lambda: merge(adapters, weights, method=method, **params))
        seconds["lorashelf"].append(taken)
    found = [factors.delta() for factors in merged.modules.values()]
    difference = max(float(np.linalg.norm(x - y) / np.linalg.norm(x)) for x, y in zip(expected, found, strict=True))
    return seconds, difference


def main() -> int:
    options = common.arguments(__doc__).parse_args()
    with common.confined(options.threads):
        return run(options)


def run(options: argparse.Namespace) -> int:
    os.environ |= dict.fromkeys(common.THREAD_VARIABLES, str(options.threads))  # before NumPy and torch are imported
    title = f"Merging {COUNT} adapters, r {common.RANK}, {LAYERS} modules of {SIZE} x {SIZE}"
    common.heading(title, options.threads, ["peft", "torch"])
    adapters = list(common.random_adapters(COUNT, layers=LAYERS, shapes={"q_proj": (SIZE, SIZE)}))
    wrapped = model(adapters)
    rows, targets = [], []
    for method, rounds in ROUNDS.items():
        seconds, difference = measured(method, adapters, wrapped, options.rounds or rounds)
        assert difference < 1e-5, f"{method}: another ΔW, {difference:.1e}"
        ratio = paired(seconds["peft"], seconds["lorashelf"])
        rows.append(
            [method, *spread(seconds["peft"]), *spread(seconds["lorashelf"]), times(ratio), f"{difference:.0e}"]
        )
        targets.append((f"{method}, times faster than PEFT", ratio, ">=", TARGETS[method]))
    columns = ["", "PEFT min", "median", "lorashelf min", "median", "ratio of pairs", "ΔW differs"]
    common.table(columns, rows)
    return common.verdicts(targets, options.threads)


if __name__ == "__main__":
    sys.exit(main())
