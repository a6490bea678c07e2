"""Are the few-shot examples what the tasks are? On them every task's own adapter should beat the bare base.

    python suites/fewshot_gate.py --zoo DIR

DIR holds a PEFT folder a task of examples/fewshot. Prints the loss of the twelve examples without and with the adapter,
in nats a token, and names the tasks where the adapter does not help; the exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lorashelf import read_adapter
from lorashelf.backend import mean_loss
from lorashelf.backends.hf import HFBackend
from lorashelf.tasks import ExampleSet, read_tasks

EXAMPLES = Path(__file__).parent.parent / "examples" / "fewshot"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True, help="a folder of PEFT folders, named after the tasks")
    parser.add_argument("--examples", type=Path, default=EXAMPLES, help="a folder of task folders")
    parser.add_argument("--base", help="the base model; default SmolLM2-135M-Instruct")
    options = parser.parse_args()
    backend = HFBackend.open(options.base, dtype="f32")
    failing = []
    print("| task | zero-shot | own | gain |")
    print("|---|---|---|---|")
    for name, task in read_tasks(options.examples).items():
        if not (options.zoo / name).is_dir():
            print(f"| {name} | – | no adapter | – |")
            continue
        examples = ExampleSet(name, task.prompt, tuple(e for split in task.splits.values() for e in split))
        pairs = [(None, examples), (read_adapter(options.zoo / name), examples)]
        zero, own = (mean_loss(losses) for losses in backend.nll(pairs))
        failing += [name] if own >= zero else []
        print(f"| {name} | {zero:.3f} | {own:.3f} | {zero - own:+.3f} |", flush=True)
    print(f"\nown adapter not better than zero-shot: {', '.join(failing) or 'none'}")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
