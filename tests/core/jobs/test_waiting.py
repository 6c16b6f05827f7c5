"""Why a job waits, its place, and when it will start, against what claims then really do."""

from datetime import datetime, timedelta

import pytest
from sqlalchemy import Engine, update

from core.db.models import Chunk
from core.db.session import reading, transaction
from core.jobs import control, pool, service, status
from core.jobs.lease import Claim
from core.jobs.waiting import UNKNOWN_SECONDS
from tests.conftest import Clock, statements
from tests.core.jobs.acts import (
    copies,
    crash,
    fanned,
    fit,
    hand_back,
    project,
    set_chunks,
    used,
    within,
    worker,
)
from tests.life import GIB, PROJECT, RULES, claim, finish, place, shown, submit, try_claim

BUSY = "next in the queue; all workers that could run it are busy"
FREE = "next in the queue; a worker is free to take it"


def why(engine: Engine, job_id: str, clock: Clock) -> str | None:
    return shown(engine, job_id, clock).waits_for


def starts_in(engine: Engine, job_id: str, clock: Clock) -> float | None:
    at = shown(engine, job_id, clock).predicted_start_at
    return None if at is None else (at - clock()).total_seconds()


def pause(engine: Engine, job_id: str, clock: Clock) -> None:
    within(engine, control.pause, job_id, project=PROJECT, now=clock())


def test_without_workers_the_reason_is_that(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)
    assert why(engine, job_id, clock) == "no worker is alive"

    worker(engine, clock)
    assert why(engine, job_id, clock) == FREE
    clock.tick(seconds=pool.ALIVE_FOR.total_seconds())
    assert why(engine, job_id, clock) == "no worker is alive"
    assert (shown(engine, job_id, clock).queue_position, starts_in(engine, job_id, clock)) == (
        1,
        None,
    )


def test_nodes_that_take_no_work_are_told_from_dead_ones(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)
    gpu = submit(engine, clock, device="gpu")
    at = worker(engine, clock)
    for kept_out in (pool.DRAINING, pool.EXCLUDED):
        within(engine, pool.set_node_state, at.node, kept_out, note=None, now=clock())
        told = "every worker that could run it is on a node that drains or is excluded"
        assert why(engine, job_id, clock) == told
        assert why(engine, gpu, clock) == "needs a gpu; no live worker has one"


