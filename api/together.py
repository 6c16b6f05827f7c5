"""Answers together what is asked together: whatever comes during one look is told by the next."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from functools import partial
from typing import Generic, TypeVar

from anyio import CapacityLimiter, to_thread

from api.problems import Busy

V = TypeVar("V")
LONG_S = 1.0
"""A look that takes longer, as where the database hangs, no longer holds up the next."""
PAUSE_S = 0.001
"""After several were answered: they may ask again, and together with those that came meanwhile.

Else the first of them goes alone while the others gather, for ever in turn: a seventh more work.
"""
THREADS = 8
"""Looks that take longer, and hold a thread each, at the same time."""


class Together(Generic[V]):
    """One look for all that ask meanwhile; projects take turns where not all fit in.

    An answer is never older than its question: what is asked while a look is under way is told
    by the next one. Alone, a question waits for nothing; the more come at once, the less each
    costs. Belongs to one event loop.
    """

    def __init__(
        self,
        what: str,
        look: Callable[[Sequence[str]], Mapping[tuple[str, str], V]],
        *,
        at_once: int,
        wait_s: float,
    ) -> None:
        self._what = what
        self._look = look
        self._at_once = at_once
        self._wait_s = wait_s
        self._threads = CapacityLimiter(THREADS)
        self._asked: dict[str, deque[_Question[V]]] = {}
        self._asking: asyncio.Task[None] | None = None
        self._under_way: set[asyncio.Task[Mapping[tuple[str, str], V]]] = set()

    async def tell(self, project: str, name: str) -> V | None:
        """Return what a look that begins from now on finds; None: nothing.

        Raises:
            Busy: no answer came in time.
        """
        question = _Question[V](project, name)
        self._asked.setdefault(project, deque()).append(question)
        if self._asking is None:
            # In a context of its own: it works for others too, whose logs it must not mix up.
            self._asking = asyncio.create_task(self._ask(), context=Context())
        try:
            async with asyncio.timeout(self._wait_s):
                return await question.answer
        except TimeoutError:
            raise Busy(f"too many {self._what} at once; send the request again") from None

    async def _ask(self) -> None:
        try:
            while batch := self._next():
                names = list(dict.fromkeys(question.name for question in batch))
                work = to_thread.run_sync(self._look, names, limiter=self._threads)
                look = asyncio.create_task(work)
                self._under_way.add(look)
                look.add_done_callback(self._under_way.discard)
                look.add_done_callback(partial(_answer, batch))
                await asyncio.wait({look}, timeout=LONG_S)
                if len(batch) > 1:
                    await asyncio.sleep(PAUSE_S)
        finally:
            self._asking = None

    def _next(self) -> "list[_Question[V]]":
        """Take questions, one of each project in turn, that somebody still waits for."""
        batch: list[_Question[V]] = []
        while self._asked and len(batch) < self._at_once:
            project = next(iter(self._asked))
            waiting = self._asked.pop(project)
            question = waiting.popleft()
            if waiting:
                self._asked[project] = waiting  # at the end of the line
            if not question.answer.done():
                batch.append(question)
        return batch


class _Question(Generic[V]):
    def __init__(self, project: str, name: str) -> None:
        self.project = project
        self.name = name
        self.answer: asyncio.Future[V | None] = asyncio.get_running_loop().create_future()


def _answer(
    batch: Sequence[_Question[V]], look: "asyncio.Task[Mapping[tuple[str, str], V]]"
) -> None:
    """Tell each who asked and still waits what the look found, or what went wrong with it."""
    for question in batch:
        if question.answer.done():
            continue
        if look.cancelled():
            question.answer.cancel()
        elif error := look.exception():
            question.answer.set_exception(error)
        else:
            question.answer.set_result(look.result().get((question.project, question.name)))
