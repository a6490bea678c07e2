"""Errors as OpenAI's clients read them: a status, and a document with message, type, param and code."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from ..errors import (
    AdapterError,
    Busy,
    DiskError,
    LorashelfError,
    OutOfMemory,
    ShelfError,
    TimedOut,
    TooLong,
    UnknownName,
    UsageError,
)

_STATUS: tuple[tuple[type[LorashelfError], int], ...] = (
    (UnknownName, 404),
    (UsageError, 400),
    (TooLong, 400),
    (Busy, 429),
    (TimedOut, 504),
    (OutOfMemory, 503),
    (ShelfError, 503),
    (DiskError, 503),
    (AdapterError, 503),
)
_CODES = {"unknown_name": "model_not_found", "too_long": "context_length_exceeded"}
_logger = logging.getLogger("lorashelf")


def status_of(error: LorashelfError) -> int:
    """Return the status of an answer that is this error."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def document(message: str, status: int, code: str, **more: Any) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code, **more}}


def error_document(error: LorashelfError, status: int | None = None) -> dict[str, Any]:
    """Return the document of an error. Faults of the shelf are logged whole; the client is not told of files."""
    status, code = status or status_of(error), _CODES.get(error.kind, error.kind)
    if status >= 500 and not isinstance(error, Busy):
        _logger.error("%s", error)
        return document(error.what, status, code)
    more = {"nearest": error.nearest} if isinstance(error, UnknownName) else {}
    return document("; ".join(part for part in (error.what, error.cure) if part), status, code, **more)


def error_response(
    error: LorashelfError, status: int | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return the response that is an error."""
    return JSONResponse(error_document(error, status), status or status_of(error), headers=headers)
