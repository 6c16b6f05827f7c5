"""The life of a job, on both databases."""

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select

from core.artifacts.store import LocalStore
from core.db.models import Artifact, Chunk, Event, Job, Output
from core.db.session import reading, transaction
from core.errors import Conflict, LeaseLost, NotFound, OutOfMemory, SpecInvalid, WorkerLost
from core.jobs import lease, pool, scheduler, service, status
from core.jobs.lease import Claim, Stored
from core.jobs.runner import Runner
from core.jobs.states import ALLOWED, TERMINAL, JobState
from core.kinds.echo import Spec
from tests.conftest import Clock, make_runner

LEASE = timedelta(seconds=30)


def submit(engine: Engine, clock: Clock, **fields: object) -> str:
    with transaction(engine) as session:
        spec = Spec.model_validate({"kind": "echo", "text": "hi", **fields})
        return service.submit(session, spec, now=clock()).id


def claim(engine: Engine, clock: Clock, owner: str = "w1") -> Claim:
    with transaction(engine) as session:
        best = scheduler.pick(session)
        assert best is not None
        claimed = lease.claim(session, best, owner=owner, now=clock(), lease=LEASE)
    assert claimed is not None
    return claimed


def finish(engine: Engine, claimed: Claim, clock: Clock, *stored: Stored) -> None:
    with transaction(engine) as session:
        lease.finish(session, claimed, stored=stored, metrics=(), stage_done=False, now=clock())


def state(engine: Engine, job_id: str) -> str:
    with reading(engine) as session:
        return service.get(session, job_id).state


def release(engine: Engine, clock: Clock, max_failures: int = 3) -> int:
    with transaction(engine) as session:
        return lease.release_expired(session, now=clock(), max_failures=max_failures)


def _wall_clock() -> datetime:
    return datetime.now(UTC)  # noqa: TID251 - threads share no test clock


def some_file(sha256: str = "a" * 64) -> Stored:
    return Stored(
        name="text",
        role="artifact",
        sha256=sha256,
        size_bytes=1,
        format="text",
        media_type="text/plain",
        file_name="echo.txt",
        meta={},
        cache_key=None,
        cached=False,
    )


def test_a_job_runs_to_its_artifact(
    engine: Engine, clock: Clock, runner: Runner, store: LocalStore
) -> None:
    job_id = submit(engine, clock, times=3)

    while runner.run_one():
        clock.tick(seconds=1)

    with reading(engine) as session:
        job = service.get(session, job_id)
        [shown] = status.describe(session, [job], now=clock())
        types = session.scalars(select(Event.type).order_by(Event.id)).all()
    assert job.state == "succeeded"
    assert store.path(shown.artifacts["text"]).read_text() == "hi\nhi\nhi\n"
    assert (shown.progress.done, shown.progress.fraction, shown.attempts) == (3, 1, 3)
    assert types == [
        "job.submitted",
        "job.planned",
        "job.started",
        *["chunk.done"] * 3,
        "job.succeeded",
    ]
    assert list(runner.scratch.iterdir()) == []


def test_superseded_attempt_cannot_write(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)
    slow = claim(engine, clock)
    clock.tick(seconds=31)
    assert release(engine, clock) == 1
    fast = claim(engine, clock, "w2")

    with pytest.raises(LeaseLost):
        finish(engine, slow, clock, some_file())
    with pytest.raises(LeaseLost), transaction(engine) as session:
        lease.renew(session, slow, until=clock(), progress=0.5)
    with pytest.raises(LeaseLost), transaction(engine) as session:
        lease.give_up(session, slow, OutOfMemory("no"), max_failures=3, now=clock())
    with pytest.raises(LeaseLost), transaction(engine) as session:
        lease.stop(session, slow, now=clock())

    with reading(engine) as session:
        assert session.scalar(select(func.count()).select_from(Artifact)) == 0
    finish(engine, fast, clock, some_file())
    assert state(engine, job_id) == "succeeded"


def test_renewed_lease_is_not_taken_back(engine: Engine, clock: Clock) -> None:
    submit(engine, clock)
    held = claim(engine, clock)
    clock.tick(seconds=20)
    with transaction(engine) as session:
        lease.renew(session, held, until=clock() + LEASE, progress=0.5)
    clock.tick(seconds=20)

    assert release(engine, clock) == 0


def test_a_chunk_that_kills_its_workers_fails_its_job(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)

    for _ in range(3):
        assert state(engine, job_id) in {"queued", "running"}
        claim(engine, clock)
        clock.tick(seconds=31)
        release(engine, clock)

    with reading(engine) as session:
        job = service.get(session, job_id)
    assert job.state == "failed"
    assert job.error is not None
    assert job.error["code"] == WorkerLost.code()
    assert job.error["chunk"] == {"stage": "lines", "index": 0}


def test_server_restarts_are_not_counted_against_a_chunk(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)

    for _ in range(10):
        claim(engine, clock)
        with transaction(engine) as session:
            assert lease.release_all(session, owner_prefix="w", now=clock()) == 1

    finish(engine, claim(engine, clock), clock, some_file())
    assert state(engine, job_id) == "succeeded"


def test_out_of_memory_is_not_tried_again(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)
    with transaction(engine) as session:
        best = scheduler.pick(session)
        assert best is not None
        held = lease.claim(session, best, owner="w", now=clock(), lease=LEASE)
        assert held is not None
        lease.give_up(session, held, OutOfMemory("16 GiB"), max_failures=3, now=clock())

    assert state(engine, job_id) == "failed"


