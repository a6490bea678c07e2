"""Task folders: read with file, line and field named for every fault; the project's own examples are such folders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lorashelf.errors import TaskDataError, UsageError
from lorashelf.tasks.folders import Example, read_task, read_task_file, read_tasks

FEWSHOT = Path(__file__).parent.parent / "examples" / "fewshot"


def task_folder(folder: Path, lines: list[str], toml: str = 'prompt = "Mend:"\n') -> Path:
    folder.mkdir(parents=True)
    (folder / "task.toml").write_text(toml)
    (folder / "train.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def test_a_task_folder_is_read(tmp_path: Path) -> None:
    lines = ['{"input": "a", "output": "b"}', '{"input": "ü", "output": "v", "references": ["v", "w"]}']
    task = read_task(
        task_folder(
            tmp_path / "gec-de", lines, 'prompt = "Mend:"\nlanguage = "de"\nmetric = "f0.5"\nmax_new_tokens = 9\n'
        )
    )
    assert (task.name, task.type, task.language, task.metric, task.max_new_tokens) == ("gec-de", "gec", "de", "f0.5", 9)
    assert task.splits == {"train": (Example("a", "b"), Example("ü", "v", ("v", "w")))}
    assert task.examples("train").digest.startswith("b2-")


def test_every_faulty_line_is_named_with_file_line_and_field(tmp_path: Path) -> None:
    lines = [
        '{"input": "a", "output": "b"}',
        "{",
        '["a"]',
        '{"input": 3, "output": ""}',
        '{"input": "a", "output": "b", "references": "c"}',
        '{"input": "a", "output": "b", "references": ["c", " "]}',
    ]
    with pytest.raises(TaskDataError) as error:
        read_task(task_folder(tmp_path / "t", lines))
    text = str(error.value)
    for part in (
        "line 2 is not JSON",
        "line 3 is not a JSON object",
        "line 4: 'input'",
        "line 4: 'output'",
        "line 5: 'references'",
        "line 6: 'references'",
    ):
        assert f"train.jsonl {part}" in text
    assert error.value.exit_code == 5
    assert len(error.value.faults) == 6


def test_an_empty_file_and_a_folder_without_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskDataError, match=r"train\.jsonl is empty"):
        read_task(task_folder(tmp_path / "t", []))
    (tmp_path / "t" / "train.jsonl").unlink()
    with pytest.raises(TaskDataError, match="there is no train"):
        read_task(tmp_path / "t")
    with pytest.raises(UsageError, match="no task folder"):
        read_tasks(tmp_path / "t" / "nowhere")


def test_a_byte_order_mark_and_blank_lines_at_the_end_are_no_faults(tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "t", [])
    line = b'{"input": "a", "output": "b"}'
    (folder / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line + b"\r\n\r\n\n")
    assert read_task(folder).splits == {"train": (Example("a", "b"), Example("a", "b"))}
    (folder / "train.jsonl").write_bytes(line + b"\n\n" + line + b"\n")
    with pytest.raises(TaskDataError, match="line 2 is not JSON"):
        read_task(folder)


def test_a_linked_task_keeps_the_links_name(tmp_path: Path) -> None:
    target = task_folder(tmp_path / "qa-de", ['{"input": "a", "output": "b"}'])
    (tmp_path / "links").mkdir()
    for name in ("my-qa", "your-qa"):
        (tmp_path / "links" / name).symlink_to(target)
    assert {name: task.name for name, task in read_tasks(tmp_path / "links").items()} == {
        "my-qa": "my-qa",
        "your-qa": "your-qa",
    }


def test_a_task_needs_a_prompt_and_known_fields(tmp_path: Path) -> None:
    with pytest.raises(TaskDataError, match=r"task\.toml: the task has no prompt"):
        read_task(task_folder(tmp_path / "t", ['{"input": "a", "output": "b"}'], 'metric = "f1"\n'))
    (tmp_path / "x.toml").write_text('promt = "x"\nmax_new_tokens = true\n')
    with pytest.raises(UsageError, match=r"promt.*max_new_tokens"):
        read_task_file(tmp_path / "x.toml")


LINE = '{"input": "a", "output": "b"}'
FAULTS = {  # what is wrong → files of the folder, what is said, the cure
    "no prompt": ({"task.toml": 'metric = "f1"\n'}, "no prompt", 'add prompt = "…" to task.toml'),
    "unknown field": ({"task.toml": 'promt = "x"\nprompt = "x"\n'}, "unknown field 'promt'", "the fields are prompt"),
    "mistyped field": ({"task.toml": "prompt = 3\n"}, "prompt is 3, not a string", "give prompt as a string"),
    "no TOML": ({"task.toml": "prompt: x\n"}, "is not TOML", "a line is name = value"),
    "UTF-16 TOML": ({"task.toml": 'prompt = "x"'.encode("utf-16")}, "is not UTF-8", "save it as UTF-8"),
    "no split": ({"train.jsonl": None}, "there is no train.jsonl", "add train.jsonl"),
    "an empty split": ({"train.jsonl": ""}, "train.jsonl is empty", "add lines to train.jsonl"),
    "no JSON": ({"train.jsonl": "{\n"}, "line 1 is not JSON", 'a line is {"input"'),
    "no object": ({"train.jsonl": "[]\n"}, "line 1 is not a JSON object", 'a line is {"input"'),
    "no text": ({"train.jsonl": '{"input": 3, "output": "b"}\n'}, "'input' is 3", 'a line is {"input"'),
    "references": (
        {"train.jsonl": LINE[:-1] + ', "references": "c"}'},
        "not a list of non-empty strings",
        '"references" is a list',
    ),
    "half a pair": (
        {"train.jsonl": r'{"input": "\ud83d", "output": "b"}'},
        "an unpaired surrogate",
        "write the character itself",
    ),
    "UTF-16 lines": ({"train.jsonl": LINE.encode("utf-16")}, "is not UTF-8", "save it as UTF-8"),
}


def faulty_folder(folder: Path, files: dict[str, str | bytes | None]) -> Path:
    task_folder(folder, [LINE])
    for name, content in files.items():
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("kind", FAULTS)
def test_every_kind_of_fault_has_its_own_cure_and_one_exit_code(tmp_path: Path, kind: str) -> None:
    files, said, cure = FAULTS[kind]
    faulty_folder(tmp_path / "tasks" / "a", files)
    with pytest.raises(TaskDataError, match=re.escape(said)) as of_one:
        read_task(tmp_path / "tasks" / "a")
    faulty_folder(tmp_path / "tasks" / "b", files)
    with pytest.raises(TaskDataError, match=re.escape(said)) as of_two:
        read_tasks(tmp_path / "tasks")
    assert len(of_two.value.faults) == 2
    assert of_one.value.cure == of_two.value.cure  # once, not once per folder
    assert str(of_one.value.cure).startswith(cure)
    assert of_one.value.exit_code == of_two.value.exit_code == 5


def test_cures_of_all_kinds_are_named_together(tmp_path: Path) -> None:
    faulty_folder(tmp_path / "t", {"task.toml": "", "train.jsonl": "{\n"})
    with pytest.raises(TaskDataError) as error:
        read_task(tmp_path / "t")
    assert len(error.value.faults) == 2
    assert error.value.cure == 'add prompt = "…" to task.toml\na line is {"input": "…", "output": "…"}'


@pytest.mark.parametrize("name", ["task.toml", "train.jsonl"])
def test_a_byte_order_mark_is_no_fault(tmp_path: Path, name: str) -> None:
    folder = task_folder(tmp_path / "t", [LINE])
    plain = read_task(folder)
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert read_task(folder) == plain


def test_the_digest_follows_the_examples(tmp_path: Path) -> None:
    one = read_task(task_folder(tmp_path / "a", ['{"input": "a", "output": "b"}']))
    same = read_task(task_folder(tmp_path / "b", ['{"output": "b", "input": "a"}']))
    other = read_task(task_folder(tmp_path / "c", ['{"input": "a", "output": "c"}']))
    assert one.examples("train").digest == same.examples("train").digest != other.examples("train").digest


def test_the_few_shot_examples_are_forty_tasks_of_twelve() -> None:
    tasks = read_tasks(FEWSHOT)
    assert len(tasks) == 40
    for task in tasks.values():
        assert {split: len(examples) for split, examples in task.splits.items()} == {"train": 6, "validation": 6}
        assert task.prompt
        assert task.metric
        assert task.language == task.name.split("-")[1]


def examples() -> list[tuple[str, Example]]:
    return [(task.name, e) for task in read_tasks(FEWSHOT).values() for split in task.splits.values() for e in split]


def test_no_example_stands_twice_and_answers_to_questions_stand_in_their_context() -> None:
    inputs = [example.input for _, example in examples()]
    assert len(set(inputs)) == len(inputs) == 480
    for name, example in examples():
        if name.startswith("qa-"):
            context = re.search(r"context: (.*)", example.input, re.DOTALL)
            assert context, name
            assert example.output in context[1], (name, example.output)
        if name.startswith(("gec-", "tone-")):
            assert example.input != example.output


def test_no_two_examples_share_a_frame() -> None:
    """No run of six words (twelve characters in zh, ja) of an input stands in another one of its language."""
    seen: dict[tuple[str, str], str] = {}
    for name, example in examples():
        language = name.split("-")[1]
        text = example.input.replace("question:", "").replace("context:", "")
        units = list(re.sub(r"\s", "", text)) if language in ("zh", "ja") else text.lower().split()
        size = 12 if language in ("zh", "ja") else 6
        for run in {
            "".join(units[i : i + size]) if size == 12 else " ".join(units[i : i + size])
            for i in range(len(units) - size + 1)
        }:
            assert seen.setdefault((language, run), json.dumps(example.input)) == json.dumps(example.input), (name, run)


def test_a_line_ends_with_a_line_feed_alone(tmp_path: Path) -> None:
    lines = ['{"input": "a\u2028b\x85c", "output": "d"}\r', '{"input": "e", "output": "f"}']
    task = read_task(task_folder(tmp_path / "t", lines))
    assert [example.input for example in task.splits["train"]] == ["a\u2028b\x85c", "e"]


def test_half_a_surrogate_pair_is_refused_where_it_stands(tmp_path: Path) -> None:
    lines = [
        r'{"input": "\ud83d", "output": "b"}',
        r'{"input": "a", "output": "\ude00", "references": ["\ud83d\ude00", "\ud83d"]}',
        r'{"input": "\ud83d\ude00", "output": "b"}',
    ]
    with pytest.raises(TaskDataError) as error:
        read_task(task_folder(tmp_path / "t", lines))
    where = [fault.partition(" contains")[0] for fault in error.value.faults]
    assert where == [f"train.jsonl line {place}" for place in ("1: 'input'", "2: 'output'", "2: 'references'")]
