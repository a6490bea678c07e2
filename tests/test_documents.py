"""The JSON documents of commands have the keys and types that `lorashelf.documents` declares, and docs/cli.md lists."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest

from command import Command
from factory import make_adapter, write_peft
from lorashelf import Factors, HFBackend, documents
from test_bytes import adapter
from test_gains import loud_task, untuned
from tiny_base import tiny_base

CLI = Path(__file__).parent.parent / "docs" / "cli.md"


def faults(value: Any, wanted: Any, at: str = "") -> list[str]:
    """Where a JSON value is not of a declared type."""
    kind, inside = get_origin(wanted), get_args(wanted)
    if is_typeddict(wanted):
        if not isinstance(value, dict):
            return [f"{at}: {value!r} is not a document"]
        hints = get_type_hints(wanted)
        absent = [f"{at}.{key} is absent" for key in wanted.__required_keys__ - value.keys()]
        unknown = [f"{at}.{key} is not declared" for key in value.keys() - hints.keys()]
        known = [fault for key in value.keys() & hints for fault in faults(value[key], hints[key], f"{at}.{key}")]
        return absent + unknown + known
    if kind in (Union, types.UnionType):
        tried = [faults(value, each, at) for each in inside]
        return [] if [] in tried else min(tried, key=len)
    if kind is list and isinstance(value, list):
        return [fault for place, each in enumerate(value) for fault in faults(each, inside[0], f"{at}[{place}]")]
    if kind is dict and isinstance(value, dict):
        return [fault for key, each in value.items() for fault in faults(each, inside[1], f"{at}[{key!r}]")]
    plain = {float: (int, float), Any: object}.get(wanted, kind or wanted)
    right = isinstance(value, plain) and not (isinstance(value, bool) and wanted in (int, float))
    return [] if right else [f"{at}: {value!r} is not of {wanted}"]


@pytest.fixture
def made(tmp_path: Path, run: Command) -> Callable[..., Any]:
    """made(words): the document of a command, of whatever exit code."""
    return lambda *words: run(*words)[1]


def test_commands_print_the_documents_that_are_declared(tmp_path: Path, made: Callable[..., Any]) -> None:
    folders = [write_peft(tmp_path / f"task-{i}", make_adapter(i)) for i in range(4)]
    x = make_adapter(5)
    idle = x.with_factors({p: Factors(f.a, 0 * f.b, f.scale) for p, f in x.modules.items()})
    idle_folder = write_peft(tmp_path / "idle", idle)
    slots, small, coded = tmp_path / "slots", tmp_path / "small", tmp_path / "coded"
    made("init", slots, "--slots", 2, "--policy", "kmerge")
    found = {
        "add": [made("add", slots, *folders[:3], idle_folder), made("add", slots, folders[0], "--skip-existing")],
        "update": [made("update", slots, "task-0", folders[3], "--was", folders[0])],
        "remove": [made("remove", slots, "task-1")],
        "route": [made("route", slots, "task-0"), *made("route", slots).values()],
        "undo": [made("undo", slots)],
        "redo": [made("redo", slots)],
        "verify": [made("verify", slots)],
        "gc": [made("gc", slots)],
        "ls": [made("ls", slots)],
        "compare": [made("compare", *folders)],
        "cluster": [made("cluster", *folders, "-o", tmp_path / "c", "--slots", 2, "--method", "random")],
        "export": [made("export", slots, "-o", tmp_path / "exported", "--format", "peft")],
    }
    made("init", coded, "--bytes", "60kB", "--floor", 0.9)
    large = [write_peft(tmp_path / f"large-{i}", adapter(i)) for i in range(7)]
    found["add"] += [made("add", coded, *large)]
    found["update"].append(made("update", coded, "large-0", write_peft(tmp_path / "new", adapter(8))))
    found["ls"].append(made("ls", coded))
    found["pack"] = [made("pack", *large[:2], "-o", tmp_path / "packed", "--bytes", "60kB")]
    found["convert"] = [made("convert", tmp_path / "packed", "-o", tmp_path / "converted", "--encoding", "coded")]
    found["plan"] = [made("plan", *large[:2], "--coded", "--bytes", "20kB")]
    made("init", small, "--bytes", "3kB")
    found["add"].append(made("add", small, large[0]))
    base = tiny_base(tmp_path / "base")
    x = write_peft(tmp_path / "loud", untuned(HFBackend.open(str(base), device="cpu", dtype="f32")))
    words = ("--percent", 90, "--examples", loud_task(tmp_path / "tasks" / "loud"), "--base", base, "--steps", 1)
    found["compress"] = [made("compress", x, "-o", tmp_path / "loud.lsc", *words)]
    found["extract"] = [made("extract", tmp_path / "loud.lsc", "-o", tmp_path / "extracted")]
    assert found.keys() == documents.DOCUMENTS.keys()
    met: set[tuple[type, str]] = set()
    for command, (kind, *_) in documents.DOCUMENTS.items():
        for document in found[command]:
            if command == "add" and (failure := document.pop("error", None)):
                assert faults(failure, documents.Failure) == []
            assert faults(document, kind, command) == []
            met |= {(kind, key) for key in document}
    met |= {(documents.Arrived, key) for document in found["add"] for item in document["added"] for key in item}
    met |= {(documents.ListedSlot, key) for document in found["ls"] for slot in document["slots"] for key in slot}
    rare = {(kind, key) for kinds in documents.DOCUMENTS.values() for kind in kinds for key in kind.__optional_keys__}
    assert rare - met == {(documents.ListedSlot, "worn")}  # earlier versions wrote it


def test_the_check_of_documents_finds_what_is_wrong() -> None:
    right = {"names": ["a"], "metric": "cosine", "matrix": [[1.0]]}
    assert faults(right, documents.Compared) == []
    for wrong in ({**right, "more": 1}, {"names": ["a"], "metric": "cosine"}, {**right, "matrix": [["1"]]}, []):
        assert len(faults(wrong, documents.Compared)) == 1
    assert faults(True, int) != []


def test_the_error_of_a_refused_adapter_is_as_declared(tmp_path: Path, run: Command) -> None:
    folder = write_peft(tmp_path / "a", make_adapter())
    (folder / "adapter_config.json").write_text("{}")
    code, document = run("show", folder)
    assert code == 3
    assert faults(document["error"], documents.Failure) == []
    assert document["error"].keys() == {*documents.Failure.__annotations__}


def test_the_command_reference_lists_the_keys_that_are_declared() -> None:
    sections = re.split(r"^## ", CLI.read_text(), flags=re.MULTILINE)[1:]
    listed = {section.splitlines()[0]: re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) for section in sections}
    declared = {
        command: [key for kind in kinds for key in kind.__annotations__]
        for command, kinds in documents.DOCUMENTS.items()
    }
    assert {command: keys for command, keys in listed.items() if keys} == declared
