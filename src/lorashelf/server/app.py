"""The application: OpenAI's routes over a served shelf and a scheduler."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ..errors import Busy, LorashelfError, ShelfError, TooLong, UsageError
from ..models.protocol import Continues
from ..models.sampling import Token
from ..serving import scheduler as scheduling
from ..serving.generate import MOST_TOKENS, Service, checked
from ..serving.scheduler import End, Event, Piece, Scheduler
from ..shelf.snapshot import Snapshot
from . import requests
from .answers import Answer
from .auto import Auto
from .guard import Guard
from .metrics import Metrics
from .openapi import openapi
from .page import Page
from .problems import document, error_response, status_of
from .requests import AUTO, BASE, Asked
from .running import Prepared, Running
from .served_shelf import ServedShelf
from .stream import Stream

BODY_SECONDS = 30.0  # for a client to send its body
_CODES = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "too_large", 415: "unsupported_media_type"}
_BARE = Service(BASE, None, None, "", MOST_TOKENS, frozenset())
_GONE = 499  # the client went away, and reads no response
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may take: seconds until the end of the answer, bytes of the body, tokens of the answer."""

    seconds: float = 300.0
    body: int = 2**20
    tokens: int = 1024


class Server:
    """The routes, and what they share."""

    def __init__(
        self,
        shelf: ServedShelf,
        model: Continues,
        scheduler: Scheduler,
        *,
        limits: Limits | None = None,
        key: str | None = None,
        auto: Auto | None = None,
    ) -> None:
        self._shelf, self._model, self._scheduler, self._auto = shelf, model, scheduler, auto
        self._limits, self._key = limits or Limits(), key
        self._metrics = Metrics(scheduler)
        self._page = Page(shelf, self._limits.tokens)
        self._begun = int(time.time())
        self._chat = requests.chat_schema(self._limits.tokens)
        self._text = requests.text_schema(self._limits.tokens)
        self.stopping = False
        """Whether no new requests should come."""

    def application(self) -> ASGIApp:
        """Return the ASGI application."""
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/models/{model}", self._one_model),
            Route("/v1/chat/completions", self._chats, methods=["POST"]),
            Route("/v1/completions", self._texts, methods=["POST"]),
            Route("/healthz", self._alive),
            Route("/readyz", self._ready),
            Route("/metrics", self._measured),
            Route("/openapi.json", self._openapi),
            *self._page.routes,
        ]
        handlers: Mapping[Any, Callable[..., Any]] = {
            HTTPException: _refused,
            LorashelfError: self._failed,
            Exception: _broken,
        }
        return Guard(Starlette(routes=routes, exception_handlers=handlers), self._key, self._page.sign_in)

    @property
    def _auto_id(self) -> Sequence[str]:
        """The model id that chooses a task, if this server can."""
        return () if self._auto is None else (AUTO,)

    def stop(self) -> None:
        """Report from now on that the server is not ready."""
        self.stopping = True

    # about --------------------------------------------------------------------------------------------------------

    async def _models(self, _: Request) -> Response:
        snapshot = await anyio.to_thread.run_sync(self._shelf.snapshot)
        names = dict.fromkeys([*self._auto_id, *sorted(snapshot.manifest.tasks), BASE])
        return JSONResponse({"object": "list", "data": [self._described(snapshot, name) for name in names]})

    async def _one_model(self, request: Request) -> Response:
        snapshot, name = await anyio.to_thread.run_sync(self._shelf.snapshot), request.path_params["model"]
        if name not in (*self._auto_id, BASE):
            snapshot.located(name)
        return JSONResponse(self._described(snapshot, name))

    def _described(self, snapshot: Snapshot, name: str) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": self._begun, "owned_by": "lorashelf"}
        slot = snapshot.manifest.slot_of(name)
        if slot is None:
            return about
        prompt = snapshot.manifest.tasks[name].get("prompt")
        return {**about, "lorashelf": {"slot": slot.id, "members": list(slot.members), "prompt": prompt}}

    async def _alive(self, _: Request) -> Response:
        alive = self._scheduler.alive
        return JSONResponse({"alive": alive}, 200 if alive else 503)

    async def _ready(self, _: Request) -> Response:
        try:
            if self.stopping:
                raise Busy("the server is shutting down")
            snapshot = await anyio.to_thread.run_sync(self._shelf.check)
        except LorashelfError as error:
            self._metrics.ready.set(0)
            return JSONResponse({"ready": False, "why": error.what}, 503)
        self._metrics.ready.set(1)
        return JSONResponse({"ready": True, "head": snapshot.head, "tasks": len(snapshot.manifest.tasks)})

    async def _measured(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=1.0.0; charset=utf-8")

    async def _openapi(self, _: Request) -> Response:
        task = min(self._shelf.tasks, default="TASK")
        return JSONResponse(openapi(self._chat, self._text, task, secured=self._key is not None))

    # answers ------------------------------------------------------------------------------------------------------

    async def _chats(self, request: Request) -> Response:
        return await self._answered(request, lambda body: requests.chat(body, self._chat))

    async def _texts(self, request: Request) -> Response:
        return await self._answered(request, lambda body: requests.text(body, self._text))

    async def _answered(self, request: Request, read: Callable[[Any], Asked]) -> Response:
        begun = time.monotonic()
        asked = read(requests.parsed(await self._body(request)))
        response = await _unless_gone(request, lambda: self._response(asked, begun))
        if response is None:
            self._metrics.count(self._known(asked.model), "gone")
        return response or Response(status_code=_GONE)

    async def _body(self, request: Request) -> bytes:
        """Read the body. Raises HTTPException if it is not JSON, too large or too slow."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "the body is not application/json")
        data = bytearray()
        try:
            with anyio.fail_after(BODY_SECONDS):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > self._limits.body:
                        raise HTTPException(413, f"the body has more than {self._limits.body} bytes")
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:g} seconds") from None
        except ClientDisconnect:
            raise HTTPException(_GONE, "the client went away") from None
        return bytes(data)

    async def _response(self, asked: Asked, begun: float) -> Response:
        """Return the whole answer, a stream whose first piece is there, or the response that is an error."""
        task, running = self._known(asked.model), None
        try:
            running = await self._started(asked, begun)
            task = running.prepared.service.task
            self._metrics.first.observe(time.monotonic() - begun)
            if asked.stream:
                seconds = self._limits.seconds + BODY_SECONDS
                handed, running = running, None
                return Stream(handed, asked.usage, seconds, lambda last: self._finished(handed.prepared, last, begun))
            return await self._gathered(running, begun)
        except LorashelfError as error:
            self._metrics.count(task, str(self._status(error)))
            return self._error(error)
        finally:
            if running is not None:
                running.cancel()

    async def _started(self, asked: Asked, begun: float) -> Running:
        """Return a request whose first event is there. If a commit deleted its adapter meanwhile, it starts anew.

        Raises what prevents an answer.
        """
        while True:
            prepared = await anyio.to_thread.run_sync(self._prepared, asked)
            running = Running(prepared, self._scheduler, begun + self._limits.seconds)
            try:
                await running.begin()
                return running
            except ShelfError:
                service = prepared.service
                if await anyio.to_thread.run_sync(self._shelf.service, service.task) is service:
                    raise
            except BaseException:
                running.cancel()
                raise

    def _prepared(self, asked: Asked) -> Prepared:
        """Return what the scheduler needs. Raises UnknownName, TooLong, UsageError, CorruptShelf."""
        task, about = asked.model, dict[str, Any]()
        snapshot = self._shelf.snapshot()
        if task == AUTO and AUTO not in snapshot.manifest.tasks:
            task, about = self._chosen(snapshot, asked.text)
        bare = task == BASE and BASE not in snapshot.manifest.tasks
        service = _BARE if bare else self._shelf.service(task)
        text, chat = self._model.text, asked.prompt is None
        prompt = text.raw(asked.prompt or "")
        if chat:
            prompt = text.encoded(asked.rendered(self._model.template, service.instruction))
        room = text.room(prompt, min(asked.most or service.max_new_tokens, self._limits.tokens))
        if room < 1 or not prompt:
            what = f"the prompt has {len(prompt)} tokens, and the model's context is {self._model.context}"
            raise TooLong(what, cure="shorten it")
        logprobs = asked.sampling.logprobs is not None
        about = {"task": service.task, "slot": service.slot, **about}
        return Prepared(
            service,
            scheduling.Request(prompt, service.adapter, room, asked.sampling, asked.stop, trims=chat),
            Answer(text, chat, service.task, len(prompt), logprobs, about),
        )

    def _chosen(self, snapshot: Snapshot, text: str) -> tuple[str, dict[str, Any]]:
        """Return the task for a text, and how sure the choice is. Raises UsageError without examples."""
        if (auto := self._auto) is None:
            cure = "name a task (see /v1/models), or start the server with --examples"
            raise UsageError("this server has no examples to choose a task by", cure=cure)
        choice = self._scheduler.call(lambda: auto.choose(snapshot, checked(text))).result()
        return choice.task, {"auto": {"confidence": choice.confidence, "others": dict(choice.others)}}

    async def _gathered(self, running: Running, begun: float) -> Response:
        """Return the whole answer. Raises the error that ends it."""
        text, tokens = "", list[Token]()
        async for event in running.events():
            if isinstance(event, Piece):
                text += event.text
                tokens += [] if event.token is None else [event.token]
            elif isinstance(event, End):
                self._finished(running.prepared, event, begun)
                return JSONResponse(running.prepared.answer.whole(text, tokens, event.reason, event.tokens))
            else:
                raise event
        raise LorashelfError("the answer has no end")

    def _finished(self, prepared: Prepared, last: Event | None, begun: float) -> None:
        """Count an answer by its last event; None if the client went away."""
        task = prepared.service.task
        if isinstance(last, End):
            self._metrics.whole.observe(time.monotonic() - begun)
            self._metrics.tokens.labels(task, "prompt").inc(prepared.answer.prompt_tokens)
            self._metrics.tokens.labels(task, "answer").inc(last.tokens)
        status = (
            "200" if isinstance(last, End) else str(status_of(last)) if isinstance(last, LorashelfError) else "gone"
        )
        self._metrics.count(task, status)

    # errors -------------------------------------------------------------------------------------------------------

    def _known(self, model: str) -> str:
        """Return the model id if it is a task or the base, so that clients cannot add labels to the metrics."""
        return model if model == BASE or model in self._shelf.tasks else ""

    def _status(self, error: LorashelfError) -> int:
        return 503 if self.stopping and isinstance(error, Busy) else status_of(error)

    def _error(self, error: LorashelfError) -> Response:
        headers = {"retry-after": str(self._scheduler.patience)} if isinstance(error, Busy) else None
        return error_response(error, self._status(error), headers)

    def _failed(self, _: Request, error: Exception) -> Response:
        if not isinstance(error, LorashelfError):
            raise error
        self._metrics.count("", str(self._status(error)))
        return self._error(error)


async def _unless_gone(request: Request, work: Callable[[], Awaitable[R]]) -> R | None:
    """Return what `work` returns; None if the client goes away first, and the work is cancelled."""
    found: list[R] = []

    async def run(scope: anyio.CancelScope) -> None:
        found.append(await work())
        scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(run, group.cancel_scope)
        while (await request.receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()
    return found[0] if found else None


def _broken(_: Request, error: Exception) -> Response:
    """Return the response of a bug, whose traceback is logged."""
    return error_response(LorashelfError(f"this is a bug: {type(error).__name__}"))


def _refused(_: Request, error: Exception) -> Response:
    """Return the response of a request that no route takes, or whose body is refused."""
    if not isinstance(error, HTTPException):
        raise error
    status = error.status_code
    return JSONResponse(document(error.detail, status, _CODES.get(status, "http")), status, headers=error.headers)
