"""Messages that no library can read, and a Redis that answers with errors, end no process."""

import base64
import json
import time
import uuid
from collections.abc import Iterator

import pytest
import redis

from scripts.processes import Process
from tests.conftest import wait_for
from tests.workers.conftest import Crew

pytestmark = pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
QUEUES = {"cpu": "jobs.run", "control": "jobs.tick"}
RESTS = 16
"""Seconds: a consumer that ends three times rests 1, 2 and 4 of them."""


def message(queue: str, *, body: bytes = b"[[], {}, {}]", raw: str = "", **other: str) -> str:
    """Return a message for ``queue`` as Celery would write it, but for what is told."""
    return json.dumps(
        {
            "body": raw or base64.b64encode(body).decode(),
            "content-encoding": "utf-8",
            "content-type": other.get("content_type", "application/json"),
            "headers": {"lang": "py", "task": QUEUES[queue], "id": str(uuid.uuid4()), "retries": 0},
            "properties": {
                "delivery_info": {"exchange": "", "routing_key": queue},
                "delivery_tag": str(uuid.uuid4()),
                "body_encoding": other.get("body_encoding", "base64"),
                "priority": 0,
                "delivery_mode": 2,
            },
        }
    )


def poisons(queue: str) -> dict[str, str | bytes]:
    """Return the bad messages, by what is wrong with them."""
    arguments = b'["cpu"], {}' if queue == "cpu" else b"[], {}"
    embed = b"[%s, " % arguments + b'{"callbacks": 3, "errbacks": "x", "chain": [7], "chord": 3}]'
    return {
        "garbage": "garbage",
        "empty": "",
        "null": "null",
        "list": "[]",
        "object": "{}",
        "binary": b"\xff\xfe\x80\x04",
        "deep": "[" * 200_000,
        "deep body": message(queue, body=b"[" * 100_000),
        "body encoding": message(queue, body_encoding="rot13"),
        "embed": message(queue, body=embed),
        "number": message(queue, body=b"7"),
        "object as body": message(queue, body=b'{"a": 1}'),
        "base64": message(queue, raw="%%%"),
        "content type": message(queue, content_type="application/data"),
    }


@pytest.fixture
def team(crew: Crew) -> Iterator[tuple[Process, Process]]:
    """A worker and a beat that both wait for messages."""
    team = crew.worker(), crew.beats(1)[0]
    with redis.Redis.from_url(crew.broker.url) as client:
        wait_for(lambda: waiting(client))
    yield team
    assert all(process.alive for process in team)


def waiting(client: redis.Redis) -> bool:
    return int(client.info("clients")["blocked_clients"]) >= 2


@pytest.mark.parametrize("name", poisons("cpu"))
def test_a_bad_message_ends_no_process_and_does_not_return(
    crew: Crew, team: tuple[Process, Process], name: str
) -> None:
    with redis.Redis.from_url(crew.broker.url) as client:
        for queue in QUEUES:
            client.lpush(queue, poisons(queue)[name])
        time.sleep(0.5)
        after = crew.submit()

        wait_for(crew.in_state(after, "succeeded"))
        wait_for(lambda: waiting(client), RESTS)
        wait_for(lambda: client.hlen("unacked") == 0, RESTS)
    assert all("another in 0:00:04" not in one.log.read_text() for one in team)


@pytest.mark.parametrize("wrong", ["read only", "wrong type"])
def test_a_broker_that_answers_with_errors_ends_no_process(
    crew: Crew, team: tuple[Process, Process], wrong: str
) -> None:
    with redis.Redis.from_url(crew.broker.url) as client:
        if wrong == "read only":
            client.replicaof("127.0.0.1", 1)
        else:
            client.delete(*QUEUES)
            client.mset(dict.fromkeys(QUEUES, "no list"))
        time.sleep(3)
        during = crew.submit()
        wait_for(crew.in_state(during, "succeeded"))
        if wrong == "read only":
            client.replicaof("NO", "ONE")

        wait_for(lambda: waiting(client), RESTS)
    after = crew.submit()
    wait_for(crew.in_state(after, "succeeded"))


def test_the_log_of_a_worker_names_the_jobs_it_ran(crew: Crew) -> None:
    worker = crew.worker()
    job_id = crew.submit()
    wait_for(crew.in_state(job_id, "succeeded"))

    wait_for(lambda: job_id in worker.log.read_text(), 5)
    [line] = [json.loads(line) for line in worker.log.read_text().splitlines() if job_id in line]

    assert line["level"] == "info"
    assert (line["job"], line["attempt"]) == (job_id, 1)
    assert ": done, " in line["message"]
