"""Who runs next: priority, share, age; limits; what fits nowhere stands in nobody's way."""

import heapq
import random
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from core.db.models import Chunk, Job
from core.db.session import reading, transaction
from core.errors import QuotaExceeded
from core.jobs import control, lease, pool, projects, recovery, scheduler, service, shares
from core.jobs.lease import Claim
from core.jobs.pool import Place
from core.jobs.shares import Fairness, Standing
from core.kinds._base import kinds
from core.kinds.echo import Spec
from tests.conftest import Clock
from tests.core.jobs.acts import (
    copies,
    fanned,
    hand_back,
    project,
    set_chunks,
    used,
    within,
    worker,
)
from tests.life import BY, GIB, PROJECT, RULES, claim, finish, pick, place, state, submit, try_claim


def claimed(engine: Engine, clock: Clock, count: int) -> list[str]:
    """The jobs of the next claims, none of which ends."""
    return [claim(engine, clock, f"w{number}").job_id for number in range(count)]


def standing(engine: Engine, clock: Clock, project_id: str) -> Standing:
    with reading(engine) as session:
        return shares.standings(session, now=clock(), fairness=RULES.fairness)[project_id]


def test_priority_beats_share_and_share_beats_age(engine: Engine, clock: Clock) -> None:
    busy, idle = (project(engine, clock, name) for name in ("busy", "idle"))
    used(engine, busy, 1000, clock)
    old = submit(engine, clock, project=busy)
    clock.tick(seconds=1)
    fair = submit(engine, clock, project=idle)
    clock.tick(seconds=1)
    urgent = submit(engine, clock, project=busy, priority=51)

    assert claimed(engine, clock, 3) == [urgent, fair, old]


def test_use_counts_by_weight(engine: Engine, clock: Clock) -> None:
    light = project(engine, clock, "light", weight=1.0)
    heavy = project(engine, clock, "heavy", weight=4.0)
    used(engine, light, 100, clock)
    used(engine, heavy, 390, clock)
    submit(engine, clock, project=light)
    clock.tick(seconds=1)
    first = submit(engine, clock, project=heavy)

    assert claimed(engine, clock, 1) == [first]
    clock.tick(seconds=11)
    # The running chunk counts already: 401 / 4 against 100.
    assert standing(engine, clock, heavy).level > standing(engine, clock, light).level


def test_a_burst_does_not_get_two_claims_in_a_row(engine: Engine, clock: Clock) -> None:
    burst, other = (project(engine, clock, name) for name in ("burst", "other"))
    many = [submit(engine, clock, project=burst) for _ in range(4)]
    clock.tick(seconds=1)
    one = submit(engine, clock, project=other)

    ids = claimed(engine, clock, 3)

    assert ids[0] in many
    assert ids[1] == one
    assert ids[2] in many


def test_use_halves_in_each_half_life_and_never_grows(engine: Engine, clock: Clock) -> None:
    then, now = (project(engine, clock, name) for name in ("then", "now"))
    used(engine, then, 100, clock)
    clock.tick(days=1)
    used(engine, now, 60, clock)
    assert standing(engine, clock, then).usage == pytest.approx(50)
    submit(engine, clock, project=now)
    clock.tick(seconds=1)
    less = submit(engine, clock, project=then)
    assert claimed(engine, clock, 1) == [less]

    clock.tick(days=-2)
    assert standing(engine, clock, now).usage == pytest.approx(60), "a clock set back decays none"
    assert Fairness(timedelta(hours=1)).decayed(8.0, timedelta(hours=3)) == pytest.approx(1.0)


def test_use_decays_before_more_is_added(engine: Engine, clock: Clock) -> None:
    one = project(engine, clock, "one")
    used(engine, one, 100, clock)
    clock.tick(days=1)
    used(engine, one, 10, clock)
    clock.tick(days=1)

    assert standing(engine, clock, one).usage == pytest.approx(30)


