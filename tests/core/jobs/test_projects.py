import threading
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from core.db.models import Artifact, Chunk, Job, Output, Upload
from core.db.session import reading, transaction
from core.errors import Conflict, NotFound, QuotaExceeded, SpecInvalid, StorageFull
from core.jobs import audit, projects, service
from core.jobs.ids import new_id
from core.jobs.projects import FIRST_PROJECT, Use
from core.kinds.echo import Spec
from tests.conftest import Clock


def make(session: Session, clock: Clock, name: str = "p", **limits: Any) -> str:
    return projects.create(session, name=name, now=clock(), **limits).id


def submit(session: Session, project: str, clock: Clock) -> Job:
    spec = Spec(kind="echo", text="x")
    return service.submit(session, spec, project=project, by="local", now=clock())


def store(session: Session, clock: Clock, sha256: str, size_bytes: int) -> None:
    about = {"format": "x", "media_type": "a/b", "file_name": "x", "meta": {}}
    session.add(Artifact(sha256=sha256, size_bytes=size_bytes, created_at=clock(), **about))
    session.flush()


def send(session: Session, project: str, clock: Clock, **more: Any) -> None:
    about = {"file_name": "x", "sha256": "0" * 64, "created_at": clock(), "updated_at": clock()}
    session.add(Upload(id=new_id("up"), project_id=project, **{**about, **more}))
    session.flush()


def made(session: Session, job: Job, clock: Clock, sha256: str, name: str) -> None:
    chunk = session.query(Chunk).filter_by(job_id=job.id).first()
    assert chunk is not None
    about = {"role": "artifact", "file_name": "x", "cached": False, "created_at": clock()}
    session.add(Output(chunk_id=chunk.id, job_id=job.id, name=name, sha256=sha256, **about))
    session.flush()


def test_first_project_is_there_with_the_database(engine: Engine) -> None:
    with reading(engine) as session:
        found = projects.get(session, FIRST_PROJECT)

    assert (found.name, found.weight, found.queued_limit) == ("default", 1.0, None)


def test_projects_are_made_changed_and_listed_by_name(engine: Engine, clock: Clock) -> None:
    with transaction(engine) as session:
        one = make(session, clock, "zebra", weight=2.0, queued_limit=3)
        make(session, clock, "ape")
    with transaction(engine) as session:
        projects.change(session, one, values={"weight": 0.5, "queued_limit": None})
    with reading(engine) as session:
        found = projects.list_projects(session)

    assert [project.name for project in found] == ["ape", "default", "zebra"]
    assert (found[2].id, found[2].weight, found[2].queued_limit) == (one, 0.5, None)


def test_a_name_is_taken_once(engine: Engine, clock: Clock) -> None:
    with transaction(engine) as session:
        other = make(session, clock, "mine")
        make(session, clock, "other")
        with pytest.raises(Conflict, match="'mine'"):
            make(session, clock, "mine")
        with pytest.raises(Conflict, match="'other'"):
            projects.change(session, other, values={"name": "other", "weight": 3.0})
    with reading(engine) as session:
        assert projects.get(session, other).weight == 1.0


@pytest.mark.parametrize(
    ("values", "pointer"),
    [
        ({"weight": 0}, "/weight"),
        ({"weight": -1.0}, "/weight"),
        ({"weight": float("nan")}, "/weight"),
        ({"weight": float("inf")}, "/weight"),
        ({"running_limit": -1}, "/running_limit"),
        ({"storage_limit_bytes": -1}, "/storage_limit_bytes"),
    ],
)
def test_impossible_values_are_refused(
    engine: Engine, clock: Clock, values: dict[str, Any], pointer: str
) -> None:
    with transaction(engine) as session:
        with pytest.raises(SpecInvalid) as told:
            projects.change(session, FIRST_PROJECT, values=values)
        assert told.value.pointer == pointer
        with pytest.raises(SpecInvalid):
            projects.create(session, name="x", now=clock(), **values)


def test_unknown_projects_are_not_found(engine: Engine) -> None:
    with transaction(engine) as session:
        with pytest.raises(NotFound):
            projects.get(session, "prj_x")
        with pytest.raises(NotFound):
            projects.change(session, "prj_x", values={"weight": 1.0})


