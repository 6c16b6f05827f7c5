"""Answers together what is asked together: whatever comes during one look is told by the next."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from functools import partial
from typing import Generic, TypeVar

from anyio import CapacityLimiter, to_thread

from api.problems import Busy

V = TypeVar("V")
Key = tuple[str, str]
"""A project, and what it asks for."""
log = logging.getLogger("stillroom.api")
LONG_S = 1.0
"""A look that takes longer, as where the database hangs, no longer holds up the next."""
SIDE_BY_SIDE = 4
"""Looks under way, each in a thread and on a connection, where they take longer."""
PAUSE_S = 0.001
"""After several were answered: they may ask again, and together with those that came meanwhile.

Else the first to come goes alone while the others gather, in turn for ever. With four that poll a
server each look told of two on average; a poll cost 2.5 ms of CPU, and 2.2 ms with the pause.
"""


class Together(Generic[V]):
    """One look for all that ask meanwhile; projects take turns where not all fit in.

    An answer is never older than its question: what is asked while a look is under way is told
    by the next one. Alone, a question waits for nothing; the more come at once, the less each
    costs. For looks that cost about the same whatever is asked. Belongs to one event loop.
    """

    def __init__(
        self,
        look: Callable[[Sequence[Key]], Mapping[Key, V]],
        *,
        at_once: int,
        wait_s: float,
    ) -> None:
        self._look = look
        self._at_once = at_once
        self._wait_s = wait_s
        self._threads = CapacityLimiter(SIDE_BY_SIDE)
        self._asked: dict[str, dict[str, list[asyncio.Future[V | None]]]] = {}
        self._asking: asyncio.Task[None] | None = None
        self._under_way: set[asyncio.Task[Mapping[Key, V]]] = set()

    async def tell(self, project: str, name: str) -> V | None:
        """Return what a look that begins from now on finds; None: nothing.

        Raises:
            Busy: no answer came in time.
        """
        answer: asyncio.Future[V | None] = asyncio.get_running_loop().create_future()
        self._asked.setdefault(project, {}).setdefault(name, []).append(answer)
        if self._asking is None:
            # In a context of its own: it works for others too, whose logs it must not mix up.
            self._asking = asyncio.create_task(self._ask(), context=Context())
        try:
            await asyncio.wait({answer}, timeout=self._wait_s)
            if not answer.done():
                raise Busy(f"no answer within {self._wait_s:g} s; send the request again")
            return answer.result()
        finally:
            answer.cancel()  # where it is still open, nobody waits for it any more

    async def _ask(self) -> None:
        try:
            while self._asked:
                # Before the questions are taken: meanwhile they may find that nobody waits.
                if len(self._under_way) >= SIDE_BY_SIDE:
                    await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
                    continue
                batch = self._next()
                if not batch:
                    return
                look = asyncio.create_task(self._begin(list(batch)))
                self._under_way.add(look)
                look.add_done_callback(self._under_way.discard)
                look.add_done_callback(partial(_answer, batch))
                await asyncio.wait({look}, timeout=LONG_S)
                if sum(map(len, batch.values())) > 1:
                    await asyncio.sleep(PAUSE_S)
        finally:
            self._asking = None

    async def _begin(self, keys: Sequence[Key]) -> Mapping[Key, V]:
        return await to_thread.run_sync(self._look, keys, limiter=self._threads)

    def _next(self) -> dict[Key, list[asyncio.Future[V | None]]]:
        """Take questions that somebody still waits for, one of each project in turn."""
        batch: dict[Key, list[asyncio.Future[V | None]]] = {}
        while self._asked and len(batch) < self._at_once:
            project = next(iter(self._asked))
            questions = self._asked.pop(project)
            while questions:
                name = next(iter(questions))
                live = [answer for answer in questions.pop(name) if not answer.done()]
                if live:
                    batch[project, name] = live
                    break
            if questions:
                self._asked[project] = questions  # at the end of the line
        return batch


def _answer(
    batch: Mapping[Key, Sequence[asyncio.Future[V | None]]], look: asyncio.Task[Mapping[Key, V]]
) -> None:
    """Tell all who still wait what the look found, or what went wrong with it."""
    error = Busy("the server is ending") if look.cancelled() else look.exception()
    heard = False
    for key, answers in batch.items():
        for answer in answers:
            if answer.done():
                continue
            heard = True
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(look.result().get(key))
    if error is not None and not heard:
        log.warning("a look that nobody waited for any more: %s", error)
