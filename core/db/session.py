"""Engines and transactions. Only the edges open one, and none is open while a chunk runs."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.orm import Session

from core.db.models import Base

if TYPE_CHECKING:
    from alembic.config import Config

_READ = "stillroom_read"
_USED = "stillroom_used"
RESTED_S = 1.0
"""A connection of the pool that was unused for so long is asked whether it lives."""
PATIENCE = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""How long libpq believes in a host that vanished: seconds, the last one milliseconds."""
DEADLOCKS = ("40P01", "40001")
AWAY = ("25006", "25P03")
"""Read only, as a standby is; and a transaction that was ended since its client was silent."""
SILENCE_S = 15
"""Between two statements of a transaction, after which PostgreSQL ends it and frees its locks.

A frozen process, or a host that lost its power, would else hold the turn of all claims for hours.
Ours take milliseconds: nothing is computed inside a transaction.
"""
MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"


def make_engine(url: str) -> Engine:
    """Open a database. SQLite: WAL, full sync, 30 s busy timeout, BEGIN IMMEDIATE for writers."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        engine = create_engine(parsed, connect_args=PATIENCE)
        event.listen(engine, "connect", _limit_silence)
        event.listen(engine, "checkin", _note_use)
        event.listen(engine, "checkout", _check_rested)
        return engine
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, connect_args={"timeout": 30})
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _limit_silence(connection: Any, _record: Any) -> None:
    connection.execute(f"SET idle_in_transaction_session_timeout = '{SILENCE_S}s'")
    connection.commit()


def _note_use(_connection: Any, record: Any) -> None:
    record.info[_USED] = time.monotonic()


def _check_rested(connection: Any, record: Any, _proxy: Any) -> None:
    """Ask a connection that rested whether it lives; one used a moment ago most likely does.

    Asking each time would cost every poll of a job a round trip.

    Raises:
        DisconnectionError: it does not; the pool takes another.
    """
    if time.monotonic() - record.info.get(_USED, -math.inf) < RESTED_S:
        return
    try:
        connection.execute("SELECT 1")
        connection.rollback()
    except connection.Error as error:
        raise DisconnectionError from error


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    # The driver must not open transactions of its own: _begin_sqlite does.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    # A reader that turns writer in the middle fails at once, whatever the busy timeout; so a
    # transaction says at its start which it is.
    reads = connection.get_execution_options().get(_READ, False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """Open a session that writes; commits at the end, rolls back on any error."""
    with Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """Open a session on one snapshot that only reads, and never waits for a writer."""
    options: dict[str, Any] = {_READ: True}
    if engine.dialect.name != "sqlite":  # where every transaction is on one snapshot anyway
        options["isolation_level"] = "REPEATABLE READ"
    with Session(engine, expire_on_commit=False) as session, session.begin():
        # Of the connection, not of the engine: making another engine costs more than a query.
        session.connection(execution_options=options)
        yield session


@contextmanager
def glancing(engine: Engine) -> Iterator[Connection]:
    """Open a connection for one statement that reads: it is a snapshot by itself.

    Without a transaction around it PostgreSQL is asked once instead of three times.
    """
    if engine.dialect.name == "sqlite":  # in this process: there is nothing to save
        with reading(engine) as session:
            yield session.connection()
        return
    with engine.connect() as connection:
        yield connection.execution_options(isolation_level="AUTOCOMMIT")


def insert_new(session: Session, table: type[Base], values: Mapping[str, Any]) -> bool:
    """Insert a row unless its key is there; return whether it was new."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    statement = dialect.insert(table).values(**values).on_conflict_do_nothing()
    # Not rowcount: the drivers disagree on what it says here.
    keys = inspect(table).primary_key
    return session.connection().execute(statement.returning(*keys)).first() is not None


def insert_or_touch(
    session: Session, table: type[Base], values: Mapping[str, Any], *, touch: str
) -> None:
    """Insert a row; where its key is there, set one column of it, which locks it too."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    statement = dialect.insert(table).values(**values)
    keys = [column.name for column in inspect(table).primary_key]
    session.execute(
        statement.on_conflict_do_update(index_elements=keys, set_={touch: values[touch]})
    )


def is_away(error: BaseException) -> bool:
    """Whether the database cannot be reached, takes no writes or gave us up: it may pass."""
    if not isinstance(error, DBAPIError) or deadlocked(error):
        return False
    if isinstance(error, (OperationalError, InterfaceError)):
        return True
    return getattr(error.orig, "sqlstate", None) in AWAY


def deadlocked(error: DBAPIError) -> bool:
    """Whether the database ended this transaction to break a deadlock: sent again, it passes."""
    return getattr(error.orig, "sqlstate", None) in DEADLOCKS


def upgrade(engine: Engine, *, revision: str = "head") -> None:
    """Bring the schema to ``revision``; safe to call at every start."""
    from alembic import command  # noqa: PLC0415 - see migrating

    with migrating(engine) as config:
        command.upgrade(config, revision)


@contextmanager
def migrating(engine: Engine) -> "Iterator[Config]":
    """Yield Alembic's configuration on one transaction; commits at the end."""
    # Only who migrates pays for loading Alembic: a health check runs every few seconds.
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.connect() as connection:
        sqlite_file = engine.dialect.name == "sqlite"
        if sqlite_file:
            # SQLite changes a table by making it anew: rows that refer to it must not mind.
            _pragma(connection, "foreign_keys=OFF")
        with connection.begin():
            if not sqlite_file:
                # Several APIs start at once: one migrates, the others wait and find it done.
                connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('stillroom'))"))
            config.attributes["connection"] = connection
            yield config
        if sqlite_file:
            _pragma(connection, "foreign_keys=ON")


def _pragma(connection: Connection, setting: str) -> None:
    """Set a pragma outside any transaction, where alone it takes effect."""
    raw: Any = connection.connection.driver_connection
    raw.execute(f"PRAGMA {setting}").close()
