"""Every error leaves as RFC 9457 application/problem+json; this file is the only way out."""

import json
import logging
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from core.errors import StillroomError

log = logging.getLogger("stillroom.api")
MEDIA_TYPE = "application/problem+json"

CODES: Mapping[int, str] = {
    400: "malformed",
    401: "unauthorized",
    403: "cross_origin",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_stalled",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    421: "host_refused",
    422: "spec_invalid",
    429: "too_many_requests",
    500: "internal",
    503: "database_unavailable",
}
"""The code of what HTTP itself refuses; a StillroomError brings its own."""
RETRYABLE = frozenset({408, 429, 503})
"""Of these; a StillroomError says so itself."""
RETRY_AFTER_S = 5
OUTAGES = (OperationalError, InterfaceError, PoolTimeout)
"""What an absent database raises."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlong = 40
_SHORT.maxlevel = 2


@dataclass(frozen=True)
class Blame:
    """One field that is wrong, by JSON pointer into the body (or /query/name, /header/name)."""

    pointer: str
    detail: str


class Busy(StillroomError):
    """As many requests of this sort are served as may be at once; try again shortly."""

    status = 503
    retryable = True


class ProblemResponse(Response):
    """A problem as a response."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        """Escape all but ASCII: a lone surrogate in an echoed value must not break the answer."""
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def problem(
    scope: Scope,
    status: int,
    detail: str,
    *,
    code: str | None = None,
    errors: Sequence[Blame] = (),
    retryable: bool = False,
    headers: Mapping[str, str] | None = None,
) -> ProblemResponse:
    """Build the one shape in which every error is told."""
    code = code or CODES.get(status, "http_error")
    scope.setdefault("state", {})["problem"] = code
    body = {
        "type": f"/docs#{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": scope.get("path", ""),
        "code": code,
        "errors": [{"pointer": blame.pointer, "detail": blame.detail} for blame in errors],
        "request_id": scope["state"].get("request_id"),
        "retryable": retryable,
    }
    return ProblemResponse(body, status, dict(headers or {}))


def install(app: FastAPI) -> None:
    """Make ``app`` tell every error as a problem."""
    app.add_exception_handler(StillroomError, _of_domain)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_http)
    for error in OUTAGES:
        app.add_exception_handler(error, _of_outage)


async def _of_domain(request: Request, error: Exception) -> Response:
    assert isinstance(error, StillroomError)
    blamed = error.pointer is not None
    blames = [Blame(error.pointer or "", error.message)] if blamed else []
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return problem(
        request.scope,
        error.status,
        error.message,
        code=error.code(),
        errors=blames,
        retryable=error.retryable,
        headers=headers,
    )


async def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail, headers, status = error.detail, error.headers, error.status_code
    if status == 404:
        detail = f"nothing is served at {request.url.path}"
    elif status == 405:
        allowed = ", ".join(sorted(_methods(request)))
        detail = f"{request.method} is not served here; allowed: {allowed}"
        headers = {"Allow": allowed}
    retryable = status in RETRYABLE
    return problem(request.scope, status, detail, retryable=retryable, headers=headers)


def _methods(request: Request) -> set[str]:
    """Every method of the path: the framework names those of its first route alone."""
    found: set[str] = set()
    for route in leaves(request.app.routes):
        if isinstance(route, Route) and route.path_regex.match(request.scope["path"]):
            found |= route.methods or set()
    return found or {"GET", "HEAD"}  # a static file


def leaves(routes: Sequence[Any]) -> Iterator[Any]:
    """Yield every route, those of included routers too."""
    for route in routes:
        included = getattr(route, "original_router", None)  # newer frameworks keep the tree
        if included is None:
            yield route
        else:
            yield from leaves(included.routes)


async def _of_outage(request: Request, error: Exception) -> Response:
    return outage(request.scope, error)


def outage(scope: Scope, error: Exception) -> ProblemResponse:
    """Tell that the database does not answer."""
    request_id = scope.get("state", {}).get("request_id")
    log.error("database: %s", error, extra={"request_id": request_id})
    detail = "the database does not answer; nothing was changed, try again shortly"
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return problem(scope, 503, detail, retryable=True, headers=headers)


async def _of_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    blames = blame_all(error.errors(), error.body)
    return problem(request.scope, 422, summary_of(blames), errors=blames)


def summary_of(blames: Sequence[Blame]) -> str:
    """Return one sentence: the first error, and how many more there are."""
    first = blames[0]
    more = f" (and {len(blames) - 1} more)" if len(blames) > 1 else ""
    return f"{first.pointer or 'body'}: {first.detail}{more}"


def blame_all(errors: Sequence[Mapping[str, Any]], body: Any) -> list[Blame]:
    """Translate pydantic's errors: pointers into ``body``, the value and what was allowed."""
    return [Blame(_pointer(error, body), _detail(error)) for error in errors]


def _detail(error: Mapping[str, Any]) -> str:
    sort, message, given = error["type"], str(error["msg"]), error.get("input")
    if sort == "value_error":
        message = message.removeprefix("Value error, ")  # the library's own words
        if isinstance(given, Mapping):  # a rule over several fields shows those it refuses
            return message
    if sort == "missing" or sort.startswith("union_tag"):
        return message
    return f"{message}; got {shown(given)}"


def shown(value: Any) -> str:
    """Return a value as a short text, whatever it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer with too many digits to print
        return f"a {type(value).__name__}"


def _pointer(error: Mapping[str, Any], body: Any) -> str:
    place, *steps = error["loc"] or ("body",)
    if place != "body":
        return "/" + "/".join(_escape(step) for step in (place, *steps))
    parts: list[Any] = []
    at = body
    for number, step in enumerate(steps, start=1):
        if _holds(at, step):
            at = at[step]
        elif not (error["type"] == "missing" and number == len(steps)):
            continue  # the tag of a union: pydantic names the branch, a pointer must not
        parts.append(step)
    if error["type"].startswith("union_tag"):
        parts.append(str(error["ctx"]["discriminator"]).strip("'"))
    return "".join(f"/{_escape(part)}" for part in parts)


def _holds(at: Any, step: Any) -> bool:
    if isinstance(at, list):
        return isinstance(step, int) and step < len(at)
    return isinstance(at, Mapping) and step in at


def _escape(step: Any) -> str:
    return str(step).replace("~", "~0").replace("/", "~1")
