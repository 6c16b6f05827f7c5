"""Workers of team mode: real Redis, real PostgreSQL, real processes, real kills."""

import base64
import json
import logging
import os
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from kombu import Connection, Message
from sqlalchemy import select

from core.db.models import Event, Worker
from core.db.session import reading, transaction
from core.jobs import pool
from core.jobs.hints import CeleryHints, make_celery
from core.settings import Settings
from tests import life
from tests.conftest import wait_for
from tests.workers.conftest import LEASE_S, Crew, now

pytestmark = pytest.mark.parametrize("engine", ["postgresql"], indirect=True)


@pytest.fixture
def waker(crew: Crew) -> Iterator[CeleryHints]:
    settings = Settings.model_validate(
        {
            "broker_url": crew.broker.url,
            "database_url": crew.env["STILL_DATABASE_URL"],
            "api_key": "a-key-of-some-length",
        }
    )
    found = CeleryHints(make_celery(settings))
    yield found
    found.close()


def events(crew: Crew, job_id: str) -> list[str]:
    with reading(crew.engine) as session:
        return list(session.scalars(select(Event.type).where(Event.job_id == job_id)))


def started_after_s(crew: Crew, job_id: str) -> float:
    chunk = crew.chunk(job_id)
    with reading(crew.engine) as session:
        created = life.service.get(session, job_id).created_at
    assert chunk.started_at is not None
    return (chunk.started_at - created).total_seconds()


def test_a_hint_starts_a_job_at_once(crew: Crew, waker: CeleryHints) -> None:
    worker = crew.worker()
    waker.wake({"cpu": 1})  # opens the connection
    took = []
    for _ in range(8):
        time.sleep(0.1)
        job_id = crew.submit()
        waker.wake({"cpu": 1})
        wait_for(crew.in_state(job_id, "succeeded"))
        took.append(started_after_s(crew, job_id))

    assert sorted(took)[4] < 0.9, "polling alone would take 1 s on average, and 2 at most"
    assert worker.stop(signal.SIGTERM) == 0
    assert crew.pool() == [], "it left the pool"


def test_a_flush_loses_nothing(crew: Crew, waker: CeleryHints) -> None:
    crew.worker()
    jobs = []
    for _ in range(5):
        jobs.append(crew.submit())
        waker.wake({"cpu": 1})
        crew.broker.flush()
    for job_id in jobs:
        wait_for(crew.in_state(job_id, "succeeded"))

    time.sleep(0.5)
    after = crew.submit()
    waker.wake({"cpu": 1})
    wait_for(crew.in_state(after, "succeeded"))
    assert started_after_s(crew, after) < 1.5, "hints find their queue again"


def test_a_broker_that_dies_and_returns_loses_nothing(crew: Crew, waker: CeleryHints) -> None:
    worker, beat = crew.worker(), crew.beats(1)[0]
    crew.broker.process.kill()
    during = crew.submit()
    waker.wake({"cpu": 1})
    wait_for(crew.in_state(during, "succeeded"))

    time.sleep(3)
    crew.broker.process.start()
    crew.broker.wait()
    with redis.Redis.from_url(crew.broker.url) as client:
        wait_for(lambda: client.info("clients")["blocked_clients"] >= 2)
    after = crew.submit()
    wait_for(crew.in_state(after, "succeeded"))

    assert worker.alive
    assert beat.alive
    assert worker.stop(signal.SIGTERM) == 0
    assert beat.stop(signal.SIGTERM) == 0


def test_a_broker_that_dies_under_a_hint_leaves_the_consumer_free(
    crew: Crew, waker: CeleryHints
) -> None:
    taken = []

    def take(message: Message) -> None:
        crew.broker.process.kill()
        message.ack_log_error(logging.getLogger(__name__), redis.ConnectionError)
        taken.append(message)

    waker.wake({"cpu": 1})
    with waker._app.connection_for_read() as connection:
        channel = connection.default_channel
        with waker._app.amqp.TaskConsumer(channel, on_message=take) as consumer:
            consumer.qos(prefetch_count=waker._app.conf.worker_prefetch_multiplier)
            wait_for(lambda: drained(connection, taken))
            assert not taken[0].acknowledged
            assert channel.qos.can_consume()
            assert not channel.qos.prefetch_count, "however many such messages there are"
        crew.broker.process.start()
        crew.broker.wait()


def drained(connection: Connection, taken: list[Message]) -> bool:
    with suppress(TimeoutError):
        connection.drain_events(timeout=1)
    return bool(taken)


def test_a_worker_starts_and_ends_without_a_broker(crew: Crew) -> None:
    crew.broker.process.kill()
    worker = crew.worker()
    job_id = crew.submit()

    wait_for(crew.in_state(job_id, "succeeded"))
    wait_for(lambda: "the broker is away" in worker.log.read_text())

    assert worker.stop(signal.SIGTERM) == 0


