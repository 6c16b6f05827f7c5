"""Nothing is lost and nothing is applied twice, whatever is killed: the team under a hail of blows.

Many small echo jobs are submitted over HTTP, each under an idempotency key, while workers and APIs
are killed with SIGKILL, workers are frozen until their chunk was given to another and then go on,
Redis is emptied and PostgreSQL is restarted. Then rows, the ledger of device time and stored bytes
are checked against what was submitted.

Leases are short (2 s) so that a lost chunk comes back soon, a chunk may be hit often (worker_lost
100 times, where the product gives up after 5: the kills are random and of the same few chunks), and
it may be tried again at once on the node where it failed. All else is as the product has it.
"""

import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import DBAPIError

from bench._audit import Findings, audit
from bench._blows import Blow, Striker, plan_blows
from bench._feeder import Feeder, Wanted
from bench._report import Figure, options, print_table, verdict
from core.db.models import Job
from core.db.session import make_engine, reading
from scripts.team import Options, Team

SETTINGS = {"STILL_LEASE": "2", "STILL_RETRY_WAIT": "0.1", "STILL_ATTEMPTS": '{"worker_lost": 100}'}
AHEAD = 0.1
"""Part of the work that may be submitted before its blows have fallen."""
LONGEST = 20
"""Chunks of a job at most."""
TELL_S = 10.0
T = TypeVar("T")


class TooLong(RuntimeError):
    """The run did not end within its limit; tells how far it was."""


@dataclass(frozen=True)
class Plan:
    """How much work, and what happens to it."""

    chunks: int = 20_000
    kills: int = 200
    freezes: int = 10
    workers: int = 2
    apis: int = 2
    flushes: int = 2
    database_restarts: int = 2
    seed: int = 0
    limit_s: float = 3_600.0


@dataclass(frozen=True)
class Outcome:
    """What was done, and what was found."""

    jobs: int
    blows: Counter[str]
    hits: int
    """Workers that were killed while SQL said that they held a chunk."""
    revived: int
    """Processes that ended by themselves, an API that started while the database was away."""
    answers: Counter[str]
    """What the submitters' clients were told before they tried again."""
    seconds: float
    findings: Findings

    @property
    def kills(self) -> int:
        """How often SIGKILL was sent to a worker or an API."""
        return self.blows["worker"] + self.blows["api"]

    @property
    def restarts(self) -> int:
        """How often PostgreSQL was restarted, in whatever way."""
        return sum(count for name, count in self.blows.items() if name.startswith("database"))


def wanted(plan: Plan) -> list[Wanted]:
    """Cut the chunks into jobs of 1 to 20; every tenth says what another says too."""
    rng = random.Random(f"{plan.seed} jobs")
    jobs: list[Wanted] = []
    left = plan.chunks
    while left:
        times = min(left, rng.randint(1, LONGEST))
        text = rng.choice(["again", "and again"]) if rng.random() < 0.1 else f"{rng.random():.12f}"
        jobs.append(Wanted(key=f"chaos-{len(jobs)}", text=text, times=times))
        left -= times
    return jobs


def run(plan: Plan, *, tell: Callable[[str], None] = lambda _: None) -> Outcome:
    """Start a team, submit, strike, wait for the last job, and look at what is left.

    Raises:
        TooLong: jobs were still open at the limit.
    """
    jobs = wanted(plan)
    started = Options(apis=plan.apis, workers=plan.workers, settings=SETTINGS)
    with Team(started) as team, contextlib.ExitStack() as stack:
        engine = make_engine(team.database_url)
        stack.callback(engine.dispose)
        blows = plan_blows(
            chunks=plan.chunks,
            kills=plan.kills,
            freezes=plan.freezes,
            flushes=plan.flushes,
            database_restarts=plan.database_restarts,
            seed=plan.seed,
        )
        striker = Striker(team, engine, seed=plan.seed)
        feeder = Feeder(team, jobs, ahead=max(LONGEST, round(AHEAD * plan.chunks)))
        stack.callback(feeder.stop)
        began = time.monotonic()
        feeder.start()
        _strike(plan, blows, striker, feeder, engine, tell)
        _wait(plan, striker, feeder, engine, tell, until=began + plan.limit_s)
        seconds = time.monotonic() - began
        findings = audit(engine, team.folder / "data", feeder.sent)
    return Outcome(
        jobs=len(jobs),
        blows=striker.blows,
        hits=striker.hits,
        revived=striker.revived,
        answers=feeder.answers,
        seconds=seconds,
        findings=findings,
    )


