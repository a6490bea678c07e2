"""The writers' lock: after a fork, and where somebody deletes or replaces its file."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from factory import make_adapter, tree
from lorashelf import Shelf, new_settings, plan_add
from lorashelf.errors import ShelfLocked
from lorashelf.locks import WriterLock


def put(shelf: Shelf, name: str) -> None:
    with shelf.writing():
        shelf.commit(plan_add(shelf.snapshot(), make_adapter(len(name), rank=1, layers=1), name))


def in_a_child(act: Callable[[], None]) -> Callable[[], int]:
    """Do it in a forked child; waiting for it gives its exit code, 0 if it went well."""
    process = multiprocessing.get_context("fork").Process(target=act)
    process.start()

    def exit_code() -> int | None:
        process.join(60)
        return process.exitcode

    return exit_code


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    made = Shelf.create(tmp_path / "a.shelf", new_settings(2, policy="kmerge"))
    put(made, "before")
    return made


def test_a_shelf_that_was_used_before_a_fork_writes_in_parent_and_children(shelf: Shelf) -> None:
    def write_three(name: str) -> None:
        for number in range(3):
            put(shelf, f"{name}-{number}")

    children = [in_a_child(lambda name=name: write_three(name)) for name in "xyz"]
    write_three("parent")
    assert [exit_code() for exit_code in children] == [0, 0, 0]
    expected = {"before", *(f"{name}-{number}" for name in (*"xyz", "parent") for number in range(3))}
    assert shelf.snapshot().manifest.tasks.keys() == expected
    assert shelf.verify() == []


def test_a_child_does_not_write_while_its_parent_holds_the_lock(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorashelf.shelf.shelf.LOCK_SECONDS", 0.2)

    def refused() -> None:
        with pytest.raises(ShelfLocked, match="another writer holds this shelf"):
            put(shelf, "child")

    with shelf.writing():
        assert in_a_child(refused)() == 0
        put(shelf, "parent")  # and the parent has it still
        assert in_a_child(refused)() == 0
    assert shelf.snapshot().manifest.tasks.keys() == {"before", "parent"}


def test_a_child_forked_while_the_lock_was_held_leaves_it_to_the_parent(shelf: Shelf) -> None:
    with shelf.writing():
        child = os.fork() if hasattr(os, "fork") else None
        if child != 0:
            assert os.waitpid(child or 0, 0)[1] == 0
            words = [sys.executable, "-c", HELD, str(shelf.path / "lock")]
            assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "held\n"
    if child == 0:
        os._exit(0)  # it left the block, and with it must not have let the parent's lock go


HELD = """
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("held")
"""


def delete(lock: Path) -> None:
    lock.unlink()


def replace(lock: Path) -> None:
    lock.with_name("new").touch()
    lock.with_name("new").replace(lock)


@pytest.mark.parametrize("meddle", [delete, replace])
def test_a_writer_whose_lock_file_goes_does_not_commit_beside_the_next(
    shelf: Shelf, meddle: Callable[[Path], None]
) -> None:
    other = Shelf(shelf.path)
    with shelf.writing():
        plan = plan_add(shelf.snapshot(), make_adapter(1), "late")
        meddle(shelf.path / "lock")
        for attempt in (lambda: shelf.commit(plan), shelf.undo, shelf.gc):
            with pytest.raises(ShelfLocked, match="deleted or replaced"):
                attempt()
        thread = threading.Thread(target=put, args=(other, "next"))
        thread.start()
        thread.join(30)
        after = tree(shelf.path)
        with pytest.raises(ShelfLocked, match="deleted or replaced"):
            shelf.commit(plan)
        assert tree(shelf.path) == after
    put(shelf, "again")
    assert shelf.snapshot().manifest.tasks.keys() == {"before", "next", "again"}
    assert shelf.verify() == []


@pytest.mark.parametrize("meddle", [delete, replace])
def test_a_writer_whose_lock_file_goes_before_its_commit_leaves_what_the_next_has_written(
    shelf: Shelf, meddle: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one has written its object, and is about to replace HEAD."""
    staged = shelf.path / "tmp" / ".of-the-next"
    written = shelf.path / "objects" / f"b2-{0:064}"
    check, seen = WriterLock.check, []

    def meddled(lock: WriterLock) -> None:
        if len(seen) == 1:  # the second check stands before HEAD
            meddle(lock.path)
            written.mkdir()
            staged.mkdir()
        seen.append(lock)
        check(lock)

    monkeypatch.setattr(WriterLock, "check", meddled)
    head = shelf.snapshot().head
    with shelf.writing(), pytest.raises(ShelfLocked, match="deleted or replaced"):
        shelf.commit(plan_add(shelf.snapshot(), make_adapter(1), "late"))
    assert shelf.snapshot().head == head
    assert written.is_dir()
    assert staged.is_dir()


def test_a_lock_file_that_is_replaced_as_it_is_locked_is_locked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = WriterLock(tmp_path / "lock")
    fstat = os.fstat

    def replaced_meanwhile(descriptor: int) -> os.stat_result:
        if descriptor > 2 and fstat(descriptor).st_ino == (tmp_path / "lock").stat().st_ino:
            monkeypatch.undo()
            replace(tmp_path / "lock")
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", replaced_meanwhile)
    with lock.held(1):
        words = [sys.executable, "-c", HELD, str(tmp_path / "lock")]
        assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "held\n"
