"""How soon a job starts on an idle pool, and how fast the service tells how jobs stand.

Starts: echo jobs at random moments, one at a time, from the sending of the request to the start of
the chunk (one machine, one clock), through Redis and through the embedded poll. Lists: pages of 50
out of 100,000 jobs of one project, newest, filtered and far down, on SQLite and on PostgreSQL, each
request timed by the one who asks. Polls: GET /v1/jobs/{id} over kept connections, from a process of
its own whose CPU is told, while the server has the two cores that it shares with the database.
"""

import contextlib
import http.client
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from sqlalchemy import Engine

from bench._crowd import Crowd, fill
from bench._load import cpu_seconds, embedded, percentile, utc_now
from bench._polls import Order, ask_all
from bench._report import Figure, options, print_table, verdict
from client import Stillroom
from core.db.models import Job
from core.db.session import make_engine, reading, upgrade
from scripts.team import Options, Team

REDIS_S, EMBEDDED_S, LIST_S, POLLS = 0.1, 1.0, 0.05, 500.0
OTHERS = 4
BASES = ("SQLite", "PostgreSQL")
LIMIT_S = 30.0


@dataclass(frozen=True)
class Start:
    """One job on an idle pool."""

    accepted_s: float
    """From the instant that the service noted to the start of the chunk."""
    sent_s: float
    """From the sending of the request to the start of the chunk."""


def starts(url: str, key: str | None, engine: Engine, *, jobs: int, seed: int) -> list[Start]:
    """Submit jobs at random moments, each on an idle pool."""
    rng = random.Random(seed)
    found = []
    with Stillroom(url, api_key=key) as client:
        for number in range(-5, jobs):  # the first ones open connections
            time.sleep(rng.uniform(0.05, 0.5))
            sent_at = utc_now()
            job = _over(engine, client.submit({"kind": "echo", "text": "hi"})["id"])
            assert job.started_at is not None
            accepted = (job.started_at - job.created_at).total_seconds()
            sent = (job.started_at - sent_at).total_seconds()
            found += [Start(accepted, sent)] if number >= 0 else []
    return found


def idle_pools(folder: Path, *, jobs: int, seed: int) -> dict[str, list[Start]]:
    """Measure starts on two workers behind Redis, then on an embedded one."""
    with Team(Options(workers=2)) as team:
        engine = make_engine(team.database_url)
        redis = starts(team.url, team.api_key, engine, jobs=jobs, seed=seed)
        engine.dispose()
    with embedded(folder / "idle") as (url, _):
        engine = make_engine(f"sqlite:///{folder / 'idle' / 'stillroom.db'}")
        polled = starts(url, None, engine, jobs=jobs, seed=seed)
        engine.dispose()
    return {"Redis": redis, "embedded": polled}


def _over(engine: Engine, job_id: str) -> Job:
    """Look into SQL, not at the API, until the job is over: nothing else is asked of the server."""
    until = time.monotonic() + LIMIT_S
    while True:
        with reading(engine) as session:
            job = session.get_one(Job, job_id)
        if job.finished_at is not None:
            return job
        if time.monotonic() > until:
            raise TimeoutError(f"{job_id} was not over within {LIMIT_S:g} s")
        time.sleep(0.01)


def show_starts(found: Mapping[str, Sequence[Start]]) -> dict[str, float]:
    """Print the distributions; return the 95th percentile from the sending on."""
    rows = []
    for name, all_of in found.items():
        for what in ("accepted_s", "sent_s"):
            values = [1e3 * getattr(one, what) for one in all_of]
            spread = [percentile(values, part) for part in (0.5, 0.95, 1.0)]
            rows.append((f"{name}, {what.removesuffix('_s')} to start", *spread))
    print_table(["start on an idle pool", "median, ms", "p95, ms", "worst, ms"], rows)
    return {
        name: percentile([one.sent_s for one in all_of], 0.95) for name, all_of in found.items()
    }


@dataclass(frozen=True)
class Served:
    """A service over a crowd of jobs."""

    name: str
    urls: Sequence[str]
    key: str | None
    crowd: Crowd
    servers: Sequence[int]
    """Process numbers."""
    database: Sequence[int]
    """Its process number, where it has one of its own."""


@contextlib.contextmanager
def on_sqlite(folder: Path, *, jobs: int, queued: int) -> Iterator[Served]:
    """Fill a SQLite database and serve it."""
    data = folder / "crowd"
    engine = make_engine(f"sqlite:///{data / 'stillroom.db'}")
    upgrade(engine)
    crowd = fill(engine, jobs=jobs, others=OTHERS, queued=queued, now=utc_now(), seed=0)
    engine.dispose()
    with embedded(data) as (url, pid):
        yield Served(BASES[0], [url], None, crowd, [pid], [])


@contextlib.contextmanager
def on_postgres(*, jobs: int, queued: int) -> Iterator[Served]:
    """Serve PostgreSQL by two processes, and fill it."""
    with Team(Options(workers=0, apis=2)) as team:
        engine = make_engine(team.database_url)
        crowd = fill(engine, jobs=jobs, others=OTHERS, queued=queued, now=utc_now(), seed=0)
        engine.dispose()
        pids = [team.processes[name].pid for name in team.names("api")]
        base = [team.processes["postgres"].pid]
        yield Served(BASES[1], team.urls, team.api_key, crowd, pids, base)


