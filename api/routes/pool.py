"""The pool: its devices, what runs on them, whose turn it is; draining a node; the sweep."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query
from pydantic import Field
from sqlalchemy.orm import Session

from api.bodies import StrictRoute
from api.deps import PROBLEMS, Admin, Context, Ctx, Reader
from api.views import View
from core.jobs import housekeeping, overview, pool
from core.jobs.keys import Principal, Scope
from core.jobs.overview import Place, Queue

router = APIRouter(prefix="/v1", tags=["pool"], route_class=StrictRoute, responses=PROBLEMS)
NodePath = Annotated[
    str, Path(description="The node's id, host:device.", max_length=128, examples=["host-7:cuda:0"])
]
OTHERS = "others"


class RunningView(View):
    """The chunk that a worker runs. Null fields: it is another project's."""

    job_id: str | None
    kind: str | None
    stage: str | None
    index: int | None = Field(description="Within its stage, from 0.")
    since: datetime | None
    progress: float | None = Field(description="From 0 to 1.")


class PlaceView(View):
    """A worker: one process, one device."""

    id: str
    node: str = Field(description="host:device; outlives the process.", examples=["host-7:cuda:0"])
    device: str = Field(examples=["cpu", "cuda:0"])
    kind: str = Field(description="The pool it belongs to: cpu or gpu.")
    memory_bytes: int = Field(description="Of its device: what a chunk may ask for.")
    threads: int
    alive: bool = Field(description="Heard of within 20 seconds.")
    seen_at: datetime
    started_at: datetime
    utilisation: float = Field(description="Part of its life that it ran chunks, from 0 to 1.")
    running: RunningView | None = Field(description="Null: it is idle.")


class NodeView(View):
    """A place that workers start on again and again."""

    id: str = Field(examples=["host-7:cuda:0"])
    state: str = Field(
        description="active; draining (finishes its chunk, takes no other); excluded (chunks "
        "failed here and succeeded elsewhere, several in a row)."
    )
    note: str | None = Field(description="Why it is not active.")
    updated_at: datetime


class QueueView(View):
    """A project's part of the pool; the others' are summed up, but for an admin."""

    project_id: str | None = Field(description="Null: all other projects together.")
    name: str = Field(examples=["search", OTHERS])
    weight: float
    share: float = Field(description="Its weight over those of all who use the pool, from 0 to 1.")
    usage: float = Field(description="Device seconds, older use counting less; running included.")
    debt: float = Field(description="Device seconds used beyond its share; negative: short of it.")
    running_chunks: int
    running_limit: int | None = Field(description="Chunks at once; null: none.")
    queued_limit: int | None = Field(description="Jobs that are not over; null: none.")
    jobs: dict[str, int] = Field(description="Open jobs by state.", examples=[{"queued": 3}])
    chunks_left: int = Field(description="Of the jobs that are planned.")


class PoolView(View):
    """Who runs chunks, what runs, and who waits for how much."""

    workers: list[PlaceView]
    nodes: list[NodeView]
    projects: list[QueueView]


class SweepView(View):
    """What the sweep took."""

    dry_run: bool = Field(description="Nothing was taken: this is what would be.")
    removed: list[str] = Field(description="SHA-256 of artifacts, and names of temp files.")


@router.get("/pool", summary="Show the pool")
def get(ctx: Ctx, by: Reader) -> PoolView:
    """Return devices, what runs on them, and the queue of each project.

    Of other projects it is told only that they keep a worker busy, and their sums; a key with the
    admin scope sees all.
    """
    with ctx.reading() as session:
        return look(session, ctx, by)


def look(session: Session, ctx: Context, by: Principal) -> PoolView:
    """Show the pool to who asks."""
    now, sees_all = ctx.clock(), Scope.ADMIN in by.scopes
    queues = overview.queues(session, now=now, fairness=ctx.fairness)
    own = [q for q in queues if sees_all or q.standing.project_id == by.project_id]
    others = [q for q in queues if q not in own]
    return PoolView(
        workers=[_place(one, by) for one in overview.places(session, now=now)],
        nodes=[NodeView.model_validate(node) for node in pool.nodes(session)],
        projects=[_queue(one) for one in own] + ([_summed(others)] if others else []),
    )


