"""What comes back by itself: leases, deadlines, attempts, nodes that fail."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import pytest
from pydantic import ValidationError
from sqlalchemy import Engine, func, select

from core.db.models import Chunk, Event, Project
from core.db.session import reading
from core.errors import (
    ChunkCrashed,
    DataInvalid,
    LeaseLost,
    NotFound,
    OutOfMemory,
    Stalled,
    StillroomError,
    WorkerLost,
)
from core.jobs import control, lease, recovery
from core.jobs.lease import Rules
from core.settings import Settings
from tests.conftest import Clock
from tests.core.jobs.acts import (
    chunk_states,
    chunks_of,
    copies,
    crash,
    fanned,
    fit,
    hand_back,
    job_of,
    project,
    within,
    worker,
)
from tests.life import (
    PROJECT,
    RULES,
    claim,
    finish,
    give_up,
    pick,
    place,
    some_file,
    state,
    submit,
    try_claim,
)

T = TypeVar("T")


def together(work: Callable[[int], T], count: int = 3) -> list[T]:
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(work, range(count)))


def tick(engine: Engine, clock: Clock) -> tuple[int, int]:
    tally = recovery.tick(engine, now=clock(), rules=RULES)
    return tally.released, tally.overdue


def failures(engine: Engine, job_id: str) -> dict[str, Any]:
    return chunks_of(engine, job_id)[0].failures


def test_a_lease_runs_out_and_not_before(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)
    worker(engine, clock)
    held = claim(engine, clock)
    clock.tick(seconds=RULES.lease.total_seconds())
    assert tick(engine, clock) == (0, 0)

    clock.tick(seconds=0.001)
    assert tick(engine, clock) == (1, 0)
    assert tick(engine, clock) == (0, 0)

    [chunk] = chunks_of(engine, job_id)
    assert (chunk.state, chunk.failures, chunk.failed_on) == (
        "ready",
        {"worker_lost": 1},
        "host:w1",
    )
    assert job_of(engine, job_id).device_seconds == pytest.approx(20.001)
    with pytest.raises(LeaseLost):
        finish(engine, held, clock, some_file())


def test_reconcilers_at_once_release_and_end_everything_once(engine: Engine, clock: Clock) -> None:
    jobs = [submit(engine, clock) for _ in range(6)]
    for number in range(6):
        claim(engine, clock, f"w{number}")
    late = [submit(engine, clock, deadline_s=5) for _ in range(6)]
    clock.tick(seconds=30)

    tallies = together(lambda _: tick(engine, clock))

    assert sum(released for released, _ in tallies) == 6
    assert sum(overdue for _, overdue in tallies) == 6
    assert [failures(engine, job_id) for job_id in jobs] == [{"worker_lost": 1}] * 6
    assert {state(engine, job_id) for job_id in late} == {"failed"}
    with reading(engine) as session:
        told = select(Event.type, func.count()).group_by(Event.type)
        counted = dict(map(tuple, session.execute(told)))
    assert (counted["chunk.failed"], counted["job.failed"]) == (6, 6)


def test_a_server_that_starts_takes_each_chunk_back_once(engine: Engine, clock: Clock) -> None:
    """Though two of it start at once, and though the chunks' workers are alive and finish them."""
    first = submit(engine, clock)
    copies(engine, first, 7)
    held = [claim(engine, clock, f"w{number}") for number in range(8)]
    clock.tick(seconds=4)

    def work(number: int) -> int:
        if number < 2:
            return recovery.release_all(engine, owner_prefix="w", now=clock(), rules=RULES)
        ended = 0
        for one in held[::2]:
            try:
                finish(engine, one, clock)
            except LeaseLost:
                continue
            ended += 1
        return ended

    assert sum(together(work)) == 8
    with reading(engine) as session:
        states = session.execute(select(Chunk.state, Chunk.seconds)).all()
    assert {seconds for _, seconds in states} == {4.0}
    assert {found for found, _ in states} <= {"done", "ready"}
    for one in held:
        job, [chunk] = job_of(engine, one.job_id), chunks_of(engine, one.job_id)
        assert job.device_seconds == 4.0
        assert (job.state == "succeeded") == (chunk.state == "done")


