"""compress and extract on the command line: documents, exit codes, and what they leave on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from command import Command
from factory import make_adapter, tree, write_peft
from lorashelf import norm, read_adapter
from lorashelf.lora.algebra import combine

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
