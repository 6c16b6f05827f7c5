"""A retry is a new job: it goes on where the old one stopped, and ends in the same bytes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select, update

from core.artifacts.store import LocalStore
from core.db.models import Chunk, Event, Job, JobInput
from core.db.session import reading, transaction
from core.errors import ChunkCrashed, Conflict, OutOfMemory, SpecInvalid
from core.jobs import control, lineage, service, shares, status
from core.jobs.adoption import Stored
from core.jobs.runner import Runner
from core.tensors.formats import save_pairs
from tests.conftest import Clock
from tests.core.jobs.acts import (
    MADE_MODEL,
    a_file,
    chunk_states,
    chunks_of,
    fanned,
    fit,
    job_of,
    outputs_of,
    project,
    set_chunks,
    within,
)
from tests.core.kinds.world import CLUSTERING, tiny_pairs
from tests.life import (
    BY,
    PROJECT,
    RULES,
    claim,
    finish,
    give_up,
    some_file,
    state,
    submit,
    try_claim,
    uploaded,
)


def retry(engine: Engine, job_id: str, clock: Clock) -> list[str]:
    made = within(engine, control.retry, job_id, project=PROJECT, by="key_2", now=clock())
    return [job.id for job in made]


def cancel(engine: Engine, job_id: str, clock: Clock) -> None:
    within(engine, control.cancel, job_id, project=PROJECT, now=clock())


def kill(engine: Engine, job_id: str, clock: Clock) -> None:
    """Let the job's next chunk end for good."""
    held = claim(engine, clock)
    assert held.job_id == job_id
    give_up(engine, held, OutOfMemory("no"), clock)


def below(engine: Engine, clock: Clock, model: str, **fields: Any) -> str:
    clock.tick(seconds=1)
    return submit(engine, clock, kind="cache_targets", model=f"{model}/model", **fields)


def trained(engine: Engine, clock: Clock, model: str, targets: str) -> str:
    clock.tick(seconds=1)
    named = {"model": f"{model}/model", "targets": f"{targets}/targets"}
    return submit(engine, clock, kind="distill", **named)


def inputs(engine: Engine, job_id: str) -> dict[str, str | None]:
    with reading(engine) as session:
        rows = session.scalars(select(JobInput).where(JobInput.job_id == job_id))
        return {row.field: row.upstream_id for row in rows}


def artifacts(engine: Engine, job_id: str, clock: Clock) -> dict[str, str]:
    with reading(engine) as session:
        return status.describe(session, [service.get(session, job_id)], now=clock())[0].artifacts


def test_a_chain_goes_on_after_its_last_chunk_and_ends_in_the_same_bytes(
    engine: Engine, clock: Clock, runner: Runner
) -> None:
    whole, broken = (submit(engine, clock, times=4, name=name) for name in ("whole", "broken"))
    cancel(engine, whole, clock)
    assert [runner.run_one() for _ in range(2)] == [True, True]
    kill(engine, broken, clock)
    [again] = retry(engine, broken, clock)
    [anew] = retry(engine, whole, clock)

    job = job_of(engine, again)
    assert (job.state, job.chunks_over, job.retry_of, job.name) == ("queued", 2, broken, "broken")
    assert (job.attempts, job.device_seconds, job.submitted_by) == (0, 0.0, "key_2")
    assert chunk_states(engine, again) == ["done", "done", "ready", "blocked"]
    while runner.run_one():
        clock.tick(seconds=1)

    assert artifacts(engine, again, clock) == artifacts(engine, anew, clock)
    assert job_of(engine, again).attempts == 2
    assert state(engine, broken) == "failed"
    with reading(engine) as session:
        curves = [lineage.metrics_of(session, one) for one in (again, anew)]
        told = session.scalars(select(Event.type).where(Event.job_id == again)).all()
    assert curves[0] == curves[1] == {"lines": [(i, i + 1.0) for i in range(4)]}
    assert told[:3] == ["job.submitted", "job.planned", "job.took_over"]


