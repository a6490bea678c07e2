"""lorashelf cluster --method d2c, whole, on a tiny random Llama: its document, its journal, its refusals."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from command import Command
from factory import assert_same_delta, tree
from lorashelf import PARTITIONERS, BaseId, Shelf, merge, plan_add, plan_set, read_adapter, write_adapter
from lorashelf.cli import clustering, main, output
from lorashelf.locks import sole
from lorashelf.lora.algebra import scaled
from lorashelf.models.hf import HFBackend
from test_hf import random_adapter
from tiny_base import tiny_base

NAMES = ("gec-de", "gec-en", "qa-de", "qa-en", "sum-de")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, five adapters of it, and a task folder for each."""
    folder = tmp_path_factory.mktemp("house")
    backend = HFBackend.open(str(tiny_base(folder / "base")), device="cpu", dtype="f32")
    for i, name in enumerate(NAMES):
        write_adapter(random_adapter(backend, seed=i), folder / "zoo" / name)
        examples(folder / "tasks" / name, 6)
    return folder


def examples(folder: Path, count: int, *, validation: bool = True, text: str = "in") -> None:
    folder.mkdir(parents=True)
    (folder / "task.toml").write_text('prompt = "Mend:"\nmetric = "rouge_l"\nmax_new_tokens = 9\n')
    for split in ("train", "validation")[: 1 + validation]:
        lines = [{"input": f"{text} {i} {folder.name}", "output": f"out {i} {split}"} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(capsys: pytest.CaptureFixture[str], house: Path, output: Path, *more: object) -> tuple[int, Any, str]:
    words = ["cluster", *(house / "zoo" / name for name in NAMES), "-o", output, "--slots", 2, "--method", "d2c"]
    words += ["--examples", house / "tasks", "--base", house / "base", "--iterations", 12, "--examples-per-task", 3]
    command = Command(capsys)
    return *command(*words, *more), command.stderr


def test_the_document_and_the_shelf(house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = run(capsys, house, tmp_path / "s")
    assert code == 0
    assert set(document["partition"]) == set(NAMES)
    assert document["method"] == "d2c"
    assert document["proposals"] == 12
    assert document["losses"]["asked"] == 24
    assert document["evaluations"] == document["losses"]["distinct"] <= 24
    assert document["loss"]["held_out"] > 0
    snapshot = Shelf(tmp_path / "s").snapshot()
    assert document["head"] == snapshot.head
    cause = snapshot.manifest.cause
    assert (cause["method"], cause["seed"]) == ("d2c", 0)
    assert {name: document[name] for name in cause["search"]} == cause["search"]
    options = ("iterations", "propose", "accept", "init", "restarts", "keep_best", "budget")
    assert [cause["search"][name] for name in options] == [12, "uniform", "task", "random", 0, False, 0]
    assert cause["search"]["loss"].keys() == {"start", "search", "held_out"}
    assert cause["search"]["evaluations"] == document["evaluations"]
    assert cause["search"]["examples"].startswith("b2-")
    backend = HFBackend.open(str(house / "base"), device="cpu")
    model = cause["search"]["model"]
    assert (model["name"], model["weights"]) == (str(house / "base"), backend.weights)
    assert (model["dtype"], model["prompt"]) == (backend.dtype, backend.prompt_id)
    shelf = Shelf(tmp_path / "s")
    for number in range(3):  # the log keeps it when the state is gone
        shelf.commit(plan_set(shelf.snapshot(), "qa-en", {"prompt": f"Mend {number}:"}))
    assert shelf.log()[1]["search"] == cause["search"]
    assert shelf.log()[1]["id"] not in shelf.snapshot().kept
    with pytest.raises(SystemExit):
        main(["log", str(tmp_path / "s")])
    assert "d2c" in capsys.readouterr().out
    snapshot = shelf.snapshot()
    assert (document["merge"], document["later_merge"]) == ("ties", "linear")
    assert snapshot.manifest.tasks["qa-de"]["prompt"] == "Mend:"
    assert snapshot.manifest.tasks["qa-en"]["max_new_tokens"] == 9
    assert snapshot.manifest.tasks["qa-en"]["type"] == "qa"
    assert list(tmp_path.iterdir()) == [tmp_path / "s"], "the journal goes once the shelf is there"
    for slot in snapshot.manifest.slots:
        if len(slot.members) == 1:
            assert snapshot.stored(slot).digest == read_adapter(house / "zoo" / slot.members[0]).digest


def test_the_same_command_gives_the_same_shelf(house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (run(capsys, house, tmp_path / name, "--seed", 5)[1] for name in "ab")
    assert first["partition"] == second["partition"]
    assert first["loss"] == second["loss"]
    assert [s["object"] for s in first["slots"]] == [s["object"] for s in second["slots"]]


def test_an_interrupted_search_is_taken_up(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(capsys, house, tmp_path / "whole")[1]
    measure, calls = HFBackend.nll, []

    def interrupted(self: HFBackend, pairs: Any) -> Any:
        calls.append(len(pairs))
        if len(calls) > 4:
            raise KeyboardInterrupt
        return measure(self, pairs)

    monkeypatch.setattr(HFBackend, "nll", interrupted)
    code, document, said = run(capsys, house, tmp_path / "s")
    assert (code, document["error"]["kind"]) == (130, "interrupted")
    assert [p.name for p in tmp_path.iterdir() if p.name != "whole"] == ["s.d2c.jsonl"]
    assert f"the losses measured so far are in {tmp_path / 's.d2c.jsonl'}" in said
    monkeypatch.setattr(HFBackend, "nll", measure)
    before = tree(tmp_path)
    code, document, _ = run(capsys, house, tmp_path / "s", "--accept", "both")
    assert code == 2
    assert "accept differ" in document["error"]["message"]
    assert tree(tmp_path) == before
    code, resumed, _ = run(capsys, house, tmp_path / "s")
    assert code == 0
    assert resumed["partition"] == whole["partition"]
    assert 0 < resumed["evaluations"] < whole["evaluations"]
    assert resumed["evaluations"] + sum(calls[:4]) == whole["evaluations"]


def test_a_second_search_in_one_journal_is_refused(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with sole(tmp_path / "s.d2c.jsonl.lock", "held", tmp_path, "wait"):
        code, document, _ = run(capsys, house, tmp_path / "s")
    assert code == 2
    assert "another search is writing to this journal" in document["error"]["message"]
    assert run(capsys, house, tmp_path / "s")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_progress_is_told_where_there_is_no_terminal(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "INTERVAL", 0.0)
    said = run(capsys, house, tmp_path / "s")[2]
    assert "D2C: trying move 1 of 12  (0 of 12)" in said
    assert " left)" in said


@pytest.mark.parametrize(
    ("method", "options", "blocks", "later"),
    [
        ("d2c", [], ("ties", {}), ("linear", {})),
        ("d2c", ["--merge", "ties", "-p", "density=0.3"], ("ties", {"density": 0.3}), ("linear", {})),
        ("d2c", ["--merge", "svd"], ("svd", {}), ("svd", {})),
        ("d2c", ["--policy", "all"], ("ties", {}), ("linear", {})),
        ("random", [], ("linear", {}), ("linear", {})),
        ("random", ["--merge", "factor_mean"], ("factor_mean", {}), ("factor_mean", {})),
        ("random", ["--merge", "dare_linear", "-p", "density=0.9"], ("dare_linear", {"density": 0.9}), ("linear", {})),
    ],
)
def test_blocks_and_later_adds_have_recipes_of_their_own(
    house: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    options: list[str],
    blocks: tuple[str, dict[str, float]],
    later: tuple[str, dict[str, float]],
) -> None:
    words = ["--method", method, *options]
    if method == "d2c":
        code, document, _ = run(capsys, house, tmp_path / "s", *options)
    else:
        names = [str(house / "zoo" / name) for name in NAMES]
        with pytest.raises(SystemExit) as exit_:
            main(["cluster", *names, "-o", str(tmp_path / "s"), "--slots", "2", *words, "--json"])
        code, document = exit_.value.code, json.loads(capsys.readouterr().out)
    assert (code, document["merge"], document["later_merge"]) == (0, blocks[0], later[0])
    snapshot = Shelf(tmp_path / "s").snapshot()
    spec = snapshot.settings.merge
    assert (spec.method, dict(spec.parameters)) == later
    assert (snapshot.manifest.cause["merge"], snapshot.manifest.cause["parameters"]) == blocks
    assert snapshot.manifest.recipe["merge"] == later[0]
    for slot in snapshot.manifest.slots:
        members = [read_adapter(house / "zoo" / name) for name in slot.members]
        if len(members) > 1:
            expected = merge(members, method=blocks[0], seed=spec.seed, **blocks[1])
            assert_same_delta(expected, snapshot.stored(slot), 1e-6)
            assert slot.history.fixed == (None if blocks[0] in ("linear", "factor_mean") else f"merged by {blocks[0]}")


def test_a_later_fold_into_a_ties_block_is_a_running_average(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newcomer counts as one of n + 1, however the block of n was merged, and so does the next."""
    assert run(capsys, house, tmp_path / "s", "--slots", 1)[0] == 0
    shelf, n = Shelf(tmp_path / "s"), len(NAMES)
    held = shelf.snapshot().stored(shelf.snapshot().manifest.slots[0])
    for i, name in enumerate(("gec-de", "qa-de")):
        x = scaled(read_adapter(house / "zoo" / name), i + 2.0)
        total = n + i + 1
        held = merge([held, x], [(total - 1) / total, 1 / total], method="linear")
        shelf.commit(plan_add(shelf.snapshot(), x, f"late-{i}"))
        slot = shelf.snapshot().manifest.slots[0]
        assert_same_delta(held, shelf.snapshot().stored(slot), 1e-5)
        assert [m.weight for m in slot.history.merged[n:]] == pytest.approx([1 / total] * (i + 1))
        assert (slot.history.method, slot.history.fixed) == (None, "merged by ties")


def test_a_guided_search_asks_for_less(house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = run(capsys, house, tmp_path / "a", "--iterations", 100)[1]
    code, guided, _ = run(capsys, house, tmp_path / "b", "--iterations", 100, "--propose", "guided")
    assert code == 0
    assert 0 < guided["proposals"] < plain["proposals"] == 100
    assert guided["evaluations"] < plain["evaluations"]
    assert Shelf(tmp_path / "b").snapshot().manifest.cause["search"]["propose"] == "guided"


def test_a_guided_start_needs_no_loss_and_a_budget_holds(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guided = ("--init", "guided", "--propose", "guided", "--iterations", 100)
    start = run(capsys, house, tmp_path / "a", *guided)[1]
    assert (start["proposals"], start["evaluations"]) == (0, 0)  # no further gain is expected
    code, further, _ = run(capsys, house, tmp_path / "b", *guided, "--budget", 5)
    assert code == 0
    assert 0 < further["losses"]["distinct"] <= 5
    assert further["loss"]["start"] == start["loss"]["search"]
    assert Shelf(tmp_path / "b").snapshot().manifest.cause["search"]["budget"] == 5


def test_the_defaults_of_the_command_are_those_of_the_method() -> None:
    given = inspect.signature(clustering.cluster).parameters
    for name, parameter in PARTITIONERS["d2c"].parameters.items():
        assert given[name].default == parameter.default


def test_a_named_journal_stays(house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = tmp_path / "j.jsonl"
    assert run(capsys, house, tmp_path / "a", "--journal", journal)[0] == 0
    code, again, _ = run(capsys, house, tmp_path / "b", "--journal", journal)
    assert code == 0
    assert again["evaluations"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--accept", "all"], "--accept is 'all'"),
        (["--propose", "wild"], "--propose is 'wild'; choose from uniform, guided"),
        (["--init", "kmeans"], "--init is 'kmeans'"),
        (["--method", "d3c"], "did you mean 'd2c'?"),
        (["--base", "no/such/base/at all"], "does not exist"),
        (["--examples", "."], "no task folder here"),
    ],
)
def test_options_that_cannot_be(
    house: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, document, _ = run(capsys, house, tmp_path / "s", *options)
    assert code in (2, 5)
    assert said in f"{document['error']['message']} {document['error']['cure']}"
    assert list(tmp_path.iterdir()) == []


def test_examples_are_needed_and_every_lacking_task_is_named(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples(tmp_path / "tasks" / "gec-de", 2)
    examples(tmp_path / "tasks" / "gec-en", 2)
    code, document, _ = run(capsys, house, tmp_path / "s", "--examples", tmp_path / "tasks")
    assert code == 2
    assert all(name in document["error"]["message"] for name in ("qa-de", "qa-en", "sum-de"))
    words = ["cluster", str(house / "zoo" / "gec-de"), "-o", str(tmp_path / "s"), "--slots", "2", "--method", "d2c"]
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert "partition method d2c needs --examples DIR" in capsys.readouterr().err


def test_examples_that_do_not_fit_are_counted_or_refused(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        examples(tmp_path / "some" / name, 3)
        examples(tmp_path / "none" / name, 3, text="x" * 512)
    long = {"input": "x" * 512, "output": "y"}
    with (tmp_path / "some" / "gec-de" / "train.jsonl").open("a") as handle:
        handle.write(json.dumps(long) + "\n")
    code, _, said = run(capsys, house, tmp_path / "a", "--examples", tmp_path / "some", "--examples-per-task", 4)
    assert code == 0
    assert "1 examples are longer than the model's context and were left out" in said
    code, document, _ = run(capsys, house, tmp_path / "b", "--examples", tmp_path / "none")
    assert code == 5
    assert all(f"{name}: no example" in document["error"]["message"] for name in NAMES)


def test_adapters_of_two_bases_are_refused_before_the_search(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = read_adapter(house / "zoo" / "qa-en")
    write_adapter(replace(foreign, base=BaseId("acme/other")), tmp_path / "zoo" / "tone-en")
    examples(tmp_path / "tasks" / "tone-en", 3)
    for name in NAMES:
        (tmp_path / "tasks" / name).symlink_to(house / "tasks" / name)
    measure, calls = HFBackend.nll, []
    monkeypatch.setattr(HFBackend, "nll", lambda self, pairs: calls.append(1) or measure(self, pairs))
    more = (tmp_path / "zoo" / "tone-en", "--examples", tmp_path / "tasks")
    code, document, _ = run(capsys, house, tmp_path / "s", *more)
    assert (code, document["error"]["kind"]) == (3, "base_mismatch")
    assert calls == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tasks", "zoo"]
    assert run(capsys, house, tmp_path / "s", *more, "--assume-base")[0] == 0


def test_what_a_task_file_says_is_stored(house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        examples(tmp_path / "tasks" / name, 3)
        toml = tmp_path / "tasks" / name / "task.toml"
        toml.write_text(toml.read_text() + 'type = "odd"\nlanguage = "xx"\n')
    code, _, _ = run(capsys, house, tmp_path / "s", "--examples", tmp_path / "tasks")
    assert code == 0
    stored = Shelf(tmp_path / "s").snapshot().manifest
    assert {task["type"] for task in stored.tasks.values()} == {"odd"}
    assert {task["language"] for task in stored.tasks.values()} == {"xx"}
    assert {m.type for slot in stored.slots for m in slot.history.merged} == {"odd"}


def test_without_validation_examples_nothing_is_held_out(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        examples(tmp_path / "tasks" / name, 3, validation=False)
    code, document, _ = run(capsys, house, tmp_path / "s", "--examples", tmp_path / "tasks")
    assert code == 0
    assert document["loss"]["held_out"] is None


def test_adapters_of_another_size_are_refused_before_the_search(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_base(tmp_path / "gpt2", "gpt2")
    code, document, _ = run(capsys, house, tmp_path / "s", "--base", other)
    assert code == 3
    assert "no linear layer of this name" in document["error"]["message"]
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("method", ["agglomerative", "kmeans", "kmeans_svd", "random", "single"])
@pytest.mark.parametrize(
    "given",
    [
        ("--iterations", "200"),  # also where it is the default
        ("--examples-per-task", "3"),
        ("--accept", "both"),
        ("--init", "agglomerative"),
        ("--propose", "guided"),
        ("--restarts", "0"),
        ("--budget", "9"),
        ("--keep-best",),
        ("--journal", "j"),
        ("--base", "x"),
        ("--device", "cpu"),
        ("--model-dtype", "f32"),
        ("--template-arg", "enable_thinking=false"),
        ("--keep-best", "--init", "random"),
    ],
    ids=" ".join,
)
def test_options_of_the_search_are_refused_by_name_under_other_methods(
    tmp_path: Path, method: str, given: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["cluster", "anything", "-o", str(tmp_path / "s"), "--slots", "2", "--method", method, *given])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert f"--method {method} does not use" in said
    assert all(option in said for option in given if option.startswith("--"))
    assert list(tmp_path.iterdir()) == []


def test_other_methods_store_the_prompts_of_the_examples(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cluster", *(str(house / "zoo" / name) for name in NAMES), "-o", str(tmp_path / "s"), "--slots", "2"]
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--method", "agglomerative", "--examples", str(house / "tasks")])
    assert not exit_.value.code
    tasks = Shelf(tmp_path / "s").snapshot().manifest.tasks
    assert {task["prompt"] for task in tasks.values()} == {"Mend:"}
