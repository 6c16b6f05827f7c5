import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from api.deps import Context
from api.lanes import Lane
from api.looks import Glance, Looks
from api.principals import Proof
from api.problems import Busy
from api.routes.events import BATCH, STILL_S, Look, follow, look_at
from api.routes.jobs import get
from core.jobs.events import record
from core.jobs.keys import Principal
from tests import life
from tests.api.conftest import ECHO, KEY, OPERATOR, context_of, runner_of
from tests.conftest import Clock, statements

STREAM = {"Accept": "text/event-stream"}


def parse(text: str) -> list[dict[str, Any]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if fields:
            fields["data"] = json.loads(fields["data"])
            found.append(fields)
    return found


def numbered(text: str) -> list[int]:
    return [int(event["id"]) for event in parse(text) if "id" in event]


def test_page_of_events_is_in_order_and_goes_on(client: TestClient, done: dict[str, Any]) -> None:
    url = f"/v1/jobs/{done['id']}/events"
    whole = client.get(url).json()

    assert whole["next_after"] is None
    assert set(whole["items"][0]) == {"id", "job_id", "type", "at", "data"}
    assert whole["items"][0]["type"] == "job.submitted"
    assert whole["items"][-1]["type"] == "job.succeeded"
    first = client.get(f"{url}?limit=2").json()
    rest = client.get(f"{url}?after={first['next_after']}").json()
    assert first["items"] + rest["items"] == whole["items"]


def test_stream_of_a_finished_job_replays_all_and_ends(
    client: TestClient, done: dict[str, Any]
) -> None:
    url = f"/v1/jobs/{done['id']}/events"
    page = client.get(url).json()["items"]

    answer = client.get(url, headers=STREAM)

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert numbered(answer.text) == [event["id"] for event in page]
    told = [event for event in parse(answer.text) if "id" not in event]
    assert [event["event"] for event in told] == ["progress"]
    assert told[0]["data"] == done["progress"]
    assert parse(answer.text)[-1]["event"] == "job.succeeded"


@pytest.mark.parametrize("how", ["header", "query"])
def test_stream_goes_on_after_the_last_seen_event(
    client: TestClient, done: dict[str, Any], how: str
) -> None:
    url = f"/v1/jobs/{done['id']}/events"
    ids = numbered(client.get(url, headers=STREAM).text)
    seen = str(ids[1])

    headers = {**STREAM, "Last-Event-ID": seen} if how == "header" else STREAM
    answer = client.get(url if how == "header" else f"{url}?after={seen}", headers=headers)

    assert numbered(answer.text) == ids[2:]


def test_stream_after_the_last_event_ends_at_once(client: TestClient, done: dict[str, Any]) -> None:
    url = f"/v1/jobs/{done['id']}/events"
    last = numbered(client.get(url, headers=STREAM).text)[-1]

    assert numbered(client.get(f"{url}?after={last}", headers=STREAM).text) == []


@pytest.mark.parametrize("strange", ["", "abc", "-1", "9" * 40, "²"])
def test_strange_last_event_id_replays_from_the_start(
    client: TestClient, done: dict[str, Any], strange: str
) -> None:
    headers = {**STREAM, "Last-Event-ID": strange.encode("latin-1")}

    answer = client.get(f"/v1/jobs/{done['id']}/events", headers=headers)

    assert answer.status_code == 200
    assert parse(answer.text)[0]["event"] == "job.submitted"


def test_live_stream_shows_every_event_once_and_ends_with_the_job(
    client: TestClient, finish: Callable[[], None]
) -> None:
    finish()
    job_id = client.post("/v1/jobs", json={**ECHO, "times": 4}).json()["id"]
    runner = runner_of(client)

    def work() -> None:
        while runner.run_one():
            time.sleep(0.3)

    thread = threading.Thread(target=work)
    thread.start()
    answer = client.get(f"/v1/jobs/{job_id}/events", headers=STREAM)
    thread.join()

    events = parse(answer.text)
    page = client.get(f"/v1/jobs/{job_id}/events").json()["items"]
    assert numbered(answer.text) == [event["id"] for event in page]
    assert events[-1]["event"] == "job.succeeded"
    done = [event["data"]["done"] for event in events if event["event"] == "progress"]
    assert done == sorted(set(done))
    assert len(done) >= 2


def test_cancelled_job_ends_its_stream(client: TestClient) -> None:
    job_id = client.post("/v1/jobs", json=ECHO).json()["id"]
    client.post(f"/v1/jobs/{job_id}/cancel")

    answer = client.get(f"/v1/jobs/{job_id}/events", headers=STREAM)

    assert parse(answer.text)[-1]["event"] == "job.cancelled"


def test_silent_stream_sends_heartbeats_until_the_server_stops(alone: TestClient) -> None:
    job_id = alone.post("/v1/jobs", json=ECHO).json()["id"]
    context = context_of(alone)

    async def listen() -> list[str]:
        heard = []
        by = context.principals.find(Proof())
        first = await look_at(context, by, job_id, after=0)
        async for text in follow(context, by, job_id, first, 0, heartbeat_s=0.1):
            heard.append(text)
            if len(heard) == 3:
                context.stopping.set()
        return heard

    heard = asyncio.run(listen())

    assert heard[1:] == [": still here\n\n"] * 2


def test_where_all_looks_are_taken_polls_are_told_so_and_streams_live_on(
    alone: TestClient,
) -> None:
    job_id = alone.post("/v1/jobs", json=ECHO).json()["id"]
    context = context_of(alone)
    by = context.principals.find(Proof())
    places, go_on = Lane("looks at jobs", 1, wait_s=0.01), threading.Event()
    looks = Looks(
        engine=context.engine, clock=context.clock, fairness=context.fairness, places=places
    )
    context = replace(context, looks=looks)

    async def crowd() -> list[str]:
        heard = []
        first = await look_at(context, by, job_id, after=0)
        held = asyncio.ensure_future(places.run(lambda: go_on.wait(30), project="other"))
        await asyncio.sleep(0.05)
        with pytest.raises(Busy, match="looks at jobs"):
            await get(job_id, context, by)
        with pytest.raises(Busy, match="looks at jobs"):
            await look_at(context, by, job_id, after=0)
        # So long ago that the stream wants to know anew why the job waits.
        first = replace(first, at=first.at - STILL_S)
        async for text in follow(context, by, job_id, first, 0, heartbeat_s=0.1):
            heard.append(text)
            if len(heard) == 2:
                go_on.set()
                alone.post(f"/v1/jobs/{job_id}/cancel")
        await held
        return heard

    heard = asyncio.run(crowd())

    assert heard[1] == ": still here\n\n", "nothing is told twice meanwhile"
    told = parse("".join(heard))
    assert [event["event"] for event in told if "id" in event] == [
        "job.submitted",
        "job.planned",
        "job.cancelled",
    ]


def test_a_number_that_another_server_gave_out_resets_the_stream(
    client: TestClient, done: dict[str, Any]
) -> None:
    url = f"/v1/jobs/{done['id']}/events"
    page = client.get(url).json()["items"]

    told = client.get(url, headers={**STREAM, "Last-Event-ID": "999999"}).text

    assert parse(told)[0] == {"event": "reset", "data": {}}
    assert numbered(told) == [event["id"] for event in page]
    last = str(page[-1]["id"])
    assert "reset" not in client.get(url, headers={**STREAM, "Last-Event-ID": last}).text


def looks(
    context: Context, by: Principal, job_id: str, last: Look | None = None
) -> tuple[Look, list[str]]:
    """Look once more at a job; what that asked the database too."""
    after = last.events[-1].id if last is not None and last.events else 0
    with statements(context.engine) as sent:
        found = asyncio.run(look_at(context, by, job_id, after=after, last=last))
    return found, [one for one in sent if one != "BEGIN"]


def test_a_stream_without_news_costs_one_statement_a_look(
    shared: TestClient, clock: Clock, engine: Engine
) -> None:
    context = context_of(shared)
    by = context.principals.find(Proof(bearer=KEY))
    job_id = shared.post("/v1/jobs", json=ECHO, headers=OPERATOR).json()["id"]

    waits, _ = looks(context, by, job_id)
    again, sent = looks(context, by, job_id, replace(waits, at=time.monotonic()))
    assert len(sent) == 1
    assert (list(again.events), again.progress) == ([], waits.progress)
    _, sent = looks(context, by, job_id, replace(waits, at=waits.at - STILL_S))
    assert len(sent) > 1, "why a job waits changes though nothing happens to it"

    life.claim(engine, clock)
    runs, _ = looks(context, by, job_id, waits)
    assert [event.type for event in runs.events] == ["job.started"]
    _, sent = looks(context, by, job_id, replace(runs, at=runs.at - STILL_S))
    assert len(sent) == 1


class Late(Looks):
    """Tells first what was seen a while ago."""

    def __init__(self, seen: Glance, context: Context) -> None:
        super().__init__(
            engine=context.engine,
            clock=context.clock,
            fairness=context.fairness,
            places=Lane("looks at jobs", 1, wait_s=5),
        )
        self._seen = [seen]

    async def glance(self, job_id: str, *, project: str) -> Glance:
        if self._seen:
            return self._seen.pop()
        return await super().glance(job_id, project=project)


def test_a_job_that_ends_during_a_look_tells_all_its_progress_before_its_last_event(
    shared: TestClient, clock: Clock, engine: Engine
) -> None:
    context = context_of(shared)
    by = context.principals.find(Proof(bearer=KEY))
    job_id = shared.post("/v1/jobs", json={**ECHO, "times": 1}, headers=OPERATOR).json()["id"]
    claimed = life.claim(engine, clock)
    before = asyncio.run(context.looks.glance(job_id, project=by.project_id))
    assert before.shown is not None
    life.finish(engine, claimed, clock)

    found, _ = looks(replace(context, looks=Late(before, context)), by, job_id)

    assert found.over
    assert found.events[-1].type == "job.succeeded"
    assert json.loads(found.progress)["done"] == 1


def test_what_happens_during_a_look_is_shown_by_the_next(
    shared: TestClient, clock: Clock, engine: Engine
) -> None:
    context = context_of(shared)
    by = context.principals.find(Proof(bearer=KEY))
    job_id = shared.post("/v1/jobs", json=ECHO, headers=OPERATOR).json()["id"]
    claimed = life.claim(engine, clock)
    before = asyncio.run(context.looks.glance(job_id, project=by.project_id))
    life.finish(engine, claimed, clock)

    found, _ = looks(replace(context, looks=Late(before, context)), by, job_id)
    assert found.events[-1].type == "chunk.done"
    assert json.loads(found.progress)["done"] == 0
    found, _ = looks(context, by, job_id, found)

    assert not found.events
    assert json.loads(found.progress)["done"] == 1


def test_a_waiting_job_that_ends_during_a_look_ends_its_stream(
    shared: TestClient, clock: Clock, engine: Engine
) -> None:
    context = context_of(shared)
    by = context.principals.find(Proof(bearer=KEY))
    job_id = shared.post("/v1/jobs", json=ECHO, headers=OPERATOR).json()["id"]
    first, _ = looks(context, by, job_id)
    before = asyncio.run(context.looks.glance(job_id, project=by.project_id))
    shared.post(f"/v1/jobs/{job_id}/cancel", headers=OPERATOR)

    late = replace(context, looks=Late(before, context))
    found, _ = looks(late, by, job_id, replace(first, at=first.at - STILL_S))

    assert [event.type for event in found.events] == ["job.cancelled"]
    assert found.over


@pytest.mark.parametrize("more", [0, BATCH - 3, BATCH - 2, BATCH + 1])
def test_a_long_story_is_told_whole_with_its_progress_before_the_end(
    alone: TestClient, more: int
) -> None:
    job_id = alone.post("/v1/jobs", json=ECHO).json()["id"]
    with context_of(alone).transaction() as session:
        for number in range(more):
            record(session, job_id, "job.changed", now=context_of(alone).clock(), number=number)
    alone.post(f"/v1/jobs/{job_id}/cancel")
    alone.post(f"/v1/jobs/{job_id}/retry")  # is told after the end

    told = parse(alone.get(f"/v1/jobs/{job_id}/events", headers=STREAM).text)

    types = [event["event"] for event in told]
    assert types[-2:] == ["job.cancelled", "job.retried"]
    assert types.count("progress") == 1
    assert "progress" in types[:-2]
    ids = [int(event["id"]) for event in told if "id" in event]
    assert ids == sorted(set(ids))
    assert len(ids) == more + 4
