"""What a block of tasks costs: the loss of each under the block's merge, measured once and kept in a journal.

The loss of (block, task) is a pure function of the adapters, the merge, the examples and the backend. A search that
asks for it again gets it from memory, and one that was interrupted from its journal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..lora.adapter import Adapter
from ..models.protocol import Scores, mean_loss
from ..placement.d2c import Block
from ..result_store import ResultStore
from ..tasks.folders import ExampleSet

_MERGES_KEPT = 16
Key = tuple[tuple[str, ...], str]


class BlockLoss:
    """ℓ(block, task) = Σ NLL / Σ tokens of the task's examples under the block's merge, in nats per token; memoised.

    `asked` counts the losses asked for, `measured` those that the backend had to measure; their memory is `known`.
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
        for merged, tasks in _by_block(missing).items():
            for task, loss in self._measured(merged, tasks, self._examples):
                self.measured += 1
                self.known[merged, task] = loss
                self._journal.put(_unit((merged, task)), loss)
        return [self.known[key] for key in keys]

    def means(
        self, blocks: Iterable[Sequence[str]], held_out: Mapping[str, ExampleSet] | None = None
    ) -> tuple[float, float | None]:
        """The mean loss over the tasks of blocks, and that on other examples, which are neither counted nor kept.

        Block by block, so that each is merged once. Raises what the backend raises.
        """
        own: list[float] = []
        others: list[float] = []
        for block in blocks:
            pairs = [(frozenset(block), task) for task in block]
            own += self(pairs)
            if held_out is not None:
                others += (loss for _, loss in self._measured(self._key(pairs[0][0], block[0])[0], block, held_out))
        return sum(own) / len(own), sum(others) / len(others) if others else None

    def _measured(
        self, block: tuple[str, ...], tasks: Sequence[str], examples: Mapping[str, ExampleSet]
    ) -> Iterator[tuple[str, float]]:
        """The losses of tasks under the merge of one block, the only adapter that the backend is given at a time."""
        merged = self._merged(block)
        losses = self._backend.nll([(merged, examples[task]) for task in tasks])
        yield from zip(tasks, map(mean_loss, losses), strict=True)

    def _key(self, block: Block, task: str) -> Key:
        """The block by one task an adapter: copies are merged once."""
        return tuple(sorted({self._first[self._digests[t]] for t in block})), task

    def _merged(self, block: tuple[str, ...]) -> Adapter:
        found = self._merges.pop(block, None) or self._merge(block)
        self._merges[block] = found  # the latest used stand last
        if len(self._merges) > _MERGES_KEPT:
            del self._merges[next(iter(self._merges))]
        return found

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


def _by_block(keys: Iterable[Key]) -> dict[tuple[str, ...], list[str]]:
    """The distinct keys' tasks by block, in the order of the keys."""
    found: dict[tuple[str, ...], list[str]] = {}
    for block, task in dict.fromkeys(keys):
        found.setdefault(block, []).append(task)
    return found


def _is_loss(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _unit(key: Key) -> dict[str, Any]:
    return {"what": "loss", "block": list(key[0]), "task": key[1]}
