"""Reads plain tables of a stranger's SQLite file. Nothing in the file runs, whatever it holds.

Views, triggers, virtual tables and generated columns are refused; what is read is bounded.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import DataInvalid
from core.tensors.manifests import shown

MAGIC = b"SQLite format 3\0"
_PLAIN = ("CREATE TABLE ", "CREATE INDEX ", "CREATE UNIQUE INDEX ")
"""How SQLite itself writes down what a schema holds; the word for the sort of it may lie."""
_STEPS = 10_000
"""Instructions of the database between two looks at how many there were."""
_STEPS_ALLOWED, _STEPS_PER_BYTE = 10_000_000, 32
_LEAST_LENGTH = 100_000
"""Bytes of a row or of a statement that are read from however small a file."""
_READS = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """What a table must have and what it may have; any other column is not looked at."""

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    required: bool = True
    """Whether the file must have the table at all."""


class Tables:
    """The known tables of an open file. No honest file holds more bytes than it is long."""

    def __init__(
        self, database: sqlite3.Connection, known: Mapping[str, Columns], *, size_bytes: int
    ) -> None:
        """Take a confined connection; ``open_tables`` makes one."""
        self._database, self._known, self._left = database, known, size_bytes
        self._columns = _columns(database, known)

    def rows(self, table: str, **where: Any) -> Iterator[Row]:
        """Yield the rows whose columns equal ``where``, as they stand: column -> value or None.

        A column or a whole table that may be missing, and is, reads as None and as no rows.

        Raises:
            DataInvalid: there are more bytes than the file has: one page shown as many rows.
        """
        if table not in self._columns:
            return
        names, absent = self._columns[table], dict.fromkeys(self._known[table].optional)
        # An index is a second copy, which need not agree with the first.
        query = f"SELECT {', '.join(names)} FROM {table} NOT INDEXED"
        if where:
            query += f" WHERE {' AND '.join(f'{name} = ?' for name in where)}"
        for values in self._database.execute(query, tuple(where.values())):
            self._left -= sum(len(value) for value in values if isinstance(value, bytes | str))
            if self._left < 0:
                raise DataInvalid(f"{table}: holds more bytes than the file has; it is damaged")
            yield {**absent, **dict(zip(names, values, strict=True))}

    def distinct(self, table: str, column: str) -> list[Any]:
        """Return the different values of a column, none of a table that is not there."""
        if table not in self._columns:
            return []
        query = f"SELECT DISTINCT {column} FROM {table} NOT INDEXED"
        return [value for [value] in self._database.execute(query)]


@contextmanager
def open_tables(path: Path, known: Mapping[str, Columns]) -> Iterator[Tables]:
    """Open a closed database read-only.

    Args:
        path: of the file; what is only in a ``-wal`` beside it would not be seen, so is refused.
        known: the tables to read; their names are ours, not the file's.

    Raises:
        DataInvalid: no SQLite database, truncated, damaged, or more than plain tables.
        OSError: there is no such file, or it cannot be read.
    """
    size_bytes = path.stat().st_size
    _check_pages(path, size_bytes)
    address = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(address, uri=True, isolation_level=None)) as database:
            _confine(database, size_bytes)
            yield Tables(database, known, size_bytes=size_bytes)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        # Python cannot decode a message of SQLite's that quotes a damaged schema.
        raise DataInvalid(f"the database {path.name} is truncated or damaged ({error})") from error


def _check_pages(path: Path, size_bytes: int) -> None:
    """Raise DataInvalid unless the file starts like SQLite and is as long as it says."""
    with path.open("rb") as file:
        head = file.read(100)
    if not head.startswith(MAGIC) or len(head) < 100:
        raise DataInvalid("not an SQLite database: it does not start with the header of one")
    page_bytes = int.from_bytes(head[16:18], "big")
    page_bytes = 65_536 if page_bytes == 1 else page_bytes
    promised = int.from_bytes(head[28:32], "big") * page_bytes
    # Old versions of SQLite leave the count alone, which these two numbers then tell.
    if head[24:28] == head[92:96] and promised > size_bytes:
        raise DataInvalid(f"the database is truncated: {size_bytes} of {promised} bytes")
    beside = path.with_name(f"{path.name}-wal")
    if beside.exists() and beside.stat().st_size:
        raise DataInvalid(
            f"{beside.name}: holds what is not in the database yet; close it where it is open, or "
            "run PRAGMA wal_checkpoint(TRUNCATE)"
        )


def _confine(database: sqlite3.Connection, size_bytes: int) -> None:
    """Bound what reading may take, and allow nothing but reading plain columns."""
    limits = {
        sqlite3.SQLITE_LIMIT_LENGTH: max(size_bytes, _LEAST_LENGTH),
        sqlite3.SQLITE_LIMIT_SQL_LENGTH: _LEAST_LENGTH,
        sqlite3.SQLITE_LIMIT_COLUMN: 100,
        sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 50,
        sqlite3.SQLITE_LIMIT_ATTACHED: 0,
        sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
        sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
    }
    for limit, most in limits.items():
        database.setlimit(limit, min(most, 2**31 - 1))
    # What is not UTF-8 becomes half a surrogate pair, which whoever reads a text refuses.
    database.text_factory = lambda raw: raw.decode(errors="surrogateescape")
    most_rounds = (_STEPS_ALLOWED + _STEPS_PER_BYTE * size_bytes) // _STEPS
    rounds = iter(range(most_rounds))
    database.set_progress_handler(lambda: next(rounds, None) is None, _STEPS)
    for pragma in ("trusted_schema = OFF", "query_only = ON", "cell_size_check = ON"):
        database.execute(f"PRAGMA {pragma}")
    database.set_authorizer(_allow)


def _allow(action: int, first: str | None, _second: Any, _name: Any, within: str | None) -> int:
    """Tell SQLite whether a statement may do this; ``within`` is a view's or trigger's name."""
    asked = action == sqlite3.SQLITE_PRAGMA and first == "table_xinfo"
    allowed = within is None and (action in _READS or asked)
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _columns(
    database: sqlite3.Connection, known: Mapping[str, Columns]
) -> dict[str, tuple[str, ...]]:
    """Return the columns of the known tables, after refusing a schema that is more than tables."""
    tables = set()
    for sort, name, sql in database.execute("SELECT type, name, sql FROM sqlite_master"):
        plain = sort in ("table", "index") and (sql is None or str(sql).startswith(_PLAIN))
        if not plain:
            raise DataInvalid(
                f"schema: {shown(name)} ({shown(sort)}) is more than a plain table or its index; "
                "views, triggers and virtual tables are refused"
            )
        if sort == "table":
            tables.add(name)
    missing = [name for name, columns in known.items() if columns.required and name not in tables]
    if missing:
        there = ", ".join(shown(name) for name in sorted(map(str, tables))[:12]) or "nothing"
        raise DataInvalid(f"schema: no table {', '.join(missing)}; the file holds {there}")
    return {name: _of_table(database, name, known[name]) for name in known if name in tables}


def _of_table(database: sqlite3.Connection, table: str, known: Columns) -> tuple[str, ...]:
    hidden = {row[1]: row[6] for row in database.execute(f"PRAGMA table_xinfo({table})")}
    if missing := [name for name in known.needed if name not in hidden]:
        raise DataInvalid(f"schema: {table} has no column {', '.join(missing)}")
    wanted = tuple(name for name in (*known.needed, *known.optional) if name in hidden)
    if made := [name for name in wanted if hidden[name]]:
        raise DataInvalid(f"schema: {table}.{made[0]} is generated; needed a stored column")
    return wanted
