"""However many workers share the chunks of a job, and whatever dies, the bytes are the same."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import select

from core.artifacts.store import LocalStore
from core.db.models import Chunk
from core.db.session import make_engine, reading, transaction, upgrade
from core.jobs import housekeeping
from core.jobs.states import TERMINAL
from core.kinds._base import kinds
from tests.core.kinds.world import World, tiny_pairs

Files = dict[tuple[str, str, int, str], str]


def wall_clock() -> datetime:
    return datetime.now(UTC)  # noqa: TID251 - real processes share no test clock


class Crew:
    """Real embedded worker processes on one data folder."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder = folder
        own = {
            "STILL_DATA_DIR": str(folder),
            "STILL_MODEL_ROOTS": json.dumps([str(folder.parent / "models")]),
            "STILL_LEASE": "3",
            "STILL_RETRY_WAIT": "0.1",
        }
        self._env = {**os.environ, **own, "STILL_THREADS": "1", "STILL_POLL": "0.05"}  # noqa: TID251
        self.processes = [self._start() for _ in range(workers)]

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "workers", "--embedded", "--device", "cpu"]
        with (self.folder / "workers.log").open("ab") as log:
            return subprocess.Popen(
                command, env=self._env, stdin=subprocess.PIPE, stdout=log, stderr=log
            )

    def kill_at_work(self, at_work: Callable[[int], bool]) -> bool:
        """SIGKILL a worker that holds a chunk, and start another; False where none was caught.

        It is frozen before anybody looks, so what it holds at the kill is known.
        """
        for number, process in enumerate(self.processes):
            process.send_signal(signal.SIGSTOP)
            if at_work(process.pid):
                _end([process])
                self.processes[number] = self._start()
                return True
            process.send_signal(signal.SIGCONT)
        return False


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


@dataclass(frozen=True)
class Ran:
    """What came of running every kind once."""

    files: Files
    """By where they came from."""
    attempts: int
    owners: int
    """Workers whose chunks were adopted."""


def run_everything(folder: Path, *, workers: int, kills: Sequence[str | None] = ()) -> Ran:
    """Run every kind once; ``kills``: stages (None: any) at whose chunks a worker is killed."""
    folder.mkdir()
    engine = make_engine(f"sqlite:///{folder / 'stillroom.db'}")
    upgrade(engine)
    models = folder.parent / "models"
    world = World(engine, folder, wall_clock, store=LocalStore(folder), models=models)
    world.keep = "all"
    with transaction(engine) as session:
        housekeeping.bind_store(session, world.store.identity())
    jobs = world.chain(world.upload(tiny_pairs())) | world.language_chain()
    assert set(jobs) == set(kinds()), "a new kind joins one of the chains"
    wanted = list(kills)
    with crew(folder, workers) as there:
        until = time.monotonic() + 240
        while any(
            world.job(job_id).state not in TERMINAL for job_id in [*jobs.values(), *world.others]
        ):
            assert time.monotonic() < until, (folder / "workers.log").read_text()[-4000:]
            time.sleep(0.01)
            if wanted and there.kill_at_work(lambda pid: _at_work(world, pid, wanted[0])):
                wanted.pop(0)
    assert not wanted, "every kill hit work"
    ended = {
        kind: (world.job(job_id).state, world.job(job_id).error) for kind, job_id in jobs.items()
    }
    assert ended == dict.fromkeys(jobs, ("succeeded", None))
    assert {world.job(job_id).state for job_id in world.others} == {"succeeded"}
    everything = [*jobs.values(), *world.others]
    attempts = sum(world.job(job_id).attempts for job_id in everything)
    with reading(engine) as session:
        owners = len(set(session.scalars(select(Chunk.owner))))
    files = {at: sha for at, sha in world.files().items() if not kinds()[at[0]].timed}
    found = Ran(files, attempts, owners)
    engine.dispose()
    return found


def _at_work(world: World, pid: int, stage: str | None) -> bool:
    """Whether a worker holds a chunk (of a stage), as SQL shows it."""
    held = select(Chunk.owner).where(Chunk.state == "running")
    if stage is not None:
        held = held.where(Chunk.stage == stage)
    with reading(world.engine) as session:
        return any(owner and int(owner.split(":")[2]) == pid for owner in session.scalars(held))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run_everything(tmp_path_factory.mktemp("alone") / "data", workers=1)


def test_every_kind_gives_the_same_bytes_with_four_workers(alone: Ran, tmp_path: Path) -> None:
    found = run_everything(tmp_path / "data", workers=4)

    assert found.files == alone.files
    assert found.owners > 1


def test_every_kind_gives_the_same_bytes_with_two_workers_that_are_killed(
    alone: Ran, tmp_path: Path
) -> None:
    kills = [None, "targets", "train", "capture", "fold"]
    found = run_everything(tmp_path / "data", workers=2, kills=kills)

    assert found.files == alone.files
    assert found.attempts >= alone.attempts + len(kills), "each kill cost the chunk it hit"
