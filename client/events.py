"""Follow a job's events over SSE; a cut stream is taken up where it was left."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2

from client.errors import StillroomError
from client.references import job_path
from client.views import TERMINAL, Job
from client.wire import Patience, Wire

LAST = frozenset(f"job.{state}" for state in TERMINAL)
RESET = "reset"
SILENCE_S = 45.0
"""The server says something every 15 s; three missed heartbeats are an outage."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a job. ``progress`` and ``reset`` events carry no number."""

    id: int | None
    type: str
    data: dict[str, Any]


def follow(wire: Wire, job_id: str, *, after: int) -> Iterator[Event]:
    """Yield every event numbered above ``after``, once each, until the job's last one.

    A server that does not know the number says `reset`, which is passed on, and starts over.
    """
    patience = Patience(wire)
    while True:
        began = after
        try:
            for event in _stream(wire, job_id, after, patience):
                patience.worked()
                if event.id is not None and event.id <= after:
                    continue
                if event.type == RESET:
                    after = 0
                after = after if event.id is None else event.id
                yield event
                if event.type in LAST:
                    return
        except StillroomError as error:
            patience.after(error)
            continue
        if after == began and _over(wire, job_id):
            return
        patience.pause()


def _stream(wire: Wire, job_id: str, after: int, patience: Patience) -> Iterator[Event]:
    """Yield the events of one connection."""
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
    timeout = httpx2.Timeout(wire.http.timeout.connect, read=SILENCE_S)
    path = job_path(job_id, "events")
    with wire.stream("GET", path, headers=headers, timeout=timeout) as response:
        patience.answered()
        for sent in httpx2.EventSource(response):
            yield _read(sent)


def _read(sent: httpx2.ServerSentEvent) -> Event:
    try:
        data = json.loads(sent.data) if sent.data else {}
    except ValueError:
        data = {}
    # The SSE rules keep the last id for events without one; only these two come without.
    numbered = sent.event not in ("progress", RESET) and sent.id.isdigit()
    data = data if isinstance(data, dict) else {}
    return Event(int(sent.id) if numbered else None, sent.event, data)


def _over(wire: Wire, job_id: str) -> bool:
    """Whether nothing more can come: the stream ended empty and the job is finished."""
    job: Job = wire.call("GET", job_path(job_id))
    return job["state"] in TERMINAL
