"""The table of states: everything that can happen to a job, in every state it can be in."""

from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from core.db.models import Chunk, Job
from core.db.session import transaction
from core.errors import (
    Conflict,
    DeadlinePassed,
    LeaseLost,
    OutOfMemory,
    StillroomError,
    WorkerLost,
)
from core.jobs import control, lease, planning, service
from core.jobs.adoption import Stored
from core.jobs.lease import Claim
from core.jobs.scheduler import Candidate
from core.jobs.states import ALLOWED, TERMINAL, JobState
from core.kinds._base import kinds
from tests.conftest import Clock
from tests.core.jobs.acts import MADE_MODEL, pairs
from tests.life import BY, PROJECT, RULES, place


class Life:
    """A job, and everything that can happen to it, in one transaction."""

    def __init__(self, session: Session, clock: Clock, pairs_sha256: str) -> None:
        self.session, self.clock, self.pairs = session, clock, pairs_sha256
        self.held: Claim | None = None
        self.about = {"project": PROJECT, "now": clock()}
        self.ends = {"now": clock(), "rules": RULES}

    def echo(self, times: int) -> None:
        self.job_id = self._submit(kind="echo", text="hi", times=times)

    def below_a_fit(self) -> None:
        self.fit = self._submit(
            kind="fit_federated", pairs=self.pairs, strength=1.0, temperature=0.1
        )
        self.job_id = self._submit(kind="cache_targets", model=f"{self.fit}/model")

    def _submit(self, **spec: Any) -> str:
        parsed = kinds()[spec["kind"]].spec.model_validate(spec)
        return service.submit(self.session, parsed, project=PROJECT, by=BY, now=self.clock()).id

    def state(self) -> JobState:
        return JobState(service.get(self.session, self.job_id).state)

    def _claim(self, job_id: str) -> Claim | None:
        ready = select(Chunk.id).where(Chunk.job_id == job_id, Chunk.state == "ready").limit(1)
        best = Candidate(self.session.scalar(ready) or 0, job_id)
        return lease.claim(self.session, best, owner="w1", place=place(), **self.ends)

    def _finish(self, held: Claim, *made: Stored) -> None:
        about = {"stored": made, "metrics": (), "stage_done": False}
        lease.finish(self.session, held, **about, **self.ends)

    def begin(self) -> None:
        self.held = self._claim(self.job_id) or self.held

    def finish(self) -> None:
        if self.held is not None:
            self._finish(self.held)

    def _give_up(self, error: StillroomError) -> None:
        if self.held is not None:
            lease.give_up(self.session, self.held, error, **self.ends)

    def fail(self) -> None:
        self._give_up(OutOfMemory("no"))

    def crash(self) -> None:
        self._give_up(WorkerLost("no"))

    def stop(self) -> None:
        if self.held is not None and self.state() != JobState.RUNNING:
            lease.stop(self.session, self.held, **self.ends)

    def hand_back(self) -> None:
        if self.held is not None:
            lease.hand_back(self.session, self.held, **self.ends)

    def pause(self) -> None:
        control.pause(self.session, self.job_id, **self.about)

    def resume(self) -> None:
        control.resume(self.session, self.job_id, **self.about)

    def cancel(self) -> None:
        control.cancel(self.session, self.job_id, **self.about)

    def retry(self) -> None:
        control.retry(self.session, self.job_id, by=BY, **self.about)

    def deadline(self) -> None:
        job = self.session.get_one(Job, self.job_id)
        planning.fail(self.session, job, DeadlinePassed("late"), now=self.clock())

    def upstream_ends(self) -> None:
        while self._unfinished() and (held := self._claim(self.fit)) is not None:
            self._finish(held, *([MADE_MODEL] if held.stage == "assemble" else []))

    def upstream_fails(self) -> None:
        if self._unfinished():
            control.cancel(self.session, self.fit, **self.about)

    def _unfinished(self) -> bool:
        found = hasattr(self, "fit") and self.session.get_one(Job, self.fit)
        return bool(found) and found.state not in TERMINAL


SITUATIONS: dict[str, list[str]] = {
    "waiting": [],
    "queued": [],
    "running": ["begin"],
    "between two chunks": ["begin", "hand_back"],
    "pausing": ["begin", "pause"],
    "paused": ["pause"],
    "paused before its plan": ["pause"],
    "cancelling": ["begin", "cancel"],
    "succeeded": ["begin", "finish"],
    "failed": ["begin", "fail"],
    "cancelled": ["begin", "cancel", "stop"],
}
ACTIONS = (
    *("begin", "finish", "fail", "crash", "stop", "hand_back", "pause", "resume", "cancel"),
    *("retry", "deadline", "upstream_ends", "upstream_fails"),
)


def _moves(engine: Engine, clock: Clock, situation: str) -> set[tuple[JobState, JobState]]:
    """Try everything on a job in a situation, each time anew; return how its state moved."""
    seen = set()
    sha256 = pairs(engine, clock)
    with transaction(engine) as session:
        life = Life(session, clock, sha256)
        if situation in ("waiting", "paused before its plan"):
            life.below_a_fit()
        else:
            life.echo(times=1)
        for step in SITUATIONS[situation]:
            getattr(life, step)()
        held, old = life.held, life.state()
        for action in ACTIONS:
            point = session.begin_nested()
            try:
                getattr(life, action)()
                refused = False
            except (Conflict, LeaseLost):
                refused = True
            session.expire_all()
            assert not (refused and life.state() != old)
            seen.add((old, life.state()))
            point.rollback()
            session.expire_all()
            life.held = held
    return {move for move in seen if move[0] != move[1]}


def test_every_move_of_the_table_happens_and_no_other(engine: Engine, clock: Clock) -> None:
    seen = {move for situation in SITUATIONS for move in _moves(engine, clock, situation)}

    assert seen == {(old, new) for old, moves in ALLOWED.items() for new in moves}
