"""Turns templates into pages, and errors on the way into a page that tells them."""

import json
import math
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from api.guard import PAGE_HEADERS
from api.problems import CODES, blame_all, summary_of
from core.errors import StillroomError
from core.jobs.keys import Scope

FOLDER = Path(__file__).parent


def size(count: float) -> str:
    """Return bytes as people read them."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("the last unit returns")


def lasting(seconds: float | None) -> str:
    """Return a duration as people read it."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return str(timedelta(seconds=round(seconds)))


def instant(value: datetime | None) -> Markup:
    """Return a <time> that the browser shows in its own zone."""
    if value is None:
        return Markup("–")
    return Markup('<time datetime="{}">{} UTC</time>').format(
        value.isoformat(), value.strftime("%Y-%m-%d %H:%M:%S")
    )


def chunks(done: float) -> str:
    """Return chunks done: `9`, or `8.9` while one runs; never rounded up to what is not done."""
    return f"{math.floor(done * 10) / 10:.10g}"


_ENV = Environment(
    loader=FileSystemLoader(FOLDER / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENV.filters.update(
    chunks=chunks,
    size=size,
    lasting=lasting,
    instant=instant,
    pretty=lambda value: json.dumps(value, indent=2, ensure_ascii=False),
)


def page(request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """Render a template into a response with the headers every page has."""
    locked = request.app.state.context.settings.api_key is not None
    principal = request.scope["state"].get("principal")  # none before the login
    scopes = principal.scopes if principal is not None else frozenset()
    text = _ENV.get_template(template).render(
        path=request.url.path,
        locked=locked,
        may_submit=Scope.SUBMIT in scopes,
        may_admin=Scope.ADMIN in scopes,
        **values,
    )
    # A lone surrogate cannot come in through strict bodies; should one be stored, show it escaped.
    content = text.encode(errors="backslashreplace")
    return HTMLResponse(content, status, dict(PAGE_HEADERS))


async def form_of(request: Request) -> dict[str, str]:
    """Return the fields of an HTML form; the last of each name counts."""
    raw = await request.body()
    try:
        return dict(parse_qsl(raw.decode(), keep_blank_values=True, max_num_fields=100))
    except ValueError as error:
        raise HTTPException(400, "the form is not URL-encoded UTF-8") from error


class PageRoute(APIRoute):
    """A route whose errors are shown as a page."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the framework's handler."""
        handle = super().get_route_handler()

        async def shown(request: Request) -> Response:
            try:
                return await handle(request)
            except StillroomError as error:
                status, facts = error.status, {"code": error.code(), "message": error.message}
            except RequestValidationError as error:
                told = summary_of(blame_all(error.errors(), error.body))
                status, facts = 422, {"code": CODES[422], "message": told}
            return await run_in_threadpool(page, request, "error.html", status=status, **facts)

        return shown
