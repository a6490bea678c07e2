"""An answer as server-sent events, a chunk for each piece of text."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..serving.scheduler import End, Event, Piece
from .problems import error_document
from .running import Running


class Stream(StreamingResponse):
    """The response of a streamed answer. `done` hears the last event; None if the client went away.

    A client that does not read for `seconds` is cut off.
    """

    def __init__(self, running: Running, usage: bool, seconds: float, done: Callable[[Event | None], None]) -> None:
        self._running, self._usage, self._seconds, self._done = running, usage, seconds, done
        self._last: Event | None = None
        super().__init__(self._lines(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; whatever ends it, the model stops working on it."""
        try:
            with anyio.move_on_after(self._seconds):
                await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()
            self._done(self._last)

    async def _lines(self) -> AsyncIterator[str]:
        answer, shown = self._running.prepared.answer, ""
        if (begun := answer.begun()) is not None:
            yield _line(begun)
        async for event in self._running.events():
            if isinstance(event, Piece):
                tokens = [event.token] if event.token is not None else []
                if event.text or (tokens and answer.logprobs):
                    yield _line(answer.piece(event.text, tokens, shown))
                shown += event.text
            elif isinstance(event, End):
                yield _line(answer.ended(event.reason))
                if self._usage:
                    yield _line(answer.counted(event.tokens))
                self._last = event
                yield "data: [DONE]\n\n"
            else:
                self._last = event
                yield _line(error_document(event))


def _line(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"
