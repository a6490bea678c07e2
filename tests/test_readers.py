"""Readers take no lock: a commit that lands while they read is met by the new head, never taken for damage."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factory import make_adapter
from lorashelf import Shelf, new_settings, plan_add, plan_update
from lorashelf.errors import CorruptShelf, StaleShelf
from lorashelf.formats import peft
from lorashelf.serving.generate import service
from lorashelf.shelf import routing
from lorashelf.shelf.folder import ShelfFolder
from lorashelf.shelf.log import Log
from lorashelf.shelf.snapshot import Snapshot


def adapter(seed: int) -> Any:
    return make_adapter(seed, rank=2, layers=1)


def standing(path: Path, keep: int = 0) -> Shelf:
    shelf = Shelf.create(path / "a.shelf", new_settings(2, policy="kmerge", keep=keep))
    for seed, task in enumerate("ab"):
        shelf.commit(plan_add(shelf.snapshot(), adapter(seed), task, details={"prompt": "Do."}))
    return shelf


def rewrite(shelf: Shelf, seeds: tuple[int, ...]) -> None:
    """Every object replaced, once for each seed."""
    writer = Shelf(shelf.path)
    for seed in seeds:
        for task in "ab":
            writer.commit(plan_update(writer.snapshot(), task, adapter(seed if task == "a" else -seed % 1000)))


def at_first(monkeypatch: pytest.MonkeyPatch, place: tuple[type, str], act: Callable[[], Any]) -> None:
    """Do something as a method is called for the first time, before what it does."""
    original = getattr(*place)

    def meanwhile(self: Any, *arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        act()
        return original(self, *arguments, **options)

    monkeypatch.setattr(*place, meanwhile)


PLACES = [(Shelf, "_snapshot"), (ShelfFolder, "manifest"), (Snapshot, "problems"), (Snapshot, "slot_path")]


@pytest.mark.parametrize("commits", [1, 3])
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("place", [*PLACES, "log"], ids=str)
def test_verify_finds_a_sound_shelf_sound_whatever_is_committed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, keep: int, commits: int
) -> None:
    shelf = standing(tmp_path, keep)
    where = (Log, "records") if place == "log" else place
    at_first(monkeypatch, where, lambda: rewrite(shelf, tuple(range(10, 10 + commits))))
    assert shelf.verify() == []


def test_verify_sees_damage_that_a_commit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = standing(tmp_path)
    other = Shelf(shelf.path)
    arriving = plan_update(other.snapshot(), "a", adapter(9))
    damaged = shelf.snapshot().manifest.slots[1]
    file = shelf.snapshot().slot_path(damaged) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x77")
    at_first(monkeypatch, (Snapshot, "problems"), lambda: other.commit(arriving))
    (problem,) = shelf.verify()
    assert damaged.object.id in problem


READERS: dict[str, Callable[[Snapshot], Any]] = {
    "ls": routing.listing,
    "route": lambda snapshot: routing.route(snapshot, "a"),
    "routes": routing.routes,
    "generate": lambda snapshot: service(snapshot, "a").adapter.modules["model.layers.0.self_attn.q_proj"].a.sum(),
    "plan": lambda snapshot: plan_add(snapshot, adapter(7), "new"),
    "check": lambda snapshot: snapshot.check_bytes(*snapshot.manifest.slots),
}


@pytest.mark.parametrize("place", [(Shelf, "_snapshot"), (ShelfFolder, "manifest"), (Snapshot, "slot_path")], ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_answers_from_the_new_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, place: Any
) -> None:
    shelf = standing(tmp_path)
    at_first(monkeypatch, place, lambda: rewrite(shelf, (10,)))
    answer = shelf.read(READERS[reader])
    if reader == "route":
        assert Path(answer["path"]).parent == shelf.path.absolute() / "objects"
    if reader == "ls":
        assert answer["adapter_bytes"] == routing.listing(shelf.snapshot())["adapter_bytes"]


@pytest.mark.parametrize("reader", ["generate", "plan", "check"])
def test_a_snapshot_whose_files_are_gone_is_stale_not_corrupt(tmp_path: Path, reader: str) -> None:
    shelf = standing(tmp_path)
    snapshot = shelf.snapshot()
    planned = snapshot.after(plan_add(snapshot, adapter(5), "new"))
    rewrite(shelf, (10,))
    for each in (snapshot, planned):
        with pytest.raises(StaleShelf, match="the shelf changed while it was read"):
            each.stored(next(slot for slot in each.manifest.slots if slot.id not in each.pending))
    with pytest.raises(StaleShelf):
        READERS[reader](snapshot)
    gone = shelf.snapshot()
    for slot in gone.manifest.slots:
        (gone.slot_path(slot) / "adapter_model.safetensors").unlink()
    with pytest.raises(CorruptShelf):
        gone.stored(gone.manifest.slots[0])
    with pytest.raises(CorruptShelf):
        shelf.read(lambda present: present.stored(present.manifest.slots[0]))


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
import test_readers
from lorashelf import Shelf
print("writing", flush=True)
for seed in range(2, 1000):
    test_readers.rewrite(Shelf(sys.argv[1]), (seed,))
"""


@pytest.mark.parametrize("keep", [0, 1])
def test_while_another_process_commits_without_a_pause_every_reader_is_answered(tmp_path: Path, keep: int) -> None:
    shelf = standing(tmp_path, keep)
    words = [sys.executable, "-c", WRITER, str(shelf.path), str(Path(__file__).parent)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
            first, deadline, rounds = shelf.snapshot().manifest.sequence, time.monotonic() + 60, 0
            while (rounds < 20 or shelf.snapshot().manifest.sequence < first + 20) and time.monotonic() < deadline:
                assert shelf.verify() == []
                for reader in READERS.values():
                    shelf.read(reader)
                numbers = [entry["sequence"] for entry in shelf.log()]
                assert numbers == list(range(len(numbers)))
                rounds += 1
            assert rounds >= 20
            assert writer.poll() is None
        finally:
            writer.kill()
    assert shelf.verify() == []


def test_a_config_that_a_commit_deletes_while_it_is_read_is_a_stale_shelf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two reads of a stored config."""
    shelf = standing(tmp_path)
    snapshot = shelf.snapshot()
    slot = snapshot.manifest.slots[0]

    def gone(folder: Path) -> int:
        monkeypatch.setattr(peft, "_config_sum", original)
        for seed in (7, 8, 9):
            shelf.commit(plan_update(shelf.snapshot(), slot.members[0], adapter(seed)))
        return original(folder)

    original = peft._config_sum
    monkeypatch.setattr(peft, "_config_sum", gone)
    with pytest.raises(StaleShelf):
        snapshot.stored(slot)
