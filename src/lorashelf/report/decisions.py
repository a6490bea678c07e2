"""Where an adapter was put, and how it was coded, in one line: wordings from the longest to the shortest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..documents import ListedSlot
from ..documents.coded import Coded
from .numbers import score, size


def decision_lines(item: Mapping[str, Any]) -> list[str]:
    """Return the decision as one line, in wordings from the longest to the shortest."""
    if "coded" in item:
        return coded_lines(item)
    place = f"{item['task']}: {'opens' if item['decision'] == 'open' else 'folds into'} slot {item['slot']}"
    others = [member for member in item["members"] if member != item["task"]]
    best = score(max(item["scores"].values(), default=None))
    limit = f", threshold {score(item['threshold'])}" if item["threshold"] is not None else ""
    routed = "" if item["merged"] else ", whose average already includes it"
    if item.get("untrained"):
        routed = ", only routed"
    scores = f"{routed} (best score {best}{limit})" if item["scores"] else routed
    if not others:
        return [f"{place}{scores}", place]
    count = f" with {len(others)} others" if len(others) > 1 else f" with {others[0]}"
    return [f"{place} with {', '.join(others)}{scores}", f"{place}{count}{scores}", f"{place}{count}", place]


def rate_cells(coded: Coded | ListedSlot) -> tuple[str, str, str]:
    """Format the size of a coded object, its share of 16 bits and its predicted quality.

    >>> rate_cells({"bytes": 18432, "percent": 1.0, "predicted_quality": 0.954})
    ('18.4 kB', '1.00 %', '0.954')
    """
    kept = coded["predicted_quality"]
    return size(coded["bytes"]), f"{coded['percent']:.2f} %", "-" if kept is None else f"{kept:.3f}"


def coded_lines(item: Mapping[str, Any], done: str = "") -> list[str]:
    """Return how a task was coded on a shelf of bytes, after what was done, as one line, in wordings from the longest
    to the shortest.
    """
    taken, share, kept = rate_cells(item["coded"][item["task"]])
    others = [member for member in item["members"] if member != item["task"]]
    shared = f", shared with {', '.join(others)}" if others else ""
    coded = f"{item['task']}: {done}{taken} ({share} of 16 bits){shared}, predicted quality {kept}"
    if not item["coarser"]:
        return [coded]
    return [
        f"{coded}; coarser now: {', '.join(item['coarser'])}",
        f"{coded}; {len(item['coarser'])} coarser now",
        coded,
    ]
