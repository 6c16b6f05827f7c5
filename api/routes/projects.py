"""Projects: who shares the pool, up to which limits."""

from datetime import datetime
from typing import Annotated, Self

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.orm import Session

from api.bodies import StrictRoute
from api.deps import PROBLEMS, Admin, Ctx
from api.views import View
from core.db.models import Project
from core.jobs import projects

router = APIRouter(
    prefix="/v1/projects", tags=["projects"], route_class=StrictRoute, responses=PROBLEMS
)
ProjectId = Annotated[str, Path(description="The project's id.", max_length=64)]
Name = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,62}$",
        description="Unique. Letters, digits, space, dot, dash, underscore.",
    ),
]
Weight = Annotated[
    float,
    Field(gt=0, le=1e6, description="Its part of the pool, against the weights of the others."),
]
Limit = Annotated[int | None, Field(ge=0, le=2**53)]


class ProjectAsked(BaseModel):
    """A project to be made. A limit of null is none."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"name": "search", "weight": 2, "queued_limit": 500}]},
    )

    name: Name
    weight: Weight = 1.0
    running_limit: Limit = Field(None, description="Chunks that run at once.")
    queued_limit: Limit = Field(None, description="Jobs that are not over.")
    storage_limit_bytes: Limit = Field(None, description="Of artifacts and uploads, each once.")


class ProjectChange(BaseModel):
    """What to change of a project; what is left out stays. A limit of null is none."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"weight": 0.5, "running_limit": None}]},
    )

    name: Name = Field(default_factory=str)
    weight: Weight = Field(default_factory=float)
    running_limit: Limit = Field(None, description="Chunks that run at once.")
    queued_limit: Limit = Field(None, description="Jobs that are not over.")
    storage_limit_bytes: Limit = Field(None, description="Of artifacts and uploads, each once.")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError(f"nothing to change; allowed: {', '.join(type(self).model_fields)}")
        return self


class UseView(View):
    """What a project holds at this moment."""

    running_chunks: int
    queued_jobs: int = Field(description="Not over yet, the running ones included.")
    storage_bytes: int = Field(
        description="Of its artifacts, each counted once, and of unfinished uploads."
    )


class ProjectView(View):
    """Who shares the pool: weight, limits (null: none) and what is in use."""

    id: str = Field(examples=["prj_default"])
    name: str
    weight: float
    running_limit: int | None
    queued_limit: int | None
    storage_limit_bytes: int | None
    created_at: datetime
    use: UseView


class ProjectPage(View):
    """Every project, by name."""

    items: list[ProjectView]


def show(session: Session, project: Project) -> ProjectView:
    """Show a project with what is in use."""
    own = {name: getattr(project, name) for name in ProjectView.model_fields if name != "use"}
    return ProjectView.model_validate({**own, "use": projects.use_of(session, project.id)})


@router.post("", status_code=201, summary="Make a project")
def create(asked: ProjectAsked, ctx: Ctx, by: Admin, response: Response) -> ProjectView:
    """Make a project; give it keys next."""
    with ctx.transaction() as session:
        made = projects.create(session, **asked.model_dump(), now=ctx.clock())
        ctx.note(session, by, "project.create", made.id, project=made.id, **asked.model_dump())
        response.headers["Location"] = f"/v1/projects/{made.id}"
        return show(session, made)


@router.get("", summary="List projects")
def list_projects(ctx: Ctx, _by: Admin) -> ProjectPage:
    """Return every project with its limits and what is in use."""
    with ctx.reading() as session:
        found = projects.list_projects(session)
        return ProjectPage(items=[show(session, project) for project in found])


@router.get("/{project_id}", summary="Show a project")
def get(project_id: ProjectId, ctx: Ctx, _by: Admin) -> ProjectView:
    """Return a project with its limits and what is in use."""
    with ctx.reading() as session:
        return show(session, projects.get(session, project_id))


@router.patch("/{project_id}", summary="Change a project")
def change(project_id: ProjectId, asked: ProjectChange, ctx: Ctx, by: Admin) -> ProjectView:
    """Set name, weight or limits; they hold from the next request and the next chunk on."""
    values = asked.model_dump(exclude_unset=True)
    with ctx.waking() as session:
        project = projects.change(session, project_id, values=values)
        ctx.note(session, by, "project.change", project_id, project=project_id, **values)
        return show(session, project)
