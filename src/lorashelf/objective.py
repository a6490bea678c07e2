"""What a block of tasks costs: the loss of each under the block's merge, measured once and kept in a journal.

The loss of (block, task) is a pure function of the adapters, the merge, the examples and the backend. A search that
asks for it again gets it from memory, and one that was interrupted from its journal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import atomic
from .adapter import Adapter
from .backend import LossBackend, mean_loss
from .d2c import Block
from .errors import UsageError
from .tasks import ExampleSet

_MERGES_KEPT = 16
Key = tuple[tuple[str, ...], str]


class Objective:
    """ℓ(block, task) = Σ NLL / Σ tokens of the task's examples under the block's merge, in nats a token; memoised.

    `asked` counts the losses asked for, `measured` those that the backend had to measure; their memory is `known`.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        examples: Mapping[str, ExampleSet],
        backend: LossBackend,
        merge: Callable[[Sequence[str]], Adapter],
        *,
        settings: Mapping[str, Any] | None = None,
        journal: Path | None = None,
    ) -> None:
        """`merge` gives the adapter of a block of task names; what it depends on beside the adapters is in `settings`.

        Raises UsageError if the journal is of another search, naming what differs; DiskError.
        """
        self.asked = self.measured = 0
        self.known: dict[Key, float] = {}
        self._examples, self._backend, self._merge = examples, backend, merge
        self._first = {x.digest: task for task, x in sorted(adapters.items(), reverse=True)}
        self._digests = {task: x.digest for task, x in adapters.items()}
        self._merges: dict[tuple[str, ...], Adapter] = {}
        self._journal, self._written = journal, 0
        self._settings = {
            **(settings or {}),
            "backend": backend.id,
            "adapters": dict(sorted(self._digests.items())),
            "examples": {task: examples[task].digest for task in sorted(adapters)},
        }
        if journal is not None:
            self._resume(journal)

    def __call__(self, pairs: Sequence[tuple[Block, str]]) -> list[float]:
        """The loss of each (block, task). Raises what the backend raises."""
        self.asked += len(pairs)
        keys = [self._key(block, task) for block, task in pairs]
        missing = [key for key in dict.fromkeys(keys) if key not in self.known]
        if missing:
            found = self._backend.nll([(self._merged(block), self._examples[task]) for block, task in missing])
            losses = [mean_loss(losses) for losses in found]
            self.measured += len(missing)
            self._record(missing, losses)
            self.known |= zip(missing, losses, strict=True)
        return [self.known[key] for key in keys]

    def _key(self, block: Block, task: str) -> Key:
        """The block by one task an adapter: copies are merged once."""
        return tuple(sorted({self._first[self._digests[t]] for t in block})), task

    def _merged(self, block: tuple[str, ...]) -> Adapter:
        if block not in self._merges:
            while len(self._merges) >= _MERGES_KEPT:
                del self._merges[next(iter(self._merges))]
            self._merges[block] = self._merge(block)
        return self._merges[block]

    # the journal: a line of settings, then a line a loss --------------------------------------------------------

    def _resume(self, path: Path) -> None:
        lines = _whole_lines(path)
        if not lines:
            self._append([{"settings": self._settings}])
            return
        try:
            settings, *losses = [json.loads(line) for line in lines]
            known = {(tuple(entry["block"]), entry["task"]): float(entry["loss"]) for entry in losses}
            before = settings["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                "the journal cannot be read", where=str(path), cure="delete it, or name another"
            ) from error
        differing = sorted(
            name
            for name in {*before, *self._settings}
            if before.get(name) != json.loads(json.dumps(self._settings.get(name)))
        )
        if differing:
            what = f"the journal is of another search: {', '.join(differing)} differ"
            raise UsageError(what, where=str(path), cure="give the same settings, or delete it, or name another")
        self.known, self._written = known, sum(map(len, lines))

    def _record(self, keys: Sequence[Key], losses: Sequence[float]) -> None:
        self._append([{"block": b, "task": t, "loss": loss} for (b, t), loss in zip(keys, losses, strict=True)])

    def _append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        if self._journal is None:
            return
        data = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()
        atomic.append(self._journal, data, keep=self._written)
        self._written += len(data)


def _whole_lines(path: Path) -> list[bytes]:
    with atomic.refusals(path, "read"):
        data = path.read_bytes() if path.exists() else b""
    return [line for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
