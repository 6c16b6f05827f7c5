"""What benches of the running service share: data, projects with keys, percentiles, a server."""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np

from client import Stillroom, StillroomError
from client.views import Job
from scripts.processes import Guard, Process, free_port

READY_S = 90.0


def utc_now() -> datetime:
    """Return the present instant, by the clock that the service on this machine reads too."""
    return datetime.now(UTC)  # noqa: TID251 - the edge where the clock comes from


def percentile(values: Sequence[float], part: float) -> float:
    """Return the smallest value that at least ``part`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else math.nan


def write_pairs(path: Path, *, rows: int, dim: int, seed: int) -> Path:
    """Write pairs of unit vectors in 8 groups, each turned by a rotation of its own."""
    rng = np.random.default_rng(seed)
    middles = rng.standard_normal((8, dim))
    of = rng.integers(8, size=rows)
    queries = middles[of] + rng.standard_normal((rows, dim))
    turns = np.linalg.qr(np.eye(dim) + 0.3 * rng.standard_normal((8, dim, dim)))[0]
    targets = 0.1 * rng.standard_normal((rows, dim))
    for group, turn in enumerate(turns):  # a turn for each row would take dim times the memory
        targets[of == group] += queries[of == group] @ turn
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, targets)]
    np.savez(
        path,
        query_embeddings=unit[0].astype(np.float32),
        target_embeddings=unit[1].astype(np.float32),
    )
    return path


def ended_well(client: Stillroom, job: Job) -> Job:
    """Wait for a job; raises RuntimeError where it did not succeed."""
    ended = client.wait(job["id"])
    if ended["state"] != "succeeded":
        raise RuntimeError(f"{ended['kind']} {ended['state']}: {ended['error']}")
    return ended


def ask(url: str, key: str | None, method: str, path: str, body: Any = None) -> Any:
    """Return the JSON answer of one call, for what the client has no method for."""
    headers = {"Accept": "application/json", "Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url + path, data, headers, method=method), timeout=30) as answer:
        return json.load(answer)


@dataclass(frozen=True)
class Member:
    """A project and a key to it."""

    project: str
    key: str


def member(url: str, operator: str, name: str, *, weight: float = 1.0) -> Member:
    """Make a project with a key that may read and submit."""
    made = ask(url, operator, "POST", "/v1/projects", {"name": name, "weight": weight})["id"]
    key = ask(url, operator, "POST", "/v1/keys", {"project": made, "name": "bench"})["key"]
    return Member(made, key)


def cpu_seconds(*roots: int) -> float:
    """Return the CPU time so far of some processes and of all their descendants."""
    parents, spent = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            parents[pid] = int(fields[1])
            spent[pid] = sum(map(int, fields[11:15]))  # its own, and of children that ended
    wanted = set(roots)
    while found := {pid for pid, parent in parents.items() if parent in wanted} - wanted:
        wanted |= found
    return sum(spent.get(pid, 0) for pid in wanted) / os.sysconf("SC_CLK_TCK")


@contextmanager
def embedded(folder: Path) -> Iterator[tuple[str, int]]:
    """Run ``python -m api`` on a data folder, its one worker on one thread.

    Yields its address and its process number.
    """
    guard, port = Guard(), free_port()
    inherited = dict(os.environ)  # noqa: TID251 - handed on, nothing is read from it
    env = {name: value for name, value in inherited.items() if not name.startswith("STILL_")}
    env |= {"STILL_DATA_DIR": str(folder), "STILL_PORT": str(port)}
    env |= {"STILL_DEVICES": '["cpu"]', "STILL_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-P", "-m", "api"]
    log = folder.with_name(f"{folder.name}.log")
    url = f"http://127.0.0.1:{port}"
    try:
        server = Process("api", command, env=env, log=log, guard=guard).start()
        server.wait_until(lambda: _ready(url), limit_s=READY_S)
        yield url, server.pid
        server.stop()
    finally:
        guard.close()


def _ready(url: str) -> bool:
    with Stillroom(url) as client, suppress(StillroomError):
        client.ready()
        return True
    return False
