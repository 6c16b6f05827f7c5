"""What a large cache of targets takes in memory: computed, exported, taken in again, one process.

Few clusters and few training queries, for what is measured does not depend on them: they are in the
teacher, and peaks are taken above it. Needs Linux, which tells a process's peak and forgets it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from bench._jobs import Desk, Done, run_job
from bench._report import Figure, options, print_table, verdict
from core.kinds import cache_targets, export_cache, import_cache
from core.kinds._base import Input, Produced
from core.specs.base import JobSpec
from core.tensors import shards
from core.tensors.formats import Federated, save_federated
from core.tensors.shards import Array

GIB = 2**30
PEAK_BAR = 1.5
"""GiB above the teacher; the issue's."""
CLUSTERS, TRAINING = 4, 2000
STEP_ROWS = 8192
A, B, C = "0" * 64, "1" * 64, "2" * 64


def main() -> int:
    """Make the queries, run the three jobs, print; return the exit code."""
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where files go; by default a temporary one")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        return measure(Desk(Path(name)), asked)


def measure(desk: Desk, asked: argparse.Namespace) -> int:
    """Run cache_targets, export_cache and import_cache over the same queries."""
    model = stored_model(desk, asked.dim)
    inputs = {"model": model, "pairs": stored_queries(desk, asked.rows, asked.dim)}
    # The teacher is built, and has answered, before anything is measured.
    warm = {"model": model}
    run_job(desk, cache_targets.Spec(model=A), warm)
    base = now_bytes()
    peaks, seconds = {}, {}
    cached, peaks["compute"], seconds["compute"] = peak_of(
        desk, cache_targets.Spec(model=A, pairs=B), inputs
    )
    targets = desk.as_input(cached.outputs["targets"])
    exported, peaks["export"], seconds["export"] = peak_of(
        desk, export_cache.Spec(targets=C), {"targets": targets}
    )
    file = exported.outputs["targets_npz"]
    _, peaks["import"], seconds["import"] = peak_of(
        desk,
        import_cache.Spec(model=A, pairs=B, targets=C),
        {**inputs, "targets": desk.as_input(file)},
    )
    above = {step: (peak - base) / GIB for step, peak in peaks.items()}
    print_table(
        ["", "seconds", "queries/s", "peak GiB above the teacher"],
        [[s, seconds[s], f"{asked.rows / seconds[s]:.0f}", f"{above[s]:.3f}"] for s in peaks],
    )
    print(
        f"the .npz: {file.path.stat().st_size / GIB:.3f} GiB; the process before: {base / GIB:.3f}"
    )
    return verdict(
        f"target cache, {asked.rows} queries, d = {asked.dim}",
        *(Figure(f"peak GiB, {step}", above[step], PEAK_BAR, at_most=True) for step in above),
        check=asked.check,
    )


def peak_of(desk: Desk, spec: JobSpec, inputs: Mapping[str, Input]) -> tuple[Done, int, float]:
    """Run a job; return what it made, the process's peak meanwhile in bytes, and the seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    began = perf_counter()
    done = run_job(desk, spec, inputs)
    return done, status_bytes("VmHWM"), perf_counter() - began


def now_bytes() -> int:
    """Return the memory the process holds."""
    return status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    """Return a figure of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def stored_model(desk: Desk, dim: int) -> Input:
    """Store a model of a few clusters that turn a little, each in its own way."""
    rng = np.random.default_rng(0)
    path = desk.folder / "model.safetensors"
    model = make_model(rng, dim)
    save_federated(path, model)
    kept = desk.keep(Produced(path, "federated_model", path.name, meta=model.meta()))
    path.unlink()
    return desk.as_input(kept)


def make_model(rng: np.random.Generator, dim: int) -> Federated:
    """Return CLUSTERS rotations and TRAINING unit queries."""
    turns = np.stack([rotation(rng, dim) for _ in range(CLUSTERS)])
    queries = unit(rng, TRAINING, dim)
    cluster_of = np.arange(TRAINING) % CLUSTERS
    targets = np.einsum("nd,nde->ne", queries, turns[cluster_of])
    manifest: dict[str, Any] = {"temperature": 0.1, "top_k": 10, "source": "imported"}
    return Federated(
        rotations=turns,
        scales=np.ones(CLUSTERS, np.float32),
        anchor=np.eye(dim, dtype=np.float32),
        centroids=np.stack([queries[cluster_of == c].mean(axis=0) for c in range(CLUSTERS)]),
        queries=queries,
        targets=targets,
        cluster_of=cluster_of,
        train_rows=np.arange(TRAINING),
        held_out_rows=np.zeros(0, np.int64),
        manifest=manifest,
    )


def rotation(rng: np.random.Generator, dim: int) -> Array:
    """Return the Cayley map of a small random skew matrix: a rotation, float32."""
    half = rng.normal(size=(dim, dim)) / dim
    eye, skew = np.eye(dim), half - half.T
    turned: Array = np.linalg.solve(eye + skew, eye - skew).astype(np.float32)
    return turned


def unit(rng: np.random.Generator, rows: int, dim: int) -> Array:
    """Return [rows, dim] float32 of length 1."""
    drawn = rng.normal(size=(rows, dim)).astype(np.float32)
    units: Array = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return units


def stored_queries(desk: Desk, rows: int, dim: int) -> Input:
    """Store pairs' queries; the job reads nothing else of pairs."""
    rng = np.random.default_rng(1)

    def blocks() -> Iterator[Array]:
        for start in range(0, rows, STEP_ROWS):
            yield unit(rng, min(STEP_ROWS, rows - start), dim)

    path = desk.folder / "pairs.safetensors"
    drawn = shards.Stream(np.dtype(np.float32), (rows, dim), blocks())
    shards.save_streams(path, {"query_embeddings": drawn}, {"format": "pairs"})
    meta = {"rows": rows, "dim": dim, "groups": 0}
    kept = desk.keep(Produced(path, "pairs", path.name, meta=meta))
    path.unlink()
    return desk.as_input(kept)


if __name__ == "__main__":
    sys.exit(main())
