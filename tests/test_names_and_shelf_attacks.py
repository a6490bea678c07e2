"""Bad names, links that lead out, hand-edited files, newer formats, damaged bytes, and two writers at once.

A shelf that cannot be trusted is refused with what, where and a cure; nothing on disk changes; `verify` says the same.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factory import make_adapter, write_peft
from lorashelf import (
    Clustering,
    LorashelfError,
    Shelf,
    atomic,
    new_settings,
    plan_add,
    plan_cluster,
    plan_remove,
    read_adapter,
    route,
)
from lorashelf.digest import digest
from lorashelf.errors import (
    CorruptShelf,
    DiskError,
    NewerFormat,
    NotReversible,
    ShelfConfigError,
    ShelfError,
    ShelfLocked,
    ShelfNotFound,
    StaleShelf,
    TaskNameError,
    UsageError,
)
from lorashelf.formats import objects
from lorashelf.serving.generate import service
from lorashelf.shelf import routing
from lorashelf.shelf.log import line as line_of
from manifests import forged, manifest
from test_attacks import command, state


@pytest.fixture(scope="session")
def two_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shelf of three slots, two of them filled, with a log; and an adapter to add. Writing it takes a while: once."""
    folder = tmp_path_factory.mktemp("two")
    made = Shelf.create(folder / "a.shelf", new_settings(3, policy="kmerge"))
    for number, task in enumerate(("gec-de", "qa-en")):
        made.commit(plan_add(made.snapshot(), make_adapter(number), task))
    Shelf.create(folder / "empty.shelf", new_settings(3))
    write_peft(folder / "third", make_adapter(2))
    return folder


@pytest.fixture
def shelf(two_tasks: Path, tmp_path: Path) -> Shelf:
    """A copy of them, for one test; the adapter is `third` beside the shelf."""
    shutil.copytree(two_tasks, tmp_path, dirs_exist_ok=True)
    return Shelf(tmp_path / "a.shelf")


def words_of(shelf: Shelf, *commands: str) -> list[list[object]]:
    """The words of each command, such that it would do something on a good shelf."""
    more: dict[str, list[object]] = {"add": [shelf.path.parent / "third"], "remove": ["gec-de"], "route": ["gec-de"]}
    return [[name, shelf.path, *more.get(name, [])] for name in commands]


SOME = ("add", "verify")
EVERY = ("add", "remove", "undo", "redo", "gc", "ls", "log", "route", "verify")


def refused(shelf: Shelf, kind: type[ShelfError], *fragments: str, commands: tuple[str, ...] = SOME) -> None:
    """Opening the shelf raises `kind` and `verify` says so; every command ends with exit code 4; nothing changes."""
    before = state(shelf.path.parent)
    with pytest.raises(LorashelfError) as caught:
        shelf.snapshot()
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert caught.value.exit_code == 4
    assert all(fragment in text for fragment in (f"\n  where: {shelf.path}", "\n  cure:  ", *fragments)), text
    assert shelf.verify() == [text]
    refused_by(commands, shelf, *fragments)
    assert state(shelf.path.parent) == before


def refused_by(commands: tuple[str, ...], shelf: Shelf, *fragments: str) -> None:
    """Each command ends with exit code 4, says all fragments and changes nothing."""
    before = state(shelf.path.parent)
    for words in words_of(shelf, *commands):
        code, said = command(*words)
        assert code == 4, words[0]
        assert all(fragment in said for fragment in fragments), said
        assert state(shelf.path.parent) == before, words[0]


def object_of(shelf: Shelf, task: str = "gec-de") -> Path:
    return Path(route(shelf.snapshot(), task)["path"])


def head_manifest(shelf: Shelf) -> Path:
    return shelf.path / "manifests" / f"{shelf.snapshot().head}.json"


def page_of(shelf: Shelf, kind: str) -> Path:
    return shelf.path / "pages" / f"{manifest(shelf.path)[kind][0]}.json.gz"


def test_a_good_shelf_is_not_refused(shelf: Shelf) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refused(shelf, CorruptShelf)
    for name in EVERY:
        with pytest.raises(AssertionError):
            refused_by((name,), shelf)
    assert shelf.verify() == []


# names ---------------------------------------------------------------------------------------------------------------

BAD_NAMES = {
    "": "is empty",
    " \t": "is empty",
    "a/b": "has a slash",
    "/etc/passwd": "has a slash",
    "a\\b": "has a slash",
    "..": "has '..'",
    "../../out": "has '..'",
    "a..b": "has '..'",
    ".": "is '.'",
    "a\nb": "has a control character or a line break",
    "a\rb": "has a control character",
    "a\tb": "has a control character",
    "a\0b": "has a control character",
    "\x1b[2J": "has a control character",
    "a\x7f": "has a control character",
    "a\x85b": "has a control character",
    "a\u2028b": "has a control character or a line break",
    "a\u2029b": "has a control character or a line break",
    "a\udcffb": "has a control character",
    " a": "begins or ends with a blank",
    "a\u00a0": "begins or ends with a blank",
    "a\u3000": "begins or ends with a blank",
    "a\u200bb": "has an invisible character (U+200B)",
    "a\u200db": "has an invisible character (U+200D)",
    "a\u200cb": "has an invisible character (U+200C)",
    "می\u200c": "has an invisible character (U+200C)",
    "a\u2060b": "has an invisible character (U+2060)",
    "\ufeffa": "has an invisible character (U+FEFF)",
    "a\u00adb": "has an invisible character (U+00AD)",
    "a\u202eb": "has an invisible character (U+202E)",
    "a\u2066b\u2069": "has an invisible character (U+2066, U+2069)",
    "a\u200fb": "has an invisible character (U+200F)",
    "a\u061cb": "has an invisible character (U+061C)",
    "a\ufe0fb": "has an invisible character (U+FE0F)",
    "a\U000e0061": "has an invisible character (U+E0061)",
    "\u3164": "has an invisible character (U+3164)",
    "a\u034fb": "has an invisible character (U+034F)",
    "x" * 256: "is longer than 255 bytes",
    "é" * 128: "is longer than 255 bytes",
}
GOOD_NAMES = [
    "gec-fr",
    "日本語",
    "grammaire-été",
    "می\u200cنویسد-fa",
    "क\u094d\u200dष-hi",
    "ক\u09cd\u200cষ-bn",
    "🎉",
    "❤\ufe0f",
    "👩\u200d💻",
    "👩🏽\u200d⚕\ufe0f",
    "1\ufe0f\u20e3",
    "葛\U000e0100",
    "two words",
    "-x",
    "it's",
    "[red]mail[de]",
    "a=b",
    "x" * 255,
    "%s",
]


