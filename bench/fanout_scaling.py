"""Two workers against one on the fanned stage of a job: target blocks that do not know each other.

One team of two workers on one thread each; in the turns of one worker the other is drained. Each
turn answers queries of its own, so none finds another's blocks; a small job first makes both warm
(libraries loaded, teacher built). Time counts from the first start to the last end of the stage's
chunks, from SQL. The floor is the same computation in plain processes, two at once against one:
what the machine itself gives to a second process that shares its caches and memory; it takes its
turn in every round, while the team is idle, since a host's mood changes within a minute. A turn has
so many chunks that the last one, for which the other worker has nothing to do, weighs little. On a
virtual machine the host takes time from two busy cores that it leaves to one: that is printed too.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from sqlalchemy import Engine, func, select

from bench._load import ask, ended_well, write_pairs
from bench._report import Figure, options, print_table, verdict
from client import Stillroom
from core.db.models import Chunk, Job
from core.db.session import make_engine, reading
from core.kinds._teacher import CLUSTERS_PER_BLOCK
from scripts.team import Options, Team
from workers import allocator

BAR = 1.8
DIM, ROWS, CLUSTERS = 128, 3_000, 64
ROWS_PER_CHUNK = 2_048
TEACHER: Mapping[str, Any] = {
    # Every query blends every cluster, in double precision: a second of work from few bytes.
    "name": "rotational",
    "top_k": 512,
    "temperature": 10.0,
    "dtype": "float64",
    "tolerance": 1e-13,
}


@dataclass(frozen=True)
class Turn:
    """One run of the stage."""

    wall_s: float
    busy_s: float
    """Device time of its chunks."""
    workers: int
    """That took part."""
    job_s: float
    """Of the whole job, from its first start to its end."""
    stolen_s: float = 0.0
    """Of both cores, while it was answered: what the host gave to others."""


def model(client: Stillroom, folder: Path) -> str:
    """Fit the teacher's model; return its hash."""
    path = write_pairs(folder / "model.npz", rows=ROWS, dim=DIM, seed=0)
    clustering = {"method": "kmeans", "max_clusters": CLUSTERS, "min_cluster_size": 1}
    asked = {"kind": "fit_federated", "pairs": client.upload(path)["sha256"]}
    chosen = {"clustering": clustering, "strength": 4.0, "temperature": 0.1}
    fit = ended_well(client, client.submit({**asked, **chosen}))
    return str(fit["artifacts"]["model"])


def stolen() -> float:
    """Return the seconds so far that cores of this machine were ready and the host let wait."""
    ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[8]
    return int(ticks) / os.sysconf("SC_CLK_TCK")


def answer(client: Stillroom, folder: Path, made: str, *, chunks: int, seed: int) -> str:
    """Have the teacher answer fresh queries; return the job's id."""
    path = folder / f"queries-{seed}.npz"
    pairs = client.upload(write_pairs(path, rows=chunks * ROWS_PER_CHUNK, dim=DIM, seed=seed))
    path.unlink()
    spec = {"kind": "cache_targets", "model": made, "pairs": pairs["sha256"]}
    job = client.submit({**spec, "teacher": TEACHER, "rows_per_chunk": ROWS_PER_CHUNK})
    return str(ended_well(client, job)["id"])


def turn_of(engine: Engine, job_id: str) -> Turn:
    """Read one run of the stage out of SQL."""
    query = select(
        func.min(Chunk.started_at),
        func.max(Chunk.finished_at),
        func.sum(Chunk.seconds),
        func.count(Chunk.owner.distinct()),
    ).where(Chunk.job_id == job_id, Chunk.stage == "targets")
    with reading(engine) as session:
        start, end, busy, workers = session.execute(query).one()
        job = session.get_one(Job, job_id)
        hits = job.cache_hits
    if start is None or end is None or hits > CLUSTERS // CLUSTERS_PER_BLOCK:
        raise RuntimeError("targets came from the cache: take another --seed")
    assert job.started_at is not None
    assert job.finished_at is not None
    whole_s = (job.finished_at - job.started_at).total_seconds()
    return Turn((end - start).total_seconds(), float(busy), workers, whole_s)


@dataclass(frozen=True)
class Round:
    """Each of the four measured once."""

    alone: Turn
    both: Turn
    floor: float
    """How many times the work of one process two do."""

    @property
    def ratio(self) -> float:
        """The figure."""
        return self.alone.wall_s / self.both.wall_s

    def row(self, number: int) -> Sequence[object]:
        """Return it as shown."""
        alone, both = self.alone, self.both
        busy = both.busy_s / both.wall_s
        shown = [number, alone.wall_s, both.wall_s, self.ratio, alone.job_s / both.job_s]
        return [*shown, busy, both.stolen_s, self.floor]


