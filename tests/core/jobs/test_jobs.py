"""The life of a job, on both databases."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from core.artifacts.store import LocalStore
from core.db.models import Artifact, Chunk, Event, Job, Output
from core.db.session import reading, transaction
from core.errors import Conflict, LeaseLost, NotFound, OutOfMemory, SpecInvalid, WorkerLost
from core.jobs import control, lease, pool, recovery, service, status
from core.jobs.runner import Runner
from core.jobs.states import ALLOWED, TERMINAL, JobState
from core.kinds.echo import Spec
from tests.conftest import Clock, make_runner
from tests.life import (
    BY,
    PROJECT,
    RULES,
    claim,
    finish,
    give_up,
    glance,
    pick,
    place,
    release,
    shown,
    some_file,
    state,
    submit,
)


def _wall_clock() -> datetime:
    return datetime.now(UTC)  # noqa: TID251 - threads share no test clock


def test_a_job_runs_to_its_artifact(
    engine: Engine, clock: Clock, runner: Runner, store: LocalStore
) -> None:
    job_id = submit(engine, clock, times=3)

    while runner.run_one():
        clock.tick(seconds=1)

    with reading(engine) as session:
        job = service.get(session, job_id)
        [seen] = status.describe(session, [job], now=clock())
        types = session.scalars(select(Event.type).order_by(Event.id)).all()
    assert job.state == "succeeded"
    assert store.path(seen.artifacts["text"]).read_text() == "hi\nhi\nhi\n"
    assert (seen.progress.done, seen.progress.fraction, job.attempts) == (3, 1, 3)
    assert types == [
        "job.submitted",
        "job.planned",
        "job.started",
        *["chunk.done"] * 3,
        "job.succeeded",
    ]
    assert list(runner.scratch.iterdir()) == []


def test_a_glance_tells_of_jobs_that_do_not_wait(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=2)
    assert glance(engine, job_id, clock()) is None, "it waits: there is more to tell"
    held = claim(engine, clock)
    clock.tick(seconds=4)
    with transaction(engine) as session:
        lease.renew(session, held, until=clock(), progress=0.5)

    running = glance(engine, job_id, clock())
    assert running is not None
    assert running == shown(engine, job_id, clock)
    assert running.progress.done == 0.5
    finish(engine, held, clock, some_file("c" * 64))  # the last one made is what is offered
    assert glance(engine, job_id, clock()) is None
    finish(engine, claim(engine, clock), clock, some_file(), some_file("b" * 64, name="more"))
    over = glance(engine, job_id, clock())
    assert over is not None
    assert over == shown(engine, job_id, clock)
    assert over.artifacts == {"text": "a" * 64, "more": "b" * 64}
    assert glance(engine, "job_none", clock()) is None


def _glance(session: Session, *, job_id: str) -> object:
    return status.glance(session.connection(), [job_id])


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
@pytest.mark.parametrize("as_it_is", ["queued", "cancelled"])
def test_a_look_at_a_job_of_which_nothing_runs_reads_none_of_its_chunks(
    engine: Engine, clock: Clock, as_it_is: str
) -> None:
    def steps_of(look: Callable[[Session], object]) -> int:
        taken: list[None] = []
        with reading(engine) as session:
            driver: Any = session.connection().connection.dbapi_connection
            driver.set_progress_handler(lambda: taken.append(None), 1)
            look(session)
            driver.set_progress_handler(None, 1)
        return len(taken)

    steps = []
    for chunks in (2, 500):
        job_id = submit(engine, clock, times=chunks)
        if as_it_is == "cancelled":
            with transaction(engine) as session:
                control.cancel(session, job_id, project=PROJECT, now=clock())
        with reading(engine) as session:
            job = service.get(session, job_id)
        glances = partial(_glance, job_id=job_id)
        pages = partial(status.describe, jobs=[job], now=clock())
        steps.append([steps_of(glances), steps_of(pages)])

    assert steps[0] == steps[1]
    assert min(steps[0]) > 0


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
        lease.give_up(session, slow, OutOfMemory("no"), now=clock(), rules=RULES)
    with pytest.raises(LeaseLost), transaction(engine) as session:
        lease.stop(session, slow, now=clock(), rules=RULES)
    with pytest.raises(LeaseLost), transaction(engine) as session:
        lease.hand_back(session, slow, now=clock(), rules=RULES)

    with reading(engine) as session:
        assert session.scalar(select(func.count()).select_from(Artifact)) == 0
    finish(engine, fast, clock, some_file())
    assert state(engine, job_id) == "succeeded"


def test_renewed_lease_is_not_taken_back(engine: Engine, clock: Clock) -> None:
    submit(engine, clock)
    held = claim(engine, clock)
    clock.tick(seconds=15)
    with transaction(engine) as session:
        lease.renew(session, held, until=clock() + RULES.lease, progress=0.5)
    clock.tick(seconds=15)

    assert release(engine, clock) == 0


def test_a_chunk_that_kills_its_workers_fails_its_job(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)

    for attempt in range(WorkerLost.attempts):
        assert state(engine, job_id) in {"queued", "running"}
        claim(engine, clock, f"w{attempt}")
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
        assert recovery.release_all(engine, owner_prefix="w", now=clock(), rules=RULES) == 1

    finish(engine, claim(engine, clock), clock, some_file())
    assert state(engine, job_id) == "succeeded"


def test_out_of_memory_is_not_tried_again(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)
    give_up(engine, claim(engine, clock), OutOfMemory("16 GiB"), clock)

    assert state(engine, job_id) == "failed"


def test_cancel_of_a_queued_job_is_at_once(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=3)
    with transaction(engine) as session:
        assert control.cancel(session, job_id, project=PROJECT, now=clock()).state == "cancelled"

    with pytest.raises(Conflict, match="already cancelled"), transaction(engine) as session:
        control.cancel(session, job_id, project=PROJECT, now=clock())
    assert pick(engine, clock) is None


def test_cancel_of_a_running_job_waits_for_its_chunk(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=3)
    held = claim(engine, clock)
    for _ in range(2):
        with transaction(engine) as session:
            assert (
                control.cancel(session, job_id, project=PROJECT, now=clock()).state == "cancelling"
            )
    with transaction(engine) as session:
        assert lease.renew(session, held, until=clock(), progress=0.1) == "cancelling"
        lease.stop(session, held, now=clock(), rules=RULES)

    assert state(engine, job_id) == "cancelled"


def test_cancelled_while_its_worker_is_dead_ends_with_the_lease(
    engine: Engine, clock: Clock
) -> None:
    job_id = submit(engine, clock)
    claim(engine, clock)
    with transaction(engine) as session:
        control.cancel(session, job_id, project=PROJECT, now=clock())
    clock.tick(seconds=31)
    release(engine, clock)

    assert state(engine, job_id) == "cancelled"


def test_finished_work_of_a_cancelled_job_is_not_adopted(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)
    held = claim(engine, clock)
    with transaction(engine) as session:
        control.cancel(session, job_id, project=PROJECT, now=clock())
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
    with transaction(engine) as session:
        pool.hello(session, "w1", place=place(), now=clock())

    assert [shown(engine, job_id, clock).queue_position for job_id in ids] == [2, 1, 3, 4]
    assert [claim(engine, clock).job_id for _ in ids] == [ids[1], ids[0], ids[2], ids[3]]


def test_idempotency_key_answers_the_same_job(engine: Engine, clock: Clock) -> None:
    def once(body: str, text: str = "hi") -> tuple[Job, bool]:
        with transaction(engine) as session:
            about = {"project": PROJECT, "by": BY, "now": clock()}
            return service.submit_once(session, Spec(text=text), key="k", body_sha256=body, **about)

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
