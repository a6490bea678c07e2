"""Training: on the answers only, with evaluation's own loss; resumed exactly, stopped at the best, recorded."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorashelf import cli, read_adapter
from lorashelf.cli.output import Meter
from lorashelf.errors import MissingExtra, ModelError, TaskDataError, UsageError
from lorashelf.models.base_model import BaseModel, open_base
from lorashelf.models.hf import HFBackend
from lorashelf.models.protocol import mean_loss
from lorashelf.tasks.folders import Example, ExampleSet, Task, read_tasks
from lorashelf.training import trainer as trainer_module
from lorashelf.training.config import Hyperparameters, TrainSettings
from lorashelf.training.job import training_jobs
from lorashelf.training.run import LOCK, RECORD_FILE, STATE_FOLDER, Moment, train, train_into
from lorashelf.training.trainer import LoraTrainer, target_layers
from tiny_base import ARCHITECTURES, tiny_base

ROOT = Path(__file__).parent.parent
QUICK = TrainSettings(rate=5e-2, steps=10, batch=4, rank=4, dtype="f32")
FRUIT = ("apple", "plum", "pear", "quince", "lemon", "cherry", "peach", "fig", "lime", "mango", "grape", "kiwi")


def make_task(name: str = "loud-en", train: int = 12, validation: int = 4, **changes: Any) -> Task:
    """Say it louder: a task that a random model can learn a little of."""
    examples = [Example(f"one {word}", f"ONE {word.upper()}!") for word in FRUIT]
    splits = {"train": tuple(examples[:train]), "validation": tuple(examples[-validation:])}
    if not validation:
        del splits["validation"]
    return replace(Task(name=name, prompt="Louder:", type="loud", splits=splits), **changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return open_base(str(tiny_base(tmp_path_factory.mktemp("base") / "tiny")), dtype="f32", device="cpu")


@pytest.fixture
def untouched(base: BaseModel) -> Iterator[None]:
    """The base is afterwards as it was before: no layer of PEFT's, no hook, no gradient, the same weights."""
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    yield
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.model.modules())
    assert not any(p.requires_grad for p in base.model.parameters())


def loss_of(base: BaseModel, adapter: Any, examples: ExampleSet) -> float:
    return mean_loss(HFBackend(base).nll([(adapter, examples)])[0])


def stopping_at(step: int, error: type[BaseException] = KeyboardInterrupt) -> Callable[[Moment], None]:
    def watch(moment: Moment) -> None:
        if moment.step == step:
            raise error

    return watch


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "seconds"}


# the hyperparameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("examples", "rank", "batch", "steps", "rate"),
    [
        (1, 8, 1, 5, 1e-3),
        (12, 8, 2, 30, 1e-3),
        (100, 8, 8, 50, 1e-3),
        (600, 8, 8, 75, 8.165e-4),
        (8000, 32, 8, 1000, 2.236e-4),
        (160_000, 32, 8, 20_000, 5e-5),
    ],
)
def test_rank_steps_and_rate_follow_the_amount_of_data(
    examples: int, rank: int, batch: int, steps: int, rate: float
) -> None:
    scaled = Hyperparameters.of("t", examples, TrainSettings())
    assert (scaled.rank, scaled.alpha, scaled.batch, scaled.steps) == (rank, 4 * rank, batch, steps)
    assert scaled.rate == pytest.approx(rate, rel=1e-3)


def test_what_is_asked_for_is_not_scaled() -> None:
    asked = TrainSettings(rank=16, alpha=8.0, rate=5e-5, epochs=2.0, batch=3, warmup=0)
    made = Hyperparameters.of("t", 30, asked)
    assert (made.rank, made.alpha, made.rate, made.steps, made.batch, made.warmup) == (16, 8.0, 5e-5, 20, 3, 0)


