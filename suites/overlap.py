"""How much of the few-shot examples stands in other data?

    python suites/overlap.py --data DIR [--examples DIR]

DIR holds task folders. For every task: the longest run of words (of characters in zh, ja, ko) that an example, input or
output, shares with any line of the same language, all splits and references; case, punctuation, white space ignored.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path

from lorashelf.tasks.folders import Task, read_tasks

BY_CHARACTER = ("zh", "ja", "ko")


def units(text: str, language: str) -> list[str]:
    """Words, or characters, without case and punctuation."""
    text = re.sub(r"\b(question|context):", " ", text.lower())
    words = re.findall(r"\w+", text)
    return list("".join(words)) if language in BY_CHARACTER else words


def texts(task: Task) -> list[str]:
    """Every text of a task."""
    return [text for split in task.splits.values() for e in split for text in (e.input, e.output, *e.references)]


def longest(sequences: list[list[str]], others: list[list[str]]) -> tuple[int, list[str]]:
    """The longest common run, grown from the best length so far: (its length, the run)."""
    best: tuple[int, list[str]] = (0, [])
    while True:
        size = best[0] + 1
        known = {tuple(other[i : i + size]) for other in others for i in range(len(other) - size + 1)}
        found = next(
            (s[i : i + size] for s in sequences for i in range(len(s) - size + 1) if tuple(s[i : i + size]) in known),
            None,
        )
        if found is None:
            return best
        best = (size, found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--examples", type=Path, default=Path("examples/fewshot"))
    options = parser.parse_args()
    theirs: dict[str, list[list[str]]] = defaultdict(list)
    for task in read_tasks(options.data).values():
        theirs[task.language] += [units(text, task.language) for text in texts(task)]
    print("| task | longest common run | the run |\n|---|---|---|")
    for name, task in read_tasks(options.examples).items():
        length, run = longest([units(text, task.language) for text in texts(task)], theirs[task.language])
        joined = ("" if task.language in BY_CHARACTER else " ").join(run)
        unit = "characters" if task.language in BY_CHARACTER else "words"
        print(f"| {name} | {length} {unit} | {joined} |", flush=True)


if __name__ == "__main__":
    main()
