"""Who changed what, and when."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field

from api.deps import PROBLEMS, Admin, Ctx
from api.views import View
from core.jobs import audit

router = APIRouter(prefix="/v1/audit", tags=["audit"], responses=PROBLEMS)


class AuditView(View):
    """A change that somebody made."""

    id: int = Field(description="Rises with time.")
    at: datetime
    project_id: str = Field(description="The project that was changed.")
    actor: str = Field(description="The id of the key, `operator` or `local`.")
    action: str = Field(examples=["job.submit", "job.cancel", "key.create", "project.change"])
    target: str = Field(description="The id of what was changed.")
    data: dict[str, Any]


class AuditPage(View):
    """Changes, newest first."""

    items: list[AuditView]
    next_before: int | None = Field(description="Give as ?before= for the next page; null: last.")


@router.get("", summary="List changes, newest first")
def list_entries(
    ctx: Ctx,
    _by: Admin,
    project: Annotated[str | None, Query(description="Only changes of this project.")] = None,
    actor: Annotated[str | None, Query(description="Only changes by this key.")] = None,
    action: Annotated[str | None, Query(description="Only this action.")] = None,
    target: Annotated[str | None, Query(description="Only changes of this thing.")] = None,
    before: Annotated[int | None, Query(ge=1, le=2**62, description="Only earlier ones.")] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> AuditPage:
    """Return a page; follow next_before for the rest."""
    with ctx.reading() as session:
        found, following = audit.list_entries(
            session,
            limit=limit,
            before=before,
            project=project,
            actor=actor,
            action=action,
            target=target,
        )
        items = [AuditView.model_validate(entry) for entry in found]
    return AuditPage(items=items, next_before=following)
