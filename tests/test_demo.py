"""`lorashelf demo`, run as a user runs it, on the real adapters of examples/zoo."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorashelf import Shelf
from lorashelf.cli import main
from lorashelf.cli.demo import chance_purity, purity

ZOO = Path(__file__).parent.parent / "examples" / "zoo"


def test_all_slots_are_used_and_types_gather_for_nine_of_ten_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = []
    for seed in range(10):
        with pytest.raises(SystemExit) as end:
            main(["demo", "--zoo", str(ZOO), "--seed", str(seed), "-o", str(tmp_path / f"{seed}" / "demo.shelf")])
        assert end.value.code == 0
        found = re.search(r"online, K-Merge\+\+: purity ([\d.]+), by chance ([\d.]+)", capsys.readouterr().out)
        assert found
        slots = Shelf(tmp_path / f"{seed}" / "demo.shelf").snapshot().manifest.slots
        good.append(len(slots) == 5 and float(found[1]) >= float(found[2]) + 0.1)
    assert sum(good) >= 9


def test_the_story_is_told_from_arrival_to_undo(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "lorashelf", "demo", "--zoo", str(ZOO), "-o", str(tmp_path / "demo.shelf")]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    for part in (
        "opens slot",
        "joins slot",
        "threshold",
        "clustered offline",
        "similarity inside",
        "by chance",
        "undo",
    ):
        assert part in told
    assert "verify: ok" in told
    assert str(tmp_path / "demo.shelf") in told
    assert Shelf(tmp_path / "demo.shelf").verify() == []


def test_purity_of_blocks_by_hand() -> None:
    assert purity([["a-x", "a-y", "b-x"], ["b-y"]]) == 0.75
    assert purity([["a-x", "b-x"], ["a-y", "b-y"]]) == 0.5
    assert chance_purity([["a-x", "b-x"], ["a-y", "b-y"]], ["a-x", "b-x", "a-y", "b-y"], seed=0) == pytest.approx(
        2 / 3, abs=0.1
    )


def test_without_the_zoo_the_cure_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["demo", "--zoo", str(tmp_path / "nowhere")])
    assert end.value.code == 2
    assert "--zoo" in capsys.readouterr().err