def test_every_epoch_sees_every_example_once_and_in_another_order() -> None:
    made = Hyperparameters.of("t", 12, TrainSettings(batch=5, steps=24))
    seen = [i for step in range(24) for i in made.batch_at(step)]
    epochs = [seen[start : start + 12] for start in range(0, 120, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10


def test_the_rate_rises_and_falls_to_nothing() -> None:
    made = Hyperparameters.of("t", 600, TrainSettings())
    rates = [made.rate_at(step) for step in range(made.steps)]
    assert rates[:5] == pytest.approx([made.rate * i / 5 for i in range(1, 6)])
    assert rates[5] == made.rate
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 0.01 * made.rate


def test_seeds_differ_by_task_step_and_seed() -> None:
    many = [Hyperparameters.of(name, 9, TrainSettings(seed=seed)) for name in ("a", "b", "ab", "ü") for seed in (0, 1)]
    seeds = [c.init_seed for c in many] + [c.seed_at(step) for c in many for step in range(9)]
    assert len(set(seeds)) == len(seeds)


def test_all_faulty_settings_are_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        TrainSettings(rank=0, rate=-1.0, dropout=1.0, dtype="int8", steps=1, epochs=1.0, seed=-1, alpha=float("nan"))
    for word in ("rank", "rate", "dropout", "int8", "steps and epochs", "seed", "alpha"):
        assert word in str(caught.value)


# the loss -------------------------------------------------------------------------------------------------------------


def by_hand(model: Any, query: list[int], answer: list[int]) -> Any:
    """Σ −log p of the answer, from all the logits of one example, as transformers labels it: −100 on the query."""
    ids = torch.tensor([query + answer])
    labels = torch.tensor([[-100] * len(query) + answer])
    logits = model(input_ids=ids).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="sum", ignore_index=-100)


def test_loss_and_gradient_are_those_of_the_answers_alone(base: BaseModel, untouched: None) -> None:
    backend = HFBackend(base)
    examples = make_task().examples("train")
    batch = [backend.tokens(examples, e) for e in examples.examples[:5]]
    trainer = LoraTrainer(backend, Hyperparameters.of("t", 12, replace(QUICK, dropout=0.0)), target_layers(base.model))
    try:
        trainer.learn(batch, 1)
        trainer.update(1e-2)  # so that B is not zero
        sums = trainer.learn(batch, 2)
        ours = {name: p.grad.clone() for name, p in base.model.named_parameters() if p.grad is not None}
        base.model.zero_grad()
        expected = [by_hand(base.model, query, answer) for query, answer in batch]
        (sum(expected) / sum(len(answer) for _, answer in batch)).backward()
        theirs = {name: p.grad for name, p in base.model.named_parameters() if p.grad is not None}
    finally:
        trainer.close()
    assert sums == pytest.approx([float(loss.detach()) for loss in expected], rel=1e-5)
    assert ours.keys() == theirs.keys()
    assert all("lora_" in name for name in ours)
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-3, atol=1e-6), name


def test_the_loss_by_hand_sees_a_query_that_counts(base: BaseModel) -> None:
    query, answer = HFBackend(base).tokens(make_task().examples("train"), Example("one fig", "ONE FIG!"))
    with torch.no_grad():
        assert float(by_hand(base.model, query[:-3], query[-3:] + answer)) > float(by_hand(base.model, query, answer))


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_the_training_loss_of_the_final_weights_is_the_backends(base: BaseModel, untouched: None, dtype: str) -> None:
    backend = HFBackend(base)
    examples = make_task().examples("train")
    batch = [backend.tokens(examples, e) for e in examples.examples]
    trainer = LoraTrainer(backend, Hyperparameters.of("t", 12, replace(QUICK, dropout=0.0)), target_layers(base.model))
    try:
        for step in range(6):
            trainer.learn(batch, step)
            trainer.update(1e-2)
        sums, adapter = trainer.learn(batch, 9), trainer.adapter(dtype)
        measured = trainer.measure(adapter, examples)
    finally:
        trainer.close()
    assert mean_loss(measured) == loss_of(base, adapter, examples)
    found = sum(sums) / sum(loss.tokens for loss in measured)
    assert found == pytest.approx(mean_loss(measured), abs=1e-4 if dtype == "f32" else 1e-2)


