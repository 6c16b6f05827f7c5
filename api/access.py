"""Gives every request an id, a span and a line of log; makes what nobody foresaw a plain 500."""

import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import problem
from core import logs, tracing

log = logging.getLogger("stillroom.access")
_SANE = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Access:
    """The outermost layer: request id, trace, access log, last resort."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _SANE.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        # A copy: the state of the lifespan is shared between requests.
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        method, parent = scope["method"], headers.get("traceparent")
        with (
            logs.about(request_id=request_id),
            tracing.request_span(method, traceparent=parent, request_id=request_id) as span,
        ):
            await self._answer(scope, receive, send, span)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, span: tracing.Mark) -> None:
        started, status = time.perf_counter(), 0
        request_id = scope["state"]["request_id"]

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:
            log.exception("request failed", extra={"request_id": request_id})
            if status:
                raise  # too late to tell: the server cuts the connection
            detail = f"something went wrong on our side; the log has it under {request_id}"
            await problem(scope, 500, detail)(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", None)
            span.answered(status, route=route, problem=scope["state"].get("problem"))
            _log(scope, status=status, millis=(time.perf_counter() - started) * 1000)


def _log(scope: Scope, *, status: int, millis: float) -> None:
    # Neither query nor headers: both may hold what must not be in a log.
    client = scope.get("client")
    facts = {
        "request_id": scope["state"]["request_id"],
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "millis": round(millis, 1),
        "client": client[0] if client else None,
        "problem": scope["state"].get("problem"),
    }
    log.info("%s %s %s", facts["method"], facts["path"], status, extra=facts)
