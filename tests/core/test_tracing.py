"""The collector is a real HTTP server of the test; the application and the Runner are real too."""

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from sqlalchemy import select
from starlette.testclient import TestClient

from core import logs, tracing
from core.db.models import Job
from core.settings import Settings
from tests.api.conftest import ECHO, KEY, context_of, make_settings, runner_of, serving
from tests.conftest import Clock

SENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SERVER, CONSUMER = 2, 5


class Collector:
    """Speaks OTLP over HTTP and keeps what it got."""

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self.resources: list[dict[str, Any]] = []
        self.spans: list[Any] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                time.sleep(delay_s)
                outer.take(self.path, body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append(_attributes(group.resource))
            for scope in group.scope_spans:
                self.spans.extend(scope.spans)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def named(self, name: str) -> Any:
        [found] = [span for span in self.spans if span.name == name]
        return found


def _attributes(thing: Any) -> dict[str, Any]:
    def value(of: Any) -> Any:
        return getattr(of, of.WhichOneof("value"))

    return {one.key: value(one.value) for one in thing.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.stop()


@contextmanager
def traced(endpoint: str) -> Iterator[None]:
    tracing.set_up(Settings(otel_endpoint=endpoint), "stillroom-test")
    try:
        yield
    finally:
        tracing.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TestClient]:
    with serving(make_settings(tmp_path / "data"), Clock()) as client:
        yield client


def run_all(client: TestClient) -> None:
    runner = runner_of(client)
    while runner.run_one():
        pass


def test_one_trace_leads_from_the_post_to_every_chunk(
    collector: Collector, server: TestClient
) -> None:
    with traced(collector.url):
        job = server.post("/v1/jobs?", json=ECHO).json()
        run_all(server)

    post = collector.named("POST /v1/jobs")
    chunks = [span for span in collector.spans if span.name == "chunk echo"]
    assert len(chunks) == 2
    assert {span.trace_id for span in collector.spans} == {post.trace_id}
    assert {span.parent_span_id for span in chunks} == {post.span_id}
    assert (post.kind, chunks[0].kind) == (SERVER, CONSUMER)
    with context_of(server).reading() as session:
        trace = session.scalar(select(Job.trace).where(Job.id == job["id"]))
    assert trace[:-2] == f"00-{post.trace_id.hex()}-{post.span_id.hex()}-"
    assert int(trace[-2:], 16) & 1, "sampled"
    assert {facts["service.name"] for facts in collector.resources} == {"stillroom-test"}


def test_a_chunk_tells_what_it_was_and_how_its_time_went(
    collector: Collector, server: TestClient
) -> None:
    with traced(collector.url):
        job = server.post("/v1/jobs", json={**ECHO, "times": 1}).json()
        run_all(server)

    chunk = collector.named("chunk echo")
    assert _attributes(chunk) == {
        "stillroom.job": job["id"],
        "stillroom.kind": "echo",
        "stillroom.stage": "lines",
        "stillroom.index": 0,
        "stillroom.attempt": 1,
        "stillroom.worker": runner_of(server).owner,
        "stillroom.outcome": "done",
    }
    parts = [span for span in collector.spans if span.parent_span_id == chunk.span_id]
    parts.sort(key=lambda span: span.start_time_unix_nano)
    assert [span.name for span in parts] == ["fetch", "compute", "store", "write"]
    assert all(span.end_time_unix_nano <= chunk.end_time_unix_nano for span in parts)


def test_the_callers_trace_goes_on(collector: Collector, server: TestClient) -> None:
    with traced(collector.url):
        server.post("/v1/jobs", json=ECHO, headers={"traceparent": SENT})
        run_all(server)

    post = collector.named("POST /v1/jobs")
    _, trace_id, span_id, _ = SENT.split("-")
    assert (post.trace_id.hex(), post.parent_span_id.hex()) == (trace_id, span_id)
    assert {span.trace_id.hex() for span in collector.spans} == {trace_id}


@pytest.mark.parametrize("wrong", ["", "x", SENT[:-1], "00-" + "0" * 32 + SENT[35:], SENT * 900])
def test_a_wrong_traceparent_is_passed_over(
    collector: Collector, server: TestClient, wrong: str
) -> None:
    with traced(collector.url):
        answer = server.get("/v1/jobs", headers={"traceparent": wrong})

    assert answer.status_code == 200
    assert collector.named("GET /v1/jobs").parent_span_id == b""


def test_a_span_holds_the_template_and_neither_query_nor_headers(
    collector: Collector, tmp_path: Path
) -> None:
    settings = make_settings(tmp_path / "data", api_key=KEY)
    with serving(settings, Clock()) as locked, traced(collector.url):
        headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "r-1"}
        locked.get("/v1/jobs/job_private?x=private", headers=headers)
        locked.get("/v1/jobs/job_private", headers={"Authorization": "Bearer private"})
        locked.get("/private", headers=headers)

    known, refused, lost = collector.spans
    assert _attributes(known) == {
        "http.request.method": "GET",
        "http.route": "/v1/jobs/{job_id}",
        "http.response.status_code": 422,
        "stillroom.problem": "spec_invalid",
        "stillroom.request_id": "r-1",
    }
    assert (refused.name, _attributes(refused)["stillroom.problem"]) == ("GET", "unauthorized")
    assert (lost.name, _attributes(lost)["http.response.status_code"]) == ("GET", 404)
    told = "".join(str(span) for span in collector.spans)
    assert "private" not in told
    assert KEY not in told


