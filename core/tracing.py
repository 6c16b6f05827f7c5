"""Traces from a request to the chunks it caused, over OpenTelemetry; off unless settings ask.

While off this loads nothing of OpenTelemetry's SDK, and every span is nothing. While on, spans
leave in
batches from a thread of their own: a collector that is slow or gone costs spans, never work.
"""

import atexit
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from core import logs
from core.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger("stillroom.tracing")
EXPORT_S = 5.0
"""How long one batch is tried."""
EXIT_S = 3.0
"""How long a process that ends waits for its last spans."""
SERVER_ERROR = 500
GOOD_ENDS = frozenset({"done", "cancelled", "handed_back"})
"""Of an attempt: nothing went wrong."""


class TracingUnavailable(RuntimeError):
    """STILL_OTEL_ENDPOINT is set and cannot be honoured; the message says why, in one line."""


class Mark:
    """A span as its caller sees it. This one is none: tracing is off."""

    def answered(self, status: int, *, route: str | None, problem: str | None) -> None:
        """Tell how a request ended; ``route`` is the template, such as /v1/jobs/{job_id}."""

    def ended(self, outcome: str) -> None:
        """Tell how a chunk's attempt ended: done, or the code of what stopped it."""


_NONE = Mark()


class _Mark(Mark):
    def __init__(self, span: "Span", *, title: str) -> None:
        self._span = span
        self._title = title

    def answered(self, status: int, *, route: str | None, problem: str | None) -> None:
        """See Mark.answered."""
        if status:  # else nobody waited for the answer
            self._span.set_attribute("http.response.status_code", status)
        if route is not None:
            self._span.update_name(f"{self._title} {route}")
            self._span.set_attribute("http.route", route)
        if problem is not None:
            self._span.set_attribute("stillroom.problem", problem)
        if status >= SERVER_ERROR:
            _fail(self._span, problem or str(status))

    def ended(self, outcome: str) -> None:
        """See Mark.ended."""
        self._span.set_attribute("stillroom.outcome", outcome)
        if outcome not in GOOD_ENDS:
            _fail(self._span, outcome)


def _fail(span: "Span", code: str) -> None:
    from opentelemetry.trace import StatusCode  # noqa: PLC0415 - loaded only where spans are

    span.set_status(StatusCode.ERROR, code)


class _Live:
    """An open connection to a collector."""

    def __init__(self, endpoint: str, service_name: str) -> None:
        # Loaded only where they are asked for: they cost 0.2 s, and need not be installed.
        from opentelemetry import trace  # noqa: PLC0415
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
            TraceContextTextMapPropagator,
        )

        exporter = OTLPSpanExporter(endpoint=_traces_url(endpoint), timeout=EXPORT_S)
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service_name}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer: Tracer = self._provider.get_tracer("stillroom")
        self.api = trace
        self.extract = TraceContextTextMapPropagator().extract

    def close(self, limit_s: float) -> None:
        """Send what is left, for so long at most."""
        last = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        try:
            last.start()
        except RuntimeError:
            return  # the interpreter is past starting threads; whoever ends in order calls close()
        last.join(limit_s)


_live: _Live | None = None


def set_up(settings: Settings, service_name: str) -> None:
    """Trace from now on, where settings name a collector; close() ends it.

    Raises:
        TracingUnavailable: OpenTelemetry is not installed, or the endpoint is no address.
    """
    global _live
    if settings.otel_endpoint is None:
        return
    if not settings.otel_endpoint.startswith(("http://", "https://")):
        raise TracingUnavailable(
            "STILL_OTEL_ENDPOINT must begin with http:// or https://, such as http://collector:4318"
        )
    try:
        _live = _Live(settings.otel_endpoint, service_name)
    except ImportError as missing:
        raise TracingUnavailable(
            "STILL_OTEL_ENDPOINT is set and OpenTelemetry is not installed: "
            f"pip install 'stillroom[tracing]' ({missing})"
        ) from missing
    atexit.register(close)
    log.info("traces go to %s", settings.otel_endpoint)


def close(*, limit_s: float = EXIT_S) -> None:
    """Send the last spans, for ``limit_s`` at most, and trace no more; does nothing while off."""
    global _live
    live, _live = _live, None
    if live is not None:
        atexit.unregister(close)
        live.close(limit_s)


def _traces_url(endpoint: str) -> str:
    whole = endpoint.rstrip("/")
    return whole if whole.endswith("/v1/traces") else f"{whole}/v1/traces"


@contextmanager
def request_span(method: str, *, traceparent: str | None, request_id: str) -> Iterator[Mark]:
    """Trace the answering of one request, within the caller's trace where it names one.

    The span's name is the method until Mark.answered knows the route. No address, query or
    header is noted.
    """
    if _live is None:
        yield _NONE
        return
    noted = {"http.request.method": method, "stillroom.request_id": request_id}
    with _span(_live, method, _live.api.SpanKind.SERVER, traceparent, noted) as span:
        yield _Mark(span, title=method)


@contextmanager
def chunk_span(traceparent: str | None, *, kind: str, **facts: str | int) -> Iterator[Mark]:
    """Trace one attempt at a chunk, as a child of the request that submitted its job.

    Args:
        traceparent: What was kept with the job.
        kind: The job's; also in the span's name.
        facts: Which attempt it is: job, stage, index, attempt, worker.
    """
    if _live is None:
        yield _NONE
        return
    noted = {f"stillroom.{name}": fact for name, fact in {"kind": kind, **facts}.items()}
    with _span(_live, f"chunk {kind}", _live.api.SpanKind.CONSUMER, traceparent, noted) as span:
        yield _Mark(span, title="chunk")


@contextmanager
def step(name: str) -> Iterator[None]:
    """Trace a part of what the present span does: fetch, compute, store, write."""
    if _live is None:
        yield
        return
    with _ending(_live, _live.tracer.start_span(name)):
        yield


def current_traceparent() -> str | None:
    """Return the present span in W3C form, to be kept with a job; None while off."""
    if _live is None:
        return None
    here = _live.api.get_current_span().get_span_context()
    if not here.is_valid:
        return None
    return f"00-{here.trace_id:032x}-{here.span_id:016x}-{here.trace_flags:02x}"


@contextmanager
def _span(
    live: _Live, name: str, kind: Any, traceparent: str | None, noted: dict[str, Any]
) -> Iterator["Span"]:
    """Open a span whose parent is elsewhere; the trace's id goes onto the logs inside."""
    parent = live.extract({"traceparent": traceparent} if traceparent else {})
    span = live.tracer.start_span(name, context=parent, kind=kind, attributes=noted)
    trace_id = f"{span.get_span_context().trace_id:032x}"
    with logs.about(trace_id=trace_id), _ending(live, span):
        yield span


@contextmanager
def _ending(live: _Live, span: "Span") -> Iterator[None]:
    """Make ``span`` the present one, and end it; an error leaves its class, not its words."""
    try:
        # Messages and tracebacks may hold what must not leave: they are in the log.
        with live.api.use_span(span, record_exception=False, set_status_on_exception=False):
            yield
    except BaseException as error:
        _fail(span, type(error).__name__)
        raise
    finally:
        span.end()
