"""What is asked together is answered together: fresh, fair, bounded, and an error for each."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest
from starlette.testclient import TestClient

from api import together
from api.problems import Busy
from api.together import Together
from tests.api.conftest import ECHO

Key = tuple[str, str]


class World:
    """Looks that are noted, and held up until they are let go."""

    def __init__(self) -> None:
        self.facts: dict[Key, str] = {}
        self.looks: list[list[str]] = []
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)

    def look(self, names: Sequence[str]) -> dict[Key, str]:
        """Read what is true now; return once the test says so."""
        seen = dict(self.facts)
        self.looks.append(list(names))
        self.begun.release()
        assert self.go_on.acquire(timeout=30)
        return seen

    def gathers(self, *, at_once: int = 8, wait_s: float = 30.0) -> Together[str]:
        return Together("looks", self.look, at_once=at_once, wait_s=wait_s)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.001)


def ask(of: Together[str], *keys: Key) -> list["asyncio.Task[str | None]"]:
    return [asyncio.ensure_future(of.tell(*key)) for key in keys]


def test_what_comes_during_a_look_is_told_by_the_next_and_never_by_an_older_one() -> None:
    world = World()

    async def run() -> None:
        of = world.gathers()
        world.facts = {("p", "a"): "old"}
        [first] = ask(of, ("p", "a"))
        await until(lambda: len(world.looks) == 1)
        world.facts = {("p", "a"): "new", ("p", "b"): "b"}
        rest = ask(of, ("p", "a"), ("p", "b"), ("p", "a"), ("p", "none"), ("q", "b"))
        await asyncio.sleep(0.01)
        world.go_on.release(2)
        assert await first == "old"
        assert await asyncio.gather(*rest) == ["new", "b", "new", None, None]

    asyncio.run(run())

    assert [sorted(names) for names in world.looks] == [["a"], ["a", "b", "none"]]


def test_projects_take_turns_where_not_all_fit_in() -> None:
    world = World()

    async def run() -> None:
        of = world.gathers(at_once=4)
        [first] = ask(of, ("crowd", "first"))
        await until(lambda: len(world.looks) == 1)
        many = ask(of, *(("crowd", f"c{number}") for number in range(9)))
        few = ask(of, ("p", "p1"), ("p", "p2"), ("q", "q1"))
        await asyncio.sleep(0.01)
        world.go_on.release(9)
        await asyncio.gather(first, *many, *few)

    asyncio.run(run())

    assert world.looks[1] == ["c0", "p1", "q1", "c1"]
    assert world.looks[2] == ["p2", "c2", "c3", "c4"]


def test_an_error_is_told_to_each_and_the_next_question_is_asked_anew() -> None:
    times = iter([OSError("gone"), None])

    def look(names: Sequence[str]) -> dict[Key, str]:
        error = next(times)
        if error is not None:
            raise error
        return {("p", name): name for name in names}

    async def run() -> None:
        of = Together("looks", look, at_once=8, wait_s=30)
        told = await asyncio.gather(*ask(of, ("p", "a"), ("p", "b")), return_exceptions=True)
        assert [str(error) for error in told] == ["gone", "gone"]
        assert await of.tell("p", "a") == "a"

    asyncio.run(run())


def test_who_waits_too_long_is_told_to_come_again_and_who_left_is_not_looked_for() -> None:
    world = World()

    async def run() -> None:
        of = world.gathers(wait_s=0.1)
        ask(of, ("p", "first"))
        await until(lambda: len(world.looks) == 1)
        [left] = ask(of, ("p", "left"))
        with pytest.raises(Busy, match="too many looks at once"):
            await left
        world.go_on.release(2)
        [last] = ask(of, ("p", "last"))
        await last

    asyncio.run(run())

    assert world.looks == [["first"], ["last"]]


def test_a_look_that_hangs_does_not_hold_up_the_next_for_long() -> None:
    world = World()

    async def run() -> None:
        of = world.gathers()
        [hung] = ask(of, ("p", "hung"))
        await until(lambda: len(world.looks) == 1)
        [second] = ask(of, ("p", "second"))
        await until(lambda: len(world.looks) == 2)
        assert not hung.done()
        world.go_on.release(2)
        await asyncio.gather(hung, second)

    asyncio.run(run())
    assert together.LONG_S < 5, "else who waits is told to come again before"


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

    states = {number: "cancelled" if number % 20 == 3 else "queued" for number in range(60)}
    assert found == {number: (ids[number % 20], state) for number, state in states.items()}
