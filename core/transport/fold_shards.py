"""Folding file by file: what each chunk makes, and the stream of blocks through one.

Memory of one task is ``memory.fold_bytes``: the maps, the largest weight that writes the residual
stream as it is stored, and blocks. No file is held whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from core.errors import DataInvalid
from core.tensors.language_models import LanguageModel
from core.transport import memory
from core.transport.fold_plans import DTYPES, FoldPlan
from core.transport.folding import Recipe, norm_names, place, recipe, stored_shape
from core.transport.weight_files import Layout, WeightFile, write_weights
from core.transport.weight_streams import Report, silent, stream_file

SKIP_ADAPTERS = "skip_adapters.safetensors"


@dataclass(frozen=True)
class ShardTask:
    """One file of the folded model."""

    target: str
    """Its name in the folder."""
    makes: Literal["shard", "head", "adapters"]
    """``head``: that of an embedding that was tied, made from the embedding."""
    source: str | None
    """The file of the model that is read; None for adapters."""
    tensors: tuple[str, ...]
    """What it holds, by name."""
    groups: tuple[str, ...]
    """The rotations that it takes; the plan of a chunk needs no others."""


def shard_plan(model: LanguageModel, plan: FoldPlan) -> list[ShardTask]:
    """List the files of the folded model, in order of their names.

    Raises:
        DataInvalid: the model has skip adapters, or its files lack or repeat a weight.
    """
    if model.adapters:
        raise DataInvalid(
            "model: its residual stream turns between layers (skip adapters); fold the model that "
            "it was made from"
        )
    return tasks({file.name: file.tensors for file in model.shards}, plan)


def tasks(files: Mapping[str, Sequence[str]], plan: FoldPlan) -> list[ShardTask]:
    """List the files of the folded model, given which file of the model holds which weights.

    Raises:
        DataInvalid: the files lack or repeat a weight.
    """
    shape, table = plan.shape, plan.shape.table
    held = [name for names in files.values() for name in names]
    wanted = set(shape.tensors())
    drops = {table.head} if shape.tied else set()  # stored or not, it is the embedding
    if len(held) != len(set(held)) or (missing := wanted - set(held)):
        first = sorted(missing)[0] if len(held) == len(set(held)) else "a weight"
        raise DataInvalid(f"model: {first} is not in its files exactly once")
    kept = {file: [name for name in files[file] if name not in drops] for file in sorted(files)}
    made: list[tuple[Literal["shard", "head"], str, list[str]]] = [
        ("shard", file, names) for file, names in kept.items() if names
    ]
    if shape.tied and plan.absorbs:
        source = next(file for file, names in kept.items() if table.embedding in names)
        made.append(("head", source, [table.head]))
    found = [
        ShardTask(
            _file_name(index, len(made), plan), makes, source, tuple(names), _groups(plan, names)
        )
        for index, (makes, source, names) in enumerate(made)
    ]
    if plan.turns:
        names = [adapter_name(plan, layer) for layer in plan.turns]
        groups = {plan.group(layer) for layer in (*range(shape.layers), None)}
        found.append(
            ShardTask(SKIP_ADAPTERS, "adapters", None, tuple(names), tuple(sorted(groups)))
        )
    return found


def _file_name(index: int, count: int, plan: FoldPlan) -> str:
    # transformers reads model.safetensors alone where there is one, and adapters lie beside.
    if count == 1 and not plan.turns:
        return "model.safetensors"
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _groups(plan: FoldPlan, names: Sequence[str]) -> tuple[str, ...]:
    if plan.variant == "none":
        return ()
    layers = {
        0 if name == plan.shape.table.embedding else place(plan.shape, name)[0] for name in names
    }
    return tuple(sorted({plan.group(layer) for layer in layers}))


def adapter_name(plan: FoldPlan, layer: int) -> str:
    """Name the skip adapter after a layer, as the module's state dict does."""
    return f"{plan.shape.table.layer_prefix.format(layer=layer)}skip_adapter.weight"


