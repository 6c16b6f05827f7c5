"""What is asked together is answered together: fresh, fair, bounded, and each on its own."""

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Sequence

import pytest
from sqlalchemy import Engine, text, update
from starlette.testclient import TestClient

from api.lanes import Lane
from api.looks import WAIT_S, Looks
from api.problems import Busy
from api.together import LONG_S, SIDE_BY_SIDE, Key, Together
from core.db.models import Job
from core.db.session import transaction
from core.errors import NotFound
from core.jobs import control
from tests.api.conftest import ECHO
from tests.conftest import Clock
from tests.life import PROJECT, RULES, submit


class World:
    """Looks that are noted, and held up until they are let go."""

    def __init__(self) -> None:
        self.facts: dict[Key, str] = {}
        self.looks: list[list[str]] = []
        self.go_on = threading.Semaphore(0)

    def look(self, keys: Sequence[Key]) -> dict[Key, str]:
        """Read what is true now; return once the test says so."""
        seen = dict(self.facts)
        self.looks.append([name for _, name in keys])
        assert self.go_on.acquire(timeout=30)
        return seen

    async def begun(self, looks: int) -> None:
        await until(lambda: len(self.looks) == looks)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.001)


def ask(of: Together[str], *keys: Key) -> list["asyncio.Task[str | None]"]:
    return [asyncio.ensure_future(of.tell(*key)) for key in keys]


def test_what_comes_during_a_look_is_told_by_the_next_and_never_by_an_older_one() -> None:
    world = World()

    async def run() -> None:
        of = Together(world.look, at_once=8, wait_s=30)
        world.facts = {("p", "a"): "old"}
        [first] = ask(of, ("p", "a"))
        await world.begun(1)
        world.facts = {("p", "a"): "new", ("p", "b"): "b"}
        rest = ask(of, ("p", "a"), ("p", "b"), ("p", "a"), ("p", "none"), ("q", "b"))
        await asyncio.sleep(0.01)
        world.go_on.release(2)
        assert await first == "old"
        assert await asyncio.gather(*rest) == ["new", "b", "new", None, None]

    asyncio.run(run())

    assert [sorted(names) for names in world.looks] == [["a"], ["a", "b", "b", "none"]]


def test_projects_take_turns_where_not_all_fit_in() -> None:
    world = World()

    async def run() -> None:
        of = Together(world.look, at_once=4, wait_s=30)
        [first] = ask(of, ("crowd", "first"))
        await world.begun(1)
        many = ask(of, *(("crowd", f"c{number}") for number in range(9)))
        few = ask(of, ("p", "p1"), ("p", "p2"), ("q", "q1"))
        await asyncio.sleep(0.01)
        world.go_on.release(9)
        await asyncio.gather(first, *many, *few)

    asyncio.run(run())

    assert world.looks[1] == ["c0", "p1", "q1", "c1"]
    assert world.looks[2] == ["p2", "c2", "c3", "c4"]


def test_who_left_costs_neither_a_look_nor_a_turn() -> None:
    world = World()

    async def run() -> None:
        of = Together(world.look, at_once=2, wait_s=30)
        [first] = ask(of, ("p", "first"))
        await world.begun(1)
        left = ask(of, *(("p", f"left{number}") for number in range(5)))
        rest = ask(of, ("p", "last"), *(("crowd", f"c{number}") for number in range(4)))
        await asyncio.sleep(0.01)
        for one in left:
            one.cancel()
        world.go_on.release(9)
        await asyncio.gather(first, *rest)

    asyncio.run(run())

    assert world.looks[1:] == [["last", "c0"], ["c1", "c2"], ["c3"]]


def test_an_error_is_told_to_each_and_the_next_question_is_asked_anew() -> None:
    times = iter([OSError("gone"), None])

    def look(keys: Sequence[Key]) -> dict[Key, str]:
        error = next(times)
        if error is not None:
            raise error
        return {key: key[1] for key in keys}

    async def run() -> None:
        of = Together(look, at_once=8, wait_s=30)
        told = await asyncio.gather(*ask(of, ("p", "a"), ("p", "b")), return_exceptions=True)
        assert [str(error) for error in told] == ["gone", "gone"]
        assert await of.tell("p", "a") == "a"

    asyncio.run(run())


