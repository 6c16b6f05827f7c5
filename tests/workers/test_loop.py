"""The device loop, on both databases: chunks on one thread, the duties beside them."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, select
from sqlalchemy.exc import InternalError, OperationalError

from core.artifacts.store import LocalStore
from core.db.models import Chunk, Event, Worker
from core.db.session import reading, transaction
from core.errors import Cancelled, Conflict, LeaseLost
from core.jobs import control, housekeeping, pool, recovery
from core.jobs.heartbeat import Heartbeat
from core.jobs.lease import Rules
from core.jobs.runner import Runner
from tests.conftest import make_runner, wait_for
from tests.life import PROJECT, claim, state, submit
from tests.workers.conftest import now
from workers.loop import DeviceLoop
from workers.outages import Outages
from workers.stop import Stop

SHORT = timedelta(milliseconds=300)
LONG = timedelta(minutes=10)


@pytest.fixture
def runner(engine: Engine, store: LocalStore, tmp_path: Path) -> Runner:
    return make_runner(engine, store, now, tmp_path)


@contextmanager
def running(
    runner: Runner, *, poll: timedelta = SHORT, soft_stop: timedelta = LONG
) -> Iterator[tuple[DeviceLoop, Stop]]:
    stop = Stop()
    loop = DeviceLoop(runner, stop=stop, poll=poll, soft_stop=soft_stop, watch_every=SHORT)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield loop, stop
    finally:
        stop.tell()
        thread.join(20)
        assert not thread.is_alive()


def is_in(engine: Engine, job_id: str, wanted: str) -> Callable[[], bool]:
    return lambda: state(engine, job_id) == wanted


def the_chunk(engine: Engine, job_id: str) -> Chunk:
    with reading(engine) as session:
        return session.scalars(select(Chunk).where(Chunk.job_id == job_id)).one()


def test_a_busy_worker_takes_back_chunks_of_the_dead(engine: Engine, runner: Runner) -> None:
    victim = submit(engine, now, priority=100)
    claim(engine, now, owner="dead", rules=Rules(lease=SHORT))
    noise = submit(engine, now, times=1000)

    with running(runner, poll=timedelta(milliseconds=50)):
        wait_for(is_in(engine, victim, "succeeded"))
        still_busy = state(engine, noise) == "running"
        with reading(engine) as session:
            there = session.scalars(select(Worker.id)).all()

    assert still_busy, "the worker never was idle"
    assert there == [runner.owner]
    with reading(engine) as session:
        assert session.scalars(select(Worker.id)).all() == []


def test_draining_returns_once_all_that_was_ready_has_run(engine: Engine, runner: Runner) -> None:
    with running(runner, poll=LONG) as (loop, _):
        loop.drain()
        jobs = [submit(engine, now) for _ in range(3)]
        loop.drain()

        assert [state(engine, job_id) for job_id in jobs] == ["succeeded"] * 3


def test_draining_ends_with_the_loop(runner: Runner) -> None:
    with running(runner, poll=LONG) as (loop, stop):
        stop.tell()
        began = time.monotonic()
        loop.drain()

        assert time.monotonic() - began < 5


@pytest.mark.usefixtures("naps")
def test_a_stopped_worker_finishes_its_chunk_and_begins_no_other(
    engine: Engine, runner: Runner
) -> None:
    first = submit(engine, now, kind="nap", seconds=0.8)
    second = submit(engine, now, kind="nap")

    with running(runner) as (_, stop):
        wait_for(is_in(engine, first, "running"))
        stop.tell()

    assert state(engine, first) == "succeeded"
    assert state(engine, second) == "queued"


@pytest.mark.usefixtures("naps")
def test_a_chunk_that_outlasts_the_soft_stop_is_handed_back(engine: Engine, runner: Runner) -> None:
    job_id = submit(engine, now, kind="nap", seconds=600)

    with running(runner, soft_stop=SHORT) as (_, stop):
        wait_for(is_in(engine, job_id, "running"))
        stop.tell()

    chunk = the_chunk(engine, job_id)
    assert (chunk.state, chunk.attempt, chunk.failures) == ("ready", 1, {})


def test_a_draining_node_takes_nothing_and_says_so_once(
    engine: Engine, runner: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    node = runner.place.node

    def to(wanted: str) -> None:
        with transaction(engine) as session:
            pool.set_node_state(session, node, wanted, note=None, now=now())

    with running(runner) as (loop, _), caplog.at_level(logging.WARNING, "workers.watch"):
        wait_for(lambda: in_pool(engine, runner.owner))
        to("draining")
        wait_for(lambda: len(caplog.messages) == 1)
        job_id = submit(engine, now)
        hinted = threading.Thread(target=loop.drain)
        hinted.start()
        time.sleep(4 * SHORT.total_seconds())
        waits, holds = state(engine, job_id), hinted.is_alive()
        to("active")
        wait_for(is_in(engine, job_id, "succeeded"))
        wait_for(lambda: len(caplog.messages) == 2)
        hinted.join(10)

    assert waits == "queued"
    assert holds, "it takes no hint from workers that may work"
    assert not hinted.is_alive()
    assert f"{node} is draining" in caplog.messages[0]
    assert f"{node} is active" in caplog.messages[1]


def in_pool(engine: Engine, owner: str) -> bool:
    with reading(engine) as session:
        return session.get(Worker, owner) is not None


def test_an_outage_is_told_once_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    stop = Stop()
    outages = Outages(stop)
    stop.tell()  # no pause

    def away() -> bool:
        raise OperationalError("SELECT", {}, Exception("connection refused"))

    with caplog.at_level(logging.INFO, "workers.outages"):
        before = outages.within(LONG)
        did = [outages.surviving(step) for step in (away, away, lambda: True)]

    assert did == [False, False, True]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert not before
    assert outages.within(LONG)
    assert not outages.within(timedelta(0))


def test_a_duty_that_did_not_ask_tells_of_no_database(caplog: pytest.LogCaptureFixture) -> None:
    stop = Stop()
    outages = Outages(stop)
    stop.tell()  # no pause

    def away() -> bool:
        raise InternalError("INSERT", {}, psycopg.errors.ReadOnlySqlTransaction("a standby"))

    with caplog.at_level(logging.INFO, "workers.outages"):
        for step in (away, lambda: None, away, lambda: None, lambda: False):
            outages.surviving(step)

    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_what_nobody_foresaw_of_a_duty_ends_no_watch(engine: Engine, runner: Runner) -> None:
    failures = iter([ValueError("no such time"), OSError("a stale file handle")])

    def clock() -> datetime:
        if threading.current_thread().name == "watch":
            for error in failures:
                raise error
        return now()

    with running(replace(runner, clock=clock)):

        def is_seen() -> bool:
            with reading(engine) as session:
                return bool(pool.usable(session, now=now()))

        wait_for(is_seen)


def test_after_an_outage_the_living_get_time_to_renew(engine: Engine, runner: Runner) -> None:
    rules = Rules(lease=timedelta(seconds=1.5))
    job_id = submit(engine, now)
    claim(engine, now, owner="living", rules=replace(rules, lease=-LONG))
    stop = Stop()
    loop = DeviceLoop(
        replace(runner, rules=rules), stop=stop, poll=LONG, soft_stop=LONG, watch_every=SHORT
    )
    loop._outages.note(OperationalError("SELECT", {}, Exception("connection refused")))
    thread = threading.Thread(target=loop.run)

    thread.start()
    time.sleep(0.8)
    early = the_chunk(engine, job_id).state
    wait_for(lambda: the_chunk(engine, job_id).state == "ready")
    stop.tell()
    thread.join(20)

    assert early == "running"


@pytest.mark.parametrize("cancelled", [True, False], ids=["does not stop", "does not move"])
def test_a_chunk_that_is_stuck_ends_its_process(engine: Engine, *, cancelled: bool) -> None:
    job_id = submit(engine, now)
    rules = Rules(stop_limit=SHORT) if cancelled else Rules(stall_limit=SHORT)
    held = claim(engine, now, rules=rules)
    stuck = threading.Event()
    heart = Heartbeat(engine, held, clock=now, rules=rules, on_stuck=stuck.set)

    with heart:
        if cancelled:
            with transaction(engine) as session:
                control.cancel(session, job_id, project=PROJECT, now=now())
        assert stuck.wait(10)
        if cancelled:
            with pytest.raises(Cancelled):
                heart.report(0.5)

    with reading(engine) as session:
        types = session.scalars(select(Event.type).where(Event.job_id == job_id)).all()
    assert ("chunk.cancelled" if cancelled else "chunk.failed") in types


def test_a_chunk_whose_lease_was_taken_is_told(engine: Engine) -> None:
    submit(engine, now)
    held = claim(engine, now, owner="dead")
    recovery.release_all(engine, owner_prefix="dead", now=now(), rules=Rules())

    def told(heart: Heartbeat) -> bool:
        try:
            heart.report(0.5)
        except LeaseLost:
            return True
        return False

    with Heartbeat(engine, held, clock=now, rules=Rules(), on_stuck=lambda: None) as heart:
        wait_for(lambda: told(heart))


def test_leftovers_of_the_dead_are_removed_and_nothing_else(
    engine: Engine, store: LocalStore, tmp_path: Path
) -> None:
    submit(engine, now)
    held = claim(engine, now)
    scratch = tmp_path / "scratch"
    for name in (f"{held.chunk_id}.{held.attempt}", f"{held.chunk_id}.0", "999.1", "up_x"):
        (scratch / name).mkdir(parents=True)
    file = tmp_path / "file"
    file.write_text("orphan")
    orphan = store.put(file).sha256
    file.write_text("young")
    young = store.put(file).sha256
    old = (now() - timedelta(hours=2)).timestamp()
    os.utime(store.path(orphan), (old, old))

    removed = housekeeping.tidy(engine, store, scratch, now=now())

    assert sorted(removed) == sorted([f"{held.chunk_id}.0", "999.1", orphan])
    assert {path.name for path in scratch.iterdir()} == {
        f"{held.chunk_id}.{held.attempt}",
        "up_x",
    }
    assert store.has(young)


def test_a_database_serves_one_store(engine: Engine, store: LocalStore, tmp_path: Path) -> None:
    for _ in range(2):
        with transaction(engine) as session:
            housekeeping.bind_store(session, store.identity())
    other = LocalStore(tmp_path / "other")

    assert other.identity() == LocalStore(tmp_path / "other").identity() != store.identity()
    with pytest.raises(Conflict, match="STILL_DATA_DIR"), transaction(engine) as session:
        housekeeping.bind_store(session, other.identity())