@pytest.mark.parametrize(("name", "fragment"), BAD_NAMES.items(), ids=[repr(name)[:12] for name in BAD_NAMES])
def test_a_bad_task_name_is_refused(shelf: Shelf, tmp_path: Path, name: str, fragment: str) -> None:
    before, adapter = state(tmp_path), make_adapter(2)
    empty = Shelf(tmp_path / "empty.shelf").snapshot()
    for attempt in (
        lambda: plan_add(shelf.snapshot(), adapter, name),
        lambda: plan_cluster(empty, {"good": adapter, name: adapter}, Clustering((("good",),), "by hand")),
    ):
        with pytest.raises(TaskNameError) as caught:
            attempt()
        assert caught.value.exit_code == 2
        assert fragment in str(caught.value)
        assert str(caught.value).startswith((f"task name {name!r} ", f"task name {name!a} "))  # no harm to a terminal
        assert "--task NAME" in (caught.value.cure or "")
    for words in (["--task", name, tmp_path / "third"], [f"{name}={tmp_path / 'third'}"]):
        code, said = command("add", shelf.path, *words)
        assert (code, fragment in said) == (2, True), said
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_any_other_name_is_kept_as_it_is(shelf: Shelf, tmp_path: Path, name: str) -> None:
    assert command("add", shelf.path, "--task", name, tmp_path / "third")[0] == 0
    assert route(shelf.snapshot(), name)["members"] == [name]
    for listing in ("ls", "route"):
        code, said = command(listing, shelf.path)
        assert code == 0
        assert name in said.replace("\n", "") or len(name) > 40  # a long one is folded into its column
    assert command("remove", shelf.path, "--", name)[0] == 0
    assert shelf.verify() == []


def test_a_name_that_is_taken_is_refused_until_it_is_free(shelf: Shelf, tmp_path: Path) -> None:
    before = state(tmp_path)
    with pytest.raises(TaskNameError) as caught:
        plan_add(shelf.snapshot(), make_adapter(2), "gec-de")
    assert caught.value.exit_code == 2
    for fragment in ("'gec-de' is already on the shelf", f"where: {shelf.path}", "cure:  choose another name"):
        assert fragment in str(caught.value)
        assert fragment in command("add", shelf.path, f"gec-de={tmp_path / 'third'}")[1]
    assert command("add", shelf.path, f"gec-de={tmp_path / 'third'}")[0] == 2
    assert state(tmp_path) == before
    shelf.commit(plan_remove(shelf.snapshot(), "gec-de"))
    shelf.commit(plan_add(shelf.snapshot(), make_adapter(2), "gec-de"))
    assert shelf.verify() == []