def test_dropout_is_on_in_training_and_off_in_measuring(base: BaseModel) -> None:
    backend = HFBackend(base)
    examples = make_task().examples("train")
    batch = [backend.tokens(examples, e) for e in examples.examples]
    trainer = LoraTrainer(backend, Hyperparameters.of("t", 12, replace(QUICK, dropout=0.5)), target_layers(base.model))
    try:
        trainer.learn(batch, 0)
        trainer.update(1e-1)
        assert trainer.learn(batch, 1) == trainer.learn(batch, 1) != trainer.learn(batch, 2)
        adapter = trainer.adapter("f32")
        assert trainer.measure(adapter, examples) == trainer.measure(adapter, examples)
    finally:
        trainer.close()


# a whole training -----------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_says_so(base: BaseModel, untouched: None) -> None:
    moments: list[Moment] = []
    task = make_task()
    adapter, record = train(task, base, QUICK, watch=moments.append)
    assert record["loss"] < record["zero_shot"] - 0.15
    assert record["improved"] is True
    assert record["loss"] == pytest.approx(loss_of(base, adapter, task.examples("validation")), abs=1e-6)
    assert record["zero_shot"] == pytest.approx(loss_of(base, None, task.examples("validation")), abs=1e-6)
    assert [m.step for m in moments] == list(range(1, record["steps"] + 1))
    looked = {m.step: m.validation for m in moments if m.validation is not None}
    assert looked.keys() == {row["step"] for row in record["losses"]} - {0}
    assert adapter.base.name == base.name
    assert adapter.dtype == "f32"


def test_the_record_holds_what_the_result_depends_on(base: BaseModel) -> None:
    task = make_task()
    adapter, record = train(task, base, replace(QUICK, dtype="f16"))
    settings = record["settings"]
    assert settings["base"] == base.name
    assert settings["computed in"] == "float32"
    assert settings["prompt"] == base.template.id
    assert settings["training data"] == task.examples("train").digest
    assert settings["validation data"] == task.examples("validation").digest
    assert (settings["rank"], settings["alpha"], settings["steps"], settings["batch"]) == (4, 16, 10, 4)
    assert record["targets"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert record["examples"] == {"train": 12, "validation": 4}
    assert record["adapter"] == adapter.digest
    assert record["tokens"] > 10 * 4 * 20
    assert record["versions"].keys() == {"lorashelf", "python", "torch", "transformers", "peft", "numpy"}
    assert record["losses"][0] == {"step": 0, "train": None, "validation": record["zero_shot"]}
    assert all(row["train"] > 0 and row["validation"] > 0 for row in record["losses"][1:])
    assert json.loads(json.dumps(record)) == record


def test_the_same_is_trained_twice_and_other_tasks_start_otherwise(base: BaseModel) -> None:
    short = replace(QUICK, steps=2)
    first, again, other, seeded = (
        train(make_task(name), base, replace(short, seed=seed)).adapter
        for name, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1))
    )
    assert first.digest == again.digest
    path = next(iter(first.modules))
    for different in (other, seeded):
        cosine = np.vdot(first.modules[path].a, different.modules[path].a)
        cosine /= np.linalg.norm(first.modules[path].a) * np.linalg.norm(different.modules[path].a)
        assert abs(cosine) < 0.6  # 4 x 16 random values; the same start gives nearly 1
    trained_alike = train(make_task("a"), base, replace(short, rate=1e-4)).adapter
    assert np.allclose(first.modules[path].a, trained_alike.modules[path].a, atol=0.1)


def test_a_dozen_examples_without_validation_keep_the_last_weights(base: BaseModel) -> None:
    trained = train(make_task(validation=0), base, QUICK)
    assert trained.record["loss"] is trained.record["improved"] is None
    assert trained.record["best_step"] == trained.record["steps"] == 10
    assert trained.record["losses"][-1]["train"] < trained.record["losses"][1]["train"]


