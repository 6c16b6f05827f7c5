"""Weights made by recipe, block by block, in one stretch of memory that is set aside before.

So the most memory is known and is not passed: allocating block after block would scatter them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from core.errors import DataInvalid
from core.transport import memory
from core.transport.folding import Recipe
from core.transport.weight_files import Layout, WeightFile, write_weights

Report = Callable[[float, float], None]


def silent(done: float, total: float) -> None:
    """Tell nobody how far it is."""


def stream_file(
    file: WeightFile,
    target: Path,
    layouts: Mapping[str, Layout],
    make: Callable[[str], tuple[str, Recipe]],
    report: Report,
) -> None:
    """Write a file whose weights are made by recipe.

    Args:
        file: what is read.
        target: written over.
        layouts: of the new weights, by name.
        make: from a new weight's name to that of ``file`` it is made of, and how.
        report: told bytes written and in all.

    Raises:
        DataInvalid: a number is not finite, or does not fit its dtype.
    """
    arena = torch.empty(0, dtype=torch.uint8)

    def blocks(name: str) -> Iterator[Tensor]:
        nonlocal arena
        of, made = make(name)
        old, new = file.layouts[of], layouts[name]
        size = memory.weight_bytes(
            old.shape,
            new.shape,
            items=(old.dtype.itemsize, new.dtype.itemsize),
            mixed=made.left is not None,
            permuted=made.columns is not None,
        )
        if size > arena.numel():
            arena = torch.empty(0, dtype=torch.uint8)  # let go of the old one first
            arena = torch.empty(size, dtype=torch.uint8)
        for block in _blocks(file, of, made, new, arena):
            if not all(math.isfinite(extreme) for extreme in torch.aminmax(block)):
                raise DataInvalid(f"{name}: a number is not finite, or too large for {new.dtype}")
            yield block

    write_weights(target, layouts, blocks, report=report)


def _rows_and_columns(layout: Layout) -> tuple[int, int]:
    return (1, layout.shape[0]) if len(layout.shape) == 1 else (layout.shape[0], layout.shape[1])


def _blocks(
    file: WeightFile, name: str, made: Recipe, new: Layout, arena: Tensor
) -> Iterator[Tensor]:
    """Yield consecutive rows of the new weight, in its dtype; each until the next is asked for."""
    if made.value is not None:
        yield made.value[None].to(new.dtype)
    elif made.left is not None:
        yield from _mixed(file, name, made, made.left, new, arena)
    else:
        yield from _by_rows(file, name, made, new, arena)


def _by_rows(
    file: WeightFile, name: str, made: Recipe, new: Layout, arena: Tensor
) -> Iterator[Tensor]:
    old = file.layouts[name]
    (rows, last), width = _rows_and_columns(old), new.shape[-1]
    permuted = made.columns is not None
    cost = memory.row_cost(last, width, old.dtype.itemsize, new.dtype.itemsize, permuted=permuted)
    step = memory.at_once(cost, rows)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        free = _Stretch(arena)
        block = file.rows(
            name,
            start,
            start + count,
            order=made.rows,
            into=free.take(count, last, old.dtype),
        )
        if made.columns is not None:
            moved = free.take(count, last, old.dtype)
            block = torch.index_select(block, 1, made.columns, out=moved)
        product = free.take(count, width, torch.float64)
        rest = free.rest()
        wide = _Stretch(rest).take(count, last, torch.float64).copy_(block)
        found = made.turned(wide, out=product)
        # What is written lies where the rows were widened, or where no product is.
        unused = product.view(-1).view(torch.uint8) if made.right is None else rest
        yield _Stretch(unused).take(count, width, new.dtype).copy_(found)


def _mixed(
    file: WeightFile, name: str, made: Recipe, left: Tensor, new: Layout, arena: Tensor
) -> Iterator[Tensor]:
    """Yield rows of ``scale * left^T weight``: it is held as stored, and widened in parts."""
    old = file.layouts[name]
    (rows, last), height = old.shape, new.shape[0]
    most = min(memory.OUT_ROWS, height)
    permuted = made.columns is not None
    step = memory.at_once(
        memory.column_cost(rows, most, old.dtype.itemsize, permuted=permuted), last
    )
    held = _Stretch(arena)
    whole = file.rows(name, 0, rows, into=held.take(rows, last, old.dtype))
    out = held.take(most, last, new.dtype)
    rest = held.rest()
    for start in range(0, height, most):
        turned = left[:, start : start + most].mT
        block = out[: turned.shape[0]]
        for first in range(0, last, step):
            count, free = min(step, last - first), _Stretch(rest)
            part = whole[:, first : first + count]
            if made.columns is not None:
                moved = free.take(rows, count, old.dtype)
                order = made.columns[first : first + count]
                part = torch.index_select(whole, 1, order, out=moved)
            wide = free.take(rows, count, torch.float64).copy_(part)
            product = free.take(len(block), count, torch.float64)
            torch.mm(turned, wide, out=product)
            block[:, first : first + count] = product.mul_(made.scale)
        yield block


class _Stretch:
    """Hands out consecutive parts of a stretch of memory [bytes] uint8."""

    def __init__(self, stretch: Tensor) -> None:
        self._memory = stretch
        self._at = 0

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return the next [rows, columns], not filled."""
        size = rows * columns * dtype.itemsize
        part = self._memory[self._at : self._at + size].view(dtype).view(rows, columns)
        self._at += -(-size // memory.ALIGNED) * memory.ALIGNED
        return part

    def rest(self) -> Tensor:
        """Return what is left, [bytes] uint8."""
        return self._memory[self._at :]
