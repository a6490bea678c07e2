"""How far do running averages drift by rounding, per storage dtype?  python suites/drift.py --zoo DIR

Folds every adapter of the zoo (repeated until 40) one by one into one slot, stored in the dtype after each fold, with
`linear`; compares ΔW with the merge of all at once. Then takes one out again and compares with the others' merge.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path

from lorashelf import Adapter, MergeSpec, combine, merge, norm, read_adapter, write_adapter
from lorashelf.merging.average import Average, alone, fold, source, without

FOLDS = 40


def stored(average: Average) -> Average:
    """The average as it comes back from a disk."""
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(average.adapter, Path(folder) / "x")
        held = read_adapter(Path(folder) / "x")
        modules = {path: replace(f, a=f.a.copy(), b=f.b.copy()) for path, f in held.modules.items()}
        return replace(average, adapter=held.with_factors(modules))


def distance(x: Adapter, y: Adapter) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW'‖."""
    return norm(combine([x, y], [1.0, -1.0])) / norm(y)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    zoo = parser.parse_args().zoo
    paths = [path for path in sorted(zoo.iterdir()) if (path / "adapter_config.json").exists()]
    xs = [read_adapter(paths[i % len(paths)]) for i in range(FOLDS)]
    records = [source(f"t{i}", "t", x) for i, x in enumerate(xs)]
    heads = ["dtype", "drift after 40", "after 10", "one of 40 taken out", "the precision said", "one of 2 taken out"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for dtype in ("f32", "f16", "bf16"):
        spec = MergeSpec(dtype=dtype)
        average = stored(alone(xs[0], records[0], spec))
        drifts = {}
        for n in range(1, FOLDS):
            average = stored(fold([average], xs[n], records[n], spec))
            if n + 1 in (2, 10, FOLDS):
                drifts[n + 1] = distance(average.adapter, merge(xs[: n + 1], method="linear"))
            if n + 1 == 2:
                one, _ = without(average, records[1].digest, xs[1], spec)
                pair = distance(one.adapter, xs[0])
        rest, said = without(average, records[-1].digest, xs[-1], spec)
        taken = distance(rest.adapter, merge(xs[:-1], method="linear"))
        assert not math.isnan(taken)
        print(
            f"| {dtype} | {drifts[FOLDS]:.1e} | {drifts[10]:.1e} | {taken:.1e} | {said:.1e} | {pair:.1e} |", flush=True
        )


if __name__ == "__main__":
    main()