def test_it_stops_early_and_gives_the_best(base: BaseModel, untouched: None) -> None:
    """Validation on what training unlearns: its loss rises soon, and the adapter is of the step where it was lowest."""
    odd = tuple(Example(f"one {word}", "q" * 9) for word in FRUIT[:4])
    task = make_task()
    task = replace(task, splits={**task.splits, "validation": odd})
    adapter, record = train(task, base, TrainSettings(rate=1e-1, steps=40, batch=4, rank=4, dtype="f32", patience=2))
    losses = {row["step"]: row["validation"] for row in record["losses"] if row["step"]}
    assert record["stopped_early"] is True
    assert record["steps"] < 40
    assert record["best_step"] == min(losses, key=lambda step: losses[step])
    assert list(losses)[-3] == record["best_step"]
    assert loss_of(base, adapter, task.examples("validation")) == pytest.approx(record["loss"], abs=1e-6)
    assert record["loss"] < list(losses.values())[-1]


def test_too_long_examples_are_left_out_and_counted(base: BaseModel) -> None:
    task = make_task()
    long = Example("one " + "fig " * 200, "ONE FIG")
    task = replace(task, splits={name: (*s, long) for name, s in task.splits.items()})
    (job,) = training_jobs({task.name: task}, base, QUICK)
    assert job.dropped == {"train": 1, "validation": 1}
    assert long not in (*job.train.examples, *job.validation.examples)
    assert "12 examples (1 train too long, 1 validation too long)" in job.summary
    assert train(task, base, replace(QUICK, steps=1)).record["dropped"] == {"train": 1, "validation": 1}
    (shorter,) = training_jobs({task.name: task}, base, replace(QUICK, max_length=47))
    assert 0 < len(shorter.train.examples) < 12


# cut off and gone on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validation", [4, 0])
def test_a_cut_off_run_ends_at_the_same_weights(
    base: BaseModel, untouched: None, tmp_path: Path, validation: int
) -> None:
    task = make_task(validation=validation)
    whole = train(task, base, QUICK)
    state = tmp_path / "state.pt"
    for step in (1, 7, 9, 10):
        with pytest.raises(KeyboardInterrupt):
            train(task, base, QUICK, state=state, watch=stopping_at(step))
    seen: list[Moment] = []
    ended = train(task, base, QUICK, state=state, watch=seen.append)
    assert seen == []
    assert ended.adapter.digest == whole.adapter.digest
    assert comparable(ended.record) == comparable(whole.record)


