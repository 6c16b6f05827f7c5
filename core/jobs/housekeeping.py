"""Takes away what crashes leave behind, and ties a database to the one store its rows speak of."""

import re
import shutil
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from core.artifacts.store import Store
from core.db.models import Artifact, Chunk, ServiceFact
from core.db.session import insert_new, reading
from core.errors import Conflict
from core.jobs.states import ChunkState

ORPHANED_AFTER = timedelta(hours=1)
"""A blob is stored before its row: younger ones may still be adopted."""
_WORKDIR = re.compile(r"(\d+)\.(\d+)")


def bind_store(session: Session, store_id: str) -> None:
    """Note which store this database's artifacts lie in.

    Raises:
        Conflict: the database belongs to another store, so its files would be missing here.
    """
    if insert_new(session, ServiceFact, {"key": "store_id", "value": store_id}):
        return
    known = session.get_one(ServiceFact, "store_id").value
    if known != store_id:
        raise Conflict(
            f"the database belongs to the store {known}, and this data folder holds {store_id}: "
            "set STILL_DATA_DIR to the folder it was used with, or take another database"
        )


def tidy(engine: Engine, store: Store, scratch: Path, *, now: datetime) -> list[str]:
    """Remove folders of attempts that no longer run, orphan blobs and stale temp files.

    Returns:
        What was removed, by name.
    """
    removed = []
    for folder in sorted(scratch.glob("*.*")):
        if not _still_runs(engine, folder.name):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
    return removed + store.sweep(
        lambda sha256: _referenced(engine, sha256), older_than=ORPHANED_AFTER, now=now
    )


def _still_runs(engine: Engine, name: str) -> bool:
    """Whether a folder ``chunk.attempt`` belongs to a running attempt; true for foreign names."""
    match = _WORKDIR.fullmatch(name)
    if match is None:
        return True
    chunk_id, attempt = map(int, match.groups())
    query = select(Chunk.id).where(
        Chunk.id == chunk_id, Chunk.attempt == attempt, Chunk.state == ChunkState.RUNNING
    )
    with reading(engine) as session:
        return session.scalar(query) is not None


def _referenced(engine: Engine, sha256: str) -> bool:
    with reading(engine) as session:
        return session.get(Artifact, sha256) is not None
