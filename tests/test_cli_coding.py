"""compress and extract on the command line: documents, exit codes, and what they leave on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command import Command
from factory import make_adapter, tree, write_peft
from lorashelf import BaseId, Factors, Shelf, norm, read_adapter
from lorashelf.formats.codecs import CODECS
from lorashelf.formats.coded.decoder import decode, inspect
from lorashelf.formats.coded.encoder import Encoder
from lorashelf.formats.coded.files import encode_within, read_coded, read_levels, write_coded
from lorashelf.lora.algebra import combine
from lorashelf.lora.quality import quality

ZOO = Path(__file__).parent.parent / "examples" / "zoo"


@pytest.fixture
def coded(tmp_path: Path, run: Command) -> Path:
    assert run("compress", ZOO / "gec-de", "-o", tmp_path / "a.lsc", "--percent", 5)[0] == 0
    return tmp_path / "a.lsc"


def test_compress_reports_what_the_file_is_worth(tmp_path: Path, run: Command) -> None:
    code, document = run("compress", ZOO / "gec-de", "-o", tmp_path / "a.lsc", "--bytes", "20kB")
    assert code == 0
    assert document["bytes"] == (tmp_path / "a.lsc").stat().st_size <= 20_000
    assert document["percent"] == pytest.approx(100 * document["bytes"] / (2 * read_adapter(ZOO / "gec-de").parameters))
    assert [sorted(level) for level in document["levels"]] == [
        ["bytes", "directions", "energy_kept", "percent", "predicted_quality"]
    ] * len(document["levels"])
    for name in ("bytes", "energy_kept", "predicted_quality"):
        values = [level[name] for level in document["levels"]]
        assert values == sorted(values)
        assert document[name] == values[-1]


def test_extract_writes_the_adapter_that_compress_coded(coded: Path, tmp_path: Path, run: Command) -> None:
    code, document = run("extract", coded, "-o", tmp_path / "back")
    assert code == 0
    x, y = read_adapter(ZOO / "gec-de"), read_adapter(tmp_path / "back")
    assert set(y.modules) == set(x.modules)
    assert (y.base, y.dtype) == (x.base, x.dtype)
    lost = norm(combine([x, y], [1, -1])) ** 2 / norm(x) ** 2
    assert 1 - document["energy_kept"] - 0.01 <= lost <= 1 - document["energy_kept"] + 0.1  # it is scaled up


def test_extract_takes_the_first_levels_alone(coded: Path, tmp_path: Path, run: Command) -> None:
    whole = run("extract", coded, "-o", tmp_path / "whole")[1]
    one = run("extract", coded, "-o", tmp_path / "one", "--levels", 1, "--dtype", "f32")[1]
    assert one["levels"] == whole["levels"][:1]
    assert read_adapter(tmp_path / "one").rank < read_adapter(tmp_path / "whole").rank
    assert read_adapter(tmp_path / "one").dtype == "f32"


def test_a_cut_file_gives_the_levels_before_the_cut_as_its_cure_says(coded: Path, tmp_path: Path, run: Command) -> None:
    count = len(run("extract", coded, "-o", tmp_path / "whole")[1]["levels"])
    coded.write_bytes(coded.read_bytes()[:-100])
    code, document = run("extract", coded, "-o", tmp_path / "back")
    assert code == 3
    assert f"level {count - 1}: truncated" in document["error"]["message"]
    assert "the levels before it can be used without it" in document["error"]["cure"]
    assert not (tmp_path / "back").exists()
    assert run("extract", coded, "-o", tmp_path / "back", "--levels", count - 1)[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of --bytes, --percent and --quality is needed"),
        (["--bytes", "20kB", "--percent", 5], "one of --bytes, --percent and --quality is needed"),
        (["--percent", 0], "--percent 0 is not above 0"),
        (["--percent", "nan"], "--percent nan is not above 0"),
        (["--quality", 1.5], "--quality 1.5 is not between 0 and 1"),
        (["--bytes", 20], "20 bytes are too few"),
        (["--quality", 1], "no level is fine enough"),
    ],
)
def test_a_request_that_cannot_be_met_changes_nothing(
    options: list[object], message: str, tmp_path: Path, run: Command
) -> None:
    folder = write_peft(tmp_path / "a", make_adapter())
    before = tree(tmp_path)
    code, document = run("compress", folder, "-o", tmp_path / "a.lsc", *options)
    assert code == 2
    assert message in document["error"]["message"]
    assert document["error"]["cure"]
    assert tree(tmp_path) == before


def test_neither_command_replaces_what_is_there(coded: Path, tmp_path: Path, run: Command) -> None:
    before = tree(tmp_path)
    assert run("compress", ZOO / "gec-de", "-o", coded, "--percent", 5)[0] == 2
    (tmp_path / "taken").mkdir()
    assert run("compress", ZOO / "gec-de", "-o", tmp_path / "taken", "--percent", 5)[0] == 2
    (tmp_path / "taken").rmdir()
    assert tree(tmp_path) == before
    assert run("extract", coded, "-o", ZOO / "gec-de")[0] == 2


@pytest.mark.parametrize("count", [0, 99])
def test_levels_that_are_not_there_are_refused(count: int, coded: Path, tmp_path: Path, run: Command) -> None:
    code, document = run("extract", coded, "-o", tmp_path / "back", "--levels", count)
    assert code == 2
    assert "give 1 to" in document["error"]["cure"]


def test_extract_refuses_a_dtype_that_is_not_stored(coded: Path, tmp_path: Path, run: Command) -> None:
    code, document = run("extract", coded, "-o", tmp_path / "x", "--dtype", "f8")
    assert (code, document["error"]["cure"]) == (2, "choose from f32, f16, bf16")
    assert not (tmp_path / "x").exists()


def test_extract_names_a_file_that_is_something_else(tmp_path: Path, run: Command) -> None:
    code, document = run("extract", ZOO / "gec-de" / "adapter_config.json", "-o", tmp_path / "back")
    assert code == 3
    assert "this is not a level" in document["error"]["message"]
    code, document = run("extract", ZOO / "gec-de", "-o", tmp_path / "back")
    assert code == 3
    assert "cannot be read" in document["error"]["message"]


def test_people_get_a_table(tmp_path: Path, run: Command) -> None:
    code, text = run("compress", ZOO / "gec-de", "-o", tmp_path / "a.lsc", "--quality", 0.9, as_json=False)
    assert code == 0
    assert "predicted quality" in text


# a coded file as an adapter -------------------------------------------------------------------------------------------


def stored(shelf: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in (shelf / "objects").iterdir())


def test_a_coded_file_is_stored_as_it_is(coded: Path, tmp_path: Path, run: Command) -> None:
    shelf = tmp_path / "a.shelf"
    written = run("extract", coded, "-o", tmp_path / "back")[1]
    assert run("init", shelf, "--bytes", "1MB")[0] == 0
    code, document = run("add", shelf, coded)
    assert code == 0
    assert "untrained" not in run.stderr  # modules of which nothing is coded are not
    assert [added["task"] for added in document["added"]] == ["a"]
    assert stored(shelf) == sorted(read_levels(coded))
    (slot,) = run("ls", shelf)[1]["slots"]
    assert (slot["percent"], slot["predicted_quality"]) == pytest.approx(
        (written["percent"], written["predicted_quality"])
    )
    assert Shelf(shelf).snapshot().adapter("a").digest == read_coded(coded).digest
    assert run("verify", shelf)[0] == 0


def test_fitted_gains_reach_the_shelf(tmp_path: Path, run: Command) -> None:
    x = read_adapter(ZOO / "gec-de")
    gains = dict.fromkeys(list(x.modules)[::2], 1.3)
    write_coded(encode_within(Encoder(x, gains), 100_000), tmp_path / "gec-de.lsc")
    assert run("init", tmp_path / "a.shelf", "--bytes", "1MB")[0] == 0
    assert run("add", tmp_path / "a.shelf", tmp_path / "gec-de.lsc")[0] == 0
    served = Shelf(tmp_path / "a.shelf").snapshot().adapter("gec-de")
    plain = decode(encode_within(Encoder(x), 100_000))
    for number, path in enumerate(list(x.modules)[:4]):
        factor = inner(served.modules[path], plain.modules[path]) / inner(plain.modules[path], plain.modules[path])
        assert factor == pytest.approx(1 if number % 2 else 1.3, rel=0.02)


def inner(x: Factors, y: Factors) -> float:
    return float(np.sum(x.delta() * y.delta()))


def test_a_coded_file_of_more_quality_than_asked_gives_its_first_levels(coded: Path) -> None:
    levels = read_levels(coded)
    qualities = [level.quality for level in inspect(levels)[2]]
    for count, wanted in enumerate(qualities, 1):
        found, error = CODECS["coded"].round_trip(decode(levels), wanted)
        assert CODECS["coded"].encode(found).levels == tuple(levels[:count])
        assert quality(1 - error**2) == pytest.approx(wanted)
    found, _ = CODECS["coded"].round_trip(decode(levels), 0.9999)
    assert CODECS["coded"].encode(found).levels == tuple(levels)


@pytest.mark.parametrize("change", [{"base": BaseId("other")}, {"dtype": "f32"}, {"config": {}}])
def test_what_the_levels_do_not_state_is_coded_anew(coded: Path, change: dict[str, Any]) -> None:
    given = replace(decode(read_levels(coded)), **change)
    found, _ = CODECS["coded"].round_trip(given, 0.9)
    assert {name: getattr(found, name) for name in change} == change
    assert not set(CODECS["coded"].encode(found).levels) & set(read_levels(coded))


def test_a_coded_file_is_an_adapter_like_any_other(coded: Path, tmp_path: Path, run: Command) -> None:
    shelf = tmp_path / "a.shelf"
    assert run("init", shelf, "--slots", "3")[0] == 0
    (tmp_path / "README").write_text("nothing to add")
    code, document = run("add", shelf, coded, f"other={ZOO / 'qa-en'}", tmp_path / "README")
    assert code == 0
    assert [added["task"] for added in document["added"]] == ["a", "other"]
    off = norm(combine([Shelf(shelf).snapshot().adapter("a"), read_coded(coded)], [1, -1]))
    assert off < 1e-3 * norm(read_coded(coded))  # rounded to f16
    assert run("update", shelf, "other", coded)[0] == 0
    assert run("show", coded)[1]["parameters"] == read_coded(coded).parameters
    code, document = run("compress", coded, "-o", tmp_path / "b.lsc", "--percent", 1)
    assert code == 2
    assert "a coded file already" in document["error"]["message"]
    coded.rename(tmp_path / "named")  # without the suffix, the first bytes tell
    assert run("show", tmp_path / "named")[0] == 0


def test_a_damaged_coded_file_is_named_and_nothing_is_added(coded: Path, tmp_path: Path, run: Command) -> None:
    shelf, content = tmp_path / "a.shelf", coded.read_bytes()
    assert run("init", shelf, "--bytes", "1MB")[0] == 0
    before = tree(shelf)
    (tmp_path / "cut.lsc").write_bytes(content[:-100])
    (tmp_path / "text.lsc").write_text("no level")
    (tmp_path / "empty.lsc").write_bytes(b"")
    code, document = run("add", shelf, coded, *(tmp_path / f"{name}.lsc" for name in ("cut", "text", "empty")))
    assert code == 3
    faults = document["error"]["faults"]
    assert [fault.partition(":")[0] for fault in faults] == ["cut", "text", "empty"]
    assert "truncated" in faults[0]
    assert "this is not a level" in faults[1]
    assert tree(shelf) == before


@pytest.mark.parametrize(
    "options", [["--bytes", "200kB", "--dtype", "bf16"], ["--slots", 2, "--encoding", "coded", "--dtype", "bf16"]]
)
def test_a_coded_file_that_is_coded_anew_states_what_it_keeps_of_the_first_original(
    options: list[Any], tmp_path: Path, run: Command
) -> None:
    low = run("compress", ZOO / "gec-de", "-o", tmp_path / "a.lsc", "--percent", 1)[1]["predicted_quality"]
    run("init", tmp_path / "s", *options, *(["--floor", 0.5] if "200kB" in options else []))
    assert run("add", tmp_path / "s", f"t={tmp_path / 'a.lsc'}")[0] == 0
    (slot,) = run("ls", tmp_path / "s")[1]["slots"]
    assert 0.9 * low < slot["predicted_quality"] <= low


def test_a_coded_file_below_the_floor_is_refused_with_its_quality(tmp_path: Path, run: Command) -> None:
    low = run("compress", ZOO / "gec-de", "-o", tmp_path / "a.lsc", "--percent", 1)[1]["predicted_quality"]
    run("init", tmp_path / "s", "--bytes", "200kB", "--floor", 0.9)
    before = {name: content for name, content in tree(tmp_path / "s").items() if name != "lock"}
    code, document = run("add", tmp_path / "s", f"t={tmp_path / 'a.lsc'}")
    assert code == 4
    assert f"below the floor of 0.9: t {low:.3f}" in document["error"]["message"]
    assert {name: content for name, content in tree(tmp_path / "s").items() if name != "lock"} == before
    assert run("pack", f"t={tmp_path / 'a.lsc'}", "-o", tmp_path / "p", "--bytes", "200kB", "--floor", 0.9)[0] == 4


def test_a_plan_states_shares_of_what_was_coded(coded: Path, run: Command) -> None:
    points = run("plan", f"t={coded}", "--coded")[1]["curve"]
    assert max(point["percent"] for point in points) == pytest.approx(5, rel=0.1)


def test_the_cure_of_a_quality_that_is_too_high_works(tmp_path: Path, run: Command) -> None:
    code, document = run("compress", ZOO / "gec-de", "-o", tmp_path / "a.lsc", "--quality", 1)
    assert code == 2
    most = document["error"]["cure"].removeprefix("give at most ")
    assert run("compress", ZOO / "gec-de", "-o", tmp_path / "a.lsc", "--quality", most)[0] == 0


def test_a_damaged_level_is_one_fault(coded: Path, run: Command) -> None:
    content = bytearray(coded.read_bytes())
    content[200] ^= 1
    coded.write_bytes(content)
    code, document = run("show", coded)
    assert code == 3
    assert "level 0: the bytes have changed" in document["error"]["message"]
    assert "level 1" not in document["error"]["message"]


def test_a_path_that_is_too_long_is_a_refused_adapter(run: Command) -> None:
    code, document = run("show", "a" * 300)
    assert code == 3
    assert "File name too long" in document["error"]["message"]


def test_readmes_beside_adapters_of_two_folders_do_not_share_a_task(tmp_path: Path, run: Command) -> None:
    run("init", tmp_path / "s", "--slots", 2)
    for i, group in enumerate(("a", "b")):
        write_peft(tmp_path / group / f"t-{i}", make_adapter(i))
        (tmp_path / group / "README.md").write_text("two groups")
    given = [path for group in ("a", "b") for path in sorted((tmp_path / group).iterdir())]
    code, document = run("add", tmp_path / "s", *given)
    assert code == 0, document
    assert [each["task"] for each in document["added"]] == ["t-0", "t-1"]
