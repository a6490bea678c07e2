"""`lorashelf set`: what is stored with a task, and the settings in shelf.toml."""

from __future__ import annotations

from pathlib import Path

import pytest

from command import Command
from factory import make_adapter, tree
from lorashelf import Shelf, new_settings, plan_add, plan_set
from lorashelf.errors import ShelfConfigError, UnknownName, UsageError


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """Three tasks in two slots, and a shelf.toml with a person's remarks."""
    made = Shelf.create(tmp_path / "a.shelf", new_settings(3, policy="kmerge", keep=2))
    for seed, task in enumerate(("qa-de", "qa-en")):
        made.commit(plan_add(made.snapshot(), make_adapter(seed, rank=2, layers=1), task))
    file = made.path / "shelf.toml"
    text = file.read_text().replace("slots = 3", "slots = 3   # the phone's").replace("[recipe]", "# how\n[recipe]")
    file.write_text(text + "\n# the end\n")
    return made


# fields of a task


def test_what_is_stored_with_a_task_is_changed_by_a_commit_that_undo_takes_back(
    shelf: Shelf, run: Command, tmp_path: Path
) -> None:
    (tmp_path / "task.toml").write_text('prompt = "Answer."\nlanguage = "de"\nmax_new_tokens = 12\n')
    words = ["--task-file", tmp_path / "task.toml", "--prompt", "Antworte.", "--type", "answers", "--metric", "f1"]
    before = shelf.snapshot()
    code, document = run("set", shelf.path, "qa-de", *words)
    assert code == 0
    stored = {"prompt": "Antworte.", "language": "de", "max_new_tokens": 12, "type": "answers", "metric": "f1"}
    assert document["changed"] == stored
    after = shelf.snapshot()
    assert after.head == document["head"]
    assert after.manifest.parent == before.head
    assert after.manifest.tasks["qa-de"] == {**stored, "digest": before.manifest.tasks["qa-de"]["digest"]}
    assert after.manifest.tasks["qa-en"] == before.manifest.tasks["qa-en"]
    assert [slot.object for slot in after.manifest.slots] == [slot.object for slot in before.manifest.slots]
    assert {m.task: m.type for slot in after.manifest.slots for m in slot.history.merged} == {
        "qa-de": "answers",
        "qa-en": "qa",
    }
    assert after.manifest.cause["operation"] == "set"
    assert shelf.verify() == []
    document = run("undo", shelf.path)[1]
    assert (document["changed"], document["left"], document["returned"]) == (["qa-de"], [], [])
    assert shelf.snapshot().manifest.tasks == before.manifest.tasks
    assert shelf.snapshot().manifest.slots == before.manifest.slots


def test_all_fields_that_cannot_be_are_named_and_nothing_changes(shelf: Shelf, run: Command) -> None:
    before = tree(shelf.path)
    code, document = run("set", shelf.path, "qa-de", "--prompt", " ", "--max-new-tokens", 0)
    assert code == 2
    assert "the prompt is empty" in document["error"]["message"]
    assert "max_new_tokens is 0" in document["error"]["message"]
    for words in (["qa-fr", "--prompt", "x"], ["qa-de"], ["qa-de", "--type", "a\nb"], ["qa-de", "--keep", 3]):
        assert run("set", shelf.path, *words)[0] == 2
    assert run("set", shelf.path, "--prompt", "x")[0] == 2
    assert run("set", shelf.path)[0] == 2
    assert tree(shelf.path) == {**before, "lock": b""}


def test_a_field_that_is_stored_already_is_no_change(shelf: Shelf) -> None:
    shelf.commit(plan_set(shelf.snapshot(), "qa-de", {"prompt": "x"}))
    with pytest.raises(UsageError, match="already"):
        plan_set(shelf.snapshot(), "qa-de", {"prompt": "x"})
    with pytest.raises(UnknownName, match="qa-du"):
        plan_set(shelf.snapshot(), "qa-du", {"prompt": "x"})


# settings of the shelf