def test_use_counts_open_jobs_running_chunks_and_distinct_bytes(
    engine: Engine, clock: Clock
) -> None:
    with transaction(engine) as session:
        mine, other = make(session, clock, "mine"), make(session, clock, "other")
        job, over, foreign = (submit(session, p, clock) for p in (mine, mine, other))
        over.state, over.finished_at = "succeeded", clock()
        session.query(Chunk).filter_by(job_id=job.id).update({"state": "running"})
        for sha256, size in (("a" * 64, 100), ("b" * 64, 20), ("c" * 64, 3)):
            store(session, clock, sha256, size)
        made(session, job, clock, "a" * 64, "one")
        made(session, over, clock, "a" * 64, "same")
        made(session, over, clock, "b" * 64, "two")
        made(session, foreign, clock, "c" * 64, "three")
        send(session, mine, clock, state="complete", artifact="b" * 64, size_bytes=999)
        send(session, mine, clock, state="open", size_bytes=7_000)
        send(session, mine, clock, state="failed", size_bytes=80_000)

        assert projects.use_of(session, mine) == Use(1, 1, 7_120)
        assert projects.use_of(session, other) == Use(0, 1, 3)
        assert projects.use_of(session, FIRST_PROJECT) == Use(0, 0, 0)


def test_queue_limit_names_itself_and_what_is_in_use(engine: Engine, clock: Clock) -> None:
    with transaction(engine) as session:
        mine, other = make(session, clock, queued_limit=2), make(session, clock, "other")
        first = submit(session, mine, clock)
        submit(session, mine, clock)
        with pytest.raises(QuotaExceeded, match=r"queued_limit: project 'p' has 2 jobs .* of 2"):
            submit(session, mine, clock)
        submit(session, other, clock)
        first.state, first.finished_at = "cancelled", clock()
        submit(session, mine, clock)


def test_storage_limit_names_itself_and_what_is_in_use(engine: Engine, clock: Clock) -> None:
    with transaction(engine) as session:
        mine = make(session, clock, storage_limit_bytes=100)
        send(session, mine, clock, state="open", size_bytes=60)
        projects.check_storage(session, mine, now=clock(), adding_bytes=40)
        with pytest.raises(StorageFull, match="holds 60 bytes, of 100 allowed and this would"):
            projects.check_storage(session, mine, now=clock(), adding_bytes=41)
        submit(session, mine, clock)
        send(session, mine, clock, state="open", size_bytes=40)
        with pytest.raises(StorageFull, match="storage_limit_bytes"):
            submit(session, mine, clock)
        projects.check_storage(session, FIRST_PROJECT, now=clock(), adding_bytes=1 << 60)


def test_limit_is_exact_however_many_ask_at_once(engine: Engine, clock: Clock) -> None:
    with transaction(engine) as session:
        mine = make(session, clock, queued_limit=5)
    refused: list[str] = []
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        for _ in range(2):
            try:
                with transaction(engine) as session:
                    submit(session, mine, clock)
            except QuotaExceeded as error:
                refused.append(error.message)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    with reading(engine) as session:
        assert projects.use_of(session, mine).queued_jobs == 5
    assert len(refused) == 11


def test_audit_is_written_with_the_change_and_paged_backwards(engine: Engine, clock: Clock) -> None:
    def note(session: Session, action: str, project: str) -> None:
        at, by = clock(), "key_1"
        audit.record(
            session, project=project, actor=by, action=action, target="t", now=at, data={"n": 1}
        )

    with transaction(engine) as session:
        mine = make(session, clock)
        for number in range(5):
            note(session, f"a{number}", mine if number % 2 else FIRST_PROJECT)
    with Session(engine) as session:
        note(session, "never", mine)
        session.flush()
        session.rollback()
    with reading(engine) as session:
        first, following = audit.list_entries(session, limit=3)
        rest, end = audit.list_entries(session, limit=3, before=following)
        own, _ = audit.list_entries(session, limit=9, project=mine)
        one, _ = audit.list_entries(session, limit=9, action="a3", actor="key_1", target="t")
        none, _ = audit.list_entries(session, limit=9, actor="key_2")

    assert [entry.action for entry in [*first, *rest]] == ["a4", "a3", "a2", "a1", "a0"]
    assert end is None
    assert [entry.action for entry in own] == ["a3", "a1"]
    assert [(entry.action, entry.data) for entry in one] == [("a3", {"n": 1})]
    assert one[0].at - clock() == timedelta(0)
    assert not none


def test_a_name_that_looks_like_an_id_is_refused(engine: Engine, clock: Clock) -> None:
    with transaction(engine) as session, pytest.raises(SpecInvalid, match="looks like an id"):
        make(session, clock, "prj_default2")


def test_stored_bytes_are_counted_twice_a_minute_unless_some_are_added(
    engine: Engine, clock: Clock
) -> None:
    with transaction(engine) as session:
        mine = make(session, clock, storage_limit_bytes=100)
        projects.check_storage(session, mine, now=clock())
        store(session, clock, "f" * 64, 100)
        send(session, mine, clock, state="complete", size_bytes=100, artifact="f" * 64)
        projects.check_storage(session, mine, now=clock())
        with pytest.raises(StorageFull):
            projects.check_storage(session, mine, now=clock(), adding_bytes=1)
        project = projects.get(session, mine)
        project.made_bytes = 0
        clock.tick(seconds=31)
        with pytest.raises(StorageFull):
            projects.check_storage(session, mine, now=clock())
