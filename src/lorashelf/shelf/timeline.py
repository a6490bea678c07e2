"""Where undo and redo lead from a head: an editor's line of states, read off the manifests that are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .manifest import Manifest


@dataclass(frozen=True, slots=True)
class Timeline:
    """The state that a head has, and the states before and after it that can be reached, nearest first.

    A state is named by the manifest that first had its content, so moving to and fro makes no new names.
    """

    state: str
    undo: tuple[str, ...] = ()
    redo: tuple[str, ...] = ()

    def moved(self, state: str, keep: int) -> Timeline:
        """The line after a move to a kept state: along the line; if the state is not on it, as a change would."""
        states = (*reversed(self.undo), self.state, *self.redo)
        if state not in states:
            return Timeline(state, (self.state, *self.undo)[:keep])
        place = states.index(state)
        return Timeline(state, states[:place][::-1], states[place + 1 :])

    def within(self, kept: Mapping[str, Manifest], keep: int) -> Timeline:
        """What of the line is kept: no gaps, and `keep` states at most, those to undo first."""
        undo = _unbroken(self.undo, kept)[:keep]
        return Timeline(self.state, undo, _unbroken(self.redo, kept)[: keep - len(undo)])


def timeline(head: str, manifest: Manifest, kept: Mapping[str, Manifest], keep: int) -> Timeline:
    """The line at a head. An undo and a redo wrote it down; a change puts its own state after that of its parent."""
    changes: list[str] = []
    while manifest.state is None and manifest.parent and manifest.parent in kept and len(changes) < keep:
        changes.append(head)
        head, manifest = manifest.parent, kept[manifest.parent]
    state = manifest.state if manifest.state in kept else head  # a 0.1 may have deleted it: the head has its content
    line = Timeline(state or head, manifest.undo, manifest.redo)
    if changes:
        line = Timeline(changes[0], (*changes[1:], line.state, *line.undo))
    return line.within(kept, keep)


def _unbroken(states: tuple[str, ...], kept: Mapping[str, Manifest]) -> tuple[str, ...]:
    return states[: next((place for place, state in enumerate(states) if state not in kept), len(states))]
