"""What a block of tasks costs: the loss of each under the block's merge, measured once and kept in a journal.

The loss of (block, task) is a pure function of the adapters, the merge, the examples and the backend. A search that
asks for it again gets it from memory, and one that was interrupted from its journal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..lora.adapter import Adapter
from ..models.protocol import LossBackend, mean_loss
from ..placement.d2c import Block
from ..result_store import ResultStore
from ..tasks.folders import ExampleSet

_MERGES_KEPT = 16
Key = tuple[tuple[str, ...], str]


class BlockLoss:
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
        self._settings = {
            **(settings or {}),
            "backend": backend.id,
            "adapters": dict(sorted(self._digests.items())),
            "examples": {task: examples[task].digest for task in sorted(adapters)},
        }
        self._journal = ResultStore() if journal is None else self._resume(journal)

    def __call__(self, pairs: Sequence[tuple[Block, str]]) -> list[float]:
        """The loss of each (block, task). Raises what the backend raises."""
        self.asked += len(pairs)
        keys = [self._key(block, task) for block, task in pairs]
        for key in keys:
            if key not in self.known and (kept := self._journal.get(_unit(key), _is_loss)) is not None:
                self.known[key] = kept
        missing = [key for key in dict.fromkeys(keys) if key not in self.known]
        if missing:
            found = self._backend.nll([(self._merged(block), self._examples[task]) for block, task in missing])
            self.measured += len(missing)
            for key, losses in zip(missing, found, strict=True):
                self.known[key] = mean_loss(losses)
                self._journal.put(_unit(key), self.known[key])
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

    def _resume(self, path: Path) -> ResultStore:
        """The journal of this very search, new or from before."""
        journal = ResultStore(path)
        before = journal.get({"what": "settings"}, lambda found: isinstance(found, dict))
        if before is None and journal.begun:
            what = "the journal cannot be read: it does not say which search it is of"
            raise UsageError(what, where=str(path), cure="delete it, or name another")
        if before is None:
            journal.put({"what": "settings"}, self._settings)
            return journal
        now = json.loads(json.dumps(self._settings))
        differing = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if differing:
            what = f"the journal is of another search: {', '.join(differing)} differ"
            raise UsageError(what, where=str(path), cure="give the same settings, or delete it, or name another")
        return journal


def _is_loss(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _unit(key: Key) -> dict[str, Any]:
    return {"what": "loss", "block": list(key[0]), "task": key[1]}
