"""docs/format.md holds golden bytes: a shelf of fixed values, made with a fixed clock, must be these bytes for ever."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from factory import dense, make_adapter
from lorashelf import Adapter, BaseId, Factors, Manifest, Modules, Shelf, new_settings, plan_add, plan_remove
from lorashelf.digest import canonical_json
from lorashelf.errors import CorruptShelf
from lorashelf.manifest import manifest_id

DOCUMENT = Path(__file__).parent.parent / "docs" / "format.md"


def packed(values: Sequence[float]) -> str:
    return base64.b64encode(np.array(values, "<f8").tobytes()).decode()


def unpacked(text: str) -> list[float]:
    return [float(value) for value in np.frombuffer(base64.b64decode(text), "<f8")]


def clock() -> datetime:
    return datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


@patch("lorashelf.shelf.VERSION", "0.1.0")
@patch("lorashelf.flow.VERSION", "0.1.0")
def golden_shelf(path: Path) -> Shelf:
    """Two orthogonal adapters of one 2×3 module in one slot; every sum is exact, so no machine rounds apart."""
    shelf = Shelf.create(path, new_settings(1, policy="kmerge"), clock)
    factors = {"gec-de": [[1.0, 0.5, 0.0], [0.0, 2.0, 0.0]], "gec-fr": [[0.0, 0.0, 1.0], [0.0, 0.0, -0.5]]}
    for task, rows in factors.items():
        a, b = np.array(rows, np.float32), np.array([[0.5, 0.0], [0.0, 1.0]], np.float32)
        adapter = Adapter(Modules({"m.0": Factors(a, b, 2.0)}), BaseId("acme/tiny"), "f16", {"target_modules": ["0"]})
        shelf.commit(plan_add(shelf.snapshot(), adapter, task))
    return shelf


def golden(name: str) -> str:
    found = re.search(rf"<!-- golden: {re.escape(name)} -->\n```\w*\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found, f"docs/format.md has no golden block {name!r}"
    return found[1]


def actual(shelf: Shelf) -> dict[str, str]:
    head = (shelf.path / "HEAD").read_text()
    manifest = (shelf.path / "manifests" / f"{head.strip()}.json").read_text()
    folder = shelf.snapshot().slot_path(shelf.snapshot().manifest.slots[0])
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    return {
        "shelf.toml": (shelf.path / "shelf.toml").read_text(),
        "HEAD": head,
        "manifest": manifest + "\n",
        "log.jsonl": (shelf.path / "log.jsonl").read_text(),
        "adapter_config.json": (folder / "adapter_config.json").read_text(),
        "adapter_model.safetensors": "".join(f"{tensors[i : i + 32].hex(' ')}\n" for i in range(0, len(tensors), 32)),
    }


def test_the_bytes_on_disk_are_those_of_the_document(tmp_path: Path) -> None:
    for name, text in actual(golden_shelf(tmp_path / "golden.shelf")).items():
        assert text == golden(name), name


def test_golden_blocks_would_show_a_changed_byte(tmp_path: Path) -> None:
    shelf = golden_shelf(tmp_path / "golden.shelf")
    (shelf.path / "HEAD").write_text("b2-" + "0" * 64 + "\n")
    assert (shelf.path / "HEAD").read_text() != golden("HEAD")


def test_worn_stands_in_a_manifest_only_where_an_adapter_was_taken_out(tmp_path: Path) -> None:
    x, y = make_adapter(0), make_adapter(1)
    shelf = Shelf.create(tmp_path / "s", new_settings(1, policy="kmerge"), clock)
    for task, adapter in (("a", x), ("b", y)):
        shelf.commit(plan_add(shelf.snapshot(), adapter, task))
    assert "worn" not in shelf.snapshot().manifest.document()["slots"][0]
    shelf.commit(plan_remove(shelf.snapshot(), "b", y))
    manifest = shelf.snapshot().manifest
    assert manifest.document()["slots"][0]["worn"] == manifest.slots[0].worn == 2
    with pytest.raises(CorruptShelf):
        Manifest.decode(manifest.encode().replace(b'"worn":2', b'"worn":-2'), "here")


def test_the_golden_shelf_verifies(tmp_path: Path) -> None:
    assert golden_shelf(tmp_path / "golden.shelf").verify() == []


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, text in actual(golden_shelf(Path(folder) / "golden.shelf")).items():
            print(f"<!-- golden: {name} -->\n```\n{text}```\n")


def filled(path: Path) -> Shelf:
    shelf = Shelf.create(path, new_settings(2, policy="kmerge"), clock)
    for i, task in enumerate(("a", "b", "c")):
        shelf.commit(plan_add(shelf.snapshot(), make_adapter(i, dtype="f16"), task))
    return shelf


def rewritten(shelf: Shelf, change: Callable[[dict[str, Any]], None]) -> None:
    """The head's manifest changed, under its new id."""
    document = json.loads(shelf.snapshot().manifest.encode())
    for slot in document["slots"]:
        change(slot)
    data = canonical_json(document)
    (shelf.path / "manifests" / f"{manifest_id(data)}.json").write_bytes(data)
    (shelf.path / "HEAD").write_text(f"{manifest_id(data)}\n")