def test_an_interrupt_inside_a_step_finds_the_step_before(
    base: BaseModel, untouched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task()
    whole = train(task, base, QUICK)
    state, calls, update = tmp_path / "state.pt", [], LoraTrainer.update

    def cut_off(trainer: LoraTrainer, rate: float) -> float:
        norm = update(trainer, rate)  # the weights have moved, the run does not know of it yet
        calls.append(rate)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return norm

    with monkeypatch.context() as patch:
        patch.setattr(LoraTrainer, "update", cut_off)
        with pytest.raises(KeyboardInterrupt):
            train(task, base, QUICK, state=state)
    seen: list[Moment] = []
    assert train(task, base, QUICK, state=state, watch=seen.append).adapter.digest == whole.adapter.digest
    assert seen[0].step == 6


def test_a_killed_run_goes_on_from_its_last_validation(base: BaseModel, tmp_path: Path) -> None:
    task = make_task()
    state, left = tmp_path / "state.pt", tmp_path / "left.pt"

    def copying(moment: Moment) -> None:
        if moment.step == 7:
            shutil.copy(state, left)

    whole = train(task, base, QUICK, state=state, watch=copying)
    seen: list[Moment] = []
    assert train(task, base, QUICK, state=left, watch=seen.append).adapter.digest == whole.adapter.digest
    assert seen[0].step == 7  # validations come every 2 steps


def test_a_folder_of_tasks_is_trained_once(base: BaseModel, tmp_path: Path) -> None:
    tasks = {name: make_task(name) for name in ("a", "b", "c")}
    jobs = training_jobs(tasks, base, replace(QUICK, steps=3))
    out = tmp_path / "new" / "out"
    with pytest.raises(KeyboardInterrupt):
        train_into(out, jobs, base, watch=lambda m: stopping_at(2)(m) if m.task == "b" else None)
    assert sorted(path.name for path in out.iterdir()) == [LOCK, STATE_FOLDER, "a"]
    finished = (out / "a" / RECORD_FILE).stat().st_mtime_ns
    seen: list[Moment] = []
    records = train_into(out, jobs, base, watch=seen.append)
    assert [(m.task, m.step) for m in seen] == [("b", 3), ("c", 1), ("c", 2), ("c", 3)]
    assert sorted(path.name for path in out.iterdir()) == [LOCK, "a", "b", "c"]
    assert (out / "a" / RECORD_FILE).stat().st_mtime_ns == finished
    for name in tasks:
        files = sorted(path.name for path in (out / name).iterdir())
        assert files == ["adapter_config.json", "adapter_model.safetensors", RECORD_FILE]
        assert json.loads((out / name / RECORD_FILE).read_text()) == records[name]
        assert read_adapter(out / name).digest == records[name]["adapter"]
    assert train_into(out, jobs, base) == records


def test_a_base_that_measured_with_an_adapter_is_trained_as_any_other(base: BaseModel, untouched: None) -> None:
    task = make_task()
    first = train(task, base, replace(QUICK, steps=1)).adapter
    loss_of(base, first, task.examples("validation"))
    assert train(task, base, replace(QUICK, steps=1)).adapter.digest == first.digest


def test_another_training_in_the_same_folder_is_refused_and_named(base: BaseModel, tmp_path: Path) -> None:
    short = replace(QUICK, steps=3)
    tasks = {name: make_task(name) for name in ("a", "b", "c")}
    with pytest.raises(KeyboardInterrupt):
        train_into(
            tmp_path,
            training_jobs(tasks, base, short),
            base,
            watch=lambda m: stopping_at(2)(m) if m.task == "b" else None,
        )
    (tmp_path / "c").mkdir()
    changed = {**tasks, "a": make_task("a", train=9)}
    with pytest.raises(UsageError) as caught:
        train_into(tmp_path, training_jobs(changed, base, replace(short, rate=1e-3)), base)
    message = str(caught.value)
    assert "a was trained with other training data" in message
    assert "b was trained with rate 0.05, now 0.001" in message
    assert "c already exists" in message
    with pytest.raises(UsageError, match=r"rate 0\.05, now 0\.001"):
        train(tasks["b"], base, replace(short, rate=1e-3), state=tmp_path / STATE_FOLDER / "b.pt")


def saved(**changes: object) -> bytes:
    """A state of another shape: a part is lacking where it is None."""
    document = {"identity": {}, "past": {}, **{k: v for k, v in changes.items() if k in ("identity", "past")}}
    parts = {"document": json.dumps({k: v for k, v in document.items() if v is not None})}
    parts |= {name: {} for name in ("best", "parameters", "optimizer")}
    parts |= {k: v for k, v in changes.items() if k not in ("identity", "past")}
    file = io.BytesIO()
    torch.save({k: v for k, v in parts.items() if v is not None}, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"nothing of ours",
        *(saved(**{part: None}) for part in ("document", "identity", "past", "best", "parameters", "optimizer")),
        *(saved(**{part: 3}) for part in ("document", "identity", "past", "best", "parameters", "optimizer")),
        saved(past={"pace": 1}),
        saved(past={"looks": [1]}),
        saved(past={"losses": ["a"]}),
    ],
)
def test_a_state_that_cannot_be_read_is_named(base: BaseModel, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read"):
        train(make_task(), base, QUICK, state=tmp_path / "state.pt")
    jobs = training_jobs({"a": make_task("a")}, base, QUICK)
    (tmp_path / "out" / STATE_FOLDER).mkdir(parents=True)
    (tmp_path / "out" / STATE_FOLDER / "a.pt").write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read"):
        train_into(tmp_path / "out", jobs, base)


@pytest.mark.parametrize("lacking", ["examples", "settings", "steps", "best_step", "loss", "seconds", "improved"])
@pytest.mark.parametrize("value", [None, "another shape"])
def test_a_record_of_another_shape_is_no_finished_task(
    base: BaseModel, tmp_path: Path, lacking: str, value: object
) -> None:
    jobs = training_jobs({"a": make_task("a")}, base, replace(QUICK, steps=1))
    train_into(tmp_path, jobs, base)
    record = json.loads((tmp_path / "a" / RECORD_FILE).read_text())
    changed = {**record, lacking: value} if value else {k: v for k, v in record.items() if k != lacking}
    (tmp_path / "a" / RECORD_FILE).write_text(json.dumps(changed))
    with pytest.raises(UsageError, match=r"a already exists, without a training\.json"):
        train_into(tmp_path, jobs, base)


def test_two_trainings_into_one_folder_are_not_run_at_once(base: BaseModel, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--device", "cpu", "--model-dtype", "f32", "--steps", 2, "--rank", 2, "--json"]
    words = ["train", data, "--base", base.name, "-o", out, *options]
    refused: list[subprocess.CompletedProcess[str]] = []

    def other(moment: Moment) -> None:
        if not refused:
            program = [sys.executable, "-m", "lorashelf", *map(str, words)]
            refused.append(subprocess.run(program, capture_output=True, text=True))

    train_into(out, training_jobs(read_tasks(data), base, TrainSettings(rank=2, steps=2)), base, watch=other)
    assert refused[0].returncode == 2
    assert json.loads(refused[0].stdout)["error"]["message"].startswith("another training writes into this folder")
    assert sorted(path.name for path in out.iterdir()) == [LOCK, "calm-en", "loud-en"]
    assert command(*words[1:]) == 0  # the lock is free again


# refusals -------------------------------------------------------------------------------------------------------------


def test_every_task_that_cannot_be_trained_is_named(base: BaseModel) -> None:
    tasks = {"a": make_task("a"), "b": make_task("b", splits={"test": (Example("x", "y"),)})}
    tasks["c"] = make_task("c", splits={"train": (Example("x" * 600, "y"),)})
    with pytest.raises(TaskDataError) as caught:
        training_jobs(tasks, base)
    assert caught.value.faults == (
        "b: there are no training examples (train.jsonl)",
        "c: all 1 training examples are too long",
    )


def test_a_target_that_the_base_lacks_is_named(base: BaseModel) -> None:
    with pytest.raises(UsageError, match="c_attn") as caught:
        training_jobs({"a": make_task()}, base, replace(QUICK, targets=("q_proj", "c_attn")))
    assert "q_proj" in str(caught.value.cure)
    (job,) = training_jobs({"a": make_task()}, base, replace(QUICK, targets=("mlp.down_proj",)))
    assert job.targets == ["down_proj"]
    assert list(train(make_task(), base, replace(QUICK, steps=1, targets=("down_proj",))).adapter.modules) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_a_loss_that_is_not_finite_names_task_step_and_example(tmp_path: Path) -> None:
    broken = open_base(str(tiny_base(tmp_path / "tiny", "qwen2")), dtype="f32", device="cpu")
    with torch.no_grad():
        (letter,) = HFBackend(broken).text.encoded("z")
        broken.model.get_input_embeddings().weight[letter] = float("nan")
    task = make_task(splits={"train": (Example("a", "A"), Example("a z", "A Z"), Example("b", "B"))})
    with pytest.raises(ModelError) as caught:
        train(task, broken, replace(QUICK, batch=3))
    assert caught.value.where == "loud-en, step 1, example 2: 'a z'"
    validated = replace(task, splits={"train": task.splits["train"][:1], "validation": task.splits["train"]})
    with pytest.raises(ModelError, match="validation after step 0"):
        train(validated, broken, QUICK)


def test_weights_beyond_the_dtype_are_a_divergence(base: BaseModel, untouched: None) -> None:
    with pytest.raises(ModelError, match="a weight is not finite") as caught:
        train(make_task(), base, replace(QUICK, rate=1e30, steps=1, dtype="f16"))
    assert "loud-en, step " in str(caught.value.where)
    assert "--lr" in str(caught.value.cure)


def test_a_gradient_that_is_not_finite_changes_nothing(
    base: BaseModel, untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients, update, states = LoraTrainer._gradients, LoraTrainer.update, []

    def spoiled(trainer: LoraTrainer, *given: Any) -> list[float]:
        losses = gradients(trainer, *given)
        next(p for p in trainer._parameters.values() if p.grad is not None).grad.view(-1)[0] = float("inf")
        return losses

    def watched(trainer: LoraTrainer, rate: float) -> float:
        before = trainer.state()
        norm = update(trainer, rate)
        states.append((before, trainer.state()))
        return norm

    monkeypatch.setattr(LoraTrainer, "_gradients", spoiled)
    monkeypatch.setattr(LoraTrainer, "update", watched)
    with pytest.raises(ModelError) as caught:
        train(make_task(), base, QUICK)
    assert str(caught.value.where).startswith("loud-en, step 1, examples ")
    ((before, after),) = states
    assert before["optimizer"] == after["optimizer"]
    assert all(torch.equal(values, after["parameters"][name]) for name, values in before["parameters"].items())


def test_where_memory_ends_examples_are_taken_one_by_one(
    base: BaseModel, untouched: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(QUICK, dropout=0.0, steps=4)
    whole = train(make_task(validation=0), base, settings).adapter
    losses, largest = HFBackend.token_losses, [1]

    def small(backend: HFBackend, batch: Any) -> Any:
        if len(batch) > largest[0]:
            raise RuntimeError("CUDA out of memory")
        return losses(backend, batch)

    monkeypatch.setattr(HFBackend, "token_losses", small)
    single = train(make_task(validation=0), base, settings).adapter
    assert [record.message for record in caplog.records] == [
        "out of memory with 4 examples in a step; taking them one at a time"
    ]
    for path, factors in whole.modules.items():
        assert np.allclose(factors.b, single.modules[path].b, atol=1e-3)
    largest[0] = 0
    with pytest.raises(ModelError, match="one example at a time"):
        train(make_task(validation=0), base, settings)


def test_without_peft_the_extra_is_named(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match="peft"):
        training_jobs({"a": make_task()}, base)
    with pytest.raises(MissingExtra):
        trainer_module.peft_library()


def test_the_faults_of_all_task_folders_are_named(tmp_path: Path) -> None:
    for name, toml in (("a", 'prompt = "x"'), ("b", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "task.toml").write_text(toml)
        (tmp_path / name / "train.jsonl").write_text("{\n")
    with pytest.raises(TaskDataError) as caught:
        read_tasks(tmp_path)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["a", "b", "b"]


# other programs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_loads_what_is_written(architecture: str, tmp_path: Path) -> None:
    import peft

    folder = tiny_base(tmp_path / "tiny", architecture, chat=architecture == "llama")
    opened = open_base(str(folder), dtype="f32", device="cpu")
    task = make_task()
    (job,) = training_jobs({"a": replace(task, name="a")}, opened, replace(QUICK, steps=4))
    train_into(tmp_path / "out", [job], opened)
    assert job.targets == (["c_attn", "c_proj"] if architecture == "gpt2" else ["k_proj", "o_proj", "q_proj", "v_proj"])
    assert not any("mlp" in path for path in job.layers)
    adapter = read_adapter(tmp_path / "out" / "a")
    assert adapter.base.name == str(folder)
    backend = HFBackend(opened)
    examples = task.examples("validation")
    ours = [loss.nll for loss in backend.nll([(adapter, examples)])[0]]
    bare = [loss.nll for loss in backend.nll([(None, examples)])[0]]
    theirs = peft.PeftModel.from_pretrained(open_base(str(folder), dtype="f32").model, tmp_path / "out" / "a").eval()
    with torch.no_grad():
        expected = [float(by_hand(theirs, *backend.tokens(examples, e))) for e in examples.examples]
    assert ours == pytest.approx(expected, rel=1e-4)
    assert ours != pytest.approx(bare, rel=1e-3)


# the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("loud-en", "calm-en"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        (folder / "task.toml").write_text('prompt = "Louder:"\n')
        for split, words in (("train", FRUIT[:6]), ("validation", FRUIT[6:9])):
            lines = [json.dumps({"input": f"one {word}", "output": f"ONE {word.upper()}"}) for word in words]
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *map(str, words)])
    return int(caught.value.code or 0)


def test_the_command_trains_goes_on_and_prints_one_document(
    base: BaseModel, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [data, "--base", base.name, "-o", tmp_path / "out", "--steps", 4, "--rank", 2, "--lr", 0.01, "--json"]
    with monkeypatch.context() as patch:
        at = Meter.at

        def interrupted(meter: Meter, done: int, text: str, telling: bool) -> None:
            at(meter, done, text, telling)
            if done == 6:
                raise KeyboardInterrupt

        patch.setattr(Meter, "at", interrupted)
        assert command(*words) == 130
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "interrupted"
    assert command(*words) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["tasks"].keys() == {"calm-en", "loud-en"}
    assert document["tasks"]["loud-en"]["steps"] == 4
    assert "scaled to the data" in printed.err
    assert "calm-en: 6 examples; r 2, alpha 8, dropout 0.05 on k_proj o_proj q_proj v_proj; 4 steps" in printed.err
    assert "loud-en  step 4/4" in printed.err
    assert "calm-en  step" not in printed.err  # it was finished
    assert command(*words[:-1]) == 0
    shown = capsys.readouterr().out
    assert "2 adapters, each with training.json" in shown


def test_the_command_refuses_before_it_computes(
    base: BaseModel, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [data, "--base", base.name, "-o", tmp_path / "out"]
    assert command(*words, "--steps", 1, "--epochs", 1) == 2
    assert command(*words, "--task", "loud-an") == 2
    assert "did you mean 'loud-en'" in capsys.readouterr().err
    for folder in data.iterdir():
        (folder / "train.jsonl").unlink()
    assert command(*words) == 5
    message = capsys.readouterr().err
    assert "calm-en: there are no training examples" in message
    assert "loud-en: there are no training examples" in message
    assert not (tmp_path / "out").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_has_the_time_left_on_a_terminal_and_in_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(0, 20)
    monkeypatch.setattr("lorashelf.cli.output.time.monotonic", lambda: next(clock))
    with Meter(10) as meter:
        for done in (3, 4, 5, 6):
            meter.at(done, f"a  step {done}", done != 5)
    assert capsys.readouterr().err.splitlines() == [
        "a  step 3  (3 of 10)",
        "a  step 4  (4 of 10, 2 min 0 s left)",
        "a  step 6  (6 of 10, 1 min 20 s left)",
    ]
    with Meter(10) as meter:
        for done in range(1, 6):
            meter.at(done, f"b  step {done}")
    assert capsys.readouterr().err.splitlines() == [  # a line each half minute at least
        "b  step 2  (2 of 10, 2 min 40 s left)",
        "b  step 4  (4 of 10, 2 min 0 s left)",
    ]
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Meter(10) as meter:
        meter.at(7, "a  step 7", False)
    assert "a  step 7" in sys.stderr.getvalue()
    assert "7/10" in sys.stderr.getvalue()


# the real small model -------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_smollm2_learns_a_manner_from_a_handful() -> None:
    """Formal German from six examples in six steps: the loss of two others falls."""
    task = read_tasks(ROOT / "examples" / "fewshot" / "tone-de")["tone-de"]
    splits = {"train": task.splits["train"][:6], "validation": task.splits["validation"][:2]}
    base = open_base(None, dtype="f32", device="cpu")
    record = train(replace(task, splits=splits), base, TrainSettings(steps=6, batch=2, seed=0)).record
    assert record["loss"] < record["zero_shot"] - 0.05
