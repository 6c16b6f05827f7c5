"""A fold undone: the old weights from the new ones, and the check that a fold can be undone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import DataInvalid
from core.tensors.language_models import INDEX, ModelFile, index_of
from core.transport import memory
from core.transport.fold_folders import copy_beside, weight_files, write_json
from core.transport.fold_plans import FoldPlan
from core.transport.fold_records import RECORD, read_record
from core.transport.fold_shards import check_file, layouts_of
from core.transport.folding import Recipe, inverse, norm_names, place, recipe, unfold_recipe
from core.transport.weight_files import Layout, WeightFile
from core.transport.weight_streams import Report, silent, stream_file

ROUNDINGS, FLOOR = 8, 1e-9
"""How far a head may be from its embedding's and still be tied: in units in the last place, and at
least, both of its largest number."""

HELD = 6
"""Blocks of float64 that a check has at once, at most: the last one's are freed one by one."""


@dataclass(frozen=True)
class RoundTrip:
    """What folding weights and unfolding them again in float64, before any rounding, leaves."""

    error: float
    """Largest difference over the largest number of its weight."""
    weight: str
    """Where it is largest; empty: nowhere."""
    lost: int
    """Entries of gammas that are 0: what is multiplied by them does not come back."""


def unfold_shard(
    source: Path,
    target: Path,
    plan: FoldPlan,
    *,
    norms: Mapping[str, Tensor],
    report: Report = silent,
) -> tuple[str, ...]:
    """Write the model's weights that a file of the folded model holds, in the model's dtype.

    Args:
        source: of the folded model.
        target: written over; not at all where the model has nothing of it (adapters, a tied head).
        plan: that it was folded by.
        norms: the gammas (``read_norms`` of the model, ``read_record`` of the folded folder).
        report: told bytes written and in all.

    Returns:
        The names written.

    Raises:
        DataInvalid: the file is none of this plan's, its norms have changed since, or a gamma is 0.
    """
    with WeightFile(source) as file:
        names = unfolded_names(tuple(file.layouts), plan)
        if not names:
            return ()
        check_file(file, set(names), plan, width=plan.width)
        _check_ones(file, names, plan)
        read = {name: name for name in names}
        layouts = layouts_of(file, read, plan, width=plan.shape.width, dtype=plan.shape.dtype)

        def make(name: str) -> tuple[str, Recipe]:
            return name, unfold_recipe(plan, name, norms)

        stream_file(file, target, layouts, make, report)
    return names


def unfolded_names(names: Sequence[str], plan: FoldPlan) -> tuple[str, ...]:
    """Return those of a folded file's weights that the model itself has."""
    known = plan.shape.tensors()
    return tuple(name for name in names if name in known)


def _check_ones(file: WeightFile, names: Sequence[str], plan: FoldPlan) -> None:
    """Raise DataInvalid where a norm is no longer what the fold left: all ones."""
    if not plan.absorbs:
        return
    for name in set(names) & set(norm_names(plan.shape)):
        if bool((file.rows(name, 0, 1) != 1).any()):
            raise DataInvalid(
                f"{name}: not all ones; it was changed after the fold, which cannot be undone then"
            )


def check_head(embedding: Path, head: Path, plan: FoldPlan, norms: Mapping[str, Tensor]) -> None:
    """Raise DataInvalid unless a head that was tied is still that of its embedding.

    Args:
        embedding: the file of the folded model that holds the embedding.
        head: the one that holds the head.
        plan: that it was folded by, of a model whose embedding is tied.
        norms: with the final norm's gamma.
    """
    table = plan.shape.table
    back = unfold_recipe(plan, table.embedding, norms)
    there = recipe(plan, table.head, norms)
    gap = largest = 0.0
    with WeightFile(embedding) as old, WeightFile(head) as new:
        check_file(old, {table.embedding}, plan, width=plan.width)
        check_file(new, {table.head}, plan, width=plan.width)
        layout = new.layouts[table.head]
        for start, stop in _row_blocks(layout, plan.shape.width):
            rows = old.rows(table.embedding, start, stop).to(torch.float64)
            made = there.turned(back.turned(rows))
            found = new.rows(table.head, start, stop).to(torch.float64)
            largest = max(largest, float(found.abs().max()))
            gap = max(gap, float(made.sub_(found).abs_().max()))
    allowed = max(ROUNDINGS * torch.finfo(layout.dtype).eps, FLOOR) * largest
    if not gap <= allowed:
        raise DataInvalid(
            f"{table.head}: off by {gap:.3g} from the embedding that it was tied to (allowed "
            f"{allowed:.3g}); it was changed after the fold, and cannot be tied again"
        )


