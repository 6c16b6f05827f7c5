"""Short form of bench/chaos.py: the team loses nothing under kills, a flush and a restart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, update

from bench._audit import audit
from bench._blows import plan_blows
from bench._feeder import Sent, Wanted
from bench.chaos import Plan, run
from core.artifacts.store import LocalStore
from core.db.models import Chunk, Event, Job, MetricPoint, Output, Project
from core.db.session import transaction
from core.jobs import service
from core.kinds._base import kinds
from tests import life
from tests.conftest import Clock, make_runner

SHORT = Plan(chunks=500, kills=12, freezes=1, flushes=1, database_restarts=1, limit_s=600.0)
JOBS = [Wanted("key-0", "one", 1), Wanted("key-1", "three", 3), Wanted("key-2", "one", 1)]


def test_blows_are_as_many_as_asked_and_over_before_the_work_is() -> None:
    blows = plan_blows(chunks=1_000, kills=20, freezes=3, flushes=1, database_restarts=2, seed=0)

    sorts = [blow.sort for blow in blows]
    assert sum({"worker": 1, "api": 1, "both": 2}.get(sort, 0) for sort in sorts) == 20
    assert [sorts.count(sort) for sort in ("freeze", "flush", "restart")] == [3, 1, 2]
    assert blows == sorted(blows, key=lambda blow: blow.at_chunk)
    assert blows[-1].at_chunk < 1_000


@pytest.fixture
def worked(engine: Engine, tmp_path: Path, clock: Clock) -> tuple[Engine, Path, list[Sent]]:
    """A database and a store after three jobs that nobody disturbed."""
    data = tmp_path / "data"
    runner = make_runner(engine, LocalStore(data), clock, data)
    sent = []
    for job in JOBS:
        spec = kinds()["echo"].spec.model_validate(
            {"kind": "echo", "name": job.key, "text": job.text, "times": job.times}
        )
        asked: dict[str, Any] = {"project": life.PROJECT, "by": life.BY, "now": clock()}
        with transaction(engine) as session:
            taken, _ = service.submit_once(session, spec, key=job.key, body_sha256="", **asked)
            sent.append(Sent(job, taken.id))
    while runner.run_one():
        clock.tick(seconds=1)
    for folder in (data / "scratch").iterdir():
        folder.rmdir()
    return engine, data, sent


def test_the_audit_finds_nothing_where_nothing_is_wrong(
    worked: tuple[Engine, Path, list[Sent]],
) -> None:
    found = audit(*worked)

    assert found.wrong == []
    assert (found.lost, found.twice, found.chunks, found.attempts) == (0, 0, 5, 5)
    assert found.ends == {"chunk.done": 5}


def done_again(engine: Engine, data: Path, sent: list[Sent]) -> None:
    facts = {"stage": "lines", "index": 1, "of": 3, "attempt": 2}
    with transaction(engine) as session:
        at = session.get_one(Job, sent[1].job_id).created_at
        session.add(Event(job_id=sent[1].job_id, type="chunk.done", data=facts, at=at))


def key_used_twice(engine: Engine, data: Path, sent: list[Sent]) -> None:
    with transaction(engine) as session:
        session.get_one(Job, sent[2].job_id).name = "key-0"


def not_done(engine: Engine, data: Path, sent: list[Sent]) -> None:
    with transaction(engine) as session:
        session.get_one(Job, sent[0].job_id).state = "failed"


def never_there(engine: Engine, data: Path, sent: list[Sent]) -> None:
    sent[0] = Sent(sent[0].wanted, "job_x")


def other_text(engine: Engine, data: Path, sent: list[Sent]) -> None:
    sent[1] = Sent(Wanted("key-1", "three", 4), sent[1].job_id)


def other_bytes(engine: Engine, data: Path, sent: list[Sent]) -> None:
    for path in (data / "blobs").glob("*/*"):
        path.chmod(0o644)
        path.write_text("rot")


def no_bytes(engine: Engine, data: Path, sent: list[Sent]) -> None:
    for path in (data / "blobs").glob("*/*"):
        path.unlink()


def wrong_sum(engine: Engine, data: Path, sent: list[Sent]) -> None:
    with transaction(engine) as session:
        session.get_one(Job, sent[0].job_id).device_seconds += 1


def charged_too_much(engine: Engine, data: Path, sent: list[Sent]) -> None:
    with transaction(engine) as session:
        for project in session.query(Project):
            project.usage += 1


def still_running(engine: Engine, data: Path, sent: list[Sent]) -> None:
    with transaction(engine) as session:
        chunks = update(Chunk).where(Chunk.job_id == sent[0].job_id)
        session.execute(chunks.values(state="running"))


def point_missing(engine: Engine, data: Path, sent: list[Sent]) -> None:
    with transaction(engine) as session:
        session.delete(session.get_one(MetricPoint, (sent[1].job_id, "lines", 1)))


def output_missing(engine: Engine, data: Path, sent: list[Sent]) -> None:
    with transaction(engine) as session:
        for row in session.query(Output).where(Output.job_id == sent[0].job_id):
            session.delete(row)


def folder_left(engine: Engine, data: Path, sent: list[Sent]) -> None:
    (data / "scratch" / "strange").mkdir()


def copy_left(engine: Engine, data: Path, sent: list[Sent]) -> None:
    (data / "blobs" / "ab").mkdir(exist_ok=True)
    (data / "blobs" / "ab" / "cd").write_text("")


@pytest.mark.parametrize(
    ("harm", "lost", "twice"),
    [
        (done_again, 0, 1),
        (key_used_twice, 1, 1),
        (not_done, 1, 0),
        (never_there, 1, 0),
        (other_text, 1, 0),
        (other_bytes, 3, 0),
        (no_bytes, 3, 0),
        (wrong_sum, 0, 0),
        (charged_too_much, 0, 0),
        (still_running, 0, 0),
        (point_missing, 0, 0),
        (output_missing, 1, 0),
        (folder_left, 0, 0),
        (copy_left, 0, 0),
    ],
)
def test_the_audit_sees_every_harm(
    worked: tuple[Engine, Path, list[Sent]],
    harm: Callable[[Engine, Path, list[Sent]], None],
    lost: int,
    twice: int,
) -> None:
    harm(*worked)

    found = audit(*worked)

    assert found.wrong != []
    assert (found.lost, found.twice) == (lost, twice)


@pytest.mark.chaos
@pytest.mark.timeout(660)
def test_kills_a_flush_and_a_restart_lose_nothing_and_apply_nothing_twice() -> None:
    outcome = run(SHORT, tell=print)

    found = outcome.findings
    assert found.wrong == []
    assert (found.lost, found.twice) == (0, 0)
    assert found.ends["chunk.done"] == found.chunks == SHORT.chunks
    assert outcome.kills == SHORT.kills
    assert outcome.blows["flush"] == SHORT.flushes
    assert outcome.blows["database restart, crash"] == SHORT.database_restarts == 1
    assert outcome.blows["freeze"] == SHORT.freezes > 0
    assert outcome.hits >= outcome.blows["worker"] / 2, "most kills hit running work"
    assert found.attempts >= found.chunks + outcome.hits / 2, "what was lost was done again"
    print(f"{outcome.kills} kills, {found.attempts - found.chunks} chunks done again")
