"""The shelf behind the server: commits of other processes are seen, and faults leave the last good state."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import LorashelfError, StaleShelf
from ..lora.adapter import Adapter
from ..serving.generate import Service, service
from ..shelf.shelf import Shelf
from ..shelf.snapshot import Snapshot

_logger = logging.getLogger("lorashelf")


class ServedShelf:
    """The last good state of a shelf. Needs no lock of the shelf; several threads may share it."""

    def __init__(self, path: str | Path) -> None:
        """Open the shelf. Raises as `Shelf` and `Shelf.snapshot`."""
        self._shelf = Shelf(path)
        self._snapshot = self._shelf.snapshot()
        self._services: dict[str, Service] = {}
        self._adapters: dict[str, Adapter | None] = {}
        self._lock = threading.Lock()
        self.fault: LorashelfError | None = None
        """Why the present state of the shelf cannot be read; None if it can."""

    @property
    def path(self) -> Path:
        """The shelf's folder."""
        return self._shelf.path

    @property
    def tasks(self) -> Mapping[str, Any]:
        """The tasks of the state that was served last."""
        return self._snapshot.manifest.tasks

    def snapshot(self) -> Snapshot:
        """Return the state that is served: the present one, or the last good one if that cannot be read."""
        with self._lock:
            if self.fault is not None or self._snapshot.stale:
                self._refresh()
            return self._snapshot

    def service(self, task: str) -> Service:
        """Return the service of a task, the same one until the shelf changes. Raises as `serving.generate.service`."""
        while True:
            snapshot = self.snapshot()
            if (known := self._services.get(task)) is not None:
                return known
            try:
                found = service(snapshot, task, prompted=False)
            except StaleShelf:
                continue
            with self._lock:
                slot, _ = snapshot.located(task)
                shared = self._adapters.setdefault(slot.object.id, found.adapter)
                found = replace(found, adapter=shared)
                if snapshot is self._snapshot:
                    self._services[task] = found
                return found

    def check(self) -> Snapshot:
        """Return the present state, read anew with the bytes of its slots. Raises what is wrong with it."""
        while True:
            with self._lock:
                self._refresh()
                if self.fault is not None:
                    raise self.fault
                snapshot = self._snapshot
            try:
                snapshot.check_bytes(*(slot for slot in snapshot.manifest.slots if slot.readable))
                return snapshot
            except StaleShelf:
                continue

    def _refresh(self) -> None:
        try:
            now = self._shelf.snapshot()
        except LorashelfError as error:
            if self.fault is None:
                _logger.warning("the last good state is served: %s", error)
            self.fault = error
            return
        self.fault = None
        if (now.head, now.settings) != (self._snapshot.head, self._snapshot.settings):
            self._snapshot = now
            self._services.clear()
            held = {slot.object.id for slot in now.manifest.slots}
            self._adapters = {name: adapter for name, adapter in self._adapters.items() if name in held}
