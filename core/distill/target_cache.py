"""A teacher's targets for one process and one file: what is there is used, the rest is computed.

No service is needed: this is what a training script calls. A file is known by its content: the
teacher's fingerprint and a digest of every query. Its name and its length say nothing.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from core.distill.teachers._base import RotationTeacher
from core.errors import Conflict, DataInvalid
from core.tensors.caches import (
    DIGEST_BYTES,
    TARGETS,
    Claims,
    check_array,
    check_claims,
    check_targets,
    cut,
    digest_rows,
    replace_file,
    write_npz,
)
from core.tensors.npz import open_npz
from core.tensors.shards import Array, Stream

CHECKPOINT_INTERVAL = 1000
"""Document 000's."""
ROWS_PER_STEP = 1024
"""Targets computed between two reports."""
_TEXT_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 24
_PART = "-{:09d}.npz"


@dataclass(frozen=True)
class Stored:
    """Targets in a file."""

    targets: Array
    """[m, d]."""
    digests: Array
    """[m, 16] uint8, of their queries."""


def cached_targets(
    teacher: RotationTeacher,
    queries: Array,
    *,
    path: Path,
    checkpoint_path: Path | None = None,
    checkpoint_interval: int = CHECKPOINT_INTERVAL,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Array:
    """Return the teacher's targets, from ``path`` where it has them; the rest is computed.

    While it computes, every ``checkpoint_interval`` rows are written to a file of their own beside
    ``checkpoint_path``: ``NAME-000000000.npz``, ``NAME-000001000.npz``, numbered by their first row
    among those that were missing. Each is written beside its place, synced and renamed. Killed at
    any point, the next call with the same interval goes on after the last of them, and ends with
    the same bytes in ``path``; then they are removed.

    Args:
        teacher: who answers; a query that is a training query does not route through itself.
        queries: [n, d] float32.
        path: the .npz, in document 000's layout; see ``core.tensors.caches``. Rows of other queries
            in it are kept, behind those asked for.
        checkpoint_path: null: ``path`` with ``_checkpoint`` behind its stem.
        checkpoint_interval: rows, at least 1.
        report: called with the rows that are there and n.

    Returns:
        [n, d] of the teacher's dtype, on the CPU.

    Raises:
        DataInvalid: a file is damaged, of another teacher, or of other queries altogether.
        Conflict: another process fills the same file.
        ValueError: an interval below 1, or no queries.
    """
    if checkpoint_interval < 1 or not len(queries):
        raise ValueError(
            f"checkpoint_interval {checkpoint_interval} and {len(queries)} queries; needed >= 1"
        )
    beside = checkpoint_path or path.with_name(f"{path.stem}_checkpoint.npz")
    with _locked(path):
        digests = digest_rows(queries)
        known = _load(path, teacher, digests) if path.exists() else None
        places = _places(digests, known)
        missing = np.flatnonzero(places < 0)
        parts = _Parts(beside, teacher, digests[missing])
        if known is not None and not len(missing):
            parts.remove(known.digests)  # killed after the file was written
            report(len(queries), len(queries))
            return known.targets[places]
        computed = _compute(
            teacher,
            queries[missing],
            parts,
            interval=checkpoint_interval,
            report=lambda done: report(len(queries) - len(missing) + done, len(queries)),
        )
        targets = _merge(computed, known, places)
        whole = _with_others(Stored(targets, digests), known, places)
        replace_file(path, lambda file: _write(file, whole, teacher))
        parts.remove(whole.digests)
        return targets


def _places(digests: Array, known: Stored | None) -> Array:
    """Return which row of the file answers each query: [n] int64, -1 for none."""
    rows = {} if known is None else {row.tobytes(): at for at, row in enumerate(known.digests)}
    return np.array([rows.get(row.tobytes(), -1) for row in digests], np.int64)


def _load(path: Path, teacher: RotationTeacher, digests: Array) -> Stored:
    """Read the file that is there; refuse one that none of the queries is in."""
    found = _read(path, teacher)
    if not (_places(digests, found) >= 0).any():
        raise DataInvalid(
            f"{path}: holds targets of {len(found.targets)} other queries and of none of these "
            f"{len(digests)}; name another file, or move this one away"
        )
    return found


def _read(path: Path, teacher: RotationTeacher) -> Stored:
    """Read targets and digests of a file of this teacher."""
    with open_npz(path) as file:
        for name in ("fingerprint", "query_digests"):
            if name not in file.names:
                raise DataInvalid(
                    f"{path}: has no {name}, so nothing tells whose targets they are; check the "
                    "file with the import_cache job, or name another"
                )
        told = check_claims(str(file.array("fingerprint", most_bytes=_TEXT_BYTES)), None)
        if told.fingerprint != teacher.fingerprint():
            raise DataInvalid(
                f"{path}: targets of teacher {(told.fingerprint or '')[:12]}…, not of "
                f"{teacher.fingerprint()[:12]}…: model or settings differ; name another file"
            )
        header = file.header(TARGETS)
        check_array(TARGETS, header.dtype, header.shape)
        rows, d = header.shape
        if d != teacher.anchor.shape[0]:
            raise DataInvalid(f"{path}: targets of width {d}; needed {teacher.anchor.shape[0]}")
        digests = file.array("query_digests", most_bytes=_TEXT_BYTES + rows * DIGEST_BYTES)
        if digests.shape != (rows, DIGEST_BYTES) or digests.dtype != np.uint8:
            raise DataInvalid(f"{path}: query_digests of shape {list(digests.shape)} for {rows}")
        targets = np.empty(header.shape, header.dtype.newbyteorder("="))
        at = 0
        for block in file.blocks(TARGETS, block_bytes=_BLOCK_BYTES):
            targets[at : at + len(block)] = check_targets(block, first=at)
            at += len(block)
    return Stored(targets, digests)


def _write(file: BinaryIO, stored: Stored, teacher: RotationTeacher) -> None:
    targets = stored.targets
    blocks = cut(targets, max(1, _BLOCK_BYTES // targets[0].nbytes))
    settings: dict[str, Any] = {"top_k": teacher.top_k, "temperature": teacher.temperature}
    write_npz(
        file,
        TARGETS,
        Stream(targets.dtype, targets.shape, blocks),
        {"query_digests": stored.digests},
        Claims(teacher.fingerprint(), settings),
    )


class _Parts:
    """The checkpoints: files of some rows each, one behind the other."""

    def __init__(self, path: Path, teacher: RotationTeacher, digests: Array) -> None:
        self._path, self._teacher, self._digests = path, teacher, digests

    def load(self) -> list[Array]:
        """Return the targets saved so far, in order, without a gap."""
        found: list[Array] = []
        done = 0
        while (path := self._name(done)).exists():
            part = _read(path, self._teacher)
            if not np.array_equal(part.digests, self._digests[done : done + len(part.digests)]):
                raise DataInvalid(
                    f"{path}: a checkpoint of other queries; remove it, or name another checkpoint"
                )
            found.append(part.targets)
            done += len(part.targets)
        return found

    def save(self, first: int, targets: Array) -> None:
        """Keep rows first.. for good."""
        stored = Stored(targets, self._digests[first : first + len(targets)])
        replace_file(self._name(first), lambda file: _write(file, stored, self._teacher))

    def remove(self, kept: Array) -> None:
        """Remove the checkpoints whose queries, by their digests, are all in the file now."""
        there = {row.tobytes() for row in kept}
        gone: list[Path] = []
        done = 0
        while (path := self._name(done)).exists():
            with open_npz(path) as file:
                digests = file.array("query_digests", most_bytes=_BLOCK_BYTES)
            if not all(row.tobytes() in there for row in digests):
                break
            gone.append(path)
            done += len(digests)
        for path in reversed(gone):  # killed in between, those before it are still found
            path.unlink()

    def _name(self, first: int) -> Path:
        return self._path.with_name(self._path.stem + _PART.format(first))


def _compute(
    teacher: RotationTeacher,
    queries: Array,
    parts: _Parts,
    *,
    interval: int,
    report: Callable[[int], None],
) -> Array:
    """Return the targets of the missing rows, from checkpoints first."""
    found = parts.load()
    done = sum(map(len, found))
    report(done)
    while done < len(queries):
        stop = min(done + interval, len(queries))
        steps = []
        for first in range(done, stop, ROWS_PER_STEP):
            some = queries[first : min(first + ROWS_PER_STEP, stop)]
            own = torch.from_numpy(teacher.own_rows(some))
            steps.append(teacher.targets(some, exclude_rows=own).cpu().numpy())
            report(first + len(some))
        block = np.concatenate(steps)
        parts.save(done, block)
        found.append(block)
        done = stop
    return np.concatenate(found)


def _merge(computed: Array, known: Stored | None, places: Array) -> Array:
    """Put what was computed and what the file had in the order of the queries."""
    if known is None:
        return computed
    targets: Array = known.targets[places.clip(min=0)].astype(computed.dtype, copy=False)
    targets[places < 0] = computed
    return targets


def _with_others(asked: Stored, known: Stored | None, places: Array) -> Stored:
    """Append the file's rows that nobody asked for: another run may."""
    if known is None:
        return asked
    rest = np.setdiff1d(np.arange(len(known.targets)), places)
    kept = known.targets[rest].astype(asked.targets.dtype, copy=False)
    return Stored(
        np.concatenate([asked.targets, kept]),
        np.concatenate([asked.digests, known.digests[rest]]),
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time fill a file; the lock ends with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(
                f"{path}: another process computes these targets; wait for it"
            ) from error
        yield