def _strike(
    plan: Plan,
    blows: Sequence[Blow],
    striker: Striker,
    feeder: Feeder,
    engine: Engine,
    tell: Callable[[str], None],
) -> None:
    """Let each blow fall when so many chunks are done; what it needs is submitted before."""
    until = time.monotonic() + plan.limit_s
    progress = _Progress(plan, striker, engine, tell)
    for blow in blows:
        feeder.allow(blow.at_chunk)
        while progress.done() < blow.at_chunk:
            progress.pause(until)
        while not striker.strike(blow):
            progress.pause(until)
    feeder.allow(plan.chunks)


def _wait(
    plan: Plan,
    striker: Striker,
    feeder: Feeder,
    engine: Engine,
    tell: Callable[[str], None],
    *,
    until: float,
) -> None:
    progress = _Progress(plan, striker, engine, tell)
    while not (feeder.finished and progress.open_jobs() == 0):
        progress.pause(until)


class _Progress:
    """Looks at the jobs between blows, starts again what ended, and tells how it goes."""

    def __init__(
        self, plan: Plan, striker: Striker, engine: Engine, tell: Callable[[str], None]
    ) -> None:
        self._plan = plan
        self._striker = striker
        self._engine = engine
        self._tell = tell
        self._told_at = time.monotonic()
        self._done = 0

    def done(self) -> int:
        """Chunks that are done; the last known number while the database is away."""
        found = self._ask(lambda: func.coalesce(func.sum(Job.chunks_over), 0))
        self._done = self._done if found is None else found
        return self._done

    def open_jobs(self) -> int | None:
        """Jobs that are not over; None while the database is away."""
        return self._ask(lambda: func.count().filter(Job.finished_at.is_(None)))

    def pause(self, until: float) -> None:
        """Rest a moment; raises TooLong when it is too late."""
        self._striker.revive()
        now = time.monotonic()
        if now > until:
            raise TooLong(f"not done after {self._plan.limit_s:g} s: {self._line()}")
        if now - self._told_at > TELL_S:
            self._told_at = now
            self._tell(self._line())
        time.sleep(0.05)

    def _line(self) -> str:
        blows = ", ".join(f"{count} {name}" for name, count in self._striker.blows.items() if count)
        return f"{self.done()} of {self._plan.chunks} chunks done; {blows or 'no blow yet'}"

    def _ask(self, what: Callable[[], object]) -> int | None:
        try:
            with reading(self._engine) as session:
                return int(session.scalar(select(what()).select_from(Job)) or 0)  # type: ignore[call-overload]
        except DBAPIError:
            return None


def show(outcome: Outcome) -> None:
    """Print what was done and what was found."""
    found = outcome.findings
    done = [("jobs", outcome.jobs), ("chunks", found.chunks), ("attempts", found.attempts)]
    rows: list[tuple[str, object]] = [
        *done,
        *((f"blows: {name}", count) for name, count in sorted(outcome.blows.items())),
        ("workers killed at a chunk", outcome.hits),
        ("ended by themselves, started again", outcome.revived),
        ("chunks done again", found.attempts - found.chunks),
        *((f"ends of attempts: {name}", count) for name, count in sorted(found.ends.items())),
        *((f"client told: {name}", count) for name, count in sorted(outcome.answers.items())),
        ("wall time, s", outcome.seconds),
        ("chunks per second", found.chunks / outcome.seconds),
    ]
    print_table(["what", "how many"], rows)
    for wrong in found.wrong[:20]:
        print(f"WRONG {wrong}")


def main() -> int:
    """Run it and judge."""
    plan = Plan()
    parser = options(__doc__)
    for name in (
        "chunks",
        "kills",
        "freezes",
        "workers",
        "apis",
        "flushes",
        "database-restarts",
        "seed",
    ):
        value = getattr(plan, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=value, help=f"[default: {value}]")
    parser.add_argument("--limit-s", type=float, default=plan.limit_s, help="give up after so long")
    told = vars(parser.parse_args())
    check = told.pop("check")
    plan = Plan(**told)
    try:
        outcome = run(plan, tell=lambda line: print(line, flush=True))
    except TooLong as error:
        print(f"FAIL chaos: {error}")
        return 1
    show(outcome)
    found = outcome.findings
    return verdict(
        "chaos",
        Figure("lost", found.lost, 0, at_most=True),
        Figure("applied twice", found.twice, 0, at_most=True),
        Figure("other disagreements", len(found.wrong), 0, at_most=True),
        Figure("kills", outcome.kills, plan.kills),
        Figure("workers killed at a chunk", outcome.hits, outcome.blows["worker"] / 2),
        Figure("freezes", outcome.blows["freeze"], plan.freezes),
        Figure("flushes", outcome.blows["flush"], plan.flushes),
        Figure("database restarts", outcome.restarts, plan.database_restarts),
        check=check,
    )


if __name__ == "__main__":
    sys.exit(main())
