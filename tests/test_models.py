"""Models behind one protocol: engines, capabilities, adapters in a pool, and one greedy decoding."""

from __future__ import annotations

import ast
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lorashelf import ENGINES, Adapter, open_model
from lorashelf.errors import MissingExtra, UnknownName, UsageError
from lorashelf.models.hf import HFBackend
from lorashelf.models.hooks import AdapterPool
from lorashelf.models.protocol import Answers, Effects, Embeds, LanguageModel, Scores, capable
from lorashelf.models.quadratic import QuadraticBackend
from lorashelf.tasks.folders import Example, ExampleSet
from test_architecture import SOURCE, imports, loaded_after, module_name
from test_generation import adapter
from tiny_base import tiny_base

LIBRARIES = {"torch", "transformers", "peft"}
ROOMS = ("models", "training")  # that may name objects of these libraries
SET = ExampleSet("mend", "Mend:", tuple(Example(f"a text {i}", f"an answer {i}") for i in range(4)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny", context=160)


@pytest.fixture
def model(folder: Path) -> HFBackend:
    return HFBackend.open(str(folder), device="cpu", dtype="f32")


def adapters(folder: Path, count: int) -> list[Adapter]:
    return [adapter(seed, str(folder)) for seed in range(count)]


# who knows the libraries ----------------------------------------------------------------------------------------------


def outside() -> list[Path]:
    return [path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] not in ROOMS]


def foreign_objects(source: str) -> list[str]:
    """Where code takes transformers' model or tokenizer out of a base: `….base.model`, `….tokenizer`."""
    found = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return [text for text in found if re.search(r"\b(base|backend)\.model$|\.tokenizer$", text)]


@pytest.mark.parametrize("path", outside(), ids=module_name)
def test_only_models_and_training_name_objects_of_torch_or_transformers(path: Path) -> None:
    assert {other.partition(".")[0] for other, ours, _ in imports(path) if not ours} & LIBRARIES == set()
    assert [other for other, ours, _ in imports(path) if ours and other == "models.hf"] == (
        ["models.hf"] if path == SOURCE / "__init__.py" else []
    )
    assert foreign_objects(path.read_text()) == []


def test_the_rule_sees_a_tokenizer_that_is_asked_for() -> None:
    code = "backend.base.tokenizer(text)\nx = base.model.device\ny = stream.model.Categorical"
    assert foreign_objects(code) == ["backend.base.tokenizer", "base.model"]


def test_an_engine_is_imported_when_it_is_asked_for() -> None:
    code = "import pkgutil, importlib, lorashelf.models as m\n"
    code += "[importlib.import_module(f'lorashelf.models.{x.name}') for x in pkgutil.iter_modules(m.__path__)]"
    assert loaded_after(code) & LIBRARIES == set()
    assert "lorashelf.models.hf" not in loaded_after("from lorashelf import open_model, ENGINES; list(ENGINES)")


# engines and capabilities ---------------------------------------------------------------------------------------------


def test_the_engine_of_transformers_is_a_whole_language_model(folder: Path, model: HFBackend) -> None:
    opened = open_model(str(folder), device="cpu", dtype="f32")
    assert isinstance(opened, LanguageModel)
    assert isinstance(opened, HFBackend)
    for name in ("name", "weights", "dtype", "prompt_id", "context", "id"):
        assert getattr(opened, name) == getattr(model, name)
    assert (opened.name, opened.dtype, opened.context) == (str(folder), "float32", 160)
    assert opened.id == f"{folder} {model.weights} float32 {model.base.template.id}"  # as journals have it


def test_an_unknown_engine_is_named_with_the_nearest(folder: Path) -> None:
    with pytest.raises(UnknownName, match="unknown engine 'hff'") as caught:
        open_model(str(folder), engine="hff")
    assert "'hf'" in (caught.value.cure or "")


def test_an_engine_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtra, match="the engine llamacpp needs llama-cpp-python") as refused:
        open_model("x.gguf", "llamacpp", capability=Scores)
    assert refused.value.cure == "pip install 'lorashelf[llamacpp]'"


def test_a_capability_that_an_engine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES._values, "quadratic", lambda name, **_: QuadraticBackend({}))
    assert open_model("x", engine="quadratic", capability=Scores).id == "quadratic"
    for capability, verbs in (
        (Answers, "answer texts"),
        (Embeds, "represent texts"),
        (Effects, "show the inputs of its modules"),
        (LanguageModel, "answer texts or represent texts"),
    ):
        with pytest.raises(UsageError) as caught:
            open_model("x", engine="quadratic", capability=capability)
        assert caught.value.what == f"the model cannot {verbs}"
    assert capable(QuadraticBackend({}), Scores).context is None


# adapters in a pool ---------------------------------------------------------------------------------------------------

TEXTS = ("a first text", "another one")
MOST = 24


def alone(model: HFBackend, pair: list[Adapter]) -> list[str]:
    return ["".join(model.stream(x, "Do:", text, max_new_tokens=MOST)) for x, text in zip(pair, TEXTS, strict=True)]


