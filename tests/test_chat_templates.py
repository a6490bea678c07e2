"""Renderings held against transformers' own apply_chat_template, with the templates of published families."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import chat_templates as chat
from lorashelf.cli import main
from lorashelf.errors import ModelError, UnknownName, UsageError
from lorashelf.models.base_model import open_base
from lorashelf.models.chat_template import template_of
from lorashelf.models.hf import HFBackend
from tiny_base import tiny_base, tokenizer

CHATML = ("<|im_start|>user\nI\n\nx<|im_end|>\n<|im_start|>assistant\n", "y<|im_end|>")
LLAMA_3 = (
    "<s><|start_header_id|>user<|end_header_id|>\n\nI\n\nx<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "y<|eot_id|>",
)
GEMMA = ("<s><start_of_turn>user\nI\n\nx<end_of_turn>\n<start_of_turn>model\n", "y<end_of_turn>")
COMMAND_R = (
    "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>I\n\nx<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "y<|END_OF_TURN_TOKEN|>",
)
THOUGHT = ("<|im_start|>user\nI\n\nx<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "y<|im_end|>")
EXACT: dict[str, tuple[Any, dict[str, Any], tuple[str, str]]] = {  # template, arguments, the wanted query and answer
    "ChatML": (chat.CHATML, {}, CHATML),
    "SmolLM2": (chat.SMOLLM2, {}, CHATML),
    "Qwen2.5": (chat.QWEN2_5, {}, CHATML),
    "Qwen3, not thinking": (chat.QWEN3, {"enable_thinking": False}, THOUGHT),
    "Llama 2": (chat.LLAMA_2, {}, ("<s>[INST] I\n\nx [/INST]", " y </s>")),
    "Llama 3": (chat.LLAMA_3, {}, LLAMA_3),
    "Llama 3.2": (chat.LLAMA_3_2, {}, LLAMA_3),
    "Mistral v3": (chat.MISTRAL_V3, {}, ("<s>[INST] I\n\nx[/INST]", " y</s>")),
    "Gemma": (chat.GEMMA, {}, GEMMA),
    "Gemma 3": (chat.GEMMA_3, {}, GEMMA),
    "Zephyr": (chat.ZEPHYR, {}, ("<|user|>\nI\n\nx</s>\n<|assistant|>\n", "y</s>")),
    "Tulu": (chat.TULU, {}, ("<s><|user|>\nI\n\nx\n<|assistant|>\n", "y</s>")),
    "DeepSeek Coder": (chat.DEEPSEEK_CODER, {}, ("<s>### Instruction:\nI\n\nx\n### Response:\n", "y\n<|EOT|>")),
    "Command-R, default": ({"default": chat.COMMAND_R, "rag": chat.GEMMA}, {}, COMMAND_R),
    "Command-R, by name": ({"plain": chat.COMMAND_R, "rag": chat.GEMMA}, {"chat_template": "plain"}, COMMAND_R),
    "Command-R, the only one": ({"plain": chat.COMMAND_R}, {}, COMMAND_R),
}
DIFFERENT: dict[str, tuple[str, tuple[str, str], str]] = {  # template, query and answer, the difference that is named
    "GLM-4": (chat.GLM_4, ("[gMASK]<sop><|user|>\nI\n\nx<|assistant|>", "\ny</s>"), "+ '</s>'"),
    "Phi-3": (chat.PHI_3, ("<|user|>\nI\n\nx<|end|>\n<|assistant|>\n", "y<|end|>"), r"- '\n</s>'"),
    "Qwen3": (chat.QWEN3, CHATML, r"- '<think>\n\n</think>\n\n'"),
    "R1": (
        chat.R1_DISTILL,
        ("<s><｜User｜>I\n\nx<｜Assistant｜>", "y<｜end▁of▁sentence｜>"),
        r"- '<think>\n'",
    ),
}


def spoken(template: Any) -> Any:
    """A tokenizer with this chat template, `<s>` and `</s>` its BOS and EOS tokens."""
    made = tokenizer(chat=True)
    made.eos_token, made.chat_template = "</s>", template
    return made


def rows(tok: Any, user: str, answer: str, **arguments: Any) -> tuple[str, str]:
    """What transformers renders: the prompt that asks for an answer, and the training row."""
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    asked = tok.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True, **arguments)
    return asked, tok.apply_chat_template(turns, tokenize=False, **arguments)


@pytest.mark.parametrize("family", EXACT)
def test_a_rendering_is_the_prompt_and_the_training_row_of_transformers(family: str) -> None:
    text, arguments, wanted = EXACT[family]
    tok = spoken(text)
    template = template_of(tok, arguments)
    assert (template.query("I", "x"), template.answer("y")) == wanted
    assert template.difference == ""
    for instruction, query, answer in (("I", "x", "y"), (" I", "x \n", " y\n")):
        named = arguments or ({"chat_template": "plain"} if family == "Command-R, the only one" else {})
        asked, row = rows(tok, f"{instruction}\n\n{query}", answer, **named)
        ours = template.query(instruction, query)
        assert asked.replace(template.system, "") == ours
        assert row.replace(template.system, "").rstrip() == (ours + template.answer(answer)).rstrip()


@pytest.mark.parametrize("family", EXACT)
def test_a_conversation_is_the_prompt_of_transformers(family: str) -> None:
    text, arguments, _ = EXACT[family]
    tok = spoken(text)
    template = template_of(tok, arguments)
    turns = [("user", "I\n\nx \n"), ("assistant", " y"), ("user", "z"), ("assistant", "w"), ("user", "v")]
    named = arguments or ({"chat_template": "plain"} if family == "Command-R, the only one" else {})
    messages = [{"role": role, "content": content} for role, content in turns]
    wanted = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **named)
    ours = template.conversation([content for _, content in turns[::2]], [content for _, content in turns[1::2]])
    assert ours == wanted.replace(template.system, "", 1)
    assert template.conversation(["I\n\nx"], []) == template.query("I", "x")


def test_a_template_of_one_turn_refuses_a_conversation() -> None:
    once = chat.CHATML.replace("{% for", "{% if messages|length > 2 %}{{ raise_exception('no') }}{% endif %}{% for", 1)
    for template in (template_of(spoken(once)), template_of(tokenizer(chat=False))):
        assert template.conversation(["a"], [])
        with pytest.raises(UsageError, match="one turn only"):
            template.conversation(["a", "c"], ["b"])


@pytest.mark.parametrize("family", DIFFERENT)
def test_a_rendering_that_is_not_that_of_the_template_names_the_difference(family: str) -> None:
    text, wanted, difference = DIFFERENT[family]
    tok = spoken(text)
    template = template_of(tok)
    assert (template.query("I", "x"), template.answer("y")) == wanted
    assert template.difference == difference
    asked, row = rows(tok, "I\n\nx", "y")
    assert (asked, row.rstrip()) != (wanted[0], "".join(wanted))


@pytest.mark.parametrize("family", [*EXACT, *DIFFERENT])
def test_only_a_system_turn_of_the_template_is_left_out(family: str) -> None:
    text, arguments = EXACT[family][:2] if family in EXACT else (DIFFERENT[family][0], {})
    template = template_of(spoken(text), arguments)
    by_itself = {
        "SmolLM2": "named SmolLM",
        "Qwen2.5": "You are Qwen",
        "Llama 3.2": "Today",
        "DeepSeek Coder": "You are",
    }
    assert (by_itself.get(family, "no system turn") in template.system) == (family in by_itself)
    assert bool(template.system) == (family in by_itself)


def test_a_rendering_that_differs_is_warned_of_with_the_difference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_base(tmp_path / "base", chat_template=chat.QWEN3)
    with caplog.at_level(logging.WARNING, "lorashelf"):
        thinking = open_base(str(base), device="cpu")
        assert r"- '<think>\n\n</think>\n\n'" in caplog.text
        caplog.clear()
        plain = open_base(str(base), device="cpu", template_arguments={"enable_thinking": False})
        assert caplog.text == ""
    assert thinking.template.id != plain.template.id


def test_arguments_are_in_the_prompt_id_also_where_the_text_is_the_same() -> None:
    tok = spoken(chat.LLAMA_3_2)
    ids = {template_of(tok, {"date_string": day}).id for day in ("26 Jul 2024", "27 Jul 2024")}
    assert len({*ids, template_of(tok).id}) == 3


def test_white_space_before_an_answer_is_written_by_the_model_and_is_not_shown(tmp_path: Path) -> None:
    backend = HFBackend(open_base(str(tiny_base(tmp_path / "base", chat_template=chat.GLM_4)), device="cpu"))
    row = backend.text.encoded("\nan answer")
    assert backend.text.decoded(row) == "an answer"
    assert "".join(backend.text.pieces(row)) == "an answer"


@pytest.mark.parametrize(
    ("template", "arguments", "error", "said"),
    [
        ("{{ raise_exception('no such turns') }}", {}, ModelError, "no such turns"),
        ("{{ undefined.name }}", {}, ModelError, "undefined"),
        ("{% if %}", {}, ModelError, "TemplateSyntaxError"),
        ("the same for all", {}, ModelError, "does not render the turns"),
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", {}, ModelError, "2⟨query⟩"),
        ({"tools": chat.GEMMA, "rag": chat.CHATML}, {}, UsageError, "--template-arg chat_template=rag"),
        ({"tools": chat.GEMMA, "rag": chat.CHATML}, {"chat_template": "rga"}, UnknownName, "'rag'"),
        (chat.GEMMA, {"chat_template": "rag"}, UsageError, "one chat template"),
        (chat.QWEN3, {"enable_thinkng": False}, UsageError, "enable_thinkng"),
        (chat.QWEN3, {"messages": []}, UsageError, "messages"),
        (chat.QWEN3, {"add_generation_prompt": True}, UsageError, "add_generation_prompt"),
        (None, {"enable_thinking": False}, UsageError, "no chat template"),
    ],
)
def test_what_a_template_cannot_do_is_an_error(
    template: Any, arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as caught:
        template_of(spoken(template), arguments)
    assert said in str(caught.value)


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Callable[..., Ended]:
    """A command in this process; the log goes to stderr, as it does without pytest."""

    def call(*words: str) -> Ended:
        caplog.clear()
        with pytest.raises(SystemExit) as end:
            main([*words])
        printed = capsys.readouterr()
        return Ended(int(end.value.code or 0), printed.out, printed.err + caplog.text)

    return call


def test_the_commands_take_arguments_and_losses_under_others_are_not_mixed(
    tmp_path: Path, run: Callable[..., Ended]
) -> None:
    base, data = tiny_base(tmp_path / "base", chat_template=chat.QWEN3), tmp_path / "mend-en"
    data.mkdir()
    (data / "task.toml").write_text('prompt = "Mend:"\n')
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text('{"input": "a text", "output": "an answer"}\n')
    common = ("--base", str(base), "--device", "cpu", "--json")
    argument = ("--template-arg", "enable_thinking=false")
    out = ("-o", str(tmp_path / "out"))
    first, again = (run("eval", "--data", str(data), *common, *out, *more) for more in ((), argument))
    assert (first.returncode, again.returncode) == (0, 0), again.stderr
    assert "<think>" in first.stderr
    assert "<think>" not in again.stderr
    thinking, plain = json.loads(first.stdout), json.loads(again.stdout)
    assert thinking["prompt"] != plain["prompt"]
    assert thinking["tasks"]["mend-en"]["loss"] != plain["tasks"]["mend-en"]["loss"]

    train = ("train", str(data), "-o", str(tmp_path / "made"), "--steps", "1", *common)
    done = run(*train, *argument)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"]["mend-en"]["settings"]["prompt"] == plain["prompt"]
    other = run(*train)
    assert other.returncode == 2
    assert plain["prompt"] in other.stderr

    shelf = str(tmp_path / "s.shelf")
    assert run("init", shelf, "--slots", "1").returncode == 0
    assert run("add", shelf, str(tmp_path / "made" / "mend-en"), "--task-file", str(data)).returncode == 0
    told = run("generate", shelf, "mend-en", "a text", *common, *argument, "--max-new-tokens", "2")
    assert told.returncode == 0, told.stderr
    assert "<think>" not in told.stderr
    adapter = f"mend-en={tmp_path / 'made' / 'mend-en'}"
    searched = run(
        *("cluster", adapter, "-o", str(tmp_path / "d.shelf"), "--slots", "1", "--method", "d2c"),
        *("--examples", str(data), *common, *argument),
    )
    assert searched.returncode == 0, searched.stderr
    wrong = run("generate", shelf, "mend-en", "a text", *common, "--template-arg", "enable_thinking")
    assert wrong.returncode == 2
    assert "NAME=VALUE" in wrong.stderr


def test_the_system_turn_that_is_left_out_is_said_where_losses_are_made(
    tmp_path: Path, run: Callable[..., Ended]
) -> None:
    base, data = tiny_base(tmp_path / "base", chat_template=chat.SMOLLM2), tmp_path / "mend-en"
    data.mkdir()
    (data / "task.toml").write_text('prompt = "Mend:"\n')
    (data / "validation.jsonl").write_text('{"input": "a text", "output": "an answer"}\n')
    measured = run("eval", "--data", str(data), "--base", str(base), "--device", "cpu", "--json")
    assert measured.returncode == 0
    assert "You are a helpful AI assistant named SmolLM" in measured.stderr
