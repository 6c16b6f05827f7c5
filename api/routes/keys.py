"""API keys: made for a project, shown once, revoked; and what one's own key may do."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from api.bodies import StrictRoute
from api.deps import PROBLEMS, Admin, Caller, Ctx
from api.routes.projects import ProjectView, show
from api.views import View
from core.db.models import ApiKey
from core.jobs import keys, projects
from core.jobs.keys import Scope

router = APIRouter(prefix="/v1", tags=["keys"], route_class=StrictRoute, responses=PROBLEMS)
KeyId = Annotated[str, Path(description="The key's id, not the key itself.", max_length=64)]


def _in_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("that instant is out of range") from None


class KeyAsked(BaseModel):
    """A key to be made."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "project": "prj_default",
                    "name": "nightly runs",
                    "scopes": ["read", "submit"],
                    "expires_at": "2027-01-01T00:00:00Z",
                }
            ]
        },
    )

    project: str = Field(max_length=64, description="The project's id.")
    name: str = Field(min_length=1, max_length=100, description="What it is for.")
    scopes: list[Annotated[Scope, Field(strict=False)]] = Field(
        default=[Scope.READ, Scope.SUBMIT],
        min_length=1,
        max_length=len(Scope),
        description="read: look; submit: jobs and uploads; admin: projects, keys, pool, audit log, "
        "of every project. None includes another.",
    )
    expires_at: Annotated[AwareDatetime, Field(strict=False), AfterValidator(_in_utc)] | None = (
        Field(None, description="Null: it lasts until revoked.")
    )


class KeyView(View):
    """A key as it is stored: without its secret."""

    id: str = Field(examples=["key_3fj8k2m9q0rt"])
    project_id: str
    name: str
    prefix: str = Field(description="How the key begins, to know it by.")
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None = Field(description="To the minute.")


class KeyMade(KeyView):
    """A new key, and the only sight of it."""

    key: str = Field(description="Keep it: it is not shown again.")


class KeyPage(View):
    """Keys, newest first."""

    items: list[KeyView]


class MeView(View):
    """Whom the request's key stands for."""

    actor: str = Field(description="The id of the key, `operator`, or `local` where none is set.")
    scopes: list[str]
    project: ProjectView
    key: KeyView | None = Field(description="Null for the operator and where no key is set.")


@router.post("/keys", status_code=201, summary="Make a key")
def create(asked: KeyAsked, ctx: Ctx, by: Admin, response: Response) -> KeyMade:
    """Make a key for a project. The answer holds the key itself, which is never shown again."""
    with ctx.transaction() as session:
        row, text = keys.create(
            session, **asked.model_dump(), now=ctx.clock(), secret=ctx.principals.secret
        )
        facts = {"name": row.name, "scopes": row.scopes, "prefix": row.prefix}
        until = row.expires_at.isoformat() if row.expires_at else None
        ctx.note(
            session,
            by,
            "key.create",
            row.id,
            project=row.project_id,
            **facts,
            expires_at=until,
        )
        view = KeyMade.model_validate({**_facts(row), "key": text})
    response.headers["Location"] = f"/v1/keys/{row.id}"
    response.headers["Cache-Control"] = "no-store"
    return view


def _facts(row: ApiKey) -> dict[str, object]:
    return {name: getattr(row, name) for name in KeyView.model_fields}


@router.get("/keys", summary="List keys")
def list_keys(
    ctx: Ctx,
    _by: Admin,
    project: Annotated[str | None, Query(description="Only keys of this project.")] = None,
) -> KeyPage:
    """Return keys, newest first, the revoked ones too."""
    with ctx.reading() as session:
        found = keys.list_keys(session, project=project)
        return KeyPage(items=[KeyView.model_validate(row) for row in found])


@router.get("/keys/{key_id}", summary="Show a key")
def get(key_id: KeyId, ctx: Ctx, _by: Admin) -> KeyView:
    """Return what is stored of a key; `self` is at /v1/me."""
    with ctx.reading() as session:
        return KeyView.model_validate(keys.get(session, key_id))


@router.delete("/keys/{key_id}", status_code=204, summary="Revoke a key")
def revoke(key_id: KeyId, ctx: Ctx, by: Admin) -> None:
    """End a key for good, within two seconds; revoking it again changes nothing."""
    with ctx.transaction() as session:
        already = keys.get(session, key_id).revoked_at is not None
        row = keys.revoke(session, key_id, now=ctx.clock())
        if not already:
            ctx.note(session, by, "key.revoke", key_id, project=row.project_id, prefix=row.prefix)


@router.get("/me", summary="Show whom the key stands for")
def me(ctx: Ctx, by: Caller) -> MeView:
    """Return the project of the request's key, its scopes, its limits and what is in use."""
    with ctx.reading() as session:
        key = keys.get(session, by.actor) if by.actor.startswith("key_") else None
        return MeView(
            actor=by.actor,
            scopes=[scope for scope in Scope if scope in by.scopes],
            project=show(session, projects.get(session, by.project_id)),
            key=KeyView.model_validate(key) if key is not None else None,
        )