def test_cancel_of_a_queued_job_is_at_once(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=3)
    with transaction(engine) as session:
        assert service.cancel(session, job_id, now=clock()).state == "cancelled"

    with pytest.raises(Conflict, match="already cancelled"), transaction(engine) as session:
        service.cancel(session, job_id, now=clock())
    with reading(engine) as session:
        assert scheduler.pick(session) is None


def test_cancel_of_a_running_job_waits_for_its_chunk(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=3)
    held = claim(engine, clock)
    for _ in range(2):
        with transaction(engine) as session:
            assert service.cancel(session, job_id, now=clock()).state == "cancelling"
    with transaction(engine) as session:
        assert lease.renew(session, held, until=clock(), progress=0.1)
        lease.stop(session, held, now=clock())

    assert state(engine, job_id) == "cancelled"


def test_cancelled_while_its_worker_is_dead_ends_with_the_lease(
    engine: Engine, clock: Clock
) -> None:
    job_id = submit(engine, clock)
    claim(engine, clock)
    with transaction(engine) as session:
        service.cancel(session, job_id, now=clock())
    clock.tick(seconds=31)
    release(engine, clock)

    assert state(engine, job_id) == "cancelled"


def test_finished_work_of_a_cancelled_job_is_not_adopted(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)
    held = claim(engine, clock)
    with transaction(engine) as session:
        service.cancel(session, job_id, now=clock())
    finish(engine, held, clock, some_file())

    assert state(engine, job_id) == "cancelled"
    with reading(engine) as session:
        assert session.scalars(select(Output)).all() == []


def test_terminal_states_are_final() -> None:
    assert {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED} == TERMINAL
    assert all(ALLOWED[final] == frozenset() for final in TERMINAL)
    assert set(ALLOWED) == set(JobState)


def test_priority_then_age_decides_who_is_next(engine: Engine, clock: Clock) -> None:
    ids = []
    for priority in (50, 90, 50, 10):
        ids.append(submit(engine, clock, priority=priority))
        clock.tick(seconds=1)
    with reading(engine) as session:
        jobs = [service.get(session, job_id) for job_id in ids]
        shown = status.describe(session, jobs, now=clock())

    assert [row.queue_position for row in shown] == [2, 1, 3, 4]
    assert [claim(engine, clock).job_id for _ in ids] == [ids[1], ids[0], ids[2], ids[3]]


def test_why_a_job_waits_is_said(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)

    def why() -> str | None:
        with reading(engine) as session:
            job = service.get(session, job_id)
            return status.describe(session, [job], now=clock())[0].waits_for

    assert why() == "no worker is alive"
    with transaction(engine) as session:
        pool.hello(session, "w1", device="cpu", now=clock())
    assert why() == "next in the queue; all workers busy"
    clock.tick(seconds=31)
    assert why() == "no worker is alive"


def test_idempotency_key_answers_the_same_job(engine: Engine, clock: Clock) -> None:
    def once(body: str, text: str = "hi") -> tuple[Job, bool]:
        with transaction(engine) as session:
            return service.submit_once(
                session, Spec(text=text), key="k", body_sha256=body, now=clock()
            )

    first, replayed = once("b1")
    assert not replayed
    again, replayed = once("b1")
    assert replayed
    assert again.id == first.id
    with pytest.raises(SpecInvalid, match="another body"):
        once("b2", "other")
    clock.tick(hours=25)
    later, replayed = once("b2", "other")
    assert not replayed
    assert later.id != first.id


def test_lists_page_through_every_job_once(engine: Engine, clock: Clock) -> None:
    ids = [submit(engine, clock, labels={"n": str(i % 2)}) for i in range(7)]
    seen: list[str] = []
    cursor = None
    while True:
        with reading(engine) as session:
            page, cursor = service.list_jobs(session, limit=3, cursor=cursor)
        seen += [job.id for job in page]
        if cursor is None:
            break

    assert sorted(seen) == sorted(ids)
    with reading(engine) as session:
        odd, _ = service.list_jobs(session, limit=50, labels={"n": "1"})
        assert {job.id for job in odd} == set(ids[1::2])
        for bad in ("", "x", "eCB5", "/" * 9):
            with pytest.raises(SpecInvalid, match="cursor"):
                service.list_jobs(session, limit=3, cursor=bad)
        with pytest.raises(NotFound):
            service.get(session, "job_none")


def test_two_runners_apply_every_chunk_once(
    engine: Engine, clock: Clock, store: LocalStore, tmp_path: Path
) -> None:
    ids = [submit(engine, clock, times=4, text=f"t{i}") for i in range(10)]

    def work(owner: str) -> None:
        runner = make_runner(engine, store, _wall_clock, tmp_path, owner)
        while runner.run_one():
            pass

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    # A runner leaves when nothing is ready at that moment; what others then made ready is left.
    work("last")
    assert {state(engine, job_id) for job_id in ids} == {"succeeded"}
    with reading(engine) as session:
        chunks = session.scalars(select(Chunk)).all()
        done = session.scalar(select(func.count()).where(Event.type == "chunk.done"))
        outputs = session.scalars(select(Output).where(Output.role == "artifact")).all()
    assert {chunk.attempt for chunk in chunks} == {1}
    assert done == 40
    for output in outputs:
        assert store.path(output.sha256).read_text().count("\n") == 4
