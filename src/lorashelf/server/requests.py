"""What clients ask: the bodies of OpenAI's chat and text completions, checked against their schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import UsageError
from ..models.sampling import Sampling
from ..tasks.template import Template
from .schema import Schema, faults

AUTO = "auto"  # the model id that routes by the text
BASE = "base"  # the model id of the bare base; a task of such a name comes first
MOST_ALTERNATIVES = 20
_IGNORED = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key")
_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART, "minItems": 1}]},
        "name": {"type": ["string", "null"], "description": "Ignored."},
    },
    "required": ["role", "content"],
    "additionalProperties": False,
}


def _shared(most_tokens: int) -> dict[str, Any]:
    """Return the fields of both kinds of requests."""
    tokens = {"type": ["integer", "null"], "minimum": 1, "maximum": most_tokens}
    return {
        "model": {"type": "string", "minLength": 1, "description": f"A task on the shelf, {BASE!r} or {AUTO!r}."},
        "max_tokens": {**tokens, "description": "Default: the task's stored number, else 64."},
        "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2, "description": "Default: 0, greedy."},
        "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1, "description": "Default: 1."},
        "seed": {"type": ["integer", "null"], "minimum": -(2**63), "maximum": 2**63 - 1},
        "stop": {
            "anyOf": [
                {"type": "null"},
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 4},
            ]
        },
        "stream": {"type": ["boolean", "null"]},
        "stream_options": {
            "type": ["object", "null"],
            "properties": {"include_usage": {"type": ["boolean", "null"]}},
            "additionalProperties": False,
        },
        "n": {"enum": [1, None]},
        "frequency_penalty": {"enum": [0, None]},
        "presence_penalty": {"enum": [0, None]},
        **{name: {"description": "Ignored."} for name in _IGNORED},
    }


def chat_schema(most_tokens: int) -> Schema:
    """Return the schema of a chat completion request."""
    shared = _shared(most_tokens)
    return {
        "type": "object",
        "properties": {
            **shared,
            "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
            "max_completion_tokens": shared["max_tokens"],
            "logprobs": {"type": ["boolean", "null"]},
            "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": MOST_ALTERNATIVES},
            "response_format": {
                "type": ["object", "null"],
                "properties": {"type": {"enum": ["text"]}},
                "required": ["type"],
                "additionalProperties": False,
            },
        },
        "required": ["model", "messages"],
        "additionalProperties": False,
    }


def text_schema(most_tokens: int) -> Schema:
    """Return the schema of a text completion request."""
    return {
        "type": "object",
        "properties": {
            **_shared(most_tokens),
            "prompt": {"type": "string", "minLength": 1, "description": "Read as it is, without a template."},
            "logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": MOST_ALTERNATIVES},
            "echo": {"enum": [False, None]},
            "best_of": {"enum": [1, None]},
            "suffix": {"type": "null"},
        },
        "required": ["model", "prompt"],
        "additionalProperties": False,
    }


@dataclass(frozen=True, slots=True)
class Asked:
    """A checked request. `messages` are (role, text) of a chat; a text completion has its `prompt` instead."""

    model: str
    messages: Sequence[tuple[str, str]]
    prompt: str | None
    most: int | None
    sampling: Sampling
    stop: Sequence[str]
    stream: bool
    usage: bool
    """Whether a stream ends with the numbers of tokens."""

    @property
    def text(self) -> str:
        """The text by which a task is chosen: the prompt, or the last user's."""
        return self.messages[-1][1] if self.prompt is None else self.prompt

    def rendered(self, template: Template, stored: str) -> str:
        """Return the prompt of a chat. System and developer messages replace the task's stored instruction.

        Raises UsageError if the template has one turn only and the chat has more.
        """
        instruction = "\n\n".join(text for role, text in self.messages if role not in ("user", "assistant")) or stored
        first, *later = [text for role, text in self.messages if role == "user"]
        answered = [text for role, text in self.messages if role == "assistant"]
        opening = f"{instruction}\n\n{first}" if instruction else first
        return template.conversation([opening, *later], answered)


def parsed(body: bytes) -> Any:
    """Return the JSON value of a body. Raises UsageError."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the body is not JSON: {error}", cure="send a JSON object in UTF-8") from error


def chat(body: Any, schema: Schema) -> Asked:
    """Return a chat completion request. Raises UsageError with every fault."""
    _check(body, schema)
    messages = [(each["role"], _content(each["content"])) for each in body["messages"]]
    roles = [role for role, _ in messages]
    turns = roles[next((i for i, role in enumerate(roles) if role in ("user", "assistant")), len(roles)) :]
    if turns[::2] != ["user"] * len(turns[::2]) or turns[1::2] != ["assistant"] * (len(turns) // 2) or not turns:
        what = f"messages are from {', '.join(roles)}"
        raise UsageError(what, cure="give system messages first, then user and assistant in turn")
    if len(turns) % 2 == 0:
        raise UsageError("the last message is the assistant's", cure="end with a user's message")
    if not messages[-1][1].strip():
        raise UsageError("the last message is empty", cure="give a text")
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise UsageError("top_logprobs is given without logprobs", cure='add "logprobs": true')
    logprobs = (body.get("top_logprobs") or 0) if body.get("logprobs") else None
    return _asked(body, messages, None, most, logprobs)


def text(body: Any, schema: Schema) -> Asked:
    """Return a text completion request. Raises UsageError with every fault."""
    _check(body, schema)
    return _asked(body, (), body["prompt"], body.get("max_tokens"), body.get("logprobs"))


def _asked(
    body: Mapping[str, Any],
    messages: Sequence[tuple[str, str]],
    prompt: str | None,
    most: float | None,
    logprobs: float | None,
) -> Asked:
    temperature, top_p, seed, stop = (body.get(name) for name in ("temperature", "top_p", "seed", "stop"))
    sampling = Sampling(
        0.0 if temperature is None else float(temperature),
        1.0 if top_p is None else float(top_p),
        None if seed is None else int(seed) % 2**64,
        None if logprobs is None else int(logprobs),
    )
    return Asked(
        body["model"],
        messages,
        prompt,
        None if most is None else int(most),
        sampling,
        [stop] if isinstance(stop, str) else stop or (),
        bool(body.get("stream")),
        bool((body.get("stream_options") or {}).get("include_usage")),
    )


def _check(body: Any, schema: Schema) -> None:
    if found := [*faults(body, schema), *(["the body is not Unicode"] if _is_broken(body) else [])]:
        raise UsageError("; ".join(found), cure="see /openapi.json")


def _is_broken(value: Any) -> bool:
    """Return whether a text in a JSON value has half of a surrogate pair, which no encoding has."""
    if isinstance(value, str):
        return any("\ud800" <= c <= "\udfff" for c in value)
    if isinstance(value, dict):
        return any(_is_broken(each) for pair in value.items() for each in pair)
    return isinstance(value, list) and any(map(_is_broken, value))


def _content(content: str | Sequence[Mapping[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
