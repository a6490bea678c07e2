"""A request that the model works on: events from its thread, heard in the event loop until a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from ..errors import LorashelfError, TimedOut
from ..serving.generate import Service
from ..serving.scheduler import Event, Piece, Request, Scheduler
from .answers import Answer


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can be submitted: who answers, what the model reads, how the answer is written."""

    service: Service
    request: Request
    answer: Answer


class Running:
    """A submitted request. Leaving its block cancels what is not over."""

    def __init__(self, prepared: Prepared, scheduler: Scheduler, deadline: float) -> None:
        """Submit the request. Raises Busy."""
        self.prepared = prepared
        self._deadline = deadline
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._first: Event | None = None
        self.over = False
        """Whether the end was heard."""
        self._ticket = scheduler.submit(prepared.request, self._hear)

    def _hear(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        """End the request."""
        self._ticket.cancel()

    async def begin(self) -> None:
        """Wait for the first event. Raises the error that it is, TimedOut."""
        self._first = await self._next()
        if isinstance(self._first, LorashelfError):
            raise self._first

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events, the first one included, up to the end or an error."""
        event = await self._next() if self._first is None else self._first
        while isinstance(event, Piece):
            yield event
            event = await self._next()
        yield event

    async def _next(self) -> Event:
        try:
            event = await asyncio.wait_for(self._events.get(), max(self._deadline - time.monotonic(), 0))
        except asyncio.TimeoutError:
            self.cancel()
            event = TimedOut("the answer was not finished in time", cure="ask for fewer tokens, or try again later")
        self.over = not isinstance(event, Piece)
        return event
