"""Jobs that end together with what waits for them lock each other out in no order of events."""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import Engine

from core.db.models import Node
from core.db.session import transaction
from core.errors import Conflict
from core.jobs import control, pool, recovery
from tests.conftest import Clock
from tests.core.jobs.acts import MADE_MODEL, fit, within, worker
from tests.life import PROJECT, RULES, claim, finish, state, submit

ROUNDS = 25


def chain(engine: Engine, clock: Clock, **fields: float) -> tuple[str, str, str]:
    """A fit, targets of its model, and a student of both whose id stands before the targets'."""
    while True:
        first = fit(engine, clock, **fields)
        second = submit(engine, clock, kind="cache_targets", model=f"{first}/model", **fields)
        asked = {"model": f"{first}/model", "targets": f"{second}/targets", **fields}
        third = submit(engine, clock, kind="distill", **asked)
        if third < second:
            return first, second, third
        within(engine, control.cancel, first, project=PROJECT, now=clock())


def at_once(*works: Callable[[], object]) -> None:
    """Do all at the same moment; what one raises is raised here."""
    gate = threading.Barrier(len(works))

    def work(one: Callable[[], object]) -> None:
        gate.wait()
        one()

    with ThreadPoolExecutor(len(works)) as threads:
        for done in [threads.submit(work, one) for one in works]:
            done.result()


def test_two_links_of_a_chain_are_cancelled_at_once(engine: Engine, clock: Clock) -> None:
    def cancel(job_id: str) -> None:
        with contextlib.suppress(Conflict):  # the other one ended it
            within(engine, control.cancel, job_id, project=PROJECT, now=clock())

    for _ in range(ROUNDS):
        jobs = chain(engine, clock)
        at_once(*(lambda one=one: cancel(one) for one in jobs))  # type: ignore[misc]
        assert {state(engine, one) for one in jobs} <= {"cancelled", "failed"}


def test_a_chain_past_its_deadline_is_ended_by_all_reconcilers_at_once(
    engine: Engine, clock: Clock
) -> None:
    jobs = [one for _ in range(ROUNDS) for one in chain(engine, clock, deadline_s=5)]
    clock.tick(seconds=10)

    at_once(*[lambda: recovery.tick(engine, now=clock(), rules=RULES)] * 3)

    assert {state(engine, one) for one in jobs} == {"failed"}


def test_a_job_ends_while_others_that_read_it_are_submitted_and_cancelled(
    engine: Engine, clock: Clock
) -> None:
    for _ in range(ROUNDS // 2):
        first, second, third = chain(engine, clock)
        while (held := claim(engine, clock)).stage != "assemble":
            finish(engine, held, clock)
        at_once(
            lambda held=held: finish(engine, held, clock, MADE_MODEL),  # type: ignore[misc]
            lambda a=first, b=second: submit(  # type: ignore[misc]
                engine, clock, kind="distill", model=f"{a}/model", targets=f"{b}/targets"
            ),
            lambda c=third: within(  # type: ignore[misc]
                engine, control.cancel, c, project=PROJECT, now=clock()
            ),
        )
        assert state(engine, first) == "succeeded"
        within(engine, control.cancel, second, project=PROJECT, now=clock())


def test_a_worker_shows_itself_while_its_blamed_node_is_absolved(
    engine: Engine, clock: Clock
) -> None:
    there = worker(engine, clock, "w1")
    for _ in range(ROUNDS):
        submit(engine, clock)
        held = claim(engine, clock, "w1")
        with transaction(engine) as session:
            session.get_one(Node, there.node).blamed = 1
        at_once(
            lambda held=held: finish(engine, held, clock),  # type: ignore[misc]
            lambda: within(engine, pool.hello, "w1", place=there, now=clock()),
        )
