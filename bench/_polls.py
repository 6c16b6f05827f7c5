"""Asks for pages over kept connections as fast as they are answered; a process of its own.

Requests are bytes made once, of an answer only status and length are read: little CPU per request,
and it says how much. Reads its orders as JSON from standard input, answers in JSON.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from urllib.parse import urlsplit

from bench._load import percentile


@dataclass(frozen=True)
class Order:
    """What to ask, of whom, and how long."""

    urls: Sequence[str]
    key: str | None
    paths: Sequence[str]
    seconds: float
    connections: int = 8
    warm_s: float = 1.0


@dataclass(frozen=True)
class Answered:
    """What came back within the measured time."""

    polls: int
    bad: int
    """Answers other than 200."""
    seconds: float
    asked: int
    """Answers in all, those of the warm-up too."""
    cpu_s: float
    """Of the asking process, for all of them."""
    p50_s: float
    p95_s: float

    @property
    def per_s(self) -> float:
        """Answers a second."""
        return self.polls / self.seconds


def ask_all(order: Order) -> Answered:
    """Run the order in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench._polls"],
        input=json.dumps(asdict(order)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=order.seconds + order.warm_s + 60,
    )
    return Answered(**json.loads(done.stdout))


class _Tally:
    def __init__(self) -> None:
        self.waits: list[float] = []
        self.asked = 0
        self.bad = 0
        self.counting = False


class _Line(asyncio.Protocol):
    """One connection: a request, its answer, the next."""

    def __init__(self, requests: Sequence[bytes], tally: _Tally) -> None:
        self._requests = cycle(requests)
        self._tally = tally
        self._got = bytearray()
        self._asked_at = 0.0
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._got += data
        head = self._got.find(b"\r\n\r\n")
        if head < 0 or len(self._got) < head + 4 + self._length(head):
            return
        self._tally.asked += 1
        if self._tally.counting:
            self._tally.waits.append(time.perf_counter() - self._asked_at)
            self._tally.bad += not self._got.startswith(b"HTTP/1.1 200")
        self._got.clear()
        self._ask()

    def _length(self, head: int) -> int:
        start = self._got.find(b"content-length: ", 0, head) + len(b"content-length: ")
        return int(self._got[start : self._got.find(b"\r\n", start)])

    def _ask(self) -> None:
        assert self._transport is not None
        self._asked_at = time.perf_counter()
        self._transport.write(next(self._requests))


async def _run(order: Order) -> Answered:
    tally, loop, cpu = _Tally(), asyncio.get_running_loop(), time.process_time()
    transports = []
    for number in range(order.connections):
        parts = urlsplit(order.urls[number % len(order.urls)])
        turned = [*order.paths[number:], *order.paths[:number]]
        requests = [_request(path, parts.netloc, order.key) for path in turned]
        transport, _ = await loop.create_connection(
            lambda requests=requests: _Line(requests, tally),  # type: ignore[misc]
            str(parts.hostname),
            parts.port or 80,
        )
        transports.append(transport)
    await asyncio.sleep(order.warm_s)
    start = time.perf_counter()
    tally.counting = True
    await asyncio.sleep(order.seconds)
    seconds = time.perf_counter() - start
    tally.counting = False
    for transport in transports:
        transport.abort()
    p50, p95 = percentile(tally.waits, 0.5), percentile(tally.waits, 0.95)
    cpu_s = time.process_time() - cpu
    return Answered(len(tally.waits), tally.bad, seconds, tally.asked, cpu_s, p50, p95)


def _request(path: str, host: str, key: str | None) -> bytes:
    bearer = "" if key is None else f"Authorization: Bearer {key}\r\n"
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{bearer}Accept: */*\r\n\r\n".encode()


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(_run(Order(**json.load(sys.stdin)))))))