def test_the_logs_of_a_span_carry_the_traces_id(collector: Collector) -> None:
    formatter = logs.JsonLines()
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "said", None, None)

    with traced(collector.url):
        with tracing.request_span("GET", traceparent=SENT, request_id="r"):
            inside = json.loads(formatter.format(record))
        outside = json.loads(formatter.format(record))

    assert inside["trace_id"] == SENT.split("-")[1]
    assert "trace_id" not in outside


def test_a_carried_thread_stays_in_its_span(collector: Collector) -> None:
    def beat() -> None:
        with tracing.step("beat"):
            pass

    with traced(collector.url), tracing.request_span("GET", traceparent=None, request_id="r"):
        thread = threading.Thread(target=logs.carried(beat))
        thread.start()
        thread.join()

    assert collector.named("beat").parent_span_id == collector.named("GET").span_id


def test_an_error_leaves_its_class_and_not_its_words(collector: Collector) -> None:
    with (
        traced(collector.url),
        pytest.raises(ValueError, match="private"),
        tracing.chunk_span(None, kind="echo", job="job_1", attempt=1),
        tracing.step("compute"),
    ):
        raise ValueError("private")

    assert {span.status.message for span in collector.spans} == {"ValueError"}
    assert "private" not in "".join(str(span) for span in collector.spans)


@pytest.mark.parametrize(
    ("outcome", "failed"), [("done", False), ("handed_back", False), ("out_of_memory", True)]
)
def test_only_what_went_wrong_is_an_error(
    collector: Collector, outcome: str, *, failed: bool
) -> None:
    with (
        traced(collector.url),
        tracing.chunk_span(None, kind="echo", job="job_1", attempt=1) as span,
    ):
        span.ended(outcome)

    assert (collector.named("chunk echo").status.code == 2) is failed


def _refusing() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{found.getsockname()[1]}"


def test_a_collector_that_is_gone_costs_spans_and_no_work() -> None:
    tracing.set_up(Settings(otel_endpoint=_refusing()), "stillroom-test")
    began = time.perf_counter()
    for _ in range(5_000):
        with tracing.request_span("GET", traceparent=None, request_id="r"):
            pass
    worked = time.perf_counter() - began
    began = time.perf_counter()
    tracing.close()

    assert worked < 30
    assert time.perf_counter() - began < tracing.EXIT_S + 20


def test_a_slow_collector_holds_nobody_up() -> None:
    slow = Collector(delay_s=1.0)
    tracing.set_up(Settings(otel_endpoint=slow.url), "stillroom-test")
    began = time.perf_counter()
    for _ in range(1_000):
        with tracing.request_span("GET", traceparent=None, request_id="r"):
            pass
    worked = time.perf_counter() - began
    tracing.close()
    slow.stop()

    assert worked < 60  # 1,000 s if each waited for the collector
    assert len(slow.spans) == 1_000


def test_off_it_traces_nothing_and_loads_nothing() -> None:
    with tracing.request_span("GET", traceparent=SENT, request_id="r") as span:
        span.answered(200, route="/", problem=None)
        assert tracing.current_traceparent() is None

    for module, foreign in (("core.tracing", "opentelemetry"), ("api.app", "opentelemetry.sdk")):
        code = (
            f"import sys, {module}, core.tracing as t; from core.settings import Settings;"
            "t.set_up(Settings(), 'x'); t.close();"
            f"sys.exit(any(name.startswith({foreign!r}) for name in sys.modules))"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_wish_that_cannot_be_met_is_told_in_one_line() -> None:
    with pytest.raises(tracing.TracingUnavailable, match="must begin with http://") as caught:
        tracing.set_up(Settings(otel_endpoint="collector:4318"), "x")
    assert "\n" not in str(caught.value)

    code = (
        "import sys; sys.modules['opentelemetry'] = None;"
        "import core.tracing as t; from core.settings import Settings\n"
        "try: t.set_up(Settings(otel_endpoint='http://127.0.0.1:1'), 'x')\n"
        "except t.TracingUnavailable as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.count("\n") == 1
    assert "pip install 'stillroom[tracing]'" in run.stdout


def test_a_process_that_ends_sends_its_last_spans(collector: Collector) -> None:
    code = (
        "import core.tracing as t; from core.settings import Settings\n"
        f"t.set_up(Settings(otel_endpoint={collector.url!r}), 'x')\n"
        "with t.request_span('GET', traceparent=None, request_id='r'): pass"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

    assert [span.name for span in collector.spans] == ["GET"]
