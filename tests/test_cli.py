"""The command line: its JSON contracts, exit codes, and what it leaves on disk."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from command import Command
from factory import assert_same_delta, make_adapter, sharing_init, tree, write_peft
from lorashelf import (
    Adapter,
    Plan,
    Shelf,
    cluster,
    merge,
    new_settings,
    plan_add,
    plan_cluster,
    read_adapter,
    write_adapter,
)
from lorashelf.cli import main
from lorashelf.cli.app import MODULES
from lorashelf.cli.output import Meter, cells
from lorashelf.errors import DiskError, UsageError
from lorashelf.placement.partitioners import PARTITIONERS
from manifests import unfolded


@pytest.fixture
def zoo(tmp_path: Path) -> dict[str, Path]:
    return {
        name: write_peft(tmp_path / "zoo" / name, make_adapter(i))
        for i, name in enumerate(["a-x", "a-y", "b-x", "b-y"])
    }


@pytest.fixture
def shelf(tmp_path: Path, run: Command) -> Path:
    path = tmp_path / "my.shelf"
    assert run("init", path, "--slots", 2, "--policy", "kmerge")[0] == 0
    return path


def test_init_prints_what_was_made_and_refuses_an_existing_path(tmp_path: Path, run: Command) -> None:
    code, document = run("init", tmp_path / "s", "--slots", 3, "--threshold", "0.02", "--dtype", "bf16")
    assert code == 0
    assert document["slots"] == 3
    assert document["threshold"] == 0.02
    before = tree(tmp_path)
    code, document = run("init", tmp_path / "s", "--slots", 3)
    assert code == 4
    assert set(document["error"]) == {"kind", "message", "where", "cure"}
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1600000", 1600000),
        ("1.6MB", 1600000),
        ("1.6mb", 1600000),
        ("1600 kB", 1600000),
        ("2MiB", 2097152),
        ("1.5KiB", 1536),
        ("2GB", 2 * 10**9),
        ("0.001GiB", 1073741),
        ("5000B", 5000),
    ],
)
def test_a_size_has_a_unit_or_is_bytes(tmp_path: Path, run: Command, text: str, count: int) -> None:
    assert run("init", tmp_path / "s", "--slots", 2, "--bytes", text)[0] == 0
    assert run("ls", tmp_path / "s")[1]["budget"]["bytes"] == count


@pytest.mark.parametrize("text", ["", "0", "-5", "0.1B", "1.6M", "1,6MB", "MB", "1e6", "nan", "1.6 M B"])
def test_what_is_not_a_size_is_refused(tmp_path: Path, run: Command, text: str) -> None:
    code, document = run("init", tmp_path / "s", "--slots", 2, "--bytes", text)
    assert (code, document["error"]["kind"]) == (2, "usage")
    assert "1.6MB" in document["error"]["cure"]
    assert not (tmp_path / "s").exists()


def test_a_budget_too_small_for_an_empty_shelf_is_refused(tmp_path: Path, run: Command) -> None:
    code, document = run("init", tmp_path / "s", "--slots", 2, "--bytes", 10)
    assert (code, document["error"]["kind"]) == (4, "over_budget")
    need = int(re.search(r"takes (\d+) bytes", document["error"]["message"])[1])
    assert not (tmp_path / "s").exists()
    assert run("init", tmp_path / "s", "--slots", 2, "--bytes", need + 8)[0] == 0
    assert sum(map(len, tree(tmp_path / "s").values())) <= need + 8  # the budget itself is written down twice


def test_sizes_are_printed_in_the_unit_that_fits(tmp_path: Path, zoo: dict[str, Path], run: Command) -> None:
    run("init", tmp_path / "s", "--slots", 2, "--bytes", "1.6MB")
    assert "would need 0 B, the shelf needs 0 B; on disk" in run("ls", tmp_path / "s", as_json=False)[1]
    run("add", tmp_path / "s", zoo["a-x"])
    text = run("ls", tmp_path / "s", as_json=False)[1]
    assert "budget 1.60 MB" in text
    assert "0.00 MB" not in text
    assert f"{run('ls', tmp_path / 's')[1]['slots'][0]['bytes'] / 1000:.1f} kB" in text


def test_add_tells_decision_slot_scores_members_and_head(shelf: Path, zoo: dict[str, Path], run: Command) -> None:
    assert run("add", shelf, zoo["a-x"])[1]["added"][0] | {"head": ""} == {
        "task": "a-x",
        "decision": "open",
        "slot": 0,
        "scores": {},
        "threshold": None,
        "members": ["a-x"],
        "head": "",
        "merged": True,
        "reversible": True,
    }
    run("add", shelf, zoo["b-x"])
    code, document = run("add", shelf, f"third={zoo['a-y']}")
    third = document["added"][0]
    assert (code, document.keys()) == (0, {"added"})
    assert third["decision"] == "fold"
    assert set(third["scores"]) == {"0", "1"}
    assert third["slot"] == int(max(third["scores"], key=third["scores"].get))
    assert third["members"] == sorted([("a-x", "b-x")[third["slot"]], "third"])
    assert third["head"] == (shelf / "HEAD").read_text().strip()


def test_add_takes_many_in_order_and_stops_at_the_first_refusal(
    tmp_path: Path, zoo: dict[str, Path], run: Command
) -> None:
    size = sum(f.stat().st_size for f in zoo["a-x"].iterdir())
    run("init", tmp_path / "small", "--slots", 4, "--bytes", 2 * size + 20000)
    large = write_peft(tmp_path / "large", make_adapter(7, rank=200))
    code, document = run("add", tmp_path / "small", zoo["a-x"], large, zoo["b-x"])
    assert (code, document["error"]["kind"]) == (4, "refused")
    assert [(d["task"], d["decision"]) for d in document["added"]] == [("a-x", "open"), ("large", "refuse")]
    assert run("verify", tmp_path / "small") == (0, {"ok": True, "problems": []})


def test_every_folder_is_read_before_anything_is_added(
    shelf: Path, tmp_path: Path, zoo: dict[str, Path], run: Command
) -> None:
    before = tree(shelf)
    (zoo["b-y"] / "adapter_model.safetensors").write_bytes(b"cut off")
    code, document = run("add", shelf, zoo["a-x"], tmp_path / "absent", zoo["a-y"], zoo["b-y"])
    assert (code, document["error"]["kind"], document["added"]) == (3, "adapter_format", [])
    assert "absent: cannot be read" in document["error"]["message"]
    assert "b-y: " in document["error"]["message"]
    assert tree(shelf) == before
    other = write_peft(tmp_path / "other", make_adapter(9, base="acme/other"))
    code, document = run("add", shelf, zoo["a-x"], other)
    assert (code, document["error"]["kind"], document["added"]) == (3, "base_mismatch", [])
    assert tree(shelf).keys() - {"lock"} == before.keys()


def test_what_was_added_before_a_fault_is_in_the_error_document(
    shelf: Path, zoo: dict[str, Path], run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Shelf.commit

    def full(self: Shelf, plan: Plan) -> str:
        if plan.report["task"] == "b-x":
            raise DiskError("cannot write: No space left on device")
        return commit(self, plan)

    monkeypatch.setattr(Shelf, "commit", full)
    code, document = run("add", shelf, *zoo.values())
    assert (code, document["error"]["kind"]) == (4, "disk")
    assert [d["task"] for d in document["added"]] == ["a-x", "a-y"]
    assert document["added"][-1]["head"] == run("ls", shelf)[1]["head"]
    assert list(run("route", shelf)[1]) == ["a-x", "a-y"]


def test_add_always_prints_one_document_of_one_form(
    shelf: Path, tmp_path: Path, zoo: dict[str, Path], run: Command
) -> None:
    many = list(zoo.values())
    for words in ([many[0]], many[1:], [many[0]], ["a=b=c"], [f"={many[0]}"], [tmp_path / "absent"]):
        for options in (["--dry-run"], []):
            code, document = run("add", shelf, *words, *options)
            assert isinstance(document["added"], list)
            assert ("error" in document) == (code != 0)
    assert run("add", tmp_path / "nowhere", many[0])[1].keys() == {"error", "added"}


def test_add_skip_existing_goes_on_after_an_interrupt(
    shelf: Path, tmp_path: Path, zoo: dict[str, Path], run: Command
) -> None:
    run("add", shelf, zoo["a-x"], zoo["a-y"])
    code, document = run("add", shelf, *zoo.values())
    assert (code, document["error"]["kind"]) == (2, "task_name")
    assert "'a-x', 'a-y'" in document["error"]["message"]
    assert "--skip-existing" in document["error"]["cure"]
    for added, skipped in ((["b-x", "b-y"], ["a-x", "a-y"]), ([], list(zoo))):
        code, document = run("add", shelf, *zoo.values(), "--skip-existing")
        assert (code, [d["task"] for d in document["added"]], document["skipped"]) == (0, added, skipped)
    assert "every task is already on the shelf" in run("add", shelf, zoo["a-x"], "--skip-existing", as_json=False)[1]
    before = tree(shelf)
    new = write_peft(tmp_path / "new", make_adapter(99))
    code, document = run("add", shelf, zoo["a-y"], f"a-x={new}", f"z={new}", "--skip-existing")
    assert (code, document["added"], tree(shelf)) == (2, [], before)
    assert "with another adapter: 'a-x'" in document["error"]["message"]
    assert "lorashelf update" in document["error"]["cure"]


def test_each_decision_is_printed_as_it_is_made(
    shelf: Path, zoo: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[str] = []
    commit = Shelf.commit

    def watched(self: Shelf, plan: Plan) -> str:
        printed.append(capsys.readouterr().out)
        return commit(self, plan)

    monkeypatch.setattr(Shelf, "commit", watched)
    with pytest.raises(SystemExit):
        main(["add", str(shelf), *map(str, zoo.values())])
    printed.append(capsys.readouterr().out)
    assert [text.partition(":")[0] for text in printed] == ["", *zoo]
    assert all(text.endswith("\n") for text in printed[1:])


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_decision_fits_the_terminal(
    shelf: Path, zoo: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    words = [f"{name}-{'長い名前' * 6}={path}" for name, path in zoo.items()]
    with pytest.raises(SystemExit):
        main(["add", str(shelf), *words])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(zoo)
    assert all(cells(line) <= width for line in lines)


def test_the_originals_are_named_once_and_only_where_they_help(
    tmp_path: Path, zoo: dict[str, Path], run: Command
) -> None:
    told = "keep the original adapters"
    for method, times in (("linear", 1), ("ties", 0)):
        run("init", tmp_path / method, "--slots", 1, "--policy", "kmerge", "--merge", method)
        for words, expected in (([*zoo.values(), "--dry-run"], 0), ([zoo["a-x"]], 0), (list(zoo.values())[1:], times)):
            assert run("add", tmp_path / method, *words)[0] == 0
            assert run.stderr.count(told) == expected
        slot = run("ls", tmp_path / method)[1]["slots"][0]
        document = run("remove", tmp_path / method, "b-y", "--adapter", zoo["b-y"])[1]
        assert (slot["average"] is not None, document["removed"]) == ((True, "average") if times else (False, "route"))


@pytest.mark.parametrize("room", [["--bytes", "1MB"], ["--slots", 1, "--policy", "kmerge"]])
def test_of_an_adapter_that_is_only_routed_no_original_is_needed(
    tmp_path: Path, zoo: dict[str, Path], run: Command, room: list[object]
) -> None:
    run("init", tmp_path / "s", *room)
    run("add", tmp_path / "s", zoo["a-x"])
    document = run("add", tmp_path / "s", f"again={zoo['a-x']}")[1]
    assert [d["decision"] for d in document["added"]] == ["fold"]
    assert "keep the original adapters" not in run.stderr


@pytest.mark.parametrize(("method", "grows"), [("linear", False), ("ties", False), ("dare_linear", True)])
def test_a_merge_that_outgrows_its_members_is_reported(
    tmp_path: Path, zoo: dict[str, Path], run: Command, method: str, grows: bool
) -> None:
    run("init", tmp_path / "s", "--slots", 1, "--policy", "kmerge", "--merge", method, "--restore-norm")
    document = run("add", tmp_path / "s", *zoo.values())[1]
    ratios = [d["norm_ratio"] for d in document["added"][1:]]
    assert (ratios[-1] > 4) is grows
    assert run.stderr.count("it grows with every fold of this merge method") == grows
    assert "norm_ratio" not in document["added"][0]


def written(folder: Path, adapters: list[Adapter]) -> list[Path]:
    """PEFT folders of adapters."""
    return [write_peft(folder / f"a-{i}", adapter) for i, adapter in enumerate(adapters)]


@pytest.mark.parametrize(("method", "adds"), [("linear", True), ("ties", False), ("svd", False)])
@pytest.mark.parametrize("command", ["add", "merge", "cluster"])
def test_a_shared_initialisation_that_a_merge_adds_up_is_reported(
    tmp_path: Path, run: Command, zoo: dict[str, Path], command: str, method: str, adds: bool
) -> None:
    for name, adapters, alike in (
        ("same", written(tmp_path / "same", sharing_init(3)), True),
        ("own", list(zoo.values()), False),
    ):
        output = tmp_path / f"{command}-{name}"
        if command == "add":
            run("init", output, "--slots", 1, "--policy", "kmerge", "--merge", method)
            document = run("add", output, *adapters)[1]
            starts = [d["init_similarity"] for d in document["added"] if "init_similarity" in d]
            assert len(starts) == (len(adapters) - 1) * adds
            assert all((start > 0.9) is alike for start in starts)
        elif command == "merge":
            document = run("merge", *adapters, "-o", output, "--method", method)[1]
            assert ("init_similarity" in document) is adds
        else:
            words = ["--slots", 1, "--method", "single", "--merge", method]
            document = run("cluster", *adapters, "-o", output, *words)[1]
            assert ("init_similarity" in document) is adds
        assert run.stderr.count("share an initialisation") == (adds and alike)
        assert "it grows with every fold" not in run.stderr


def test_some_adapters_that_share_an_initialisation_among_others_are_reported(
    tmp_path: Path, zoo: dict[str, Path], run: Command
) -> None:
    mixed = [*written(tmp_path / "same", sharing_init(3)), *list(zoo.values())[:3]]
    run("merge", *mixed, "-o", tmp_path / "m", "--method", "linear")
    assert run.stderr.count("share an initialisation") == 1
    run("cluster", *mixed, "-o", tmp_path / "c", "--slots", 6, "--method", "agglomerative", "--merge", "linear")
    assert "share an initialisation" not in run.stderr


def test_slots_that_share_an_initialisation_are_one_notice(tmp_path: Path, run: Command) -> None:
    adapters = written(tmp_path / "same", sharing_init(4))
    run("cluster", *adapters, "-o", tmp_path / "c", "--slots", 2, "--method", "random", "--merge", "linear")
    assert run.stderr.count("slot 0, slot 1: adapters share an initialisation") == 1
    assert run.stderr.count("share an initialisation") == 1


def test_plain_files_among_the_folders_are_passed_over(
    shelf: Path, tmp_path: Path, zoo: dict[str, Path], run: Command
) -> None:
    (tmp_path / "zoo" / "README.md").write_text("about")
    given = sorted((tmp_path / "zoo").iterdir())
    assert run("add", shelf, *given)[0] == 0
    assert "README.md: ignored" in run.stderr
    assert sorted(run("route", shelf)[1]) == sorted(zoo)
    for words in (["compare"], ["plan"], ["merge", "--method", "svd", "-o", tmp_path / "m"]):
        assert run(words[0], *given, *words[1:])[0] == 0
    code, document = run("add", shelf, tmp_path / "zoo" / "README.md")
    assert (code, document["error"]["kind"]) == (3, "adapter_format")
    assert run("add", shelf, f"readme={tmp_path / 'zoo' / 'README.md'}", zoo["a-x"], "--dry-run")[0] == 3


def test_a_refusal_is_exit_4_with_no_slot_and_the_head_unchanged(
    tmp_path: Path, zoo: dict[str, Path], run: Command
) -> None:
    run("init", tmp_path / "tiny", "--slots", 2, "--bytes", 3000)
    before = tree(tmp_path / "tiny")
    code, document = run("add", tmp_path / "tiny", zoo["a-x"])
    assert (code, document["error"]["kind"]) == (4, "refused")
    (item,) = document["added"]
    assert (item["decision"], item["slot"]) == ("refuse", None)
    assert item["reason"] in document["error"]["message"]
    assert re.fullmatch(
        r"no slot can be opened, and none can be folded into; the shelf would take \d+ bytes, "
        r"the budget is 3000; give --bytes \d+, by lorashelf set SHELF .*",
        item["reason"],
    )
    assert {k: v for k, v in tree(tmp_path / "tiny").items() if k != "lock"} == before


def test_dry_run_changes_nothing_and_goes_on_from_its_own_plans(
    shelf: Path, zoo: dict[str, Path], run: Command
) -> None:
    before = tree(shelf)
    code, planned = run("add", shelf, *zoo.values(), "--dry-run")
    assert code == 0
    assert tree(shelf) == before
    assert [d["head"] for d in planned["added"]] == [None] * 4
    code, done = run("add", shelf, *zoo.values())
    for dry, real in zip(planned["added"], done["added"], strict=True):
        assert dry | {"head": "", "scores": {}} == real | {"head": "", "scores": {}}
        assert dry["scores"] == pytest.approx(real["scores"], abs=1e-6)


def test_route_prints_the_folder_that_serves_a_task(shelf: Path, zoo: dict[str, Path], run: Command) -> None:
    run("add", shelf, zoo["a-x"])
    code, answer = run("route", shelf, "a-x")
    assert code == 0
    assert set(answer) == {"task", "slot", "path", "members"}
    assert Path(answer["path"]).is_absolute()
    assert_same_delta(read_adapter(answer["path"]), read_adapter(zoo["a-x"]))
    assert run("route", shelf)[1] == {"a-x": answer}
    assert run("route", shelf, "a-x", as_json=False)[1].strip() == answer["path"]


@pytest.mark.parametrize("name", [":id:-en", ":cat:", "[bold]x"])
def test_a_name_is_printed_as_it_is(tmp_path: Path, run: Command, name: str) -> None:
    shelf = tmp_path / f"{name}.shelf"
    run("init", shelf, "--slots", 1)
    assert run("add", shelf, write_peft(tmp_path / "one"), "--task", name)[0] == 0
    path = run("route", shelf, name, as_json=False)[1]
    assert (Path(path.rstrip("\n")) / "adapter_model.safetensors").is_file()
    for command in ("route", "ls", "log"):
        assert name in run(command, shelf, as_json=False)[1]


def test_an_unknown_task_names_the_nearest(shelf: Path, zoo: dict[str, Path], run: Command) -> None:
    run("add", shelf, zoo["a-x"])
    code, document = run("route", shelf, "a-z")
    assert code == 2
    assert "a-x" in document["error"]["cure"]
    assert document["error"]["message"] in run.stderr


def test_ls_counts_slots_tasks_and_bytes(shelf: Path, zoo: dict[str, Path], run: Command) -> None:
    run("add", shelf, *zoo.values())
    code, listing = run("ls", shelf)
    assert code == 0
    assert listing["tasks"] == 4
    assert listing["bytes"] == sum(len(data) for data in tree(shelf).values())
    assert {"slot", "members", "merged", "path", "rank", "bytes"} <= set(listing["slots"][0])
    assert {"slots", "bytes"} <= set(listing["budget"])
    assert listing["head"] == (shelf / "HEAD").read_text().strip()
    assert listing["adapters"] == 4
    text = run("ls", shelf, as_json=False)[1]
    assert "4 adapters would need" in text
    run("remove", shelf, "b-y")
    assert "4 adapters (3 tasks routed) would need" in run("ls", shelf, as_json=False)[1]


@pytest.mark.parametrize("policy", ["kmerge", "all"])
def test_ls_compares_files_with_files_and_counts_an_adapter_once(
    tmp_path: Path, zoo: dict[str, Path], run: Command, policy: str
) -> None:
    shelf = tmp_path / "s.shelf"
    run("init", shelf, "--slots", 2, "--policy", policy)
    for name, filled in (("a-x", 1), ("a-y", 2), ("b-x", 2), ("b-y", 2)):
        assert run("add", shelf, zoo[name])[0] == 0
        listing = run("ls", shelf)[1]
        held = sum(slot["bytes"] for slot in listing["slots"])
        assert len(listing["slots"]) == filled
        assert listing["adapters"] == listing["tasks"]
        apart = held * listing["tasks"] / filled  # all are of one size; a config says more or less
        assert listing["adapter_bytes"] == (held if listing["tasks"] == filled else pytest.approx(apart, rel=0.01))
    (Path(listing["slots"][0]["path"]) / "adapter_model.safetensors").write_bytes(b"")
    assert run("ls", shelf)[1]["adapters"] == 4
    assert run("verify", shelf)[0] == 4


def test_update_replaces_alone_and_in_a_shared_slot(
    shelf: Path, tmp_path: Path, zoo: dict[str, Path], run: Command
) -> None:
    run("add", shelf, zoo["a-x"], zoo["a-y"], zoo["b-x"])
    new = write_peft(tmp_path / "new", make_adapter(99))
    shared = next(s for s in run("ls", shelf)[1]["slots"] if len(s["members"]) == 2)
    task, other = shared["members"]
    code, document = run("update", shelf, task, new)
    assert code == 4
    assert "--was" in document["error"]["cure"]
    code, document = run("update", shelf, task, new, "--was", zoo[other])
    assert code == 4
    code, document = run("update", shelf, task, new, "--was", zoo[task])
    assert code == 0
    assert document["slot"] == shared["slot"]
    alone = next(s for s in run("ls", shelf)[1]["slots"] if len(s["members"]) == 1)
    before = tree(shelf)
    code, document = run("update", shelf, alone["members"][0], new, "--was", zoo[task])
    assert (code, "this is not the adapter of" in document["error"]["message"]) == (4, True)
    assert tree(shelf) == before
    assert run("update", shelf, alone["members"][0], new)[0] == 0
    assert_same_delta(read_adapter(run("route", shelf, alone["members"][0])[1]["path"]), make_adapter(99))


def test_remove_says_how_far_it_went(shelf: Path, zoo: dict[str, Path], run: Command) -> None:
    run("add", shelf, *zoo.values())
    slots = run("ls", shelf)[1]["slots"]
    big = max(slots, key=lambda s: len(s["members"]))
    first, second, *_ = big["members"]
    code, document = run("remove", shelf, first)
    assert (code, document["removed"]) == (0, "route")
    assert "give the original with --adapter ADAPTER, after an undo, to take it out" in document["reason"]
    assert run("ls", shelf)[1]["adapters"] == 4  # it is averaged in all the same
    assert run("undo", shelf)[0] == 0
    assert run("remove", shelf, first, "--adapter", zoo[first])[1]["removed"] == "average"
    code, document = run("remove", shelf, second, "--adapter", zoo[second])
    assert code == 0
    for task in run("route", shelf)[1]:
        last = run("remove", shelf, task)[1]
    assert last["removed"] == "slot"
    assert run("ls", shelf)[1]["slots"] == []
    assert run("verify", shelf)[0] == 0


def test_remove_with_another_adapter_is_refused(shelf: Path, zoo: dict[str, Path], run: Command) -> None:
    run("add", shelf, *zoo.values())
    before = tree(shelf)
    code, document = run("remove", shelf, "a-x", "--adapter", zoo["b-y"])
    assert code == 4
    assert "digest" in document["error"]["message"]
    assert tree(shelf) == before


def test_undo_and_redo_tell_what_they_did_and_the_log_where_they_went(
    shelf: Path, zoo: dict[str, Path], run: Command
) -> None:
    run("add", shelf, zoo["a-x"], zoo["b-x"])
    full = run("ls", shelf)[1]["slots"]
    code, undone = run("undo", shelf)
    assert code == 0
    assert (undone["changed"], undone["left"], undone["returned"]) == (["b-x"], ["b-x"], [])
    assert (undone["undo"], undone["redo"]) == (0, 1)
    code, redone = run("redo", shelf)
    assert code == 0
    assert (redone["changed"], redone["left"], redone["returned"]) == (["b-x"], [], ["b-x"])
    assert (redone["undo"], redone["redo"]) == (1, 0)
    assert run("ls", shelf)[1]["slots"] == full
    log = run("log", shelf)[1]
    assert [entry["operation"] for entry in log] == ["init", "add", "add", "undo", "redo"]
    assert [entry.get("to") for entry in log[3:]] == [log[1]["id"], log[2]["id"]] == [undone["to"], redone["to"]]
    rows = [text.split() for text in run("log", shelf, as_json=False)[1].splitlines()]
    assert [[row[0], row[2], row[-2]] for row in rows[-2:]] == [["#3", "undo", "#1"], ["#4", "redo", "#2"]]
    assert run("redo", shelf)[0] == 4
    text = run("undo", shelf, as_json=False)[1]
    assert f"at #1 (add a-x, {undone['to'][:15]}…); left: b-x; 0 more to undo, 1 to redo" in text
    assert "back: b-x; 1 more to undo, 0 to redo" in run("redo", shelf, as_json=False)[1]


def test_undo_says_which_tasks_are_served_otherwise(
    shelf: Path, tmp_path: Path, zoo: dict[str, Path], run: Command
) -> None:
    run("add", shelf, zoo["a-x"], zoo["a-y"])
    run("update", shelf, "a-x", write_peft(tmp_path / "new", make_adapter(99)))
    document = run("undo", shelf)[1]
    assert (document["changed"], document["slots"]) == (["a-x"], [0])
    folded = run("add", shelf, zoo["b-x"])[1]["added"][0]
    document = run("undo", shelf)[1]
    assert document["changed"] == sorted(folded["members"])  # who shares the slot is served as before again
    assert document["slots"] == [folded["slot"]]
    text = run("redo", shelf, as_json=False)[1]
    assert f"back: b-x; changed: {', '.join(t for t in document['changed'] if t != 'b-x')};" in text


def test_undo_to_a_state_that_is_not_kept_is_refused(shelf: Path, zoo: dict[str, Path], run: Command) -> None:
    first = (shelf / "HEAD").read_text().strip()
    run("add", shelf, *zoo.values())
    code, document = run("undo", shelf, "--to", first)
    assert code == 2
    assert document["error"]["kind"] == "unknown_name"


def test_cluster_writes_a_shelf_and_numbers_blocks_by_their_first_task(
    tmp_path: Path, zoo: dict[str, Path], run: Command
) -> None:
    output = tmp_path / "c.shelf"
    code, document = run("cluster", *zoo.values(), "-o", output, "--slots", 2, "--method", "random", "--seed", 3)
    assert code == 0
    assert {"partition", "slots", "method", "seed", "head", "evaluations"} <= set(document)
    assert document["partition"]["a-x"] == 0
    assert sorted(document["partition"]) == sorted(zoo)
    assert document["evaluations"] is None
    assert Path(document["slots"][0]["path"]).is_dir()
    assert run("verify", output)[0] == 0
    before = tree(tmp_path)
    assert run("cluster", *zoo.values(), "-o", output, "--slots", 2, "--method", "random")[0] == 4
    assert tree(tmp_path) == before


def test_a_failed_cluster_leaves_nothing(tmp_path: Path, zoo: dict[str, Path], run: Command) -> None:
    before = tree(tmp_path)
    words = [*zoo.values(), "-o", tmp_path / "c", "--slots", 2, "--method", "random"]
    code, document = run("cluster", *words, "--bytes", 2000)
    assert code == 4
    assert document["error"]["where"] == str(tmp_path / "c")
    assert document["error"]["cure"].startswith("give --bytes")
    assert tree(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["zoo"]


def test_compare_show_plan_and_threshold(tmp_path: Path, zoo: dict[str, Path], run: Command) -> None:
    code, document = run("compare", *zoo.values())
    assert (code, document["names"], document["metric"]) == (0, list(zoo), "cosine")
    assert [row[i] for i, row in enumerate(document["matrix"])] == pytest.approx([1.0] * 4)
    code, document = run("show", zoo["a-x"])
    assert list(document["energy"].values())[-1] == pytest.approx(1.0)
    assert len(document["modules"]) == 4
    code, rows = run("plan", *zoo.values(), "--slots", "1..5")
    assert [row["slots"] for row in rows] == [1, 2, 3, 4]  # from there on every adapter has its own
    assert rows[3]["storage"] == pytest.approx(1.0)
    assert rows[0]["similarity_between"] is None
    code, document = run("threshold", tmp_path / "zoo")
    assert (code, document["adapters"]) == (0, 4)
    assert (
        run("init", tmp_path / "h.shelf", "--slots", 2, "--held-out", tmp_path / "zoo")[1]["threshold"]
        == document["threshold"]
    )


def test_plan_forecasts_what_cluster_then_does(tmp_path: Path, zoo: dict[str, Path], run: Command) -> None:
    row = run("plan", *zoo.values(), "--slots", "2")[1][0]
    document = run("cluster", *zoo.values(), "-o", tmp_path / "c", "--slots", 2, "--method", "agglomerative")[1]
    assert sorted(row["blocks"]) == sorted(slot["members"] for slot in document["slots"])
    assert row["bytes"] == sum(slot["bytes"] for slot in document["slots"])


def test_compare_draws_a_heat_map(tmp_path: Path, zoo: dict[str, Path], run: Command) -> None:
    for suffix in ("png", "svg"):
        assert run("compare", *zoo.values(), "--plot", tmp_path / f"map.{suffix}")[0] == 0
        assert (tmp_path / f"map.{suffix}").stat().st_size > 1000
    assert run("compare", *zoo.values(), "--plot", tmp_path / "map.xyz")[0] == 2


def test_merge_writes_a_folder(tmp_path: Path, zoo: dict[str, Path], run: Command) -> None:
    words = [*zoo.values(), "-o", tmp_path / "m", "--method", "ties", "-p", "density=0.3", "--dtype", "f16"]
    code, document = run("merge", *words)
    assert (code, document["dtype"]) == (0, "f16")
    assert read_adapter(tmp_path / "m").dtype == "f16"
    assert run("merge", *words)[0] == 2  # never over an existing folder
    assert run("merge", *zoo.values(), "-o", tmp_path / "n", "--method", "tise")[0] == 2
    assert run("merge", *zoo.values(), "-o", tmp_path / "n", "--method", "ties", "-p", "denisty=1")[0] == 2
    assert not (tmp_path / "n").exists()


def test_task_file_is_stored_with_the_task(shelf: Path, tmp_path: Path, zoo: dict[str, Path], run: Command) -> None:
    (tmp_path / "task.toml").write_text(
        'type = "gec"\nlanguage = "de"\nprompt = "Mend:"\nmetric = "f0.5"\nmax_new_tokens = 96\n'
    )
    assert run("add", shelf, zoo["a-x"], "--task-file", tmp_path / "task.toml")[0] == 0
    manifest = unfolded(shelf)
    assert manifest["tasks"]["a-x"] | {"digest": ""} == {
        "type": "gec", "language": "de", "prompt": "Mend:", "metric": "f0.5", "max_new_tokens": 96, "digest": "",
    }  # fmt: skip
    (tmp_path / "task.toml").write_text('promt = "x"\nmax_new_tokens = "9"\n')
    code, document = run("add", shelf, zoo["a-y"], "--task-file", tmp_path / "task.toml")
    assert code == 2
    assert "promt" in document["error"]["message"]
    assert "max_new_tokens" in document["error"]["message"]


def test_the_same_adapter_again_is_only_routed(shelf: Path, zoo: dict[str, Path], run: Command) -> None:
    run("add", shelf, zoo["a-x"])
    code, document = run("add", shelf, f"copy={zoo['a-x']}")
    (item,) = document["added"]
    assert (code, item["decision"], item["slot"], item["merged"]) == (0, "fold", 0, False)
    assert run("ls", shelf)[1]["adapters"] == 1
    assert run("remove", shelf, "a-x", "--adapter", zoo["a-x"])[1]["removed"] == "route"
    assert run("route", shelf, "copy")[0] == 0


@pytest.mark.parametrize(
    "words", [["nonsense"], ["init"], ["init", "x", "--slots", "many"], ["add", "x", "y", "--no-such-option"]]
)
def test_usage_errors_are_exit_2_with_a_document(words: list[str], run: Command) -> None:
    code, document = run(*words)
    assert code == 2
    assert document["error"]["kind"] == "usage"


def test_a_path_without_a_shelf(tmp_path: Path, run: Command) -> None:
    code, document = run("ls", tmp_path / "nowhere")
    assert code == 4
    assert "init" in document["error"]["cure"]


def test_hub_ids_come_from_the_local_cache(
    shelf: Path, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--acme--tiny-gec"
    commit = "0123456789abcdef0123456789abcdef01234567"
    write_peft(repository / "snapshots" / commit, make_adapter(5))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.chdir(tmp_path)
    code, document = run("add", shelf, "acme/tiny-gec")
    assert (code, document["added"][0]["task"]) == (0, "tiny-gec")
    code, document = run("add", shelf, "acme/not-there")
    assert code == 3
    assert "cache" in document["error"]["message"]


def test_a_command_is_found_in_the_module_that_is_imported_for_it() -> None:
    from lorashelf.cli.app import application

    def names(*words: str) -> set[str]:
        app = application(words)
        commands = {info.name or info.callback.__name__ for info in app.registered_commands}
        return commands | {str(group.typer_instance.info.name) for group in app.registered_groups}

    assert names() == {command for commands in MODULES.values() for command in commands}
    for commands in MODULES.values():
        for command in commands:
            assert names(command) == names("--", command) == set(commands)


def test_the_list_of_commands_is_that_of_their_docstrings() -> None:
    import typer

    from lorashelf.cli.app import SUMMARIES, application

    for name, command in typer.main.get_command(application()).commands.items():
        assert SUMMARIES[name] == " ".join(str(command.help).split("\n\n")[0].split())


def test_the_list_of_commands_imports_none() -> None:
    code = (
        "from lorashelf.cli import main, sys\ntry: main(['--help'])\nfinally: print('lorashelf.shelf' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("False\n")


def test_every_command_has_an_example_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^│ (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert len(commands) == sum(map(len, MODULES.values()))
    for command in commands:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"lorashelf {command}" in capsys.readouterr().out


@pytest.mark.parametrize("second", ["one=", "a\tb=", "../x="])
def test_names_are_looked_at_before_anything_is_added(
    shelf: Path, zoo: dict[str, Path], run: Command, second: str
) -> None:
    head = (shelf / "HEAD").read_text()
    code, document = run("add", shelf, f"one={zoo['a-x']}", f"{second}{zoo['a-y']}")
    assert (code, document["error"]["kind"]) == (2, "task_name")
    assert (shelf / "HEAD").read_text() == head


def test_interrupted_is_130_with_a_document(
    shelf: Path, zoo: dict[str, Path], run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lorashelf.cli.filling

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lorashelf.cli.filling, "plan_add", interrupt)
    code, document = run("add", shelf, zoo["a-x"])
    assert (code, document["error"]["kind"]) == (130, "interrupted")
    assert document["added"] == []


@pytest.mark.parametrize(
    ("words", "unread", "code"),
    [
        ("ls nowhere --json", "stdout", 141),
        ("ls nowhere", "stderr", 141),
        ("nonsense", "stderr", 141),
        ("--help", "stdout", 141),
        ("ls nowhere", "stdout", 4),  # nothing is said there
    ],
)
def test_a_reader_that_went_away_is_141_without_a_traceback(tmp_path: Path, words: str, unread: str, code: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    out, err = ((writer if name == unread else subprocess.PIPE) for name in ("stdout", "stderr"))
    command = [sys.executable, "-m", "lorashelf", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, text=True, check=False, stdout=out, stderr=err)
    os.close(writer)
    assert done.returncode == code
    assert "Traceback" not in f"{done.stdout}{done.stderr}"


def test_a_bar_shows_a_name_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Meter(2) as meter:
        meter.at(1, "[/x] :cat:", force=True)
    assert "[/x] :cat:" in terminal.getvalue()


def test_a_path_of_two_parts_without_the_hub_s_library(
    tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, document = run("show", "adapters/absent")
    assert code == 2
    assert document["error"]["cure"] == "give an existing folder, or pip install 'lorashelf[llm]'"


def test_version(run: Command) -> None:
    assert re.fullmatch(r"lorashelf \d+\.\d+\.\d+\n", run("--version", as_json=False)[1])


@pytest.mark.parametrize("where", ["argument", "name", "option", "task file", "output"])
def test_home_is_found_in_every_path(
    shelf: Path, tmp_path: Path, zoo: dict[str, Path], run: Command, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "task.toml").write_text('prompt = "Mend:"\n')
    words: dict[str, list[object]] = {
        "argument": ["add", "~/my.shelf", "~/zoo/a-x"],
        "name": ["add", shelf, "mail=~/zoo/a-x"],
        "option": ["init", "new", "--slots", 2, "--held-out=~/zoo"],
        "task file": ["add", shelf, zoo["a-x"], "--task-file=~/task.toml"],
        "output": ["merge", zoo["a-x"], zoo["a-y"], "--method", "svd", "--output=~/merged"],
    }
    monkeypatch.chdir(tmp_path)
    assert run(*words[where])[0] == 0
    assert not (tmp_path / "~").exists()
    assert (where == "output") == (tmp_path / "merged").exists()


def test_home_is_found_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_adapter(make_adapter(1), "~/one")
    made = Shelf.create("~/s", new_settings(2))
    made.commit(plan_add(made.snapshot(), read_adapter("~/one"), "one"))
    one = {"a": read_adapter("~/one")}
    Shelf.create_with("~/c", new_settings(2), lambda s: plan_cluster(s, one, cluster(one, 1, method="single")))
    assert sorted(Shelf("~/s").snapshot().manifest.tasks) == ["one"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "one", "s"]


@pytest.mark.parametrize("command", ["init", "cluster"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--policy", "kmerge", "--threshold", "0.1"], "omit --threshold"),
        (["--policy", "half", "--threshold", "auto"], "omit --threshold"),
        (["--policy", "oracle", "--held-out", "zoo"], "omit --held-out"),
        (["--held-out", "zoo", "--threshold", "auto"], "exclude each other"),
        (["--held-out", "zoo", "--threshold", "0.1"], "exclude each other"),
        (["--base-name", ""], "base"),
        (["--base-alias", ""], "base"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    tmp_path: Path, zoo: dict[str, Path], run: Command, monkeypatch: pytest.MonkeyPatch,
    command: str, options: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = ["s"] if command == "init" else [*zoo.values(), "-o", "s", "--method", "random"]
    code, document = run(command, *words, "--slots", 2, *options)
    assert (code, document["error"]["kind"]) == (2, "usage")
    assert said in f"{document['error']['message']}; {document['error']['cure']}"
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--type", ""], "problem type ''"),
        (["--type", " "], "problem type ' '"),
    ],
)
def test_add_refuses_what_it_would_ignore(
    shelf: Path, zoo: dict[str, Path], run: Command, words: list[str], said: str
) -> None:
    before = tree(shelf)
    code, document = run("add", shelf, zoo["a-x"], *words)
    assert (code, document["added"]) == (2, [])
    assert said in document["error"]["message"]
    code, document = run("add", shelf, f"one={zoo['a-x']}", "--task", "two")
    assert (code, document["error"]["kind"]) == (2, "usage")
    assert tree(shelf).keys() - {"lock"} == before.keys()


@pytest.mark.parametrize("command", ["merge", "plan", "cluster", "add"])
def test_adapters_of_several_bases_are_all_named_with_a_cure_that_works(
    tmp_path: Path, shelf: Path, run: Command, command: str
) -> None:
    bases = {"a": "acme/one", "b": "acme/two", "c": "acme/two", "d": "acme/three"}
    folders = [write_peft(tmp_path / "in" / name, make_adapter(1, base=base)) for name, base in bases.items()]
    words: dict[str, list[object]] = {
        "merge": [*folders, "-o", tmp_path / "m", "--method", "svd"],
        "plan": folders,
        "cluster": [*folders, "-o", tmp_path / "c", "--slots", 2, "--method", "random"],
        "add": [shelf, *folders],
    }
    code, document = run(command, *words[command])
    assert (code, document["error"]["kind"]) == (3, "base_mismatch")
    for line in ("trained on acme/one: a\n", "trained on acme/two: b, c\n", "trained on acme/three: d\n"):
        assert line in f"{document['error']['message']}\n"
    assert "--assume-base" in document["error"]["cure"]
    assert run(command, *words[command], "--assume-base")[0] == 0


def test_one_is_singular(tmp_path: Path, zoo: dict[str, Path], run: Command) -> None:
    assert "1 free slot, " in run("init", tmp_path / "s", "--slots", 1, as_json=False)[1]
    run("add", tmp_path / "s", zoo["a-x"])
    text = run("ls", tmp_path / "s", as_json=False)[1]
    assert "1 adapter would need" in text
    assert "with 1 state of history" in text
    assert "1 of 1 slot filled" in text
    run("add", tmp_path / "s", zoo["a-y"])
    assert "2 adapters would need" in run("ls", tmp_path / "s", as_json=False)[1]
    code, document = run("threshold", zoo["a-x"].parent / "a-x")
    assert "0 adapters here" in document["error"]["message"]
    code, document = run("merge", zoo["a-x"], "-o", tmp_path / "m", "--method", "svd", "--weights", "1,2")
    assert (code, document["error"]["message"]) == (2, "2 weights for 1 adapter")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train tasks -o out --validation-limit 0 --patience 3", "--patience"),
        ("train tasks -o out --steps 5 --epochs 2", "steps and epochs"),
        ("demo --no-llm --examples tasks", "--examples"),
        ("cluster zoo/a-x -o c --slots 1 --method single --iterations 200", "--iterations"),
        ("compare zoo/a-x zoo/a-y --plot a.jpg", "a.jpg"),
        ("compare zoo/a-x zoo/a-y --plot nowhere/a.png", "nowhere"),
    ],
)
def test_no_option_is_ignored(
    tmp_path: Path, zoo: dict[str, Path], run: Command, monkeypatch: pytest.MonkeyPatch, words: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    code, text = run(*words.split(), as_json=False)
    assert (code, text) == (2, "")
    assert said in run.stderr
    assert tree(tmp_path) == before


def test_a_folder_of_task_files_that_holds_nothing_for_a_task_is_told(
    shelf: Path, tmp_path: Path, zoo: dict[str, Path], run: Command
) -> None:
    (tmp_path / "tasks" / "a-x").mkdir(parents=True)
    (tmp_path / "tasks" / "a-x" / "task.toml").write_text('prompt = "Mend:"\n')
    assert run("add", shelf, *zoo.values(), "--task-file", tmp_path / "tasks")[0] == 0
    assert "tasks has no task file for a-y, b-x, b-y\n" in run.stderr


EVERY = sorted({name for names in MODULES.values() for name in names} - {"demo", "bench"})  # neither has --json
WANTED: dict[str, list[str]] = {  # what each command wants, none of it there
    "init": ["no/such/zoo", "--slots", "2", "--held-out", "gone"],
    "add": ["gone", "gone"],
    "update": ["gone", "task", "gone"],
    "remove": ["gone", "task"],
    "set": ["gone", "task", "--prompt", "x"],
    "cluster": ["gone", "-o", "out", "--slots", "2", "--method", "random"],
    "compare": ["gone", "gone"],
    "merge": ["gone", "-o", "out", "--method", "svd"],
    "train": ["gone", "-o", "out"],
    "eval": ["gone", "--data", "gone"],
    "generate": ["gone", "task", "text"],
}


@pytest.mark.parametrize("command", EVERY)
@pytest.mark.parametrize("fault", ["nothing is there", "an unknown option", "an argument lacks"])
def test_a_fault_under_json_is_one_document_whatever_the_command(
    tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch, command: str, fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = WANTED.get(command, ["gone"])
    if fault == "an unknown option":
        words = [*words, "--no-such-option"]
    elif fault == "an argument lacks":
        words = []
    code, document = run(command, *words)
    assert code in (2, 3, 4, 5)
    error = document["error"]
    assert set(error) - {"faults", "cures"} == {"kind", "message", "where", "cure"}
    assert error["cure"]
    printed = f"lorashelf: {error['message']}\n"
    printed += f"  where: {error['where']}\n" if error["where"] else ""
    printed += "".join(f"  cure:  {line}\n" for line in error["cure"].splitlines())
    assert run.stderr.endswith(printed)
    assert len(error.get("cures", [])) == len(error.get("faults", []))
    assert list(tmp_path.iterdir()) == []


EMPTY_PATHS: dict[str, list[str]] = {
    "SHELF": ["ls", ""],
    "SHELF of add": ["add", "", "adapter"],
    "an output that is a folder": ["merge", "a", "-o", "", "--method", "svd"],
    "an output that is a shelf": ["cluster", "a", "-o", "", "--slots", "1", "--method", "single"],
    "an output that is training's": ["train", "a", "--output="],
    "data": ["eval", "x", "--data", ""],
    "a suite": ["bench", "run", ""],
    "a file": ["compare", "a", "--plot", ""],
}


@pytest.mark.parametrize("words", EMPTY_PATHS.values(), ids=EMPTY_PATHS)
def test_an_empty_path_is_not_the_current_folder(
    words: list[str], run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, document = run(*words)
    assert (code, document["error"]["kind"]) == (2, "usage")
    assert "the path is empty" in document["error"]["message"]
    assert document["error"]["cure"].startswith("give ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "mail="])
def test_an_empty_adapter_is_not_the_current_folder(
    text: str, shelf: Path, zoo: dict[str, Path], run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(zoo["a-x"])
    before = tree(shelf)
    code, document = run("add", shelf, text)
    assert (code, document["error"]["message"]) == (2, f"{text!r} does not name an adapter")
    assert tree(shelf) == before


def test_a_missing_option_says_what_it_takes(zoo: dict[str, Path], run: Command, tmp_path: Path) -> None:
    code, document = run("cluster", *zoo.values(), "-o", tmp_path / "c", "--slots", 2)
    assert (code, document["error"]["message"]) == (2, "Missing option '--method'.")
    assert all(method in document["error"]["cure"] for method in PARTITIONERS)


def test_undo_to_an_empty_id_is_refused(shelf: Path, zoo: dict[str, Path], run: Command) -> None:
    run("add", shelf, zoo["a-x"])
    before = tree(shelf)
    code, document = run("undo", shelf, "--to", "")
    assert (code, document["error"]["message"]) == (2, "the id of a kept manifest is empty")
    assert document["error"]["cure"] == "give its beginning: lorashelf log SHELF"
    assert tree(shelf) == before


@pytest.mark.parametrize(("option", "value"), [("--rank", "0"), ("--weights", "nan,1")])
def test_numbers_that_cannot_be_merged_with_have_a_cure(
    option: str, value: str, zoo: dict[str, Path], tmp_path: Path, run: Command
) -> None:
    words = [zoo["a-x"], zoo["a-y"], "-o", tmp_path / "m", "--method", "linear"]
    code, document = run("merge", *words, option, value)
    assert code == 2
    assert document["error"]["cure"]
    with pytest.raises(UsageError) as caught:
        merge([read_adapter(folder) for folder in words[:2]], [math.nan, 1.0], method="linear")
    assert caught.value.cure == "give finite numbers, one per adapter"
    with pytest.raises(UsageError) as caught:
        merge([read_adapter(folder) for folder in words[:2]], method="linear", rank=0)
    assert caught.value.cure == "give a rank of at least 1, or none for the method's default"
