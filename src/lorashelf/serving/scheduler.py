"""Requests of different tasks on one model: one thread owns it and continues all texts side by side, token by token.

New requests join and cancelled ones leave between two tokens. At most `rows` texts run; beyond them `waiting` wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from ..errors import Busy, LorashelfError, numbered
from ..lora.adapter import Adapter
from ..models.protocol import Continues, Row
from ..models.sampling import Sampler, Sampling, Token
from ..models.tokens import Pieces

ROWS, WAITING = 16, 64
PREFILL = 2048  # positions of the prompts that join at once, padding included, unless one prompt is longer
_logger = logging.getLogger("lorashelf")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A text to continue: the prompt's tokens, the adapter, the most tokens, how they are chosen, where they end."""

    prompt: Sequence[int]
    adapter: Adapter | None
    most: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    trims: bool = True


class Piece(NamedTuple):
    """Text that became final with a token; the token is None if it ends the answer and is not part of it."""

    text: str
    token: Token | None


class End(NamedTuple):
    """The end of an answer: `stop` (its own end, or a text of `stop`) or `length`; the number of its tokens."""

    reason: str
    tokens: int


Event = Piece | End | LorashelfError
Listener = Callable[[Event], None]


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that was accepted; `cancel` ends it before the next token, and nothing more is heard of it."""

    request: Request
    listen: Listener
    row: Row
    pieces: Pieces
    begun: float = 0.0
    cancelled: bool = False

    def cancel(self) -> None:
        """End the request."""
        self.cancelled = True

    def pass_on(self, event: Event) -> None:
        """Pass an event on, unless nobody wants to hear it."""
        if not self.cancelled:
            self.listen(event)
            self.cancelled = not isinstance(event, Piece)


class Scheduler:
    """The thread that owns a model, and the requests that wait for it."""

    def __init__(self, model: Continues, *, rows: int = ROWS, waiting: int = WAITING) -> None:
        self._text, self._batch, self._most_waiting = model.text, model.decoding(rows), waiting
        self._waiting: deque[Ticket] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._running: list[Ticket] = []
        self._wake = threading.Condition()
        self._closed = False
        self._pace = 1.0
        self.steps = {"steps": 0, "rows": 0}
        """Forward passes that continued texts, and the rows in them."""
        self._thread = threading.Thread(target=self._run, name="lorashelf-model", daemon=True)
        self._thread.start()

    @property
    def most_rows(self) -> int:
        """The most texts that are continued side by side."""
        return self._batch.most

    @property
    def alive(self) -> bool:
        """Whether the model's thread runs."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """The texts that are being continued."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """The requests that wait."""
        return sum(not ticket.cancelled for ticket in list(self._waiting))

    @property
    def patience(self) -> int:
        """Seconds after which a refused request may be accepted: those until the waiting ones have a row."""
        return max(1, min(60, round(self._pace * (1 + self.waiting) / self.most_rows)))

    def submit(self, request: Request, listen: Listener) -> Ticket:
        """Accept a request. `listen` is called from the model's thread, and must return at once: with every piece, then
        with the end, or with an error. Raises Busy.
        """
        row = Row(request.prompt, request.adapter, Sampler(request.sampling))
        ticket = Ticket(request, listen, row, Pieces(self._text, request.stop, trims=request.trims))
        with self._wake:
            if self._closed:
                raise _closing()
            if self.waiting >= self._most_waiting:
                what = f"{numbered(self.waiting, 'request')} wait for the model, as many as may"
                raise Busy(what, cure=f"try again in {numbered(self.patience, 'second')}")
            self._waiting.append(ticket)
            self._wake.notify()
        return ticket

    def call(self, work: Callable[[], R]) -> Future[R]:
        """Have the model's thread do some work between two tokens. Raises Busy."""
        future: Future[R] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)

        with self._wake:
            if self._closed:
                raise _closing()
            self._calls.append(run)
            self._wake.notify()
        return future

    def close(self) -> None:
        """Cancel what is left, and end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    # in the model's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._has_work():
            try:
                self._turn()
            except Exception as error:
                if not isinstance(error, LorashelfError):
                    _logger.exception("a bug in the model's thread")
                    error = LorashelfError(f"this is a bug: {type(error).__name__}: {error}", cure="report it")
                for ticket in self._running:
                    ticket.pass_on(error)
                self._stay()
        for ticket in [*self._running, *self._waiting]:
            ticket.pass_on(_closing())
        while self._calls:
            self._calls.popleft()()

    def _has_work(self) -> bool:
        with self._wake:
            while not (self._closed or self._calls or self._waiting or self._running):
                self._wake.wait()
            return not self._closed

    def _turn(self) -> None:
        while self._calls:
            self._calls.popleft()()
        self._stay()
        if newcomers := self._newcomers():
            self._join(newcomers)
            self._stay()
        if self._running:
            tickets = {id(ticket.row): ticket for ticket in self._running}
            self.steps["steps"] += 1
            self.steps["rows"] += len(tickets)
            for row, token in zip(self._batch.rows, self._batch.step(), strict=True):
                self._took(tickets[id(row)], token)
            self._stay()

    def _newcomers(self) -> list[Ticket]:
        """Take the first that wait and have room."""
        found: list[Ticket] = []
        longest = 0
        with self._wake:
            while self._waiting and len(self._running) + len(found) < self._batch.most:
                ticket = self._waiting[0]
                longest = max(longest, len(ticket.request.prompt))
                if found and longest * (len(found) + 1) > PREFILL:
                    break
                self._waiting.popleft()
                if not ticket.cancelled:
                    found.append(ticket)
        return found

    def _join(self, tickets: Sequence[Ticket]) -> None:
        """Read the prompts of new requests together; after an error one by one, so that each has its own."""
        try:
            tokens = self._batch.join([ticket.row for ticket in tickets])
        except LorashelfError as error:
            if len(tickets) == 1:
                tickets[0].pass_on(error)
                return
            for ticket in tickets:
                self._join([ticket])
            return
        self._running += tickets
        now = time.monotonic()
        for ticket, token in zip(tickets, tokens, strict=True):
            ticket.begun = now
            self._took(ticket, token)

    def _took(self, ticket: Ticket, token: Token | LorashelfError) -> None:
        """Tell a request of its next token, and of the end."""
        if isinstance(token, LorashelfError):
            ticket.pass_on(token)
            return
        pieces = ticket.pieces
        text = pieces.add(token.id)
        count, most = len(pieces.tokens), ticket.request.most
        if not pieces.ended and count >= most:
            text += pieces.rest()
        ticket.pass_on(Piece(text, None if token.id in self._text.stops else token))
        if pieces.ended or count >= most:
            ticket.pass_on(End("stop" if pieces.ended else "length", count))
            self._pace += 0.1 * (time.monotonic() - ticket.begun - self._pace)

    def _stay(self) -> None:
        """Drop the texts that have ended or were cancelled."""
        self._running = [ticket for ticket in self._running if not ticket.cancelled]
        self._batch.keep([ticket.row for ticket in self._running])


def _closing() -> Busy:
    return Busy("the server is shutting down", cure="ask another one")