def _place(place: Place, by: Principal) -> PlaceView:
    running = None
    if place.running is not None:
        seen = Scope.ADMIN in by.scopes or place.running.project_id == by.project_id
        names = RunningView.model_fields
        running = RunningView(**{n: getattr(place.running, n) if seen else None for n in names})
    worker = place.worker
    return PlaceView(
        id=worker.id,
        node=worker.node_id,
        device=worker.device,
        kind=worker.kind,
        memory_bytes=worker.memory_bytes,
        threads=worker.threads,
        alive=place.alive,
        seen_at=worker.seen_at,
        started_at=worker.started_at,
        utilisation=place.utilisation,
        running=running,
    )


def _queue(queue: Queue) -> QueueView:
    one = queue.standing
    return QueueView(
        project_id=one.project_id,
        name=one.name,
        weight=one.weight,
        share=one.share,
        usage=one.usage,
        debt=one.debt,
        running_chunks=one.running,
        running_limit=one.running_limit,
        queued_limit=queue.queued_limit,
        jobs=dict(queue.jobs),
        chunks_left=queue.chunks_left,
    )


def _summed(queues: Sequence[Queue]) -> QueueView:
    jobs: dict[str, int] = {}
    for queue in queues:
        for state, count in queue.jobs.items():
            jobs[state] = jobs.get(state, 0) + count
    all_of = [queue.standing for queue in queues]
    return QueueView(
        project_id=None,
        name=OTHERS,
        weight=sum(one.weight for one in all_of),
        share=sum(one.share for one in all_of),
        usage=sum(one.usage for one in all_of),
        debt=sum(one.debt for one in all_of),
        running_chunks=sum(one.running for one in all_of),
        running_limit=None,
        queued_limit=None,
        jobs=jobs,
        chunks_left=sum(queue.chunks_left for queue in queues),
    )


@router.post("/pool/nodes/{node_id}/drain", summary="Drain a node")
def drain(
    node_id: NodePath,
    ctx: Ctx,
    by: Admin,
    note: Annotated[str, Query(max_length=200, description="Why; shown with the node.")] = "",
) -> NodeView:
    """Let the node's chunk end and give it no other, until it is resumed; restarts change nothing.

    A job that no other worker can run waits, and says so.
    """
    return set_node(ctx, by, node_id, pool.DRAINING, note=note or f"drained by {by.actor}")


@router.post("/pool/nodes/{node_id}/resume", summary="Take a node back")
def resume(node_id: NodePath, ctx: Ctx, by: Admin) -> NodeView:
    """Use a draining or excluded node again, its failures forgotten."""
    return set_node(ctx, by, node_id, pool.ACTIVE, note=None)


def set_node(
    ctx: Context, by: Principal, node_id: str, state: str, *, note: str | None
) -> NodeView:
    """Change how a node is used; NotFound where no worker ever ran there."""
    with ctx.waking() as session:
        node = pool.set_node_state(session, node_id, state, note=note, now=ctx.clock())
        ctx.note(session, by, f"node.{state}", node_id, note=note)
        return NodeView.model_validate(node)


@router.post("/sweep", summary="Remove what nothing names")
def sweep(
    ctx: Ctx,
    by: Admin,
    dry_run: Annotated[bool, Query(description="Only list what would go.")] = True,  # noqa: FBT002
) -> SweepView:
    """Remove artifacts, blobs and temp files that no job, upload or cache entry names.

    What is younger than an hour stays. What a job made stays for as long as the job.
    """
    if not dry_run:
        with ctx.transaction() as session:  # before: what goes, goes in many transactions
            ctx.note(session, by, "sweep", "store")
    gone = housekeeping.sweep(ctx.engine, ctx.store, now=ctx.clock(), dry_run=dry_run)
    return SweepView(dry_run=dry_run, removed=gone)