def test_two_ways_to_write_an_accent_are_one_name(shelf: Shelf, tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
    shelf.commit(plan_add(shelf.snapshot(), make_adapter(2), decomposed))
    assert composed in shelf.snapshot().manifest.tasks
    with pytest.raises(TaskNameError, match="already on the shelf"):
        plan_add(shelf.snapshot(), make_adapter(3), composed)
    with pytest.raises(TaskNameError, match="two adapters have the same task name"):
        plan_cluster(
            Shelf(tmp_path / "empty.shelf").snapshot(),
            {composed: make_adapter(2), decomposed: make_adapter(3)},
            Clustering(((composed,),), "by hand"),
        )


def test_a_name_given_twice_to_cluster_is_refused(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "x")
    before = state(tmp_path)
    words = ["-o", tmp_path / "new.shelf", "--slots", 2, "--method", "random"]
    code, said = command("cluster", f"a={folder}", f"b={folder}", f"a={folder}", *words)
    assert (code, "given twice: a" in said) == (2, True)
    assert state(tmp_path) == before


@pytest.mark.parametrize("name", ["remove", "route", "update"])
def test_an_unknown_task_is_answered_with_the_nearest(shelf: Shelf, tmp_path: Path, name: str) -> None:
    before = state(tmp_path)
    code, said = command(name, shelf.path, "gec-d", *([tmp_path / "third"] if name == "update" else []))
    assert code == 2
    assert "unknown task 'gec-d'" in said
    assert "did you mean 'gec-de'" in said
    assert state(tmp_path) == before


@pytest.mark.parametrize("kind", ["a\udcff", "\x1b[2J", "", " gec", "a\u200bb"], ids=ascii)
def test_a_problem_type_that_is_no_text_is_refused(shelf: Shelf, tmp_path: Path, kind: str) -> None:
    before = state(tmp_path)
    with pytest.raises(TaskNameError, match="is not printable text"):
        plan_cluster(
            Shelf(tmp_path / "empty.shelf").snapshot(),
            {"x": make_adapter()},
            Clustering((("x",),), "by hand"),
            types={"x": kind},
        )
    code, said = command("add", shelf.path, tmp_path / "third", "--type", kind)
    assert (code, ascii(kind) in said) == (2, True), said
    assert state(tmp_path) == before


# links ---------------------------------------------------------------------------------------------------------------

LINKED: dict[str, Callable[[Shelf], Path]] = {
    "HEAD": lambda shelf: shelf.path / "HEAD",
    "shelf.toml": lambda shelf: shelf.path / "shelf.toml",
    "log.jsonl": lambda shelf: shelf.path / "log.jsonl",
    "lock": lambda shelf: shelf.path / "lock",
    "manifests": lambda shelf: shelf.path / "manifests",
    "objects": lambda shelf: shelf.path / "objects",
    "tmp": lambda shelf: shelf.path / "tmp",
    "a manifest": head_manifest,
    "an object": object_of,
    "a config": lambda shelf: object_of(shelf) / "adapter_config.json",
    "tensors": lambda shelf: object_of(shelf) / "adapter_model.safetensors",
}

FOLLOWED_BY: dict[str, tuple[str, ...]] = {  # where it is not all commands that would follow the link
    "log.jsonl": ("add", "remove", "undo", "redo", "gc", "log"),
    "lock": ("add", "remove", "undo", "redo", "gc"),
    "an object": ("add", "route"),
    "a config": ("add",),
    "tensors": ("add",),
}


@pytest.mark.parametrize("name", LINKED)
def test_a_link_that_leads_out_of_the_shelf_is_not_followed(shelf: Shelf, tmp_path: Path, name: str) -> None:
    path = LINKED[name](shelf)
    outside = tmp_path / "outside"
    path.rename(outside)
    if outside.is_dir():
        (outside / "precious").write_text("keep me")
    path.symlink_to(outside)
    said = ("a link is in the place of a file of the shelf", f"where: {path}")
    if name in FOLLOWED_BY:
        refused_by(FOLLOWED_BY[name], shelf, *said)
        assert len(shelf.verify()) == (name != "lock")
    else:
        refused(shelf, CorruptShelf, *said, commands=EVERY)


@pytest.mark.parametrize("name", ["tmp", "objects", "manifests"])
def test_a_stray_link_is_swept_and_what_it_leads_to_stays(shelf: Shelf, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("keep me")
    (shelf.path / name / "stray").symlink_to(tmp_path / "outside")
    assert command("gc", shelf.path)[0] == 0
    assert not (shelf.path / name / "stray").is_symlink()
    assert (tmp_path / "outside" / "precious").read_text() == "keep me"
    assert shelf.verify() == []


def test_a_shelf_may_itself_be_reached_by_a_link(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(shelf.path)
    assert command("add", tmp_path / "current", tmp_path / "third")[0] == 0
    assert Shelf(tmp_path / "current").verify() == []


# HEAD and manifests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"garbage\n", b"\xff\xfe\n", b"b2-" + b"0" * 64 + b"\n", b"../outside\n", b"b2-" + b"f" * 63 + b"\n"],
    ids=repr,
)
def test_a_head_that_names_no_manifest_is_refused(shelf: Shelf, content: bytes) -> None:
    (shelf.path / "HEAD").write_bytes(content)
    refused(shelf, CorruptShelf, "HEAD")


def test_a_head_that_is_a_folder_is_refused(shelf: Shelf) -> None:
    (shelf.path / "HEAD").unlink()
    (shelf.path / "HEAD").mkdir()
    refused(shelf, CorruptShelf, "HEAD cannot be read", commands=EVERY)


def test_a_shelf_without_a_head_is_a_damaged_one(shelf: Shelf) -> None:
    (shelf.path / "HEAD").unlink()
    refused(shelf, CorruptShelf, "HEAD cannot be read", f"lorashelf repair {shelf.path}", commands=EVERY)


def test_a_folder_without_manifests_is_no_shelf(shelf: Shelf, tmp_path: Path) -> None:
    (shelf.path / "HEAD").unlink()
    (shelf.path / "manifests").rename(tmp_path / "elsewhere")
    before = state(tmp_path)
    with pytest.raises(ShelfNotFound, match="there is no shelf here"):
        Shelf(shelf.path)
    for words in words_of(shelf, *EVERY):
        code, said = command(*words)
        assert (code, "lorashelf init" in said) == (4, True)
    assert state(tmp_path) == before


@pytest.mark.parametrize("ancestor", [False, True], ids=["the head", "the one before"])
@pytest.mark.parametrize("position", [0, 100, -1])
def test_a_manifest_with_a_changed_byte_is_refused(shelf: Shelf, ancestor: bool, position: int) -> None:
    snapshot = shelf.snapshot()
    path = shelf.path / "manifests" / f"{snapshot.manifest.parent if ancestor else snapshot.head}.json"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))
    refused(shelf, CorruptShelf, "the manifest was changed after it was written", f"where: {path}")


def test_a_manifest_edited_by_hand_is_refused(shelf: Shelf) -> None:
    path = head_manifest(shelf)
    path.write_bytes(path.read_bytes().replace(b'"add"', b'"set"'))
    refused(shelf, CorruptShelf, "the manifest was changed after it was written", f"where: {path}", commands=EVERY)


def test_a_forged_manifest_without_a_change_is_the_same_shelf(shelf: Shelf) -> None:
    before = shelf.snapshot().manifest
    forged(shelf.path, lambda document: None)
    assert shelf.snapshot().manifest == before
    assert shelf.verify() == []


FORGED: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "sequence is a string": (("sequence",), "x"),
    "sequence is null": (("sequence",), None),
    "parent is no id": (("parent",), "../../third"),
    "parent is a number": (("parent",), 5),
    "base is a string": (("base",), "acme"),
    "base has a number for a name": (("base", "name"), 5),
    "tasks is a list": (("tasks",), []),
    "tasks lack a member": (("tasks",), {}),
    "a task is a number": (("tasks", "gec-de"), 5),
    "arrived is a string": (("arrived",), "x"),
    "scores is a number": (("scores",), 5),
    "scores are strings": (("scores",), ["x"]),
    "cause is a number": (("cause",), 5),
    "slots is an object": (("slots",), {}),
    "a slot is a number": (("slots", 0), 5),
    "a slot's id is a string": (("slots", 0, "slot"), "0"),
    "a slot's id is negative": (("slots", 0, "slot"), -1),
    "a slot's id stands twice": (("slots", 0, "slot"), 1),
    "an object leads out": (("slots", 0, "object"), "../../third"),
    "an object is a number": (("slots", 0, "object"), 5),
    "a file leads out": (("slots", 0, "files"), [["../../third.lsc", 3106]]),
    "files of another size": (("slots", 0, "files"), [["0123456789abcdef.lsc", 5]]),
    "files are a number": (("slots", 0, "files"), 5),
    "facts are not on a page": (("slots", 0, "facts"), "../../third"),
    "an encoding that is not a name": (("slots", 0, "encoding"), "z\nip"),
    "members is a string": (("slots", 0, "members"), "gec-de"),
    "members are numbers": (("slots", 0, "members"), [1]),
    "merged is a number": (("slots", 0, "merged"), 5),
    "merged holds a number": (("slots", 0, "merged"), [5]),
    "a weight is a string": (("slots", 0, "merged", 0, "weight"), "x"),
    "restored is zero": (("slots", 0, "restored"), 0),
    "an unknown key in a slot": (("slots", 0, "colour"), "red"),
    "format is a string": (("format",), "1"),
    "format is zero": (("format",), 0),
}


