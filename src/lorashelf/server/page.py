"""The page at `/`: the shelf as people look at it, a box to try a task, and the two changes that it offers.

Changes are refused unless the request comes from the page itself: its Origin is the server's, and it has the page's
token. Where a key is set, the guard requires it, too.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from .. import atomic
from ..errors import AdapterError, LorashelfError, ShelfError, StaleShelf, UsageError
from ..formats.peft import read_adapter
from ..report.decisions import decision_lines
from ..report.overview import overview, similarity_map
from ..report.rendering import TEMPLATES, rendered
from ..serving.generate import MOST_TOKENS
from ..shelf.arrival import plan_add
from ..shelf.log import record
from ..shelf.shelf import Shelf
from ..shelf.snapshot import Snapshot
from ..version import VERSION
from .problems import status_of
from .served_shelf import ServedShelf
from .upload import MOST_BYTES, MOST_FILES, Sent, unpacked

OPEN = ("/page.css", "/page.js")  # without a key: they are the same for every shelf
UPLOAD_SECONDS = 600.0  # for a browser to send an adapter
_STATUS: tuple[tuple[type[LorashelfError], int], ...] = ((AdapterError, 422), (ShelfError, 409))
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}


class Page:
    """The routes of the page."""

    def __init__(self, shelf: ServedShelf, most_tokens: int) -> None:
        self._shelf, self._most_tokens = shelf, most_tokens
        self._token = secrets.token_urlsafe(32)
        self._lock = threading.Lock()
        self._similarity: tuple[Sequence[str], str] = ((), "")

    @property
    def routes(self) -> list[Route]:
        """The routes; `/` is the page itself."""
        return [
            Route("/", self._page),
            Route("/page.css", _asset("style.css", "text/css")),
            Route("/page.js", _asset("page.js", "text/javascript")),
            Route("/page/similarity", self._compared),
            Route("/page/plan", self._planned, methods=["POST"]),
            Route("/page/add", self._added, methods=["POST"]),
            Route("/page/undo", self._undone, methods=["POST"]),
            Route("/page/redo", self._redone, methods=["POST"]),
        ]

    @staticmethod
    def sign_in() -> Response:
        """Return the page that asks for the key: it has no content of the shelf."""
        return _html(rendered("sign_in.html", version=VERSION), 401)

    # reading ------------------------------------------------------------------------------------------------------

    async def _page(self, _: Request) -> Response:
        return await self._shown()

    async def _shown(self, notice: str = "", status: int = 200) -> Response:
        return _html(await anyio.to_thread.run_sync(self._rendered, notice, status), status)

    def _rendered(self, notice: str, status: int) -> str:
        snapshot = self._shelf.snapshot()
        fault = self._shelf.fault
        try:
            log: Sequence[Mapping[str, Any]] = Shelf(self._shelf.path).log()
        except LorashelfError as error:  # the last good state is shown
            log, fault = [record(snapshot.head, snapshot.manifest)], fault or error
        return rendered(
            "page.html",
            shelf=overview(snapshot, log),
            tasks=[self._task(snapshot, name) for name in sorted(snapshot.manifest.tasks)],
            token=self._token,
            fault=fault.what if fault else "",
            notice=notice,
            failed=status >= 400,
            version=VERSION,
        )

    def _task(self, snapshot: Snapshot, name: str) -> dict[str, Any]:
        """Return what the box to try a task needs."""
        slot, details = snapshot.located(name)
        most = min(details.get("max_new_tokens", MOST_TOKENS), self._most_tokens)
        return {"name": name, "slot": slot.id, "prompt": details.get("prompt", ""), "tokens": most}

    async def _compared(self, _: Request) -> Response:
        return _html(await anyio.to_thread.run_sync(self._similarity_part))

    def _similarity_part(self) -> str:
        """Return the similarity map as a part of the page; it is computed once for the same objects."""
        snapshot = self._shelf.snapshot()
        objects = [f"{slot.object.id} {' '.join(slot.members)}" for slot in snapshot.manifest.slots]
        with self._lock:
            if objects != self._similarity[0] or not objects:
                try:
                    part = rendered("similarity.html", map=similarity_map(snapshot), fault="")
                except LorashelfError as error:
                    return rendered("similarity.html", map=None, fault=error.what)
                self._similarity = objects, part
            return self._similarity[1]

    # changes ------------------------------------------------------------------------------------------------------

    async def _planned(self, request: Request) -> Response:
        async with self._form(request) as form:
            try:
                plan = await anyio.to_thread.run_sync(self._add, form, False)
            except LorashelfError as error:
                return _html(rendered("plan.html", plan=None, fault=_message(error)), _status(error))
        return _html(rendered("plan.html", plan=plan, fault=""))

    async def _added(self, request: Request) -> Response:
        async with self._form(request) as form:
            return await self._changed(lambda: self._add(form, True)["line"])

    async def _undone(self, request: Request) -> Response:
        return await self._restored(request, "undo")

    async def _redone(self, request: Request) -> Response:
        return await self._restored(request, "redo")

    async def _restored(self, request: Request, operation: str) -> Response:
        async with self._form(request) as form:
            return await self._changed(lambda: self._restore(operation, _text(form, "head")))

    async def _changed(self, change: Callable[[], str]) -> Response:
        """Carry out a change and return the page with what it did, or with the error."""
        try:
            notice, status = await anyio.to_thread.run_sync(change), 200
        except LorashelfError as error:
            notice, status = _message(error), _status(error)
        return await self._shown(notice, status)

    def _restore(self, operation: str, head: str) -> str:
        shelf = Shelf(self._shelf.path)
        with shelf.writing():
            _check_head(shelf.snapshot(), head)
            shelf.undo() if operation == "undo" else shelf.redo()
        done = overview(shelf.snapshot(), shelf.log())
        event = done.redo if operation == "undo" else next(e for e in done.events if e.state == "now")
        return f"{operation}: {event.operation} {event.what}" if event else operation

    def _add(self, form: FormData, commit: bool) -> dict[str, Any]:
        """Plan the add of the adapter in a form, and commit it if asked. Raises LorashelfErrors."""
        shelf, prompt = Shelf(self._shelf.path), _text(form, "prompt").strip()
        sent = [Sent(each.filename or "", each.file) for each in form.getlist("files") if isinstance(each, UploadFile)]
        with unpacked(sent) as (folder, name), shelf.writing() if commit else contextlib.nullcontext():
            task = _text(form, "task").strip() or name
            adapter, snapshot = read_adapter(folder), shelf.snapshot()
            if commit:
                _check_head(snapshot, _text(form, "head"))
            plan = plan_add(snapshot, adapter, task, details={"prompt": prompt} if prompt else {})
            if plan.refused is not None:
                raise UsageError(f"the shelf refuses {task}: {plan.refused}")
            if commit:
                shelf.commit(plan)
        return {"line": decision_lines(plan.report)[0], "head": snapshot.head, "task": task, **_about(plan.report)} | {
            "notices": adapter.notices
        }

    @contextlib.asynccontextmanager
    async def _form(self, request: Request) -> AsyncIterator[FormData]:
        """Read the form of a change. Raises HTTPException unless the page itself sent it, within the limits."""
        origin = urlsplit(request.headers.get("origin", "")).netloc
        if not origin or origin != request.headers.get("host"):
            raise HTTPException(403, "changes are made from the page itself, not from another site")
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise HTTPException(415, "the body is not multipart/form-data")
        try:
            with anyio.fail_after(UPLOAD_SECONDS):
                form = await MultiPartParser(request.headers, _limited(request), max_files=MOST_FILES).parse()
        except TimeoutError:
            raise HTTPException(408, f"the files did not arrive within {UPLOAD_SECONDS:g} seconds") from None
        except MultiPartException as error:
            raise HTTPException(400, error.message) from error
        except ClientDisconnect:
            raise HTTPException(400, "the client went away") from None
        try:
            if not hmac.compare_digest(_text(form, "token").encode(), self._token.encode()):
                raise HTTPException(403, "the page is out of date: load it again")
            yield form
        finally:
            await form.close()


async def _limited(request: Request) -> AsyncGenerator[bytes, None]:
    """Yield the body. Raises HTTPException beyond MOST_BYTES."""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MOST_BYTES:
            raise HTTPException(413, f"the files have more than {MOST_BYTES} bytes")
        yield chunk


def _check_head(snapshot: Snapshot, head: str) -> None:
    if snapshot.head != head:
        raise StaleShelf("the shelf changed since the page was loaded", cure="look at it as it is now, and try again")


def _about(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a plan's report what the page shows: scores from the highest, and tasks that get coarser."""
    scores = sorted(report["scores"].items(), key=lambda item: -item[1])
    return {"scores": scores[:5], "coarser": report.get("coarser", {}), "reason": report.get("reason", "")}


def _text(form: FormData, name: str) -> str:
    value = form.get(name, "")
    return value if isinstance(value, str) else ""


def _message(error: LorashelfError) -> str:
    """Return an error for people; paths of the server stay in the log."""
    return "; ".join(part for part in (error.what, " ".join((error.cure or "").split())) if part)


def _status(error: LorashelfError) -> int:
    return next((status for kind, status in _STATUS if isinstance(error, kind)), status_of(error))


def _html(text: str, status: int = 200) -> Response:
    return HTMLResponse(text, status, headers=_HEADERS)


def _asset(name: str, kind: str) -> Callable[[Request], Response]:
    content = atomic.read_file(TEMPLATES / name)

    def answer(_: Request) -> Response:
        headers = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}
        return Response(content, media_type=kind, headers=headers)

    return answer
