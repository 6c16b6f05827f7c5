"""A service without HTTP for the tests of kinds, and the small data its jobs run on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, select

from core.artifacts.store import LocalStore
from core.db.models import Chunk, Job, Output
from core.db.session import reading
from core.distill.export import load_student
from core.distill.students._base import StudentModule
from core.errors import SpecInvalid
from core.jobs import lineage, service, status
from core.jobs.runner import Runner
from core.tensors.formats import Pairs, save_pairs
from tests.conftest import make_runner
from tests.core.kinds.transports import SMALL, put_pair, transport
from tests.life import submit, uploaded

TRAINING = {"epochs": 3, "batch_size": 32, "warmup_steps": 2}
CLUSTERING = {"method": "kmeans", "max_clusters": 4, "min_cluster_size": 4}


def tiny_pairs(rows: int = 120, dim: int = 16, seed: int = 0) -> Pairs:
    """Four groups, each rotated a little differently, with noise."""
    random = np.random.default_rng(seed)
    group = np.arange(rows) % 4
    centres = random.normal(size=(4, dim))
    queries = centres[group] + 0.5 * random.normal(size=(rows, dim))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    turns = [np.linalg.qr(np.eye(dim) + 0.2 * random.normal(size=(dim, dim)))[0] for _ in range(4)]
    targets = np.stack([query @ turns[g] for query, g in zip(queries, group, strict=True)])
    return Pairs(
        ids=[f"row{row}" for row in range(rows)],
        queries=queries.astype(np.float32),
        targets=targets.astype(np.float32),
        groups=[f"g{g}" for g in group],
    )


class World:
    """A database, a store and a runner, without HTTP."""

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        clock: Any,
        *,
        store: LocalStore | None = None,
        models: Path | None = None,
    ) -> None:
        self.engine, self.clock, self.folder = engine, clock, folder
        self.store = store or LocalStore(folder / "store")
        self.models = models or folder / "models"
        """What ``import_model`` may read."""
        self.keep = "best_and_latest"
        self.others: list[str] = []
        """Jobs of ``chain`` beside the first of each kind."""
        self.runner: Runner = make_runner(engine, self.store, clock, folder)

    def upload(self, pairs: Pairs) -> str:
        path = self.folder / "pairs.safetensors"
        save_pairs(path, pairs)
        return self.put(path, "pairs", pairs.meta())

    def put(self, path: Path, format_name: str, meta: dict[str, Any]) -> str:
        """Store a file as an upload of this format."""
        blob = self.store.put(path)
        return uploaded(self.engine, blob, self.clock, format_name=format_name, meta=meta)

    def submit(self, **spec: Any) -> str:
        return submit(self.engine, self.clock, keep_checkpoints=self.keep, **spec)

    def run(self) -> None:
        while self.runner.run_one():
            self.clock.tick(seconds=1)

    def job(self, job_id: str) -> Job:
        with reading(self.engine) as session:
            return service.get(session, job_id)

    def status(self, job_id: str) -> status.JobStatus:
        with reading(self.engine) as session:
            return status.describe(session, [service.get(session, job_id)], now=self.clock())[0]

    def path(self, job_id: str, name: str) -> Path:
        return self.store.path(self.status(job_id).artifacts[name])

    def report(self, job_id: str) -> dict[str, Any]:
        """Read the report.json of a job that succeeded."""
        assert self.job(job_id).state == "succeeded", self.job(job_id).error
        found: dict[str, Any] = json.loads(self.path(job_id, "report").read_text())
        return found

    def metrics(self, job_id: str) -> dict[str, list[tuple[int, float]]]:
        with reading(self.engine) as session:
            return lineage.metrics_of(session, job_id)

    def refused(self, match: str, **spec: Any) -> str | None:
        """Submit what is refused, see that nothing half-written stays; return the pointer."""
        with reading(self.engine) as session:
            before = set(session.scalars(select(Job.id)))
        with pytest.raises(SpecInvalid, match=match) as caught:
            self.submit(**spec)
        with reading(self.engine) as session:
            assert set(session.scalars(select(Job.id))) == before
            assert set(session.scalars(select(Chunk.job_id))) <= before
        return caught.value.pointer

    def student(self, job_id: str) -> StudentModule:
        """Read the student a job made."""
        named = shutil.copyfile(self.path(job_id, "student"), self.folder / "student.safetensors")
        return load_student(named)

    def files(self) -> dict[tuple[str, str, str, int, str], str]:
        """Everything stored, by kind and name of the job, stage, chunk and name."""
        with reading(self.engine) as session:
            query = (
                select(Job.kind, Job.name, Chunk.stage, Chunk.index, Output.name, Output.sha256)
                .join(Chunk, Chunk.id == Output.chunk_id)
                .join(Job, Job.id == Output.job_id)
            )
            return {tuple(row[:5]): row[5] for row in session.execute(query)}

    def chain(self, pairs: str, **student: Any) -> dict[str, str]:
        """Every kind once, by reference, before any of it has run."""
        fit = self.submit(kind="fit_federated", pairs=pairs, clustering=CLUSTERING)
        model = f"{fit}/model"
        cache = self.submit(kind="cache_targets", model=model, rows_per_chunk=50)
        distill = self.submit(
            kind="distill",
            model=model,
            targets=f"{cache}/targets",
            student=student or {"name": "rotor_product", "router_hidden": 16},
            training=TRAINING,
        )
        sweep = self.submit(
            kind="sweep",
            model=model,
            targets=f"{cache}/targets",
            students=[{"name": "rotor_product", "router_hidden": 16}],
            grid={"planes": [1, 3]},
            training={**TRAINING, "epochs_per_chunk": 2},
        )
        evaluate = self.submit(
            kind="evaluate", pairs=pairs, model=model, student=f"{distill}/student"
        )
        other = self.submit(
            kind="fit_federated", pairs=pairs, clustering=CLUSTERING, seed=1, name="other"
        )
        combined = self.submit(kind="combine_models", models=[model, f"{other}/model"])
        echo = self.submit(kind="echo", text="hi", times=2)
        export = self.submit(kind="export_cache", model=model, targets=f"{cache}/targets")
        taken_in = self.submit(
            kind="import_cache",
            model=model,
            bivectors=f"{export}/bivectors_npz",
            targets=f"{export}/targets_npz",
            rows_per_chunk=40,
            verify=30,
        )
        codebook = self.submit(
            kind="build_codebook",
            model=model,
            codebook={"method": "combined", "n_components": 4},
            compat="legacy",  # other bivectors than cache_targets': a chunk found again makes none
        )
        lda, benchmark = self._lda_chain(pairs)
        held_out = self._code_chain(pairs)
        jobs = (
            *(fit, cache, distill, sweep, evaluate),
            *(combined, echo, export, taken_in, codebook, lda, benchmark, held_out),
        )
        return {self.job(job_id).kind: job_id for job_id in jobs}

    def language_chain(self) -> dict[str, str]:
        """Every kind over language models once, as ``chain`` does."""
        inputs = put_pair(self, hidden_size=48)
        whole = transport(self, inputs, capture={**SMALL, "raw": True})
        again = transport(
            self,
            inputs,
            states=f"{whole}/states",
            rotate={"tie": "layer"},
            fold={"variant": "sliced"},
            name="states",
        )
        imported = inputs["student"].partition("/")[0]
        self.others += [inputs["teacher"].partition("/")[0], again]
        return {self.job(job_id).kind: job_id for job_id in (imported, whole)}

    def _lda_chain(self, pairs: str) -> tuple[str, str]:
        """Fit LDAs of both modes, distil one, judge and time it; return what is new of kind."""
        maps = self.submit(kind="fit_lda", pairs=pairs, mode="maps", temperature=0.1, name="maps")
        fit = self.submit(kind="fit_lda", pairs=pairs)
        cache = self.submit(kind="cache_targets", model=f"{maps}/model", name="maps")
        distill = self.submit(
            kind="distill",
            model=f"{fit}/model",
            student={"name": "projection_transformer", "num_layers": 1, "ff_dim": 16},
            training={**TRAINING, "accumulate": 2},
            name="lda",
        )
        judged = self.submit(
            kind="evaluate",
            pairs=pairs,
            model=f"{fit}/model",
            student=f"{distill}/student",
            name="lda",
        )
        benchmark = self.submit(
            kind="benchmark",
            model=f"{fit}/model",
            student=f"{distill}/student",
            clusters=[3, 9],
            batches=[1, 16],
            seconds=0.01,
        )
        self.others += [maps, cache, distill, judged]
        return fit, benchmark

    def _code_chain(self, pairs: str) -> str:
        """Hold rows out, distil codes by a curriculum, judge them; return what is new of kind."""
        held = self.submit(kind="hold_out", pairs=pairs)
        distill = self.submit(
            kind="distill",
            model=f"{held}/model",
            student={
                "name": "hierarchical",
                "levels": [2, 4],
                "level_weights": [0.7, 0.3],
                "hidden": 16,
                "decoder": 8,
            },
            training={
                **TRAINING,
                "curriculum": {"stages": 2, "order": "easy_first"},
                "epochs_per_chunk": 2,
            },
            name="codes",
        )
        judged = self.submit(
            kind="evaluate", model=f"{held}/model", student=f"{distill}/student", name="codes"
        )
        self.others += [distill, judged]
        return held
