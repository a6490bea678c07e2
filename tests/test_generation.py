"""`generate`: answers through the slot that serves a task, held against transformers and PEFT; streams, refusals."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorashelf import Adapter, BaseId, Factors, Modules, Shelf, new_settings, plan_add, write_adapter
from lorashelf.cli import main
from lorashelf.errors import ModelError, ShapeMismatch, UnknownName, UsageError
from lorashelf.models.hf import HFBackend
from lorashelf.serving.generate import answer, service, stream
from tiny_base import tiny_base

ZOO = Path(__file__).parent.parent / "examples" / "zoo"
FEWSHOT = Path(__file__).parent.parent / "examples" / "fewshot"
CONTEXT = 160
NAME = "acme/tiny"
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
PROMPT = "Mend this:"
TEXT = "the cats sleeps"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny", context=CONTEXT)


@pytest.fixture(scope="module")
def tiny(base: Path) -> HFBackend:
    return HFBackend.open(str(base), dtype="f32")


def adapter(seed: int, name: str = "", size: float = 0.6) -> Adapter:
    """A random adapter of the tiny base's q and v projections."""
    rng = np.random.default_rng(seed)
    modules = {}
    for layer in range(2):
        for projection, dout in (("q_proj", 16), ("v_proj", 8)):
            a, b = rng.standard_normal((2, 16)), size * rng.standard_normal((dout, 2))
            path = f"model.layers.{layer}.self_attn.{projection}"
            modules[path] = Factors(a.astype(np.float32), b.astype(np.float32))
    return Adapter(Modules(modules), BaseId(name))


@pytest.fixture
def shelf(tmp_path: Path, base: Path) -> Shelf:
    """Two slots: mend, with a prompt, and talk, without."""
    made = Shelf.create(tmp_path / "a.shelf", new_settings(2, policy="kmerge"))
    details = {"prompt": PROMPT, "max_new_tokens": 20}
    made.commit(plan_add(made.snapshot(), adapter(1, str(base)), "mend", details=details))
    made.commit(plan_add(made.snapshot(), adapter(2, str(base)), "talk"))
    return made


