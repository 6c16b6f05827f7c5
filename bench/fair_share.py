"""Three projects share two workers by their weights; a burst of one delays another by one chunk.

Shares: projects of weight 1, 1 and 2 submit 400, 150 and 800 fits, those of the second several
times as long. All are submitted before the first worker starts, and more than can be done is asked
of each, so that every project waits all the time. What counts is the device time of the chunks that
ended within the window, from SQL. A start counts ten seconds at once (the entry penalty), which
may keep a project some seconds behind for good: the window is long enough for that to be little.

Burst: while 1,000 fits of one project are being worked off, another project submits a single job
now and then. Counted are the chunks of the burst that any worker started after the single job was
committed, so that it could be seen, and before it started. PostgreSQL notes the commits.
"""

import contextlib
import random
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, func, literal_column, select, text

from bench._load import Member, ended_well, member, percentile, write_pairs
from bench._report import Figure, options, print_table, verdict
from client import Stillroom
from core.db.models import Chunk, Event, Job
from core.db.session import make_engine, reading
from core.jobs.states import READY_CHUNK, ChunkState
from scripts.team import Options, Team

DEVIATION, DELAY = 0.05, 1
WORKERS = 2
SMALL, BIG = (500, 32), (4_000, 64)
"""Rows and dimensions of pairs: a fit of the big ones takes several times as long."""


@dataclass(frozen=True)
class Party:
    """A project of the first part: what it may have, and what it asks for."""

    name: str
    weight: float
    jobs: int
    shape: tuple[int, int]


PARTIES = (Party("a", 1, 400, SMALL), Party("b", 1, 150, BIG), Party("c", 2, 800, SMALL))


@dataclass(frozen=True)
class Got:
    """What a project had of the pool."""

    party: Party
    chunks: int
    device_s: float
    waiting: int
    """Chunks that were still ready to run at the end."""


def fit(pairs: str, seed: int) -> dict[str, Any]:
    """Return a fit's spec: nine chunks, no two alike, nothing of it cached."""
    clustering = {"method": "kmeans", "max_clusters": 16}
    return {"kind": "fit_federated", "pairs": pairs, "clustering": clustering, "seed": seed}


def submit_all(url: str, who: Member, folder: Path, shape: tuple[int, int], jobs: int) -> None:
    """Upload a project's pairs and submit its jobs."""
    with Stillroom(url, api_key=who.key) as client:
        rows, dim = shape
        path = write_pairs(folder / f"{who.project}.npz", rows=rows, dim=dim, seed=rows)
        pairs = client.upload(path)["sha256"]
        for seed in range(jobs):
            client.submit(fit(pairs, seed))


def shares(folder: Path, *, scale: float, window_s: float) -> list[Got]:
    """Submit everything, start the workers, and return what each project got in the window."""
    with contextlib.ExitStack() as stack:
        team = stack.enter_context(Team(Options(workers=0, apis=2)))
        engine = make_engine(team.database_url)
        stack.callback(engine.dispose)
        ids = {}
        threads = []
        for index, party in enumerate(PARTIES):
            who = member(team.url, team.api_key, party.name, weight=party.weight)
            url, jobs = team.urls[index % 2], max(1, round(scale * party.jobs))
            work = (url, who, folder, party.shape, jobs)
            threads.append(threading.Thread(target=submit_all, args=work, daemon=True))
            ids[party.name] = who.project
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for _ in range(WORKERS):
            team.start_worker()
        team.wait_workers(WORKERS)
        time.sleep(window_s)
        return _got(engine, ids)


def _got(engine: Engine, ids: Mapping[str, str]) -> list[Got]:
    query = (
        select(
            Job.project_id,
            func.count().filter(Chunk.state == ChunkState.DONE),
            func.coalesce(func.sum(Chunk.seconds).filter(Chunk.state == ChunkState.DONE), 0.0),
            func.count().filter(Chunk.state == READY_CHUNK),
        )
        .join(Chunk, Chunk.job_id == Job.id)
        .group_by(Job.project_id)
    )
    with reading(engine) as session:
        found = {row[0]: row[1:] for row in session.execute(query)}
    return [Got(party, *found[ids[party.name]]) for party in PARTIES]