class Pages:
    """A kept connection to the list of jobs."""

    def __init__(self, served: Served) -> None:
        parts = urlsplit(served.urls[0])
        self._http = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=30)
        self._headers = {} if served.key is None else {"Authorization": f"Bearer {served.key}"}

    def get(self, query: str) -> tuple[float, Any]:
        """Return the seconds until the whole page was here, and the page."""
        start = time.perf_counter()
        self._http.request("GET", f"/v1/jobs?{query}", headers=self._headers)
        answer = self._http.getresponse()
        body = answer.read()
        seconds = time.perf_counter() - start
        if answer.status != 200:
            raise RuntimeError(f"{query}: {answer.status} {body[:300]!r}")
        return seconds, json.loads(body)

    def cursors(self) -> list[str]:
        """Walk through all jobs; return the cursor after each page of 200."""
        found: list[str] = []
        following = self.get("limit=200")[1]["next_cursor"]
        while following is not None:
            found.append(following)
            following = self.get(f"limit=200&cursor={quote(following)}")[1]["next_cursor"]
        return found


def lists(served: Served, *, each: int) -> list[tuple[str, str, float, float]]:
    """Time pages of 50; return database, page, median and 95th percentile in ms."""
    pages = Pages(served)
    crowd, cursors = served.crowd, pages.cursors()
    deep = [quote(cursor) for cursor in cursors[len(cursors) // 2 :]]
    [one] = random.Random(0).sample(crowd.runs, 1)
    named = [quote(name) for name in crowd.names[:: max(1, len(crowd.names) // 9)]]
    queries = {
        "newest": [""],
        "state=succeeded": ["&state=succeeded"],
        "state=failed": ["&state=failed"],
        "state=queued": ["&state=queued"],
        "state=running": ["&state=running"],
        "kind=distill": ["&kind=distill"],
        "kind=distill, state=failed": ["&kind=distill&state=failed"],
        "state=paused: none": ["&state=paused"],
        "kind=echo, state=paused: none": ["&kind=echo&state=paused"],
        "label, of no job": ["&label=run:none"],
        "label, one in four": ["&label=team:ads"],
        "label, of one job": [f"&label=run:{one}"],
        "name, of one job": [f"&name={name}" for name in named],
        "deep cursor": [f"&cursor={cursor}" for cursor in deep],
        "deep cursor, state=failed": [f"&state=failed&cursor={cursor}" for cursor in deep],
        "deep cursor, kind=distill": [f"&kind=distill&cursor={cursor}" for cursor in deep],
    }
    rows = []
    for name, asked in queries.items():
        rng = random.Random(name)
        times = [1e3 * pages.get(f"limit=50{rng.choice(asked)}")[0] for _ in range(each)]
        rows.append((served.name, name, percentile(times, 0.5), percentile(times, 0.95)))
    return rows


def polls(served: Served, *, seconds: float) -> list[tuple[Any, ...]]:
    """Poll jobs in several states by one server process and by all; return rows for the table."""
    crowd = served.crowd
    mixed = [*crowd.running, *crowd.succeeded[: 4 * len(crowd.running)], *crowd.queued[:2]]
    random.Random(0).shuffle(mixed)
    states = {"over": crowd.succeeded[:500], "running": crowd.running, "queued": crowd.queued[:8]}
    rows = []
    for urls in sorted({tuple(served.urls[:1]), tuple(served.urls)}, key=len):
        for name, ids in {**states, "mixed": mixed}.items():
            paths = [f"/v1/jobs/{job_id}" for job_id in ids]
            groups = (served.servers, served.database)
            before = [cpu_seconds(*pids) for pids in groups]
            found = ask_all(Order(urls, served.key, paths, seconds))
            if found.bad:
                raise RuntimeError(f"{found.bad} of {found.polls} polls were not answered with 200")
            spent = [cpu_seconds(*pids) - was for pids, was in zip(groups, before, strict=True)]
            each = [1e3 * cpu_s / found.asked for cpu_s in (*spent, found.cpu_s)]
            rows.append((served.name, len(urls), name, found.per_s, 1e3 * found.p95_s, *each))
    return rows


def main() -> int:
    """Measure all four and judge."""
    parser = options(__doc__)
    parser.add_argument("--starts", type=int, default=200, help="jobs on the idle pool")
    parser.add_argument("--jobs", type=int, default=100_000, help="of the project that is listed")
    parser.add_argument("--queued", type=int, default=200, help="of these")
    parser.add_argument("--pages", type=int, default=100, help="requests for each sort of page")
    parser.add_argument("--poll-s", type=float, default=5.0, help="of each sort of poll")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    told = parser.parse_args()
    listed, polled = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        late = show_starts(idle_pools(folder, jobs=told.starts, seed=told.seed))
        for service in (
            on_sqlite(folder, jobs=told.jobs, queued=told.queued),
            on_postgres(jobs=told.jobs, queued=told.queued),
        ):
            with service as served:
                listed += lists(served, each=told.pages)
                polled += polls(served, seconds=told.poll_s)
    print_table(["database", "50 of the jobs", "median, ms", "p95, ms"], listed)
    costs = ["server", "database", "who asks"]
    print_table(["database", "servers", "jobs", "polls/s", "p95, ms", *costs], polled)
    print("server, database, who asks: CPU of one poll, ms")
    # Of queued jobs each poll foretells the start anew; that is printed, and not what most ask.
    team = [r for r in polled if (r[0], r[1]) == ("PostgreSQL", 2) and r[2] != "queued"]
    slowest = min(row[3] for row in team)
    slow = {name: max(row[3] for row in listed if row[0] == name) / 1e3 for name in BASES}
    return verdict(
        "dispatch_latency",
        Figure("Redis: start p95, s", late["Redis"], REDIS_S, at_most=True),
        Figure("embedded: start p95, s", late["embedded"], EMBEDDED_S, at_most=True),
        *(Figure(f"{name}: list p95, s", slow[name], LIST_S, at_most=True) for name in BASES),
        Figure("polls/s of a team, the slowest sort", slowest, POLLS),
        check=told.check,
    )


if __name__ == "__main__":
    sys.exit(main())
