"""A commit that has not happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..formats.objects import Stored
from ..lora.adapter import Adapter
from .manifest import Manifest
from .slot import Facts, StoredObject


@dataclass(frozen=True, slots=True)
class Plan:
    """A commit that has not happened: the manifest to be (its new objects PENDING), and the adapters to write per slot.

    `report` is the document of the command that made it. A refused plan has the parent's content and commits
    nothing.
    """

    parent: str
    manifest: Manifest
    writes: Mapping[int, Adapter]
    report: Mapping[str, Any]
    refused: str | None = None
    shrinks: bool = False
    """Whether it may pass a budget that is exceeded already (remove)."""

    def sealed(self, written: Mapping[int, Stored], time: str) -> Manifest:
        """The manifest with the ids and sums of what was written, by slot, and the time filled in."""
        slots = tuple(
            replace(slot, object=_sealed(slot.object, written[slot.id])) if slot.id in written else slot
            for slot in self.manifest.slots
        )
        return replace(self.manifest, slots=slots, cause={**self.manifest.cause, "time": time})


def _sealed(planned: StoredObject, written: Stored) -> StoredObject:
    known = planned.facts
    facts = replace(known, sums=written.sums) if isinstance(known, Facts) else known
    return replace(planned, id=written.identity, facts=facts)
