"""Encodings of stored objects: an unknown one concerns its own tasks only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factory import make_adapter, write_peft
from lorashelf import Shelf, candidates, new_settings, plan_add, plan_remove, route
from lorashelf.digest import canonical_json
from lorashelf.errors import NewerFormat
from lorashelf.shelf.manifest import manifest_id
from lorashelf.shelf.repair import repair
from test_attacks import command


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """Three slots; what serves "later" was written by a lorashelf of the future."""
    shelf = Shelf.create(tmp_path / "s", new_settings(4, policy="kmerge"))
    for seed, task in enumerate(["now", "later", "also"]):
        shelf.commit(plan_add(shelf.snapshot(), make_adapter(seed), task))
    document = json.loads(shelf.snapshot().manifest.encode())
    document["slots"][1]["encoding"] = "holographic"
    data = canonical_json(document)
    (shelf.path / "manifests" / f"{manifest_id(data)}.json").write_bytes(data)
    (shelf.path / "HEAD").write_text(f"{manifest_id(data)}\n")
    return shelf


@pytest.mark.parametrize(
    "use",
    [
        lambda shelf: shelf.snapshot().adapter("later"),
        lambda shelf: route(shelf.snapshot(), "later"),
        lambda shelf: shelf.snapshot().average(shelf.snapshot().manifest.slot(1)),
    ],
)
def test_a_task_of_an_unknown_encoding_asks_for_a_newer_lorashelf(shelf: Shelf, use: Callable[[Shelf], Any]) -> None:
    with pytest.raises(NewerFormat, match=r"holographic.*tasks: later") as caught:
        use(shelf)
    assert caught.value.cure == "upgrade lorashelf"


def test_the_other_tasks_are_served_changed_and_undone(shelf: Shelf, tmp_path: Path) -> None:
    snapshot = shelf.snapshot()
    for task in ("now", "also"):
        assert snapshot.adapter(task).digest == snapshot.manifest.tasks[task]["digest"]
        assert command("route", shelf.path, task)[0] == 0
    code, listed = command("route", shelf.path, "--json")
    assert (code, json.loads(listed)["later"]["path"]) == (0, None)
    code, listed = command("ls", shelf.path, "--json")
    assert [slot["path"] is None for slot in json.loads(listed)["slots"]] == [False, True, False]
    write_peft(tmp_path / "new", make_adapter(7))
    assert command("add", shelf.path, tmp_path / "new")[0] == 0
    shelf.commit(plan_remove(shelf.snapshot(), "also"))
    shelf.undo()
    assert sorted(shelf.snapshot().manifest.tasks) == ["also", "later", "new", "now"]
    assert shelf.snapshot().manifest.slot(1).object.encoding == "holographic"


def test_no_fold_into_what_cannot_be_read_is_offered(shelf: Shelf) -> None:
    assert [each.action.slot for each in candidates(shelf.snapshot(), make_adapter(7), "new")] == [3, 0, 2]


def test_verify_names_what_it_cannot_check_and_repair_leaves_it(shelf: Shelf) -> None:
    (problem,) = shelf.verify()
    assert "slot 1 is not checked" in problem
    before = shelf.snapshot().manifest.slots
    assert repair(shelf)["slots"] == []
    assert shelf.snapshot().manifest.slots == before