def test_shares_are_of_those_who_use_the_pool_or_wait_for_it(engine: Engine, clock: Clock) -> None:
    one, two, idle = (
        project(engine, clock, name, weight=weight)
        for name, weight in (("one", 1), ("two", 3), ("idle", 9))
    )
    used(engine, one, 80, clock)
    submit(engine, clock, project=two)

    with reading(engine) as session:
        found = shares.standings(session, now=clock(), fairness=RULES.fairness)

    assert [found[p].share for p in (one, two, idle, PROJECT)] == [0.25, 0.75, 0, 0]
    assert [found[p].debt for p in (one, two, idle)] == [60, -60, 0]


def test_a_running_limit_is_never_passed(engine: Engine, clock: Clock) -> None:
    small = project(engine, clock, "small", running_limit=2)
    fanned(engine, clock, project=small)
    submit(engine, clock, project=small)

    running = [claim(engine, clock, f"w{number}") for number in range(2)]
    assert try_claim(engine, clock) is None
    finish(engine, running[0], clock)
    assert try_claim(engine, clock) is not None
    assert try_claim(engine, clock) is None

    within(engine, projects.change, small, values={"running_limit": 0})
    finish(engine, running[1], clock)
    assert try_claim(engine, clock) is None
    within(engine, projects.change, small, values={"running_limit": None})
    assert try_claim(engine, clock) is not None
    assert try_claim(engine, clock) is None, "no chunk is left"


def test_claims_at_once_keep_the_limit(engine: Engine, clock: Clock) -> None:
    """Of workers that would take different jobs, so that no lock on a job keeps them apart."""
    small = project(engine, clock, "small", running_limit=1)
    for device in ("cpu", "gpu"):
        submit(engine, clock, project=small, device=device)
    places = [place("host:a", "cpu"), place("host:b", "cuda:0")]
    start = Barrier(2)

    def one(at: Place) -> Claim | None:
        start.wait()
        return try_claim(engine, clock, at.node, at=at)

    with ThreadPoolExecutor(2) as threads:
        for _ in range(8):
            found = [claimed for claimed in threads.map(one, places) if claimed is not None]
            assert len(found) == 1
            hand_back(engine, found[0], clock)


def test_a_project_at_its_limit_of_jobs_is_refused(engine: Engine, clock: Clock) -> None:
    small = project(engine, clock, "small", queued_limit=2)
    first = submit(engine, clock, project=small)
    clock.tick(seconds=1)
    submit(engine, clock, project=small)
    claim(engine, clock)

    with pytest.raises(QuotaExceeded, match=r"queued_limit.*has 2 jobs.*of 2 allowed"):
        submit(engine, clock, project=small)
    submit(engine, clock)
    within(engine, control.cancel, first, project=small, now=clock())
    with pytest.raises(QuotaExceeded):  # its chunk still runs
        submit(engine, clock, project=small)
    clock.tick(seconds=60)
    recovery.tick(engine, now=clock(), rules=RULES)
    assert state(engine, first) == "cancelled"
    last = submit(engine, clock, project=small)
    with pytest.raises(QuotaExceeded):
        within(engine, control.retry, first, project=small, by=BY, now=clock())
    assert state(engine, last) == "queued"


def test_the_last_place_is_given_once(engine: Engine, clock: Clock) -> None:
    small = project(engine, clock, "small", queued_limit=1)

    def tries(_: int) -> bool:
        try:
            submit(engine, clock, project=small)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(tries, range(4))) == 1


def test_an_urgent_job_takes_the_next_chunk_edge(engine: Engine, clock: Clock) -> None:
    long = submit(engine, clock, times=3)
    running = claim(engine, clock)
    clock.tick(seconds=1)
    urgent = submit(engine, clock, priority=90, times=2)
    clock.tick(seconds=5)
    finish(engine, running, clock)

    order = []
    for _ in range(4):
        running = claim(engine, clock)
        order.append((running.job_id, running.index))
        clock.tick(seconds=1)
        finish(engine, running, clock)

    assert order == [(urgent, 0), (urgent, 1), (long, 1), (long, 2)]
    assert state(engine, long) == "succeeded"


