"""Whatever happens in whatever order: the sums a job keeps are those of its chunks, none is stuck.

A walk of random steps from a seed; after each step every rule is checked over all jobs.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, select

from core.db.models import Chunk, Job, JobInput, Project
from core.db.session import reading
from core.errors import ChunkCrashed, Conflict, LeaseLost, OutOfMemory, SpecInvalid, WorkerLost
from core.jobs import control, lease, recovery
from core.jobs.lease import Claim, Rules
from core.jobs.shares import Fairness
from core.jobs.states import TERMINAL
from tests.conftest import Clock
from tests.core.jobs.acts import MADE_MODEL, a_file, fanned, fit, project, within
from tests.life import BY, submit, try_claim

FOR_EVER = timedelta(days=10**8)
RULES = Rules(fairness=Fairness(half_life=FOR_EVER))
LIMITS = (None, 2)
OVER = ("done", "skipped")


class Walk:
    """Jobs of two projects, three workers, and a random hand."""

    def __init__(
        self, engine: Engine, clock: Clock, seed: int, *, beside: "Walk | None" = None
    ) -> None:
        self.engine, self.clock = engine, clock
        self.random = random.Random(seed)
        self.alone = beside is None
        self.projects = beside.projects if beside else self._make_projects()
        self.held: dict[str, Claim] = {}
        self.stale: list[Claim] = []
        self.ended: dict[str, tuple[Any, ...]] = {}
        self.told: list[str] = []
        self.hits: Counter[str] = Counter()

    def _make_projects(self) -> list[str]:
        return [
            project(self.engine, self.clock, f"p{number}", running_limit=limit)
            for number, limit in enumerate(LIMITS)
        ]

    def step(self) -> None:
        """Do one thing at random; what the state of a job forbids is refused."""
        few = sum(job.state not in TERMINAL for job in self.jobs()) < 5
        acts: dict[Callable[[], None], int] = {
            self.claim: 12,
            self.finish: 12,
            self.submit: 4 * few,
            self.below: 2 * few,
            self.crash: 2,
            self.fail: 1,
            self.stop: 3,
            self.late: 2,
            self.vanish: 2,
            self.restart: 1,
            **dict.fromkeys((self.cancel, self.change), 1),
            **dict.fromkeys((self.pause, self.resume, self.retry), 2),
        }
        act = self.random.choices(list(acts), list(acts.values()))[0]
        self.told.append(act.__name__)
        try:
            act()
        except (Conflict, SpecInvalid):
            self.told[-1] += " (refused)"
        self.clock.tick(seconds=self.random.choice((0, 1, 3)))

    def submit(self) -> None:
        about = {"project": self.random.choice(self.projects)}
        make = self.random.choice(("chain", "blocks", "late"))
        if make == "blocks":
            fanned(self.engine, self.clock, **about)
        else:
            limit = {"deadline_s": 9.0} if make == "late" else {}
            times = self.random.randint(1, 4)
            submit(self.engine, self.clock, times=times, **limit, **about)

    def below(self) -> None:
        about = {"project": self.random.choice(self.projects)}
        first = fit(self.engine, self.clock, **about)
        named = {"model": f"{first}/model"}
        cache = submit(self.engine, self.clock, kind="cache_targets", **named, **about)
        named["targets"] = f"{cache}/targets"
        submit(self.engine, self.clock, kind="distill", **named, **about)

    def claim(self) -> None:
        for owner in ("w0", "w1", "w2"):
            if owner not in self.held:
                found = try_claim(self.engine, self.clock, owner, rules=RULES)
                if found is not None:
                    self.held[owner] = found
                return

    def drain(self) -> None:
        """Let everything go on to its end: whoever never gets there is stuck."""
        self.restart()
        self.told.append("drain")
        for job in self.jobs():
            if job.state == "paused":
                within(self.engine, control.resume, job.id, project=None, now=self.clock())
        while True:
            self.clock.tick(seconds=320)  # past every wait for a retry
            self.claim()
            if not self.held:
                break
            self.finish()
        assert {job.state for job in self.jobs()} <= TERMINAL

    def _take(self) -> Claim | None:
        if not self.held:
            return None
        held = self.held.pop(self.random.choice(sorted(self.held)))
        self.stale.append(held)
        return held

    def _end(self, how: Callable[..., Any], held: Claim | None, *args: Any, **values: Any) -> None:
        """End an attempt; nothing changes where it was superseded."""
        if held is None:
            return
        try:
            within(self.engine, how, held, *args, **values, now=self.clock(), rules=RULES)
        except LeaseLost:
            self.told[-1] += " (lost)"

    def finish(self) -> None:
        held = self._take()
        if held is None:
            return
        found = self.random.random() < 0.3
        seed = self.random.randrange(1, 10**9)
        made = [a_file("state", seed, cached=found)]
        if held.stage == "assemble":
            made = [MADE_MODEL]
        elif held.stage == "list":
            made = [a_file("targets", seed, role="artifact", format="targets", meta=TARGETS)]
        early = held.stage == "lines" and self.random.random() < 0.1
        about = {"stored": made, "metrics": (), "stage_done": early}
        adopted = self._job(held.job_id).state != "cancelling"
        self._end(lease.finish, held, **about, score=self.random.random())
        if adopted and not self.told[-1].endswith("(lost)"):
            self.hits[held.job_id] += sum(file.cached for file in made)

    def crash(self) -> None:
        error = self.random.choice((ChunkCrashed, WorkerLost))
        self._end(lease.give_up, self._take(), error("x"))

    def fail(self) -> None:
        self._end(lease.give_up, self._take(), OutOfMemory("x"))

    def stop(self) -> None:
        """What a worker does that heard of its job's state, or must end itself."""
        held = self._take()
        if held is not None:
            cancelling = self._job(held.job_id).state == "cancelling"
            self._end(lease.stop if cancelling else lease.hand_back, held)

    def late(self) -> None:
        """An attempt that ended already writes once more."""
        if self.stale:
            held = self.random.choice(self.stale)
            hows = (lease.hand_back, lease.stop)
            self._end(self.random.choice(hows), held)
            assert self.told[-1].endswith("(lost)") or not self.alone

    def vanish(self) -> None:
        """Workers die, and their leases run out."""
        self.clock.tick(seconds=21)
        self.stale += self.held.values()
        self.held.clear()
        recovery.tick(self.engine, now=self.clock(), rules=RULES)

    def restart(self) -> None:
        self.stale += self.held.values()
        self.held.clear()
        recovery.release_all(self.engine, owner_prefix="w", now=self.clock(), rules=RULES)

    def _control(self, change: Callable[..., Any], *states: str, **values: Any) -> None:
        jobs = [job for job in self.jobs() if job.state in states]
        if jobs:
            job = self.random.choice(jobs)
            within(self.engine, change, job.id, project=None, now=self.clock(), **values)

    def cancel(self) -> None:
        self._control(control.cancel, "waiting", "queued", "running", "pausing", "paused")

    def pause(self) -> None:
        self._control(control.pause, "waiting", "queued", "running", "cancelling")

    def resume(self) -> None:
        self._control(control.resume, "pausing", "paused", "running")

    def retry(self) -> None:
        self._control(control.retry, "failed", "cancelled", by=BY)

    def change(self) -> None:
        open_states = ("waiting", "queued", "running", "paused", "pausing", "cancelling")
        self._control(control.change, *open_states, priority=self.random.randint(0, 100))

    def jobs(self) -> Sequence[Job]:
        with reading(self.engine) as session:
            return session.scalars(select(Job).order_by(Job.created_at, Job.id)).all()

    def _job(self, job_id: str) -> Job:
        with reading(self.engine) as session:
            return session.get_one(Job, job_id)

    def check(self) -> None:
        """Every rule, over every job."""
        with reading(self.engine) as session:
            jobs = session.scalars(select(Job)).all()
            chunks: dict[str, list[Chunk]] = {job.id: [] for job in jobs}
            order = (Chunk.stage_index, Chunk.index)
            for chunk in session.scalars(select(Chunk).order_by(*order)):
                chunks[chunk.job_id].append(chunk)
            missing = set(session.scalars(select(JobInput.job_id).where(JobInput.sha256.is_(None))))
            owners = session.scalars(select(Project).order_by(Project.id)).all()
        for job in jobs:
            self._check_sums(job, chunks[job.id])
            self._check_alive(job, chunks[job.id], waits=job.id in missing)
            if job.id in self.ended:
                assert self.ended[job.id] == _facts(job, chunks[job.id])
            elif job.state in TERMINAL:
                self.ended[job.id] = _facts(job, chunks[job.id])
        for owner in owners:
            mine = [job for job in jobs if job.project_id == owner.id]
            seconds = sum(job.device_seconds for job in mine)
            assert owner.usage == pytest.approx(seconds, abs=1e-3)
            running = [c for job in mine for c in chunks[job.id] if c.state == "running"]
            assert owner.running_limit is None or len(running) <= owner.running_limit

    def _check_sums(self, job: Job, chunks: list[Chunk]) -> None:
        over = [chunk for chunk in chunks if chunk.state in OVER]
        assert job.chunks_over == len(over)
        assert job.attempts == sum(chunk.attempt for chunk in chunks)
        seconds = sum(chunk.seconds for chunk in chunks)
        assert job.device_seconds == pytest.approx(seconds, abs=1e-6)
        assert (job.chunks or 0) == len(chunks)
        assert job.cache_hits == self.hits[job.id] or not self.alone
        if job.state not in ("failed", "cancelled"):
            still = [chunk for chunk in chunks if chunk.state not in OVER]
            assert job.stage == (still[0].stage if still else None)
        assert (job.state == "succeeded") == (len(over) == len(chunks) > 0)
        for stage_index in {chunk.stage_index for chunk in still_open(chunks)}:
            earlier = [chunk for chunk in chunks if chunk.stage_index < stage_index]
            assert all(chunk.state in OVER for chunk in earlier)

    def _check_alive(self, job: Job, chunks: list[Chunk], *, waits: bool) -> None:
        states = Counter(chunk.state for chunk in chunks)
        assert (job.finished_at is not None) == (job.state in TERMINAL)
        if job.state in TERMINAL:
            assert not states.keys() & {"ready", "blocked", "running"}
        elif job.state == "waiting":
            assert waits
            assert not chunks
        elif job.state == "paused":
            assert states["running"] == 0
            assert bool(states["ready"]) == bool(chunks)
        elif job.state in ("pausing", "cancelling"):
            assert states["running"] > 0
        else:
            assert states["ready"] + states["running"] > 0
        if job.state == "queued":
            assert states["running"] == 0


