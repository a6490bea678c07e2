"""A shelf's adapter on the caller's model: logits of the PEFT folder, and a model that is as before afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama_model import tiny
from lorashelf import Adapter, BaseId, Factors, Modules, Shelf, attach, plan_add, route, write_adapter
from lorashelf.errors import ShapeMismatch, UnknownName, UsageError

IDS = torch.tensor([[int(i) for i in np.random.default_rng(3).integers(5, 260, 20)]])
NewShelf = Callable[..., Shelf]


def random_adapter(model: Any, seed: int) -> Adapter:
    rng, modules = np.random.default_rng(seed), {}
    for path, layer in model.named_modules():
        if path.endswith(("q_proj", "down_proj")):
            a = 0.15 * rng.standard_normal((3, layer.in_features), dtype=np.float32)
            modules[path] = Factors(a, 0.15 * rng.standard_normal((layer.out_features, 3), dtype=np.float32), 1.7)
    return Adapter(Modules(modules), BaseId("acme/tiny"))


@pytest.fixture
def shelf(new_shelf: NewShelf, one_thread: None) -> Shelf:
    made = new_shelf(2, policy="kmerge")
    for seed, task in enumerate(("one", "two")):
        made.commit(plan_add(made.snapshot(), random_adapter(tiny("llama"), seed), task))
    return made


def logits(model: Any) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(model(input_ids=IDS).logits[0].numpy())


def peft_model(folder: str | Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21.2 asks transformers 5.23 under a name of old
        return PeftModel.from_pretrained(tiny("llama"), str(folder)).eval()


@pytest.mark.parametrize("given", ["path", "shelf", "snapshot"])
def test_the_logits_are_those_of_the_peft_folder(shelf: Shelf, given: str) -> None:
    model, bare = tiny("llama"), logits(tiny("llama"))
    source: Any = {"path": str(shelf.path), "shelf": shelf, "snapshot": shelf.snapshot()}[given]
    for task in ("one", "two"):
        wanted = logits(peft_model(route(shelf.snapshot(), task)["path"]))
        with attach(model, source, task) as attached:
            assert (attached.task, attached.model) == (task, model)
            np.testing.assert_allclose(logits(model), wanted, atol=1e-5)
        assert np.abs(wanted - bare).max() > 0.5  # the adapter matters
        assert np.array_equal(logits(model), bare)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_without_a_block_it_stays_until_it_is_detached(shelf: Shelf) -> None:
    model = tiny("llama")
    bare, attached = logits(model), attach(model, shelf, "one")
    assert not np.array_equal(logits(model), bare)
    attached.detach()
    attached.detach()
    assert np.array_equal(logits(model), bare)


def test_on_a_peft_model_it_takes_the_place_of_its_own_adapter(shelf: Shelf, tmp_path: Path) -> None:
    write_adapter(random_adapter(tiny("llama"), 7), tmp_path / "own")
    model = peft_model(tmp_path / "own")
    own, wanted = logits(model), logits(peft_model(route(shelf.snapshot(), "one")["path"]))
    with attach(model, shelf, "one"):
        np.testing.assert_allclose(logits(model), wanted, atol=1e-5)
    assert np.abs(own - wanted).max() > 0.5
    assert np.array_equal(logits(model), own)


def test_coded_slots_are_attached_too(new_shelf: NewShelf, one_thread: None, tmp_path: Path) -> None:
    shelf, model = new_shelf(1, encoding="coded"), tiny("llama")
    shelf.commit(plan_add(shelf.snapshot(), random_adapter(model, 0), "task"))
    write_adapter(shelf.snapshot().adapter("task"), tmp_path / "decoded")
    with attach(model, shelf, "task"):
        np.testing.assert_allclose(logits(model), logits(peft_model(tmp_path / "decoded")), atol=1e-5)


def test_two_at_once_are_refused(shelf: Shelf) -> None:
    model = tiny("llama")
    with attach(model, shelf, "one"):
        wanted = logits(model)
        with pytest.raises(UsageError, match="two would add up"):
            attach(model, shelf, "two")
        assert np.array_equal(logits(model), wanted)
    with attach(model, shelf, "two"):
        assert not np.array_equal(logits(model), wanted)


def test_a_failure_leaves_the_model_as_it_was(shelf: Shelf) -> None:
    model = tiny("phi3")
    with pytest.raises(ShapeMismatch, match="no linear layer of this name"):
        attach(model, shelf, "one")
    with pytest.raises(UnknownName, match="unknown task 'three'"):
        attach(model, shelf, "three")
    assert not any(layer._forward_hooks for layer in model.modules())
