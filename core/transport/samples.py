"""Some paired rows of every layer of two models, held at once: what layers are compared by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from core.errors import DataInvalid
from core.transport.capture import Report
from core.transport.pairs import Pair, make_batch, plan_batches
from core.transport.sites import layer_of
from core.transport.streams import first_device, shape_of, states

Layers = dict[int, Tensor]


def sample_layers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    pairs: Sequence[Pair],
    *,
    rows: int,
    batch_tokens: int,
    report: Report,
) -> tuple[Layers, Layers]:
    """Read the streams that enter the layers (sites ``attention.l``) on the first texts.

    Texts are taken in their order until there are ``rows`` paired rows. Of a span average the last
    row stands for all.

    Args:
        student: in evaluation mode.
        teacher: likewise.
        pairs: the texts.
        rows: most rows; fewer where the texts have no more.
        batch_tokens: most tokens computed at once.
        report: texts done and to do.

    Returns:
        By layer [n, d_s] of the student, and by layer [n, d_t] of the teacher, float32 on the CPU.

    Raises:
        DataInvalid: fewer than two paired rows.
    """
    taken: list[Pair] = []
    for text in pairs:
        if sum(len(before.alignment) for before in taken) < rows:
            taken.append(text)
    if sum(len(text.alignment) for text in taken) < 2:
        raise DataInvalid(f"{len(pairs)} texts: fewer than 2 tokens are paired; layers need some")
    found: tuple[dict[int, list[Tensor]], ...] = ({}, {})
    plan, done = plan_batches(taken, batch_tokens=batch_tokens), 0
    for numbers in plan:
        batch = make_batch(taken, numbers)
        for model, ids, at, into in (
            (student, batch.student_ids, batch.student_rows, found[0]),
            (teacher, batch.teacher_ids, batch.teacher_rows, found[1]),
        ):
            for layer, part in _entering(model, ids, at).items():
                into.setdefault(layer, []).append(part)
        done += len(numbers)
        report(done, len(taken))
    ours, theirs = ({layer: torch.cat(parts)[:rows] for layer, parts in of.items()} for of in found)
    return ours, theirs


def _entering(model: PreTrainedModel, ids: Tensor, at: Tensor) -> Layers:
    layers = range(shape_of(model).layers)
    read = states(
        model, ids.to(first_device(model)), only=[f"attention.{layer}" for layer in layers]
    )
    return {
        layer: rows.flatten(0, 1).index_select(0, at.to(rows.device)).float().cpu()
        for site, rows in read.items()
        if (layer := layer_of(site)) is not None
    }