def test_a_changed_priority_counts_from_the_next_claim(engine: Engine, clock: Clock) -> None:
    submit(engine, clock)
    clock.tick(seconds=1)
    later = submit(engine, clock)

    within(engine, control.change, later, project=PROJECT, priority=51, now=clock())

    assert claimed(engine, clock, 1) == [later]


def test_what_cannot_run_here_stands_in_nobodys_way(engine: Engine, clock: Clock) -> None:
    full = project(engine, clock, "full", running_limit=0)
    submit(engine, clock, priority=100, device="gpu")
    big = submit(engine, clock, priority=99)
    set_chunks(engine, big, memory_bytes=64 * GIB)
    submit(engine, clock, priority=98, project=full)
    failed = submit(engine, clock, priority=97)
    set_chunks(engine, failed, failed_on="host:w1", retry_at=clock() + timedelta(seconds=9))
    paused = submit(engine, clock, priority=96)
    within(engine, control.pause, paused, project=PROJECT, now=clock())
    small = submit(engine, clock, priority=1)

    found = pick(engine, clock, at=place("host:w1", "cpu", 8 * GIB))

    assert found is not None
    assert found.job_id == small


def test_nothing_starts_on_a_node_that_drains_or_is_excluded(engine: Engine, clock: Clock) -> None:
    at = worker(engine, clock)
    job_id = submit(engine, clock)
    for kept_out in (pool.DRAINING, pool.EXCLUDED):
        within(engine, pool.set_node_state, at.node, kept_out, note=None, now=clock())
        assert pick(engine, clock, at=at) is None
    within(engine, pool.set_node_state, at.node, pool.ACTIVE, note=None, now=clock())

    assert claim(engine, clock, at=at).job_id == job_id


def test_a_burst_delays_anothers_single_job_by_one_chunk(engine: Engine, clock: Clock) -> None:
    burst, other = (project(engine, clock, name) for name in ("burst", "other"))
    copies(engine, submit(engine, clock, project=burst), 999)
    for _ in range(3):
        clock.tick(seconds=4)
        finish(engine, claim(engine, clock), clock)
    running = [claim(engine, clock, owner) for owner in ("w1", "w2")]
    clock.tick(seconds=1)
    single = submit(engine, clock, project=other)
    clock.tick(seconds=1)
    finish(engine, running[0], clock)

    assert claim(engine, clock).job_id == single


class Simulation:
    """Workers that run chunks of random length under a clock of their own, in one transaction."""

    def __init__(self, session: Session, clock: Clock, workers: int, seed: int) -> None:
        self.session, self.clock = session, clock
        self.random = random.Random(seed)
        self.free = [place(f"host:w{number}") for number in range(workers)]
        self.running: list[tuple[Any, int, Claim, Place]] = []
        self.seconds: dict[str, float] = {}

    def submit(self, project_id: str, times: int = 1) -> None:
        spec = kinds()["echo"].spec.model_validate({"kind": "echo", "text": "x", "times": times})
        service.submit(self.session, spec, project=project_id, by=BY, now=self.clock())

    def step(self, mean_s: dict[str, float]) -> str:
        """Let every free worker claim, and the first chunk end; return whose it was."""
        for at in self.free:
            best = scheduler.pick(
                self.session, at, now=self.clock(), fairness=RULES.fairness, lock=True
            )
            assert best is not None, "every project has work all the time"
            about = {"owner": at.node, "place": at, "now": self.clock(), "rules": RULES}
            taken = lease.claim(self.session, best, **about)
            assert taken is not None
            mean = mean_s[self.session.get_one(Job, taken.job_id).project_id]
            end = self.clock() + timedelta(seconds=mean * self.random.uniform(0.5, 1.5))
            heapq.heappush(self.running, (end, taken.chunk_id, taken, at))
        self.clock.now, _, ended, at = heapq.heappop(self.running)
        self.free = [at]
        about = {"stored": (), "metrics": (), "stage_done": False}
        lease.finish(self.session, ended, **about, now=self.clock(), rules=RULES)
        chunk = self.session.get_one(Chunk, ended.chunk_id)
        owner = self.session.get_one(Job, ended.job_id).project_id
        self.seconds[owner] = self.seconds.get(owner, 0.0) + chunk.seconds
        return owner


