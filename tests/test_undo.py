"""Undo and redo as in an editor, held against a model of one; and what stays readable meanwhile."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from crash.disk import in_memory
from crash.judge import must_stay
from factory import make_adapter, tree
from lorashelf import Adapter, Plan, Shelf, new_settings, plan_add, plan_remove, plan_update
from lorashelf.errors import CorruptShelf, NotReversible, OverBudget, UsageError
from lorashelf.shelf.manifest import Manifest
from manifests import as_format_1, forged, written

A, B, C, D, E = (make_adapter(seed, rank=2, layers=1) for seed in range(5))


def content(manifest: Manifest) -> Any:
    return manifest.tasks, manifest.slots, manifest.base, manifest.arrived


def objects(content: Any) -> set[str]:
    return {slot.object.id for slot in content[1]}


class Editor(RuleBasedStateMachine):
    """A shelf beside an editor's undo: the states before and after the present one, `keep` of them at most."""

    @initialize(keep=st.integers(0, 4))
    def start(self, keep: int) -> None:
        self.exits = contextlib.ExitStack()
        room = self.exits.enter_context(in_memory(Path(self.exits.enter_context(tempfile.TemporaryDirectory()))))
        self.keep = keep
        self.shelf = Shelf.create(room / "a.shelf", new_settings(2, keep=keep, policy="kmerge"))
        head = self.shelf.snapshot()
        self.past: list[str] = []
        self.now = head.head
        self.future: list[str] = []
        self.contents = {self.now: content(head.manifest)}
        self.state_of = {self.now: self.now}
        self.commits = 0
        self.promised: list[tuple[int, set[str]]] = [(0, set())]  # objects that are there for `keep` commits more
        self.arrived: dict[str, Adapter] = {}

    def teardown(self) -> None:
        if hasattr(self, "exits"):
            self.exits.close()

    def changed(self, plan: Plan) -> None:
        predicted = self.shelf.snapshot().at_rest(plan)
        head = self.shelf.commit(plan)
        snapshot = self.shelf.snapshot()
        assert snapshot.bytes == predicted
        self.contents[head] = content(snapshot.manifest)
        self.to_a_new_state(head, head)

    def to_a_new_state(self, state: str, head: str) -> None:
        """What a change does to the line, and an undo to a state that is not on it."""
        ended = self.future
        self.past, self.future = ([*self.past, self.now][-self.keep :] if self.keep else []), []
        self.arrive(state, head)
        self.promised += [(self.commits, objects(self.contents[each])) for each in ended]

    def arrive(self, state: str, head: str) -> None:
        self.now = self.state_of[head] = state
        self.commits += 1
        self.promised.append((self.commits, objects(self.contents[state])))

    def along(self, places: int, head: str) -> None:
        """So many places along the line: back if negative."""
        line = [*self.past, self.now, *self.future]
        place = len(self.past) + places
        self.past, self.future = line[:place], line[place + 1 :]
        self.arrive(line[place], head)

    @rule(seed=st.integers(0, 4))
    def add(self, seed: int) -> None:
        task, adapter = f"t{len(self.arrived)}", make_adapter(seed, rank=1, layers=1)
        self.arrived[task] = adapter
        self.changed(plan_add(self.shelf.snapshot(), adapter, task))

    @precondition(lambda self: self.contents[self.now][0])
    @rule(data=st.data(), exact=st.booleans())
    def remove(self, data: st.DataObject, exact: bool) -> None:
        task = data.draw(st.sampled_from(sorted(self.contents[self.now][0])))
        with contextlib.suppress(NotReversible):  # another adapter by now
            self.changed(plan_remove(self.shelf.snapshot(), task, self.arrived[task] if exact else None))

    @precondition(lambda self: self.contents[self.now][0])
    @rule(data=st.data(), seed=st.integers(5, 9))
    def update(self, data: st.DataObject, seed: int) -> None:
        task = data.draw(st.sampled_from(sorted(self.contents[self.now][0])))
        with contextlib.suppress(NotReversible, UsageError):  # another adapter by now, or the same again
            plan = plan_update(self.shelf.snapshot(), task, make_adapter(seed, rank=1, layers=1), self.arrived[task])
            self.changed(plan)

    @rule()
    def undo(self) -> None:
        if self.past:
            self.along(-1, self.shelf.undo())
        else:
            self.refused(self.shelf.undo)

    @rule()
    def redo(self) -> None:
        if self.future:
            self.along(1, self.shelf.redo())
        else:
            self.refused(self.shelf.redo)

    def refused(self, act: Callable[[], Any]) -> None:
        head = self.shelf.snapshot().head
        with pytest.raises(NotReversible):
            act()
        assert self.shelf.snapshot().head == head

    @rule(data=st.data())
    def undo_to(self, data: st.DataObject) -> None:
        kept = sorted(self.shelf.snapshot().kept, key=list(self.state_of).index)
        if not kept:
            return
        to = data.draw(st.sampled_from(kept))
        state = self.state_of[to]
        if state not in (*kept, self.shelf.snapshot().head):  # then the manifest that has its content names it
            self.contents[to] = self.contents[state]
            state = to
        if state == self.now:
            with pytest.raises(UsageError, match="is the current state of the shelf"):
                self.shelf.undo(to)
        elif state in self.past:
            self.along(self.past.index(state) - len(self.past), self.shelf.undo(to))
        elif state in self.future:
            self.along(self.future.index(state) + 1, self.shelf.undo(to))
        else:
            self.to_a_new_state(state, self.shelf.undo(to))

    @rule()
    def gc(self) -> None:
        assert self.shelf.gc() == []

    @invariant()
    def the_shelf_is_where_the_editor_is(self) -> None:
        if not hasattr(self, "shelf"):
            return
        snapshot = self.shelf.snapshot()
        line = snapshot.timeline
        assert content(snapshot.manifest) == self.contents[self.now]
        assert (line.undo, line.state, line.redo) == (tuple(self.past[::-1]), self.now, tuple(self.future))
        assert len(line.undo) + len(line.redo) <= self.keep
        assert {i: content(m) for i, m in snapshot.kept.items()} == {
            i: self.contents[self.state_of[i]] for i in snapshot.kept
        }

    @invariant()
    def what_was_promised_is_there_and_nothing_else(self) -> None:
        if not hasattr(self, "shelf"):
            return
        assert self.shelf.verify() == []
        held = {path.name for path in (self.shelf.path / "objects").iterdir()}
        promised = [stored for since, stored in self.promised if self.commits - since <= self.keep]
        reached = [objects(self.contents[state]) for state in (*self.past, self.now, *self.future)]
        assert held == set().union(*promised, *reached)
        assert {path.stem for path in (self.shelf.path / "manifests").iterdir()} == must_stay(
            self.shelf.path, self.keep
        )
        log = self.shelf.log()
        assert [entry["sequence"] for entry in log] == list(range(self.commits + 1))
        assert {e["id"]: e.get("to", e["id"]) for e in log} == self.state_of