HEADER = ["round", "1 worker, s", "2 workers, s", "ratio", "ratio of the whole job", "busy of 2"]
HEADER += ["stolen of 2, s", "plain processes"]


def measured(folder: Path, *, rounds: int, chunks: int, seed: int) -> Iterator[Round]:
    """Yield rounds, each of one worker, of two, and of plain processes."""
    with contextlib.ExitStack() as stack:
        team = stack.enter_context(Team(Options(workers=2)))
        engine = make_engine(team.database_url)
        stack.callback(engine.dispose)
        client = stack.enter_context(team.client())
        made = model(client, folder)
        answer(client, folder, made, chunks=6, seed=seed)
        for first in range(seed + 1, seed + 1 + 2 * rounds, 2):
            node = "/v1/pool/nodes/worker-2:cpu"
            ask(team.url, team.api_key, "POST", f"{node}/drain")
            alone = turn_of(engine, answer(client, folder, made, chunks=chunks, seed=first))
            before = stolen()
            ask(team.url, team.api_key, "POST", f"{node}/resume")
            both = turn_of(engine, answer(client, folder, made, chunks=chunks, seed=first + 1))
            both = replace(both, stolen_s=stolen() - before)
            if (alone.workers, both.workers) != (1, 2):
                raise RuntimeError(f"{alone.workers} and {both.workers} workers took part")
            share = max(1, chunks // 4)
            yield Round(alone, both, plain(1, 2 * share) / plain(2, share))


def compute(repeats: int) -> float:
    """Do what a chunk computes, some times over, warm; return the seconds."""
    allocator.keep_freed()  # as a worker does
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    from core.distill.fitting import fit  # noqa: PLC0415
    from core.distill.teachers.rotational import RotationalTeacher  # noqa: PLC0415
    from core.specs.clusterings import KMeans  # noqa: PLC0415
    from core.specs.teachers import Rotational  # noqa: PLC0415
    from core.tensors.formats import Pairs  # noqa: PLC0415

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        path = write_pairs(Path(name) / "pairs.npz", rows=ROWS, dim=DIM, seed=0)
        data = dict(np.load(path))
    queries, targets = data["query_embeddings"], data["target_embeddings"]
    pairs = Pairs([str(row) for row in range(ROWS)], queries, targets)
    clustering = KMeans(max_clusters=CLUSTERS, min_cluster_size=1)
    found = fit(pairs, clustering, seed=0, strength=4.0, temperature=0.1)
    teacher = RotationalTeacher(found, Rotational.model_validate(TEACHER))
    batch = np.resize(queries, (1_024, DIM))
    teacher.targets(batch)
    print("ready", flush=True)
    sys.stdin.readline()
    start = perf_counter()
    for _ in range(repeats):
        teacher.targets(batch)
    return perf_counter() - start


def plain(processes: int, repeats: int) -> float:
    """Return the seconds of the slowest of some processes that compute at the same time."""
    command = [sys.executable, "-m", "bench.fanout_scaling", "--compute", str(repeats)]
    with contextlib.ExitStack() as stack:
        running = []
        for _ in range(processes):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.kill)
            running.append(process)
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return max(float(process.communicate()[0]) for process in running)


def main() -> int:
    """Measure in turns and judge the median."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--chunks", type=int, default=24, help="of the fanned stage")
    parser.add_argument("--seed", type=int, default=0, help="of the queries")
    parser.add_argument("--compute", type=int, help="internal: the plain computation alone")
    told = parser.parse_args()
    if told.compute is not None:
        print(compute(told.compute))
        return 0
    found = []
    with tempfile.TemporaryDirectory() as name:
        for one in measured(Path(name), rounds=told.rounds, chunks=told.chunks, seed=told.seed):
            found.append(one)
            print(f"{len(found)} of {told.rounds}: {one.ratio:.3f}", file=sys.stderr, flush=True)
    print_table(HEADER, [one.row(number) for number, one in enumerate(found, 1)])
    ratio = median(one.ratio for one in found)
    floor = median(one.floor for one in found)
    print(f"the machine gives two plain processes {floor:.2f} times the work of one")
    return verdict("fanout_scaling", Figure("2 workers / 1", ratio, BAR), check=told.check)


if __name__ == "__main__":
    sys.exit(main())