def show_shares(got: Sequence[Got]) -> float:
    """Print what each project got; return the worst deviation from its share."""
    total, weights = sum(one.device_s for one in got), sum(one.party.weight for one in got)
    rows, worst = [], 0.0
    for one in got:
        part, share = one.device_s / total, one.party.weight / weights
        if not one.waiting:
            raise RuntimeError(f"project {one.party.name} had nothing left to do: submit more")
        worst = max(worst, abs(part / share - 1))
        about = (one.party.name, one.party.weight, one.chunks, one.device_s)
        rows.append((*about, part, share, f"{100 * (part / share - 1):+.1f} %"))
    header = ["project", "weight", "chunks", "device s", "part", "share", "deviation"]
    print_table(header, rows)
    return worst


@dataclass(frozen=True)
class Delay:
    """What stood between a single job and its start."""

    chunks: int
    """Of the burst, started by all workers together."""
    seconds: float
    usual_s: float
    """How long a chunk of the burst lasts."""


def delays(folder: Path, *, burst: int, singles: int, seed: int) -> list[Delay]:
    """Work off a burst; return how long each single job of another project waited."""
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack:
        team = stack.enter_context(Team(Options(workers=WORKERS, apis=2)))
        engine = make_engine(team.database_url)
        stack.callback(engine.dispose)
        _note_commits(team, engine)
        many = member(team.url, team.api_key, "many")
        few = member(team.url, team.api_key, "few")
        submit_all(team.urls[0], many, folder, SMALL, burst)
        client = stack.enter_context(Stillroom(team.urls[1], api_key=few.key))
        found = []
        for number in range(singles):
            time.sleep(rng.uniform(0.2, 1.0))
            job = ended_well(client, client.submit({"kind": "echo", "text": f"single {number}"}))
            found.append(_delay(engine, job["id"], many.project))
        with reading(engine) as session:
            left = select(func.count()).select_from(Job).where(Job.project_id == many.project)
            if not session.scalar(left.where(Job.finished_at.is_(None))):
                raise RuntimeError("the burst was over too soon: submit more")
        return found


def _note_commits(team: Team, engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ALTER SYSTEM SET track_commit_timestamp = on"))
    engine.dispose()
    team.restart_postgres("fast")
    team.wait_workers(WORKERS)


def _delay(engine: Engine, job_id: str, rival: str) -> Delay:
    committed = select(func.pg_xact_commit_timestamp(literal_column("events.xmin"))).where(
        Event.job_id == job_id, Event.type == "job.submitted"
    )
    with reading(engine) as session:
        job = session.get_one(Job, job_id)
        assert job.started_at is not None
        rivals = select(Chunk).join(Job, Job.id == Chunk.job_id).where(Job.project_id == rival)
        between = rivals.where(
            Chunk.started_at > committed.scalar_subquery(), Chunk.started_at < job.started_at
        )
        started = session.scalar(between.with_only_columns(func.count())) or 0
        usual = rivals.where(Chunk.state == ChunkState.DONE).with_only_columns(
            func.avg(Chunk.seconds)
        )
        usual_s = float(session.scalar(usual) or 0)
    waited_s = (job.started_at - job.created_at).total_seconds()
    return Delay(started, waited_s, usual_s)


def main() -> int:
    """Measure both and judge."""
    parser = options(__doc__)
    parser.add_argument("--window-s", type=float, default=240.0, help="of the shares")
    parser.add_argument("--scale", type=float, default=1.0, help="of the jobs submitted")
    parser.add_argument("--burst", type=int, default=1_000, help="jobs")
    parser.add_argument("--singles", type=int, default=20, help="jobs of the other project")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the single jobs")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        worst = show_shares(shares(folder, scale=told.scale, window_s=told.window_s))
        found = delays(folder, burst=told.burst, singles=told.singles, seed=told.seed)
    print_table(
        ["single jobs behind the burst", "median", "worst"],
        [
            ("burst chunks started first", *_middle([one.chunks for one in found])),
            ("wait from the request on, s", *_middle([one.seconds for one in found])),
            ("a burst chunk lasts, s", found[-1].usual_s, ""),
        ],
    )
    delay = max(one.chunks for one in found)
    return verdict(
        "fair_share",
        Figure("deviation from the share", worst, DEVIATION, at_most=True),
        Figure("delay of a single job, chunks", delay, DELAY, at_most=True),
        check=told.check,
    )


def _middle(values: Sequence[float]) -> tuple[float, float]:
    return percentile(values, 0.5), max(values)


if __name__ == "__main__":
    sys.exit(main())
