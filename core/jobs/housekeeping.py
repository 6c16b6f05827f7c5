"""Takes away what crashes leave behind, and ties a database to the one store its rows speak of."""

import re
import shutil
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import ColumnElement, Engine, and_, delete, select
from sqlalchemy.orm import Session

from core.artifacts.store import Store
from core.db.models import Artifact, CacheEntry, Chunk, JobInput, Output, ServiceFact, Upload
from core.db.session import insert_new, reading, transaction
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
    """Remove folders of attempts that no longer run, and sweep.

    Returns:
        What was removed, by name.
    """
    removed = []
    for folder in sorted(scratch.glob("*.*")):
        if not _still_runs(engine, folder.name):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
    return removed + sweep(engine, store, now=now)


def sweep(engine: Engine, store: Store, *, now: datetime, dry_run: bool = False) -> list[str]:
    """Remove artifacts that nothing names, orphan blobs and stale temp files.

    Something names an artifact while a job made it, an upload became it, the cache knows it or a
    job reads it; so a job's outputs never expire by themselves.

    Returns:
        The hashes (and temp files) that went, or with ``dry_run`` would go.
    """
    unnamed = _unnamed(now - ORPHANED_AFTER)
    with reading(engine) as session:
        doomed = session.scalars(select(Artifact.sha256).where(unnamed)).all()
    if not dry_run and doomed:
        with transaction(engine) as session:
            gone = delete(Artifact).where(unnamed).returning(Artifact.sha256)
            doomed = session.scalars(gone.execution_options(synchronize_session=False)).all()
    old = set(doomed)
    return store.sweep(
        lambda sha256: sha256 not in old and _referenced(engine, sha256),
        older_than=ORPHANED_AFTER,
        now=now,
        dry_run=dry_run,
    )


def _unnamed(before: datetime) -> ColumnElement[bool]:
    """Artifacts made before an instant that no row speaks of."""
    names = (
        select(Output.name).where(Output.sha256 == Artifact.sha256),
        select(Upload.id).where(Upload.artifact == Artifact.sha256),
        select(CacheEntry.key).where(CacheEntry.sha256 == Artifact.sha256),
        select(JobInput.field).where(JobInput.sha256 == Artifact.sha256),
    )
    return and_(Artifact.created_at < before, *(~query.exists() for query in names))


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
