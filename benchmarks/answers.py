"""Losses and answers of the tasks that one adapter serves, against PEFT's `generate`, a batch a task.

    python benchmarks/answers.py

SmolLM2-135M-Instruct in float32 with an adapter of examples/zoo; eight tasks of examples/fewshot with all their
examples. PEFT reads and answers the examples of a task as one batch, padded on the left. All answers are compared.
"""

from __future__ import annotations

import copy
import itertools
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from common import interleaved, paired, spread, timed, times

ROOT = Path(__file__).parent.parent
ADAPTER = ROOT / "examples" / "zoo" / "tone-en"
TASKS = [f"{kind}-{language}" for kind in ("gec", "qa", "sum", "tone") for language in ("en", "ja")]


def main() -> int:
    options = common.arguments(__doc__).parse_args()
    rounds = options.rounds or 3
    common.heading("Losses and answers of one adapter's tasks", options.threads, ["torch", "transformers", "peft"])
    import torch

    from lorashelf import HFBackend, read_adapter, read_tasks
    from lorashelf.models.protocol import Question
    from lorashelf.tasks.folders import ExampleSet

    torch.set_num_threads(options.threads)
    backend, adapter = HFBackend.open(device="cpu", dtype="f32"), read_adapter(ADAPTER)
    tasks = {name: task for name, task in read_tasks(ROOT / "examples" / "fewshot").items() if name in TASKS}
    asked = [
        (ExampleSet(name, task.prompt, tuple(e for some in task.splits.values() for e in some)), task.max_new_tokens)
        for name, task in tasks.items()
    ]
    questions = [Question(some.instruction, e.input, most) for some, most in asked for e in some.examples]
    peft = _peft_model(backend)
    sides = {
        "PEFT, a batch a task": lambda: timed(lambda: _by_peft(peft, backend, questions)),
        "answered": lambda: timed(lambda: backend.answered(adapter, questions)),
        "nll": lambda: timed(lambda: backend.nll([(adapter, some) for some, _ in asked])),
        "losses_and_answers": lambda: timed(lambda: backend.losses_and_answers(adapter, asked)),
    }
    found = interleaved(sides, rounds)
    wall = {name: [seconds for seconds, _ in runs] for name, runs in found.items()}
    theirs, ours, losses, both = (runs[0][1] for runs in found.values())
    agree = sum(a == b for a, b in zip(theirs, ours, strict=True))
    once = [text for _, texts in both for text in texts]
    assert [mine for mine, _ in both] == losses
    apart = [a + b for a, b in zip(wall["answered"], wall["nll"], strict=True)]
    common.table(["", "wall min", "median"], [[name, *spread(values)] for name, values in wall.items()])
    print(f"{len(tasks)} tasks, {len(questions)} questions; {agree} answers equal PEFT's, ", end="")
    print(f"{sum(a == b for a, b in zip(once, ours, strict=True))} with losses equal those without")
    faster, at_once = paired(wall["PEFT, a batch a task"], wall["answered"]), paired(apart, wall["losses_and_answers"])
    print(f"median of {rounds} rounds: answers {times(faster)} as fast as PEFT's; ", end="")
    print(f"losses and answers at once {times(at_once)} as fast as apart\n")
    return common.verdicts(
        [
            ("answers, times as fast as PEFT", faster, ">=", 1),
            ("losses and answers at once, times as fast as apart", at_once, ">=", 1.2),
            ("share of answers equal to PEFT's", agree / len(questions), ">=", 0.95),
        ],
        options.threads,
    )


def _peft_model(backend: Any) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(backend.base.model), str(ADAPTER)).eval()


def _by_peft(model: Any, backend: Any, questions: Sequence[Any]) -> list[str]:
    """Answer the questions of one instruction and length at a time."""
    import torch

    from lorashelf.models.batching import padded

    answers = []
    for (instruction, most), some in itertools.groupby(questions, key=lambda asked: (asked.instruction, asked[2])):
        queries = [backend.text.query(instruction, asked.text) for asked in some]
        ids, mask = padded(queries, backend.text.pad, torch.device("cpu"), left=True)
        with torch.inference_mode():
            rows = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=most,
                eos_token_id=backend.text.stops,
                pad_token_id=backend.text.pad,
            )[:, ids.shape[1] :]
        answers += [backend.text.decoded(row) for row in rows.tolist()]
    return answers


if __name__ == "__main__":
    sys.exit(main())