def test_three_projects_get_their_shares(engine: Engine, clock: Clock) -> None:
    """Many small jobs, a few long chains and a trickle, of unequal chunks: weights 1, 1 and 2."""
    crowd, chains, trickle = (
        project(engine, clock, name, weight=weight)
        for name, weight in (("crowd", 1), ("chains", 1), ("trickle", 2))
    )
    copies(engine, submit(engine, clock, project=crowd), 99)
    mean_s = {crowd: 3.0, chains: 7.0, trickle: 5.0}
    with transaction(engine) as session:
        world = Simulation(session, clock, workers=2, seed=5)
        for _ in range(2):
            world.submit(chains, times=60)
        for _ in range(4):
            world.submit(trickle)
        for _ in range(100):
            if world.step(mean_s) == trickle:
                world.submit(trickle)
        session.rollback()

    total = sum(world.seconds.values())
    for project_id, share in ((crowd, 0.25), (chains, 0.25), (trickle, 0.5)):
        assert world.seconds[project_id] / total == pytest.approx(share, rel=0.05)


CHUNK = st.fixed_dictionaries(
    {
        "device": st.sampled_from([None, "cpu", "gpu"]),
        "memory_bytes": st.sampled_from([0, 4 * GIB, 16 * GIB]),
        "failed_on": st.sampled_from([None, "host:a", "host:b"]),
        "late": st.booleans(),
        "priority": st.sampled_from([40, 50]),
        "project": st.integers(0, 2),
        "paused": st.booleans(),
    }
)
PLACE = st.builds(
    Place,
    node=st.sampled_from(["host:a", "host:b"]),
    device=st.sampled_from(["cpu", "cuda:0"]),
    memory_bytes=st.sampled_from([GIB, 4 * GIB, 80 * GIB]),
)


def test_what_is_picked_fits_and_is_the_best_that_fits(engine: Engine, clock: Clock) -> None:
    limits = (None, 0, None)
    ids = [project(engine, clock, f"p{i}", running_limit=m) for i, m in enumerate(limits)]
    for level, project_id in enumerate(ids):
        used(engine, project_id, 100.0 - level, clock)

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(CHUNK, max_size=6), PLACE)
    def check(asked: list[dict[str, Any]], at: Place) -> None:
        fitting = []
        with transaction(engine) as session:
            for age, one in enumerate(asked):
                spec = Spec(text="x", priority=one["priority"])
                owner = ids[one["project"]]
                job = service.submit(session, spec, project=owner, by=BY, now=clock())
                retry_at = clock() + timedelta(seconds=5 if one["late"] else -5)
                values = {k: one[k] for k in ("device", "memory_bytes", "failed_on")}
                chunk = update(Chunk).where(Chunk.job_id == job.id)
                session.execute(chunk.values(**values, retry_at=retry_at))
                if one["paused"]:
                    control.pause(session, job.id, project=owner, now=clock())
                job.created_at = clock() + timedelta(seconds=age)
                session.flush()
                away = one["failed_on"] == at.node and one["late"]
                device = one["device"] in (None, "cpu" if at.device == "cpu" else "gpu")
                fits = device and one["memory_bytes"] <= at.memory_bytes and not away
                if fits and not one["paused"] and one["project"] != 1:
                    fitting.append((-one["priority"], -one["project"], age, job.id))
            found = scheduler.pick(session, at, now=clock(), fairness=RULES.fairness)
            assert (found.job_id if found else None) == (min(fitting)[-1] if fitting else None)
            assert not session.scalars(select(Chunk.id).where(Chunk.state == "running")).all()
            session.rollback()

    check()