def round_trip(
    source: Path, plan: FoldPlan, *, norms: Mapping[str, Tensor], report: Report = silent
) -> RoundTrip:
    """Fold a file's weights in float64 and unfold them; memory as ``memory.fold_bytes``.

    Orders are undone exactly and are left out here. A tied embedding is tried as the head too.

    Args:
        source: a file of the model.
        plan: of the fold.
        norms: ``read_norms`` of the model.
        report: told weights done and in all.
    """
    table, worst = plan.shape.table, RoundTrip(0.0, "", 0)
    with WeightFile(source) as file:
        names = unfolded_names(tuple(file.layouts), plan)
        check_file(file, set(names), plan, width=plan.shape.width)
        read = {name: name for name in names}
        if plan.shape.tied and plan.absorbs and table.embedding in read:
            read[table.head] = table.embedding
        lost = 0
        for done, (name, of) in enumerate(read.items()):
            made, zeros = _without_zeros(recipe(plan, name, norms))
            lost += zeros
            if place(plan.shape, name)[1].side != "norm":
                error = _error(file, of, made)
                worst = max(worst, RoundTrip(error, name, 0), key=lambda found: found.error)
            report(done + 1.0, float(len(read)))
    return replace(worst, lost=lost)


def _without_zeros(made: Recipe) -> tuple[Recipe, int]:
    made = replace(made, rows=None, columns=None)
    if made.before is None:
        return made, 0
    zero = made.before == 0
    return replace(made, before=made.before.masked_fill(zero, 1.0)), int(zero.sum())


def _error(file: WeightFile, name: str, made: Recipe) -> float:
    back = inverse(made, name)
    gap = largest = 0.0
    for old in _old_blocks(file, name, made):
        if made.left is None or back.left is None:
            found = back.turned(made.turned(old.clone()))
        else:
            found = back.left.mT @ (made.left.mT @ old).mul_(made.scale)
            found.mul_(back.scale)
        largest = max(largest, float(old.abs().max()))
        gap = max(gap, float(found.sub_(old).abs_().max()))
    return gap / largest if largest else gap


def _old_blocks(file: WeightFile, name: str, made: Recipe) -> Iterator[Tensor]:
    """Yield all of a weight in float64: rows, or columns where rows are mixed."""
    layout = file.layouts[name]
    if made.left is None:
        new = layout.shape[-1] if made.right is None else int(made.right.shape[1])
        for start, stop in _row_blocks(layout, new):
            yield file.rows(name, start, stop).to(torch.float64)
        return
    rows, last = layout.shape
    whole = file.rows(name, 0, rows)
    new = int(made.left.shape[1])
    step = memory.at_once(8 * HELD * max(rows, new), last)
    for first in range(0, last, step):
        yield whole[:, first : first + step].to(torch.float64)


def _row_blocks(layout: Layout, new: int) -> Iterator[tuple[int, int]]:
    rows = layout.shape[0] if len(layout.shape) == 2 else 1
    step = memory.at_once(8 * HELD * max(layout.shape[-1], new), rows)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def unfold_folder(source: Path, target: Path, plan: FoldPlan, *, config: Mapping[str, Any]) -> Path:
    """Unfold a folder that ``fold_folder`` wrote into a new one; ``target`` must not exist.

    Args:
        source: the folded folder, with its fold record.
        target: made here.
        plan: that it was folded by.
        config: the model's own config.json.

    Raises:
        DataInvalid: as ``unfold_shard`` and ``check_head``.
    """
    target.mkdir()
    norms, table = read_record(source / RECORD), plan.shape.table
    files = weight_files(source)
    holds = {name: source / file for file, names in files.items() for name in names}
    if plan.shape.tied and plan.absorbs:
        check_head(holds[table.embedding], holds[table.head], plan, norms)
    kept = [name for name in files if unfolded_names(files[name], plan)]
    shards = []
    for index, name in enumerate(kept):
        made = f"model-{index + 1:05d}-of-{len(kept):05d}.safetensors"
        path = target / (made if len(kept) > 1 else "model.safetensors")
        names = unfold_shard(source / name, path, plan, norms=norms)
        shards.append(ModelFile(path.name, "", path.stat().st_size, names))
    if len(shards) > 1:
        write_json(target / INDEX, index_of(shards))
    write_json(target / "config.json", config)
    copy_beside(source, target)
    return target
