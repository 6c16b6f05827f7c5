"""The figures against the rows they sum up, on both databases."""

import re
import threading
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, select

from core.artifacts.store import LocalStore
from core.db.models import Artifact, CacheEntry, Chunk, Event, Job, Output, Project
from core.db.session import reading, transaction
from core.errors import ChunkCrashed, OutOfMemory
from core.jobs import control, figures, lease, pool, scheduler, service, shares
from core.jobs.adoption import Stored
from core.jobs.lease import Claim, Rules
from core.jobs.pool import Place
from core.jobs.projects import FIRST_PROJECT
from core.jobs.runner import Runner
from core.jobs.states import TERMINAL
from core.kinds.echo import Spec
from tests.api.conftest import ECHO
from tests.conftest import Clock, make_runner

RULES = Rules()
PLACE = Place(node="host:cpu", device="cpu", memory_bytes=1 << 40)
OTHER = "prj_other"
Samples = Mapping[tuple[str, ...], float]


class Passing:
    """A clock on which every look takes a while."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(self) -> datetime:
        self._clock.tick(milliseconds=333)
        return self._clock()


@pytest.fixture
def busy(engine: Engine, store: LocalStore, clock: Clock, tmp_path: Path) -> Runner:
    """A runner whose chunks take time."""
    return make_runner(engine, store, Passing(clock), tmp_path)


@pytest.fixture
def other(engine: Engine, clock: Clock) -> str:
    """A second project."""
    with transaction(engine) as session:
        row = Project(id=OTHER, name="other", weight=3.0, usage_at=clock(), created_at=clock())
        session.add(row)
    return OTHER


def submit(engine: Engine, clock: Clock, *, project: str = FIRST_PROJECT, **more: object) -> str:
    spec = Spec.model_validate({**ECHO, **more})
    with transaction(engine) as session:
        return service.submit(session, spec, project=project, by="local", now=clock()).id


def claim(engine: Engine, clock: Clock) -> Claim:
    with transaction(engine) as session:
        best = scheduler.pick(session, PLACE, now=clock(), fairness=RULES.fairness)
        assert best is not None
        found = lease.claim(session, best, owner="w1", place=PLACE, now=clock(), rules=RULES)
    assert found is not None
    return found


def finish(engine: Engine, clock: Clock, claimed: Claim, *stored: Stored) -> None:
    with transaction(engine) as session:
        lease.finish(
            session,
            claimed,
            stored=stored,
            metrics=(),
            stage_done=False,
            now=clock(),
            rules=RULES,
        )


def fail(engine: Engine, clock: Clock, claimed: Claim, error: Any) -> None:
    with transaction(engine) as session:
        lease.give_up(session, claimed, error, now=clock(), rules=RULES)


def measure(engine: Engine, clock: Clock) -> dict[str, figures.Figure]:
    with reading(engine) as session:
        found = figures.measure(session, now=clock(), rules=RULES)
    assert len({figure.name for figure in found}) == len(found)
    return {figure.name.removeprefix("stillroom_"): figure for figure in found}


def only(engine: Engine, clock: Clock, name: str) -> float:
    return measure(engine, clock)[name].samples[()]


def rows(engine: Engine, table: Any) -> Any:
    with reading(engine) as session:
        return session.scalars(select(table)).all()


def nonzero(samples: Samples) -> Samples:
    return {labels: value for labels, value in samples.items() if value}


def test_figures_are_the_sums_of_the_rows(
    engine: Engine, clock: Clock, busy: Runner, other: str
) -> None:
    for times in (1, 2, 3):
        submit(engine, clock, times=times)
    submit(engine, clock, project=other, times=4)
    for _ in range(7):
        assert busy.run_one()
    submit(engine, clock, project=other, device="gpu")

    found = measure(engine, clock)
    jobs, chunks = rows(engine, Job), rows(engine, Chunk)
    project = {job.id: job.project_id for job in jobs}
    still_open = Counter((j.project_id, j.state) for j in jobs if j.state not in TERMINAL)
    finished = Counter((j.project_id, j.kind, j.state) for j in jobs if j.state in TERMINAL)
    seconds: Counter[tuple[str, str]] = Counter()
    attempts: Counter[tuple[str, str]] = Counter()
    for chunk in chunks:
        seconds[project[chunk.job_id], "echo"] += chunk.seconds
        attempts[project[chunk.job_id], "echo"] += chunk.attempt
    ready = Counter((project[c.job_id], c.device or "any") for c in chunks if c.state == "ready")
    assert found["jobs_finished_total"].samples == finished
    assert sum(finished.values()) >= 2
    assert nonzero(found["jobs"].samples) == still_open
    assert found["jobs"].samples[other, "paused"] == 0
    assert found["chunk_seconds_total"].samples == pytest.approx(seconds, abs=2e-3)
    assert sum(seconds.values()) > 1
    assert found["chunk_attempts_total"].samples == attempts
    assert found["chunks_ready"].samples == ready
    assert (other, "gpu") in ready
    assert found["chunks_running"].samples == {}


def test_stored_bytes_are_those_of_the_rows(
    engine: Engine, clock: Clock, runner: Runner, store: LocalStore
) -> None:
    for said in ("once", "again", "again"):
        submit(engine, clock, text=said, times=1)
    while runner.run_one():
        pass
    submit(engine, clock, times=3)
    for _ in range(2):
        runner.run_one()

    found = measure(engine, clock)
    artifacts = {row.sha256: row.size_bytes for row in rows(engine, Artifact)}
    held = {row.sha256 for row in rows(engine, Output) if row.role == "checkpoint"}
    on_disk = sum(store.path(sha256).stat().st_size for sha256 in artifacts)
    assert found["artifacts"].samples[()] == len(artifacts) >= 3
    assert found["artifact_bytes"].samples[()] == sum(artifacts.values()) == on_disk
    assert found["checkpoint_bytes"].samples[()] == sum(artifacts[one] for one in held) > 0


def cached(sha256: str, key: str, *, hit: bool) -> Stored:
    return Stored(
        name="text",
        role="artifact",
        sha256=sha256 * 64,
        size_bytes=1,
        format="text",
        media_type="text/plain",
        file_name="echo.txt",
        meta={},
        cache_key=key,
        cached=hit,
    )


def test_the_cache_hit_ratio_is_hits_over_outputs_with_a_key(engine: Engine, clock: Clock) -> None:
    assert only(engine, clock, "cache_hit_ratio") == 0
    for sha256, key, hit in (("a", "k", False), ("b", "l", False), ("a", "k", True)):
        submit(engine, clock, times=1)
        finish(engine, clock, claim(engine, clock), cached(sha256, key, hit=hit))

    found = measure(engine, clock)
    assert found["cache_hits_total"].samples == {(FIRST_PROJECT, "echo"): 1}
    assert found["cache_entries"].samples[()] == len(rows(engine, CacheEntry)) == 2
    assert found["cache_hit_ratio"].samples[()] == pytest.approx(1 / 3)


def test_failures_are_counted_by_code(engine: Engine, clock: Clock) -> None:
    submit(engine, clock)
    for _ in range(2):
        fail(engine, clock, claim(engine, clock), ChunkCrashed("private"))
        clock.tick(minutes=1)
    fail(engine, clock, claim(engine, clock), OutOfMemory("private"))

    found = measure(engine, clock)
    told = Counter((e.data["code"],) for e in rows(engine, Event) if e.type == "chunk.failed")
    expected = {("chunk_crashed",): 2, ("out_of_memory",): 1}
    assert found["chunk_failures_total"].samples == told == expected
    assert found["jobs_finished_total"].samples == {(FIRST_PROJECT, "echo", "failed"): 1}


def test_the_lease_age_is_the_time_since_the_oldest_renewal(engine: Engine, clock: Clock) -> None:
    assert only(engine, clock, "lease_age_max_seconds") == 0
    for _ in range(2):
        submit(engine, clock)
    old, young = claim(engine, clock), claim(engine, clock)
    clock.tick(seconds=7)
    with transaction(engine) as session:
        lease.renew(session, young, until=clock() + RULES.lease, progress=0.5)

    assert only(engine, clock, "lease_age_max_seconds") == 7
    assert measure(engine, clock)["chunks_running"].samples == {(FIRST_PROJECT, "any"): 2}
    finish(engine, clock, old)
    assert only(engine, clock, "lease_age_max_seconds") == 0


def test_a_ready_chunk_ages_while_nothing_happens_to_its_job(engine: Engine, clock: Clock) -> None:
    name = "oldest_ready_chunk_age_seconds"
    assert only(engine, clock, name) == 0
    submit(engine, clock)
    clock.tick(seconds=60)
    assert only(engine, clock, name) == 60

    running = claim(engine, clock)
    clock.tick(seconds=30)
    assert only(engine, clock, name) == 0, "its job runs"
    later = submit(engine, clock)
    clock.tick(seconds=10)
    assert only(engine, clock, name) == 10

    finish(engine, clock, running)
    clock.tick(seconds=5)
    assert only(engine, clock, name) == 15
    with transaction(engine) as session:
        control.pause(session, later, project=None, now=clock())
    assert only(engine, clock, name) == 5, "what is paused does not wait"


def test_workers_count_while_they_are_heard_of(engine: Engine, clock: Clock) -> None:
    assert measure(engine, clock)["workers_alive"].samples == {("cpu",): 0, ("gpu",): 0}
    places = [
        PLACE,
        Place("host:cuda:0", "cuda:0", 1 << 34),
        Place("far:cuda:0", "cuda:0", 1 << 34),
    ]
    with transaction(engine) as session:
        for place in places:
            pool.hello(session, f"w:{place.node}", place=place, now=clock())
        pool.set_node_state(session, "far:cuda:0", pool.DRAINING, note=None, now=clock())

    found = measure(engine, clock)
    assert found["workers_alive"].samples == {("cpu",): 1, ("gpu",): 2}
    assert found["nodes"].samples == {("active",): 2, ("draining",): 1, ("excluded",): 0}
    clock.tick(seconds=60)
    assert sum(measure(engine, clock)["workers_alive"].samples.values()) == 0


def test_a_running_chunk_counts_in_the_pool_of_its_worker(engine: Engine, clock: Clock) -> None:
    with transaction(engine) as session:
        pool.hello(session, "w1", place=PLACE, now=clock())
    submit(engine, clock)
    claim(engine, clock)

    assert measure(engine, clock)["chunks_running"].samples == {(FIRST_PROJECT, "cpu"): 1}


def test_shares_are_those_by_which_claims_are_decided(
    engine: Engine, clock: Clock, busy: Runner, other: str
) -> None:
    submit(engine, clock, times=3)
    submit(engine, clock, project=other)
    for _ in range(3):
        busy.run_one()

    found = measure(engine, clock)
    with reading(engine) as session:
        standing = shares.standings(session, now=clock(), fairness=RULES.fairness)
    for name, field in (
        ("project_usage_seconds", "usage"),
        ("project_share", "share"),
        ("project_debt_seconds", "debt"),
        ("project_weight", "weight"),
    ):
        expected = {(one.project_id,): getattr(one, field) for one in standing.values()}
        assert found[name].samples == pytest.approx(expected)
    assert found["project_share"].samples[other,] == pytest.approx(0.75)
    assert sum(found["project_debt_seconds"].samples.values()) == pytest.approx(0)
    assert found["project_info"].samples[other, "other"] == 1


class Counters:
    """Looks again and again, and finds no counter below what it was."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._before: dict[str, Samples] = {}

    def look(self) -> None:
        found = measure(self._engine, self._clock)
        now = {name: f.samples for name, f in found.items() if f.type == "counter"}
        for name, samples in self._before.items():
            for labels, value in samples.items():
                assert now[name].get(labels, -1) >= value, (name, labels)
        self._before = now


