"""What a worker checks, and waits for, before it takes work. What can only be wrong ends it."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.orm import Session

from core.artifacts.store import LocalStore, Store
from core.db.models import ServiceFact
from core.db.session import MIGRATIONS, is_away, make_engine, transaction
from core.errors import Conflict
from core.jobs import housekeeping, pool
from core.jobs.pool import Place
from core.settings import Settings
from workers import threads
from workers.device import memory_of
from workers.outages import told
from workers.settings import StartRefused
from workers.stop import Stop

log = logging.getLogger(__name__)
T = TypeVar("T")
LOOK_EVERY = timedelta(seconds=1)


class Stopped(Exception):
    """Told to end before there was anything to end."""


class _NotYet(RuntimeError):
    """Something is missing that may come."""


def utc_now() -> datetime:
    """Return the present instant."""
    return datetime.now(UTC)  # noqa: TID251 - the edge where the clock comes from


@dataclass(frozen=True)
class Admitted:
    """What a worker has once the pool has taken it."""

    engine: Engine
    store: Store
    place: Place
    owner: str


def admit(settings: Settings, device: str, *, stop: Stop, rebind: bool) -> Admitted:
    """Wait for the database, register in the pool, and return what to work with.

    Args:
        settings: Who this worker is, and how many threads it was told to use.
        device: Where its chunks will run.
        stop: When to give up.
        rebind: Whether its number of threads counts for every CPU worker from now on.

    Raises:
        DeviceMissing: the device is not on this machine.
        StartRefused: the database's address or the data folder is wrong, or the others compute
            with other threads.
        Stopped: told to stop before anything was ready.
    """
    found = memory_of(device)
    place = Place(f"{settings.node_name}:{device}", device, settings.memory_bytes or found)
    owner = owner_of(settings, device)
    store = _open_store(settings.data_dir)
    engine = open_database(settings, stop=stop)

    def join() -> Place:
        with transaction(engine) as session:
            _check_store(session, store)
            count = _threads(session, place, asked=settings.threads, rebind=rebind)
            joined = replace(place, threads=count)
            pool.hello(session, owner, place=joined, now=utc_now())
        return joined

    with _closed_on_failure(engine):
        return Admitted(engine, store, patiently(join, stop=stop), owner)


def _open_store(folder: Path) -> Store:
    try:
        store = LocalStore(folder)
        store.identity()
    except OSError as error:
        raise StartRefused(f"STILL_DATA_DIR: {error}") from error
    return store


def open_database(settings: Settings, *, stop: Stop) -> Engine:
    """Return the database once it has the tables of this version; raises as admit does."""
    try:
        engine = make_engine(settings.url)
    except (ArgumentError, ValueError):
        raise StartRefused(
            "STILL_DATABASE_URL is no database URL; write it like "
            "postgresql+psycopg://user:password@host/name"
        ) from None
    except ModuleNotFoundError as missing:
        raise StartRefused(f"STILL_DATABASE_URL: no driver: {missing}") from None
    with _closed_on_failure(engine):
        patiently(lambda: _check_tables(engine), stop=stop)
    return engine


@contextmanager
def _closed_on_failure(engine: Engine) -> Iterator[None]:
    try:
        yield
    except BaseException:
        engine.dispose()
        raise


def patiently(step: Callable[[], T], *, stop: Stop) -> T:
    """Return what ``step`` returns, once it can; tell once of each thing it waits for."""
    said = ""
    while not stop.told:
        try:
            return step()
        except _NotYet as error:
            why = str(error)
        except DBAPIError as error:
            if not is_away(error):
                raise
            why = told(error)
        if why != said:
            log.warning("waiting for the database: %s", why)
            said = why
        stop.wait(LOOK_EVERY)
    raise Stopped


def _check_tables(engine: Engine) -> None:
    with engine.connect() as connection:
        there = MigrationContext.configure(connection).get_current_heads()
    wanted = ScriptDirectory(str(MIGRATIONS)).get_heads()
    if set(there) != set(wanted):
        raise _NotYet(
            f"its tables are of version {', '.join(there) or 'none'}, this program's of "
            f"{', '.join(wanted)}; the API brings them up to date when it starts"
        )


def _check_store(session: Session, store: Store) -> None:
    """Refuse where the database belongs to another store.

    A worker never decides that: beside the wrong folder it would write where nobody looks.
    """
    if session.get(ServiceFact, "store_id") is None:
        raise _NotYet("no server has started with it yet")
    try:
        housekeeping.bind_store(session, store.identity())
    except Conflict as error:
        raise StartRefused(str(error)) from None


def _threads(session: Session, place: Place, *, asked: int | None, rebind: bool) -> int:
    """Return how many threads to compute with; raises StartRefused."""
    if place.kind != "cpu":
        return asked or threads.cores()

    def free() -> bool:
        there = pool.workers(session, now=utc_now())
        return rebind or not any(alive and worker.kind == "cpu" for worker, alive in there)

    try:
        return threads.bind(session, asked=asked, cores=threads.cores(), free=free)
    except threads.ThreadsRefused as refused:
        raise StartRefused(str(refused)) from None


def owner_of(settings: Settings, device: str) -> str:
    """Return the name of this process in the pool."""
    return f"{settings.owner_prefix}{os.getpid()}:{device}"
