"""What a poll costs: nothing is held back, nothing dear is found out twice, nothing is stale."""

import socket
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.__main__ import _listen
from api.deps import LONG_QUEUE
from api.looks import Foretold
from api.views import JobPage, JobView
from core.db.models import Job
from core.jobs.waiting import Ahead
from tests import life
from tests.api.conftest import ECHO, context_of
from tests.conftest import Clock


def test_answers_on_a_connection_in_use_are_not_held_back() -> None:
    # Only for such a socket does asyncio switch off the delay of small packets.
    with _listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_what_a_poll_shows_is_what_the_document_says(
    client: TestClient, done: dict[str, Any]
) -> None:
    answer = client.get(f"/v1/jobs/{done['id']}")
    page = client.get("/v1/jobs?limit=3")

    assert answer.headers["content-type"] == page.headers["content-type"] == "application/json"
    assert JobView.model_validate(answer.json()).model_dump(mode="json") == answer.json()
    assert JobPage.model_validate(page.json()).model_dump(mode="json") == page.json()
    paths = client.get("/openapi.json").json()["paths"]
    for path, shape in (("/v1/jobs/{job_id}", "JobView"), ("/v1/jobs", "JobPage")):
        told = paths[path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert told["$ref"].endswith(f"/{shape}")


def told(words: str) -> Ahead:
    return Ahead(words, 1, None)


def dear(words: str) -> Ahead:
    until = time.thread_time() + 0.04
    while time.thread_time() < until:
        pass
    return told(words)


def queued(**changes: Any) -> Job:
    facts = {"id": "job_1", "state": "queued", "rank": 50, "chunks_over": 0, "attempts": 0}
    return Job(**{**facts, **changes})


def test_what_is_cheap_is_found_out_each_time() -> None:
    foretold = Foretold()

    assert foretold.of(queued(), lambda: told("first")).why == "first"
    assert foretold.of(queued(), lambda: told("second")).why == "second"


@pytest.mark.parametrize(
    "change", [{"state": "running"}, {"rank": 10}, {"chunks_over": 1}, {"attempts": 1}]
)
def test_what_is_dear_is_kept_until_the_job_changes(change: dict[str, Any]) -> None:
    foretold = Foretold()
    foretold.of(queued(), lambda: dear("first"))

    assert foretold.of(queued(), lambda: dear("second")).why == "first"
    assert foretold.of(queued(**change), lambda: dear("third")).why == "third"
    assert foretold.of(queued(id="job_2"), lambda: dear("other")).why == "other"


def test_what_is_dear_is_not_kept_for_long() -> None:
    foretold = Foretold()
    foretold.of(queued(), lambda: dear("first"))

    time.sleep(1.5)

    assert foretold.of(queued(), lambda: told("second")).why == "second"


@pytest.fixture
def long_queue(alone: TestClient, api_clock: Clock) -> TestClient:
    engine = context_of(alone).engine
    for _ in range(LONG_QUEUE + 1):
        life.submit(engine, api_clock)
    return alone


def test_behind_a_long_queue_a_submission_is_answered_without_its_place(
    long_queue: TestClient,
) -> None:
    sent = long_queue.post("/v1/jobs", json={**ECHO, "priority": 0}).json()

    assert (sent["queue_position"], sent["waits_for"]) == (None, "in the queue")
    shown = long_queue.get(f"/v1/jobs/{sent['id']}").json()
    assert shown["queue_position"] == LONG_QUEUE + 2
