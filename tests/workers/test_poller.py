"""The embedded worker: takes chunks of the dead while busy, and ends what will not end."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from core.artifacts.store import LocalStore
from core.db.models import Chunk, Worker
from core.db.session import make_engine, reading, transaction, upgrade
from core.errors import Cancelled, Conflict, LeaseLost
from core.jobs import housekeeping, lease, scheduler, service
from core.jobs.heartbeat import Heartbeat
from core.jobs.lease import Claim, Rules
from core.kinds.echo import Spec
from tests.conftest import make_runner
from workers.poller import Poller

SHORT = timedelta(milliseconds=300)


def now() -> datetime:
    return datetime.now(UTC)  # noqa: TID251 - threads and processes share no test clock


def submit(engine: Engine, **fields: object) -> str:
    with transaction(engine) as session:
        spec = Spec.model_validate({"kind": "echo", "text": "hi", **fields})
        return service.submit(session, spec, now=now()).id


def claim(engine: Engine, lease_for: timedelta) -> Claim:
    with transaction(engine) as session:
        best = scheduler.pick(session)
        assert best is not None
        found = lease.claim(session, best, owner="dead", now=now(), lease=lease_for)
    assert found is not None
    return found


def wait_for(true: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def state(engine: Engine, job_id: str) -> str:
    with reading(engine) as session:
        return service.get(session, job_id).state


def test_a_busy_worker_takes_back_chunks_of_the_dead(
    engine: Engine, store: LocalStore, tmp_path: Path
) -> None:
    victim = submit(engine, priority=100)
    claim(engine, SHORT)
    noise = submit(engine, times=1000)
    runner = replace(make_runner(engine, store, now, tmp_path), rules=Rules(lease=SHORT))
    poller = Poller(runner, poll=timedelta(milliseconds=50), watch_every=SHORT)
    thread = threading.Thread(target=poller.run)
    thread.start()

    wait_for(lambda: state(engine, victim) == "succeeded")
    still_busy = state(engine, noise) == "running"
    with reading(engine) as session:
        there = session.scalars(select(Worker.id)).all()
    poller.stop()
    thread.join(20)

    assert still_busy, "the worker never was idle"
    assert there == [runner.owner]
    with reading(engine) as session:
        assert session.scalars(select(Worker.id)).all() == []


@pytest.mark.parametrize("cancelled", [True, False], ids=["does not stop", "does not move"])
def test_a_chunk_that_is_stuck_ends_its_process(engine: Engine, *, cancelled: bool) -> None:
    job_id = submit(engine)
    held = claim(engine, timedelta(seconds=30))
    stuck = threading.Event()
    limits = {"stop_limit": SHORT} if cancelled else {"stall_limit": SHORT}
    heart = Heartbeat(engine, held, clock=now, rules=Rules(**limits), on_stuck=stuck.set)

    with heart:
        if cancelled:
            with transaction(engine) as session:
                service.cancel(session, job_id, now=now())
        assert stuck.wait(10)
        if cancelled:
            with pytest.raises(Cancelled):
                heart.report(0.5)


def test_a_chunk_whose_lease_was_taken_is_told(engine: Engine) -> None:
    submit(engine)
    held = claim(engine, timedelta(seconds=30))
    with transaction(engine) as session:
        lease.release_all(session, owner_prefix="dead", now=now())

    with Heartbeat(engine, held, clock=now, rules=Rules(), on_stuck=lambda: None) as heart:
        time.sleep(1.5)
        with pytest.raises(LeaseLost):
            heart.report(0.5)


def test_leftovers_of_the_dead_are_removed_and_nothing_else(
    engine: Engine, store: LocalStore, tmp_path: Path
) -> None:
    submit(engine)
    held = claim(engine, timedelta(seconds=30))
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


def test_the_worker_process_ends_with_its_server(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 'stillroom.db'}")
    upgrade(engine)
    job_id = submit(engine, times=3)
    env = {**os.environ, "STILL_DATA_DIR": str(tmp_path), "STILL_POLL": "PT0.05S"}  # noqa: TID251
    with subprocess.Popen(
        [sys.executable, "-m", "workers", "--device", "cpu"],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=env,
    ) as worker:
        wait_for(lambda: state(engine, job_id) == "succeeded")
        assert worker.poll() is None
        assert worker.stdin is not None
        worker.stdin.close()
        assert worker.wait(10) == 0
    with reading(engine) as session:
        owners = set(session.scalars(select(Chunk.owner)))
    engine.dispose()
    assert all(owner and owner.endswith(f":{worker.pid}:cpu") for owner in owners)


@pytest.mark.parametrize("device", ["gpu", "cuda", "cpu:0", "cuda:x"])
def test_an_unknown_device_is_a_usage_error(device: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "workers", "--device", device],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )

    assert done.returncode == 2
    assert device in done.stderr
