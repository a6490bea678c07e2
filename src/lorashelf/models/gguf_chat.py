"""The chat template of a GGUF file, rendered as transformers renders it, without transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from ..errors import MissingExtra
from ..formats.gguf.header import Header

_TEMPLATE = "tokenizer.chat_template"
_MARK = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")  # transformers' tags around what is trained on


class GgufChat:
    """What `template_of` asks of a tokenizer, from the header of a base."""

    def __init__(self, header: Header, name: str) -> None:
        """Raise MissingExtra if the base has a chat template, and Jinja is not installed."""
        fields = header.fields
        self.name_or_path = name
        self.bos_token, self.eos_token = (_special(fields, kind) for kind in ("bos", "eos"))
        named = {each: fields[f"{_TEMPLATE}.{each}"] for each in fields.get(f"{_TEMPLATE}s", ())}
        default = fields.get(_TEMPLATE)
        self.chat_template = {"default": default, **named} if named and default else named or default
        """The text of the template; name → text if there are several."""
        self._environment: Any = _environment() if self.chat_template else None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **arguments: Any,
    ) -> str:
        """Return the text of a conversation; `chat_template` names one of several. Raises what the template raises."""
        texts = self.chat_template
        text = texts[chat_template or "default"] if isinstance(texts, dict) else texts or ""
        text = _MARK.sub(lambda mark: mark[1] + ("endif" if mark[2] else "if true") + mark[3], text)
        special = {"bos_token": self.bos_token or "", "eos_token": self.eos_token or ""}
        template = self._environment.from_string(text)
        rendered: str = template.render(
            messages=messages, add_generation_prompt=add_generation_prompt, **special, **arguments
        )
        return rendered


def _special(fields: Mapping[str, Any], kind: str) -> str | None:
    """Return the text of a special token; None if the base has none."""
    number = fields.get(f"tokenizer.ggml.{kind}_token_id")
    tokens = fields.get("tokenizer.ggml.tokens", ())
    return None if number is None or number >= len(tokens) else str(tokens[number])


def _environment() -> Any:
    """Return Jinja with what chat templates use besides its own. Raises MissingExtra."""
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingExtra("a chat template", "jinja2", "gguf") from error

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    made.filters["tojson"] = _json
    made.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return made


def _json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
