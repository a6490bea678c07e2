"""The model id `auto`: the task whose examples are most like the text, on the shelf as it is now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..models.protocol import Embeds
from ..serving.text_routing import Choice, Prototypes, choose, examples_on, prototypes
from ..shelf.snapshot import Snapshot
from ..tasks.folders import Task


class Auto:
    """Chooses tasks by text. Only the model's thread may use it."""

    def __init__(self, model: Embeds, tasks: Mapping[str, Task], cache: Path) -> None:
        self._model, self._tasks, self._cache = model, tasks, cache
        self._known: tuple[frozenset[str], Prototypes] | None = None

    def known(self, snapshot: Snapshot) -> Prototypes:
        """Return the prototypes of the tasks that are on the shelf and have examples. Raises UsageError if none."""
        names = frozenset(snapshot.manifest.tasks) & frozenset(self._tasks)
        if self._known is None or self._known[0] != names:
            self._known = names, prototypes(self._model, examples_on(snapshot, self._tasks), self._cache)
        return self._known[1]

    def choose(self, snapshot: Snapshot, text: str) -> Choice:
        """Return the choice for a text. Raises as `known`."""
        return choose(self._model, self.known(snapshot), snapshot, text)