def test_where_looks_hang_questions_end_and_after_it_nobody_is_looked_for_in_vain(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As many looks as have threads; what they end with is not lost, and the next is answered."""
    world, hung = World(), True

    def look(keys: Sequence[Key]) -> dict[Key, str]:
        found = world.look(keys)
        if hung:
            raise OSError("the host is gone")
        return found

    async def run() -> None:
        nonlocal hung
        of = Together(look, at_once=8, wait_s=1.2 * LONG_S)
        asked = []
        for number in range(SIDE_BY_SIDE + 2):
            asked += ask(of, ("p", f"q{number}"))
            await asyncio.sleep(LONG_S)
        told = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(error) for error in told] == [Busy] * len(asked)
        assert len(world.looks) == SIDE_BY_SIDE
        world.go_on.release(SIDE_BY_SIDE)
        await until(lambda: len(caplog.records) == SIDE_BY_SIDE)
        hung, world.facts = False, {("p", "last"): "here"}
        world.go_on.release()
        assert await of.tell("p", "last") == "here"

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
        gc.collect()

    assert world.looks[SIDE_BY_SIDE:] == [["last"]]
    assert {record.name for record in caplog.records} == {"stillroom.api"}
    assert LONG_S < WAIT_S, "else a look that hangs ends the questions behind it too"


def looks_of(engine: Engine, clock: Clock, *, wait_s: float = 30.0) -> Looks:
    places = Lane("looks at jobs", 2, wait_s=30)
    return Looks(engine=engine, clock=clock, fairness=RULES.fairness, places=places, wait_s=wait_s)


def test_a_job_that_cannot_be_shown_fails_alone(engine: Engine, clock: Clock) -> None:
    good, ended, bad = (submit(engine, clock) for _ in range(3))
    with transaction(engine) as session:
        control.cancel(session, ended, project=PROJECT, now=clock())
        session.execute(update(Job).where(Job.id == bad).values(state="of a later version"))

    async def run() -> list[str | BaseException]:
        looks = looks_of(engine, clock)
        asked = [looks.at(job_id, project=PROJECT) for job_id in (good, ended, bad)]
        return await asyncio.gather(*asked, return_exceptions=True)

    told = asyncio.run(run())

    assert good in str(told[0])
    assert '"cancelled"' in str(told[1])
    assert isinstance(told[2], ValueError)


def test_the_job_of_another_project_is_not_there(engine: Engine, clock: Clock) -> None:
    job_id = submit(engine, clock)

    async def run() -> list[str | BaseException]:
        looks = looks_of(engine, clock)
        asked = [looks.at(job_id, project=whose) for whose in (PROJECT, "prj_other")]
        return await asyncio.gather(*asked, return_exceptions=True)

    told = asyncio.run(run())

    assert job_id in str(told[0])
    assert isinstance(told[1], NotFound)


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_polls_of_a_database_that_hangs_are_told_so_and_answered_after_it(
    engine: Engine, clock: Clock
) -> None:
    job_id = submit(engine, clock)

    async def run() -> str:
        looks = looks_of(engine, clock, wait_s=0.5)
        with transaction(engine) as session:
            session.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
            with pytest.raises(Busy, match=r"no answer within 0\.5 s"):
                await looks.at(job_id, project=PROJECT)
        async with asyncio.timeout(30):
            while True:
                try:
                    return await looks.at(job_id, project=PROJECT)
                except Busy:
                    await asyncio.sleep(0.05)

    assert job_id in asyncio.run(run())


def test_a_crowd_of_polls_is_answered_each_with_its_own_job(alone: TestClient) -> None:
    ids = [alone.post("/v1/jobs", json=ECHO).json()["id"] for _ in range(20)]
    alone.post(f"/v1/jobs/{ids[3]}/cancel")
    found: dict[int, tuple[str, str]] = {}

    def poll(number: int) -> None:
        shown = alone.get(f"/v1/jobs/{ids[number % 20]}").json()
        found[number] = (shown["id"], shown["state"])

    threads = [threading.Thread(target=poll, args=(number,)) for number in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    states = ["cancelled" if number % 20 == 3 else "queued" for number in range(60)]
    assert found == {number: (ids[number % 20], states[number]) for number in range(60)}
