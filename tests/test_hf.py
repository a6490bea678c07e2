"""The transformers backend: equal to PEFT and to transformers' own loss; several architectures, and a real model."""

from __future__ import annotations

import logging
import math
import os
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from lorashelf import Adapter, BaseId, Factors, Modules, read_adapter, write_adapter
from lorashelf.errors import ModelError, OutOfMemory, ShapeMismatch, UsageError
from lorashelf.models import base_model, decoding, hooks
from lorashelf.models.base_model import open_base
from lorashelf.models.decoding import next_logits
from lorashelf.models.effects import EffectSums
from lorashelf.models.hf import HFBackend
from lorashelf.models.hooks import AdapterPool
from lorashelf.models.protocol import mean_loss
from lorashelf.tasks.folders import Example, ExampleSet, read_tasks
from tiny_base import ARCHITECTURES, tiny_base

CONTEXT = 160
TARGETS = {"gpt2": ("c_attn", "c_proj")}
ROOT = Path(__file__).parent.parent
SET = ExampleSet(
    "mend-en",
    "Mend:",
    tuple(Example(f"a text {'long ' * (i % 5)}", f"an answer {'yes ' * (i % 3)}") for i in range(9)),
)


def small_base(folder: Path, architecture: str) -> Path:
    """A tiny base; llama's has a chat template, the others none."""
    return tiny_base(folder, architecture, context=CONTEXT, chat=architecture == "llama")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HFBackend]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        name: HFBackend.open(str(small_base(folder / name, name)), device="cpu", dtype="f32") for name in ARCHITECTURES
    }


def random_adapter(backend: HFBackend, architecture: str = "llama", seed: int = 0, rank: int = 3) -> Adapter:
    """Random factors for the attention's projections, with a scale and a size that change the answers."""
    rng = np.random.default_rng(seed)
    names = TARGETS.get(architecture, ("q_proj", "k_proj", "v_proj", "o_proj"))
    modules = {}
    for path, layer in backend.base.model.named_modules():
        if path.rpartition(".")[2] in names and (there := hooks.sizes(layer)):
            dout, din = there
            a, b = rng.standard_normal((rank, din)), rng.standard_normal((dout, rank))
            modules[path] = Factors((0.2 * a).astype("f4"), (0.2 * b).astype("f4"), 2.0)
    config = {"fan_in_fan_out": architecture == "gpt2", "task_type": "CAUSAL_LM"}
    return Adapter(Modules(modules), BaseId(backend.base.name), "f32", config)


def by_transformers(backend: HFBackend, model: Any, examples: ExampleSet) -> list[tuple[float, int]]:
    """One example at a time, labels −100 on the query: the loss that transformers computes, times its tokens."""
    found = []
    template, tokenizer = backend.base.template, backend.base.tokenizer
    for example in examples.examples:
        query = tokenizer(template.query(examples.instruction, example.input), add_special_tokens=False).input_ids
        answer = tokenizer(template.answer(example.output), add_special_tokens=False).input_ids
        ids = torch.tensor([query + answer])
        labels = torch.tensor([[-100] * len(query) + answer])
        with torch.no_grad():
            found.append((float(model(input_ids=ids, labels=labels).loss) * len(answer), len(answer)))
    return found


