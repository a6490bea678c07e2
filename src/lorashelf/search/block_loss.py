"""The loss of each task of a block with the block's merged adapter, measured once and kept in a journal.

The loss of (block, task) is a pure function of the adapters, the merge, the examples and the backend. Repeated
requests are answered from memory, and after an interrupt from the journal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..digest import Json
from ..errors import UsageError
from ..lora.adapter import Adapter
from ..lora.arrays import Cube
from ..models.protocol import Effects, Scores, mean_loss
from ..placement.d2c import Block
from ..result_store import ResultStore
from ..tasks.folders import ExampleSet

_MERGES_KEPT = 16
Key = tuple[tuple[str, ...], str]


class BlockLoss:
    """ℓ(block, task) = Σ NLL / Σ tokens of the task's examples with the block's merge, in nats per token; memoised.

    `asked` counts the losses requested, `measured` those that the backend measured; `known` holds all known losses.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        examples: Mapping[str, ExampleSet],
        backend: Scores,
        merge: Callable[[Sequence[str]], Adapter],
        *,
        settings: Mapping[str, Any] | None = None,
        journal: Path | None = None,
    ) -> None:
        """`merge` returns the adapter of a block of task names; `settings` is all that it depends on but the adapters.

        Raises UsageError if the journal belongs to another search, naming the differences; DiskError.
        """
        self.asked = self.measured = 0
        self.known: dict[Key, float] = {}
        self._adapters, self._examples, self._backend, self._merge = adapters, examples, backend, merge
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
        """Return the loss of each (block, task). Raises what the backend raises."""
        self.asked += len(pairs)
        keys = [self._key(block, task) for block, task in pairs]
        for key in keys:
            if key not in self.known and (kept := self._journal.get(_unit(key), _is_loss)) is not None:
                self.known[key] = kept
        missing = [key for key in dict.fromkeys(keys) if key not in self.known]
        for merged, tasks in _by_block(missing).items():
            for task, loss in self._measured(merged, tasks, self._examples):
                self.measured += 1
                self.known[merged, task] = loss
                self._journal.put(_unit((merged, task)), loss)
        return [self.known[key] for key in keys]

    def means(
        self, blocks: Iterable[Sequence[str]], held_out: Mapping[str, ExampleSet] | None = None
    ) -> tuple[float, float | None]:
        """Return the mean loss over the tasks of blocks, and that on other examples, which are not counted or kept.

        Works block by block, so that each is merged once. Raises what the backend raises.
        """
        own: list[float] = []
        others: list[float] = []
        for block in blocks:
            pairs = [(frozenset(block), task) for task in block]
            own += self(pairs)
            if held_out is not None:
                others += (loss for _, loss in self._measured(self._key(pairs[0][0], block[0])[0], block, held_out))
        return sum(own) / len(own), sum(others) / len(others) if others else None

    def grams(self) -> Cube | None:
        """Return what tasks, sorted by name, make of the adapters: `Effects` on their examples, (n, n, n); None if the
        backend does not show them. Raises what the backend raises.
        """
        if not isinstance(self._backend, Effects):
            return None
        xs = [self._adapters[task] for task in sorted(self._adapters)]
        return np.stack(list(self._backend.effects(xs, [self._examples[task] for task in sorted(self._adapters)])))

    def _measured(
        self, block: tuple[str, ...], tasks: Sequence[str], examples: Mapping[str, ExampleSet]
    ) -> Iterator[tuple[str, float]]:
        """Yield the losses of tasks with the merge of one block, so that the backend has one adapter at a time."""
        merged = self._merged(block)
        losses = self._backend.nll([(merged, examples[task]) for task in tasks])
        yield from zip(tasks, map(mean_loss, losses), strict=True)

    def _key(self, block: Block, task: str) -> Key:
        """Return the key of a loss, with one task per distinct adapter: copies are merged once."""
        return tuple(sorted({self._first[self._digests[t]] for t in block})), task

    def _merged(self, block: tuple[str, ...]) -> Adapter:
        found = self._merges.pop(block, None) or self._merge(block)
        self._merges[block] = found  # most recently used last
        if len(self._merges) > _MERGES_KEPT:
            del self._merges[next(iter(self._merges))]
        return found

    def _resume(self, path: Path) -> ResultStore:
        """Open the journal of this search, new or existing."""
        journal = ResultStore(path)
        before = journal.get({"what": "settings"}, lambda found: isinstance(found, dict))
        if before is None and journal.begun:
            what = "the journal does not record the settings of its search"
            raise UsageError(what, where=str(path), cure="delete it, or give another --journal")
        if before is None:
            journal.put({"what": "settings"}, self._settings)
            return journal
        now = json.loads(json.dumps(self._settings))
        differing = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if differing:
            what = f"the journal belongs to another search: {', '.join(differing)} differ"
            cure = "give the same settings, delete the journal, or give another --journal"
            raise UsageError(what, where=str(path), cure=cure)
        return journal


def _by_block(keys: Iterable[Key]) -> dict[tuple[str, ...], list[str]]:
    """Group the tasks of the distinct keys by block, in the order of the keys."""
    found: dict[tuple[str, ...], list[str]] = {}
    for block, task in dict.fromkeys(keys):
        found.setdefault(block, []).append(task)
    return found


def _is_loss(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _unit(key: Key) -> dict[str, Json]:
    return {"what": "loss", "block": list(key[0]), "task": key[1]}