def test_energies_are_those_of_the_bytes_stored(tmp_path: Path) -> None:
    snapshot = filled(tmp_path / "s").snapshot()
    for slot in snapshot.manifest.slots:
        exact = [
            float(np.sum(np.square(w, dtype=np.float64))) for _, w in sorted(dense(snapshot.adapter(slot)).items())
        ]
        assert slot.energies == pytest.approx(exact, rel=1e-6)
        assert "energies" not in slot.document()  # answers are for people and programs, not for the next fold


def test_a_shelf_without_energies_goes_on_and_gets_them_where_it_writes(tmp_path: Path) -> None:
    shelf, arriving = filled(tmp_path / "s"), make_adapter(9, dtype="f16")
    expected = plan_add(shelf.snapshot(), arriving, "new").report
    rewritten(shelf, lambda slot: slot.pop("energies"))
    plan = plan_add(shelf.snapshot(), arriving, "new")
    assert plan.report["scores"] == pytest.approx(expected["scores"], abs=1e-7)
    assert shelf.verify() == []
    shelf.commit(plan)
    assert {bool(slot.energies) for slot in shelf.snapshot().manifest.slots} == {True, False}


def test_the_next_fold_takes_energies_from_the_manifest(tmp_path: Path) -> None:
    shelf, arriving = filled(tmp_path / "s"), make_adapter(9, dtype="f16")
    scores = plan_add(shelf.snapshot(), arriving, "new").report["scores"]
    rewritten(shelf, lambda slot: slot.update(energies=packed([4 * value for value in unpacked(slot["energies"])])))
    halved = plan_add(shelf.snapshot(), arriving, "new").report["scores"]
    assert halved == pytest.approx({slot: score / 2 for slot, score in scores.items()}, abs=1e-7)
    assert shelf.verify() == [
        f"slot {slot.slot}: the manifest's energies are not those of objects/{slot.object}"
        for slot in shelf.snapshot().manifest.slots
    ]


def test_energies_of_another_number_of_modules_are_passed_over_and_seen_by_verify(tmp_path: Path) -> None:
    shelf, arriving = filled(tmp_path / "s"), make_adapter(9, dtype="f16")
    scores = plan_add(shelf.snapshot(), arriving, "new").report["scores"]
    rewritten(shelf, lambda slot: slot.update(energies=packed(unpacked(slot["energies"])[1:])))
    assert plan_add(shelf.snapshot(), arriving, "new").report["scores"] == pytest.approx(scores, abs=1e-7)
    assert len(shelf.verify()) == 2


@pytest.mark.parametrize(
    "energies", ["AAAA", "%%%", "AAAAAABAM0A", "é", 3, None, packed([-1.0]), packed([float("nan")]), packed([np.inf])]
)
def test_energies_that_cannot_be_are_refused(tmp_path: Path, energies: Any) -> None:
    shelf = filled(tmp_path / "s")
    rewritten(shelf, lambda slot: slot.update(energies=energies))
    with pytest.raises(CorruptShelf, match="manifest cannot be read"):
        shelf.snapshot()
