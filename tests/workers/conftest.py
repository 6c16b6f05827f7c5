"""A real Redis, real worker processes, and jobs that take their time."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

import core.kinds
from core.artifacts.store import LocalStore
from core.db.models import Chunk, Worker
from core.db.session import reading, transaction
from core.jobs import housekeeping
from core.registry import scan
from scripts.processes import Guard, Process
from scripts.servers import REDIS_MISSING, Redis
from tests import life
from tests.workers.napping import KINDS

LEASE_S = 3.0
ALIVE = "stillroom-*/beat-*"


def now() -> datetime:
    return datetime.now(UTC)  # noqa: TID251 - processes share no test clock


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kind ``nap`` is known, for one test."""
    monkeypatch.setattr(core.kinds, "__path__", [*core.kinds.__path__, KINDS])
    scan.cache_clear()
    yield
    scan.cache_clear()


@pytest.fixture(scope="session")
def guard() -> Iterator[Guard]:
    """Ends every process of these tests, however they end."""
    ends = Guard()
    yield ends
    ends.close()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory, guard: Guard) -> Iterator[Redis]:
    if shutil.which("redis-server") is None and not os.environ.get("CI"):  # noqa: TID251
        pytest.skip(REDIS_MISSING)
    server = Redis(tmp_path_factory.mktemp("redis"), guard, env=dict(os.environ))  # noqa: TID251
    server.wait()
    yield server
    server.process.kill()


@pytest.fixture
def broker(redis_server: Redis) -> Redis:
    """Redis, running and empty."""
    if not redis_server.process.alive:
        redis_server.process.start()
        redis_server.wait()
    redis_server.flush()
    return redis_server


class Crew:
    """Worker and beat processes beside one database and one Redis."""

    def __init__(self, engine: Engine, broker: Redis, folder: Path, guard: Guard) -> None:
        self.engine = engine
        self.broker = broker
        self.store = LocalStore(folder / "data")
        self._folder = folder
        self._guard = guard
        self._started: list[Process] = []
        with transaction(engine) as session:
            housekeeping.bind_store(session, self.store.identity())
        inherited = {
            name: value
            for name, value in os.environ.items()  # noqa: TID251 - handed on whole
            if not name.startswith("STILL_")
        }
        self.env = {
            **inherited,
            "STILL_DATABASE_URL": engine.url.render_as_string(hide_password=False),
            "STILL_BROKER_URL": broker.url,
            "STILL_DATA_DIR": str(self.store.root),
            "STILL_LEASE": str(LEASE_S),
            "STILL_THREADS": "1",
        }

    def start(self, *arguments: str, **env: str) -> Process:
        """Start ``python -m workers`` with these arguments."""
        name = f"process-{len(self._started)}"
        command = [sys.executable, "-m", "tests.workers.napping", *arguments]
        (self._folder / name).mkdir()
        own = {**self.env, "STILL_NODE": name, "TMPDIR": str(self._folder / name), **env}
        log = self._folder / f"{name}.log"
        process = Process(name, command, env=own, log=log, guard=self._guard).start()
        self._started.append(process)
        return process

    def worker(self, **env: str) -> Process:
        """Start a worker and wait until it is in the pool."""
        return self.workers(1, **env)[0]

    def workers(self, count: int, **env: str) -> list[Process]:
        """Start so many workers at once, and wait."""
        started = [self.start("--device", "cpu", **env) for _ in range(count)]
        self.wait_in_pool(*started)
        return started

    def wait_in_pool(self, *workers: Process) -> None:
        for worker in workers:
            worker.wait_until(lambda pid=worker.pid: any(f":{pid}:" in one for one in self.pool()))

    def beats(self, count: int) -> list[Process]:
        """Start so many beats at once, and wait until each has ticked."""
        started = [self.start("--beat") for _ in range(count)]
        for beat in started:
            folder = self._folder / beat.name
            beat.wait_until(lambda folder=folder: any(folder.glob(ALIVE)))
        return started

    def pool(self) -> list[str]:
        with reading(self.engine) as session:
            return list(session.scalars(select(Worker.id)))

    def submit(self, **fields: object) -> str:
        return life.submit(self.engine, now, **fields)

    def chunk(self, job_id: str) -> Chunk:
        """The only chunk of a job."""
        with reading(self.engine) as session:
            return session.scalars(select(Chunk).where(Chunk.job_id == job_id)).one()

    def in_state(self, job_id: str, state: str) -> Callable[[], bool]:
        return lambda: life.state(self.engine, job_id) == state

    def end(self) -> None:
        for process in self._started:
            process.kill()


@pytest.fixture
def crew(engine: Engine, broker: Redis, tmp_path: Path, guard: Guard, naps: None) -> Iterator[Crew]:
    found = Crew(engine, broker, tmp_path, guard)
    yield found
    found.end()
    for process in found._started:
        print(f"--- {process.name}\n{process.tail()}")
