"""Evaluation: every number against a direct computation, nothing measured twice, nothing compared that differs."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command import Command
from factory import tree
from lorashelf import Adapter, BaseId, Factors, Modules, Shelf, new_settings, plan_add, read_adapter, write_adapter
from lorashelf.cli import output
from lorashelf.errors import MissingExtra, TaskNameError, UsageError
from lorashelf.evaluation import measure as module
from lorashelf.evaluation.compare import Evaluation, Measured
from lorashelf.evaluation.files import COLUMNS, read_result, write_result
from lorashelf.evaluation.measure import Unit, evaluate, metrics_of, prepare
from lorashelf.evaluation.metrics import loss_kept, metric, normalised, scored
from lorashelf.formats.peft import encode
from lorashelf.models import decoding
from lorashelf.models.base_model import EMBEDDED
from lorashelf.models.decoding import next_logits
from lorashelf.models.hf import HFBackend
from lorashelf.models.protocol import Answers, Loss, Question
from lorashelf.models.quadratic import QuadraticBackend
from lorashelf.result_store import ResultStore, opened
from lorashelf.shelf.routing import storage
from lorashelf.tasks.folders import Example, ExampleSet, Task, read_tasks
from tiny_base import tiny_base

ROOT = Path(__file__).parent.parent
NEW_TOKENS = 8
CONTEXT = 160
METRICS = {"a-en": "f1", "b-en": "rouge_l", "c-xx": None}


def tiny_adapter(seed: int, base: str, width: int = 16) -> Adapter:
    rng = np.random.default_rng(seed)
    modules = {}
    for layer in range(2):
        for projection, dout in (("q_proj", width), ("v_proj", width // 2)):
            a, b = rng.standard_normal((3, width)), rng.standard_normal((dout, 3))
            path = f"model.layers.{layer}.self_attn.{projection}"
            modules[path] = Factors(a.astype(np.float32), b.astype(np.float32), 0.5)
    return Adapter(Modules(modules), BaseId(base), "f32", {"task_type": "CAUSAL_LM"})


def write_task(folder: Path, task: Task, examples: Sequence[Example]) -> None:
    folder.mkdir(parents=True)
    lines = [f'prompt = "{task.prompt}"', f'language = "{task.language}"', f"max_new_tokens = {task.max_new_tokens}"]
    lines += [f'metric = "{task.metric}"'] if task.metric else []
    (folder / "task.toml").write_text("\n".join(lines) + "\n")
    records = [{"input": e.input, "output": e.output, "references": list(e.references)} for e in examples]
    (folder / "validation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@dataclass(frozen=True)
class World:
    base: Path
    adapters: Path
    data: Path
    shelf: Path
    backend: HFBackend
    journal: ResultStore  # in memory, for tests that only need an evaluation

    def evaluation(self, adapters: dict[str, Adapter] | None = None) -> Evaluation:
        return evaluate(self.backend, adapters or dict.fromkeys(METRICS), self.tasks, journal=self.journal)

    @property
    def tasks(self) -> dict[str, Task]:
        return read_tasks(self.data)

    @property
    def own(self) -> dict[str, Adapter]:
        return {path.name: read_adapter(path) for path in sorted(self.adapters.iterdir())}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny base; three tasks whose answers are mostly what their own adapter writes; a shelf of two slots."""
    root = tmp_path_factory.mktemp("world")
    base = tiny_base(root / "base", context=CONTEXT)
    backend = HFBackend.open(str(base), dtype="f32")
    shelf = Shelf.create(root / "my.shelf", new_settings(2, policy="kmerge"))
    for seed, (name, measure) in enumerate(METRICS.items()):
        adapter = tiny_adapter(seed, str(base))
        write_adapter(adapter, root / "adapters" / name)
        inputs = [f"{word} {name}" for word in ("one", "two", "three", "four and more")]
        task = Task(name, f"Do {name}:", name[0], name[2:], measure, NEW_TOKENS)
        written = backend.answers(adapter, task.prompt, inputs, max_new_tokens=NEW_TOKENS)
        outputs = [*written[:3], "something else"]
        examples = [Example(i, o or "none", ("a reference",)) for i, o in zip(inputs, outputs, strict=True)]
        write_task(root / "data" / name, task, examples)
        shelf.commit(plan_add(shelf.snapshot(), read_adapter(root / "adapters" / name), name))
    return World(base, root / "adapters", root / "data", root / "my.shelf", backend, ResultStore())


