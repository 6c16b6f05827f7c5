"""Asks modules that map [B, d] to [B, m], whatever they are: checked, in blocks, modes restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import DataInvalid, SpecInvalid

Answering = Callable[[Tensor], Tensor]
"""[B, d] -> [B, m]; usually a module."""
ASKED_ROWS = 4096
"""Queries answered at a time."""


def checked_rows(values: Any, name: str) -> Tensor:
    """Check [n, d] finite floats, n >= 1."""
    if not isinstance(values, Tensor) or values.ndim != 2 or not values.is_floating_point():
        said = (
            f"{list(values.shape)} {values.dtype}" if isinstance(values, Tensor) else type(values)
        )
        raise DataInvalid(f"{name}: {said}; needed is a float tensor [n, d]")
    if not values.numel():
        raise DataInvalid(f"{name}: shape {list(values.shape)}; at least one row is needed")
    odd = (~values.isfinite().all(1)).nonzero()
    if len(odd):
        raise DataInvalid(f"{name}: row {int(odd[0])} is not finite ({len(odd)} such rows)")
    return values.detach()


def ask(module: Answering, queries: Tensor, name: str) -> Tensor:
    """Answer [B, d] in blocks without gradients: [B, m].

    Raises:
        DataInvalid: it does not take such queries, or its answers are no finite rows.
    """
    place = place_of(module) if isinstance(module, nn.Module) else None
    parts = []
    with torch.no_grad():
        for block in queries.split(ASKED_ROWS):
            try:
                parts.append(module(block if place is None else block.to(place)))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, DataInvalid) as error:
                raise DataInvalid(
                    f"{name} does not take queries of width {queries.shape[1]}: {error}"
                ) from error
    if any(not isinstance(part, Tensor) or part.ndim != 2 for part in parts):
        raise DataInvalid(f"{name}: answers must be [B, m]")
    answers = torch.cat(parts)
    if len(answers) != len(queries):
        raise DataInvalid(f"{name}: {len(answers)} answers to {len(queries)} queries")
    return checked_rows(answers, f"answers of {name}")


def unfit(found: Tensor, wanted: Tensor) -> SpecInvalid:
    """Return the error of a student whose answers are of another width than the teacher's."""
    return SpecInvalid(
        f"transformer: its answers are {found.shape[1]} wide, the teacher's {wanted.shape[1]}",
        pointer="/transformer",
    )


def place_of(module: nn.Module) -> Tensor:
    """An empty tensor where the module computes, for ``Tensor.to``."""
    for value in (*module.parameters(), *module.buffers()):
        if value.is_floating_point():
            return torch.empty(0, dtype=value.dtype, device=value.device)
    return torch.empty(0)


@contextmanager
def in_mode(module: object, *, training: bool) -> Iterator[None]:
    """Put a module and all inside it into one mode; each gets its own back."""
    if not isinstance(module, nn.Module):
        yield
        return
    before = {part: part.training for part in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for part, was in before.items():
            part.training = was