def test_a_fanned_job_goes_on_with_the_chunks_that_are_left(
    engine: Engine, clock: Clock, runner: Runner, store: LocalStore, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.safetensors"
    pairs = tiny_pairs()
    save_pairs(path, pairs)
    known = {"format_name": "pairs", "meta": pairs.meta()}
    sha256 = uploaded(engine, store.put(path), clock, **known)
    spec = {"pairs": sha256, "clustering": CLUSTERING, "temperature": 0.1}
    whole = submit(engine, clock, kind="fit_federated", **spec)
    for _ in range(3):
        runner.run_one()
    kill(engine, whole, clock)
    over = chunk_states(engine, whole).count("done")
    assert over == 3

    [again] = retry(engine, whole, clock)
    anew = submit(engine, clock, kind="fit_federated", **spec)
    assert job_of(engine, again).chunks_over == over
    while runner.run_one():
        pass

    assert job_of(engine, again).attempts == job_of(engine, anew).attempts - over
    assert artifacts(engine, again, clock) == artifacts(engine, anew, clock) != {}


def test_a_retry_takes_over_scores_pins_and_skipped_chunks(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=6)
    for index, score in enumerate((0.5, 0.1, 0.9)):
        held = claim(engine, clock)
        finish(engine, held, clock, a_file("state", index + 1), score=score)
        if index == 0:
            about = {"project": PROJECT, "stage": "lines", "index": 0, "pinned": True}
            within(engine, control.pin, job_id, **about)
    kept = outputs_of(engine, job_id)
    assert len(kept) == 3, "the pinned one, the best and the latest"
    kill(engine, job_id, clock)

    [again] = retry(engine, job_id, clock)

    assert outputs_of(engine, again) == outputs_of(engine, job_id) == kept
    finish(engine, claim(engine, clock), clock, a_file("state", 9), score=0.2, stage_done=True)
    assert state(engine, again) == "succeeded"
    assert chunk_states(engine, again)[4:] == ["skipped", "skipped"]
    assert outputs_of(engine, again) == [*kept[:2], f"{9:064x}"]
    assert outputs_of(engine, job_id) == kept


def test_a_retry_of_a_retry_goes_on_where_that_one_stopped(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=4)
    for over in (1, 2):
        finish(engine, claim(engine, clock), clock)
        kill(engine, job_id, clock)
        [job_id] = retry(engine, job_id, clock)
        assert job_of(engine, job_id).chunks_over == over


def test_a_job_that_goes_on_already_is_not_retried_twice(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)
    with pytest.raises(Conflict, match="is queued; allowed: failed, cancelled"):
        retry(engine, job_id, clock)
    held = claim(engine, clock)
    give_up(engine, held, OutOfMemory("no"), clock)

    [second] = retry(engine, job_id, clock)
    with pytest.raises(Conflict, match=f"goes on as job {second}, which is queued"):
        retry(engine, job_id, clock)
    kill(engine, second, clock)
    [third] = retry(engine, second, clock)
    with pytest.raises(Conflict, match=f"goes on as job {third}, which is queued"):
        retry(engine, job_id, clock)
    finish(engine, claim(engine, clock), clock, some_file())
    for old in (job_id, second):
        with pytest.raises(Conflict, match=f"goes on as job {third}, which is succeeded"):
            retry(engine, old, clock)
    with pytest.raises(Conflict, match="is succeeded; allowed: failed, cancelled"):
        retry(engine, third, clock)


def test_a_job_whose_retries_all_ended_badly_is_retried_anew(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)
    cancel(engine, job_id, clock)
    [second] = retry(engine, job_id, clock)
    cancel(engine, second, clock)

    [third] = retry(engine, job_id, clock)

    assert job_of(engine, third).retry_of == job_id


def test_what_failed_below_is_retried_too_and_reads_the_new_outputs(
    engine: Engine, clock: Clock
) -> None:
    """Again and again: jobs that were retried at one instant are still taken upstream first."""
    first = fit(engine, clock)
    cache = below(engine, clock, first)
    student = trained(engine, clock, first, cache)
    done = [first, cache, student]
    for _ in range(4):
        kill(engine, done[0], clock)
        assert {state(engine, one) for one in done} == {"failed"}

        new = retry(engine, done[0], clock)

        assert [job_of(engine, one).retry_of for one in new] == done
        assert [state(engine, one) for one in new] == ["queued", "waiting", "waiting"]
        assert inputs(engine, new[1]) == {"model": new[0]}
        assert inputs(engine, new[2]) == {"model": new[0], "targets": new[1]}
        done = new
    _finish_fit(engine, clock, done[0])
    assert [state(engine, one) for one in done] == ["succeeded", "queued", "waiting"]


def _finish_fit(engine: Engine, clock: Clock, job_id: str, made: Stored = MADE_MODEL) -> None:
    while state(engine, job_id) != "succeeded":
        held = claim(engine, clock)
        assert held.job_id == job_id
        finish(engine, held, clock, *([made] if held.stage == "assemble" else []))


def test_what_was_cancelled_below_is_left_alone(engine: Engine, clock: Clock) -> None:
    first = fit(engine, clock)
    unwanted = below(engine, clock, first)
    cancel(engine, unwanted, clock)
    cancel(engine, first, clock)

    [again] = retry(engine, first, clock)

    assert state(engine, unwanted) == "cancelled"
    [wanted] = retry(engine, unwanted, clock)
    assert inputs(engine, wanted) == {"model": again}


def test_a_job_below_two_that_failed_is_retried_with_the_second(
    engine: Engine, clock: Clock
) -> None:
    one, two = fit(engine, clock), fit(engine, clock, seed=2)
    cache = below(engine, clock, two)
    student = trained(engine, clock, one, cache)
    cancel(engine, one, clock)
    cancel(engine, cache, clock)

    [one_again] = retry(engine, one, clock)
    assert state(engine, student) == "failed", "its other input will not come"
    new = retry(engine, cache, clock)

    assert [job_of(engine, job_id).retry_of for job_id in new] == [cache, student]
    assert inputs(engine, new[1]) == {"model": one_again, "targets": new[0]}


def test_a_job_whose_input_will_not_come_is_refused(engine: Engine, clock: Clock) -> None:
    first = fit(engine, clock)
    cache = below(engine, clock, first)
    cancel(engine, first, clock)

    with pytest.raises(SpecInvalid, match=f"job {first} is cancelled"):
        retry(engine, cache, clock)
    assert state(engine, cache) == "failed"


def test_chunks_made_from_another_input_are_not_taken_over(engine: Engine, clock: Clock) -> None:
    first = fit(engine, clock)
    same, other = (below(engine, clock, first) for _ in range(2))
    _finish_fit(engine, clock, first)
    for job_id in (same, other):
        finish(engine, claim(engine, clock), clock)
        kill(engine, job_id, clock)
    [again] = retry(engine, same, clock)
    assert job_of(engine, again).chunks_over == 1
    with transaction(engine) as session:
        # As if the old job had read other bytes.
        read = session.get_one(JobInput, (other, "model"))
        read.sha256 = job_of(engine, first).spec["pairs"]
    [anew] = retry(engine, other, clock)

    assert job_of(engine, anew).chunks_over == 0
    assert set(chunk_states(engine, anew)[:3]) == {"ready"}


def test_a_retry_and_a_chunk_that_ends_do_not_wait_for_each_other(
    engine: Engine, clock: Clock
) -> None:
    """Jobs are locked before the project, by everybody."""
    small = project(engine, clock, "small", queued_limit=9)
    first = fit(engine, clock, project=small)
    cache = below(engine, clock, first, project=small)
    within(engine, control.cancel, cache, project=small, now=clock())
    locked = threading.Event()

    def ends_a_chunk() -> None:
        with transaction(engine) as session:
            service.get(session, first, lock=True)
            locked.set()
            time.sleep(0.3)
            shares.charge(session, small, 1.0, now=clock(), fairness=RULES.fairness)

    with ThreadPoolExecutor(1) as threads:
        ended = threads.submit(ends_a_chunk)
        locked.wait()
        [again] = within(engine, control.retry, cache, project=small, by=BY, now=clock())
        ended.result()

    assert state(engine, again.id) == "waiting"


def test_a_retry_at_the_end_of_a_stage_begins_the_next(engine: Engine, clock: Clock) -> None:
    job_id = fanned(engine, clock)
    for _ in range(3):
        finish(engine, claim(engine, clock), clock)
    kill(engine, job_id, clock)

    [again] = retry(engine, job_id, clock)

    assert chunk_states(engine, again) == ["done"] * 3 + ["ready"] * 3 + ["blocked"]
    assert job_of(engine, again).stage == "targets"
    while (held := try_claim(engine, clock)) is not None:
        finish(engine, held, clock)
    assert state(engine, again) == "succeeded"


def test_a_retry_forgets_the_failures_and_keeps_the_changes(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, priority=10, deadline_s=60, labels={"a": "b"})
    within(engine, control.change, job_id, project=PROJECT, priority=70, now=clock())
    for _ in range(ChunkCrashed.attempts):
        give_up(engine, claim(engine, clock, "w1"), ChunkCrashed("no"), clock)
        clock.tick(seconds=40)
    assert state(engine, job_id) == "failed"

    [again] = retry(engine, job_id, clock)

    job = job_of(engine, again)
    assert (job.priority, job.labels) == (70, {"a": "b"})
    assert job.deadline_at is not None
    assert (job.deadline_at - clock()).total_seconds() == 60
    [chunk] = chunks_of(engine, again)
    assert (chunk.failures, chunk.failed_on, chunk.attempt) == ({}, None, 0)
    with reading(engine) as session:
        told = session.scalars(select(Event.data).where(Event.type == "job.retried")).all()
    assert told == [{"retried_as": again}]
    assert job.submitted_by != BY


def test_of_a_line_of_retries_one_goes_on(engine: Engine, clock: Clock) -> None:
    line = [submit(engine, clock)]
    for _ in range(2):
        give_up(engine, claim(engine, clock), OutOfMemory("x"), clock)
        line += retry(engine, line[-1], clock)
    give_up(engine, claim(engine, clock), OutOfMemory("x"), clock)
    [fresh] = retry(engine, line[1], clock)

    for one in line:
        with pytest.raises(Conflict, match=f"goes on as job {fresh}"):
            retry(engine, one, clock)


def test_once_a_retry_succeeded_the_failed_job_keeps_no_blocks(
    engine: Engine, clock: Clock
) -> None:
    job_id = fanned(engine, clock)
    for seed in range(4):
        finish(engine, claim(engine, clock), clock, a_file("block", seed + 1))
    give_up(engine, claim(engine, clock), OutOfMemory("x"), clock)
    [again] = retry(engine, job_id, clock)
    assert len(outputs_of(engine, job_id)) == 4, "a retry of it would take them over"
    while (held := try_claim(engine, clock)) is not None:
        finish(engine, held, clock, a_file("block", held.chunk_id))

    assert state(engine, again) == "succeeded"
    assert outputs_of(engine, again) == outputs_of(engine, job_id) == []


def test_a_retry_of_thousands_of_chunks_takes_over_all(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock, times=1_000)
    set_chunks(engine, job_id, state="done", attempt=1)
    with transaction(engine) as session:
        last = select(Chunk.id).where(Chunk.job_id == job_id).order_by(Chunk.index.desc()).limit(1)
        session.execute(update(Chunk).where(Chunk.id == session.scalar(last)).values(state="ready"))
        session.execute(update(Job).where(Job.id == job_id).values(chunks_over=999))
    give_up(engine, claim(engine, clock), OutOfMemory("x"), clock)
    [again] = retry(engine, job_id, clock)

    assert job_of(engine, again).chunks_over == 999
    assert chunk_states(engine, again) == ["done"] * 999 + ["ready"]