TestEditor = Editor.TestCase
TestEditor.settings = settings(max_examples=30, stateful_step_count=25)


# a few states by name


def standing(path: Path, names: str = "abc", **options: Any) -> Shelf:
    """A shelf to which these tasks were added in order."""
    shelf = Shelf.create(path / "a.shelf", new_settings(2, policy="kmerge", **options))
    for name in names:
        put(shelf, name)
    return shelf


def put(shelf: Shelf, name: str) -> set[Path]:
    """Add a task; the folders that serve now."""
    shelf.commit(plan_add(shelf.snapshot(), make_adapter(ord(name), rank=2, layers=1), name))
    return folders(shelf)


def folders(shelf: Shelf) -> set[Path]:
    snapshot = shelf.snapshot()
    return {snapshot.slot_path(slot) for slot in snapshot.manifest.slots}


def tasks(manifest: Manifest) -> str:
    return "".join(sorted(manifest.tasks))


def line(shelf: Shelf) -> tuple[list[str], str, list[str]]:
    """The tasks of the states to undo, of the present one, of those to redo; in time."""
    snapshot = shelf.snapshot()
    before, after = ([tasks(snapshot.kept[i]) for i in ids] for ids in (snapshot.timeline.undo, snapshot.timeline.redo))
    return before[::-1], tasks(snapshot.manifest), after


