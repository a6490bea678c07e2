"""A commit that has not been made."""

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
    """A commit that has not been made: the next manifest (its new objects PENDING), and the adapter to write per slot.

    `report` is the document of the command that made the plan. A refused plan has the parent's content and commits
    nothing.
    """

    parent: str
    manifest: Manifest
    writes: Mapping[int, Adapter]
    report: Mapping[str, Any]
    refused: str | None = None
    shrinks: bool = False
    """Whether the plan may be committed over the budget (remove)."""

    def sealed(self, written: Mapping[int, Stored], time: str) -> Manifest:
        """Return the manifest with the time and, by slot, the ids and sums of the written objects."""
        slots = tuple(
            replace(slot, object=_sealed(slot.object, written[slot.id])) if slot.id in written else slot
            for slot in self.manifest.slots
        )
        return replace(self.manifest, slots=slots, cause={**self.manifest.cause, "time": time})


def _sealed(planned: StoredObject, written: Stored) -> StoredObject:
    known = planned.facts
    facts = replace(known, sums=written.sums) if isinstance(known, Facts) else known
    return replace(planned, id=written.identity, facts=facts)
