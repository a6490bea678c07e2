"""Whether adapters fit a base: their sizes must, their base's name should."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from ..errors import Fault, ShapeMismatch
from ..lora.adapter import Adapter, BaseId

_logger = logging.getLogger("lorashelf")


def check_all(base: str, adapters: Mapping[str, Adapter], faults: Callable[[Adapter], Sequence[Fault]]) -> None:
    """Raise ShapeMismatch naming every adapter that has faults on a base, equal ones together; warn if only names
    differ.
    """
    alike: dict[Fault, list[str]] = {}
    for name, adapter in adapters.items():
        for fault in faults(adapter):
            alike.setdefault(fault, []).append(name)
    if alike:
        found = [fault.at(_first_of(names, "adapters")) for fault, names in alike.items()]
        raise ShapeMismatch(found, where=f"base {base}")
    others = sorted({str(x.base) for x in adapters.values() if x.base.contradicts(BaseId(base))})
    if others:
        _logger.warning("the base is %s; the adapters name %s (the sizes fit)", base, ", ".join(others))


def _first_of(names: Sequence[str], noun: str) -> str:
    """Return the first name and the number of others."""
    return names[0] + (f" and {len(names) - 1} more {noun}" if len(names) > 1 else "")