@pytest.mark.parametrize(("place", "value"), FORGED.values(), ids=FORGED)
def test_a_forged_manifest_that_cannot_be_is_refused(shelf: Shelf, place: tuple[str | int, ...], value: Any) -> None:
    def change(document: Any) -> None:
        for key in place[:-1]:
            document = document[key]
        document[place[-1]] = value

    path = forged(shelf.path, change)
    refused(shelf, CorruptShelf, "manifest cannot be read", f"where: {path}")


def test_all_fields_that_cannot_be_are_named_at_once(shelf: Shelf) -> None:
    def change(document: dict[str, Any]) -> None:
        document["arrived"] = "x"
        document["slots"][1] |= {"rank": 0, "encoding": 7}

    forged(shelf.path, change)
    refused(shelf, CorruptShelf, "not what lorashelf writes: arrived, slots[1]: encoding, slots[1]: rank")


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"5", b"{}", b"{'format': 1}", b"\xff", b"[" * 100_000], ids=lambda d: d[:9]
)
def test_a_manifest_that_is_none_is_refused(shelf: Shelf, data: bytes) -> None:
    path = shelf.path / "manifests" / f"{digest([data])}.json"
    path.write_bytes(data)
    (shelf.path / "HEAD").write_text(f"{path.stem}\n")
    refused(shelf, CorruptShelf, "manifest cannot be read", f"where: {path}")


# newer formats -------------------------------------------------------------------------------------------------------


def test_a_manifest_of_a_newer_format_is_refused(shelf: Shelf) -> None:
    path = forged(shelf.path, lambda document: document.update(format=3, slots="in a way yet to come"))
    refused(shelf, NewerFormat, "manifest of format 3", f"where: {path}", "upgrade lorashelf", commands=EVERY)


def test_a_shelf_toml_of_a_newer_format_is_refused_as_such_whatever_else_it_holds(shelf: Shelf) -> None:
    edited(shelf, "format = 2", "format = 3\nyet_to_come = true")
    refused(shelf, NewerFormat, "format 3; this lorashelf reads up to 2", "upgrade lorashelf", commands=EVERY)


# shelf.toml ----------------------------------------------------------------------------------------------------------


def edited(shelf: Shelf, old: str, new: str) -> int:
    """Replace a line of shelf.toml; the number of the (first) new line."""
    path = shelf.path / "shelf.toml"
    text = path.read_text()
    assert text.count(f"\n{old}") == 1, text
    path.write_text(text.replace(f"\n{old}", f"\n{new}"))
    return text[: text.index(f"\n{old}")].count("\n") + 2


POLICY, MERGE, SEED = 'policy = "kmerge"', 'merge = "linear"', "seed = 0"
BAD_LINES: dict[str, tuple[str, str, str]] = {
    "slots below what is filled": ("slots = 3", "slots = 1", "slots is 1, but slot 1 is filled: at least 2"),
    "no slots": ("slots = 3", "slots = 0", "slots is 0; it must be a whole number"),
    "slots a string": ("slots = 3", 'slots = "3"', "slots is '3'"),
    "slots a fraction": ("slots = 3", "slots = 3.0", "slots is 3.0"),
    "slots true": ("slots = 3", "slots = true", "slots is True"),
    "bytes negative": ("slots = 3", "bytes = -1\nslots = 3", "bytes is -1"),
    "bytes beyond JSON's numbers": ("slots = 3", f"bytes = {2**60}\nslots = 3", f"bytes is {2**60}"),
    "keep negative": ("keep = 1", "keep = -1", "keep is -1"),
    "another base": ("[budget]", 'base = "acme/other"\n[budget]', "base is 'acme/other', but the adapters here are of"),
    "base a number": ("[budget]", "base = 5\n[budget]", "base is 5, not a string"),
    "aliases a string": ("[budget]", 'base_aliases = "x"\n[budget]', "base_aliases is 'x', not a list of strings"),
    "an unknown key": ("[budget]", "colour = 1\n[budget]", "unknown key 'colour'"),
    "an unknown key in budget": ("keep = 1", "kept = 1", "unknown key budget.kept"),
    "an unknown key in recipe": (SEED, "sed = 0", "unknown key recipe.sed"),
    "an unknown table": ("[recipe]", "[receipt]", "unknown key 'receipt'"),
    "recipe a list": ("[recipe]", "[[recipe]]", "recipe is not a table"),
    "an unknown policy": (POLICY, 'policy = "kmerge+"', "unknown policy 'kmerge+' (did you mean"),
    "policy a number": (POLICY, "policy = 5", "policy is 5"),
    "policy a list": (POLICY, 'policy = ["kmerge"]', "policy is ['kmerge']"),
    "an unknown merge": (MERGE, 'merge = "lineal"', "unknown merge method 'lineal'"),
    "merge a table": (MERGE, "merge = {}", "merge is {}"),
    "a merge that the policy cannot use": (
        f'{POLICY}\nthreshold = "auto"\n{MERGE}',
        'policy = "all"\nmerge = "ties"',
        "policy 'all' needs merge",
    ),
    "an unknown parameter": (SEED, "seed = 0\nparameters.density = 0.5", "linear has no parameter 'density'"),
    "parameters a number": (SEED, "parameters = 5\nseed = 0", "parameters is 5"),
    "threshold NaN": ('threshold = "auto"', "threshold = nan", "threshold is nan"),
    "threshold a word": ('threshold = "auto"', 'threshold = "low"', "threshold is 'low'"),
    "threshold true": ('threshold = "auto"', "threshold = true", "threshold is True"),
    "an unknown dtype": (SEED, 'dtype = "f8"\nseed = 0', "dtype is 'f8'; choose from f32, f16, bf16"),
    "dtype a list": (SEED, 'dtype = ["f16"]\nseed = 0', "dtype is ['f16']"),
    "rank zero": (SEED, "rank = 0\nseed = 0", "rank is 0"),
    "seed negative": (SEED, "seed = -1", "seed is -1"),
    "seed beyond JSON's numbers": (SEED, f"seed = {2**60}", f"seed is {2**60}"),
    "seed a date": (SEED, "seed = 1979-05-27", "seed is datetime.date(1979, 5, 27)"),
    "restore_norm a number": ("restore_norm = false", "restore_norm = 0", "restore_norm is 0"),
    "format zero": ("format = 2", "format = 0", "format is 0, not 2"),
    "format a string": ("format = 2", 'format = "2"', "format is '2', not 2"),
}
WITHOUT_LINE = {"an unknown parameter", "a merge that the policy cannot use"}  # told by another key's line, see below


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_of_shelf_toml_is_refused_with_its_number(shelf: Shelf, name: str) -> None:
    old, new, fragment = BAD_LINES[name]
    line = edited(shelf, old, new)
    said = fragment if name in WITHOUT_LINE else f"line {line}: {fragment}"
    refused(shelf, ShelfConfigError, said, f"where: {shelf.path / 'shelf.toml'}")


