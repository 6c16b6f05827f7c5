"""Who may come in: host, origin, key and size are checked before any route. Closed by default."""

import hashlib
import hmac
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from http.cookies import CookieError, SimpleCookie
from urllib.parse import quote, urlsplit

from anyio import fail_after
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import problem
from core.settings import Settings

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/login"})
OPEN_FOLDERS = ("/static/",)
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
COOKIE = "stillroom"
COOKIE_FOR = timedelta(days=7)
PAGE_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    # Not no-referrer: browsers then send `Origin: null` with forms, which would be refused.
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses what must not reach a route."""

    def __init__(self, app: ASGIApp, *, settings: Settings, clock: Callable[[], datetime]) -> None:
        self.app = app
        self._settings = settings
        self._clock = clock

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
            or self._check_key(scope, headers)
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

    def _check_key(self, scope: Scope, headers: Headers) -> Response | None:
        path = scope["path"]
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDERS):
            return None
        if key_given(headers, self._settings, now=self._clock()):
            return None
        if not path.startswith("/v1") and "text/html" in headers.get("accept", ""):
            return RedirectResponse(f"/login?next={quote(path)}", 303)
        detail = "send `Authorization: Bearer KEY` with the service's key"
        return problem(scope, 401, detail, headers={"WWW-Authenticate": "Bearer"})


def key_given(headers: Headers, settings: Settings, *, now: datetime) -> bool:
    """Whether the request proves that it knows the key; true where none is set."""
    if settings.api_key is None:
        return True
    secret = settings.api_key.get_secret_value()
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and same(given.strip(), secret):
        return True
    return cookie_valid(_cookie(headers), secret, now=now)


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


def _watched(receive: Receive, limit: int, idle_s: float) -> Receive:
    """Stop reading a body that passes ``limit`` without having said so, or that stops coming."""
    seen, whole = 0, False

    async def watching() -> Message:
        nonlocal seen, whole
        if whole:
            return await receive()  # waits for the other side to leave, however long
        try:
            with fail_after(idle_s):
                message = await receive()
        except TimeoutError:
            told = f"no byte of the body came for {idle_s:g} s; what came of an upload is kept"
            raise HTTPException(408, told, headers={"Connection": "close"}) from None
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > limit:
                raise HTTPException(413, too_large(limit))
        return message

    return watching


def same(given: str, secret: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(given.encode(errors="replace"), secret.encode())


def make_cookie(secret: str, *, now: datetime) -> str:
    """Return a value that proves the key was known, without holding it."""
    until = str(int((now + COOKIE_FOR).timestamp()))
    return f"{until}.{_sign(until, secret)}"


def cookie_valid(value: str, secret: str, *, now: datetime) -> bool:
    """Tell whether ``value`` was made with the same key and is not too old."""
    until, _, signature = value.partition(".")
    if not (until.isascii() and until.isdigit() and len(until) < 16):
        return False
    return same(signature, _sign(until, secret)) and int(until) > now.timestamp()


def _sign(until: str, secret: str) -> str:
    return hmac.new(secret.encode(), f"dashboard {until}".encode(), hashlib.sha256).hexdigest()


def _cookie(headers: Headers) -> str:
    jar: SimpleCookie = SimpleCookie()
    try:
        jar.load(headers.get("cookie", ""))
    except CookieError:
        return ""
    return jar[COOKIE].value if COOKIE in jar else ""
