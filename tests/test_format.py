"""docs/format.md holds golden bytes: a shelf of fixed values, made with a fixed clock, must be these bytes for ever."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from factory import make_adapter
from lorashelf import Adapter, BaseId, Factors, Manifest, Modules, Shelf, new_settings, plan_add, plan_remove
from lorashelf.errors import CorruptShelf

DOCUMENT = Path(__file__).parent.parent / "docs" / "format.md"


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
