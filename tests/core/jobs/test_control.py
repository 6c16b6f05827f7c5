"""What people do to a job's life, and what the table of states makes of it."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, select

from core.db.models import Event, Job
from core.db.session import reading, transaction
from core.errors import (
    Conflict,
    LeaseLost,
    NotFound,
    OutOfMemory,
    SpecInvalid,
    WorkerLost,
)
from core.jobs import control, lease, recovery
from core.jobs.adoption import Stored
from tests.conftest import Clock
from tests.core.jobs.acts import (
    MADE_MODEL,
    chunk_states,
    crash,
    fanned,
    fit,
    hand_back,
    job_of,
    pairs,
    project,
    within,
)
from tests.life import (
    BY,
    PROJECT,
    RULES,
    claim,
    finish,
    give_up,
    pick,
    shown,
    some_file,
    state,
    submit,
    try_claim,
)


def pause(engine: Engine, job_id: str, clock: Clock) -> str:
    return within(engine, control.pause, job_id, project=PROJECT, now=clock()).state


def resume(engine: Engine, job_id: str, clock: Clock) -> str:
    return within(engine, control.resume, job_id, project=PROJECT, now=clock()).state


def cancel(engine: Engine, job_id: str, clock: Clock) -> str:
    return within(engine, control.cancel, job_id, project=PROJECT, now=clock()).state


def test_a_paused_job_keeps_its_place_and_no_worker_takes_it(engine: Engine, clock: Clock) -> None:
    first = submit(engine, clock)
    clock.tick(seconds=1)
    second = submit(engine, clock)

    assert pause(engine, first, clock) == "paused"
    assert pause(engine, first, clock) == "paused", "asked twice: the same"
    found = pick(engine, clock)
    assert found is not None
    assert found.job_id == second
    assert shown(engine, first, clock).waits_for == "paused; resume it to go on"
    assert resume(engine, first, clock) == "queued"
    assert claim(engine, clock).job_id == first


def test_a_running_job_pauses_when_its_chunk_is_handed_back(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=2)
    held = claim(engine, clock)
    clock.tick(seconds=3)

    assert pause(engine, job_id, clock) == "pausing"
    with transaction(engine) as session:
        assert lease.renew(session, held, until=clock(), progress=0.1) == "pausing"
    hand_back(engine, held, clock)

    job = job_of(engine, job_id)
    assert (job.state, job.attempts, job.device_seconds) == ("paused", 1, 3.0)
    assert try_claim(engine, clock) is None
    assert resume(engine, job_id, clock) == "queued"
    for _ in range(2):
        finish(engine, claim(engine, clock), clock)
    assert state(engine, job_id) == "succeeded"
    with reading(engine) as session:
        types = list(session.scalars(select(Event.type).order_by(Event.id)))
    assert types == [
        *("job.submitted", "job.planned", "job.started", "job.pausing", "chunk.handed_back"),
        *("job.paused", "job.unpaused", "job.resumed", "chunk.done", "chunk.done"),
        "job.succeeded",
    ]


def test_a_job_is_pausing_until_the_last_of_its_chunks_stops(engine: Engine, clock: Clock) -> None:
    job_id = fanned(engine, clock)
    one, two, three = (claim(engine, clock, f"w{number}") for number in range(3))
    pause(engine, job_id, clock)

    finish(engine, one, clock)
    crash(engine, two, clock)
    assert state(engine, job_id) == "pausing"
    hand_back(engine, three, clock)

    assert state(engine, job_id) == "paused"
    assert chunk_states(engine, job_id)[:3] == ["done", "ready", "ready"]


def test_a_job_resumed_while_it_pauses_runs_on(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=2)
    held = claim(engine, clock)
    pause(engine, job_id, clock)

    assert resume(engine, job_id, clock) == "running"
    hand_back(engine, held, clock)  # it had been told already

    assert state(engine, job_id) == "running"
    finish(engine, claim(engine, clock), clock)
    assert chunk_states(engine, job_id) == ["done", "ready"]


def test_a_job_cancelled_while_it_pauses_is_cancelled(engine: Engine, clock: Clock) -> None:
    for end in (
        hand_back,
        lambda *args: finish(*args),
        lambda on, held, at: give_up(on, held, WorkerLost("no"), at),
    ):
        job_id = submit(engine, clock, times=2)
        held = claim(engine, clock)
        pause(engine, job_id, clock)
        assert cancel(engine, job_id, clock) == "cancelling"
        end(engine, held, clock)

        assert state(engine, job_id) == "cancelled"
        assert chunk_states(engine, job_id) == ["cancelled", "cancelled"]


def test_work_that_ends_while_the_job_pauses_is_kept(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=2)
    held = claim(engine, clock)
    pause(engine, job_id, clock)
    finish(engine, held, clock)
    assert (state(engine, job_id), chunk_states(engine, job_id)) == ("paused", ["done", "ready"])

    resume(engine, job_id, clock)
    held = claim(engine, clock)
    pause(engine, job_id, clock)
    finish(engine, held, clock, some_file())

    assert state(engine, job_id) == "succeeded"
    with pytest.raises(Conflict, match="not paused"):
        resume(engine, job_id, clock)


def test_a_chunk_that_fails_for_good_while_its_job_pauses_fails_it(
    engine: Engine, clock: Clock
) -> None:
    job_id = fanned(engine, clock)
    held, other = claim(engine, clock), claim(engine, clock, "w2")
    pause(engine, job_id, clock)
    give_up(engine, held, OutOfMemory("no"), clock)

    assert state(engine, job_id) == "failed"
    with pytest.raises(LeaseLost):
        finish(engine, other, clock)


def test_a_cancelled_job_ends_cancelled_whatever_its_chunks_raise(
    engine: Engine, clock: Clock
) -> None:
    job_id = fanned(engine, clock)
    one, two, three = (claim(engine, clock, f"w{number}") for number in range(3))
    cancel(engine, job_id, clock)

    give_up(engine, one, OutOfMemory("no"), clock)
    crash(engine, two, clock)
    assert state(engine, job_id) == "cancelling"
    assert chunk_states(engine, job_id)[:2] == ["cancelled", "cancelled"]
    finish(engine, three, clock)

    job = job_of(engine, job_id)
    assert (job.state, job.error) == ("cancelled", None)


def test_a_paused_job_gets_its_input_and_waits_on(engine: Engine, clock: Clock) -> None:
    upstream = fit(engine, clock)
    early, late = (
        submit(engine, clock, kind="cache_targets", model=f"{upstream}/model") for _ in range(2)
    )
    pause(engine, early, clock)
    pause(engine, late, clock)
    assert resume(engine, early, clock) == "waiting"
    pause(engine, early, clock)

    while (held := try_claim(engine, clock)) is not None:
        finish(engine, held, clock, *([MADE_MODEL] if held.stage == "assemble" else []))

    assert [state(engine, one) for one in (upstream, early, late)] == [
        *("succeeded", "paused", "paused")
    ]
    assert job_of(engine, early).chunks is None
    assert resume(engine, early, clock) == "queued"
    assert chunk_states(engine, early) == ["ready"] * 3 + ["blocked"] * 2


def test_a_paused_job_ends_with_what_it_waits_for(engine: Engine, clock: Clock) -> None:
    upstream = fit(engine, clock)
    below = submit(engine, clock, kind="cache_targets", model=f"{upstream}/model")
    pause(engine, below, clock)
    cancel(engine, upstream, clock)

    job = job_of(engine, below)
    assert job.state == "failed"
    assert job.error is not None
    assert job.error["code"] == "upstream_failed"


def test_a_job_whose_input_does_not_fit_fails_when_it_is_resumed(
    engine: Engine, clock: Clock
) -> None:
    """Planned only then; the person who resumes it reads the reason in the job."""
    upstream = fit(engine, clock)
    below = submit(
        engine, clock, kind="cache_targets", model=f"{upstream}/model", pairs=pairs(engine, clock)
    )
    pause(engine, below, clock)
    narrow = Stored(**{**vars(MADE_MODEL), "meta": {**MADE_MODEL.meta, "dim": 8}})
    while (held := try_claim(engine, clock)) is not None:
        finish(engine, held, clock, *([narrow] if held.stage == "assemble" else []))

    assert resume(engine, below, clock) == "failed"
    assert "16 dimensions, the model 8" in str(job_of(engine, below).error)


def test_an_output_that_was_not_made_is_not_waited_for(engine: Engine, clock: Clock) -> None:
    upstream = fit(engine, clock)
    early = submit(engine, clock, kind="cache_targets", model=f"{upstream}/model")
    while (held := try_claim(engine, clock)) is not None:
        finish(engine, held, clock)

    assert state(engine, upstream) == "succeeded"
    assert "ended without making 'model'" in str(job_of(engine, early).error)
    with pytest.raises(SpecInvalid, match="ended without making 'model'"):
        submit(engine, clock, kind="cache_targets", model=f"{upstream}/model")


def test_nobody_touches_another_projects_job(engine: Engine, clock: Clock) -> None:
    other = project(engine, clock, "other")
    job_id = submit(engine, clock, project=other)
    about: dict[str, Any] = {"project": PROJECT, "now": clock()}
    tries: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (control.pause, about),
        (control.resume, about),
        (control.cancel, about),
        (control.change, {**about, "priority": 1}),
        (control.retry, {**about, "by": BY}),
        (control.pin, {"project": PROJECT, "stage": "lines", "index": 0, "pinned": True}),
    ]

    for change, values in tries:
        with pytest.raises(NotFound, match=job_id):
            within(engine, change, job_id, **values)
    assert state(engine, job_id) == "queued"


def test_a_change_is_of_priority_and_name_alone(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, priority=50, name="old")
    asked = job_of(engine, job_id).spec

    within(engine, control.change, job_id, project=PROJECT, priority=90, now=clock())
    within(engine, control.change, job_id, project=PROJECT, name="new", now=clock())
    within(engine, control.change, job_id, project=PROJECT, now=clock())

    job = job_of(engine, job_id)
    assert (job.priority, job.name, job.spec) == (90, "new", asked)
    with reading(engine) as session:
        changes = session.scalars(select(Event.data).where(Event.type == "job.changed")).all()
    assert changes == [{"priority": 90}, {"name": "new"}]
    cancel(engine, job_id, clock)
    with pytest.raises(Conflict, match="already cancelled"):
        within(engine, control.change, job_id, project=PROJECT, priority=1, now=clock())
    within(engine, control.change, job_id, project=PROJECT, name="kept for later", now=clock())
    assert job_of(engine, job_id).name == "kept for later"


def test_nothing_that_comes_late_moves_a_job_that_is_over(engine: Engine, clock: Clock) -> None:
    for how in ("succeeded", "failed", "cancelled"):
        job_id = submit(engine, clock, deadline_s=60)
        held = claim(engine, clock)
        if how == "cancelled":
            cancel(engine, job_id, clock)
            within(engine, lease.stop, held, now=clock(), rules=RULES)
        elif how == "failed":
            give_up(engine, held, OutOfMemory("no"), clock)
        else:
            finish(engine, held, clock, some_file())
        before = _facts(engine, job_id)
        assert before["state"] == how
        clock.tick(seconds=90)

        for late in (finish, hand_back, crash):
            with pytest.raises(LeaseLost):
                late(engine, held, clock)  # type: ignore[operator]
        for move in (pause, resume, cancel):
            with pytest.raises(Conflict):
                move(engine, job_id, clock)
        tally = recovery.tick(engine, now=clock(), rules=RULES)
        assert (tally.released, tally.overdue) == (0, 0)
        assert recovery.release_all(engine, owner_prefix="w", now=clock(), rules=RULES) == 0
        assert _facts(engine, job_id) == before


def _facts(engine: Engine, job_id: str) -> dict[str, Any]:
    job = job_of(engine, job_id)
    facts = {name: getattr(job, name) for name in Job.__table__.columns.keys()}  # noqa: SIM118
    return {**facts, "chunks": chunk_states(engine, job_id)}