def test_two_streams_side_by_side_answer_as_alone_and_upload_each_adapter_once(folder: Path, model: HFBackend) -> None:
    pair = adapters(folder, 2)
    expected = alone(HFBackend(model.base), pair)
    assert expected[0] != expected[1]
    streams = [model.stream(x, "Do:", text, max_new_tokens=MOST) for x, text in zip(pair, TEXTS, strict=True)]
    written = ["", ""]
    running = dict(enumerate(streams))
    while running:
        for i in list(running):
            piece = next(running[i], None)
            if piece is None:
                del running[i]
            else:
                written[i] += piece
                assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.base.model.modules())
    assert written == expected
    assert model.adapters.uploads == 2


def test_an_adapter_read_again_is_not_uploaded_again(folder: Path, model: HFBackend) -> None:
    first = model.nll([(adapter(0, str(folder)), SET)])
    assert model.nll([(adapter(0, str(folder)), SET)]) == first
    assert model.adapters.uploads == 1


def test_threads_that_share_a_model_get_what_each_gets_alone(folder: Path, model: HFBackend) -> None:
    """Also through two backends on one base: hooks are the base's."""
    pair = adapters(folder, 2)
    other = HFBackend(model.base)
    expected = alone(other, pair)
    losses = model.nll([(pair[0], SET), (None, SET)])
    means = model.embed(TEXTS)
    start = threading.Barrier(6)

    def work(kind: int) -> Any:
        start.wait()
        if kind < 4:
            chosen = (model, other)[kind // 2]
            return "".join(chosen.stream(pair[kind % 2], "Do:", TEXTS[kind % 2], max_new_tokens=MOST))
        if kind == 4:
            return [model.nll([(pair[0], SET), (None, SET)]) for _ in range(5)]
        return [model.embed(TEXTS) for _ in range(5)]

    for _ in range(3):
        with ThreadPoolExecutor(6) as pool:
            *streams, measured, embedded = pool.map(work, range(6))
        assert streams == expected * 2
        assert measured == [losses] * 5
        assert all((found == means).all() for found in embedded)
    assert model.adapters.uploads == 2


def test_the_pool_is_bounded_and_those_asked_for_last_stay(folder: Path, model: HFBackend) -> None:
    one, two, three = adapters(folder, 3)
    pool = AdapterPool(model.base, 2)

    def used(*several: Adapter) -> int:
        for x in several:
            with pool.on_base(x):
                pass
        return pool.uploads

    assert used(one, two, one) == 2
    assert used(three, one, three) == 3  # two left
    assert used(two) == 4
    assert len(pool._held) == 2


def test_where_memory_ends_the_other_adapters_make_room(
    folder: Path, model: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, (one, two) = AdapterPool(model.base, 8), adapters(folder, 2)
    with pool.on_base(one):
        pass

    def scarce(values: Any) -> Any:
        if pool._held:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return torch.from_numpy(values)

    monkeypatch.setattr(pool, "_torch", type("Scarce", (), {"tensor": staticmethod(scarce)}))
    with pool.on_base(two):
        pass
    assert list(pool._held) == [two.digest]


# one greedy decoding --------------------------------------------------------------------------------------------------


def test_the_models_own_generation_settings_stay(folder: Path) -> None:
    base = HFBackend.open(str(folder), device="cpu", dtype="f32").base
    own = base.model.generation_config
    own.repetition_penalty, own.max_length, own.eos_token_id = 1.5, 77, [1, 9]
    before = own.to_dict()
    model = HFBackend(base)
    answers = model.answers(None, "Do:", TEXTS, max_new_tokens=8)
    assert ["".join(model.stream(None, "Do:", text, max_new_tokens=8)) for text in TEXTS] == answers
    assert base.model.generation_config is own
    assert own.to_dict() == before
    assert 9 in model.text.stops


def steps(model: HFBackend, queries: list[list[int]], count: int) -> list[list[int | None]]:
    return list(model._steps(None, [(query, count) for query in queries]))


def test_a_batch_ends_when_its_last_answer_does(
    folder: Path, model: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = [model.text.query("Do:", text) for text in TEXTS]
    whole = steps(model, queries, 10)
    rows = [[step[i] for step in whole] for i in range(2)]
    stops = [rows[0][2], rows[1][3]]
    lengths = [next(n for n, token in enumerate(row, 1) if token in stops) for row in rows]
    assert len(whole) == 10 > max(lengths) > min(lengths)
    monkeypatch.setattr(model.text, "stops", stops)
    expected = [[row[n] if n < end else None for row, end in zip(rows, lengths, strict=True)] for n in range(10)]
    assert steps(model, queries, 10) == expected[: max(lengths)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_streams_batches_and_transformers_write_the_same(architecture: str, tmp_path: Path) -> None:
    """Of texts of different lengths, which a batch pads."""
    model = HFBackend.open(str(tiny_base(tmp_path / "base", architecture)), device="cpu", dtype="f32")
    texts = ["a", "some longer text than that", "mid length"]
    found = model.answers(None, "Do:", texts, max_new_tokens=20)
    assert ["".join(model.stream(None, "Do:", text, max_new_tokens=20)) for text in texts] == found
    for text, answer in zip(texts, found, strict=True):
        ids = torch.tensor([model.text.query("Do:", text)])
        written = model.base.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=model.text.stops
        )
        assert answer == model.text.decoded(written[0, ids.shape[1] :].tolist())
