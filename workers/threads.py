"""How many CPU threads a worker computes with: bytes depend on it, so all CPU workers agree."""

import math
import os
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from core.db.models import ServiceFact
from core.db.session import insert_new

FACT = "cpu_threads"
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class ThreadsRefused(RuntimeError):
    """This worker would compute other bytes than the others."""


def bind(session: Session, *, asked: int | None, cores: int, free: Callable[[], bool]) -> int:
    """Return the number of threads for a CPU worker; the first one decides for all.

    Args:
        session: A transaction that writes: the number stands locked until it ends.
        asked: What the operator says; None: what is bound, else ``cores``.
        cores: What this machine has.
        free: Whether the operator's word may change what is bound; asked under the lock.

    Raises:
        ThreadsRefused: another number is bound, and others compute with it.
    """
    value = {"key": FACT, "value": str(asked or cores)}
    if insert_new(session, ServiceFact, value):
        return asked or cores
    fact = session.scalars(
        select(ServiceFact).where(ServiceFact.key == FACT).with_for_update()
    ).one()
    bound = int(fact.value)
    if asked is None or asked == bound:
        return bound
    if not free():
        raise ThreadsRefused(
            f"STILL_THREADS={asked}, but the CPU workers of this service compute with {bound} "
            "threads each, and results depend on it: unset it, or stop those workers first"
        )
    fact.value = str(asked)
    return asked


def apply(threads: int, env: MutableMapping[str, str]) -> None:
    """Set the variables that numpy and torch read when they are loaded: before that."""
    env.update(dict.fromkeys(POOLS, str(threads)))
    # Not fewer where the machine has fewer cores: that would change bytes.
    env.update(OMP_DYNAMIC="FALSE", MKL_DYNAMIC="FALSE")
    # Threads that spin while they wait make every process on a busy machine many times slower.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: its affinity, and its control group's share."""
    quotas = (_quota(group) for group in groups(root, "cpu"))
    return max(1, min(len(os.sched_getaffinity(0)), *quotas, 1 << 20))


def _quota(group: Path) -> int:
    """Return the cores a control group grants, rounded up; a huge number where it sets no limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text()
        return math.ceil(int(quota) / int(period)) if int(quota) > 0 else 1 << 20
    except (OSError, ValueError):
        return 1 << 20


def groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and of those above it, v1 or v2."""
    base = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        top = base / controller if names else base
        inner = path.strip("/")
        yield from (top / above for above in (inner, *map(str, Path(inner).parents)) if above)
        yield top
