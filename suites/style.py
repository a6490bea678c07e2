"""What does a shared slot keep of a style? Loss and marks of the e-mails in examples/teach, by who shares the slot.

    python suites/style.py --adapter DIR [--zoo examples/zoo] [--partners qa-en,sum-de,…]

DIR is the adapter of the style, as the README's `lorashelf train … -o trained` makes it (trained/my-email). A row is a
slot: nobody, the adapter alone, the adapter with one partner of the zoo (`linear`, as a shelf folds), and the slot it
lands in on a K-Merge++ shelf of five that holds the whole zoo. Loss in nats a token on the four validation e-mails,
and on the partner's own few-shot validation examples, with that of its own adapter in brackets. Greeting and sign-off:
in how many of five answers they stand.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from lorashelf import Adapter, Shelf, merge, new_settings, open_model, plan_add, read_adapter
from lorashelf.models.protocol import mean_loss
from lorashelf.tasks.folders import ExampleSet, read_task

TEACH = Path("examples/teach/my-email")
FEWSHOT = Path("examples/fewshot")
NOTE = "to Jo: lunch moved to one, same place, bring Kim"
GREETING, SIGN_OFF = "Ahoy ", "\n\nFair winds,\nRobin"


def whole_zoo(zoo: Path, style: Adapter) -> tuple[str, Adapter]:
    """Members and content of the slot that the style lands in, last of all, on a shelf of five."""
    with tempfile.TemporaryDirectory() as folder:
        shelf = Shelf.create(Path(folder) / "a.shelf", new_settings(5))
        for path in sorted(path for path in zoo.iterdir() if (path / "adapter_config.json").exists()):
            shelf.commit(plan_add(shelf.snapshot(), read_adapter(path), path.name))
        plan = plan_add(shelf.snapshot(), style, "my-email")
        slot = plan.manifest.slot_of("my-email")
        if slot is None:
            raise SystemExit("the style was refused")
        others = [task for task in slot.members if task != "my-email"]
        return f"{len(others)} others ({', '.join(others)})", shelf.snapshot().after(plan).adapter("my-email")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--zoo", type=Path, default=Path("examples/zoo"))
    parser.add_argument("--partners", default="gec-it,reply-fr,sum-de,qa-en,tone-es")
    options = parser.parse_args()
    backend, task, style = open_model(dtype="f32"), read_task(TEACH), read_adapter(options.adapter)
    emails = task.examples("validation")
    texts = [NOTE, *(example.input for example in emails.examples)]

    def loss(adapter: Adapter | None, examples: ExampleSet) -> float:
        return mean_loss(backend.nll([(adapter, examples)])[0])

    def row(name: str, adapter: Adapter | None, partner: str = "") -> None:
        answers = backend.answers(adapter, task.prompt, texts, max_new_tokens=task.max_new_tokens)
        greeting = sum(answer.startswith(GREETING) for answer in answers)
        signed = sum(answer.endswith(SIGN_OFF) for answer in answers)
        beside = ""
        if partner:
            examples = read_task(FEWSHOT / partner).examples("validation")
            beside = f"{loss(adapter, examples):.3f} ({loss(read_adapter(options.zoo / partner), examples):.3f})"
        print(f"| {name} | {loss(adapter, emails):.3f} | {greeting}/5 | {signed}/5 | {beside} |", flush=True)

    print("| the slot is shared with | loss | greeting | sign-off | loss of the partner's task (own) |")
    print("|---|---|---|---|---|")
    row("(the bare base)", None)
    row("nobody", style)
    for partner in options.partners.split(","):
        row(partner, merge([read_adapter(options.zoo / partner), style], method="linear"), partner)
    row(*whole_zoo(options.zoo, style))


if __name__ == "__main__":
    main()