def test_only_the_chunks_of_that_server_come_back(engine: Engine, clock: Clock) -> None:
    mine, other = submit(engine, clock), submit(engine, clock)
    names = {claim(engine, clock, owner).job_id: owner for owner in ("a_1:x", "ab1:x")}
    assert set(names) == {mine, other}

    assert recovery.release_all(engine, owner_prefix="a_", now=clock(), rules=RULES) == 1

    assert {names[one]: state(engine, one) for one in names} == {
        "a_1:x": "running",
        "ab1:x": "running",
    }
    assert {names[one]: chunk_states(engine, one) for one in names} == {
        "a_1:x": ["ready"],
        "ab1:x": ["running"],
    }
    assert failures(engine, mine) == failures(engine, other) == {}


def test_a_job_cancelled_or_paused_ends_so_though_its_worker_is_dead(
    engine: Engine, clock: Clock
) -> None:
    about: dict[str, Any] = {"project": PROJECT, "now": clock()}
    for change, ends in ((control.cancel, "cancelled"), (control.pause, "paused")):
        for restart in (False, True):
            job_id = submit(engine, clock)
            claim(engine, clock)
            within(engine, change, job_id, **about)
            if restart:
                recovery.release_all(engine, owner_prefix="w", now=clock(), rules=RULES)
            else:
                clock.tick(seconds=30)
                assert tick(engine, clock) == (1, 0)
            assert state(engine, job_id) == ends
            assert try_claim(engine, clock) is None


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_every_error_says_how_often_its_chunk_is_tried(engine: Engine, clock: Clock) -> None:
    table: list[tuple[StillroomError, int]] = [
        (WorkerLost("x"), 5),
        (ChunkCrashed("x"), 3),
        (Stalled("x"), 2),
        (OutOfMemory("x"), 1),
        (DataInvalid("x"), 1),
        (NotFound("x"), 1),
    ]
    for error, tries in table:
        assert _tries(engine, clock, error, RULES) == tries


def _tries(engine: Engine, clock: Clock, error: StillroomError, rules: Rules) -> int:
    job_id = submit(engine, clock)
    for tries in range(1, 200):
        give_up(engine, claim(engine, clock), error, clock, rules)
        clock.tick(days=1)
        if state(engine, job_id) == "failed":
            told = job_of(engine, job_id).error or {}
            assert told["code"] == error.code()
            assert chunks_of(engine, job_id)[0].failures == {error.code(): tries}
            return tries
    raise AssertionError("tried for ever")


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_the_operator_says_otherwise(engine: Engine, clock: Clock) -> None:
    rules = Rules.of(Settings(attempts={"worker_lost": 2, "chunk_crashed": 100}))

    assert _tries(engine, clock, WorkerLost("x"), rules) == 2
    assert _tries(engine, clock, ChunkCrashed("x"), rules) == 100
    assert _tries(engine, clock, Stalled("x"), rules) == 2
    assert _tries(engine, clock, OutOfMemory("x"), rules) == 1
    for code in ("out_of_memory", "chunk_crash"):
        with pytest.raises(ValidationError, match="chunk_crashed, stalled, worker_lost"):
            Settings(attempts={code: 9})


def test_errors_of_two_classes_are_counted_apart(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)
    for error in (ChunkCrashed("x"), Stalled("x"), ChunkCrashed("x"), WorkerLost("x")):
        crash(engine, claim(engine, clock), clock, error)
        clock.tick(minutes=1)

    assert state(engine, job_id) == "running"
    assert failures(engine, job_id) == {"chunk_crashed": 2, "stalled": 1, "worker_lost": 1}
    finish(engine, claim(engine, clock), clock)
    assert (state(engine, job_id), job_of(engine, job_id).attempts) == ("succeeded", 5)


def test_what_is_handed_back_is_no_failure_and_ready_at_once(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)
    for _ in range(9):
        held = claim(engine, clock)
        clock.tick(seconds=1)
        hand_back(engine, held, clock)

    job, [chunk] = job_of(engine, job_id), chunks_of(engine, job_id)
    assert (job.state, job.attempts, job.device_seconds) == ("running", 9, 9.0)
    assert (chunk.state, chunk.failures, chunk.retry_at) == ("ready", {}, None)


