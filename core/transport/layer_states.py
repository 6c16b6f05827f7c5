"""Paired rows of every layer of two models on some texts: what a layer map by CKA compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from core.errors import DataInvalid
from core.transport.pairs import Pair
from core.transport.sites import layer_of, sites
from core.transport.streams import first_device, normalised, reading, run_backbone, shape_of
from core.transport.tokens import Ints

ROWS = 2048
"""Paired at most: Grams of so many rows take 32 MiB a layer."""
Report = Callable[[float, float], None]


@torch.no_grad()
def layer_states(
    student: PreTrainedModel, teacher: PreTrainedModel, texts: Sequence[Pair], report: Report
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Run both models over the first texts until ROWS rows are paired.

    Args:
        student: in evaluation mode.
        teacher: likewise.
        texts: in a fixed order; their last rows may be left out.
        report: rows done and wanted.

    Returns:
        By layer the rows before the attention block, [n, d_s] and [n, d_t] float32, on the CPU.

    Raises:
        DataInvalid: the texts have fewer than two pairs.
    """
    mine: dict[int, list[Tensor]] = {}
    theirs: dict[int, list[Tensor]] = {}
    left = ROWS
    for text in texts:
        rows = min(left, len(text.alignment))
        if rows:
            of = text.alignment
            _read(student, text.student.ids, of.student[:rows], mine)
            _read(teacher, text.teacher.ids, of.teacher[:rows], theirs)
        left -= rows
        report(ROWS - left, ROWS)
        if not left:
            break
    if ROWS - left < 2:
        raise DataInvalid(f"layer_map 'cka': the texts have {ROWS - left} pairs of tokens")
    joined = ({layer: torch.cat(parts) for layer, parts in of.items()} for of in (mine, theirs))
    return next(joined), next(joined)


def _read(model: PreTrainedModel, ids: Ints, rows: Ints, into: dict[int, list[Tensor]]) -> None:
    kept = torch.from_numpy(rows)

    def see(site: str, stream: Tensor, eps: float) -> None:
        layer = layer_of(site)
        if layer is not None:
            taken = stream[0].index_select(0, kept.to(stream.device))
            into.setdefault(layer, []).append(normalised(taken, eps).float().cpu())

    wanted = [site for site in sites(shape_of(model)) if site.startswith("attention.")]
    with reading(model, stream=see, only=wanted):
        run_backbone(model, torch.from_numpy(ids)[None].to(first_device(model)))