def test_all_bad_lines_are_named_at_once(shelf: Shelf) -> None:
    first = edited(shelf, "[budget]", "colour = 1\nbase = 5\n[budget]")
    names = ("no slots", "keep negative", "seed negative", "threshold NaN")
    lines = [first, first + 1, *(edited(shelf, *BAD_LINES[name][:2]) for name in names)]
    expected = ["unknown key 'colour'", "base is 5", "slots is 0", "keep is -1", "seed is -1", "threshold is nan"]
    refused(
        shelf,
        ShelfConfigError,
        *(f"line {line}: {text}" for line, text in zip(lines, expected, strict=True)),
        commands=EVERY,
    )


@pytest.mark.parametrize(
    ("data", "fragment"),
    [
        (b"", "format is None, not 2"),
        (b"format = 1\n", "policy 'kmerge++' needs slots"),
        (b"format = 1\nbudget = 3\n", "line 2: budget is not a table"),
        (b"format = 1\n[budget\nslots = 3\n", "(at line 2"),
        (b"format = 1\n[budget]\nslots = 3\nslots = 4\n", "(at line 4"),
        (b"\xff\xfe", "cannot be read"),
        (b"format = 1\nx = " + b"[" * 10_000, "cannot be read"),
        (b"format = 1\nbudget.slots = " + b"9" * 5000, "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_shelf_toml_that_is_none_is_refused(shelf: Shelf, data: bytes | None, fragment: str) -> None:
    (shelf.path / "shelf.toml").unlink()
    if data is not None:
        (shelf.path / "shelf.toml").write_bytes(data)
    refused(shelf, ShelfConfigError, fragment)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("slots = 3", "slots = 2"),
        ("slots = 3", "slots = 30"),
        ("slots = 3", "slots = 3\nbytes = 100000"),
        ("keep = 1", "keep = 5"),
        ("[budget]", 'base = "acme/tiny-llama"\n[budget]'),
        ("[budget]", 'base = "acme/other"\nbase_aliases = ["acme/tiny-llama"]\n[budget]'),
        (POLICY, 'policy = "kmerge++"'),
        (MERGE, 'merge = "ties"\nparameters = {density = 0.3}'),
        ('threshold = "auto"', "threshold = 0.02"),
        (SEED, 'seed = 7\nrank = 2\ndtype = "f16"'),
        ("restore_norm = false", "restore_norm = true"),
    ],
)
def test_what_may_be_edited_holds_for_the_next_add(shelf: Shelf, tmp_path: Path, old: str, new: str) -> None:
    edited(shelf, old, new)
    assert command("add", shelf.path, tmp_path / "third")[0] == 0
    assert shelf.verify() == []


@pytest.mark.parametrize(
    "words",
    [
        ["--slots", "0"],
        ["--slots", "two"],
        ["--slots", "2", "--policy", "best"],
        ["--slots", "2", "--merge", "best"],
        ["--slots", "2", "--merge", "ties", "-p", "density=2"],
        ["--slots", "2", "--threshold", "low"],
        ["--slots", "2", "--threshold", "nan"],
        ["--slots", "2", "--dtype", "f8"],
        ["--slots", "2", "--rank", "0"],
        ["--slots", "2", "--keep", "-1"],
        ["--slots", "2", "--bytes", "0"],
        ["--slots", "2", "--bytes", str(2**60)],
        ["--slots", "2", "--seed", str(2**60)],
        ["--slots", "2", "--base-alias", "a\udcff"],
    ],
    ids=" ".join,
)
def test_a_shelf_that_cannot_be_is_not_made(tmp_path: Path, words: list[str]) -> None:
    code, said = command("init", tmp_path / "new.shelf", *words)
    assert code == 2
    assert said.startswith("lorashelf: ")
    assert state(tmp_path) == {}


def test_all_settings_that_cannot_be_are_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        new_settings(0, keep=-1, dtype="f8", policy="best", merge="ties", parameters={"density": 2})
    for fragment in ("slots is 0", "keep is -1", "dtype is 'f8'", "unknown policy 'best'", "density is 2"):
        assert fragment in str(caught.value)


def test_a_shelf_is_not_made_over_something_else(shelf: Shelf, tmp_path: Path) -> None:
    before = state(tmp_path)
    folders = [tmp_path / "third"]
    for words in (
        ["init", shelf.path],
        ["init", tmp_path / "third"],
        ["init", tmp_path / "third" / "adapter_config.json"],
    ):
        code, said = command(*words, "--slots", 2)
        assert (code, "already exists" in said) == (4, True)
    words = ["cluster", *folders, "-o", shelf.path, "--slots", 2, "--method", "random"]
    assert command(*words)[0] == 4
    assert state(tmp_path) == before


# stored bytes --------------------------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a byte of a value": lambda folder: flip(folder / "adapter_model.safetensors", -5),
    "a byte of the header": lambda folder: flip(folder / "adapter_model.safetensors", 60),
    "a byte of the header's length": lambda folder: flip(folder / "adapter_model.safetensors", 5),
    "a byte of the config": lambda folder: flip(folder / "adapter_config.json", 40),
    "tensors cut off": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\0" * 100),
    "tensors missing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "config missing": lambda folder: (folder / "adapter_config.json").unlink(),
    "object missing": shutil.rmtree,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_finds_a_damaged_object_and_ends_with_4(shelf: Shelf, tmp_path: Path, name: str) -> None:
    folder = object_of(shelf)
    DAMAGE[name](folder)
    before = state(tmp_path)
    problems = shelf.verify()
    assert len(problems) == 1
    assert problems[0].startswith(f"slot 0, objects/{folder.name}: ")
    assert problems[0].endswith("; tasks: gec-de")
    assert "its bytes have changed" in problems[0] or "No such file" in problems[0]
    code, said = command("verify", shelf.path)
    assert (code, folder.name in said) == (4, True)
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["a byte of the header's length", "tensors cut off", "config missing", "object missing"]
)
def test_an_object_that_cannot_be_read_stops_an_add(shelf: Shelf, tmp_path: Path, name: str) -> None:
    folder = object_of(shelf)
    DAMAGE[name](folder)
    before = state(tmp_path)
    with pytest.raises(CorruptShelf) as caught:
        plan_add(shelf.snapshot(), make_adapter(3), "new")
    for fragment in ("slot 0", "tasks: gec-de", f"where: {folder}", f"cure:  lorashelf repair {shelf.path}"):
        assert fragment in str(caught.value)
    code, said = command("add", shelf.path, tmp_path / "third")
    assert (code, str(folder) in said) == (4, True)
    assert state(tmp_path) == before