def edited(shelf: Shelf, old: str, new: str) -> None:
    file = shelf.path / "shelf.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_as_many_undos_go_as_many_steps_back_and_redo_comes_back(tmp_path: Path) -> None:
    shelf = standing(tmp_path, "abc", keep=3)
    for _ in range(3):
        shelf.undo()
    assert line(shelf) == ([], "", ["a", "ab", "abc"])
    for _ in range(3):
        shelf.redo()
    assert line(shelf) == (["", "a", "ab"], "abc", [])
    operations = [(entry["operation"], entry.get("to")) for entry in shelf.log()]
    ids = [entry["id"] for entry in shelf.log()]
    assert operations[4:] == [("undo", ids[i]) for i in (2, 1, 0)] + [("redo", ids[i]) for i in (1, 2, 3)]
    assert shelf.verify() == []


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_line_that_a_change_ended_stays_readable_for_keep_commits_more(tmp_path: Path, keep: int) -> None:
    shelf = standing(tmp_path, "ab", keep=keep)
    left = folders(shelf)
    for _ in range(min(keep, 2)):
        shelf.undo()
    left -= put(shelf, "c")
    assert line(shelf)[2] == []
    for name in "defg"[:keep]:
        assert all((path / "adapter_model.safetensors").is_file() for path in left)
        assert left
        assert shelf.verify() == []
        put(shelf, name)
    put(shelf, "h")
    assert not any(path.exists() for path in left)


def test_an_ended_line_makes_room_where_the_bytes_are_short(tmp_path: Path) -> None:
    """A wrong add, its undo and the right add fit wherever two adds do."""
    roomy = standing(tmp_path / "roomy", "ab")
    put(roomy, "c")
    needed = roomy.snapshot().bytes
    shelf = standing(tmp_path, "ab", bytes=needed + 1000)  # for log lines and ids, not for an object
    shelf.undo()
    plan = plan_add(shelf.snapshot(), C, "c")
    assert plan.refused is None
    predicted = shelf.snapshot().at_rest(plan)
    shelf.commit(plan)
    assert shelf.snapshot().manifest.ended
    assert shelf.snapshot().bytes == predicted <= needed + 1000
    assert shelf.verify() == []


def test_undo_and_redo_are_never_refused_for_bytes(tmp_path: Path) -> None:
    shelf = standing(tmp_path, "abc", keep=2)
    edited(shelf, "# bytes: ", "bytes = 1  # ")
    shelf.undo()
    shelf.undo()
    assert line(shelf) == ([], "a", ["ab", "abc"])
    shelf.redo()
    shelf.redo()
    assert line(shelf) == (["a", "ab"], "abc", [])
    with pytest.raises(OverBudget):
        shelf.commit(replace(plan_remove(shelf.snapshot(), "a"), shrinks=False))


def test_keep_may_be_lowered_and_raised(tmp_path: Path) -> None:
    shelf = standing(tmp_path, "abcd", keep=4)
    shelf.undo()
    assert line(shelf) == (["", "a", "ab"], "abc", ["abcd"])
    edited(shelf, "keep = 4", "keep = 2")
    assert line(shelf) == (["a", "ab"], "abc", [])  # what can be undone goes first
    shelf.gc()
    edited(shelf, "keep = 2", "keep = 9")
    assert line(shelf)[:2] == (["a", "ab"], "abc")
    put(shelf, "e")
    assert line(shelf) == (["a", "ab", "abc"], "abce", [])
    for _ in range(3):
        shelf.undo()
    assert line(shelf) == ([], "a", ["ab", "abc", "abce"])
    edited(shelf, "keep = 9", "keep = 0")
    assert line(shelf) == ([], "a", [])
    for act in (shelf.undo, shelf.redo):
        with pytest.raises(NotReversible):
            act()
    put(shelf, "f")
    assert list(shelf.snapshot().kept) == []
    assert shelf.verify() == []


def test_undo_to_a_state_off_the_line_is_a_change_that_undo_takes_back(tmp_path: Path) -> None:
    shelf = standing(tmp_path, "ab", keep=2)
    wrong = shelf.snapshot().head
    shelf.undo()
    put(shelf, "c")
    shelf.undo(wrong[:20])
    assert line(shelf) == (["a", "ac"], "ab", [])
    shelf.undo()
    assert line(shelf) == (["a"], "ac", ["ab"])