def transformers_own(base: Path, folder: Path, prompt: str, text: str, count: int) -> str:
    """The greedy answer of transformers' generate with PEFT's adapter, without anything of ours."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
    chat = [{"role": "user", "content": f"{prompt}\n\n{text}"}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    rendered = whole[whole.index("<|im_start|>user") :]  # without the system turn that SmolLM2's template adds
    ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count
        )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()


# Python ---------------------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_the_tasks_slot_in_peft(shelf: Shelf, tiny: HFBackend, base: Path) -> None:
    snapshot = shelf.snapshot()
    answers = {task: answer(tiny, snapshot, task, TEXT, prompt=PROMPT) for task in ("mend", "talk")}
    for slot in snapshot.manifest.slots:
        (task,) = slot.members
        count = 20 if task == "mend" else 64
        assert answers[task] == transformers_own(base, snapshot.slot_path(slot), PROMPT, TEXT, count)
    assert answers["mend"] != answers["talk"][: len(answers["mend"])]  # else the check above could not fail


def test_the_pieces_make_the_whole(shelf: Shelf, tiny: HFBackend) -> None:
    texts = [TEXT, "a", "other words", "?!"]
    whole = tiny.answers(shelf.snapshot().stored(shelf.snapshot().manifest.slot(0)), PROMPT, texts, max_new_tokens=20)
    assert ["".join(stream(tiny, shelf.snapshot(), "mend", text)) for text in texts] == whole


def test_answers_are_greedy_whatever_penalties_the_base_comes_with(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "base")
    texts = [TEXT, "a", "other words"]
    plain = HFBackend.open(str(folder), dtype="f32").answers(None, PROMPT, texts, max_new_tokens=30)
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": 1, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}'
    )
    backend = HFBackend.open(str(folder), dtype="f32")
    assert backend.answers(None, PROMPT, texts, max_new_tokens=30) == plain
    assert ["".join(backend.stream(None, PROMPT, text, max_new_tokens=30)) for text in texts] == plain


def test_an_adapter_whose_values_overflow_is_an_error_not_an_empty_answer(base: Path) -> None:
    half, huge = HFBackend.open(str(base), dtype="f16"), adapter(3, size=6e4)
    with pytest.raises(ModelError, match="no finite logits"):
        half.answers(huge, PROMPT, [TEXT, TEXT], max_new_tokens=4)
    with pytest.raises(ModelError, match="no finite logits"):
        list(half.stream(huge, PROMPT, TEXT, max_new_tokens=4))


def test_pieces_come_as_the_model_writes(shelf: Shelf, tiny: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def tokens(*_: Any) -> Iterator[int]:
        for token in tiny.text.encoded("ab c"):
            written.append(token)
            yield token

    monkeypatch.setattr(tiny, "_one_by_one", tokens)
    pieces = stream(tiny, shelf.snapshot(), "mend", TEXT)
    assert written == []
    assert [(piece, len(written)) for piece in pieces] == [("a", 1), ("b", 2), (" c", 4)]


def test_a_stream_keeps_its_adapter_while_others_ask(shelf: Shelf, tiny: HFBackend) -> None:
    snapshot = shelf.snapshot()
    alone = answer(tiny, snapshot, "mend", TEXT)
    slow, pieces = stream(tiny, snapshot, "mend", TEXT), []
    for piece in slow:
        pieces.append(piece)
        answer(tiny, snapshot, "talk", "x", prompt="Say:", max_new_tokens=2)
    assert "".join(pieces) == alone


def test_prompt_and_length_come_from_the_manifest_unless_given(shelf: Shelf, tiny: HFBackend) -> None:
    stored = service(shelf.snapshot(), "mend")
    assert (stored.instruction, stored.max_new_tokens, stored.slot) == (PROMPT, 20, 0)
    given = service(shelf.snapshot(), "mend", prompt="Other:", max_new_tokens=3)
    assert (given.instruction, given.max_new_tokens) == ("Other:", 3)
    assert service(shelf.snapshot(), "talk", prompt="x").max_new_tokens == 64
    texts = {answer(tiny, shelf.snapshot(), "mend", TEXT, prompt=prompt) for prompt in (None, PROMPT, "Other:")}
    assert len(texts) == 2
    assert len(answer(tiny, shelf.snapshot(), "mend", TEXT, max_new_tokens=3)) <= 3  # its tokens are letters


@pytest.mark.parametrize(
    ("task", "options", "error", "said"),
    [
        ("mned", {}, UnknownName, "did you mean 'mend'"),
        ("talk", {}, UsageError, "--prompt"),
        ("mend", {"text": " \n"}, UsageError, "the text is empty"),
        ("mend", {"text": "\udcff"}, UsageError, "not Unicode"),
        ("mend", {"prompt": ""}, UsageError, "the prompt is empty"),
        ("mend", {"max_new_tokens": 0}, UsageError, "1 or more"),
        ("mend", {"text": "long " * 100}, ModelError, "too long"),
    ],
)
def test_refusals_come_before_the_first_piece(
    shelf: Shelf, tiny: HFBackend, task: str, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        stream(tiny, shelf.snapshot(), task, **{"text": TEXT, **options})


def test_the_context_ends_an_answer(shelf: Shelf, tiny: HFBackend) -> None:
    query = len(tiny.text.encoded(tiny.base.template.query(PROMPT, "")))
    text = "y" * (CONTEXT - query - 3)
    assert 0 < len(answer(tiny, shelf.snapshot(), "mend", text)) <= 3


def test_another_name_of_the_base_is_warned_of_another_size_refused(
    shelf: Shelf, tiny: HFBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answer(tiny, shelf.snapshot(), "mend", TEXT, max_new_tokens=1)
    assert caplog.text == ""
    other = Shelf.create(tmp_path / "b.shelf", new_settings(2))
    other.commit(plan_add(other.snapshot(), adapter(1, NAME), "mend", details={"prompt": PROMPT}))
    answer(tiny, other.snapshot(), "mend", TEXT, max_new_tokens=1)
    assert NAME in caplog.text
    assert tiny.name in caplog.text
    wide = HFBackend.open(str(tiny_base(tmp_path / "gpt2", "gpt2", context=CONTEXT)))
    with pytest.raises(ShapeMismatch, match=r"q_proj in .* 0-1: the base has no linear layer of this name"):
        answer(wide, other.snapshot(), "mend", TEXT)


def test_a_declared_name_of_the_base_is_not_warned_of(
    tiny: HFBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = Shelf.create(tmp_path / "c.shelf", new_settings(2, base_aliases=(tiny.name,)))
    shelf.commit(plan_add(shelf.snapshot(), adapter(1, NAME), "mend", details={"prompt": PROMPT}))
    answer(tiny, shelf.snapshot(), "mend", TEXT, max_new_tokens=1)
    assert caplog.text == ""


# letters --------------------------------------------------------------------------------------------------------------


def pieces_of(backend: HFBackend, text: str) -> list[str]:
    """What a stream would show of an answer of these tokens."""
    return list(backend.text.pieces(backend.text.encoded(text)))


@pytest.mark.parametrize(
    "text",
    [
        "根から採れる粘液を加える。",
        "I 👩‍👩‍👧‍👦 like 🦙🪿 a lot",
        "naïve — “quoted”\n\n  indented\tline",
        "한국어 문장입니다",
        "x\ufffd y \ufffd",
    ],
)
def test_letters_of_several_tokens_come_whole(tiny: HFBackend, text: str) -> None:
    tokens = tiny.text.encoded(text)  # a token is a byte
    pieces = pieces_of(tiny, text)
    assert "".join(pieces) == tiny.text.decoded(tokens) == text
    assert len(pieces) > 2
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert any("\ufffd" in tiny.text.decoded([token]) for token in tokens)


def test_bytes_that_never_become_a_letter_are_shown_at_the_end(tiny: HFBackend) -> None:
    half = tiny.text.encoded("🦙")[:-1]
    assert list(tiny.text.pieces([*tiny.text.encoded("so"), *half])) == ["s", "o", tiny.text.decoded(half)]


def test_white_space_at_the_ends_is_no_part_of_an_answer(tiny: HFBackend) -> None:
    assert pieces_of(tiny, "  \n a b \n") == ["a", " b"]
    assert pieces_of(tiny, " \n ") == []


# the command line -----------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], base: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("generate", …) → (exit code, stdout, stderr), with the tiny base."""
    monkeypatch.setattr("lorashelf.cli.base.PATIENCE", 600.0)  # slow machines would say what they wait for

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["generate", *map(str, words), "--base", str(base), "--model-dtype", "f32"])
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return call