def test_another_node_may_try_at_once_the_same_one_later(engine: Engine, clock: Clock) -> None:
    submit(engine, clock)
    for wait in (5, 10):
        crash(engine, claim(engine, clock), clock)
        clock.tick(seconds=wait - 0.001)
        assert pick(engine, clock, at=place("host:w1")) is None
        assert pick(engine, clock, at=place("host:w2")) is not None
        clock.tick(seconds=0.001)
        assert pick(engine, clock, at=place("host:w1")) is not None


def test_the_wait_where_a_chunk_failed_has_an_end(engine: Engine, clock: Clock) -> None:
    patient = Rules(attempts={"chunk_crashed": 100})
    job_id = submit(engine, clock)
    for _ in range(20):
        give_up(engine, claim(engine, clock), ChunkCrashed("x"), clock, patient)
        [chunk] = chunks_of(engine, job_id)
        assert chunk.retry_at is not None
        assert clock() < chunk.retry_at <= clock() + timedelta(hours=1)
        clock.now = chunk.retry_at


def test_a_deadline_ends_a_job_in_any_state_and_what_waits_for_it(
    engine: Engine, clock: Clock
) -> None:
    about: dict[str, Any] = {"project": PROJECT, "now": clock()}
    running = submit(engine, clock, deadline_s=10)
    held = claim(engine, clock)
    paused, queued = (submit(engine, clock, deadline_s=10) for _ in range(2))
    within(engine, control.pause, paused, **about)
    upstream = fit(engine, clock)
    waiting = submit(engine, clock, kind="cache_targets", model=f"{upstream}/model", deadline_s=10)
    below = submit(
        engine, clock, kind="distill", model=f"{upstream}/model", targets=f"{waiting}/targets"
    )
    in_time = submit(engine, clock, deadline_s=11)
    clock.tick(seconds=10)
    assert tick(engine, clock) == (0, 0), "at the deadline it is not late yet"
    clock.tick(seconds=0.5)

    assert tick(engine, clock) == (0, 4)

    for job_id in (running, paused, queued, waiting):
        job = job_of(engine, job_id)
        assert job.error is not None
        assert (job.state, job.error["code"]) == ("failed", "deadline_passed")
        assert "2026-01-01 00:00:10 UTC" in job.error["message"]
        assert set(chunk_states(engine, job_id)) <= {"cancelled"}
    assert (job_of(engine, below).error or {})["code"] == "upstream_failed"
    assert [state(engine, one) for one in (upstream, in_time)] == ["queued", "queued"]
    with pytest.raises(LeaseLost):
        finish(engine, held, clock)


def test_what_runs_when_its_job_ends_is_paid_all_the_same(engine: Engine, clock: Clock) -> None:
    """Else a project with short deadlines would use the pool for nothing."""
    one = project(engine, clock, "one")
    late = fanned(engine, clock, project=one, deadline_s=10)
    held = [claim(engine, clock, f"w{number}") for number in range(2)]
    clock.tick(seconds=12)
    assert tick(engine, clock) == (0, 1)
    failing = fanned(engine, clock, project=one)
    more = [claim(engine, clock, f"w{number}") for number in range(2)]
    clock.tick(seconds=3)
    give_up(engine, more[0], OutOfMemory("no"), clock)

    assert job_of(engine, late).device_seconds == 24.0
    assert job_of(engine, failing).device_seconds == 6.0
    assert sum(chunk.seconds for chunk in chunks_of(engine, late)) == 24.0
    with reading(engine) as session:
        assert session.get_one(Project, one).usage == pytest.approx(30.0, rel=1e-3)
    for claimed in (*held, *more):
        with pytest.raises(LeaseLost):
            within(engine, lease.renew, claimed, until=clock(), progress=0.5)


def test_who_cancels_before_the_deadline_has_cancelled(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, deadline_s=5)
    held = claim(engine, clock)
    within(engine, control.cancel, job_id, project=PROJECT, now=clock())
    clock.tick(seconds=6)

    assert recovery.fail_overdue(engine, now=clock(), rules=RULES) == 0
    within(engine, lease.stop, held, now=clock(), rules=RULES)
    assert state(engine, job_id) == "cancelled"


def test_a_clock_set_back_takes_no_device_time_away(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)
    held = claim(engine, clock)
    clock.tick(hours=-1)
    finish(engine, held, clock)

    assert job_of(engine, job_id).device_seconds == 0
    with reading(engine) as session:
        assert session.get_one(Project, PROJECT).usage >= 0
