"""What gains fitted to the loss of a few examples bring to coded adapters, and to adapters that are not coded.

    python suites/fitted_gains.py --adapters DIR --data DIR [--tasks NAME ...] [--percents 1 5 100] [-o rows.jsonl]

An adapter is coded in a share of its 16-bit bytes and decoded; at 100 % it is left as it is. Then ΔW is multiplied by
one factor for all modules (0.9 and 1.1 are tried), or by one factor per module, fitted to 24 training examples, the
step chosen by 24 of the test split. Printed is the share of the gain in loss that each keeps on other examples, those
of the validation split. OUT keeps the rows, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lorashelf import Adapter, HFBackend, read_adapter, read_tasks
from lorashelf.formats.coded import LEVELS
from lorashelf.formats.coded.decoder import decode
from lorashelf.formats.coded.encoder import Encoder
from lorashelf.formats.coded.files import encode_within
from lorashelf.lora.algebra import scaled
from lorashelf.models.protocol import mean_loss
from lorashelf.tasks.folders import Task
from lorashelf.training.gains import fitted_gains

EXAMPLES, LIMIT = 24, 20
FACTORS = (0.9, 1.1)


def measured(backend: HFBackend, adapter: Adapter, task: Task, percent: float) -> dict[str, float]:
    """The share of the gain in loss kept on validation examples, as coded and with the factors."""
    training, check = (backend.fitting(task.examples(split))[0].drawn(EXAMPLES, 7) for split in ("train", "test"))
    others = backend.fitting(task.examples("validation"))[0].drawn(LIMIT, 0)
    coded, energy = adapter, 1.0
    if percent < 100:
        encoder = Encoder(adapter)
        coded = decode(encode_within(encoder, int(adapter.parameters * percent / 50), LEVELS))
        energy = encoder.kept
    base, own = (mean_loss(losses) for losses in backend.nll([(None, others), (adapter, others)]))

    def kept(x: Adapter) -> float:
        return (base - mean_loss(backend.nll([(x, others)])[0])) / (base - own)

    found = {"energy": energy, "as coded": kept(coded)}
    found |= {f"times {factor:g}": kept(scaled(coded, dict.fromkeys(coded.modules, factor))) for factor in FACTORS}
    return found | {"fitted per module": kept(scaled(coded, fitted_gains(backend, coded, training, check)))}


def main() -> int:
    """Measure what is left, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--percents", type=float, nargs="+", default=[1.0, 5.0, 100.0])
    parser.add_argument("-o", "--out", type=Path, default=Path("fitted_gains.jsonl"))
    options = parser.parse_args()
    tasks = read_tasks(options.data)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    backend = HFBackend.open(device="cpu", dtype="f32")
    for name in options.tasks or sorted(tasks):
        adapter = read_adapter(options.adapters / name)
        for percent in options.percents:
            if not any(row["task"] == name and row["percent"] == percent for row in rows):
                rows.append({"task": name, "percent": percent, **measured(backend, adapter, tasks[name], percent)})
                with options.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(rows[-1], file=sys.stderr)
    heads = ["as coded", *(f"times {factor:g}" for factor in FACTORS), "fitted per module"]
    print(f"| bytes | tasks | {' | '.join(heads)} |\n" + "|---" * (len(heads) + 2) + "|")
    for percent in options.percents:
        some = [row for row in rows if row["percent"] == percent]
        means = [sum(row[head] for row in some) / len(some) for head in heads]
        print(f"| {percent:g} % | {len(some)} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
