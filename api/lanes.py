"""Lanes: threads of its own for some work, so that the pool that answers all else stays free."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TypeVar

from anyio import CapacityLimiter, Semaphore, fail_after, to_thread

from api.problems import Busy

T = TypeVar("T")


class Lane:
    """Threads of its own for some work.

    One project takes half of the places at most, so it cannot keep the others out.
    """

    def __init__(self, what: str, places: int, *, wait_s: float) -> None:
        self._what = what
        self._places = Semaphore(places, fast_acquire=True)
        self._half = max(1, places // 2)
        self._of_project: dict[str, Semaphore] = {}
        self._wait_s = wait_s

    async def run(self, work: Callable[[], T], *, project: str) -> T:
        """Run a project's ``work`` in a thread once a place is free; waiting holds no thread.

        Raises:
            Busy: no place became free.
        """
        own = self._of_project.setdefault(project, Semaphore(self._half, fast_acquire=True))
        async with AsyncExitStack() as held:
            try:
                with fail_after(self._wait_s):
                    for places in (own, self._places):
                        await held.enter_async_context(places)
            except TimeoutError:
                raise Busy(f"too many {self._what} at once; send the request again") from None
            # The place is the limit; a fresh limiter keeps the work out of the common pool.
            return await to_thread.run_sync(work, limiter=CapacityLimiter(1))