class Counting:
    """A backend that counts what it is asked, and may be told to fail at the n-th."""

    def __init__(self, backend: HFBackend, stop_at: int | None = None) -> None:
        self.calls, self._stop_at = [], stop_at
        for name in ("name", "weights", "dtype", "template", "prompt_id", "context", "id", "stream", "together"):
            setattr(self, name, getattr(backend, name))
        self._backend = backend
        self.fits, self.fitting = backend.fits, backend.fitting

    def _count(self, what: str, task: str) -> None:
        if len(self.calls) == self._stop_at:
            raise KeyboardInterrupt
        self.calls.append((what, task))

    def nll(self, pairs: Any) -> Any:
        self._count("loss", pairs[0][1].task)
        return self._backend.nll(pairs)

    def answered(self, adapter: Any, questions: Any) -> Any:
        self._count("answers", questions[0].instruction)
        return self._backend.answered(adapter, questions)

    def answers(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("an evaluation answers several tasks at once")


class CountingOnce(Counting):
    """A backend that takes losses and answers from one reading."""

    def losses_and_answers(self, adapter: Any, asked: Any) -> Any:
        self._count("both", ", ".join(examples.task for examples, _ in asked))
        return self._backend.losses_and_answers(adapter, asked)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr("lorashelf.cli.base.PATIENCE", 600.0)  # slow machines would print what they wait for
    return Command(capsys, "eval")


@pytest.fixture
def common(world: World) -> list[object]:
    return ["--base", world.base, "--data", world.data, "--model-dtype", "f32"]


# every number against a direct computation ---------------------------------------------------------------------------


def merged_model(world: World, adapter: Adapter | None) -> Any:
    """A copy of the base with ΔW added to its weights."""
    import torch

    model = copy.deepcopy(world.backend.base.model)
    for hooks in (m._forward_hooks for m in model.modules()):
        hooks.clear()
    for path, factors in adapter.modules.items() if adapter else ():
        model.get_submodule(path).weight.data += torch.as_tensor(factors.delta())
    return model


def token_ids(world: World, text: str) -> list[int]:
    return world.backend.base.tokenizer(text, add_special_tokens=False).input_ids


def rendered(task: Task, text: str) -> str:
    return f"<|im_start|>user\n{task.prompt}\n\n{text}<|im_end|>\n<|im_start|>assistant\n"


def direct_loss(world: World, model: Any, task: Task) -> float:
    """Transformers' own loss, the prompt's labels −100, weighted by answer tokens."""
    import torch

    nll, tokens = 0.0, 0
    for example in task.splits["validation"]:
        query, answer = token_ids(world, rendered(task, example.input)), token_ids(world, example.output + "<|im_end|>")
        labels = torch.tensor([[-100] * len(query) + answer])
        with torch.inference_mode():
            loss = model(input_ids=torch.tensor([query + answer]), labels=labels).loss
        nll, tokens = nll + float(loss) * len(answer), tokens + len(answer)
    return nll / tokens


def direct_answers(world: World, model: Any, task: Task) -> list[str]:
    import torch

    texts = []
    for example in task.splits["validation"]:
        ids = torch.tensor([token_ids(world, rendered(task, example.input))])
        end = token_ids(world, "<|im_end|>")[0]
        with torch.inference_mode():
            row = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=[end, token_ids(world, "</s>")[0]],  # of the turn, and the one that the base names
                pad_token_id=end,
            )[0, ids.shape[1] :]
        texts.append(world.backend.base.tokenizer.decode(row, skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize("with_adapters", [True, False])
def test_losses_and_scores_are_those_computed_directly(world: World, with_adapters: bool) -> None:
    adapters: dict[str, Adapter | None] = world.own if with_adapters else dict.fromkeys(METRICS)
    found = evaluate(world.backend, adapters, world.tasks, seed=3)
    assert list(found.tasks) == sorted(METRICS)
    for name, task in world.tasks.items():
        record, model = found.tasks[name], merged_model(world, adapters[name])
        assert record.loss == pytest.approx(direct_loss(world, model, task), abs=2e-5)
        assert record.document()["n"] == 4
        if METRICS[name] is None:
            assert (record.score, record.answers) == (None, None)
            continue
        predictions = direct_answers(world, model, task)
        assert list(record.answers or ()) == predictions
        made = metric(METRICS[name], "en")
        assert record.score == scored(made, task.splits["validation"], predictions, seed=3)
    scores = [record.score.value for record in found.tasks.values() if record.score]
    assert found.average == pytest.approx(sum(scores) / 2)
    if with_adapters:
        assert min(scores) > 50


def test_another_adapter_gives_other_numbers(world: World) -> None:
    """The twin of the test above: the comparison would notice adapters that are not applied."""
    own, bare = world.evaluation(world.own), world.evaluation()
    for name in METRICS:
        assert abs(own.tasks[name].loss - bare.tasks[name].loss) > 0.01


def test_the_context_ends_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With learned positions, generating past the context would fail; with rotary ones it would be nonsense."""
    backend = HFBackend.open(str(tiny_base(tmp_path / "base", "gpt2", context=CONTEXT, chat=False)), dtype="f32")
    text = "x" * (CONTEXT - len("Do:\n\n\n") - 5)  # room for five tokens, one byte each
    short, long = backend.answers(None, "Do:", ["x", text], max_new_tokens=16)
    assert [short] == backend.answers(None, "Do:", ["x"], max_new_tokens=16)
    assert [long] == backend.answers(None, "Do:", [text], max_new_tokens=5)
    widths: list[int] = []

    def counted(model: Any, read: Any, *rest: Any) -> Any:
        widths.append(len(read))
        return next_logits(model, read, *rest)

    monkeypatch.setattr(decoding, "next_logits", counted)
    questions = [Question("Do:", "x", 16), Question("Do:", text, 5)]
    assert backend.answered(None, questions) == [short, long]
    assert set(widths) == {1}  # a row that has no room for the longest answer of a batch stays out of it


def test_an_adapter_none_is_the_bare_base_and_slots_are_attached_once(world: World) -> None:
    shared = tiny_adapter(9, str(world.base))
    order: list[str] = []

    def watch(units: Sequence[Unit]) -> Iterator[Unit]:
        for unit in units:
            order.append(unit.task.name)
            yield unit

    evaluate(world.backend, {"a-en": shared, "b-en": None, "c-xx": shared}, world.tasks, watch=watch)
    assert order == ["a-en", "a-en", "c-xx", "b-en", "b-en"]


def test_tasks_of_one_adapter_come_together_though_it_was_read_for_each(world: World) -> None:
    first, again = (read_adapter(world.adapters / "a-en") for _ in range(2))
    order: list[str] = []
    adapters = {"a-en": first, "b-en": None, "c-xx": again}
    evaluate(
        world.backend, adapters, world.tasks, watch=lambda units: order.extend(u.task.name for u in units) or units
    )
    assert order == ["a-en", "a-en", "c-xx", "b-en", "b-en"]


def test_losses_need_no_model_that_answers() -> None:
    """A metric needs answers; the refusal comes before anything is measured."""
    own = {"a": tiny_adapter(0, "quadratic")}
    task = Task("a", "Do:", "a", "en", "f1", splits={"validation": (Example("u", "u"),)})
    model = QuadraticBackend(own)
    assert evaluate(model, own, {"a": task}, loss_only=True).average_loss == pytest.approx(0, abs=1e-3)
    with pytest.raises(UsageError, match="cannot answer texts"):
        prepare(model, own, {"a": task})


class Quadratic(QuadraticBackend, Answers):
    """The model without a model, with answers that repeat the question."""

    def answered(self, adapter: Any, questions: Sequence[Question]) -> list[str]:
        return [question.text for question in questions]

    def stream(self, adapter: Any, instruction: str, text: str, *, max_new_tokens: int = 64) -> Iterator[str]:
        yield text


def test_any_backend_will_do_and_its_optimum_has_loss_zero() -> None:
    own = {name: tiny_adapter(i, "quadratic") for i, name in enumerate(["a", "b"])}
    task = Task("a", "Do:", "a", "en", "f1", splits={"test": (Example("u v", "u v"), Example("u v", "w"))})
    tasks = {"a": task, "b": replace(task, name="b", metric=None)}
    backend = Quadratic(own)
    mine, bare = (evaluate(backend, x, tasks, split="test") for x in (own, dict.fromkeys(own)))
    assert [m.loss for m in mine.tasks.values()] == pytest.approx([0, 0], abs=1e-3)
    assert mine.average == 50.0
    swapped = evaluate(backend, {"a": own["b"], "b": own["b"]}, tasks, split="test")
    kept = swapped.compared(mine.document(), bare.document()).document()["normalised"]
    zero, loss = (e.tasks["a"].loss for e in (bare, swapped))
    assert kept["loss_kept"] == pytest.approx(((zero - loss) / zero + 1) / 2)
    assert kept["S"] == 1.0


# the JSON document ---------------------------------------------------------------------------------------------------


def test_the_document_keeps_the_contract(world: World, run: Command, common: list[object]) -> None:
    code, document = run(*common)
    assert code == 0
    assert {"tasks", "average", "normalised", "storage"} <= document.keys()
    assert set(document["tasks"]) == set(METRICS)
    for name, record in document["tasks"].items():
        assert {"loss", "score", "metric", "n"} <= record.keys()
        assert record["examples"] == world.tasks[name].examples("validation").digest
        assert record["adapter"] is None
    assert document["tasks"]["c-xx"]["score"] is document["tasks"]["c-xx"]["metric"] is None
    assert document["tasks"]["a-en"]["metric"] == "F1"
    assert document["normalised"] is document["storage"] is None
    assert document["base"] == str(world.base)
    assert document["prompt"] == world.backend.base.template.id
    assert (document["split"], document["limit"], document["seed"]) == ("validation", None, 0)


def test_a_shelf_serves_each_task_by_its_slot(world: World, run: Command, common: list[object], tmp_path: Path) -> None:
    code, document = run(world.shelf, *common)
    assert code == 0
    snapshot = Shelf(world.shelf).snapshot()
    served = {name: snapshot.adapter(name) for name in METRICS}
    direct = world.evaluation(served).document()
    assert document["tasks"] == direct["tasks"]
    held = sum(slot.object.bytes for slot in snapshot.manifest.slots)
    alone = [encode(adapter).size for adapter in world.own.values()]
    assert document["storage"] == storage(snapshot) == pytest.approx(held / sum(alone), rel=0.02)
    assert len(snapshot.manifest.slots) == 2
    assert storage(Shelf.create(tmp_path / "empty", new_settings(2)).snapshot()) is None


def test_tasks_that_the_target_lacks_are_named_and_left_out(
    world: World, run: Command, common: list[object], tmp_path: Path
) -> None:
    write_adapter(world.own["b-en"], tmp_path / "some" / "b-en")
    code, document = run(tmp_path / "some", *common, "--loss-only")
    assert code == 0
    assert list(document["tasks"]) == ["b-en"]
    assert document["left_out"] == dict.fromkeys(["a-en", "c-xx"], "no adapter of this name")
    shown = run(tmp_path / "some", *common, "--loss-only", as_json=False)[1]
    assert shown.splitlines()[-1] == "not measured, no adapter of this name: a-en, c-xx"
    assert document["tasks"]["b-en"]["score"] is None
    assert document["storage"] == 1.0
    assert run(tmp_path / "some" / "b-en", *common, "--loss-only")[1]["tasks"] == document["tasks"]


def test_limit_draws_the_examples_that_the_task_draws(world: World, run: Command, common: list[object]) -> None:
    _, document = run(*common, "--tasks", "a-en, c-xx", "--limit", 2, "--seed", 5, "--loss-only")
    drawn = world.tasks["a-en"].examples("validation", 2, 5)
    assert document["tasks"]["a-en"]["examples"] == drawn.digest
    assert document["tasks"]["a-en"]["n"] == 2
    assert list(document["tasks"]) == ["a-en", "c-xx"]


# what is kept of the own adapters ------------------------------------------------------------------------------------


def test_s_and_loss_kept_are_those_of_the_documents(
    world: World, run: Command, common: list[object], tmp_path: Path
) -> None:
    _, zero = run(*common, "-o", tmp_path / "zero")
    _, own = run(world.adapters, *common, "-o", tmp_path / "own")
    code, document = run(world.shelf, *common, "--own", tmp_path / "own", "--zero-shot", tmp_path / "zero/result.json")
    assert code == 0
    losses, own_losses, zero_losses = ({t: d["loss"] for t, d in e["tasks"].items()} for e in (document, own, zero))
    scores, own_scores = ({t: d["score"] for t, d in e["tasks"].items() if d["score"]} for e in (document, own))
    share, _ = normalised({t: scores.get(t, 0.0) for t in ("a-en", "b-en")}, own_scores)
    gain, left_out = loss_kept(losses, own_losses, zero_losses)
    assert document["normalised"] == {"S": share, "loss_kept": gain, "left_out": {"S": [], "loss_kept": left_out}}
    by_hand = [scores.get(t, 0.0) / own_scores[t] for t in ("a-en", "b-en")]
    assert share == pytest.approx(sum(by_hand) / 2)
    record = document["tasks"]["a-en"]
    assert record["S"] == pytest.approx(by_hand[0])
    a = record["zero_shot_loss"] - record["loss"]
    assert record["loss_kept"] == pytest.approx(a / (record["zero_shot_loss"] - record["own_loss"]))
    assert run.stderr == ""


def test_own_adapters_may_be_measured_in_the_same_run(
    world: World, run: Command, common: list[object], tmp_path: Path
) -> None:
    _, document = run(world.shelf, *common, "--own", world.adapters, "-o", tmp_path / "out")
    own = world.evaluation(world.own).document()
    assert read_result(tmp_path / "out" / "own")["tasks"] == own["tasks"]
    assert document["tasks"]["a-en"]["own_score"] == own["tasks"]["a-en"]["score"]
    assert document["normalised"]["S"] is not None
    assert document["normalised"]["loss_kept"] is None
    _, alone = run(world.adapters, *common, "--own", world.adapters)
    assert alone["normalised"]["S"] == 1.0


def test_without_own_nothing_is_normalised_and_zero_shot_alone_is_said_to_be_of_no_use(
    world: World, run: Command, common: list[object], tmp_path: Path
) -> None:
    run(*common, "--loss-only", "-o", tmp_path / "zero")
    _, document = run(world.shelf, *common, "--loss-only", "--zero-shot", tmp_path / "zero")
    assert document["normalised"] is None
    assert "need the tasks' own adapters (--own)" in run.stderr


def own_document(world: World) -> dict[str, Any]:
    return json.loads(json.dumps(world.evaluation(world.own).document()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": "acme/other"}, "the own evaluation has a different base: acme/other"),
        ({"prompt": "pr-0"}, "the own evaluation has a different prompt: pr-0"),
        ({"split": "test"}, "the own evaluation has a different split: test, here validation"),
        ({"backend": "x bfloat16 y"}, "the own evaluation ran as x bfloat16 y"),
    ],
)
def test_another_base_prompt_split_or_dtype_is_said(world: World, change: dict[str, str], said: str) -> None:
    mine, own = world.evaluation(world.own), own_document(world)
    assert mine.compared(own).warnings == ()
    (warning,) = mine.compared({**own, **change}).warnings
    assert said in warning


def test_tasks_of_other_examples_or_another_metric_are_left_out_and_it_is_said(world: World) -> None:
    mine, own = world.evaluation(world.own), own_document(world)
    zero = world.evaluation().document()
    own["tasks"]["a-en"]["examples"] = "b2-other"
    own["tasks"]["b-en"]["metric"] = "another"
    found = mine.compared(own, zero)
    kept = found.document()["normalised"]
    assert kept["left_out"]["S"] == ["a-en", "b-en"]
    without_gain = [t for t in ("b-en", "c-xx") if zero["tasks"][t]["loss"] - own["tasks"][t]["loss"] < 0.02]
    assert kept["left_out"]["loss_kept"] == ["a-en", *without_gain]
    assert "b-en" not in without_gain
    assert kept["S"] is None
    assert kept["loss_kept"] == pytest.approx(1.0)
    assert "other examples of a-en" in found.warnings[0]
    assert "scored b-en by another metric" in found.warnings[1]
    del own["tasks"]["c-xx"]
    assert any("lacks c-xx" in warning for warning in mine.compared(own).warnings)


def test_what_is_no_evaluation_is_refused_with_all_its_faults(tmp_path: Path, world: World) -> None:
    for text in ("{", "[]", "{}", '{"tasks": 3}', "[" * 100_000):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(UsageError, match="this is not an evaluation"):
            read_result(tmp_path / "r.json")
    (tmp_path / "empty").mkdir()
    for absent in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(UsageError, match="cannot be read: No such file or directory") as error:
            read_result(absent)
        assert str(absent) in str(error.value)
        assert "Error" not in str(error.value)
    document = own_document(world)
    document["base"] = 3
    document["tasks"]["a-en"]["loss"] = math.nan
    document["tasks"]["b-en"] = []
    document["tasks"]["c-xx"]["score"] = "high"
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(UsageError) as error:
        read_result(tmp_path / "r.json")
    for part in ("base is 3", "a-en: loss is nan", "b-en: loss is None", "b-en: examples is None", "c-xx: score"):
        assert part in str(error.value)


# the journal ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_without_measuring_again(world: World, tmp_path: Path) -> None:
    whole = Counting(world.backend)
    reference = evaluate(whole, world.own, world.tasks)
    assert len(whole.calls) == 5
    for done in (0, 1, 4, 5):
        folder = tmp_path / str(done)
        if done < 5:
            with opened(folder) as journal, pytest.raises(KeyboardInterrupt):
                evaluate(Counting(world.backend, stop_at=done), world.own, world.tasks, journal=journal)
        else:
            with opened(folder) as journal:
                evaluate(world.backend, world.own, world.tasks, journal=journal)
        rest = Counting(world.backend)
        with opened(folder) as journal:
            resumed = evaluate(rest, world.own, world.tasks, journal=journal)
        assert len(rest.calls) == 5 - done
        assert rest.calls == whole.calls[done:]
        assert resumed.document() == reference.document()


@pytest.mark.parametrize(("most", "calls"), [(128, 4), (4, 5)])
def test_tasks_of_one_adapter_are_answered_together_and_as_alone(world: World, most: int, calls: int) -> None:
    """Instructions and lengths of answers differ in one batch."""
    shared = dict.fromkeys(METRICS, tiny_adapter(9, str(world.base)))
    tasks = world.tasks | {"b-en": replace(world.tasks["b-en"], max_new_tokens=3)}
    backend = Counting(world.backend)
    backend.together = most
    together = evaluate(backend, shared, tasks)
    assert len(backend.calls) == calls  # three losses, and the answers of two tasks
    for name, task in tasks.items():
        alone = evaluate(world.backend, {name: shared[name]}, {name: task}).tasks[name]
        assert together.tasks[name].answers == alone.answers
        assert together.tasks[name].losses == alone.losses


def test_an_interruption_does_not_change_what_is_answered_together(world: World, tmp_path: Path) -> None:
    shared = dict.fromkeys(METRICS, tiny_adapter(9, str(world.base)))
    whole = Counting(world.backend)
    evaluate(whole, shared, world.tasks)
    with opened(tmp_path) as journal, pytest.raises(KeyboardInterrupt):
        evaluate(Counting(world.backend, stop_at=1), shared, world.tasks, journal=journal)
    rest = Counting(world.backend)
    with opened(tmp_path) as journal:
        evaluate(rest, shared, world.tasks, journal=journal)
    assert rest.calls == whole.calls[1:]


def test_losses_and_answers_of_one_adapter_are_measured_at_once(world: World, tmp_path: Path) -> None:
    shared = dict.fromkeys(METRICS, tiny_adapter(9, str(world.base)))
    apart, once = Counting(world.backend), CountingOnce(world.backend)
    wanted = evaluate(apart, shared, world.tasks)
    assert evaluate(once, shared, world.tasks).document() == wanted.document()
    assert once.calls == [("both", "a-en, b-en"), ("loss", "c-xx")]
    once.together = 1
    once.calls.clear()
    assert evaluate(once, shared, world.tasks).document() == wanted.document()
    assert once.calls == [("both", "a-en"), ("both", "b-en"), ("loss", "c-xx")]
    own = CountingOnce(world.backend)
    evaluate(own, world.own, world.tasks)
    assert own.calls == [("both", "a-en"), ("both", "b-en"), ("loss", "c-xx")]


def test_what_is_measured_at_once_is_measured_with_its_last_part(world: World) -> None:
    """Then the share of the parts that have passed is the share that is done, and the time left is right."""
    backend, seen = CountingOnce(world.backend), []

    def watch(units: Sequence[Unit]) -> Iterator[Unit]:
        for unit in units:
            yield unit
            seen.append((*unit.place, len(backend.calls)))

    evaluate(backend, dict.fromkeys(METRICS, tiny_adapter(9, str(world.base))), world.tasks, watch=watch)
    places = [("loss", "a-en", 0), ("answers", "a-en", 0), ("loss", "b-en", 0), ("answers", "b-en", 1)]
    assert seen == [*places, ("loss", "c-xx", 2)]


def test_losses_that_are_known_are_not_measured_with_the_answers(world: World) -> None:
    shared = dict.fromkeys(METRICS, tiny_adapter(9, str(world.base)))
    journal, backend = ResultStore(), CountingOnce(world.backend)
    evaluate(backend, shared, world.tasks, loss_only=True, journal=journal)
    assert [what for what, _ in backend.calls] == ["loss"] * 3
    backend.calls.clear()
    evaluate(backend, shared, world.tasks, journal=journal)
    assert [what for what, _ in backend.calls] == ["answers"]
    journal = ResultStore()
    evaluate(backend, {"a-en": shared["a-en"]}, world.tasks, loss_only=True, journal=journal)
    backend.calls.clear()
    resumed = evaluate(backend, shared, world.tasks, journal=journal)
    assert backend.calls == [("both", "a-en, b-en"), ("loss", "c-xx")]  # answers depend on what else is in their batch
    assert resumed.document() == evaluate(world.backend, shared, world.tasks).document()


def changed(world: World, what: str) -> tuple[Any, dict[str, Adapter], dict[str, Task]]:
    backend, adapters, tasks = Counting(world.backend), world.own, world.tasks
    if what == "adapter":
        adapters["a-en"] = tiny_adapter(77, str(world.base))
    elif what == "prompt":
        tasks["a-en"] = replace(tasks["a-en"], prompt="Do it differently:")
    elif what == "examples":
        tasks["a-en"] = replace(tasks["a-en"], splits={"validation": tasks["a-en"].splits["validation"][:3]})
    elif what == "length":
        tasks["a-en"] = replace(tasks["a-en"], max_new_tokens=4)
    elif what == "metric":
        tasks["a-en"] = replace(tasks["a-en"], metric="rouge_l")
    elif what == "rendering":
        backend.template = replace(backend.template, between="<|im_end|>\n")
        backend.prompt_id = backend.template.id
    elif what == "dtype":
        backend.id = backend.id.replace("float32", "bfloat16")
    return backend, adapters, tasks


@pytest.mark.parametrize(
    ("what", "again"),
    [
        ("nothing", 0),
        ("adapter", 2),
        ("prompt", 2),
        ("examples", 2),
        ("length", 1),
        ("metric", 0),
        ("rendering", 5),
        ("dtype", 5),
    ],
)
def test_what_a_result_depends_on_is_measured_again_when_it_changes(world: World, what: str, again: int) -> None:
    world.evaluation(world.own)
    backend, adapters, tasks = changed(world, what)
    journal = copy.deepcopy(world.journal)
    before = journal.written
    evaluate(backend, adapters, tasks, journal=journal)
    assert len(backend.calls) == journal.written - before == again


def test_lines_that_are_torn_or_altered_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path / "out") as journal:
        for i in range(4):
            journal.put({"unit": i}, [[float(i), 1]])
    file = tmp_path / "out" / "journal.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert lines[1].count(b"[[1,1]]") == 1
    file.write_bytes(lines[0] + lines[1].replace(b"[[1,1]]", b"[[2,1]]") + b"[]\n{\n" + lines[2] + lines[3][:-9])
    with opened(tmp_path / "out") as journal:
        assert [journal.get({"unit": i}) for i in range(4)] == [[[0, 1]], None, [[2, 1]], None]
        assert "another program: 2, 3, 4\n" in caplog.text  # and not the torn one
        journal.put({"unit": 3}, ["ü\u2028"])
    with opened(tmp_path / "out") as journal:
        assert journal.get({"unit": 2}) == [[2, 1]]
        assert journal.get({"unit": 3}) == ["ü\u2028"]


SHAPES = ["", {}, [], None, 1, "one too many"]  # beside those of one record: another journal's, another version's
LOSSES = [[], [1.0], [1.0, 0], ["1", 1], [1.0, True], [1.0, 2, 3], {}, 3, "a"]


@pytest.fixture(scope="module")
def units(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The lines of the journal of an evaluation."""
    folder = tmp_path_factory.mktemp("units") / "out"
    with opened(folder) as journal:
        evaluate(world.backend, world.own, world.tasks, journal=journal)
    return [json.loads(line) for line in (folder / "journal.jsonl").read_bytes().splitlines()]


@pytest.mark.parametrize(
    ("what", "shape"),
    [
        *((what, shape) for what in ("loss", "answers") for shape in SHAPES),
        *(("loss", [record] * 4) for record in LOSSES),
        *(("answers", [record] * 4) for record in ([], {}, 3, None)),
    ],
    ids=str,
)
def test_a_result_of_another_shape_is_measured_again_with_a_notice(
    world: World, units: list[dict[str, Any]], caplog: pytest.LogCaptureFixture, what: str, shape: Any
) -> None:
    journal, right = ResultStore(), ResultStore()
    changed = next(unit for unit in units if unit["unit"]["what"] == what)
    for unit in units:
        wrong = [*unit["result"], unit["result"][0]] if shape == "one too many" else shape
        journal.put(unit["unit"], wrong if unit is changed else unit["result"])
        right.put(unit["unit"], unit["result"])
    written = journal.written
    again = evaluate(world.backend, world.own, world.tasks, journal=journal)
    assert journal.written == written + 1
    assert again.document() == evaluate(world.backend, world.own, world.tasks, journal=right).document()
    assert caplog.text.count("another form") == (shape is not None)


def test_ctrl_c_keeps_what_is_done(
    world: World, run: Command, common: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    plain = HFBackend.losses_and_answers

    def interrupted(self: HFBackend, adapter: Any, asked: Any) -> Any:
        calls.append(asked)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, adapter, asked)

    monkeypatch.setattr(HFBackend, "losses_and_answers", interrupted)
    words = [world.adapters, *common, "-o", tmp_path / "out"]
    code, document = run(*words)
    assert code == 130
    assert document["error"]["kind"] == "interrupted"
    assert "2 results are kept" in run.stderr
    assert not (tmp_path / "out" / "result.json").exists()
    code, document = run(*words)
    assert code == 0
    assert len(calls) == 3
    assert document == json.loads((tmp_path / "out" / "result.json").read_text())
    calls.clear()
    calls.append(None)
    assert run(world.adapters, *common)[0] == 130
    assert "with -o FOLDER" not in run.stderr  # nothing was done yet


def test_an_output_folder_of_something_else_is_refused_and_unchanged(
    world: World, run: Command, common: list[object], tmp_path: Path
) -> None:
    for folder in (world.shelf, world.data):
        before = tree(folder)
        code, document = run(*common, "-o", folder)
        assert (code, document["error"]["kind"]) == (2, "usage")
        assert tree(folder) == before
    with opened(tmp_path / "out"):
        code, document = run(*common, "-o", tmp_path / "out")
        assert code == 2
        assert "another evaluation writes" in document["error"]["message"]
    (tmp_path / "file").write_text("")
    assert run(*common, "-o", tmp_path / "file")[0] == 4


# files ---------------------------------------------------------------------------------------------------------------


def test_predictions_can_be_read_and_none_is_stale(
    world: World, run: Command, common: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    _, document = run(world.adapters, *common, "-o", out)
    direct = world.evaluation(world.own)
    for name, record in direct.tasks.items():
        lines = [json.loads(line) for line in (out / "predictions" / f"{name}.jsonl").read_text().splitlines()]
        assert lines == record.records()
        assert [line["input"] for line in lines] == [e.input for e in world.tasks[name].splits["validation"]]
        assert [line["prediction"] for line in lines] == list(record.answers or [None] * 4)
        assert all(line["references"] == ["a reference"] for line in lines)
        nll, tokens = sum(line["nll"] for line in lines), sum(line["tokens"] for line in lines)
        assert document["tasks"][name]["loss"] == pytest.approx(nll / tokens)
        assert document["tasks"][name]["tokens"] == tokens
    assert read_result(out) == document
    run(world.adapters, *common, "-o", out, "--tasks", "a-en")
    assert [path.name for path in (out / "predictions").iterdir()] == ["a-en.jsonl"]
    assert list(read_result(out)["tasks"]) == ["a-en"]


def test_csv_has_a_row_a_task(world: World, run: Command, common: list[object], tmp_path: Path) -> None:
    _, document = run(world.shelf, *common, "--own", world.adapters, "--csv", tmp_path / "t.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert list(rows[0]) == list(COLUMNS)
    for row, (name, record) in zip(rows, document["tasks"].items(), strict=True):
        assert row["task"] == name
        assert row["metric"] == (record["metric"] or "")
        for column in ("loss", "score", "low", "high", "own_loss", "own_score", "S"):
            assert row[column] == ("" if record[column] is None else repr(record[column]))
    for path in (tmp_path, tmp_path / "absent" / "t.csv"):
        assert run(*common, "--csv", path)[0] == 2


def test_the_table_for_people(world: World, run: Command, common: list[object], tmp_path: Path) -> None:
    zero = tmp_path / "zero"
    assert run(*common, "-o", zero)[0] == 0
    words = [world.shelf, *common, "--own", world.adapters, "--zero-shot", zero]
    code, text = run(*words, as_json=False)
    assert code == 0
    document = run(*words)[1]
    head, *rows = text.splitlines()[:4]
    summary, *below = text.splitlines()[4:]
    assert head.split() == ["task", "n", "loss", "own", "zero-shot", "kept", "score", "S"]
    for row, (name, record) in zip(rows, document["tasks"].items(), strict=True):
        losses = [f"{record[key]:.4f}" for key in ("loss", "own_loss", "zero_shot_loss")]
        shares = ["-" if record[key] is None else f"{record[key]:.3f}" for key in ("loss_kept", "S")]
        score = ["-"]
        if record["score"] is not None:
            score = [f"{record['score']:.1f}", f"[{record['low']:.1f},", f"{record['high']:.1f}]"]
        assert row.split() == [name, "4", *losses, shares[0], *score, shares[1]]
    assert summary.startswith("3 tasks: average loss ")
    assert f"S {document['normalised']['S']:.3f}" in summary
    assert f"storage {100 * document['storage']:.0f} %" in summary
    by_metric = {record["metric"]: name for name, record in document["tasks"].items() if record["metric"]}
    assert below[: len(by_metric)] == [f"scored by {metric}: {name}" for metric, name in by_metric.items()]
    plain = run(*common, "--loss-only", as_json=False)[1].splitlines()
    assert plain[0].split() == ["task", "n", "loss"]


def test_the_table_fits_eighty_columns_and_groups_what_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from lorashelf.cli.evaluation import _tables

    names = ["tone-detection-in-long-words", *(f"task-{i:02d}" for i in range(40))]
    record = {"n": 1000, "loss": 12.3456, "own_loss": 11.2345, "zero_shot_loss": 13.4567, "loss_kept": -12.345}
    record |= {"score": 100.0, "low": 100.0, "high": 100.0, "metric": "F0.5 (token edits)", "S": 1.234}
    left_out = {f"left-{i}": "no data" if i % 2 else "no adapter of this name" for i in range(6)}
    kept = {"S": 1.0, "loss_kept": 0.5, "left_out": {"S": ["task-01", "task-02"], "loss_kept": ["task-03"]}}
    document = {"tasks": dict.fromkeys(names, record), "average": 100.0, "average_loss": 12.3, "normalised": kept}
    shown, *lines = _tables({**document, "storage": 0.125, "left_out": left_out})
    with capsys.disabled():
        console = Console(width=80, file=io.StringIO())
        console.print(shown)
    printed = console.file.getvalue().splitlines()
    assert max(map(len, printed)) <= 80
    for whole in ("100.0 [100.0, 100.0]", "12.3456", "11.2345", "13.4567", "-12.345", "1.234"):
        assert sum(whole in line for line in printed) == len(names)  # no number is folded or cut
    assert lines[1:] == [
        f"scored by F0.5 (token edits): {', '.join(names)}",
        "not measured, no adapter of this name: left-0, left-2, left-4",
        "not measured, no data: left-1, left-3, left-5",
        "not in S, no own score of at least 1 to compare with: task-01, task-02",
        "not in loss kept, no own gain of at least 0.02 nats per token over zero-shot: task-03",
    ]


# warnings and refusals -----------------------------------------------------------------------------------------------


def test_another_base_name_is_warned_of_and_a_declared_one_is_not(
    world: World, run: Command, common: list[object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = replace(world.own["a-en"], base=BaseId("acme/original"))
    write_adapter(adapter, tmp_path / "adapters" / "a-en")
    assert run(tmp_path / "adapters", *common, "--loss-only")[0] == 0
    assert "acme/original" in caplog.text
    caplog.clear()
    for name, aliases in (("plain", ()), ("declared", (str(world.base),))):
        shelf = Shelf.create(tmp_path / name, new_settings(1, base_aliases=aliases))
        shelf.commit(plan_add(shelf.snapshot(), adapter, "a-en"))
        code, document = run(shelf.path, *common, "--loss-only")
        assert (code, list(document["tasks"])) == (0, ["a-en"])
        assert caplog.text.count("the adapters name acme/original") == (name == "plain")
        caplog.clear()
    write_adapter(replace(adapter, base=BaseId("")), tmp_path / "unknown" / "a-en")
    run(tmp_path / "unknown", *common, "--loss-only")
    assert "does not name a base model" in run.stderr


def test_a_prompt_that_an_adapter_was_not_trained_under_is_said(
    world: World, run: Command, common: list[object], tmp_path: Path
) -> None:
    here = world.backend.base.template.id
    records = {"a-en": {"settings": {"prompt": "pr-other"}}, "b-en": {"settings": {"prompt": here}}, "c-xx": []}
    for name, record in records.items():
        content = {"training.json": json.dumps(record).encode()}
        write_adapter(world.own[name], tmp_path / "adapters" / name, extra_files=content)
    for words in ([tmp_path / "adapters"], [world.shelf, "--own", tmp_path / "adapters"]):
        assert run(*words, *common, "--loss-only")[0] == 0
        said = f"a-en: trained with the prompt rendering pr-other, measured with {here}"
        assert run.stderr.strip() == said


def test_progress_is_told_with_the_time_left(
    world: World, run: Command, common: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "INTERVAL", 0.0)
    run(*common)
    lines = run.stderr.splitlines()
    assert lines[0] == "measuring: loss of a-en  (0 of 5)"
    assert re.fullmatch(r"measuring: loss of c-xx  \(4 of 5, \d+ s left\)", lines[4])


def test_an_adapter_of_other_sizes_is_refused_before_anything_is_measured(
    world: World, run: Command, common: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tiny_adapter(0, str(world.base), width=64), tmp_path / "adapters" / "b-en")
    write_adapter(world.own["a-en"], tmp_path / "adapters" / "a-en")
    monkeypatch.setattr(HFBackend, "nll", None)
    for words in ([tmp_path / "adapters"], [world.shelf, "--own", tmp_path / "adapters"]):
        code, document = run(*words, *common, "-o", tmp_path / "out")
        assert (code, document["error"]["kind"]) == (3, "shape_mismatch")
        assert "64x64" in document["error"]["message"]
        assert "16x16" in document["error"]["message"]
        assert "a-en" not in document["error"]["message"]


def test_examples_beyond_the_context_are_counted_never_silent(tmp_path: Path) -> None:
    backend = HFBackend.open(str(tiny_base(tmp_path / "base", context=CONTEXT)), dtype="f32")
    examples = (Example("short", "yes"), Example("long " * 30, "no"), Example("fair", "maybe"))
    task = Task("a", "Do:", "a", "en", "f1", 8, {"validation": examples})
    found = evaluate(backend, {"a": None}, {"a": task})
    assert found.document()["tasks"]["a"]["dropped"] == 1
    assert found.document()["tasks"]["a"]["n"] == 2
    assert found.warnings == ("a: 1 of 3 examples are longer than the model's context and are left out",)
    for seed in range(4):  # those that fit are drawn from
        assert evaluate(backend, {"a": None}, {"a": task}, limit=1, seed=seed).document()["tasks"]["a"]["n"] == 1
    short = replace(task, splits={"validation": (examples[0], examples[2])})
    assert found.tasks["a"].loss == evaluate(backend, {"a": None}, {"a": short}).tasks["a"].loss
    long = replace(task, splits={"validation": examples[1:2]})
    with pytest.raises(UsageError, match=r"a: all 1 examples are longer(.|\n)*b: all 1 examples are longer"):
        evaluate(backend, {"a": None, "b": None}, {"a": long, "b": replace(long, name="b")})


def test_all_faults_of_the_data_are_named_at_once() -> None:
    good = Task("a", "Do:", "a", "en", "f1", splits={"validation": (Example("x", "y"),)})
    tasks = {
        "a": good,
        "b": replace(good, name="b", splits={"test": good.splits["validation"]}),
        "c": replace(good, name="c", splits={"validation": ()}),
        "d": replace(good, name="d", metric="f2"),
        "e/f": replace(good, name="e/f"),
    }
    with pytest.raises(UsageError) as error:
        metrics_of(tasks, limit=0, seed=-1)
    for part in (
        "limit is 0",
        "seed is -1",
        "b: no examples",
        "it has test",
        "c: no examples",
        "d: unknown metric 'f2'",
    ):
        assert part in str(error.value)
    assert "'e/f' has a slash" in str(error.value)
    assert "a:" not in str(error.value)
    assert metrics_of({"d": tasks["d"]}, loss_only=True) == {"d": None}
    with pytest.raises(UsageError, match="no task in common: adapters x; data a"):
        evaluate(Quadratic({}), {"x": None}, {"a": good})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "a-em"], "did you mean 'a-en'"),
        (["--tasks", "x,y"], "unknown tasks x, y"),
        (["--tasks", ","], "--tasks is empty"),
        (["--split", "test"], "no examples in split 'test'"),
        (["--limit", "0"], "limit is 0"),
        (["--own", "absent.json"], "cannot be read: No such file or directory"),
        (["--zero-shot", "absent.json"], "cannot be read: No such file or directory"),
        (["absent"], "no adapter here"),
    ],
)
def test_bad_requests_end_before_the_model_is_opened(
    run: Command, common: list[object], monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setattr("lorashelf.cli.base.open_model", None)
    code, document = run(*common, *words)
    assert (code, document["error"]["kind"] in ("usage", "unknown_name")) == (2, True)
    assert said in f"{document['error']['message']}\n{document['error']['cure']}"


def test_a_missing_package_is_named_before_the_model_is_opened(
    run: Command, common: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str, language: str) -> None:
        raise MissingExtra("a ROUGE score", "rouge-score", "metrics")

    monkeypatch.setattr(module, "metric", absent)
    monkeypatch.setattr("lorashelf.cli.base.open_model", None)
    code, document = run(*common)
    assert (code, document["error"]["kind"]) == (2, "missing_extra")
    assert "lorashelf[metrics]" in document["error"]["cure"]


def test_a_shelf_without_any_of_the_tasks_is_refused(
    world: World, run: Command, common: list[object], tmp_path: Path
) -> None:
    shelf = Shelf.create(tmp_path / "other", new_settings(1))
    shelf.commit(plan_add(shelf.snapshot(), world.own["a-en"], "elsewhere"))
    code, document = run(shelf.path, *common)
    assert code == 2
    assert "which has elsewhere" in document["error"]["message"]


def test_a_name_that_no_file_can_bear_is_not_written(tmp_path: Path) -> None:
    examples = ExampleSet("../up", "Do:", (Example("x", "y"),))
    measured = Measured(Task("../up", "Do:", "a"), None, examples, 0, (Loss(1.0, 1),))
    with pytest.raises(TaskNameError):
        write_result(Evaluation({"../up": measured}, {}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# the real small model ------------------------------------------------------------------------------------------------


def test_real_adapters_of_smollm2(tmp_path: Path, run: Command) -> None:
    """Two of the project's own adapters on two of its own examples each: they beat the bare base."""
    words = ["--data", ROOT / "examples/fewshot", "--tasks", "qa-es,qa-it", "--limit", 2, "--model-dtype", "f32"]
    _, zero = run(*words, "--loss-only", "-o", tmp_path / "zero")
    code, document = run(
        ROOT / "examples/zoo", *words, "--loss-only", "--own", ROOT / "examples/zoo", "--zero-shot", tmp_path / "zero"
    )
    assert code == 0
    assert document["base"] == EMBEDDED
    told = [line for line in run.stderr.splitlines() if not line.endswith("left)")]
    (notice,) = told  # beside progress, where the machine is slow
    assert notice.startswith("the chat template's default system turn is left out of the prompt: ")
    for name in ("qa-es", "qa-it"):
        assert document["tasks"][name]["loss"] < zero["tasks"][name]["loss"] - 0.1
        assert document["tasks"][name]["n"] == 2
    assert document["normalised"]["loss_kept"] == 1.0
