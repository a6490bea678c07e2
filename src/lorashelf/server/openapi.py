"""The OpenAPI document of the server's routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..version import VERSION
from .schema import Schema

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": "null"},
                "code": {"type": "string"},
                "nearest": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_USAGE = {
    "type": "object",
    "properties": {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
}
_ABOUT = {
    "type": "object",
    "description": "The task and slot that answered; the base has none. `auto`: how sure the choice of the task is.",
    "properties": {"task": {"type": "string"}, "slot": {"type": ["integer", "null"]}, "auto": {"type": "object"}},
    "required": ["task", "slot"],
}
_MODEL = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "lorashelf": {"type": "object"},
    },
    "required": ["id", "object", "created", "owned_by"],
}
_MODELS = {
    "type": "object",
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
    "required": ["object", "data"],
}
_REFUSED = {
    "400": "The request does not fit its schema, or the prompt does not fit the model's context",
    "401": "The key is missing or wrong",
    "403": "Without a key: the Host header does not name this machine",
    "404": "Unknown model; `nearest` has the closest names",
    "405": "The route does not take this method",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is not application/json",
    "429": "Too many requests wait; Retry-After has seconds",
    "500": "A bug, or the model failed",
    "503": "The shelf is damaged, memory ran out, or the server is shutting down",
    "504": "The answer was not finished in time",
}
_OF_EVERYBODY = ("401", "403", "405", "500")


def openapi(chat: Schema, text: Schema, task: str, *, secured: bool) -> dict[str, Any]:
    """Return the document; `chat` and `text` are the schemas of the requests, `task` is in their examples."""
    hello = {"model": task, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    described = {
        "/v1/models": {"get": _operation("List the models: a task is a model id", _json(_MODELS))},
        "/v1/models/{model}": {
            "get": {
                **_operation("Describe a model", _json(_MODEL), "404"),
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
            }
        },
        "/v1/chat/completions": {"post": _completion("Answer a chat", chat, hello, "chat.completion", "message")},
        "/v1/completions": {
            "post": _completion(
                "Continue a text", text, {"model": task, "prompt": "Hello", "max_tokens": 8}, "text_completion", "text"
            )
        },
        "/healthz": {"get": _operation("Whether the model's thread runs", _flag("alive"), "503", error=_flag("alive"))},
        "/readyz": {"get": _operation("Whether the shelf can be served", _flag("ready"), "503", error=_flag("ready"))},
        "/metrics": {
            "get": _operation("Prometheus' metrics", {"content": {"text/plain": {"schema": {"type": "string"}}}})
        },
        "/openapi.json": {"get": _operation("This document", _json({"type": "object"}))},
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "lorashelf", "version": VERSION, "description": "OpenAI's API over a shelf of adapters."},
        "paths": described,
    }
    if secured:
        document["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        document["security"] = [{"key": []}]
        for path in ("/healthz", "/readyz"):
            described[path]["get"]["security"] = []
    return document


def _completion(summary: str, schema: Schema, example: Mapping[str, Any], kind: str, content: str) -> dict[str, Any]:
    choice = {
        "type": "object",
        "properties": {
            "index": {"type": "integer"},
            "finish_reason": {"enum": ["stop", "length"]},
            "logprobs": {"type": ["object", "null"]},
            content: {"type": "object" if content == "message" else "string"},
        },
        "required": ["index", "finish_reason", "logprobs", content],
    }
    answer = {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": choice},
            "usage": _USAGE,
            "lorashelf": _ABOUT,
        },
        "required": ["id", "object", "created", "model", "choices", "usage", "lorashelf"],
    }
    found = _json(answer)
    found["content"]["text/event-stream"] = {}
    refused = [status for status in _REFUSED if status not in _OF_EVERYBODY]
    body = {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}
    return {**_operation(summary, found, *refused), "requestBody": body}


def _operation(
    summary: str, found: Mapping[str, Any], *refused: str, error: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return an operation with its successful response and the statuses of refusals."""
    responses: dict[str, Any] = {"200": {"description": "Found", **found}}
    for status in sorted({*_OF_EVERYBODY, *refused}):
        content = error if error is not None and status in refused else _json(_ERROR)
        responses[status] = {"description": _REFUSED[status], **content}
    return {"summary": summary, "responses": responses}


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _flag(name: str) -> dict[str, Any]:
    return _json({"type": "object", "properties": {name: {"type": "boolean"}}, "required": [name]})
