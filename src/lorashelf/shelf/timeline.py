"""Where undo and redo lead from a head: a line of states as in an editor, derived from the kept manifests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .manifest import Manifest


@dataclass(frozen=True, slots=True)
class Timeline:
    """The state of a head, and the reachable states before and after it, nearest first.

    A state is named by the manifest that first had its content, so undo and redo make no new names.
    """

    state: str
    undo: tuple[str, ...] = ()
    redo: tuple[str, ...] = ()

    def moved(self, state: str, keep: int) -> Timeline:
        """Return the line after a move to a kept state: along the line, else as after a change."""
        states = (*reversed(self.undo), self.state, *self.redo)
        if state not in states:
            return Timeline(state, (self.state, *self.undo)[:keep])
        place = states.index(state)
        return Timeline(state, states[:place][::-1], states[place + 1 :])

    def within(self, kept: Mapping[str, Manifest], keep: int) -> Timeline:
        """Return the part of the line that is kept: without gaps, at most `keep` states, undo before redo."""
        undo = _unbroken(self.undo, kept)[:keep]
        return Timeline(self.state, undo, _unbroken(self.redo, kept)[: keep - len(undo)])


def timeline(head: str, manifest: Manifest, kept: Mapping[str, Manifest], keep: int) -> Timeline:
    """Return the line at a head. Undo and redo record the line; a change appends its state to that of its parent."""
    changes: list[str] = []
    while manifest.state is None and manifest.parent and manifest.parent in kept and len(changes) < keep:
        changes.append(head)
        head, manifest = manifest.parent, kept[manifest.parent]
    state = manifest.state if manifest.state in kept else head  # 0.1 may have deleted it: the head has its content
    line = Timeline(state or head, manifest.undo, manifest.redo)
    if changes:
        line = Timeline(changes[0], (*changes[1:], line.state, *line.undo))
    return line.within(kept, keep)


def _unbroken(states: tuple[str, ...], kept: Mapping[str, Manifest]) -> tuple[str, ...]:
    return states[: next((place for place, state in enumerate(states) if state not in kept), len(states))]