def test_where_nothing_is_to_be_undone_or_redone_the_shelf_says_why_and_stays(tmp_path: Path) -> None:
    shelf = standing(tmp_path, "", keep=1)
    before = tree(shelf.path)
    with pytest.raises(NotReversible, match="there is nothing to undo"):
        shelf.undo()
    with pytest.raises(NotReversible, match="there is nothing to redo"):
        shelf.redo()
    assert {**tree(shelf.path), "lock": b""} == {**before, "lock": b""}
    put(shelf, "a")
    put(shelf, "b")
    shelf.undo()
    with pytest.raises(NotReversible, match="no earlier state is kept") as caught:
        shelf.undo()
    assert "keep" in str(caught.value.cure)


# a shelf that a 0.1 wrote on


def as_in_0_1(shelf: Shelf, keep: int = 1) -> None:
    """What `undo` of 0.1 did: the parent's content anew without a word on the line, then only `keep` parents stay."""
    as_format_1(shelf.path)
    head = (shelf.path / "HEAD").read_text().strip()
    paths = {path.stem: path for path in (shelf.path / "manifests").iterdir()}
    documents = {identity: json.loads(path.read_text()) for identity, path in paths.items()}
    parent = documents[head]["parent"]
    cause = {"operation": "undo", "to": parent, "time": "2026-01-01T00:00:00Z", "version": "0.1.0"}
    changes = {"parent": head, "sequence": documents[head]["sequence"] + 1, "cause": cause}
    unknown = {"state", "undo", "redo", "ended"}
    document = {key: value for key, value in {**documents[parent], **changes}.items() if key not in unknown}
    gone, identity, kept = [], head, [written(shelf.path, document).stem]
    while identity in documents:
        (kept if len(kept) <= keep else gone).append(identity)
        identity = documents[identity]["parent"]
    with (shelf.path / "log.jsonl").open("ab") as log:
        for identity in reversed(gone):
            entry = {"id": identity, "sequence": documents[identity]["sequence"], **documents[identity]["cause"]}
            log.write(json.dumps(entry).encode() + b"\n")
    for identity in paths.keys() - kept:
        paths[identity].unlink()
    reached = {
        slot["object"] for i in kept for slot in json.loads((shelf.path / f"manifests/{i}.json").read_text())["slots"]
    }
    for path in (shelf.path / "objects").iterdir():
        if path.name not in reached:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


def test_a_shelf_of_0_1_can_be_undone_as_far_as_its_parents_are_kept(tmp_path: Path) -> None:
    shelf = standing(tmp_path, "abc", keep=2)
    as_in_0_1(shelf, keep=2)
    assert line(shelf) == (["ab", "abc"], "ab", [])  # its undo is a change like any other
    assert shelf.verify() == []
    shelf.undo()
    shelf.undo()
    assert line(shelf) == ([], "ab", ["abc", "ab"])
    assert shelf.verify() == []


def test_what_0_1_deletes_of_the_line_cannot_be_reached_and_the_rest_goes_on(tmp_path: Path) -> None:
    shelf = standing(tmp_path, "abc", keep=2)
    shelf.undo()
    shelf.undo()
    as_in_0_1(shelf, keep=2)
    assert line(shelf) == (["a"], "ab", [])
    assert shelf.verify() == []
    assert [entry["sequence"] for entry in shelf.log()] == list(range(7))
    put(shelf, "d")
    assert line(shelf) == (["a", "ab"], "abd", [])
    shelf.undo()
    shelf.redo()
    assert line(shelf) == (["a", "ab"], "abd", [])
    assert shelf.verify() == []


@pytest.mark.parametrize(
    "keys",
    [
        {"state": 5},
        {"state": "HEAD"},
        {"undo": [], "redo": []},
        {"ended": ["../../x"]},
        {"ended": "b2-" + "0" * 64},
        {"state": "b2-" + "0" * 64, "undo": [7], "redo": []},
        {"state": "b2-" + "0" * 64, "undo": None, "redo": []},
    ],
    ids=str,
)
def test_keys_about_undo_that_cannot_be_are_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    shelf = standing(tmp_path, "a")
    forged(shelf.path, lambda document: document.update(arrived=7))
    assert shelf.snapshot().manifest.arrived == 7
    forged(shelf.path, lambda document: document.update(keys))
    with pytest.raises(CorruptShelf, match="not what lorashelf writes"):
        shelf.snapshot()
