"""Who changed what, and when: written with the change, or just before. Never holds a secret."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.db.models import AuditEntry


def record(
    session: Session,
    *,
    project: str,
    actor: str,
    action: str,
    target: str,
    now: datetime,
    data: Mapping[str, Any],
) -> None:
    """Append an entry; ``project`` is the one that was changed, ``data`` is JSON."""
    session.add(
        AuditEntry(at=now, project_id=project, actor=actor, action=action, target=target, data=data)
    )


def list_entries(
    session: Session,
    *,
    limit: int,
    before: int | None = None,
    project: str | None = None,
    actor: str | None = None,
    action: str | None = None,
    target: str | None = None,
) -> tuple[Sequence[AuditEntry], int | None]:
    """Return entries, newest first, and the id that the next page lies before."""
    query = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(limit + 1)
    if before is not None:
        query = query.where(AuditEntry.id < before)
    for column, wanted in (
        (AuditEntry.project_id, project),
        (AuditEntry.actor, actor),
        (AuditEntry.action, action),
        (AuditEntry.target, target),
    ):
        if wanted is not None:
            query = query.where(column == wanted)
    found = session.scalars(query).all()
    return found[:limit], found[limit - 1].id if len(found) > limit else None
