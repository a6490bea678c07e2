"""The chat template of a GGUF file is rendered as transformers renders it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import chat_templates
from lorashelf.errors import ModelError, UnknownName
from lorashelf.formats.gguf.header import Header, read_header
from lorashelf.models.base_model import EMBEDDED, located
from lorashelf.models.chat_template import template_of
from lorashelf.models.gguf_chat import GgufChat
from tiny_base import tokenizer

TEMPLATES = {name: text for name, text in vars(chat_templates).items() if name.isupper()}
GENERATION = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{%- generation -%}"
    "{{ m.content | tojson }}<|im_end|>{%- endgeneration -%}"
    "{%- else -%}{%- if loop.index > 9 -%}{%- break -%}{%- endif -%}<|im_start|>{{ m.content }}\n{%- endif -%}"
    "{%- endfor -%}{{ bos_token }}"
)
TURNS = [{"role": "user", "content": "é ⟨query⟩\n"}, {"role": "assistant", "content": 'an "answer"'}]


def chat_of(template: Any, **fields: Any) -> GgufChat:
    made = tokenizer(True)
    tokens = made.convert_ids_to_tokens(range(len(made)))
    special = {"bos": made.bos_token_id, "eos": made.eos_token_id}
    numbers = {f"tokenizer.ggml.{kind}_token_id": number for kind, number in special.items()}
    named = template if isinstance(template, dict) else {"default": template}
    texts = {f"tokenizer.chat_template.{name}": text for name, text in named.items() if name != "default"}
    texts |= {"tokenizer.chat_templates": [name for name in named if name != "default"]}
    texts |= {"tokenizer.chat_template": named["default"]} if "default" in named else {}
    return GgufChat(Header(Path("x"), {"tokenizer.ggml.tokens": tokens, **numbers, **texts, **fields}, {}), "x")


def spelled(tokenizer: Any) -> Any:
    """The template and its id, or why there is none."""
    try:
        found = template_of(tokenizer)
        return found, found.id, found.difference
    except ModelError as error:
        return error.what


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_has_the_rendering_that_transformers_gives_it(name: str) -> None:
    theirs = tokenizer(True)
    theirs.chat_template = TEMPLATES[name]
    ours = chat_of(TEMPLATES[name])
    for turns in (TURNS[:1], TURNS):
        for ask in (True, False):
            options = {"tokenize": False, "add_generation_prompt": ask}
            assert ours.apply_chat_template(turns, **options) == theirs.apply_chat_template(turns, **options)
    assert spelled(ours) == spelled(theirs)


def test_transformers_additions_to_jinja_are_known() -> None:
    theirs = tokenizer(True)
    theirs.chat_template = GENERATION
    assert chat_of(GENERATION).apply_chat_template(TURNS) == theirs.apply_chat_template(TURNS, tokenize=False)


def test_a_named_template_is_chosen_by_its_name() -> None:
    named = {"default": chat_templates.CHATML, "rag": chat_templates.GEMMA}
    assert template_of(chat_of(named)).between == "<|im_end|>\n<|im_start|>assistant\n"
    assert "start_of_turn" in template_of(chat_of(named), {"chat_template": "rag"}).between
    with pytest.raises(UnknownName, match="unknown chat template 'tool'"):
        template_of(chat_of(named), {"chat_template": "tool"})


def test_a_template_that_refuses_is_an_error_of_the_model() -> None:
    with pytest.raises(ModelError, match="no roles here"):
        template_of(chat_of("{{ raise_exception('no roles here') }}"))


def test_the_packaged_base_has_the_prompt_that_transformers_gives_it(smollm2: Any) -> None:
    path = located(EMBEDDED)
    assert path is not None
    assert template_of(GgufChat(read_header(path), EMBEDDED)) == smollm2.template