def test_the_answer_goes_to_stdout_and_nothing_else(shelf: Shelf, tiny: HFBackend, run: Run) -> None:
    expected = answer(tiny, shelf.snapshot(), "mend", TEXT)
    assert run(shelf.path, "mend", TEXT) == (0, expected + "\n", "")


def test_json_is_one_document(shelf: Shelf, tiny: HFBackend, run: Run) -> None:
    code, out, _ = run(shelf.path, "talk", TEXT, "--prompt", PROMPT, "--max-new-tokens", 5, "--json")
    expected = answer(tiny, shelf.snapshot(), "talk", TEXT, prompt=PROMPT, max_new_tokens=5)
    document = json.loads(out)
    assert (code, document["task"], document["slot"], document["text"]) == (0, "talk", 1, expected)
    assert document["base"] == tiny.name


def test_the_text_may_come_from_standard_input(
    shelf: Shelf, tiny: HFBackend, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode() + b"\n")))
    assert run(shelf.path, "mend")[1] == answer(tiny, shelf.snapshot(), "mend", TEXT) + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    code, _, error = run(shelf.path, "mend")
    assert (code, "UTF-8" in error) == (2, True)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("talk", TEXT), 2, "add --task-file"),
        (("mned", TEXT), 2, "did you mean 'mend'"),
        ((), 2, "mend, talk"),
        (("mend", ""), 2, "empty"),
        (("mend", TEXT, "--max-new-tokens", 0), 2, "1 or more"),
        (("mend", TEXT, "--device", "tpu"), 2, "cpu"),
    ],
)
def test_errors_have_the_contracts_codes(shelf: Shelf, run: Run, words: tuple[Any, ...], code: int, said: str) -> None:
    got, out, error = run(shelf.path, *words)
    assert (got, out) == (code, "")
    assert said in error