def test_settings_are_written_and_what_a_person_wrote_stays(shelf: Shelf, run: Command) -> None:
    head, before = shelf.snapshot().head, (shelf.path / "shelf.toml").read_text()
    code, document = run("set", shelf.path, "--slots", 5, "--bytes", "1.6MB", "--rank", 8, "--base-alias", "acme/b")
    assert code == 0
    assert document["changed"] == {
        "slots": [3, 5],
        "bytes": [None, 1_600_000],
        "rank": [None, 8],
        "base_aliases": [[], ["acme/b"]],
    }
    text = (shelf.path / "shelf.toml").read_text()
    lines = set(before.replace("slots = 3 ", "slots = 5 ").splitlines())
    lines |= {"bytes = 1600000", "rank = 8", 'base_aliases = ["acme/b"]'}
    assert set(text.splitlines()) == lines
    settings = shelf.snapshot().settings
    assert (settings.budget.slots, settings.budget.bytes, settings.merge.rank) == (5, 1_600_000, 8)
    assert shelf.snapshot().head == document["head"] == head
    code, document = run("set", shelf.path, "--bytes", "none", "--rank", "none")
    assert code == 0
    assert document["changed"] == {"bytes": [1_600_000, None], "rank": [8, None]}
    assert shelf.verify() == []


@pytest.mark.parametrize(
    "text",
    [
        "format = 1\nbudget.slots = 3\nbudget.keep = 2 # mine\n",
        "format = 1\nbudget = { slots = 3, keep = 2 }\n",
        "format = 1\r\n[budget]\r\nslots = 3\r\n",
        'format = 1\n[recipe.parameters]\ndensity = 0.5\n[budget]\nslots = 3\n[recipe]\nmerge = "ties"\n',
    ],
)
def test_a_shelf_toml_in_another_hand_is_edited_too(shelf: Shelf, text: str) -> None:
    (shelf.path / "shelf.toml").write_bytes(text.encode())
    before = shelf.snapshot().settings
    changes = {"keep": 4, "merge": "ties", "parameters": {"density": 0.25}, "base": "acme/tiny-llama", "dtype": "f16"}
    after = shelf.configure(changes)
    assert shelf.snapshot().settings == after == before.changed(changes)
    shelf.configure({"merge": "linear", "parameters": {}, "base": None, "dtype": None})
    assert shelf.snapshot().settings.base is None
    assert shelf.verify() == []


def test_all_settings_that_cannot_be_are_named_at_once_and_nothing_changes(shelf: Shelf, run: Command) -> None:
    before = tree(shelf.path)
    code, document = run("set", shelf.path, "--slots", 0, "--keep", -1, "--dtype", "f8", "--policy", "best")
    assert code == 2
    for fragment in ("slots is 0", "keep is -1", "dtype is 'f8'", "unknown policy 'best'"):
        assert fragment in document["error"]["message"]
    code, document = run("set", shelf.path, "--slots", 1, "--base-name", "acme/x", "--bytes", 10, "--policy", "best")
    assert code == 2
    least = shelf.snapshot().resting
    for fragment in (
        "slots is 1, but slot 1 is filled: at least 2",
        "base is 'acme/x'",
        f"takes {least}: give at least that",
    ):
        assert fragment in document["error"]["message"]
    assert tree(shelf.path) == {**before, "lock": b""}
    with pytest.raises(UsageError, match="there is no setting 'colour'"):
        shelf.configure({"colour": 1})
    assert run("set", shelf.path, "--bytes", least)[0] == 0  # what was told as the least is enough
    assert run("set", shelf.path, "--slots", 2)[0] == 0


def test_a_smaller_keep_gives_its_bytes_back_at_once(shelf: Shelf) -> None:
    shelf.commit(plan_set(shelf.snapshot(), "qa-de", {"prompt": "x"}))
    assert len(shelf.snapshot().kept) == 2
    before = shelf.snapshot().bytes
    shelf.configure({"keep": 0, "bytes": before - 100})
    assert len(shelf.snapshot().kept) == 0
    assert shelf.snapshot().bytes <= before - 100
    assert shelf.verify() == []


def test_a_shelf_toml_that_is_wrong_is_not_edited(shelf: Shelf) -> None:
    (shelf.path / "shelf.toml").write_text("format = 1\n[budget]\nslots = 3\ncolour = 1\n")
    with pytest.raises(ShelfConfigError, match="line 4"):
        shelf.configure({"keep": 3})