def spoiled(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4] + np.array([np.nan], "<f4").tobytes())


@pytest.mark.parametrize("damage", [lambda path: flip(path, -5), spoiled], ids=["another value", "NaN"])
def test_a_damaged_object_is_not_averaged_on(shelf: Shelf, tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    edited(shelf, "slots = 3", "slots = 2")
    folders = [write_peft(tmp_path / task, make_adapter(i)) for i, task in enumerate(("gec-de", "qa-en"))]
    assert command("add", shelf.path, tmp_path / "third")[0] == 0
    shared = next(slot for slot in shelf.snapshot().manifest.slots if len(slot.members) == 2)
    task = next(task for task in shared.members if task != "third")
    original = next(folder for folder in folders if folder.name == task)
    for slot in shelf.snapshot().manifest.slots:
        damage(shelf.snapshot().slot_path(slot) / "adapter_model.safetensors")
    write_peft(tmp_path / "fourth", make_adapter(3))
    before = state(tmp_path)
    for words in (
        ["add", shelf.path, tmp_path / "fourth"],
        ["add", shelf.path, tmp_path / "fourth", "--dry-run"],
        ["update", shelf.path, task, tmp_path / "fourth", "--was", original],
        ["remove", shelf.path, task, "--adapter", original],
    ):
        code, said = command(*words)
        assert (code, "have changed" in said, "cure:  lorashelf repair" in said) == (4, True, True), said
        assert state(tmp_path) == before


def test_no_damaged_slot_is_served(shelf: Shelf, tmp_path: Path) -> None:
    """Whatever reads a slot's values checks its bytes before; the faults of all slots are named at once."""
    assert command("add", shelf.path, tmp_path / "third")[0] == 0
    snapshot = shelf.snapshot()
    for slot in snapshot.manifest.slots[:2]:
        flip(snapshot.slot_path(slot) / "adapter_model.safetensors", -7)  # a lowest bit: the value stays as good
    tasks = [*snapshot.manifest.slots[0].members, *snapshot.manifest.slots[1].members]
    fourth = write_peft(tmp_path / "fourth", make_adapter(3))
    reads: dict[str, tuple[Callable[[], Any], list[str]]] = {
        "route": (lambda: routing.route(snapshot, tasks[0]), tasks[:1]),
        "routes": (lambda: routing.routes(snapshot), tasks),
        "a service": (lambda: service(snapshot, tasks[1], prompt="?"), tasks[1:]),
        "the values of a slot": (lambda: dict(snapshot.stored(snapshot.manifest.slots[1]).modules), tasks[1:]),
        "an arrival, compared with all": (lambda: plan_add(snapshot, read_adapter(fourth), "fourth"), tasks),
    }
    for name, (read, concerned) in reads.items():
        with pytest.raises(CorruptShelf) as caught:
            read()
        for task in tasks:
            assert (f"tasks: {task}" in str(caught.value)) is (task in concerned), (name, task)
    for words in (["route", shelf.path], ["route", shelf.path, tasks[0]]):
        assert command(*words)[0] == 4
        assert command(*words, "--no-verify")[0] == 0
    assert command("route", shelf.path, "third")[0] == 0
    assert command("ls", shelf.path)[0] == 0


def test_an_object_is_hashed_once_and_again_once_it_was_touched(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    of = objects.object_digest
    monkeypatch.setattr(objects, "object_digest", lambda files: hashed.append(files[0].parent.name) or of(files))
    snapshot = shelf.snapshot()
    slot = snapshot.manifest.slots[0]
    path = snapshot.slot_path(slot) / "adapter_model.safetensors"
    time.sleep(0.02)  # what was written just now is not remembered: it may change without a change of its times
    for _ in range(3):
        snapshot.check_bytes(slot)
    assert hashed == [slot.object.id]
    flip(path, -7)
    with pytest.raises(CorruptShelf):
        snapshot.check_bytes(slot)
    flip(path, -7)
    snapshot.check_bytes(slot)
    assert hashed == [slot.object.id] * 3


def test_what_is_only_planned_has_no_bytes_to_check(shelf: Shelf) -> None:
    snapshot = shelf.snapshot()
    for seed in (3, 4, 5):
        snapshot = snapshot.after(plan_add(snapshot, make_adapter(seed), f"new-{seed}"))
    assert len(snapshot.manifest.tasks) == 5


def test_undo_to_an_object_that_is_gone_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    gone = object_of(shelf)
    shelf.commit(plan_remove(shelf.snapshot(), "gec-de"))
    shutil.rmtree(gone)
    before = state(tmp_path)
    with pytest.raises(NotReversible, match="the object of slot 0 is gone"):
        shelf.undo()
    assert command("undo", shelf.path)[0] == 4
    assert state(tmp_path) == before


@pytest.mark.parametrize("prefix", ["b2-", "b2-" + "0" * 64, "nonsense", "../x"])
def test_undo_to_a_manifest_that_is_not_kept_or_not_meant_is_refused(shelf: Shelf, tmp_path: Path, prefix: str) -> None:
    shelf.commit(plan_remove(shelf.snapshot(), "gec-de"))
    edited(shelf, "keep = 1", "keep = 5")
    shelf.commit(plan_remove(shelf.snapshot(), "qa-en"))
    before = state(tmp_path)
    with pytest.raises(UsageError, match="kept manifest"):
        shelf.undo(prefix)
    assert command("undo", shelf.path, "--to", prefix)[0] == 2
    assert state(tmp_path) == before


@pytest.mark.parametrize("folder", ["tmp", "objects"])
def test_an_empty_folder_that_a_copy_lost_is_made_again(tmp_path: Path, two_tasks: Path, folder: str) -> None:
    shelf = Shelf(shutil.copytree(two_tasks / "empty.shelf", tmp_path / "a.shelf"))
    (shelf.path / folder).rmdir()
    assert shelf.verify() == []
    assert command("add", shelf.path, two_tasks / "third")[0] == 0
    assert shelf.verify() == []


# no files ------------------------------------------------------------------------------------------------------------


def device(path: Path) -> None:
    """An endless file; where only root may make one, a pipe again."""
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        os.mkfifo(path)


@contextlib.contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """End what waits on a pipe for ever."""

    def late(*_: object) -> None:
        raise TimeoutError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


PLACES: dict[str, Callable[[Shelf], Path]] = {
    "HEAD": lambda shelf: shelf.path / "HEAD",
    "shelf.toml": lambda shelf: shelf.path / "shelf.toml",
    "the manifest": head_manifest,
    "a page of slots": lambda shelf: page_of(shelf, "slots"),
    "a page of tasks": lambda shelf: page_of(shelf, "tasks"),
    "the manifest before": lambda shelf: shelf.path / "manifests" / f"{shelf.snapshot().manifest.parent}.json",
    "log.jsonl": lambda shelf: shelf.path / "log.jsonl",
    "a config": lambda shelf: object_of(shelf) / "adapter_config.json",
    "tensors": lambda shelf: object_of(shelf) / "adapter_model.safetensors",
}


@pytest.mark.parametrize("kind", [os.mkfifo, device, Path.mkdir], ids=["pipe", "device", "folder"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_an_error_and_not_waited_for(
    shelf: Shelf, tmp_path: Path, place: str, kind: Callable[[Path], Any]
) -> None:
    path = PLACES[place](shelf)
    path.unlink()
    kind(path)
    commands = words_of(shelf, "verify", "add", "route", "remove", "undo", "log", "gc", "ls")
    with no_longer_than(120):
        codes = {words[0]: command(*words) for words in commands[:3]}
        assert codes["verify"][0] == 4
        assert path.name in codes["verify"][1]
        assert "not a" in codes["verify"][1]
        if place != "log.jsonl":  # history only
            assert {name: code for name, (code, _) in codes.items()} == dict.fromkeys(codes, 4)
        for words in commands[3:]:
            assert command(*words)[0] in (0, 4), words


# the log -------------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_of_the_log_is_ignored_and_cut_off_by_the_next_writer(shelf: Shelf, tmp_path: Path) -> None:
    log = shelf.path / "log.jsonl"
    whole, entries = log.read_bytes(), shelf.log()
    log.write_bytes(whole + b'{"id":"b2-12')
    assert shelf.verify() == []
    assert shelf.log() == entries
    assert command("add", shelf.path, tmp_path / "third")[0] == 0
    assert log.read_bytes().startswith(whole + b"{")
    assert len(shelf.log()) == len(entries) + 1
    assert shelf.verify() == []


@pytest.mark.parametrize(
    "line",
    [b"garbage", b"5", b"{}", b"[]", b'{"id":"x","sequence":"y"}', b'{"id":[],"sequence":1}', b"\xff", b"[" * 10_000],
    ids=lambda line: str(line[:12]),
)
def test_a_line_of_garbage_in_the_log_is_reported(shelf: Shelf, tmp_path: Path, line: bytes) -> None:
    log = shelf.path / "log.jsonl"
    log.write_bytes(line + b"\n" + log.read_bytes())
    before = state(tmp_path)
    assert ["log.jsonl" in problem for problem in shelf.verify()] == [True]
    with pytest.raises(CorruptShelf, match=r"log\.jsonl"):
        shelf.log()
    for name in ("verify", "log"):
        code, said = command(name, shelf.path)
        assert (code, "log.jsonl" in said) == (4, True)
    assert state(tmp_path) == before
    assert command("add", shelf.path, tmp_path / "third")[0] == 0  # history only: nothing depends on it


def test_a_line_that_was_taken_out_of_the_log_or_altered_is_reported(shelf: Shelf, tmp_path: Path) -> None:
    for seed in range(3, 6):
        shelf.commit(plan_add(shelf.snapshot(), make_adapter(seed), f"new-{seed}"))
    log = shelf.path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    kept = shelf.path / "manifests" / f"{shelf.snapshot().manifest.parent}.json"
    # a crash between append and delete
    logged_and_kept = line_of(kept.stem, shelf.snapshot().ancestors[kept.stem])
    log.write_bytes(b"".join([*lines, lines[1], logged_and_kept]))
    assert shelf.verify() == []
    for index, line in enumerate(lines):
        log.write_bytes(b"".join(other for other in lines if other != line))
        assert shelf.verify() == [f"log.jsonl: the line of sequence {index} is missing"]
        altered = line.replace(b'"sequence":%d' % index, b'"sequence":%d' % (index + 1))
        log.write_bytes(b"".join(altered if other == line else other for other in lines))
        assert len(shelf.verify()) == 2
    log.unlink()
    assert shelf.verify() == ["log.jsonl: the line of sequence 0 is missing"]
    code, said = command("verify", shelf.path)
    assert (code, "sequence 0 is missing" in said) == (4, True)
    assert command("add", shelf.path, tmp_path / "third")[0] == 0  # history only


def test_a_log_that_is_a_folder_stops_writers_and_is_reported(shelf: Shelf) -> None:
    (shelf.path / "log.jsonl").unlink()
    (shelf.path / "log.jsonl").mkdir()
    assert ["log.jsonl" in problem for problem in shelf.verify()] == [True]
    refused_by(("add", "remove", "undo", "redo", "gc", "log", "verify"), shelf, "log.jsonl")


# two writers ---------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from lorashelf import Shelf
with Shelf(sys.argv[1]).writing():
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_writer(shelf: Shelf) -> Iterator[subprocess.Popen[str]]:
    """Another process, while it holds the lock."""
    words = [sys.executable, "-c", HOLD, str(shelf.path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_plan_made_before_another_commit_is_stale(shelf: Shelf, tmp_path: Path) -> None:
    snapshot = shelf.snapshot()
    plans = [plan_add(snapshot, make_adapter(seed), f"new-{seed}") for seed in (5, 6)]
    shelf.commit(plans[0])
    before = state(tmp_path)
    with pytest.raises(StaleShelf) as caught:
        shelf.commit(plans[1])
    assert caught.value.exit_code == 4
    for fragment in ("the shelf changed since the plan was made", f"where: {shelf.path}", "cure:  make the plan again"):
        assert fragment in str(caught.value)
    with pytest.raises(StaleShelf):
        shelf.commit(plans[0])  # nor twice
    assert state(tmp_path) == before
    shelf.commit(plan_add(shelf.snapshot(), make_adapter(6), "new-6"))
    assert {"new-5", "new-6"} <= shelf.snapshot().manifest.tasks.keys()
    assert shelf.verify() == []


def test_while_another_process_writes_one_waits_and_is_told_and_readers_read(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorashelf.shelf.shelf.LOCK_SECONDS", 0.2)
    plan = plan_add(shelf.snapshot(), make_adapter(5), "new")
    with another_writer(shelf):
        before = state(tmp_path)
        for attempt in (lambda: shelf.commit(plan), shelf.undo, shelf.gc):
            with pytest.raises(ShelfLocked) as caught:
                attempt()
            assert caught.value.exit_code == 4
            for fragment in ("another writer holds this shelf", f"where: {shelf.path / 'lock'}", "cure:  wait"):
                assert fragment in str(caught.value)
        for words in words_of(shelf, "add", "remove", "undo", "redo", "gc"):
            code, said = command(*words)
            assert (code, "another writer holds this shelf" in said) == (4, True)
        for words in words_of(shelf, "ls", "log", "route", "verify"):
            assert command(*words)[0] == 0
        assert command(*words_of(shelf, "add")[0], "--dry-run")[0] == 0
        assert state(tmp_path) == before
    shelf.commit(plan)  # it was killed: the lock is free again
    assert shelf.verify() == []


def test_a_writer_that_waits_gets_its_turn(shelf: Shelf, tmp_path: Path) -> None:
    with another_writer(shelf) as process:
        assert process.stdin is not None
        words = [sys.executable, "-m", "lorashelf", "add", str(shelf.path), str(tmp_path / "third")]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as waiting:
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(timeout=2)
            process.stdin.close()
            assert waiting.wait(timeout=60) == 0
    assert "third" in shelf.snapshot().manifest.tasks


def test_many_processes_add_to_one_shelf_and_nothing_is_lost(shelf: Shelf, tmp_path: Path) -> None:
    names = [f"task-{number}" for number in range(6)]
    before = shelf.snapshot().manifest
    words = [sys.executable, "-m", "lorashelf", "add", str(shelf.path)]
    folders = [write_peft(tmp_path / name, make_adapter(10 + number)) for number, name in enumerate(names)]
    running = [subprocess.Popen([*words, str(folder)], stdout=subprocess.DEVNULL) for folder in folders]
    assert [process.wait(timeout=120) for process in running] == [0] * len(names)
    after = shelf.snapshot().manifest
    assert after.tasks.keys() == before.tasks.keys() | {*names}
    assert after.arrived == before.arrived + len(names)
    assert after.sequence == before.sequence + len(names)
    assert [entry["sequence"] for entry in shelf.log()] == list(range(after.sequence + 1))
    assert shelf.verify() == []


def test_a_head_that_may_not_be_read_has_a_cure_of_its_own(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused_to_read(path: Path, *_: Any) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(atomic, "read_file", refused_to_read)
    with pytest.raises(DiskError, match="check the permissions"):
        shelf.snapshot()


def test_the_folder_one_is_in_is_no_place_for_a_shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (".", tmp_path):
        with pytest.raises(ShelfError, match="the folder you are in"):
            Shelf.create(path, new_settings(1))
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    Shelf.create(tmp_path / "link", new_settings(1))
    assert (tmp_path / "link").is_symlink()
    assert Shelf(tmp_path / "there").verify() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]
