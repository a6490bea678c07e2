"""`lorashelf demo`, run as a user runs it, on the real adapters of examples/zoo."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from factory import make_adapter
from lorashelf import Factors, Shelf, similarity
from lorashelf.cli import demo, main
from lorashelf.cli.demo import chance_purity, purity
from lorashelf.cli.demo_coded import cosines

ZOO = Path(__file__).parent.parent / "examples" / "zoo"


@pytest.mark.long
def test_all_slots_are_used_and_types_gather_for_nine_of_ten_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = []
    monkeypatch.setattr(demo, "show_coded", lambda console, named: None)  # what comes first does not depend on the seed
    for seed in range(10):
        with pytest.raises(SystemExit) as end:
            main(
                [
                    "demo",
                    "--no-llm",
                    "--zoo",
                    str(ZOO),
                    "--seed",
                    str(seed),
                    "-o",
                    str(tmp_path / f"{seed}" / "demo.shelf"),
                ]
            )
        assert end.value.code == 0
        found = re.search(r"online, K-Merge\+\+: purity ([\d.]+), by chance ([\d.]+)", capsys.readouterr().out)
        assert found
        slots = Shelf(tmp_path / f"{seed}" / "demo.shelf").snapshot().manifest.slots
        good.append(len(slots) == 5 and float(found[1]) >= float(found[2]) + 0.1)
    assert sum(good) >= 9


def test_the_cosine_to_the_own_adapter_is_the_similarity_and_leaves_out_the_untrained() -> None:
    xs = [make_adapter(seed) for seed in range(2)]
    idle = xs[0].with_factors({p: Factors(f.a, 0 * f.b, f.scale) for p, f in xs[0].modules.items()})
    low = float(similarity([xs[1]], [xs[0]])[0, 0])
    served = {"a": xs[1], "b": xs[1], "idle": idle}
    assert cosines(served, {"a": xs[0], "b": xs[1], "idle": idle}) == f"{(1 + low) / 2:.3f} ({low:.3f})"
    assert cosines({"idle": idle}, {"idle": idle}) == "-"


@pytest.mark.long
def test_the_story_is_told_from_arrival_to_undo(tmp_path: Path) -> None:
    run = [
        sys.executable,
        "-m",
        "lorashelf",
        "demo",
        "--no-llm",
        "--zoo",
        str(ZOO),
        "-o",
        str(tmp_path / ":id: demo.shelf"),
    ]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    shares = re.findall(r"MB +([\d.]+) % +([\d.]+) \(([\d.]+)\) +([\d.]+) \(([\d.]+)\)", told)
    (five, *_), (one, predicted, _, coded, _) = [[float(number) for number in each] for each in shares]
    assert five < 100 * 5 / 31
    assert one < 100 / 31
    assert predicted > 0.9
    (merged,) = re.findall(r"serves a task to its own ΔW: ([\d.]+)", told)
    assert coded > 2 * float(merged)
    for part in (
        "coded into the bytes of 5 and of 1",
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
    assert str(tmp_path / ":id: demo.shelf") in told
    assert Shelf(tmp_path / ":id: demo.shelf").verify() == []


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


@pytest.mark.long
def test_the_second_half_on_a_real_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorashelf.cli import demo_model

    monkeypatch.setattr(demo_model, "DOZEN", ("qa-en", "qa-es", "tone-en", "tone-fr"))
    monkeypatch.setattr(demo_model, "SLOTS", 2)
    monkeypatch.setattr(demo_model, "ITERATIONS", 2)
    monkeypatch.chdir(ZOO.parent.parent)
    with pytest.raises(SystemExit) as end:
        main(["demo", "-o", str(tmp_path / "demo.shelf")])
    told = capsys.readouterr().out
    assert end.value.code == 0
    assert "4 adapters, 2 slots" in told
    assert re.search(r"D2C: [012] of 2 moves accepted; 4 losses requested, [1-4] measured", told), told
    losses = {
        line.split()[0]: [float(x) for x in line.split()[1:]]
        for line in told.splitlines()
        if line[:4] in ("qa-e", "mean")
    }
    assert set(losses) == {"qa-en", "qa-es", "mean"}
    assert all(own < zero for zero, own, *_ in losses.values())
    assert len(losses["mean"]) == 6
    assert losses["mean"][5] < losses["mean"][4]  # as against D2C's
    for method in ("zero-shot", "own adapter", "random", "K-Merge++", "D2C", "coded, 1 slot", "reference"):
        assert f"  {method:13} →" in told


@pytest.mark.long
def test_without_scikit_learn_the_offline_part_says_what_brings_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(SystemExit) as end:
        main(["demo", "--no-llm", "--zoo", str(ZOO), "-o", str(tmp_path / "demo.shelf")])
    told = capsys.readouterr().out
    assert end.value.code == 0
    assert "left out: this partition method needs scikit-learn: pip install 'lorashelf[cluster]'" in told
    assert "online, K-Merge++: purity" in told
    assert "Try it yourself" in told


@pytest.mark.long
def test_without_the_language_model_the_second_half_says_what_brings_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorashelf.models import base_model

    monkeypatch.setattr(base_model, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        main(["demo", "--zoo", str(ZOO), "-o", str(tmp_path / "demo.shelf")])
    told = capsys.readouterr().out
    assert end.value.code == 0
    assert base_model.EMBEDDED_INSTALL in told
    assert "Try it yourself" in told
