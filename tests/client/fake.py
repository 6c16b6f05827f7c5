"""A server of the contract's corner cases on loopback: it drops, cuts, lies and goes away."""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.client.samples import ECHO, JOB, job_view


@dataclass
class Fault:
    """Something that goes wrong with the next matching requests."""

    method: str
    path: str
    """A regular expression."""
    what: str
    """``503``, ``drop``, ``cut`` (after ``at`` bytes), ``wrong`` (other bytes), or ``plain``."""
    times: int = 1
    at: int = 0


@dataclass
class World:
    """What the server knows, and what it saw."""

    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    events: list[tuple[int | None, str, dict[str, Any]]] = field(default_factory=list)
    uploads: dict[str, dict[str, Any]] = field(default_factory=dict)
    bytes_of: dict[str, bytearray] = field(default_factory=dict)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    part_limit_bytes: int = 1000
    instant: bool = False
    """Whether a job has succeeded as soon as it is submitted, with the outputs there are."""
    refuse: str | None = None
    api_key: str | None = None
    cut_stream_after: int | None = None
    """Events per SSE connection before the server closes it."""
    url: str = ""

    def put(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs[sha256] = content
        return sha256

    def offer(self, name: str, content: bytes, file_name: str | None = None) -> str:
        """Give the job an artifact."""
        sha256 = self.put(content)
        output = {"name": name, "role": "artifact", "sha256": sha256, "format": "text"}
        output |= {"file_name": file_name or f"{name}.txt", "media_type": "text/plain"}
        output |= {"size_bytes": len(content), "meta": {}, "created_at": "2026-01-02T03:04:05Z"}
        self.outputs.append(output)
        self.jobs.setdefault(JOB, job_view())["artifacts"][name] = sha256
        return sha256

    def requests(self, method: str, path: str) -> list[dict[str, str]]:
        """Return the headers of the matching requests so far."""
        return [h for m, p, h in self.seen if m == method and re.search(path, p)]

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None


Route = Callable[["Handler", re.Match[str]], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    world: World
    fault: Fault | None

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _any(self) -> None:
        path = urlsplit(self.path).path
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.world.seen.append((self.command, self.path, headers))
        self.fault = self.world.fault(self.command, self.path)
        if self.fault is not None and self.fault.what == "drop":
            return self.hang_up()
        if self.fault is not None and self.fault.what == "503":
            return self.problem(503, "away", "back soon", body=True)
        if self.fault is not None and self.fault.what == "plain":
            return self.send(418, b"<h1>proxy</h1>", {"Content-Type": "text/html"}, body=True)
        key = self.world.api_key
        if key is not None and headers.get("authorization") != f"Bearer {key}":
            return self.problem(401, "unauthorized", "a key is needed", body=True)
        for method, pattern, route in ROUTES:
            found = re.fullmatch(pattern, path)
            if method == self.command and found:
                return route(self, found)
        return self.problem(404, "not_found", f"nothing at {path}", body=True)

    do_GET = do_POST = do_PATCH = _any  # noqa: N815 - the base class wants these names

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(
        self, status: int, content: bytes, headers: dict[str, str], *, body: bool = False
    ) -> None:
        if body:
            self.body()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def send_json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def problem(self, status: int, code: str, detail: str, *, body: bool = False) -> None:
        errors = [{"pointer": "/text", "detail": "too short"}] if status == 422 else []
        value = {"status": status, "code": code, "detail": detail, "errors": errors}
        kind = {"Content-Type": "application/problem+json"}
        self.send(status, json.dumps(value).encode(), kind, body=body)


def submit(handler: Handler, _: re.Match[str]) -> None:
    spec = json.loads(handler.body())
    world = handler.world
    if spec.get("text") == "refused":
        return handler.problem(422, "spec_invalid", "the text is refused")
    key = handler.headers["Idempotency-Key"]
    if key not in world.keys:
        made = {output["name"]: output["sha256"] for output in world.outputs}
        state = {"state": "succeeded", "artifacts": made} if world.instant else {"state": "queued"}
        number = f"{JOB[:-1]}{len(world.keys)}"
        world.keys[key] = job_view(id=number, kind=spec["kind"], spec=spec, **state)
        world.jobs[world.keys[key]["id"]] = world.keys[key]
    if handler.fault is not None and handler.fault.what == "cut":
        return handler.hang_up()
    return handler.send_json(world.keys[key], 201)


def list_jobs(handler: Handler, _: re.Match[str]) -> None:
    asked = parse_qs(urlsplit(handler.path).query)
    jobs = list(handler.world.jobs.values())
    if "state" in asked:
        jobs = [job for job in jobs if job["state"] == asked["state"][0]]
    start, limit = int(asked.get("cursor", ["0"])[0]), int(asked["limit"][0])
    following = str(start + limit) if start + limit < len(jobs) else None
    handler.send_json({"items": jobs[start : start + limit], "next_cursor": following})


def get_job(handler: Handler, found: re.Match[str]) -> None:
    job = handler.world.jobs.get(found[1])
    if job is None:
        return handler.problem(404, "not_found", f"no job {found[1]}")
    return handler.send_json(job)


def list_outputs(handler: Handler, found: re.Match[str]) -> None:
    if found[1] not in handler.world.jobs:
        return handler.problem(404, "not_found", f"no job {found[1]}")
    return handler.send_json({"items": handler.world.outputs})


def cancel(handler: Handler, found: re.Match[str]) -> None:
    handler.body()
    job = handler.world.jobs[found[1]]
    if job["state"] in {"succeeded", "failed", "cancelled"}:
        return handler.problem(409, "conflict", f"the job is {job['state']}")
    job["state"] = "cancelled"
    return handler.send_json(job)


def stream(handler: Handler, _: re.Match[str]) -> None:
    world, after = handler.world, int(handler.headers.get("Last-Event-ID", "0"))
    handler.close_connection = True
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(b": hello\n\n")
    if after > max((number or 0 for number, *_ in world.events), default=0):
        handler.wfile.write(b"event: reset\ndata: {}\n\n")
        after = 0
    sent = 0
    for number, kind, data in list(world.events):
        if number is not None and number <= after:
            continue
        if world.cut_stream_after is not None and sent >= world.cut_stream_after:
            handler.wfile.write(b"id: 99\nevent: job.suc")  # torn: must count as nothing
            return handler.hang_up()
        head = f"id: {number}\n" if number is not None else ""
        handler.wfile.write(f"{head}event: {kind}\ndata: {json.dumps(data)}\n\n".encode())
        sent += number is not None
        if kind.startswith("job.") and JOB in world.jobs and kind[4:] in STATES:
            world.jobs[JOB]["state"] = kind[4:]
    return None


STATES = {"succeeded", "failed", "cancelled"}


def content(handler: Handler, found: re.Match[str]) -> None:
    whole, sha256, fault = handler.world.blobs[found[1]], found[1], handler.fault
    if fault is not None and fault.what == "wrong":
        whole = bytes(len(whole))
    asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    start = int(asked[1]) if asked and handler.headers["If-Range"] == f'"{sha256}"' else 0
    if start >= len(whole) and start:
        return handler.problem(416, "range_not_satisfiable", "nothing there")
    handler.send_response(206 if start else 200)
    handler.send_header("Content-Length", str(len(whole) - start))
    handler.send_header("ETag", f'"{sha256}"')
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
    handler.end_headers()
    if fault is not None and fault.what == "cut":
        handler.wfile.write(whole[start : start + fault.at])
        return handler.hang_up()
    handler.wfile.write(whole[start:])
    return None


def open_upload(handler: Handler, _: re.Match[str]) -> None:
    asked, world = json.loads(handler.body()), handler.world
    upload = {"id": f"up_{len(world.uploads)}", "state": "open", **asked, "artifact": None}
    world.uploads[upload["id"]] = {**upload, "error": None}
    world.bytes_of[upload["id"]] = bytearray()
    show_upload(handler, upload["id"], 201)


def show_upload(handler: Handler, upload_id: str, status: int = 200) -> None:
    world = handler.world
    if upload_id not in world.uploads:
        return handler.problem(404, "not_found", f"no upload {upload_id}")
    received = len(world.bytes_of[upload_id])
    more = {"received_bytes": received, "part_limit_bytes": world.part_limit_bytes}
    return handler.send_json({**world.uploads[upload_id], **more}, status)


def append(handler: Handler, found: re.Match[str]) -> None:
    there = handler.world.bytes_of[found[1]]
    if int(handler.headers["Upload-Offset"]) != len(there):
        return handler.problem(409, "upload_incomplete", f"{len(there)} bytes", body=True)
    fault = handler.fault
    if fault is not None and fault.what == "cut":
        there += handler.rfile.read(fault.at)
        return handler.hang_up()
    there += handler.body()
    return show_upload(handler, found[1])


def complete(handler: Handler, found: re.Match[str]) -> None:
    handler.body()
    world, upload = handler.world, handler.world.uploads[found[1]]
    sent = bytes(world.bytes_of[found[1]])
    if upload["state"] == "open" and world.refuse is not None:
        upload |= {"state": "failed", "error": {"code": "data_invalid", "message": world.refuse}}
    if upload["state"] == "failed":
        if handler.fault is not None and handler.fault.what == "cut":
            return handler.hang_up()
        return handler.problem(422, "data_invalid", str(world.refuse))
    if upload["sha256"] != hashlib.sha256(sent).hexdigest():
        return handler.problem(409, "upload_incomplete", "other bytes")
    upload |= {"state": "complete", "artifact": world.put(b"canonical " + sent)}
    if handler.fault is not None and handler.fault.what == "cut":
        return handler.hang_up()
    meta = {"rows": 6, "dim": 3}
    found_as = {"sha256": upload["artifact"], "format": "pairs", "size_bytes": len(sent) + 10}
    sent_as = [{"upload_id": upload["id"], "file_name": "x", "sha256": "x", "notes": ["mended"]}]
    shown = {**found_as, "file_name": upload["file_name"], "meta": meta, "uploaded_as": sent_as}
    return handler.send_json(shown, 201)


ROUTES: list[tuple[str, str, Route]] = [
    ("GET", "/readyz", lambda h, _: h.send_json({"status": "ok"})),
    ("GET", "/v1/kinds", lambda h, _: h.send_json({"items": [ECHO]})),
    ("POST", "/v1/jobs", submit),
    ("GET", "/v1/jobs", list_jobs),
    ("GET", r"/v1/jobs/(\w+)", get_job),
    ("POST", r"/v1/jobs/(\w+)/cancel", cancel),
    ("GET", r"/v1/jobs/(\w+)/events", stream),
    ("GET", r"/v1/jobs/\w+/metrics", lambda h, _: h.send_json({"metrics": h.world.metrics})),
    ("GET", r"/v1/jobs/(\w+)/artifacts", list_outputs),
    ("GET", r"/v1/jobs/\w+/checkpoints", lambda h, _: h.send_json({"items": []})),
    ("GET", r"/v1/artifacts/(\w+)/content", content),
    ("POST", "/v1/uploads", open_upload),
    ("GET", r"/v1/uploads/(\w+)", lambda h, found: show_upload(h, found[1])),
    ("PATCH", r"/v1/uploads/(\w+)", append),
    ("POST", r"/v1/uploads/(\w+)/complete", complete),
]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def serving(world: World, port: int = 0) -> Iterator[int]:
    """Serve a world on loopback; the same world may be served again, as after a restart."""
    handler = type("Bound", (Handler,), {"world": world})
    server = Server(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    world.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
