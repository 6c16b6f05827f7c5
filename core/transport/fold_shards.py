"""Folding file by file: what each chunk makes, and the stream of blocks through one.

Memory of one task is ``fold_bytes``: the maps, the largest weight that writes the residual stream
as it is stored, and blocks. No file is held whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from core.errors import DataInvalid
from core.tensors.language_models import LanguageModel
from core.transport.fold_plans import DTYPES, FoldPlan, item_bytes
from core.transport.folding import Recipe, norm_names, place, recipe
from core.transport.weight_files import Layout, WeightFile, write_weights

BLOCK_BYTES = 32 << 20
"""Of temporaries: rows read, their float64, the product, what is written."""
OUT_ROWS = 512
"""Most rows made at once of a weight that writes the stream."""
SKIP_ADAPTERS = "skip_adapters.safetensors"
Report = Callable[[float, float], None]


def silent(done: float, total: float) -> None:
    """Tell nobody how far it is."""


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
        check_file(file, {read[name] for name in task.tensors}, plan)
        recipes = {name: recipe(plan, name, norms) for name in task.tensors}
        stream_file(file, target, read, recipes, plan.dtype, report)


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


def check_file(
    file: WeightFile, names: set[str], plan: FoldPlan, *, width: int | None = None
) -> None:
    """Raise DataInvalid unless the file holds these weights in the model's shapes.

    ``width``: of the residual stream in this file where it is not the model's.
    """
    for name in sorted(names):
        _, weight = place(plan.shape, name)
        sizes = [
            width if width and stream == "residual" else plan.shape.size(stream)
            for stream in weight.axes
        ]
        found = file.layouts.get(name)
        if found is None or list(found.shape) != sizes:
            told = "missing" if found is None else f"shape {list(found.shape)}"
            raise DataInvalid(f"{name}: {told}; needed {sizes}")


def read_norms(shards: Sequence[Path], plan: FoldPlan) -> dict[str, Tensor]:
    """Read the gammas of a model's pre-norms and final norm: [d_s] float64, by whole name.

    Raises:
        DataInvalid: a file is not safetensors, or a norm is missing, repeated or of another shape.
    """
    wanted, found = set(norm_names(plan.shape)), dict[str, Tensor]()
    for path in shards:
        with WeightFile(path) as file:
            here = wanted & set(file.layouts)
            check_file(file, here, plan)
            for name in here:
                found[name] = file.rows(name, 0, 1)[0].to(torch.float64)
    if missing := wanted - set(found):
        raise DataInvalid(f"{sorted(missing)[0]}: missing")
    return dict(sorted(found.items()))


def stream_file(
    file: WeightFile,
    target: Path,
    read: Mapping[str, str],
    recipes: Mapping[str, Recipe],
    dtype: str,
    report: Report,
) -> None:
    """Write a file whose weights are made by recipe.

    Args:
        file: what is read.
        target: written over.
        read: from a new weight's name to that of ``file`` it is made of.
        recipes: by new name.
        dtype: of what is written; ``keep``: each weight's own.
        report: told bytes written and in all.
    """
    layouts = {}
    for name, made in recipes.items():
        old = file.layouts[read[name]]
        kept = old.dtype if dtype == "keep" else DTYPES[dtype]
        layouts[name] = Layout(kept, made.shape(old.shape))

    def blocks(name: str) -> Iterator[Tensor]:
        for block in make_blocks(file, read[name], recipes[name], layouts[name].dtype):
            yield _narrow(name, block, layouts[name].dtype)

    write_weights(target, layouts, blocks, report=report)


def make_blocks(file: WeightFile, name: str, made: Recipe, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield consecutive rows of the new weight, float64 or ``dtype``."""
    if made.value is not None:
        yield made.value[None]
    elif made.left is not None:
        yield from _by_columns(file, name, made, made.left, dtype)
    else:
        layout = file.layouts[name]
        rows = layout.shape[0] if len(layout.shape) == 2 else 1
        new, items = made.shape(layout.shape)[-1], (layout.dtype.itemsize, dtype.itemsize)
        cost = row_cost(layout.shape[-1], new, items, permuted=made.columns is not None)
        step = at_once(cost, rows)
        for start in range(0, rows, step):
            block = file.rows(name, start, min(start + step, rows), made.rows)
            yield made.rows_of(block)