TARGETS = {"rows": 90, "dim": 16, "model": MADE_MODEL.sha256, "pairs": None, "teacher": None}


def still_open(chunks: list[Chunk]) -> list[Chunk]:
    return [chunk for chunk in chunks if chunk.state in ("ready", "running")]


def _facts(job: Job, chunks: list[Chunk]) -> tuple[Any, ...]:
    kept = [(chunk.id, chunk.state, chunk.attempt, chunk.seconds) for chunk in chunks]
    return (job.state, job.finished_at, job.error, job.device_seconds, job.attempts, kept)


@pytest.mark.parametrize("seed", range(3))
def test_sums_hold_and_nothing_is_stuck_whatever_happens(
    engine: Engine, clock: Clock, seed: int
) -> None:
    walk = Walk(engine, clock, seed)
    for _ in range(45):
        walk.step()
        try:
            walk.check()
        except AssertionError as error:
            raise AssertionError(f"after {', '.join(walk.told)}") from error
    walk.drain()
    walk.check()


def test_sums_hold_though_it_all_happens_at_once(engine: Engine, clock: Clock) -> None:
    first = Walk(engine, clock, 0)
    walks = [Walk(engine, clock, seed, beside=first) for seed in (1, 2, 3)]

    def go(walk: Walk) -> None:
        for _ in range(20):
            walk.step()

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(go, walks))

    walks[0].check()
    walks[0].drain()
    walks[0].check()
