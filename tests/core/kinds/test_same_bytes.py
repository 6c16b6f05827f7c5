"""However many workers share the chunks of a job, and whatever dies, the bytes are the same."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from core.artifacts.store import LocalStore
from core.db.models import Chunk
from core.db.session import make_engine, reading, transaction, upgrade
from core.jobs import housekeeping
from core.jobs.states import TERMINAL
from core.kinds._base import kinds
from tests.core.kinds.test_kinds import World, tiny_pairs

Files = dict[tuple[str, str, int, str], str]


def wall_clock() -> datetime:
    return datetime.now(UTC)  # noqa: TID251 - real processes share no test clock


class Crew:
    """Real embedded worker processes on one data folder."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder = folder
        own = {"STILL_DATA_DIR": str(folder), "STILL_LEASE": "3", "STILL_RETRY_WAIT": "0.1"}
        self._env = {**os.environ, **own, "STILL_THREADS": "1", "STILL_POLL": "0.05"}  # noqa: TID251
        self.processes = [self._start() for _ in range(workers)]

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "workers", "--embedded", "--device", "cpu"]
        with (self.folder / "workers.log").open("ab") as log:
            return subprocess.Popen(
                command, env=self._env, stdin=subprocess.PIPE, stdout=log, stderr=log
            )

    def kill_one(self, number: int) -> None:
        """SIGKILL a worker and start another in its place."""
        _end([self.processes[number]])
        self.processes[number] = self._start()


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


@contextmanager
def crew(folder: Path, workers: int) -> Iterator[Crew]:
    found = Crew(folder, workers)
    try:
        yield found
    finally:
        _end(found.processes)


def run_everything(folder: Path, *, workers: int, kills: int = 0) -> tuple[Files, int]:
    """Run every kind once; return every file by where it came from, and the attempts in all."""
    folder.mkdir()
    engine = make_engine(f"sqlite:///{folder / 'stillroom.db'}")
    upgrade(engine)
    world = World(engine, folder, wall_clock, store=LocalStore(folder))
    world.keep = "all"
    with transaction(engine) as session:
        housekeeping.bind_store(session, world.store.identity())
    jobs = world.chain(world.upload(tiny_pairs()))
    assert set(jobs) == set(kinds()), "a new kind joins the chain"
    chance = random.Random(kills)
    with crew(folder, workers) as there:
        until = time.monotonic() + 240
        while any(world.job(job_id).state not in TERMINAL for job_id in jobs.values()):
            assert time.monotonic() < until, (folder / "workers.log").read_text()[-4000:]
            time.sleep(0.1)
            if kills and _something_runs(world):
                time.sleep(chance.random() / 2)
                there.kill_one(chance.randrange(workers))
                kills -= 1
    ended = {
        kind: (world.job(job_id).state, world.job(job_id).error) for kind, job_id in jobs.items()
    }
    assert ended == dict.fromkeys(jobs, ("succeeded", None))
    attempts = sum(world.job(job_id).attempts for job_id in jobs.values())
    files = world.files()
    engine.dispose()
    return files, attempts


def _something_runs(world: World) -> bool:
    with reading(world.engine) as session:
        return session.query(Chunk.id).filter(Chunk.state == "running").first() is not None


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, int]:
    return run_everything(tmp_path_factory.mktemp("alone") / "data", workers=1)


def test_every_kind_gives_the_same_bytes_with_four_workers(
    alone: tuple[Files, int], tmp_path: Path
) -> None:
    files, _ = run_everything(tmp_path / "data", workers=4)

    assert files == alone[0]


def test_every_kind_gives_the_same_bytes_with_two_workers_that_are_killed(
    alone: tuple[Files, int], tmp_path: Path
) -> None:
    files, attempts = run_everything(tmp_path / "data", workers=2, kills=4)

    assert files == alone[0]
    assert attempts <= alone[1] + 4, "a kill costs at most one chunk"