def row_cost(old: int, new: int, items: tuple[int, int], *, permuted: bool) -> int:
    """Bytes per row while rows are made: as read, twice where reordered; widened; made; written."""
    item_in, item_out = items
    return old * item_in * (2 if permuted else 1) + 8 * new + max(8 * old, item_out * new)


def column_cost(old: int, rows: int, item_in: int, *, permuted: bool) -> int:
    """Bytes per column while ``rows`` rows are made: reordered, widened, the product."""
    return old * (8 + (item_in if permuted else 0)) + 8 * rows


def at_once(cost: int, most: int) -> int:
    """Return how many of what costs so many bytes fit BLOCK_BYTES: 1 to ``most``."""
    return min(most, max(1, BLOCK_BYTES // cost))


def _by_columns(
    file: WeightFile, name: str, made: Recipe, left: Tensor, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield rows of ``scale * left^T weight``: the weight is held as stored, widened in parts."""
    layout = file.layouts[name]
    old, last = layout.shape
    whole = file.rows(name, 0, old)
    new = int(left.shape[1])
    rows = min(OUT_ROWS, new)
    permuted, item_in = made.columns is not None, layout.dtype.itemsize
    step = at_once(column_cost(old, rows, item_in, permuted=permuted), last)
    for start in range(0, new, rows):
        turned = left[:, start : start + rows].mT
        block = torch.empty(turned.shape[0], last, dtype=dtype)
        for first in range(0, last, step):
            part = whole[:, first : first + step]
            if made.columns is not None:
                part = whole.index_select(1, made.columns[first : first + step])
            product = (turned @ part.to(torch.float64)).mul_(made.scale)
            block[:, first : first + step] = product
        yield block


def _narrow(name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
    made = block.to(dtype)
    if not all(math.isfinite(extreme) for extreme in torch.aminmax(made)):  # without a copy
        raise DataInvalid(f"{name}: a number is not finite, or too large for {dtype}")
    return made


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
        for start in range(0, plan.width, OUT_ROWS):
            yield _narrow(name, there[:, start : start + OUT_ROWS].mT @ here, dtype)

    write_weights(target, layouts, blocks, report=report)


def fold_bytes(plan: FoldPlan, *, maps: int | None = None) -> int:
    """Return the most memory that one task takes, in bytes, beside what a process takes anyway.

    ``8 maps d_s d_r + 8 (2 L + 1) d_s + max over the weights``, where one that reads the stream, or
    the embedding, takes BLOCK_BYTES (less where it is smaller; one row's temporaries at least), and
    one that writes it, [d_s, n], itself as stored, OUT_ROWS rows of the new one and BLOCK_BYTES.

    Args:
        plan: of the fold; of its rotations the number and the widths count alone.
        maps: how many rotations are held; None: all of the plan's.
    """
    shape = plan.shape
    held = len(plan.rotations) if maps is None else maps
    sizes = {**shape.tensors(), shape.table.head: (shape.vocabulary, shape.width)}
    most = max(_weight_bytes(plan, name, size) for name, size in sizes.items())
    if plan.turns:
        most = max(most, OUT_ROWS * plan.width * (8 + adapter_dtype(plan).itemsize))
    return 8 * held * shape.width * plan.width + 8 * (2 * shape.layers + 1) * shape.width + most


def _weight_bytes(plan: FoldPlan, name: str, size: Sequence[int]) -> int:
    layer, weight = place(plan.shape, name)
    items = item_bytes(plan)
    rows, old = (1, size[0]) if len(size) == 1 else size
    moved = None if layer is None else plan.permutations.get(layer)
    asked = {"queries": moved and moved.heads, "neurons": moved and moved.neurons}
    permuted = asked.get(weight.axes[-1]) is not None
    if plan.variant != "none" and weight.axes[0] == "residual" and len(size) == 2:
        made = min(OUT_ROWS, plan.width)
        cost = column_cost(rows, made, items[0], permuted=permuted)
        return rows * old * items[0] + made * old * items[1] + cost * at_once(cost, old)
    new = plan.width if weight.axes[-1] == "residual" else old
    cost = row_cost(old, new, items, permuted=permuted)
    return cost * at_once(cost, rows)