def test_counters_only_rise_through_a_jobs_whole_life(engine: Engine, clock: Clock) -> None:
    counters = Counters(engine, clock)
    steps = 0

    def look() -> None:
        nonlocal steps
        steps += 1
        clock.tick(seconds=6.7)
        counters.look()

    look()
    failing = submit(engine, clock, times=3)
    look()
    finish(engine, clock, claim(engine, clock), cached("a", "k", hit=True))
    look()
    held = claim(engine, clock)
    look()
    with transaction(engine) as session:
        lease.hand_back(session, held, now=clock(), rules=RULES)
    look()
    fail(engine, clock, claim(engine, clock), OutOfMemory("no"))
    look()
    with transaction(engine) as session:
        control.retry(session, failing, project=None, by="local", now=clock())
    look()
    while rows(engine, Job)[-1].state not in TERMINAL and steps < 20:
        finish(engine, clock, claim(engine, clock))
        look()
    stopped = submit(engine, clock)
    claim(engine, clock)
    look()
    with transaction(engine) as session:
        control.cancel(session, stopped, project=None, now=clock())
    look()


def test_counters_only_rise_while_jobs_end_between_the_queries(
    engine: Engine, store: LocalStore, tmp_path: Path
) -> None:
    clock = Clock()
    for _ in range(40):
        submit(engine, clock, times=1)
    runner = make_runner(engine, store, lambda: datetime.now(UTC), tmp_path)  # noqa: TID251
    over = threading.Event()

    def work() -> None:
        while runner.run_one():
            pass
        over.set()

    thread = threading.Thread(target=work)
    thread.start()
    counters, looks = Counters(engine, clock), 0
    while not over.is_set():
        counters.look()
        looks += 1
    thread.join()

    counters.look()
    assert looks > 5
    assert {job.state for job in rows(engine, Job)} == {"succeeded"}


BIG = ("jobs", "chunks", "events", "outputs", "artifacts", "cache_entries")


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_no_figure_reads_a_big_table_whole(engine: Engine, clock: Clock) -> None:
    asked: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, said: str, given: Any, *_: Any) -> None:
        asked.append((said, given))

    event.listen(engine, "before_cursor_execute", note)
    measure(engine, clock)
    event.remove(engine, "before_cursor_execute", note)

    whole = []
    with engine.connect() as connection:
        for said, given in asked:
            if said.startswith("SELECT"):
                plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {said}", given)
                steps = [str(step[3]) for step in plan]
                whole += [s for s in steps if re.fullmatch(rf"SCAN ({'|'.join(BIG)})", s)]
    assert len(asked) > 10
    assert whole == []
