"""What the tests of this folder do beyond tests/life.py: projects, workers, plans without files."""

from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from core.artifacts.store import Blob
from core.db.models import Chunk, Job, Node, Output
from core.db.session import reading, transaction
from core.errors import ChunkCrashed, StillroomError
from core.jobs import lease, pool, projects, service, shares
from core.jobs.adoption import Stored
from core.jobs.lease import Claim
from core.jobs.pool import Place
from tests.life import PROJECT, RULES, Now, place, submit, uploaded

P = ParamSpec("P")
T = TypeVar("T")
PAIRS = {"rows": 120, "dim": 16, "groups": 4}
MODEL = {"clusters": 48, "dim": 16, "rows": 90, "held_out": 30, "temperature": 0.1, "pairs": None}


def within(
    engine: Engine,
    change: Callable[Concatenate[Session, P], T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Call one of the product's functions in a transaction of its own."""
    with transaction(engine) as session:
        return change(session, *args, **kwargs)


def project(engine: Engine, now: Now, name: str, **values: Any) -> str:
    return within(engine, projects.create, name=name, now=now(), **values).id


def used(engine: Engine, project_id: str, seconds: float, now: Now) -> None:
    """Let a project have used the pool."""
    about = {"now": now(), "fairness": RULES.fairness}
    within(engine, shares.charge, project_id, seconds, **about)


def worker(
    engine: Engine, now: Now, name: str = "w1", device: str = "cpu", memory_bytes: int = 1 << 40
) -> Place:
    """Let a worker be there, on a node of its own."""
    at = place(f"host:{name}", device, memory_bytes)
    within(engine, pool.hello, name, place=at, now=now())
    return at


def node(engine: Engine, name: str) -> Node:
    with reading(engine) as session:
        return session.get_one(Node, name)


def job_of(engine: Engine, job_id: str) -> Job:
    with reading(engine) as session:
        return service.get(session, job_id)


def chunks_of(engine: Engine, job_id: str) -> Sequence[Chunk]:
    query = select(Chunk).where(Chunk.job_id == job_id)
    with reading(engine) as session:
        return session.scalars(query.order_by(Chunk.stage_index, Chunk.index)).all()


def chunk_states(engine: Engine, job_id: str) -> list[str]:
    return [chunk.state for chunk in chunks_of(engine, job_id)]


def set_chunks(engine: Engine, job_id: str, **values: Any) -> None:
    """Let a job's chunks ask for something that no kind asks for yet."""
    with transaction(engine) as session:
        session.execute(update(Chunk).where(Chunk.job_id == job_id).values(**values))


def pairs(engine: Engine, now: Now, project_id: str = PROJECT) -> str:
    """What a plan needs to know of pairs; there are no bytes."""
    blob = Blob("b" * 64, 1)
    return uploaded(engine, blob, now, format_name="pairs", meta=PAIRS, project=project_id)


def fit(engine: Engine, now: Now, **fields: Any) -> str:
    """Submit a fit: prepare, 4 fanned chunks, assemble."""
    asked = {
        "clustering": {"method": "kmeans", "max_clusters": 64},
        "strength": 1.0,
        "temperature": 0.1,
        **fields,
    }
    sha256 = pairs(engine, now, fields.get("project", PROJECT))
    return submit(engine, now, kind="fit_federated", pairs=sha256, **asked)


def fanned(engine: Engine, now: Now, **fields: Any) -> str:
    """Submit a job of three fanned stages: 3, 3 and 1 chunks."""
    project_id = fields.get("project", PROJECT)
    blob = Blob("c" * 64, 1)
    about = {"format_name": "federated_model", "meta": MODEL, "project": project_id}
    model = uploaded(engine, blob, now, **about)
    return submit(engine, now, kind="cache_targets", model=model, rows_per_chunk=30, **fields)


def a_file(name: str, seed: int, *, role: str = "checkpoint", **facts: Any) -> Stored:
    """A file that is not in any store."""
    values = {
        "size_bytes": 1,
        "format": "text",
        "media_type": "text/plain",
        "file_name": f"{name}.txt",
        "meta": {},
        "cache_key": None,
        "cached": False,
    }
    return Stored(name=name, role=role, sha256=f"{seed:064x}", **{**values, **facts})


MADE_MODEL = a_file("model", 0xF17, role="artifact", format="federated_model", meta=MODEL)


def outputs_of(engine: Engine, job_id: str, role: str = "checkpoint") -> list[str]:
    """Return the hashes that a job still names in a role, in order."""
    query = select(Output.sha256).where(Output.job_id == job_id, Output.role == role)
    with reading(engine) as session:
        return list(session.scalars(query.order_by(Output.chunk_id, Output.name)))


def hand_back(engine: Engine, claimed: Claim, now: Now) -> None:
    within(engine, lease.hand_back, claimed, now=now(), rules=RULES)


def crash(engine: Engine, claimed: Claim, now: Now, error: StillroomError | None = None) -> None:
    about = {"now": now(), "rules": RULES}
    within(engine, lease.give_up, claimed, error or ChunkCrashed("no"), **about)


def copies(engine: Engine, job_id: str, count: int) -> list[str]:
    """Insert so many more queued jobs like this one, one second after another, in one go."""
    with transaction(engine) as session:
        job, chunk = (
            session.execute(table.__table__.select().where(column == job_id)).mappings().one()
            for table, column in ((Job, Job.id), (Chunk, Chunk.job_id))
        )
        ids = [f"{job_id}_{number:05d}" for number in range(count)]
        session.execute(Job.__table__.insert(), [{**job, "id": one} for one in ids])
        rows = [{k: v for k, v in chunk.items() if k != "id"} | {"job_id": one} for one in ids]
        session.execute(Chunk.__table__.insert(), rows)
    return ids