def peft_model(backend: HFBackend, adapter: Adapter, folder: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    write_adapter(adapter, folder)
    fresh = AutoModelForCausalLM.from_pretrained(backend.base.name, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21.2 asks transformers 5.23 under a name of old
        return PeftModel.from_pretrained(fresh, str(folder)).eval()


@pytest.mark.parametrize("head", ["model.language_model.layers", "language_model.model.layers", "layers"])
def test_an_adapter_under_another_spelling_of_the_base_s_modules_is_the_same(
    bases: dict[str, HFBackend], head: str
) -> None:
    backend = bases["llama"]
    adapter = random_adapter(backend)
    modules = {path.replace("model.layers", head, 1): f for path, f in adapter.modules.items()}
    other = replace(adapter, modules=Modules(modules))
    backend.fits({"other": other})
    bare, expected, found = backend.nll([(None, SET), (adapter, SET), (other, SET)])
    assert [loss.nll for loss in found] == [loss.nll for loss in expected] != [loss.nll for loss in bare]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_are_those_of_transformers_and_of_peft(
    bases: dict[str, HFBackend], architecture: str, tmp_path: Path
) -> None:
    backend = bases[architecture]
    adapter = random_adapter(backend, architecture)
    bare, adapted = backend.nll([(None, SET), (adapter, SET)])
    model = peft_model(backend, adapter, tmp_path / "adapter")
    with model.disable_adapter():
        expected_bare = by_transformers(backend, model, SET)
    expected = by_transformers(backend, model, SET)
    for found, wanted in ((bare, expected_bare), (adapted, expected)):
        assert [loss.tokens for loss in found] == [tokens for _, tokens in wanted]
        np.testing.assert_allclose([loss.nll for loss in found], [nll for nll, _ in wanted], rtol=2e-4)
    assert max(abs(x.nll / y.nll - 1) for x, y in zip(bare, adapted, strict=True)) > 0.01  # the adapter matters


def test_the_comparison_sees_a_wrong_scale(bases: dict[str, HFBackend]) -> None:
    backend = bases["llama"]
    adapter = random_adapter(backend)
    wrong = adapter.with_factors({p: Factors(f.a, f.b, f.scale * 1.5) for p, f in adapter.modules.items()})
    right, other = backend.nll([(adapter, SET), (wrong, SET)])
    with pytest.raises(AssertionError):
        np.testing.assert_allclose([x.nll for x in right], [x.nll for x in other], rtol=2e-4)


def test_swapping_leaves_no_trace(bases: dict[str, HFBackend]) -> None:
    backend = bases["llama"]
    first, second = random_adapter(backend, seed=1), random_adapter(backend, seed=2)
    weights = {name: value.clone() for name, value in backend.base.model.state_dict().items()}
    losses = backend.nll([(None, SET), (first, SET), (second, SET), (first, SET), (None, SET)])
    assert losses[0] == losses[4]
    assert losses[1] == losses[3] != losses[2]
    assert all(torch.equal(value, weights[name]) for name, value in backend.base.model.state_dict().items())
    assert not any(module._forward_hooks for module in backend.base.model.modules())


def test_an_adapter_of_some_modules_and_of_mixed_ranks(bases: dict[str, HFBackend], tmp_path: Path) -> None:
    backend = bases["llama"]
    whole = random_adapter(backend)
    some = {
        p: Factors(f.a[: 1 + i % 3], f.b[:, : 1 + i % 3], 0.5 + i) for i, (p, f) in enumerate(whole.modules.items())
    }
    adapter = whole.with_factors(dict(list(some.items())[::2]))
    [found] = backend.nll([(adapter, SET)])
    expected = by_transformers(backend, peft_model(backend, adapter, tmp_path / "a"), SET)
    np.testing.assert_allclose([loss.nll for loss in found], [nll for nll, _ in expected], rtol=2e-4)


def test_effects_are_those_of_the_updates_on_inputs_that_predict_answers(bases: dict[str, HFBackend]) -> None:
    """Against dense updates, example by example, with an adapter of other ranks and fewer modules."""
    backend = bases["llama"]
    whole = random_adapter(backend, seed=1)
    cut = {p: Factors(f.a[:2], f.b[:, :2], 0.5) for p, f in list(whole.modules.items())[::2]}
    adapters = [whole, random_adapter(backend, seed=2), whole.with_factors(cut)]
    small = HFBackend(backend.base, batch=200)  # several batches, with padding
    other = ExampleSet("other", "Say:", SET.examples[:3])
    found = list(small.effects(adapters, [SET, other]))
    for gram, examples in zip(found, (SET, other), strict=True):
        np.testing.assert_allclose(gram, dense_effects(backend, adapters, examples), rtol=1e-4)
    assert not any(module._forward_hooks for module in backend.base.model.modules())


def dense_effects(backend: HFBackend, adapters: list[Adapter], examples: ExampleSet) -> np.ndarray:
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    layers = dict(backend.base.model.named_modules())
    for example in examples.examples:
        query, answer = backend.tokens(examples, example)
        at = slice(len(query) - 1, len(query) + len(answer) - 1)
        hooks = [
            layers[path].register_forward_hook(
                lambda _, x, y, path=path, at=at: seen.setdefault(path, []).append((x[0][0, at], y[0, at]))
            )
            for path in adapters[0].modules
        ]
        with torch.no_grad():
            backend.base.model(input_ids=torch.tensor([query + answer]))
        for hook in hooks:
            hook.remove()
    total = np.zeros((len(adapters), len(adapters)))
    for path, pairs in seen.items():
        x, y = (np.concatenate([pair[side].numpy() for pair in pairs]) for side in (0, 1))
        rows = [
            (x @ (f.scale * f.b @ f.a).T).ravel() if (f := one.modules.get(path)) else np.zeros(y.size)
            for one in adapters
        ]
        total += np.array(rows) @ np.array(rows).T / np.square(y).sum()
    return total


def test_effects_of_modules_that_see_chosen_positions_or_none() -> None:
    rng = np.random.default_rng(0)
    a, b, x, y = (torch.tensor(rng.standard_normal(size)) for size in ((4, 2), (2, 3), (5, 4), (5, 3)))
    sums = EffectSums([{"an.expert": (a, b), "idle": (a, b)}, {}])
    everywhere = torch.tensor([0])
    sums.at(everywhere, everywhere)["an.expert"](x, y)
    expected = float((x @ a @ b).square().sum() / y.square().sum())
    np.testing.assert_allclose(sums.gram(), [[expected, 0], [0, 0]], rtol=1e-5)
    assert not sums.gram().any(), "the sums begin anew"


# batches -------------------------------------------------------------------------------------------------------------


def test_batches_cover_everything_once_with_little_padding(bases: dict[str, HFBackend]) -> None:
    backend = bases["llama"]
    rng = np.random.default_rng(0)
    for _ in range(30):
        tokens = [([1] * int(rng.integers(1, 90)), [2] * int(rng.integers(1, 30))) for _ in range(rng.integers(1, 40))]
        batches = backend.batches(tokens)
        assert sorted(i for batch in batches for i in batch) == list(range(len(tokens)))
        for batch in batches:
            lengths = [len(q) + len(a) for q, a in (tokens[i] for i in batch)]
            assert len(batch) * max(lengths) <= backend.batch or len(batch) == 1
            assert sum(lengths) >= 0.9 * len(batch) * max(lengths)


def test_a_loss_does_not_depend_on_the_pairs_beside_it(bases: dict[str, HFBackend]) -> None:
    backend = bases["llama"]
    other = ExampleSet("other", "Say:", SET.examples[:4])
    adapter = random_adapter(backend)
    alone = backend.nll([(adapter, SET)])[0]
    assert backend.nll([(adapter, other), (adapter, SET), (None, SET)])[1] == alone


def test_padding_may_be_the_end_of_the_turn(bases: dict[str, HFBackend]) -> None:
    """The answer's end is measured though its token is also the padding: a longer neighbour changes nothing."""
    backend = bases["llama"]
    short = ExampleSet("t", "Mend:", (Example("a", "bb"), Example("aaaaaaa", "bbb")))
    both = backend.nll([(None, short)])[0]
    one = backend.nll([(None, ExampleSet("t", "Mend:", short.examples[:1]))])[0]
    assert both[0].tokens == one[0].tokens
    assert both[0].nll == pytest.approx(one[0].nll, rel=1e-5)
    end = backend.base.tokenizer(backend.base.template.end, add_special_tokens=False).input_ids
    assert backend.tokens(short, short.examples[0])[1][-len(end) :] == end


# refusals ------------------------------------------------------------------------------------------------------------


def test_examples_beyond_the_context_are_counted_and_never_measured(bases: dict[str, HFBackend]) -> None:
    backend = bases["llama"]
    long = ExampleSet("long", "Mend:", (*SET.examples, Example("x" * CONTEXT, "y")))
    fitting, dropped = backend.fitting(long)
    assert (len(fitting.examples), dropped) == (9, 1)
    with pytest.raises(ModelError, match="longer than the model's context") as error:
        backend.nll([(None, long)])
    assert "long, example 10" in str(error.value)


def test_a_loss_that_is_not_finite_names_the_example(bases: dict[str, HFBackend]) -> None:
    backend = bases["llama"]
    adapter = random_adapter(backend)
    broken = adapter.with_factors({p: Factors(f.a, f.b * np.float32("inf"), 1.0) for p, f in adapter.modules.items()})
    with pytest.raises(ModelError, match="not finite") as error:
        backend.nll([(broken, SET)])
    assert "mend-en, example" in str(error.value)


def test_adapters_of_another_base_are_refused_with_the_sizes(bases: dict[str, HFBackend]) -> None:
    backend = bases["llama"]
    path = "model.layers.0.self_attn.q_proj"
    wide = Adapter(Modules({path: Factors(np.ones((2, 64), "f4"), np.ones((32, 2), "f4"))}))
    other = Adapter(Modules({"transformer.h.0.attn.c_attn": Factors(np.ones((2, 32), "f4"), np.ones((96, 2), "f4"))}))
    with pytest.raises(ShapeMismatch, match=r"ΔW is 32x64, the base's layer 16x16"):
        backend.nll([(wide, SET)])
    with pytest.raises(ShapeMismatch, match="no linear layer of this name"):
        backend.nll([(other, SET)])
    with pytest.raises(ShapeMismatch) as error:
        backend.fits({"a": wide, "b": other})
    assert "a: " in str(error.value)
    assert "b: " in str(error.value)


def test_faults_of_many_modules_and_adapters_are_few_lines(bases: dict[str, HFBackend]) -> None:
    backend = bases["llama"]
    pair = Factors(np.ones((2, 64), "f4"), np.ones((32, 2), "f4"))
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(30) for x in "qk"]
    many = Adapter(Modules(dict.fromkeys(names, pair)))
    with pytest.raises(ShapeMismatch) as error:
        backend.fits({f"task{i}": many for i in range(31)})
    assert len(error.value.faults) == 4  # two projections, in layers that are there and in others
    assert "task0 and 30 more adapters: self_attn.k_proj in model.layers 0-1: ΔW is 32x64" in str(error.value)


def test_experts_that_the_base_keeps_in_one_tensor_are_named_and_peft_takes_them(tmp_path: Path) -> None:
    """An adapter of transformers 4, with factors of every expert, on a base as transformers 5 keeps it."""
    folder = tiny_base(tmp_path / "moe", "mixtral")
    rng, modules = np.random.default_rng(0), {}
    for layer, expert, name in product(range(2), range(4), ("w1", "w2", "w3")):
        dout, din = (16, 24) if name == "w2" else (24, 16)
        a, b = (rng.standard_normal(shape).astype("f4") for shape in ((2, din), (dout, 2)))
        modules[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"] = Factors(a, b)
    adapter = Adapter(Modules(modules), config={"task_type": "CAUSAL_LM"})
    with pytest.raises(ShapeMismatch) as error:
        HFBackend.open(str(folder)).fits({"mail": adapter})
    assert error.value.faults == tuple(
        f"mail: block_sparse_moe.experts.0-3.{name} in model.layers 0-1: "
        "the base keeps its experts in one tensor, not in linear layers"
        for name in ("w1", "w2", "w3")
    )
    assert "PeftModel.from_pretrained" in (error.value.cure or "")
    write_adapter(adapter, tmp_path / "mail")
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    deltas = {path: torch.from_numpy(f.delta()) for path, f in adapter.modules.items()}
    for layer, expert in product(range(2), range(4)):
        experts = expected.model.layers[layer].mlp.experts
        w1, w2, w3 = (deltas[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{i}"] for i in (1, 2, 3))
        experts.gate_up_proj.data[expert] += torch.cat([w1, w3])
        experts.down_proj.data[expert] += w2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT: it looks for the fused rank pattern among modules only
        served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "mail").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(served(ids).logits, expected(ids).logits, atol=1e-4)


def test_an_attach_that_fails_leaves_the_bare_base(
    bases: dict[str, HFBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = bases["llama"]
    adapter = random_adapter(backend, seed=3)
    bare, right = backend.nll([(None, SET), (adapter, SET)])
    calls = iter(range(100))

    def scarce(values: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("CUDA out of memory")
        return torch.from_numpy(np.array(values))

    with monkeypatch.context() as patched:
        empty = AdapterPool(backend.base, 1)
        patched.setattr(empty, "_torch", type("Scarce", (), {"tensor": staticmethod(scarce)}))
        with pytest.raises(OutOfMemory, match="out of memory for an adapter"), empty.on_base(adapter):
            pass
    assert backend.nll([(adapter, SET)]) == [right]
    assert backend.nll([(None, SET)]) == [bare]


def test_where_memory_ends_answers_and_representations_are_made_one_by_one(
    bases: dict[str, HFBackend], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = bases["llama"]
    texts = ["one", "and two", "or three"]
    answers = backend.answers(None, "Do:", texts, max_new_tokens=5)
    means = backend.embed(texts)

    def scarce(work: Any, most: int) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            if len(options["input_ids"]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            return work(*args, **options)

        return run

    model = backend.base.model
    forward = model.base_model.forward
    for most in (1, 0):
        monkeypatch.setattr(model.base_model, "forward", scarce(forward, most))
        if most:
            assert backend.answers(None, "Do:", texts, max_new_tokens=5) == answers
            np.testing.assert_allclose(backend.embed(texts), means, rtol=1e-4, atol=1e-5)
            assert caplog.text.count("out of memory") == 2
        else:
            with pytest.raises(ModelError, match="one example at a time"):
                backend.answers(None, "Do:", texts, max_new_tokens=5)
    with pytest.raises(ModelError, match="one example at a time"):
        backend.embed(texts)


def test_another_name_of_a_base_that_fits_is_a_warning(
    bases: dict[str, HFBackend], caplog: pytest.LogCaptureFixture
) -> None:
    backend = bases["llama"]
    adapter = random_adapter(backend)
    with caplog.at_level(logging.WARNING, "lorashelf"):
        backend.fits({"a": adapter})
        assert not caplog.records
        backend.fits({"a": Adapter(adapter.modules, BaseId("acme/other"))})
    assert "acme/other" in caplog.text


class Full:
    """The forward pass of a machine whose memory ends at more than `most` examples."""

    def __init__(self, forward: Any, most: int) -> None:
        self._forward, self._most, self.calls = forward, most, []

    def __call__(self, adapter: Any, batch: Any) -> Any:
        self.calls.append(len(batch))
        if len(batch) > self._most:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")
        return self._forward(adapter, batch)


def test_where_memory_ends_smaller_batches_are_tried_and_then_it_is_said(
    bases: dict[str, HFBackend], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = bases["llama"]
    expected = backend.nll([(None, SET)])[0]
    small = Full(backend._forward, 1)
    monkeypatch.setattr(backend, "_forward", small)
    with caplog.at_level(logging.WARNING, "lorashelf"):
        found = backend.nll([(None, SET)])[0]
    assert [x.nll for x in found] == pytest.approx([x.nll for x in expected], rel=1e-5)
    assert "out of memory" in caplog.text
    monkeypatch.setattr(backend, "_forward", Full(small._forward, 0))
    with pytest.raises(ModelError, match="out of memory"):
        backend.nll([(None, SET)])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no/such/folder/at all", "does not exist"),
        ("missing.gguf", "does not exist"),
        ("acme/no-such-model", "cannot be loaded"),
    ],
)
def test_a_base_that_is_nowhere_says_what_was_tried(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=said) as error:
        open_base(name)
    assert name in str(error.value)
    assert error.value.cure


CLOSED = "http://127.0.0.1:9"  # nothing listens there


@pytest.mark.parametrize("kept", ["nothing", "the configuration only", "some shards"])
def test_a_hub_id_out_of_reach_is_one_message_within_seconds(tmp_path: Path, kept: str) -> None:
    snapshot = tmp_path / "hub" / "models--acme--none" / "snapshots" / "0"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    if kept != "nothing":
        tiny_base(snapshot)
        (snapshot / "model.safetensors").unlink()
    if kept == "some shards":
        (snapshot / "a.safetensors").write_bytes(b"")
        (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors", "y": "b"}}')
    code = "import time; from lorashelf.models.base_model import open_base, libraries; libraries()\n"
    code += "begun = time.monotonic()\ntry: open_base('acme/none')\nexcept Exception as error: "
    code += "print(type(error).__name__, time.monotonic() - begun, error)"
    told = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment = {**told, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": CLOSED}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    kind, seconds, *said = run.stdout.split()
    assert (kind, run.stderr) == ("ModelError", "")
    assert float(seconds) < 10
    assert "hf download acme/none" in " ".join(said)


def test_a_hub_id_in_the_cache_needs_no_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / "0"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    tiny_base(snapshot)
    code = "from lorashelf.models.base_model import open_base; print(open_base('acme/tiny', device='cpu').name)"
    told = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment = {**told, "HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": CLOSED}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("acme/tiny\n", "")


def test_a_folder_without_a_model_and_a_broken_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASHELF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_base(str(tmp_path / "empty"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_base(str(tmp_path / "broken.gguf"))
    assert {path.name for path in (tmp_path / "cache").iterdir()} <= {"digests"}


def test_a_damaged_folder_ends_in_a_model_error(bases: dict[str, HFBackend], tmp_path: Path) -> None:
    source = Path(bases["llama"].base.name)

    def damaged(name: str, change: Any) -> Path:
        folder = shutil.copytree(source, tmp_path / str(len(list(tmp_path.iterdir()))))
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        return folder

    for name, change, said in (
        ("model.safetensors", lambda data: data[:-100], "cannot be loaded"),
        ("config.json", lambda data: data.replace(b'"hidden_size": 16', b'"hidden_size": "x"'), "cannot be loaded"),
        ("tokenizer.json", lambda data: b'{"version": "1.0"}', "cannot be loaded"),
        (
            "config.json",
            lambda data: data.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 3'),
            "lacks weights",
        ),
    ):
        with pytest.raises(ModelError, match=said) as error:
            open_base(str(damaged(name, change)))
        assert error.value.exit_code == 5
        assert len(str(error.value)) > 60


def test_an_adapter_is_no_base(bases: dict[str, HFBackend], tmp_path: Path) -> None:
    """Transformers would put it on its base: what is called zero-shot would not be."""
    backend = bases["llama"]
    write_adapter(random_adapter(backend), tmp_path / "adapter")
    backend.base.tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="this is an adapter"):
        open_base(str(tmp_path / "adapter"))


def test_two_weights_of_one_name_are_told_apart(bases: dict[str, HFBackend], tmp_path: Path) -> None:
    base = bases["llama"].base
    other = open_base(str(small_base(tmp_path / "other", "llama")), device="cpu", dtype="f32")
    same = HFBackend(replace(other, name=base.name))
    assert same.id == bases["llama"].id
    with torch.no_grad():
        other.model.model.layers[1].mlp.up_proj.weight += 0.01
    assert HFBackend(replace(other, name=base.name)).id != same.id


def test_stops_are_tokens_of_the_end_and_those_the_model_names(tmp_path: Path) -> None:
    folder = small_base(tmp_path / "base", "llama")
    base = open_base(str(folder), device="cpu", dtype="f32")
    base.model.generation_config.eos_token_id = [1, 7]
    assert HFBackend(base).text.stops == [1, 4, 7] == HFBackend(base).text.stops
    spelled = HFBackend(replace(base, template=replace(base.template, end="<end>")))
    letter = spelled.text.encoded(">")[0]
    assert letter not in spelled.text.stops
    row = spelled.text.encoded("if a > b: stop<end> and on")
    assert spelled.text.decoded(row) == "if a > b: stop"
    assert "".join(spelled.text.pieces(row)) == "if a > b: stop"
    assert "".join(spelled.text.pieces(spelled.text.encoded("a <en"))) == "a <en"
    base.tokenizer.eos_token = None
    base.model.generation_config.eos_token_id = None
    endless = HFBackend(replace(base, template=replace(base.template, end="")))
    assert endless.text.stops == []
    assert len(endless.answers(None, "Do:", ["a", "longer"], max_new_tokens=4)) == 2


def test_without_the_default_base_the_install_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as error:
        open_base()
    assert base_model.EMBEDDED_INSTALL in str(error.value)


@pytest.mark.parametrize("options", [{"device": "quantum"}, {"dtype": "f64"}])
def test_unknown_devices_and_dtypes_are_refused(bases: dict[str, HFBackend], options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="choose from"):
        open_base(bases["llama"].base.name, **options)


# templates -----------------------------------------------------------------------------------------------------------


def test_a_base_without_a_template_reads_plain_text(bases: dict[str, HFBackend]) -> None:
    template = bases["qwen2"].base.template
    assert template.query("Mend:", "a text").endswith("Mend:\n\na text\n")
    assert template.answer("done") == "done" + bases["qwen2"].base.tokenizer.eos_token


def test_the_prompt_id_tells_renderings_apart(bases: dict[str, HFBackend]) -> None:
    ids = {backend.base.template.id for backend in (bases["llama"], bases["qwen2"])}
    assert len(ids) == 2
    assert all(i.startswith("pr-") for i in ids)
    assert bases["llama"].base.template.id in bases["llama"].id


# answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_answers_are_those_of_peft_one_by_one(bases: dict[str, HFBackend], architecture: str, tmp_path: Path) -> None:
    backend = bases[architecture]
    adapter = random_adapter(backend, architecture)
    texts = ["a", "a longer text of many words", "bb"]
    found = backend.answers(adapter, "Mend:", texts, max_new_tokens=12)
    model = peft_model(backend, adapter, tmp_path / "a")
    for text, answer in zip(texts, found, strict=True):
        ids = torch.tensor([backend.text.encoded(backend.base.template.query("Mend:", text))])
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=backend.text.stops,
            pad_token_id=backend.text.pad,
        )
        assert answer == backend.text.decoded(written[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_that_have_ended_leave_the_batch_and_the_others_answer_as_alone(
    bases: dict[str, HFBackend], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows = bases[architecture], []
    queries = [base.text.encoded(text) for text in ("a", "a longer one " * 7, "bb", "another")]  # one beyond the window

    def counted(model: Any, read: torch.Tensor, *rest: Any) -> Any:
        rows.append(len(read))
        return next_logits(model, read, *rest)

    monkeypatch.setattr(decoding, "next_logits", counted)

    def written(some: list[list[int]]) -> list[list[int]]:
        steps = decoding.greedy(
            base.base.model, some, [30] * len(some), lambda row: len(row) > row[0] % 7, base.text.pad, nullcontext
        )
        return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]

    together = written(queries)
    assert rows == [sum(len(row) > step for row in together) for step in range(max(map(len, together)))]
    assert min(map(len, together)) < max(map(len, together))
    assert together == [written([query])[0] for query in queries]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch", [2048, 64])
def test_a_query_is_read_once_for_its_loss_and_its_answer(
    bases: dict[str, HFBackend], architecture: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = HFBackend(bases[architecture].base, batch=batch)
    adapter = random_adapter(base, architecture)
    texts = ["a", "a longer one " * 7, "bb", "another"]  # one beyond the window
    long = ExampleSet("long", "Mend:", tuple(Example(text, text[:9][::-1]) for text in texts))
    short = ExampleSet("short", "Say it briefly:", tuple(Example(text, "x") for text in texts[:2]))
    asked = [(long, 12), (short, 3), (ExampleSet("one", "Do:", (Example("c", "d"),)), 1)]
    wanted = [
        (losses, base.answers(adapter, some.instruction, [e.input for e in some.examples], max_new_tokens=most))
        for losses, (some, most) in zip(base.nll([(adapter, some) for some, _ in asked]), asked, strict=True)
    ]
    assert len({answer for _, answers in wanted for answer in answers}) > 3
    steps: list[int] = []

    def counted(model: Any, read: torch.Tensor, *rest: Any) -> Any:
        steps.append(read.shape[1])
        return next_logits(model, read, *rest)

    monkeypatch.setattr(decoding, "next_logits", counted)
    assert base.losses_and_answers(adapter, asked) == wanted
    assert set(steps) - {3} == {1}  # 3: the text that shows what the cache is like


def test_a_base_with_another_cache_reads_a_query_for_its_loss_and_for_its_answer(
    bases: dict[str, HFBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = HFBackend(bases["llama"].base)
    wanted = base.losses_and_answers(None, [(SET, 5)])
    monkeypatch.setattr("lorashelf.models.hf.grows_plainly", lambda *_: False)
    other = HFBackend(bases["llama"].base)
    assert other.losses_and_answers(None, [(SET, 5)]) == wanted


def test_where_memory_ends_while_queries_are_read_one_is_read_at_a_time(
    bases: dict[str, HFBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases["llama"]
    (losses, answers), read = base.losses_and_answers(None, [(SET, 5)])[0], Full(base._read, 1)
    monkeypatch.setattr(base, "_read", read)
    (found, texts) = base.losses_and_answers(None, [(SET, 5)])[0]
    assert [x.nll for x in found] == pytest.approx([x.nll for x in losses], rel=1e-5)
    assert texts == answers
    assert max(read.calls) > 1


HYBRID = {"num_key_value_heads": 1, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}
OWN_CACHE = {"num_key_value_heads": 1, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("falcon_h1", HYBRID | {"mamba_d_ssm": 32}), ("minimax", OWN_CACHE), ("mamba", {"state_size": 4})],
)
def test_rows_of_a_base_that_keeps_another_state_are_not_joined(kind: str, sizes: dict[str, Any]) -> None:
    """Beside keys and values in every layer, in a cache of its own, and in place of keys and values."""
    common = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=50, **common, **sizes)
    assert not decoding.grows_plainly(AutoModelForCausalLM.from_config(config).eval(), nullcontext)


def test_running_out_of_memory_does_not_count_as_another_cache(
    bases: dict[str, HFBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = HFBackend(bases["llama"].base)

    def scarce(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    with monkeypatch.context() as short:
        short.setattr(base.base.model, "forward", scarce)
        with pytest.raises(OutOfMemory):
            base.decoding(8)
    assert base.decoding(8).most == 8


def test_a_cache_of_the_models_own_keeps_its_rows() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    kinds = {"num_key_value_heads": 1, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("minimax", vocab_size=50, **sizes, **kinds)).eval()
    queries = [[4, 5], [6], [7, 8, 9]]
    steps = list(decoding.greedy(model, queries, [9] * 3, lambda row: len(row) > row[0] % 7, 0, nullcontext))
    assert 0 < steps[-1].count(None) < 3  # after some have ended, others went on


def test_a_base_without_keys_and_values_measures_losses_and_cannot_answer(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "base")
    config = AutoConfig.for_model("mamba", vocab_size=261, hidden_size=16, state_size=4, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    backend = HFBackend.open(str(folder), device="cpu", dtype="f32")
    assert all(math.isfinite(loss.nll) for loss in backend.nll([(None, SET)])[0])
    with pytest.raises(ModelError, match="no keys and values"):
        backend.answers(None, "Mend:", ["a"], max_new_tokens=3)


# the real model ------------------------------------------------------------------------------------------------------


def test_a_real_adapter_lowers_the_loss_of_its_task(smollm2: HFBackend) -> None:
    assert smollm2.base.name == base_model.EMBEDDED
    tasks = read_tasks(ROOT / "examples" / "fewshot")
    for name in ("qa-es", "tone-de"):
        examples = tasks[name].examples("validation", 3)
        bare, own = smollm2.nll([(None, examples), (read_adapter(ROOT / "examples" / "zoo" / name), examples)])
        assert mean_loss(own) < 0.8 * mean_loss(bare)
        assert all(math.isfinite(loss.nll) and loss.tokens > 0 for loss in own)


@pytest.mark.long
def test_d2c_on_the_real_model_takes_the_moves_of_the_transcription(smollm2: HFBackend) -> None:
    from lorashelf import merge
    from lorashelf.placement.d2c import search
    from lorashelf.search.block_loss import BlockLoss
    from test_d2c import METHOD, literal

    names = ["qa-es", "qa-fr", "tone-de", "tone-es"]
    tasks = read_tasks(ROOT / "examples" / "fewshot")
    adapters = {name: read_adapter(ROOT / "examples" / "zoo" / name) for name in names}
    sets = {name: tasks[name].examples("train", 2) for name in names}

    def merged(block: Any) -> Adapter:
        return merge([adapters[t] for t in block], method=METHOD) if len(block) > 1 else adapters[block[0]]

    for seed in (0, 1):
        found = search(names, 2, BlockLoss(adapters, sets, smollm2, merged), iterations=6, seed=seed)
        moves, blocks = literal(adapters, sets, smollm2, 2, 6, seed)
        assert list(found.moves) == moves
        assert list(found.blocks) == blocks
