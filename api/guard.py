"""Who may come in: host, origin, key and size are checked before any route. Closed by default."""

import time
from collections.abc import Mapping
from typing import Protocol
from urllib.parse import quote, urlsplit

from anyio import fail_after
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.principals import Principals, Proof
from api.problems import OUTAGES, outage, problem
from api.rates import Rates
from core.errors import Unauthorized
from core.jobs.keys import Principal
from core.settings import Settings

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/login"})
OPEN_FOLDERS = ("/static/",)
"""All that answers without a key."""
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
LEAST_RATE = 1024
"""Bytes a second, on average, at which a body that takes long must come at least."""
PAGE_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    # Not no-referrer: browsers then send `Origin: null` with forms, which would be refused.
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


class Door(Protocol):
    """What the guard needs of the application's context, which exists once it has started."""

    @property
    def principals(self) -> Principals:
        """Who asks."""
        ...

    @property
    def rates(self) -> Rates:
        """How often."""
        ...


class Guard:
    """Refuses what must not reach a route; says in ``scope["state"]`` who asks."""

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self.app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = self._limit(scope)
        idle_s = self._settings.body_idle.total_seconds()
        refusal = (
            self._check_host(scope, headers)
            or _check_origin(scope, headers)
            or _check_nul(scope)
            or await _check_key(scope, headers)
            or _check_length(scope, headers, limit)
        )
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self.app(scope, _watched(receive, limit, idle_s), send)

    def _limit(self, scope: Scope) -> int:
        part = scope["method"] == "PATCH" and scope["path"].startswith("/v1/uploads/")
        return self._settings.part_limit_bytes if part else self._settings.body_limit_bytes

    def _check_host(self, scope: Scope, headers: Headers) -> Response | None:
        """Refuse foreign names while no key protects us: any web page can rebind its name here."""
        if self._settings.api_key is not None:
            return None
        name = _host_name(headers.get("host", ""))
        if name in LOCAL_HOSTS or name == self._settings.host:
            return None
        allowed = ", ".join(sorted(LOCAL_HOSTS))
        return problem(scope, 421, f"Host {name!r} is not served without a key; use {allowed}")


async def _check_key(scope: Scope, headers: Headers) -> Response | None:
    path = scope["path"]
    if path in OPEN_PATHS or path.startswith(OPEN_FOLDERS):
        return None
    door: Door = scope["app"].state.context
    try:
        principal = await _principal(door.principals, Proof.of(headers))
    except Unauthorized as error:
        if not path.startswith("/v1") and "text/html" in headers.get("accept", ""):
            return RedirectResponse(f"/login?next={quote(path)}", 303)
        return problem(scope, 401, error.message, headers={"WWW-Authenticate": "Bearer"})
    except OUTAGES as error:
        return outage(scope, error)
    scope.setdefault("state", {})["principal"] = principal
    wait_s = await door.rates.wait_s(principal.actor)
    if wait_s is None:
        return None
    told = f"this key asks too often; allowed: {door.rates.limit}; try again in {wait_s} s"
    headers_ = {"Retry-After": str(wait_s)}
    return problem(scope, 429, told, retryable=True, headers=headers_)


async def _principal(principals: Principals, proof: Proof) -> Principal:
    """Only who is not remembered costs a thread and a query."""
    found = principals.recall(proof)
    return found if found is not None else await run_in_threadpool(principals.find, proof)


def _host_name(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _check_origin(scope: Scope, headers: Headers) -> Response | None:
    """Refuse writes that a page of another origin sends through its reader's browser."""
    if scope["method"] in SAFE_METHODS:
        return None
    origin = headers.get("origin")
    if origin is None:
        foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    else:
        foreign = _netloc(origin) != headers.get("host", "").lower()
    if not foreign:
        return None
    return problem(scope, 403, f"a page of {origin!r} may not write here")


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _check_nul(scope: Scope) -> Response | None:
    if "\0" in scope["path"] or b"%00" in scope.get("query_string", b""):
        return problem(scope, 400, "the address holds a NUL character")
    return None


def _check_length(scope: Scope, headers: Headers, limit: int) -> Response | None:
    given = headers.get("content-length", "0")
    if given.isdecimal() and len(given) < 20 and int(given) <= limit:
        return None
    return problem(scope, 413, too_large(limit))


def too_large(limit_bytes: int) -> str:
    """Return the sentence that names the limit."""
    return f"the body is larger than the limit of {limit_bytes} bytes"


def _late(what: str) -> HTTPException:
    told = f"{what}; what came of an upload is kept"
    return HTTPException(408, told, headers={"Connection": "close"})


def _watched(receive: Receive, limit: int, idle_s: float) -> Receive:
    """Stop reading a body that passes ``limit`` without having said so, stops coming or drips."""
    seen, whole, began = 0, False, time.monotonic()

    async def watching() -> Message:
        nonlocal seen, whole
        if whole:
            return await receive()  # waits for the other side to leave, however long
        try:
            with fail_after(idle_s):
                message = await receive()
        except TimeoutError:
            raise _late(f"no byte of the body came for {idle_s:g} s") from None
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > limit:
                raise HTTPException(413, too_large(limit))
            gone_s = time.monotonic() - began
            if not whole and gone_s > idle_s and seen < gone_s * LEAST_RATE:
                raise _late(f"{seen} bytes of the body came in {gone_s:.0f} s")
        return message

    return watching
