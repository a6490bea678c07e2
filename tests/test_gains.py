"""Gains fitted to examples: they lower the loss, leave the base as it was, and are in the code's bytes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from command import Command
from factory import write_peft
from lorashelf import Adapter, BaseId, Factors, HFBackend, Modules, norm, read_adapter, read_tasks
from lorashelf.errors import ShapeMismatch
from lorashelf.formats.coded.decoder import decode, inspect
from lorashelf.formats.coded.encoder import Encoder
from lorashelf.formats.coded.files import encode_within, read_levels
from lorashelf.lora.algebra import combine, scaled
from lorashelf.models.hooks import sizes
from lorashelf.models.protocol import mean_loss
from lorashelf.tasks.folders import ExampleSet
from lorashelf.training.gains import LARGEST, fitted_gains
from tiny_base import tiny_base

ZOO = Path(__file__).parent.parent / "examples" / "zoo"
FRUIT = ("apple", "plum", "pear", "quince", "lemon", "cherry")


def loud_task(folder: Path) -> Path:
    """A task folder of six training examples, two of which are validation examples, too."""
    folder.mkdir(parents=True)
    (folder / "task.toml").write_text('prompt = "Louder:"\ntype = "loud"\nlanguage = "en"\n')
    lines = [json.dumps({"input": f"one {word}", "output": f"ONE {word.upper()}!"}) for word in FRUIT]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "validation.jsonl").write_text("\n".join(lines[:2]) + "\n")
    return folder


def untuned(backend: HFBackend) -> Adapter:
    """An adapter of random factors on the attention of a base."""
    rng, modules = np.random.default_rng(0), {}
    for path, layer in backend.base.model.named_modules():
        if (found := sizes(layer)) and "attn" in path:
            a, b = rng.standard_normal((2, found[1])), rng.standard_normal((found[0], 2))
            modules[path] = Factors(a.astype(np.float32), 0.1 * b.astype(np.float32))
    targets = sorted({path.rpartition(".")[2] for path in modules})
    return Adapter(Modules(modules), BaseId(backend.name), "f32", {"target_modules": targets})


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> HFBackend:
    return HFBackend.open(str(tiny_base(tmp_path_factory.mktemp("base") / "tiny")), device="cpu", dtype="f32")


@pytest.fixture
def examples(tmp_path: Path) -> ExampleSet:
    return read_tasks(loud_task(tmp_path / "loud"))["loud"].examples("train")


def test_fitted_gains_lower_the_loss_and_leave_the_base_alone(backend: HFBackend, examples: ExampleSet) -> None:
    x, model = untuned(backend), backend.base.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fitted_gains(backend, x, examples, examples)
    (fitted,), (plain,) = backend.nll([(scaled(x, found), examples)]), backend.nll([(x, examples)])
    assert mean_loss(fitted) < mean_loss(plain) - 0.01
    assert found.keys() == x.modules.keys()
    assert len(set(found.values())) == len(found)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_the_gradient_is_that_of_the_loss(backend: HFBackend, examples: ExampleSet) -> None:
    x, rate = untuned(backend), 1e-3
    found = fitted_gains(backend, x, examples, examples, steps=1, rate=rate)  # Adam's first step: the gradient's sign
    for path in list(x.modules)[:3]:
        up, down = (scaled(x, {**dict.fromkeys(x.modules, 1.0), path: math.exp(step)}) for step in (0.01, -0.01))
        slope = mean_loss(backend.nll([(up, examples)])[0]) - mean_loss(backend.nll([(down, examples)])[0])
        assert math.log(found[path]) == pytest.approx(-math.copysign(rate, slope), rel=0.01)


def test_batches_add_up_to_one_gradient(backend: HFBackend, examples: ExampleSet) -> None:
    small = HFBackend(backend.base, batch=40)
    assert len(small.batches(small.text.measurable(examples))) > 1
    x = untuned(backend)
    assert fitted_gains(small, x, examples, examples, steps=3) == pytest.approx(
        fitted_gains(backend, x, examples, examples, steps=3)
    )


def test_gains_are_named_as_the_adapter_names_its_modules(backend: HFBackend, examples: ExampleSet) -> None:
    x = untuned(backend)
    old = {path.replace("model.layers", "model.language_model.layers"): f for path, f in x.modules.items()}
    found = fitted_gains(backend, Adapter(Modules(old), x.base), examples, examples, steps=2)
    wanted = fitted_gains(backend, x, examples, examples, steps=2)
    assert {path.replace("language_model.", ""): value for path, value in found.items()} == pytest.approx(wanted)


def test_factors_stay_within_bounds(backend: HFBackend, examples: ExampleSet) -> None:
    found = fitted_gains(backend, untuned(backend), examples, examples, steps=3, rate=10.0)
    assert {round(value, 6) for value in found.values()} <= {LARGEST, 1 / LARGEST, 1.0}


def test_the_step_with_the_least_loss_of_other_examples_is_taken(backend: HFBackend, examples: ExampleSet) -> None:
    x, others = untuned(backend), replace(examples, examples=examples.examples[3:])
    half = replace(examples, examples=examples.examples[:3])
    losses = {}
    for steps in range(1, 7):
        found = fitted_gains(backend, x, half, half, steps=steps, rate=0.5)  # too fast: the loss rises again
        losses[steps] = mean_loss(backend.nll([(scaled(x, found), others)])[0]), found
    found = fitted_gains(backend, x, half, others, steps=6, rate=0.5)
    loss = mean_loss(backend.nll([(scaled(x, found), others)])[0])
    assert loss <= min([mean_loss(backend.nll([(x, others)])[0]), *(each for each, _ in losses.values())]) + 1e-6


def test_gains_that_help_no_other_example_are_left_at_one(backend: HFBackend, examples: ExampleSet) -> None:
    against = replace(examples, examples=tuple(replace(e, output="zzzzzzzz") for e in examples.examples))
    x = untuned(backend)
    found = fitted_gains(backend, x, examples, examples, steps=1, rate=2.0)
    fitted, plain = (mean_loss(backend.nll([(y, against)])[0]) for y in (scaled(x, found), x))
    assert fitted > plain  # so that the test can fail
    assert set(fitted_gains(backend, x, examples, against, steps=1, rate=2.0).values()) == {1.0}


def test_an_adapter_of_another_base_is_refused(backend: HFBackend, examples: ExampleSet) -> None:
    with pytest.raises(ShapeMismatch):
        fitted_gains(backend, read_adapter(ZOO / "gec-de"), examples, examples)


def test_an_encoder_s_factors_are_in_the_gains() -> None:
    x = read_adapter(ZOO / "gec-de")
    rng = np.random.default_rng(0)
    factors = {path: float(np.exp(0.3 * rng.standard_normal())) for path in x.modules}
    plain, fitted = Encoder(x), Encoder(x, factors)
    for encoder in (plain, fitted):
        encode_within(encoder, 12_000, 3)
    assert abs(plain.size - fitted.size) < 0.02 * plain.size
    assert fitted.kept == pytest.approx(plain.kept, abs=2e-3)
    wanted, found = scaled(decode(plain.levels), factors), decode(fitted.levels)
    assert norm(combine([wanted, found], [1, -1])) < 0.05 * norm(wanted)
    assert norm(combine([decode(plain.levels), found], [1, -1])) > 0.2 * norm(wanted)


def test_compress_fits_the_gains_to_examples(backend: HFBackend, tmp_path: Path, run: Command) -> None:
    x, tasks = write_peft(tmp_path / "loud", untuned(backend)), loud_task(tmp_path / "tasks" / "loud").parent
    words = ["compress", x, "--percent", 90, "--levels", 1]
    fit = ["--examples", tasks, "--base", backend.name, "--device", "cpu", "--model-dtype", "f32", "--limit", 5]
    assert run(*words, "-o", tmp_path / "plain.lsc")[0] == 0
    code, document = run(*words, "-o", tmp_path / "fitted.lsc", *fit)
    assert code == 0
    losses = document["fit"]
    assert losses["examples"] == 2
    assert losses["fitted"] < losses["as_coded"]
    chosen = read_tasks(tasks)["loud"].examples("validation")
    fitted = decode(read_levels(tmp_path / "fitted.lsc"))
    assert losses["fitted"] == pytest.approx(mean_loss(backend.nll([(fitted, chosen)])[0]))
    plain = inspect(read_levels(tmp_path / "plain.lsc"))[2][-1]
    assert document["energy_kept"] == pytest.approx(plain.kept, abs=2e-3)


def test_options_of_the_fit_need_examples(tmp_path: Path, run: Command) -> None:
    words = ["compress", ZOO / "gec-de", "-o", tmp_path / "a.lsc", "--percent", 5]
    code, document = run(*words, "--steps", 3, "--base", "x")
    assert (code, document["error"]["kind"]) == (2, "usage")
    assert "--steps, --base" in document["error"]["message"]
    code, document = run(*words, "--examples", loud_task(tmp_path / "loud"))
    assert code == 2
    assert "gec-de" in document["error"]["message"]
    assert not (tmp_path / "a.lsc").exists()
