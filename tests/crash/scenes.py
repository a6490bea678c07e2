"""The operations that are crashed: what stands before, what is done, and whose arrival follows.

The clock stands still, so the heads before and after an operation are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from factory import make_adapter
from lorashelf import (
    Adapter,
    Shelf,
    cluster,
    new_settings,
    plan_add,
    plan_cluster,
    plan_remove,
    plan_set,
    plan_update,
    write_adapter,
)
from manifests import as_format_1

A, B, C, D, E = (make_adapter(seed, rank=2, layers=1) for seed in range(5))
SHELF = "a.shelf"


def clock() -> datetime:
    return datetime(2026, 1, 1, tzinfo=timezone.utc)


def add(shelf: Shelf, adapters: Mapping[str, Adapter]) -> None:
    for task, adapter in adapters.items():
        shelf.commit(plan_add(shelf.snapshot(), adapter, task))


@dataclass(frozen=True)
class Scene:
    """`act` on the shelf that `prepare` made; without `prepare`, `act` makes the target. `later` is added then."""

    act: Callable[[Path], Any]
    prepare: Callable[[Path], Any] | None = None
    target: str = SHELF
    later: Adapter = E

    def setup(self, root: Path) -> Path:
        root.mkdir()
        if self.prepare:
            self.prepare(root / SHELF)
        return root

    def run(self, root: Path) -> None:
        self.act(root / self.target)


def standing(slots: int = 2, keep: int = 1, **adapters: Adapter) -> Callable[[Path], Shelf]:
    """A shelf with these adapters added in order."""

    def prepare(path: Path) -> Shelf:
        shelf = Shelf.create(path, new_settings(slots, keep=keep, policy="kmerge"), clock)
        add(shelf, adapters)
        return shelf

    return prepare


def arriving(**adapters: Adapter) -> Callable[[Path], None]:
    return lambda path: add(Shelf(path, clock), adapters)


def planned(planner: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[Path], str]:
    """Commit what a planner plans from the present snapshot."""
    return lambda path: Shelf(path, clock).commit(planner(Shelf(path, clock).snapshot(), *arguments, **options))


def left_by_a_removal(path: Path) -> None:
    shelf = standing(slots=3, a=A, b=B)(path)
    shelf.commit(plan_remove(shelf.snapshot(), "a"))


def full_of_garbage(path: Path) -> None:
    """States beyond `keep`, an object and a manifest that nothing reaches, and what a killed writer left in tmp/."""
    standing(keep=4, a=A, b=B, c=C, d=D)(path)
    text = (path / "shelf.toml").read_text()
    (path / "shelf.toml").write_text(text.replace("keep = 4", "keep = 1"))
    write_adapter(E, path / "objects" / f"b2-{0:064}")
    (path / "manifests" / f"b2-{0:064}.json").write_text("{}")
    (path / "tmp" / ".left").mkdir()
    (path / "tmp" / ".left" / "adapter_config.json").write_text("{")


def left_by_an_undo(path: Path, keep: int = 1) -> None:
    standing(keep=keep, a=A, b=B)(path).undo()


def left_by_an_undo_of_two(path: Path) -> None:
    left_by_an_undo(path, keep=2)


def to_an_ended_line(path: Path) -> str:
    """Undo --to a state that a change made unreachable for redo."""
    shelf = Shelf(path, clock)
    (ended,) = shelf.snapshot().manifest.ended
    return shelf.undo(ended)


def changed_after_an_undo(path: Path) -> None:
    shelf = standing(a=A, b=B)(path)
    shelf.undo()
    add(shelf, {"c": C})


def make_cluster(path: Path) -> None:
    named = {"a": A, "b": B, "c": C}
    found = cluster(named, 2, method="random")
    Shelf.create_with(path, new_settings(2), lambda snapshot: plan_cluster(snapshot, named, found), clock)


def of_format_1(path: Path) -> None:
    as_format_1(standing(a=A, b=B, c=C)(path).path)
    (path / "pages").mkdir()  # an empty folder, which any writer makes first, is not what these tests are about


def many_levels(path: Path) -> None:
    """Two coded objects on a shelf of bytes that has room for a third one if they get coarser."""
    shelf = Shelf.create(path, new_settings(None, bytes=7_000, floor=0.5), clock)
    add(shelf, {"a": A, "b": B})


def make_empty(path: Path) -> None:
    Shelf.create(path, new_settings(2, policy="kmerge"), clock)


SCENES = {
    "init": Scene(make_empty),
    "init in new folders": Scene(make_empty, target=f"new/deep/{SHELF}"),
    "cluster": Scene(make_cluster),
    "write_adapter": Scene(lambda path: write_adapter(A, path), target="adapter"),
    "the first add": Scene(arriving(a=A), standing()),
    "an add that opens": Scene(arriving(b=B), standing(a=A)),
    "an add that folds": Scene(arriving(c=C), standing(a=A, b=B)),
    "an add that retires": Scene(arriving(d=D), standing(a=A, b=B, c=C)),
    "an add that deletes what comes back": Scene(arriving(c=C), left_by_a_removal, later=A),
    "update": Scene(planned(plan_update, "b", C), standing(a=A, b=B)),
    "update in a shared slot": Scene(planned(plan_update, "b", C, B), standing(slots=1, a=A, b=B)),
    "remove frees a slot": Scene(planned(plan_remove, "a"), standing(a=A, b=B), later=A),
    "remove from the average": Scene(planned(plan_remove, "b", B), standing(slots=1, a=A, b=B)),
    "undo": Scene(lambda path: Shelf(path, clock).undo(), standing(a=A, b=B)),
    "redo": Scene(lambda path: Shelf(path, clock).redo(), left_by_an_undo),
    "a second undo": Scene(lambda path: Shelf(path, clock).undo(), left_by_an_undo_of_two),
    "an add that ends what can be redone": Scene(arriving(d=D), left_by_an_undo),
    "undo to a state off the line": Scene(to_an_ended_line, changed_after_an_undo),
    "set a prompt": Scene(planned(plan_set, "a", {"prompt": "Answer."}), standing(a=A, b=B)),
    "an add to a shelf of format 1": Scene(arriving(d=D), of_format_1),
    "an add that makes stored objects coarser": Scene(arriving(c=C), many_levels),
    "set keep": Scene(lambda path: Shelf(path, clock).configure({"keep": 1}), standing(keep=3, a=A, b=B, c=C, d=D)),
    "gc": Scene(lambda path: Shelf(path, clock).gc(), full_of_garbage),
}

LONG = (
    "cluster",
    "an add that retires",
    "an add that deletes what comes back",
    "update in a shared slot",
    "remove from the average",
    "an add that ends what can be redone",
    "an add to a shelf of format 1",
    "an add that makes stored objects coarser",
)
"""Scenes of many calls: their tests take long."""
