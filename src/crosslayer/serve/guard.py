"""Checks on requests: Host and Origin, the token and the size of bodies; and the content security policy.

A page of another site in the same browser can send requests to 127.0.0.1. With a host name of its own that resolves to
127.0.0.1 (DNS rebinding) it can even read the answers. So requests must name this server as their host, and requests
that change something must come from a page of this server.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

MOST_BODY = 1 << 20
MOST_IMPORT = 64 << 20
COOKIE = "crosslayer_token"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class _TooLarge(Exception):
    """A body exceeds its maximum size."""


class Guard:
    """ASGI middleware that checks requests.

    Args:
        app: the wrapped application.
        hosts: `name:port` accepted in requests.
        token: token that each request must carry, in a cookie or as a bearer; None for none. `/?token=...` sets the
            cookie.
        imports: paths whose bodies may be large.
    """

    def __init__(self, app: Any, hosts: Collection[str], token: str | None, imports: Collection[str] = ()) -> None:
        self.app, self.hosts, self.token, self.imports = app, frozenset(hosts), token, frozenset(imports)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        if (refusal := self._refusal(scope, headers)) is not None:
            await _answer(send, *refusal)
            return
        most = MOST_IMPORT if scope["path"] in self.imports else MOST_BODY
        if not headers.get("content-length", "0").isascii() or not headers.get("content-length", "0").isdigit():
            await _answer(send, 400, "the Content-Length is not a number")
            return
        if int(headers.get("content-length", "0")) > most:
            await _answer(send, 413, f"the body exceeds {most >> 20} MiB")
            return
        seen = 0

        async def bounded() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                # A body without Content-Length: stop reading at the maximum.
                raise _TooLarge
            return message

        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token")
        cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/" if self.token and given else None

        async def dressed(message: Any) -> None:
            if seen > most:
                # The route may have raised any error on the truncated body.
                raise _TooLarge
            if message["type"] == "http.response.start":
                own = {k.lower() for k, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in own]
                if cookie:
                    more.append((b"set-cookie", cookie.encode()))
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            await self.app(scope, bounded, dressed)
        except _TooLarge:
            await _answer(send, 413, f"the body exceeds {most >> 20} MiB")

    def _refusal(self, scope: Any, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if host not in self.hosts:
            return 421, f"this server is not {host[:100]!r}; open it by the address that it printed"
        origin = headers.get("origin")
        if origin is not None and origin not in {f"http://{h}" for h in self.hosts}:
            return 403, f"requests from pages of {origin[:100]!r} are not allowed"
        if (
            scope["method"] not in ("GET", "HEAD")
            and origin is None
            and headers.get("sec-fetch-site") not in (None, "same-origin")
        ):
            return 403, "only pages of this server may make changes"
        if self.token is not None and not self._has_token(scope, headers):
            return 401, "the token is missing or wrong; open the address with the token that the server printed"
        return None

    def _has_token(self, scope: Any, headers: dict[str, str]) -> bool:
        assert self.token is not None
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [])
        if headers.get("authorization", "").startswith("Bearer "):
            given = [*given, headers["authorization"][7:]]
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        given = [*given, cookie.value] if cookie else given
        return any(hmac.compare_digest(g.encode(), self.token.encode()) for g in given)


async def _answer(send: Any, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), *((k.encode(), v.encode()) for k, v in HEADERS.items())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
