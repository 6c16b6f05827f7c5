"""A worker dies in the middle of a long chunk: how soon that is noticed, and the work resumed.

Two workers, the product's own lease. One distillation runs undisturbed; then, again and again with
the same spec, the worker that holds a chunk is killed once the chunk has made progress, and stays
dead until the other one has begun the chunk anew. The files must be the same bytes.
"""

import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select

from bench._load import ended_well, utc_now, write_pairs
from bench._report import Figure, options, print_table, verdict
from client import Stillroom
from core.db.models import Chunk
from core.db.session import make_engine, reading
from core.jobs.states import RUNNING_CHUNK, ChunkState
from scripts.team import Options, Team

NOTICED_S, RESUMED_S, REDONE = 30.0, 45.0, 1
CHUNK_S = 6.0
"""So long a chunk lasts, about: the heartbeat tells its progress every second."""
CHUNKS = 3
LIMIT_S = 180.0
"""For each thing that is waited for."""


@dataclass(frozen=True)
class Round:
    """What one death cost."""

    noticed_s: float
    """Until the pool no longer counted the worker."""
    taken_back_s: float
    """Until the lease had run out and the chunk was ready again, or claimed anew."""
    resumed_s: float
    """Until another worker had begun the chunk again."""
    redone: int
    same: bool
    """Whether every file has the bytes of the undisturbed run."""


@dataclass(frozen=True)
class Held:
    """A running chunk, as SQL shows it."""

    chunk_id: int
    attempt: int
    owner: str
    progress: float


def calm(client: Stillroom, folder: Path) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Prepare a model and its targets, size the chunks, and run the job undisturbed."""
    pairs = client.upload(write_pairs(folder / "pairs.npz", rows=4_000, dim=64, seed=0))["sha256"]
    clustering = {"method": "kmeans", "max_clusters": 16}
    asked = {"kind": "fit_federated", "pairs": pairs, "clustering": clustering}
    fit = client.submit({**asked, "strength": 4.0, "temperature": 0.1})
    cache = client.submit({"kind": "cache_targets", "model": f"{fit['id']}/model"})
    model = ended_well(client, fit)["artifacts"]["model"]
    targets = ended_well(client, cache)["artifacts"]["targets"]
    spec: dict[str, Any] = {"kind": "distill", "model": model, "targets": targets}
    for epochs in (1, 8):  # the first one loads the libraries
        tried = client.submit({**spec, "training": {"epochs": epochs, "epochs_per_chunk": epochs}})
        seconds = ended_well(client, tried)["device_seconds"]
    per_chunk = max(1, math.ceil(CHUNK_S / (seconds / 8)))
    training = {"epochs": CHUNKS * per_chunk, "epochs_per_chunk": per_chunk}
    spec |= {"training": training, "seed": 1}
    return spec, ended_well(client, client.submit(spec))["artifacts"]


def one_death(
    team: Team,
    client: Stillroom,
    engine: Engine,
    spec: Mapping[str, Any],
    wanted: Mapping[str, str],
) -> Round:
    """Kill the worker that holds a chunk of the job, and measure."""
    job = client.submit(spec)
    held = _until(lambda: _in_the_middle(engine, job["id"]))
    name = next(n for n in team.names("worker") if team.processes[n].pid == _pid(held.owner))
    killed_at = utc_now()
    team.kill(name)
    times: dict[str, float] = {}

    def look() -> Chunk | None:
        gone_s = (utc_now() - killed_at).total_seconds()
        alive = {worker["id"] for worker in client.ready()["workers"] if worker["alive"]}
        if held.owner not in alive:
            times.setdefault("noticed", gone_s)
        with reading(engine) as session:
            chunk = session.get_one(Chunk, held.chunk_id)
        if chunk.state != ChunkState.RUNNING or chunk.owner != held.owner:
            times.setdefault("taken back", gone_s)
        anew = chunk.attempt > held.attempt and chunk.owner != held.owner
        return chunk if anew and "noticed" in times else None

    begun = _until(look)
    ended = ended_well(client, job)
    team.processes[name].start()
    team.wait_workers(len(team.names("worker")))
    return Round(
        noticed_s=times["noticed"],
        taken_back_s=times["taken back"],
        resumed_s=_seconds_since(killed_at, begun.started_at),
        redone=_redone(engine, job["id"]),
        same=ended["artifacts"] == wanted,
    )


def _until(look: Callable[[], Any]) -> Any:
    until = time.monotonic() + LIMIT_S
    while (found := look()) is None:
        if time.monotonic() > until:
            raise TimeoutError(f"it did not come true within {LIMIT_S:g} s")
        time.sleep(0.05)
    return found


def _in_the_middle(engine: Engine, job_id: str) -> Held | None:
    """Return the job's running chunk once it is past a third, and not the first of its chain."""
    query = select(Chunk).where(
        Chunk.job_id == job_id, Chunk.state == RUNNING_CHUNK, Chunk.stage == "train"
    )
    with reading(engine) as session:
        chunk = session.scalar(query)
    if chunk is None or chunk.owner is None or chunk.index < 1:
        return None
    if not 1 / 3 <= chunk.progress < 0.9:
        return None
    return Held(chunk.id, chunk.attempt, chunk.owner, chunk.progress)


def _pid(owner: str) -> int:
    return int(owner.split(":")[2])


def _seconds_since(start: datetime, end: datetime | None) -> float:
    return math.nan if end is None else (end - start).total_seconds()


def _redone(engine: Engine, job_id: str) -> int:
    with reading(engine) as session:
        attempts = session.scalars(select(Chunk.attempt).where(Chunk.job_id == job_id)).all()
    return sum(attempts) - len(attempts)


def main() -> int:
    """Kill several workers, one after another, and judge the worst."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="deaths, each in a job of its own")
    told = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        team = stack.enter_context(Team(Options(workers=2)))
        client = stack.enter_context(team.client())
        engine = make_engine(team.database_url)
        stack.callback(engine.dispose)
        spec, wanted = calm(client, folder)
        rounds = [one_death(team, client, engine, spec, wanted) for _ in range(told.rounds)]
    print_table(
        ["death", "noticed, s", "taken back, s", "resumed, s", "chunks redone", "same bytes"],
        [
            (n, r.noticed_s, r.taken_back_s, r.resumed_s, r.redone, r.same)
            for n, r in enumerate(rounds, 1)
        ],
    )
    return verdict(
        "dead_worker",
        Figure("noticed after, s", max(r.noticed_s for r in rounds), NOTICED_S, at_most=True),
        Figure("resumed after, s", max(r.resumed_s for r in rounds), RESUMED_S, at_most=True),
        Figure("chunks redone", max(r.redone for r in rounds), REDONE, at_most=True),
        Figure("runs of other bytes", sum(not r.same for r in rounds), 0, at_most=True),
        check=told.check,
    )


if __name__ == "__main__":
    sys.exit(main())
