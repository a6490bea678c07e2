"""The format vllm: folders by task for vLLM's filesystem resolver, of one rank and one scale, under the served name."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from factory import BASE, assert_same_delta, dense, make_adapter
from lorashelf import Adapter, BaseId, Factors, Modules, Shelf, export_shelf, plan_add, read_adapter
from lorashelf.errors import NotExportable, ShelfNotFound, UsageError
from lorashelf.plugins.shelves import SHELVES, shelves
from lorashelf.plugins.vllm import ShelfResolver, number

NewShelf = Callable[..., Shelf]


def filled(shelf: Shelf, **adapters: Adapter) -> Shelf:
    for task, adapter in adapters.items():
        shelf.commit(plan_add(shelf.snapshot(), adapter, task))
    return shelf


@pytest.fixture
def shared(new_shelf: NewShelf) -> Shelf:
    """Three tasks in two slots, with ranks and scales that differ between modules."""
    odd = make_adapter(2, ranks={"v_proj": 2}, scales={"v_proj": 0.3})
    return filled(new_shelf(2, policy="kmerge"), one=odd, two=make_adapter(1), three=make_adapter(3))


def test_every_task_has_a_folder_and_those_of_a_slot_are_one(tmp_path: Path, shared: Shelf) -> None:
    document = export_shelf(shared.snapshot(), tmp_path / "out", "vllm", {"served-base": "acme/served"})
    snapshot, folders = shared.snapshot(), {task: tmp_path / "out" / task for task in ("one", "two", "three")}
    for task, folder in folders.items():
        assert_same_delta(snapshot.adapter(task), read_adapter(folder))
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", "acme/served")
        assert config["rank_pattern"] == config["alpha_pattern"] == {}  # older versions of vLLM ignore both
        assert set(config["target_modules"]) == {"q_proj", "v_proj"}
    for slot in snapshot.manifest.slots:
        assert len({folders[task].resolve() for task in slot.members}) == 1
    assert {task: Path(path).name for task, path in document["routes"].items()} == {
        task: snapshot.located(task)[0].members[0] for task in folders
    }


def test_the_commands_name_base_rank_and_tasks(tmp_path: Path, new_shelf: NewShelf) -> None:
    names = {"plain": make_adapter(0), "it's, odd=1": make_adapter(1, rank=9), "größer": make_adapter(2)}
    shelf = filled(new_shelf(3, policy="kmerge"), **names)
    export_shelf(shelf.snapshot(), tmp_path / "out", "vllm")
    text = (tmp_path / "out" / "README.md").read_text()
    resolved, static = (
        shlex.split(block.replace("\\\n", " ")) for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    )
    assert resolved[:4] == [
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
        "VLLM_PLUGINS=lora_filesystem_resolver",
        "VLLM_LORA_RESOLVER_CACHE_DIR=$PWD",
        "vllm",
    ]
    for words in (resolved, static):
        start = words.index("serve")
        expected = [BASE, "--enable-lora", "--max-lora-rank", "16", "--max-loras", "3"]
        assert words[start + 1 : start + 7] == expected
    given = static[static.index("--lora-modules") + 1 :]
    found = {}
    for word in given:
        name, _, path = word.partition("=")
        found |= {json.loads(word)["name"]: json.loads(word)["path"]} if word.startswith("{") else {name: path}
    assert found == {name: f"./{name}" for name in names}
    assert all((tmp_path / "out" / path / "adapter_config.json").exists() for path in found.values())


def test_ranks_are_those_that_vllm_takes(tmp_path: Path, new_shelf: NewShelf) -> None:
    snapshot = filled(new_shelf(1), task=make_adapter(rank=9)).snapshot()
    with pytest.raises(NotExportable, match="rank 9 is beyond vLLM's 8") as refused:
        export_shelf(snapshot, tmp_path / "out", "vllm", {"max-lora-rank": "8"})
    assert refused.value.cure == "give --max-lora-rank 16"
    with pytest.raises(UsageError, match="vLLM has no --max-lora-rank 9"):
        export_shelf(snapshot, tmp_path / "out", "vllm", {"max-lora-rank": "9"})
    assert not (tmp_path / "out").exists()
    export_shelf(snapshot, tmp_path / "out", "vllm", {"max-lora-rank": "64"})
    assert "--max-lora-rank 64" in (tmp_path / "out" / "README.md").read_text()


def test_what_vllm_would_drop_is_refused(tmp_path: Path, new_shelf: NewShelf) -> None:
    a, b = np.ones((1, 4), "f4"), np.ones((4, 1), "f4")
    path = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    shelf = filled(new_shelf(1), task=Adapter(Modules({path: Factors(a, b)}), BaseId(BASE)))
    with pytest.raises(NotExportable, match="outside the language model") as refused:
        export_shelf(shelf.snapshot(), tmp_path / "out", "vllm")
    assert "--enable-tower-connector-lora" in (refused.value.cure or "")


def test_names_of_the_export_s_own_files_are_refused(tmp_path: Path, new_shelf: NewShelf) -> None:
    shelf = filled(new_shelf(1), **{"README.md": make_adapter()})
    with pytest.raises(NotExportable, match="has the name of a file of the export"):
        export_shelf(shelf.snapshot(), tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()


def test_a_base_must_be_known(tmp_path: Path, new_shelf: NewShelf) -> None:
    shelf = filled(new_shelf(1), task=make_adapter(base=""))
    with pytest.raises(UsageError, match="the shelf names no base") as refused:
        export_shelf(shelf.snapshot(), tmp_path / "out", "vllm")
    assert "--served-base" in (refused.value.cure or "")


# vLLM's own classes ---------------------------------------------------------------------------------------------------

VLLM = Path(__file__).parent.parent / "build" / "vllm"
needs_vllm = pytest.mark.skipif(not VLLM.exists(), reason="vLLM's Python files are not in build/vllm (make runtimes)")


def weighted(adapter: Adapter) -> dict[str, float]:
    """Module → Σ (i + 1) (j + 2) ΔW_ij: rows, columns, scales and signs all matter."""
    return {
        path: float((delta * np.arange(1, len(delta) + 1)[:, None] * np.arange(2, delta.shape[1] + 2)).sum())
        for path, delta in dense(adapter).items()
    }


@needs_vllm
@pytest.mark.parametrize("encoding", ["peft", "coded"])
def test_vllm_s_own_classes_load_the_export_and_the_shelf(tmp_path: Path, new_shelf: NewShelf, encoding: str) -> None:
    """The resolver of files, the loader of adapters, the plugin's entry point, and the server's own list of models."""
    odd = make_adapter(2, ranks={"v_proj": 2}, scales={"v_proj": 0.3})
    adapters = {"one": odd, "two": make_adapter(1), "three": make_adapter(3)}
    shelf = filled(new_shelf(2, policy="kmerge", encoding=encoding), **adapters)
    export_shelf(shelf.snapshot(), tmp_path / "out", "vllm")
    program = Path(__file__).parent / "vllm_classes.py"
    environment = {
        **os.environ,
        "PYTHONPATH": str(VLLM),
        "LORASHELF_SHELVES": str(shelf.path),
        "VLLM_PLUGINS": "lorashelf",
    }
    run = [sys.executable, program, tmp_path / "out", BASE, *adapters]
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    snapshot = shelf.snapshot()
    for task in adapters:
        wanted = weighted(snapshot.adapter(task))
        for each in (found["files"][task], found["shelf"][task]):
            assert each == pytest.approx(wanted, rel=1e-4, abs=1e-2)
    objects = {task: snapshot.located(task)[0].object.id for task in adapters}
    ids = {
        identity: {found["ids"][task] for task in adapters if objects[task] == identity}
        for identity in objects.values()
    }
    assert ids == {identity: {number(identity)} for identity in ids}
    assert len(ids) == 2
    assert found["names"] == {task: task for task in adapters}
    assert found["added"] == [[task, found["ids"][task]] for task in adapters]  # as it reaches vLLM's engine
    assert (found["missing"], found["wrong"]) == (404, 404)
    assert found["resolver"] is found["equal"] is found["there"] is found["files_of_another_base"] is True


def test_what_no_shelf_serves_is_left_to_others(
    tmp_path: Path, new_shelf: NewShelf, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = filled(new_shelf(1), task=make_adapter())
    with pytest.raises(ShelfNotFound):  # at vLLM's start
        ShelfResolver([tmp_path / "missing.shelf"])
    resolver = ShelfResolver([shelf.path])
    assert asyncio.run(resolver.resolve_lora(BASE, "unknown")) is None
    assert asyncio.run(resolver.resolve_lora("another/base", "task")) is None
    assert f"lorashelf set {shelf.path} --base-alias another/base" in caplog.text
    (shelf.path / "HEAD").write_text("nothing")
    caplog.clear()
    assert asyncio.run(resolver.resolve_lora(BASE, "task")) is None
    assert str(shelf.path) in caplog.text


def test_numbers_of_objects_are_in_vllm_s_range() -> None:
    numbers = [number(f"b2-{i:064x}") for i in (0, 1, 2**64 - 1)] + [number("b2-" + "f" * 64)]
    assert all(2**30 <= each < 2**31 for each in numbers)


def test_shelves_are_separated_as_in_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHELVES, os.pathsep.join(["/a.shelf", "", "/b.shelf"]))
    assert shelves() == [Path("/a.shelf"), Path("/b.shelf")]
    monkeypatch.delenv(SHELVES)
    assert shelves() == []
