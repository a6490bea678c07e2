"""Routing by text alone: prototypes by hand, their cache, `embed`, and `generate --auto`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factory import make_adapter
from lorashelf import Shelf, new_settings, plan_add, read_adapter
from lorashelf.cli import main
from lorashelf.errors import UsageError
from lorashelf.models.hf import HFBackend
from lorashelf.serving.text_routing import Prototypes, choose, examples_on, prototypes
from lorashelf.tasks.folders import Example, ExampleSet, Task, read_tasks
from tiny_base import tiny_base

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("one_thread")


class Letters:
    """Represents a text by how often it has a, b and c; counts what it is asked."""

    def __init__(self, name: str = "letters") -> None:
        self.embedding_id = name
        self.asked: list[str] = []

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        return np.array([[text.count(letter) for letter in "abc"] for text in texts], np.float32)


def examples(**texts: Sequence[str]) -> dict[str, ExampleSet]:
    return {task: ExampleSet(task, "Do:", tuple(Example(t, "x") for t in given)) for task, given in texts.items()}


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """a-x and b-x share slot 0 (the policy has no other), c-x is in slot 1."""
    made = Shelf.create(tmp_path / "a.shelf", new_settings(2, policy="oracle"))
    for i, (task, kind) in enumerate([("a-x", "one"), ("b-x", "one"), ("c-x", "two")]):
        made.commit(plan_add(made.snapshot(), make_adapter(i), task, type=kind))
    return made


def test_confidences_are_a_softmax_of_centred_cosines() -> None:
    means = np.array([[1, 0, 5], [0, 1, 5]], np.float32)  # what all share does not matter
    confidences = Prototypes(("a", "b"), means).confidences(np.array([[2, 1, 5], [0.5, 0.5, 5], [9, 0, 5]], np.float32))
    assert confidences.sum(axis=1) == pytest.approx([1, 1, 1])
    assert confidences[1] == pytest.approx([0.5, 0.5])  # the centre itself: nothing tells
    cosine = (1.5 - 0.5) / (np.hypot(1.5, 0.5) * np.sqrt(2))
    assert confidences[0, 0] == pytest.approx(1 / (1 + np.exp(-2 * cosine / 0.02)))


def test_one_task_alone_is_certain() -> None:
    assert Prototypes(("a",), np.ones((1, 3), np.float32)).confidences(np.zeros((1, 3), np.float32)) == 1


def test_the_slots_confidence_is_the_sum_over_its_tasks(shelf: Shelf) -> None:
    known = prototypes(Letters(), examples(**{"a-x": ["a"], "b-x": ["b"], "c-x": ["c"]}))
    choice = choose(Letters(), known, shelf.snapshot(), "aaab")
    assert (choice.task, choice.slot) == ("a-x", 0)
    assert choice.slot_confidence == pytest.approx(choice.confidence + choice.others["b-x"])
    assert choose(Letters(), known, shelf.snapshot(), "ccc").slot == 1


def test_means_are_kept_by_embedder_and_examples(tmp_path: Path) -> None:
    first, second, other = Letters(), Letters(), Letters("other")
    shown = examples(a=["a", "aa"], b=["b"])
    made = prototypes(first, shown, tmp_path / "cache")
    again = prototypes(second, shown, tmp_path / "cache")
    assert np.array_equal(made.means, again.means)
    assert (first.asked, second.asked) == (["a", "aa", "b"], [])
    prototypes(second, {**shown, **examples(b=["bb"], c=["c"])}, tmp_path / "cache")
    assert second.asked == ["bb", "c"]  # what changed and what is new, not a
    prototypes(other, shown, tmp_path / "cache")
    assert other.asked == ["a", "aa", "b"]


@pytest.mark.parametrize(
    "damaged",
    [
        lambda whole: b"",
        lambda whole: whole[:3],
        lambda whole: whole[:4],  # whole values, fewer of them
        lambda whole: whole[:8],
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: bytes([whole[0] ^ 1]) + whole[1:],
        lambda whole: np.array([np.nan] * 3, "<f4").tobytes() + whole[12:],
    ],
)
def test_a_damaged_file_in_the_cache_is_made_again_with_a_notice(
    tmp_path: Path, damaged: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    shown = examples(a=["abc"], b=["b"])
    made = prototypes(Letters(), shown, tmp_path / "cache")
    files = {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    file, whole = next(iter(files.items()))
    file.write_bytes(damaged(whole))
    again = prototypes(Letters(), shown, tmp_path / "cache")
    assert np.array_equal(made.means, again.means)
    assert {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()} == files
    assert caplog.text.count("is damaged and will be rebuilt") == 1
    assert str(file) in caplog.text
    caplog.clear()
    prototypes(Letters(), shown, tmp_path / "cache")
    assert caplog.text == ""


def test_the_tasks_are_gone_through_by_name() -> None:
    seen = []

    def watch(names: Sequence[str]) -> Iterator[str]:
        for name in names:
            seen.append((name, len(names)))
            yield name

    prototypes(Letters(), examples(b=["b"], a=["abc"]), watch=watch)
    assert seen == [("b", 2), ("a", 2)]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert prototypes(Letters(), examples(a=["a"]), tmp_path / "file" / "cache").means.tolist() == [[1, 0, 0]]


def test_only_tasks_on_the_shelf_are_chosen_from(shelf: Shelf) -> None:
    train = (Example("a", "x"),)
    tasks = {name: Task(name, "Do:", "one", splits={"train": train}) for name in ("a-x", "z-x")}
    tasks["b-x"] = Task("b-x", "Do:", "one", splits={"validation": train})
    assert list(examples_on(shelf.snapshot(), tasks)) == ["a-x"]
    with pytest.raises(UsageError, match="no task on the shelf has examples"):
        examples_on(shelf.snapshot(), {"z-x": tasks["z-x"]})


# the model ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def tiny(base: Path) -> HFBackend:
    return HFBackend.open(str(base), dtype="f32")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_embed_is_the_mean_over_the_texts_tokens(architecture: str, tmp_path: Path) -> None:
    import torch

    backend = HFBackend.open(str(tiny_base(tmp_path / "base", architecture)), dtype="f32")
    texts = ["some words", "x", "many more words than there were before"]
    got = backend.embed(texts)
    assert (got.shape, got.dtype) == ((3, 16), np.float32)
    tokenizer, model = backend.base.tokenizer, backend.base.model
    for text, row in zip(texts, got, strict=True):
        before = tokenizer(backend.base.template.before, add_special_tokens=False).input_ids
        own = tokenizer(text, add_special_tokens=False).input_ids
        with torch.inference_mode():
            states = model(torch.tensor([before + own]), output_hidden_states=True).hidden_states[1][0]
        assert row == pytest.approx(states[len(before) :].mean(dim=0).numpy(), rel=1e-4, abs=1e-5)


def test_embed_is_of_the_bare_base_and_stops_at_the_context(tiny: HFBackend) -> None:
    bare = tiny.embed(["some words"])
    next(tiny.stream(tiny_adapter(), "Do:", "some words"))
    assert np.array_equal(tiny.embed(["some words"]), bare)
    assert np.isfinite(tiny.embed(["long " * 300])).all()


def tiny_adapter() -> Any:
    from test_generation import adapter

    return adapter(1)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("LORASHELF_CACHE", str(tmp_path / "cache"))

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["generate", *map(str, words), "--base", str(base), "--model-dtype", "f32"])
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture
def served(tmp_path: Path, base: Path) -> Shelf:
    """up and low on a shelf, as their examples under tasks/ show upper and lower case; and one without examples."""
    from test_generation import adapter

    made = Shelf.create(tmp_path / "b.shelf", new_settings(3, policy="kmerge"))
    for seed, (task, text) in enumerate([("up", "MANY LOUD WORDS"), ("low", "some quiet words"), ("none", "")]):
        made.commit(plan_add(made.snapshot(), adapter(seed, str(base)), task))
        folder = tmp_path / "tasks" / task
        if text:
            folder.mkdir(parents=True)
            (folder / "task.toml").write_text('prompt = "Say it:"\nmax_new_tokens = 4\n')
            (folder / "train.jsonl").write_text(json.dumps({"input": text, "output": "x"}) + "\n")
    return made


def test_auto_chooses_by_the_text_and_says_how_sure_it_is(
    served: Shelf, tmp_path: Path, run: Callable[..., tuple[int, str, str]], tiny: HFBackend
) -> None:
    from lorashelf.serving.generate import answer

    code, out, error = run(served.path, "MANY LOUD WORDS", "--auto", "--examples", tmp_path / "tasks")
    assert code == 0
    assert out == answer(tiny, served.snapshot(), "up", "MANY LOUD WORDS", prompt="Say it:") + "\n"
    assert "slot 0" in error
    assert "for up" in error
    assert "never chosen: none" in error
    code, out, _ = run(served.path, "some quiet words", "--auto", "--examples", tmp_path / "tasks", "--json")
    document = json.loads(out)
    assert (document["task"], document["slot"]) == ("low", 1)
    assert document["auto"]["confidence"] > 0.5
    assert len(list((tmp_path / "cache" / "prototypes").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("TEXT", "--auto"), "--examples DIR"),
        (("up", "TEXT", "--auto", "--examples", "tasks"), "the text alone"),
        (("up", "TEXT", "--examples", "tasks"), "--examples is for --auto"),
        (("TEXT", "--auto", "--examples", "nowhere"), "no task folder"),
    ],
)
def test_auto_is_refused_where_its_words_do_not_fit(
    served: Shelf,
    tmp_path: Path,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, error = run(served.path, *words)
    assert (code, out) == (2, "")
    assert said in error


@pytest.mark.long
def test_smollm2_finds_the_slot_of_texts_of_the_few_shot_tasks(tmp_path: Path, smollm2: HFBackend) -> None:
    tasks = read_tasks(ROOT / "examples" / "fewshot")
    chosen = [name for name in ("gec-de", "qa-ja", "sum-zh") if (ROOT / "examples" / "zoo" / name).exists()]
    shelf = Shelf.create(tmp_path / "c.shelf", new_settings(3, policy="kmerge"))
    for name in chosen:
        shelf.commit(plan_add(shelf.snapshot(), read_adapter(ROOT / "examples" / "zoo" / name), name))
    known = prototypes(smollm2, examples_on(shelf.snapshot(), tasks), tmp_path / "cache")
    for name in chosen:
        for example in tasks[name].splits["validation"][:2]:
            assert choose(smollm2, known, shelf.snapshot(), example.input).task == name