def test_a_worker_told_to_end_finishes_its_chunk(crew: Crew) -> None:
    worker = crew.worker()
    job_id = crew.submit(kind="nap", seconds=2)
    other = crew.submit(kind="nap", seconds=2)
    wait_for(crew.in_state(job_id, "running"))

    assert worker.stop(signal.SIGTERM) == 0

    assert life.state(crew.engine, job_id) == "succeeded"
    assert life.state(crew.engine, other) == "queued"
    assert crew.chunk(job_id).attempt == 1
    assert crew.pool() == []


def test_a_chunk_that_outlasts_the_soft_stop_is_handed_back(crew: Crew) -> None:
    worker = crew.worker(STILL_SOFT_STOP="0.5")
    job_id = crew.submit(kind="nap", seconds=600)
    wait_for(crew.in_state(job_id, "running"))

    began = time.monotonic()
    assert worker.stop(signal.SIGTERM) == 0

    assert time.monotonic() - began < 60
    assert "chunk.handed_back" in events(crew, job_id)
    assert (crew.chunk(job_id).state, crew.chunk(job_id).failures) == ("ready", {})


def test_another_worker_takes_over_from_one_that_was_killed(crew: Crew) -> None:
    both = crew.workers(2)
    job_id = crew.submit(kind="nap", seconds=2)
    wait_for(crew.in_state(job_id, "running"))
    owner = crew.chunk(job_id).owner or ""
    victim = next(one for one in both if f":{one.pid}:" in owner)

    victim.kill()
    killed = time.monotonic()
    wait_for(lambda: crew.chunk(job_id).attempt == 2)
    noticed = time.monotonic() - killed
    wait_for(crew.in_state(job_id, "succeeded"))

    assert noticed < LEASE_S + 30, "the lease, and one look of the watch"
    assert crew.chunk(job_id).owner != owner


def test_the_beat_alone_takes_back_what_a_dead_worker_held(crew: Crew) -> None:
    crew.beats(1)
    worker = crew.worker()
    job_id = crew.submit(kind="nap", seconds=600)
    wait_for(crew.in_state(job_id, "running"))

    worker.kill()

    wait_for(lambda: crew.chunk(job_id).state == "ready", LEASE_S + 6)
    assert crew.chunk(job_id).failures == {"worker_lost": 1}


def test_two_beats_at_once_do_no_harm(crew: Crew) -> None:
    beats = crew.beats(2)
    dead = crew.submit(kind="nap", seconds=0)
    life.claim(crew.engine, now, owner="dead", rules=life.Rules(lease=life.RULES.lease * 0))
    late = crew.submit(kind="nap", seconds=600, deadline_s=1)
    crew.worker()

    wait_for(crew.in_state(dead, "succeeded"))
    wait_for(crew.in_state(late, "failed"))

    assert [beat.stop(signal.SIGTERM) for beat in beats] == [0, 0]
    assert events(crew, late).count("job.failed") == 1
    assert events(crew, dead).count("chunk.failed") == 1
    assert not list(Path.cwd().glob("celery*")), "the schedule is kept in memory"


def test_a_worker_of_a_draining_node_rests_until_it_is_taken_back(crew: Crew) -> None:
    worker = crew.worker()
    with reading(crew.engine) as session:
        node = session.scalars(select(Worker.node_id)).one()
    with transaction(crew.engine) as session:
        pool.set_node_state(session, node, "draining", note="cleaning", now=now())
    job_id = crew.submit()

    wait_for(lambda: "is draining" in worker.log.read_text())
    waits = life.state(crew.engine, job_id)
    with transaction(crew.engine) as session:
        pool.set_node_state(session, node, "active", note=None, now=now())
    wait_for(crew.in_state(job_id, "succeeded"))

    assert waits == "queued"
    assert worker.log.read_text().count("is draining") == 1


class Bomb:
    """What a pickle may do to who reads it."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (self._path,))


def test_a_pickled_message_is_never_opened(crew: Crew, tmp_path: Path) -> None:
    worker = crew.worker()
    body = pickle.dumps([[Bomb(tmp_path / "boom")], {}, {}])
    message = {
        "body": base64.b64encode(body).decode(),
        "content-encoding": "binary",
        "content-type": "application/x-python-serialize",
        "headers": {"lang": "py", "task": "jobs.run", "id": "1", "argsrepr": "", "retries": 0},
        "properties": {
            "correlation_id": "1",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "cpu"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": "1",
        },
    }
    with redis.Redis.from_url(crew.broker.url) as client:
        client.lpush("cpu", json.dumps(message))
        wait_for(lambda: client.llen("cpu") == 0)
    job_id = crew.submit()
    wait_for(crew.in_state(job_id, "succeeded"))

    assert not (tmp_path / "boom").exists()
    assert worker.alive
