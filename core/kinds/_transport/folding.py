"""Stages ``fold`` and ``pack``: weights file by file, and the folders that they make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.kinds._base import Chunk, ChunkResult, Metric, Produced
from core.kinds._files import read_json, write_json
from core.kinds._transport.given import Given
from core.kinds._transport.spec import Spec

if TYPE_CHECKING:
    from core.tensors.language_models import LanguageModel, ModelFile
    from core.transport.fold_plans import FoldPlan
    from core.transport.fold_shards import ShardTask

ALGORITHM = 1
"""Raised when the same inputs would give other weights."""


def fold_plan(given: Given, variant: str) -> FoldPlan:
    """Return what is done to the student's weights to make a variant."""
    from core.transport.fold_plans import FoldPlan

    shape, asked = given.plan.student, given.spec.fold
    shared: dict[str, Any] = {"permutations": given.permutations, "dtype": asked.dtype}
    if variant == "permuted":
        return FoldPlan(shape, "none", **shared)
    found = given.rotations
    rotations = {group: one.full for group, one in found.rotations().items()}
    return FoldPlan(
        shape,
        asked.variant,
        rotations,
        tie=found.tie,
        stage_layers=found.stage_layers,
        **shared,
    )


def fold(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Make one file of one variant, and see that its weights come back from it."""
    from core.transport.fold_shards import fold_task, read_norms, shard_plan

    given = Given(spec, chunk)
    variant, number = given.plan.fold_chunks[chunk.index]
    model, plan = given.language_model("student"), fold_plan(given, variant)
    tasks = shard_plan(model, plan)
    if number >= len(tasks):
        return ChunkResult()
    task = tasks[number]
    norms = read_norms([chunk.fetch(file.sha256) for file in model.shards], plan)
    key = _key(given, variant, task)
    made = chunk.cached(key)
    if made is None:
        path = chunk.workdir / task.target
        source = _source(given, model, task)

        def told(done: float, total: float) -> None:
            chunk.progress(done, 2 * total)

        fold_task(task, source, path, plan=plan, norms=norms, report=told)
        made = Produced(path, "model_file", task.target, cache_key=key)
    checked, metrics = _checked(given, model, task, plan, norms)
    facts = {
        "variant": variant,
        "name": task.target,
        "tensors": list(task.tensors),
        "sha256": _sha256(made.path),
        "size_bytes": made.path.stat().st_size,
        **checked,
    }
    beside = write_json(chunk.workdir / "facts.json", facts, format_name="fold_facts")
    return ChunkResult(checkpoints={"shard": made, "facts": beside}, metrics=metrics)


def _key(given: Given, variant: str, task: ShardTask) -> str:
    """Hash what decides a file's bytes."""
    made_of = {
        "algorithm": ALGORITHM,
        "student": given.sources["student"],
        "variant": given.spec.fold.variant if variant == "rotated" else variant,
        "dtype": given.spec.fold.dtype,
        "rotations": _sha256(given.rotations_file) if variant == "rotated" else None,
        "permutations": given.permutations_file and _sha256(given.permutations_file),
        "target": task.target,
    }
    text = json.dumps(made_of, sort_keys=True, separators=(",", ":"))
    return f"fold:{hashlib.sha256(text.encode()).hexdigest()}"


def _source(given: Given, model: LanguageModel, task: ShardTask) -> Path | None:
    if task.source is None:
        return None
    file = next(file for file in model.shards if file.name == task.source)
    return given.chunk.fetch(file.sha256)


def _checked(
    given: Given, model: LanguageModel, task: ShardTask, plan: FoldPlan, norms: Any
) -> tuple[dict[str, Any], list[Metric]]:
    """Fold and unfold what the file is made of, before rounding: how far from where it was?"""
    from core.transport.unfolding import round_trip

    source = _source(given, model, task)
    if source is None or task.makes != "shard":
        return {"unfold": None, "lost": 0}, []
    chunk = given.chunk

    def told(done: float, total: float) -> None:
        chunk.progress(total + done, 2 * total)

    found = round_trip(source, plan, norms=norms, report=told)
    facts = {"unfold": found.error, "unfold_weight": found.weight, "lost": found.lost}
    return facts, [Metric("unfold_error", chunk.index, found.error)]


def pack(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Write what else a folder needs, and the list of its files, for every variant."""
    given = Given(spec, chunk)
    facts = [read_json(one["facts"].path) for one in chunk.outputs("fold")]
    checkpoints: dict[str, Produced] = {}
    for variant in given.plan.folded:
        mine = [fact for fact in facts if fact["variant"] == variant]
        checkpoints |= _pack_one(given, variant, mine)
    return ChunkResult(checkpoints=checkpoints)


def _pack_one(
    given: Given, variant: str, facts: Sequence[Mapping[str, Any]]
) -> dict[str, Produced]:
    from core.tensors.language_models import LanguageModel, ModelFile, dump

    plan, base = fold_plan(given, variant), given.language_model("student")
    teacher = given.language_model("teacher").source
    folder = given.chunk.workdir / variant
    folder.mkdir()
    shards = [
        ModelFile(fact["name"], fact["sha256"], fact["size_bytes"], tuple(fact["tensors"]))
        for fact in facts
    ]
    written = {path.name: _keep(path) for path in _write_beside(given, folder, plan, base, shards)}
    own = {file.name for file in base.shards} | {file.name for file in shards} | set(written)
    beside = [file for file in base.files if file.name not in own and not _is_index(file.name)]
    files = [*shards, *beside, *(_listed(made) for made in written.values())]
    model = LanguageModel(
        plan.folded_shape(),
        tuple(sorted(files, key=lambda file: file.name)),
        base.tokenizer,
        base.tokens,
        source=f"{base.source}, {variant} by a transport to {teacher}",
        exact=plan.exact,
        adapters=plan.own_module,
    )
    name = "model" if variant == "rotated" else f"model_{variant}"
    path = given.chunk.workdir / f"{name}.json"
    listed = write_json(path, dump(model), format_name="language_model", **model.meta())
    kept = {f"{variant}_{number}": made for number, made in enumerate(written.values())}
    return {name: listed, **kept}


def _write_beside(
    given: Given, folder: Path, plan: FoldPlan, base: LanguageModel, shards: Sequence[ModelFile]
) -> list[Path]:
    """Write configuration, index, record and module, as far as this variant has them."""
    from core.tensors.language_models import INDEX, index_of
    from core.transport import fold_folders
    from core.transport.fold_plans import folded_config
    from core.transport.fold_records import RECORD, write_record
    from core.transport.fold_shards import read_norms
    from core.transport.sliced import MODULE, module_text

    config = next(file for file in base.files if file.name == "config.json")
    told = read_json(given.chunk.fetch(config.sha256))
    made = [folder / "config.json"]
    fold_folders.write_json(made[0], folded_config(told, plan))
    if len(shards) > 1 or plan.turns:
        made.append(folder / INDEX)
        fold_folders.write_json(made[-1], index_of(shards))
    if plan.absorbs:
        norms = read_norms([given.chunk.fetch(file.sha256) for file in base.shards], plan)
        made.append(folder / RECORD)
        write_record(made[-1], norms)
    if plan.own_module:
        made.append(folder / MODULE)
        made[-1].write_text(module_text(), encoding="utf-8")
    return made


def _is_index(name: str) -> bool:
    return name.endswith(".index.json")


def _keep(path: Path) -> Produced:
    """Return a small file that stays under its own hash."""
    sort = "application/json" if path.suffix == ".json" else "application/octet-stream"
    return Produced(path, "model_file", path.name, sort, cache_key=f"model_file:{_sha256(path)}")


def _listed(made: Produced) -> ModelFile:
    from core.tensors.language_models import ModelFile

    return ModelFile(made.file_name, _sha256(made.path), made.path.stat().st_size)


def _sha256(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def offer(chunk: Chunk, made: Mapping[str, Produced]) -> dict[str, Produced]:
    """Return the folded models as outputs of this chunk: copies of the lists of their files."""
    offered = {}
    for name, one in made.items():
        if one.format == "language_model":
            path = chunk.workdir / f"{name}.json"
            path.write_bytes(one.path.read_bytes())
            offered[name] = replace(one, path=path)
    return offered
