"""Who is there to run chunks, where, and whether that place may be used."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from core.db.models import Node, Worker
from core.db.session import insert_new
from core.errors import NotFound, SpecInvalid

ALIVE_FOR = timedelta(seconds=20)
FORGOTTEN_AFTER = timedelta(days=1)
ACTIVE, DRAINING, EXCLUDED = "active", "draining", "excluded"
NODE_STATES = (ACTIVE, DRAINING, EXCLUDED)
EXCLUDED_FOR = timedelta(hours=1)
"""Then it gets another chance: one chunk more that fails there alone excludes it again."""
BLAME_LIMIT = 3
"""Chunks that failed at a node and then succeeded at another, in a row, that exclude it."""


@dataclass(frozen=True)
class Place:
    """Where a worker runs, and what it offers a chunk."""

    node: str
    """``host:device``: outlives the process."""
    device: str
    """``cpu`` or ``cuda:0``."""
    memory_bytes: int
    threads: int = 1

    @property
    def kind(self) -> str:
        """The pool it belongs to: ``cpu`` or ``gpu``."""
        return "cpu" if self.device == "cpu" else "gpu"


def hello(session: Session, worker_id: str, *, place: Place, now: datetime) -> None:
    """Register a worker and its node, and forget workers not heard of for a day."""
    session.execute(delete(Worker).where(Worker.seen_at < now - FORGOTTEN_AFTER))
    _forget_nodes(session, now=now)
    node = {"id": place.node, "state": ACTIVE, "note": None, "blamed": 0, "updated_at": now}
    known = not insert_new(session, Node, node)
    values = {
        "id": worker_id,
        "node_id": place.node,
        "device": place.device,
        "kind": place.kind,
        "memory_bytes": place.memory_bytes,
        "threads": place.threads,
        "busy_seconds": 0.0,
        "started_at": now,
        "seen_at": now,
    }
    if not insert_new(session, Worker, values):
        # In a container every process is number 1: the same name, perhaps another machine.
        offers = ("node_id", "device", "kind", "memory_bytes", "threads")
        now_offered = {name: values[name] for name in offers}
        session.execute(update(Worker).where(Worker.id == worker_id).values(**now_offered))
    if known:  # last: whoever ends a chunk locks the worker's row before the node's too
        there = update(Node).where(Node.id == place.node, Node.state == ACTIVE)
        session.execute(there.values(updated_at=now))


def _forget_nodes(session: Session, *, now: datetime) -> None:
    """Forget places without a blemish that no worker came back to: containers have random names."""
    lives = select(Worker.id).where(Worker.node_id == Node.id).exists()
    gone = (Node.state == ACTIVE, Node.blamed == 0, Node.updated_at < now - FORGOTTEN_AFTER)
    session.execute(delete(Node).where(*gone, ~lives).execution_options(synchronize_session=False))


def seen(session: Session, worker_id: str, *, now: datetime) -> None:
    """Note that a worker is there."""
    worker = session.get(Worker, worker_id)
    if worker is not None:
        worker.seen_at = now


def goodbye(session: Session, worker_id: str) -> None:
    """Forget a worker that ends."""
    session.execute(delete(Worker).where(Worker.id == worker_id))


def forget_all(session: Session, *, owner_prefix: str) -> None:
    """Forget a server's workers: an embedded server starts with none."""
    session.execute(delete(Worker).where(Worker.id.startswith(owner_prefix, autoescape=True)))


def workers(session: Session, *, now: datetime) -> Sequence[tuple[Worker, bool]]:
    """Return each worker and whether it was heard of lately."""
    found = session.scalars(select(Worker).order_by(Worker.device, Worker.id)).all()
    return [(worker, worker.seen_at > now - ALIVE_FOR) for worker in found]


def usable(session: Session, *, now: datetime) -> Sequence[Worker]:
    """Return the workers that are alive on an active node."""
    query = (
        select(Worker)
        .join(Node, Node.id == Worker.node_id)
        .where(Worker.seen_at > now - ALIVE_FOR, Node.state == ACTIVE)
        .order_by(Worker.id)
    )
    return session.scalars(query).all()


def nodes(session: Session) -> Sequence[Node]:
    """Return every place that workers ever ran at."""
    return session.scalars(select(Node).order_by(Node.id)).all()


def node_state(session: Session, node_id: str) -> str:
    """Return a node's state; one not yet heard of is active."""
    return session.scalar(select(Node.state).where(Node.id == node_id)) or ACTIVE


def set_node_state(
    session: Session, node_id: str, state: str, *, note: str | None, now: datetime
) -> Node:
    """Drain a node (its chunk ends, no other begins), or take it back.

    Raises:
        NotFound: no worker ever ran there.
        SpecInvalid: no such state.
    """
    if state not in NODE_STATES:
        raise SpecInvalid(f"no node state {state!r}; allowed: {', '.join(NODE_STATES)}")
    node = session.get(Node, node_id, with_for_update=True)
    if node is None:
        raise NotFound(f"no node {node_id}")
    node.state, node.note, node.updated_at = state, note, now
    if state == ACTIVE:
        node.blamed = 0
    return node


def blame(session: Session, node_id: str, *, now: datetime) -> bool:
    """Note that a chunk which failed here succeeded elsewhere; return whether that excludes it."""
    node = session.get(Node, node_id, with_for_update=True)
    if node is None:
        return False
    node.blamed += 1
    if node.blamed < BLAME_LIMIT or node.state != ACTIVE:
        return False
    note = f"{node.blamed} chunks in a row failed here and succeeded elsewhere"
    set_node_state(session, node_id, EXCLUDED, note=note, now=now)
    return True


def to_readmit(session: Session, *, now: datetime) -> Sequence[str]:
    """Return the nodes that have been excluded for long enough."""
    long_ago = (Node.state == EXCLUDED, Node.updated_at < now - EXCLUDED_FOR)
    return session.scalars(select(Node.id).where(*long_ago).order_by(Node.id)).all()


def readmit(session: Session, node_id: str, *, now: datetime) -> bool:
    """Use an excluded node again, on probation; return whether it was still excluded."""
    node = session.get_one(Node, node_id, with_for_update=True)
    if node.state != EXCLUDED:
        return False
    node.state, node.updated_at = ACTIVE, now
    node.note, node.blamed = "was excluded; on probation", BLAME_LIMIT - 1
    return True


def absolve(session: Session, node_id: str) -> None:
    """Forget the blame of a node: a chunk succeeded there."""
    blamed = select(Node).where(Node.id == node_id, Node.blamed > 0).with_for_update()
    node = session.scalar(blamed)
    if node is not None:
        node.blamed = 0
        node.note = node.note if node.state != ACTIVE else None
