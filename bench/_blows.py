"""Kills, freezes and restarts on a seeded schedule. A victim is a process that could do harm again.

A killed worker writes nothing more. One that is frozen until its chunk has been taken from it, and
then goes on, does: whether that is refused is what the fence is for.
"""

import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal
from urllib.request import urlopen

from sqlalchemy import Engine, Select, select
from sqlalchemy.exc import DBAPIError

from core.db.models import Chunk, Worker
from core.db.session import reading
from core.jobs.states import RUNNING_CHUNK
from scripts.servers import StopMode
from scripts.team import Team

Sort = Literal["worker", "api", "both", "freeze", "flush", "restart"]
MIX: dict[Sort, float] = {"worker": 0.60, "api": 0.25, "both": 0.15}
LAST = 0.97
"""Of the chunks: when the last blow falls."""
BLIND = 0.3
"""Of the workers: killed without a look at what they do."""
LOOKS = 12
"""At a worker before it is killed all the same."""
TAKEN_S = 20.0
"""Until a frozen worker's chunk has been taken back: its lease, and a look of the reconciler."""
MODES: tuple[StopMode, ...] = ("crash", "fast", "immediate")


@dataclass(frozen=True)
class Blow:
    """What happens once so many chunks are done."""

    at_chunk: int
    sort: Sort


def plan_blows(
    *, chunks: int, kills: int, freezes: int, flushes: int, database_restarts: int, seed: int
) -> list[Blow]:
    """Return the blows in order: kills all over the run, the others each in a part of their own."""
    rng = random.Random(f"{seed} blows")
    sorts: list[Sort] = []
    left = kills
    while left > 0:
        [sort] = rng.choices(list(MIX), weights=list(MIX.values()))
        if sort == "both" and left < 2:
            continue
        sorts.append(sort)
        left -= 2 if sort == "both" else 1
    blows = _spread(sorts, chunks, rng)
    blows += _spread(["freeze"] * freezes, chunks, rng)
    blows += _spread(["flush"] * flushes, chunks, rng)
    blows += _spread(["restart"] * database_restarts, chunks, rng)
    return sorted(blows, key=lambda blow: blow.at_chunk)


def _spread(sorts: Sequence[Sort], chunks: int, rng: random.Random) -> list[Blow]:
    """Give each blow a random moment within its own equal part of the run."""
    part = LAST * chunks / max(1, len(sorts))
    return [Blow(int(part * (i + rng.random())), sort) for i, sort in enumerate(sorts)]


class Striker:
    """Deals the blows, and starts again whatever it killed."""

    def __init__(self, team: Team, engine: Engine, *, seed: int) -> None:
        self.blows: Counter[str] = Counter()
        self.hits = 0
        self.revived = 0
        self._team = team
        self._engine = engine
        self._rng = random.Random(f"{seed} victims")
        self._modes = cycle(MODES)

    def revive(self) -> None:
        """Start again what ended by itself."""
        self.revived += len(self._team.revive())

    def strike(self, blow: Blow) -> bool:
        """Deal a blow; False where no victim is up yet, so that it must wait."""
        if blow.sort == "flush":
            self._team.flush_redis()
            self.blows["flush"] += 1
        elif blow.sort == "freeze":
            return self._freeze()
        elif blow.sort == "restart":
            mode = next(self._modes)
            self._team.restart_postgres(mode)
            self.blows[f"database restart, {mode}"] += 1
        else:
            return self._kill(blow.sort)
        return True

    def _kill(self, sort: Sort) -> bool:
        sorts = ("worker", "api") if sort == "both" else (sort,)
        victims = [self._victim(one) for one in sorts]
        if None in victims:
            return False
        names = [name for name in victims if name is not None]
        if sorts[0] == "worker":
            looks = 1 if self._rng.random() < BLIND else LOOKS
            self.hits += self._caught_at_work(names[0], looks=looks)
        for name in names:
            self._team.processes[name].send(signal.SIGKILL)
        for one, name in zip(sorts, names, strict=True):
            self._team.kill(name)
            self.blows[one] += 1
            self._team.processes[name].start()
        self.blows["both at once"] += sort == "both"
        return True

    def _freeze(self) -> bool:
        """Freeze a worker at a chunk until the chunk is no longer its own, and let it go on."""
        name = self._victim("worker")
        if name is None or not self._caught_at_work(name, looks=LOOKS):
            return False
        process = self._team.processes[name]
        until = time.monotonic() + TAKEN_S
        while self._at_work(process.pid) and time.monotonic() < until:
            time.sleep(0.1)
        taken = not self._at_work(process.pid)
        process.send(signal.SIGCONT)
        self.blows["freeze"] += taken
        return taken

    def _victim(self, sort: str) -> str | None:
        """Return a process that is up and serves; None where there is none yet."""
        names = self._team.names(sort)
        self._rng.shuffle(names)
        if sort == "api":
            return next((name for name in names if self._answers(name)), None)
        there = self._pids(select(Worker.id))
        return next((n for n in names if self._team.processes[n].pid in there), None)

    def _answers(self, name: str) -> bool:
        url = self._team.urls[self._team.names("api").index(name)]
        try:
            with urlopen(f"{url}/healthz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _caught_at_work(self, name: str, *, looks: int) -> bool:
        """Freeze the worker at a random moment until it holds a chunk; it stays frozen.

        SQL is asked while it cannot move, so what it holds at the kill is known.
        """
        process = self._team.processes[name]
        for _ in range(looks):
            process.send(signal.SIGSTOP)
            if self._at_work(process.pid):
                return True
            process.send(signal.SIGCONT)
            time.sleep(self._rng.uniform(0.0, 0.05))
        return False

    def _at_work(self, pid: int) -> bool:
        return pid in self._pids(select(Chunk.owner).where(Chunk.state == RUNNING_CHUNK))

    def _pids(self, owners: Select[Any]) -> set[int]:
        """Return the process numbers in some owners' names; none while the database is away."""
        try:
            with reading(self._engine) as session:
                return {int(owner.split(":")[2]) for owner in session.scalars(owners) if owner}
        except DBAPIError:
            return set()