def test_a_missing_base_model_is_5(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["generate", str(shelf.path), "mend", TEXT, "--base", "no/such/model"])
    assert end.value.code == 5
    assert "no/such/model" in capsys.readouterr().err


def test_add_stores_each_tasks_own_file(
    tmp_path: Path, base: Path, tiny: HFBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, task in enumerate(("one", "two", "three")):
        write_adapter(adapter(i, str(base)), tmp_path / "zoo" / task)
    for task, text in (("one", "First:"), ("two", "Second:")):
        (tmp_path / "tasks" / task).mkdir(parents=True)
        (tmp_path / "tasks" / task / "task.toml").write_text(f'prompt = "{text}"\nmax_new_tokens = 7\n')
    shelf = Shelf.create(tmp_path / "d.shelf", new_settings(3, policy="kmerge"))
    folders = [str(tmp_path / "zoo" / task) for task in ("one", "two", "three")]
    with pytest.raises(SystemExit) as end:
        main(["add", str(shelf.path), *folders, "--task-file", str(tmp_path / "tasks"), "--json"])
    assert not end.value.code
    capsys.readouterr()
    services = {task: service(shelf.snapshot(), task) for task in ("one", "two")}
    assert {task: s.instruction for task, s in services.items()} == {"one": "First:", "two": "Second:"}
    with pytest.raises(UsageError, match="no prompt"):
        service(shelf.snapshot(), "three")


def endless(shelf: Shelf, base: Path) -> subprocess.Popen[bytes]:
    """The command in a process of its own, with a model that writes without an end; one byte of it is read."""
    code = (
        "import itertools, signal, time, lorashelf.models.hf as hf, lorashelf.cli.base as base\n"
        "base.PATIENCE = 600.0\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background has it ignored
        "hf.HFBackend._one_by_one = lambda *a: (time.sleep(0.02) or 65 for _ in itertools.count())\n"
        "from lorashelf.cli import main\n"
        "main()\n"
    )
    words = [sys.executable, "-c", code, "generate", shelf.path, "mend", TEXT, "--base", base]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert len(process.stdout.read(1)) == 1  # it streams
    return process


def test_a_reader_that_goes_away_is_no_fault(shelf: Shelf, base: Path) -> None:
    with endless(shelf, base) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_ctrl_c_ends_an_answer_with_130(shelf: Shelf, base: Path) -> None:
    process = endless(shelf, base)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate()
    assert process.returncode == 130
    assert b"\n" not in out
    assert b"interrupted" in error
    assert b"Traceback" not in error


# the real model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["qa-ja", "gec-de"])
def test_smollm2_answers_as_transformers_with_peft(task: str, tmp_path: Path, smollm2: HFBackend) -> None:
    from lorashelf import read_adapter
    from lorashelf.tasks.folders import read_task

    chosen = read_task(FEWSHOT / task)
    shelf = Shelf.create(tmp_path / "e.shelf", new_settings(1))
    details = {"prompt": chosen.prompt, "max_new_tokens": 24}
    shelf.commit(plan_add(shelf.snapshot(), read_adapter(ZOO / task), task, details=details))
    text = chosen.splits["validation"][0].input
    pieces = list(stream(smollm2, shelf.snapshot(), task, text))
    folder = Path(smollm2.base.tokenizer.name_or_path)  # the GGUF file, dequantised
    assert "".join(pieces) == transformers_own(folder, ZOO / task, chosen.prompt, text, 24)
    assert len(pieces) > 1