def fold_task(
    task: ShardTask,
    source: Path | None,
    target: Path,
    *,
    plan: FoldPlan,
    norms: Mapping[str, Tensor],
    report: Report = silent,
) -> None:
    """Write one file of the folded model.

    Args:
        task: of ``shard_plan``.
        source: where the file ``task.source`` lies.
        target: written over.
        plan: with the rotations that ``task.groups`` names.
        norms: ``read_norms`` of all the model's files.
        report: told bytes written and in all.

    Raises:
        DataInvalid: the file does not hold what the model's description says, a number is not
            finite or does not fit the new dtype, or the plan is not one for this model.
    """
    if source is None:
        write_adapters(target, plan, report=report)
        return
    read = {name: name for name in task.tensors}
    if task.makes == "head":
        read = {plan.shape.table.head: plan.shape.table.embedding}
    with WeightFile(source) as file:
        check_file(file, set(read.values()), plan, width=plan.shape.width)
        layouts = layouts_of(file, read, plan, width=plan.width, dtype=plan.dtype)

        def make(name: str) -> tuple[str, Recipe]:
            return read[name], recipe(plan, name, norms)

        stream_file(file, target, layouts, make, report)


def fold_shard(
    source: Path,
    target: Path,
    plan: FoldPlan,
    *,
    norms: Mapping[str, Tensor],
    report: Report = silent,
) -> None:
    """Fold every weight that a file holds, under its name (``fold_task``)."""
    with WeightFile(source) as file:
        names = [name for name in file.layouts if not (plan.shape.tied and _is_head(plan, name))]
        groups = _groups(plan, names)
    task = ShardTask(target.name, "shard", source.name, tuple(names), groups)
    fold_task(task, source, target, plan=plan, norms=norms, report=report)


def _is_head(plan: FoldPlan, name: str) -> bool:
    return name == plan.shape.table.head


def check_file(file: WeightFile, names: set[str], plan: FoldPlan, *, width: int) -> None:
    """Raise DataInvalid unless the file holds these weights, of a model of this width."""
    for name in sorted(names):
        needed = stored_shape(plan.shape, name, width)
        found = file.layouts.get(name)
        if found is None or found.shape != needed:
            told = "missing" if found is None else f"shape {list(found.shape)}"
            raise DataInvalid(f"{name}: {told}; needed {list(needed)}")


def read_norms(shards: Sequence[Path], plan: FoldPlan) -> dict[str, Tensor]:
    """Read the gammas of a model's pre-norms and final norm: [d_s] float64, by whole name.

    Raises:
        DataInvalid: a file is not safetensors, or a norm is missing, repeated or of another shape.
    """
    wanted, found = set(norm_names(plan.shape)), dict[str, Tensor]()
    for path in shards:
        with WeightFile(path) as file:
            here = wanted & set(file.layouts)
            check_file(file, here, plan, width=plan.shape.width)
            for name in here:
                found[name] = file.rows(name, 0, 1)[0].to(torch.float64)
    if missing := wanted - set(found):
        raise DataInvalid(f"{sorted(missing)[0]}: missing")
    return dict(sorted(found.items()))


def layouts_of(
    file: WeightFile, read: Mapping[str, str], plan: FoldPlan, *, width: int, dtype: str
) -> dict[str, Layout]:
    """Return dtype and shape of new weights; ``read``: from a new name to that in the file."""
    return {
        name: Layout(
            file.layouts[of].dtype if dtype == "keep" else DTYPES[dtype],
            stored_shape(plan.shape, name, width),
        )
        for name, of in read.items()
    }


def adapter_dtype(plan: FoldPlan) -> torch.dtype:
    """Return what skip adapters are stored and applied in: float32 at least.

    All of the stream passes through them, so 16 bits would cost as much as the weights' own
    rounding in every layer again.
    """
    dtype = DTYPES[plan.folded_shape().dtype]
    return dtype if dtype.itemsize >= 4 else torch.float32


def write_adapters(target: Path, plan: FoldPlan, *, report: Report = silent) -> None:
    """Write the skip adapters ``R_l^T R_next`` (Ashkboos et al. 2024, SliceGPT, section 3.3).

    Stored as torch's ``[out, in]``, so transposed: ``stream @ weight^T``.
    """
    after = dict(enumerate([*range(1, plan.shape.layers), None]))
    dtype = adapter_dtype(plan)
    shape = (plan.width, plan.width)
    layouts = {adapter_name(plan, layer): Layout(dtype, shape) for layer in plan.turns}
    pairs = {adapter_name(plan, layer): (layer, after[layer]) for layer in plan.turns}

    def blocks(name: str) -> Iterator[Tensor]:
        here, there = (plan.rotation(layer) for layer in pairs[name])
        if here is None or there is None:
            raise ValueError(f"variant {plan.variant} has no adapters")
        for start in range(0, plan.width, memory.OUT_ROWS):
            yield (there[:, start : start + memory.OUT_ROWS].mT @ here).to(dtype)

    write_weights(target, layouts, blocks, report=report)
