"""Who may ask: holders of the key; without a key only this machine, under a name of its own."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from . import page
from .problems import document

OPEN = ("/healthz", "/readyz", *page.OPEN)  # without a key: they show nothing of the content


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine's own, which others cannot reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Refuses requests without the bearer key.

    Without a key, it refuses those for a name that is not this machine's, which a web page may have bound to the
    loopback address.
    """

    def __init__(self, app: ASGIApp, key: str | None, sign_in: Callable[[], Response]) -> None:
        """`sign_in` makes the response to a browser that asks for the page without a key."""
        self._app, self._key, self._sign_in = app, key, sign_in

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and (refusal := self._refusal(scope["path"], Headers(scope=scope))) is not None:
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        if self._key is None:
            host = _hostname(headers.get("host", ""))
            if host is None or not is_loopback(host):
                what = "the request is for another host; send it to localhost, or start the server with --api-key"
                return JSONResponse(document(what, 403, "forbidden_host"), 403)
        elif path not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key.encode()):
                if path == "/" and not given:
                    return self._sign_in()
                what = "the API key is wrong" if given else "the API key is missing: Authorization: Bearer KEY"
                return JSONResponse(document(what, 401, "invalid_api_key"), 401, headers={"www-authenticate": "Bearer"})
        return None


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