def test_what_no_worker_offers_is_named(engine: Engine, clock: Clock) -> None:
    worker(engine, clock, memory_bytes=8 * GIB)
    gpu, big = (submit(engine, clock, device=device) for device in ("gpu", "any"))
    set_chunks(engine, big, memory_bytes=20 * GIB + GIB // 2)

    assert why(engine, gpu, clock) == "needs a gpu; no live worker has one"
    told = "needs 20.50 GiB of device memory; the largest live worker has 8.00 GiB"
    assert why(engine, big, clock) == told
    assert starts_in(engine, gpu, clock) is None
    worker(engine, clock, "w2", "cuda:0", 80 * GIB)
    assert {why(engine, one, clock) for one in (gpu, big)} <= {FREE, _before(1)}


def _before(count: int) -> str:
    return f"{count} job(s) of its project before it"


def test_a_busy_pool_and_the_queue_before_a_job_are_named(engine: Engine, clock: Clock) -> None:
    worker(engine, clock)
    running = submit(engine, clock)
    claim(engine, clock)
    ids = []
    for _ in range(3):
        clock.tick(seconds=1)
        ids.append(submit(engine, clock))
    unfit = submit(engine, clock, priority=99, device="gpu")

    assert [why(engine, one, clock) for one in ids] == [BUSY, _before(1), _before(2)]
    places = [shown(engine, one, clock).queue_position for one in (unfit, *ids)]
    assert places == [1, 2, 3, 4]
    assert (why(engine, running, clock), starts_in(engine, running, clock)) == (None, None)
    pause(engine, ids[0], clock)
    assert why(engine, ids[1], clock) == BUSY
    assert why(engine, ids[0], clock) == "paused; resume it to go on"


def test_jobs_of_one_instant_have_places_of_their_own(engine: Engine, clock: Clock) -> None:
    clock.tick(microseconds=123_456)
    ids = [submit(engine, clock) for _ in range(4)]

    places = {shown(engine, one, clock).queue_position: one for one in ids}

    assert sorted(places) == [1, 2, 3, 4]
    assert [claim(engine, clock).job_id for _ in ids] == [places[n] for n in (1, 2, 3, 4)]


def test_more_urgent_jobs_of_others_are_counted(engine: Engine, clock: Clock) -> None:
    other, full = project(engine, clock, "other"), project(engine, clock, "full", running_limit=0)
    worker(engine, clock)
    job_id = submit(engine, clock)
    for priority in (60, 70):
        submit(engine, clock, project=other, priority=priority)
    submit(engine, clock, project=full, priority=90)
    submit(engine, clock, project=other, priority=90, device="gpu")

    assert why(engine, job_id, clock) == "2 job(s) of higher priority go first"
    assert why(engine, submit(engine, clock, project=full), clock) == (
        "its project runs 0 chunks at once, its limit"
    )


def test_projects_that_used_less_go_first(engine: Engine, clock: Clock) -> None:
    mine, less, more, later = (
        project(engine, clock, name) for name in ("mine", "less", "more", "later")
    )
    worker(engine, clock)
    used(engine, mine, 50, clock)
    used(engine, less, 10, clock)
    used(engine, more, 90, clock)
    job_id = submit(engine, clock, project=mine)
    for other in (less, more):
        submit(engine, clock, project=other)
    submit(engine, clock, project=later, priority=1)

    told = "next of its project, which has used more than its share; first: 1 other project"
    assert why(engine, job_id, clock) == told
    fresh = project(engine, clock, "fresh")
    submit(engine, clock, project=fresh)
    assert why(engine, job_id, clock) == told.replace("1 other project", "2 other projects")


def test_a_forecast_rests_on_no_job_that_another_project_finished(
    engine: Engine, clock: Clock
) -> None:
    worker(engine, clock)
    submit(engine, clock, project=project(engine, clock, "other"))
    held = claim(engine, clock)
    clock.tick(seconds=7)
    finish(engine, held, clock)
    submit(engine, clock)
    clock.tick(seconds=1)
    second = submit(engine, clock)

    assert starts_in(engine, second, clock) == UNKNOWN_SECONDS


def test_a_failed_chunk_tells_when_it_is_tried_again(engine: Engine, clock: Clock) -> None:
    worker(engine, clock)
    job_id = submit(engine, clock)
    crash(engine, claim(engine, clock), clock)

    assert why(engine, job_id, clock) == "failed on host:w1; tried there again at 00:00:05 UTC"
    worker(engine, clock, "w2")
    assert why(engine, job_id, clock) == FREE


def test_a_job_without_its_inputs_names_them(engine: Engine, clock: Clock) -> None:
    first = fit(engine, clock)
    cache = submit(engine, clock, kind="cache_targets", model=f"{first}/model")
    named = {"model": f"{first}/model", "targets": f"{cache}/targets"}
    student = submit(engine, clock, kind="distill", **named)

    assert why(engine, cache, clock) == f"waits for {first}/model"
    wanted = " and ".join(sorted((f"{first}/model", f"{cache}/targets")))
    assert why(engine, student, clock) == f"waits for {wanted}"
    with reading(engine) as session:
        jobs = [service.get(session, one) for one in (student, first)]
        short = status.describe(session, jobs, now=clock())
    assert [one.waits_for for one in short] == [f"waits for {wanted}", "in the queue"]
    within(engine, control.cancel, first, project=PROJECT, now=clock())
    assert why(engine, cache, clock) is None


def test_a_job_between_two_chunks_tells_what_it_waits_for(engine: Engine, clock: Clock) -> None:
    worker(engine, clock)
    job_id = fanned(engine, clock)
    held = [claim(engine, clock, owner) for owner in ("w1", "w2")]
    assert why(engine, job_id, clock) is None, "one of its chunks runs"
    for one in held:
        hand_back(engine, one, clock)

    assert why(engine, job_id, clock) == FREE
    assert shown(engine, job_id, clock).queue_position == 1


def play(engine: Engine, clock: Clock, workers: int, seconds: float) -> dict[str, float]:
    """Let workers run chunks of equal length until all is done; return when each job started."""
    began, running = clock(), list[tuple[datetime, int, Claim]]()
    starts: dict[str, float] = {}
    while True:
        busy = {number for _, number, _ in running}
        for number in set(range(workers)) - busy:
            found = try_claim(engine, clock, f"w{number}")
            if found is not None:
                starts.setdefault(found.job_id, (clock() - began).total_seconds())
                running.append((clock() + timedelta(seconds=seconds), number, found))
        if not running:
            return starts
        clock.now, _, ended = running.pop(0)
        finish(engine, ended, clock)


def queued(engine: Engine, clock: Clock, *, blocks: bool) -> list[str]:
    """Jobs of three projects of unequal weight and use: a chain, singles, and blocks or none."""
    shares = (("a", 1.0, 0.0), ("b", 2.0, 65.0), ("c", 1.0, 40.0))
    owners = [project(engine, clock, name, weight=weight) for name, weight, _ in shares]
    for owner, (_, _, seconds) in zip(owners, shares, strict=True):
        used(engine, owner, seconds, clock)
    ids = [submit(engine, clock, project=owners[0], times=3)]
    if blocks:
        ids.append(fanned(engine, clock, project=owners[1]))
    for owner in (2, 2, 1, 0, 1, 2):
        clock.tick(seconds=1)
        ids.append(submit(engine, clock, project=owners[owner]))
    return ids


def test_every_job_starts_when_it_was_foretold(engine: Engine, clock: Clock) -> None:
    worker(engine, clock, "w0")
    ids = queued(engine, clock, blocks=True)

    told = {job_id: starts_in(engine, job_id, clock) for job_id in ids}

    assert play(engine, clock, 1, UNKNOWN_SECONDS) == told
    assert max(one for one in told.values() if one is not None) == 450


def test_with_two_workers_the_forecast_is_a_chunk_off_at_most(engine: Engine, clock: Clock) -> None:
    for name in ("w0", "w1"):
        worker(engine, clock, name)
    ids = queued(engine, clock, blocks=False)

    told = {job_id: starts_in(engine, job_id, clock) or 0.0 for job_id in ids}
    found = play(engine, clock, 2, UNKNOWN_SECONDS)

    assert {job_id: pytest.approx(told[job_id], abs=UNKNOWN_SECONDS) for job_id in ids} == found


def test_running_chunks_are_foretold_to_end_as_others_of_their_job(
    engine: Engine, clock: Clock
) -> None:
    worker(engine, clock)
    chain = submit(engine, clock, times=3)
    clock.tick(seconds=1)
    after = submit(engine, clock)
    held = claim(engine, clock)
    clock.tick(seconds=10)
    finish(engine, held, clock)
    assert (starts_in(engine, chain, clock), starts_in(engine, after, clock)) == (0, 20)
    claim(engine, clock)
    clock.tick(seconds=4)

    assert starts_in(engine, after, clock) == 16, "6 s of this chunk, 10 of the last"
    worker(engine, clock, "w2")
    assert starts_in(engine, after, clock) == 0, "a chain takes one device"
    set_progress(engine, chain, 0.8)
    within(engine, pool.goodbye, "w2")
    assert starts_in(engine, after, clock) == 11, "it said that it is nearly done"


def set_progress(engine: Engine, job_id: str, progress: float) -> None:
    with transaction(engine) as session:
        running = update(Chunk).where(Chunk.job_id == job_id, Chunk.state == "running")
        session.execute(running.values(progress=progress))


def test_a_project_at_its_limit_is_foretold_to_wait(engine: Engine, clock: Clock) -> None:
    small = project(engine, clock, "small", running_limit=1)
    for name in ("w1", "w2"):
        worker(engine, clock, name)
    submit(engine, clock, project=small)
    clock.tick(seconds=1)
    second = submit(engine, clock, project=small)
    claim(engine, clock)
    clock.tick(seconds=10)

    assert why(engine, second, clock) == "its project runs 1 chunks at once, its limit"
    assert starts_in(engine, second, clock) == UNKNOWN_SECONDS - 10


def test_a_look_at_one_job_costs_the_same_in_a_long_queue(engine: Engine, clock: Clock) -> None:
    worker(engine, clock)
    counted = []
    for count in (3, 5_000):
        for number in range(3):
            owner = project(engine, clock, f"p{count}-{number}")
            last = submit(engine, clock, project=owner)
            copies(engine, last, count // 3)
        used(engine, owner, 1000, clock)
        with statements(engine) as sent:
            found = shown(engine, last, clock)
        counted.append(len(sent))
        assert found.queue_position is not None

    assert counted[0] == counted[1] <= 20


def test_a_start_is_not_foretold_before_the_chunk_may_be_tried_again(
    engine: Engine, clock: Clock
) -> None:
    worker(engine, clock, "w1")
    job_id = submit(engine, clock)
    crash(engine, claim(engine, clock), clock)

    told = shown(engine, job_id, clock)
    assert told.predicted_start_at == clock() + RULES.retry_wait
    assert f"{told.predicted_start_at:%T}" in (told.waits_for or "")


def test_what_no_single_worker_could_run_is_nobodys_rival(engine: Engine, clock: Clock) -> None:
    worker(engine, clock, "w1", memory_bytes=100 * GIB)
    worker(engine, clock, "w2", "cuda:0", memory_bytes=8 * GIB)
    big = submit(engine, clock, priority=90)
    set_chunks(engine, big, device="gpu", memory_bytes=50 * GIB)
    job_id = submit(engine, clock, priority=10)
    for name, device in (("w1", "cpu"), ("w2", "cuda:0")):
        submit(engine, clock, priority=100)
        claim(engine, clock, name, at=place(f"host:{name}", device))

    told = shown(engine, job_id, clock).waits_for
    assert told == BUSY


def test_a_running_job_of_the_kind_tells_how_long_its_chunks_last(
    engine: Engine, clock: Clock
) -> None:
    worker(engine, clock, "w1")
    submit(engine, clock, times=5)
    clock.tick(seconds=1)
    job_id = submit(engine, clock)
    held = claim(engine, clock)
    clock.tick(seconds=2)
    finish(engine, held, clock)

    # Four chunks of two seconds are left of the first job.
    assert shown(engine, job_id, clock).predicted_start_at == clock() + timedelta(seconds=8)
