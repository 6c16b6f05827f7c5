"""Forward passes of two models over the same texts, summed into moments while they run.

The student runs first and its paired rows are kept as it computed them; the teacher's are used up
site by site as they come. So memory is that of both models, the sums and one batch's rows of the
student (``memory.moments_bytes``, ``memory.kept_bytes``), however many texts there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from core.errors import DataInvalid
from core.specs.transport import Capture, Permute
from core.transport.moments import (
    Captured,
    add_activations,
    add_maps,
    add_rows,
    mirror,
)
from core.transport.pairs import Batch, Pair, make_batch, plan_batches
from core.transport.sites import sites, teacher_site
from core.transport.streams import (
    first_device,
    lengths,
    normalised,
    reading,
    run_backbone,
    shape_of,
)

Report = Callable[[float, float], None]


class Keep(Protocol):
    """Where paired rows go that are kept: see ``states.StateWriter``."""

    def __call__(self, site: str, start: int, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Take rows start, start + 1, ... of a site: x [P, d_s], y [P, d_t], weight [P]."""


def capture(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    pairs: Sequence[Pair],
    *,
    options: Capture,
    layer_map: Sequence[int],
    permute: Permute | None,
    report: Report,
    keep: Keep | None = None,
) -> Captured:
    """Run both models over the texts and sum the moments of their paired rows at every site.

    Rows are x / sqrt(mean(x^2) + eps). A row whose residual stream, before the norm, is in either
    model longer than ``drop_massive`` times the median of its text's paired rows counts 0 at that
    site (the length beside a span average is that of its last row). With ``token_weights: text``
    the rows of a text that are left count 1 together. Products are of at most 4,096 rows in
    float32, on the student's first device, where the sums are kept in float64.

    Args:
        student: in evaluation mode; with eager attention where heads are permuted.
        teacher: likewise.
        pairs: the texts, as ``pairs.pair`` gives them.
        options: ``batch_tokens``, ``drop_massive``, ``token_weights``.
        layer_map: [layers of the student], the teacher's layer beside each.
        permute: whose statistics are summed too; None: none.
        report: tokens done and to do.
        keep: is given every paired row, where they are wanted.

    Raises:
        DataInvalid: no text has a paired row, or a model's stream is not finite.
    """
    run = _Run(student, teacher, options, tuple(layer_map), permute)
    batches = [
        make_batch(pairs, numbers)
        for numbers in plan_batches(pairs, batch_tokens=options.batch_tokens)
    ]
    if not batches:
        raise DataInvalid(f"{len(pairs)} texts: none has tokens of both models that are paired")
    todo, done, rows = sum(batch.tokens for batch in batches), 0, 0
    for batch in batches:

        def progress(share: float, done: int = done, size: int = batch.tokens) -> None:
            report(done + share * size, todo)

        _Batch(run, batch, pairs, progress, keep, rows).through()
        done, rows = done + batch.tokens, rows + len(batch)
    for moments in run.sums.sites.values():
        mirror(moments)
    run.sums.check_finite()
    report(todo, todo)
    return run.sums


class _Run:
    """What stays the same over all batches."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        options: Capture,
        layer_map: tuple[int, ...],
        permute: Permute | None,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.options, self.device = options, first_device(student)
        shape, other = shape_of(student), shape_of(teacher)
        if len(layer_map) != shape.layers or not all(0 <= at < other.layers for at in layer_map):
            raise ValueError(
                f"layer_map {list(layer_map)}; needed {shape.layers} numbers below {other.layers}"
            )
        self.sums = Captured.zeros(shape, other, permute=permute, device=self.device)
        self.sites = sites(shape)
        self.beside: dict[str, list[str]] = {}
        """The student's sites beside each of the teacher's: depths may differ."""
        for site in self.sites:
            self.beside.setdefault(teacher_site(site, layer_map), []).append(site)
        self.layers_beside: dict[int, list[int]] = {}
        for layer in {**self.sums.neurons, **self.sums.heads}:
            self.layers_beside.setdefault(layer_map[layer], []).append(layer)
        # A site sees the stream twice, once in each model.
        self.steps = len(self.sites) + len(self.beside)


class _Batch:
    """One batch on its way through both models."""

    def __init__(
        self,
        run: _Run,
        batch: Batch,
        pairs: Sequence[Pair],
        progress: Callable[[float], None],
        keep: Keep | None,
        start: int,
    ) -> None:
        self.run, self.batch, self.progress = run, batch, progress
        self.keep, self.start = keep, start
        self.texts = [pairs[number] for number in batch.texts]
        self.table = Table(batch.counts, run.device)
        self.rows: dict[str, tuple[Tensor, Tensor, float]] = {}
        """By site: the student's paired rows before the norm, their lengths, eps."""
        self.activations: dict[int, Tensor] = {}
        self.maps: dict[int, list[Tensor]] = {}
        self.weights: dict[str, Tensor] = {}
        self.steps = 0

    def through(self) -> None:
        """Run both models."""
        run = self.run
        with reading(
            run.student,
            stream=self._student_stream,
            maps=self._student_maps if run.sums.heads else None,
            activations=self._student_activations if run.sums.neurons else None,
            layers=sorted({**run.sums.neurons, **run.sums.heads}),
        ):
            run_backbone(run.student, self.batch.student_ids.to(first_device(run.student)))
        with reading(
            run.teacher,
            stream=self._teacher_stream,
            only=run.beside,
            maps=self._teacher_maps if run.sums.heads else None,
            activations=self._teacher_activations if run.sums.neurons else None,
            layers=sorted(run.layers_beside),
        ):
            run_backbone(run.teacher, self.batch.teacher_ids.to(first_device(run.teacher)))

    def _step(self) -> None:
        self.steps += 1
        self.progress(self.steps / self.run.steps)

    def _take(self, stream: Tensor, rows: Tensor) -> Tensor:
        """Return some rows of [B, T, d], a copy on the device where sums are kept."""
        taken = stream.flatten(0, 1).index_select(0, rows.to(stream.device))
        return taken.to(self.run.device)

    def _student_stream(self, site: str, stream: Tensor, eps: float) -> None:
        rows = self._take(stream, self.batch.student_rows)
        self.rows[site] = rows, lengths(rows), eps
        self._step()

    def _student_activations(self, layer: int, given: Tensor) -> None:
        self.activations[layer] = self._take(given, self.batch.student_rows)

    def _student_maps(self, layer: int, maps: Tensor) -> None:
        found = []
        for text, whole in zip(self.texts, maps, strict=True):
            rows = torch.from_numpy(text.alignment.student).to(maps.device)
            found.append(whole[:, rows][:, :, rows].to(self.run.device))
        self.maps[layer] = found

    def _teacher_rows(self, stream: Tensor, eps: float | None) -> Tensor:
        """Return the teacher's paired rows [P, d], normed where there is an eps."""

        def normed(rows: Tensor) -> Tensor:
            return rows if eps is None else normalised(rows, eps)

        if self.batch.spans is None:
            return normed(self._take(stream, self.batch.teacher_rows))
        rows, sizes = self.batch.spans
        each = normed(self._take(stream, rows))
        return torch.segment_reduce(each, "mean", lengths=sizes.to(each.device), axis=0)

    def _teacher_stream(self, site: str, stream: Tensor, eps: float) -> None:
        beside = self.run.beside[site]
        length = lengths(self._take(stream, self.batch.teacher_rows))
        whole = self._teacher_rows(stream, eps)
        for ours in beside:
            rows, ours_length, ours_eps = self.rows.pop(ours)
            weight = self.table.weights([ours_length, length], self.run.options)
            self.weights[ours] = weight
            # Multiplying scales rows in place, so that only the last may have the teacher's.
            y = whole if ours == beside[-1] else whole.clone()
            x = normalised(rows, ours_eps)
            if self.keep is not None:
                self.keep(ours, self.start, x, y, weight)
            add_rows(self.run.sums.sites[ours], x, y, weight.to(x.dtype))
        self._step()

    def _teacher_activations(self, layer: int, given: Tensor) -> None:
        whole = self._teacher_rows(given, None)
        for ours in self.run.layers_beside[layer]:
            x = self.activations.pop(ours)
            wide = torch.promote_types(x.dtype, torch.float32)
            add_activations(
                self.run.sums.neurons[ours],
                x.to(wide),
                whole.to(wide, copy=True),
                self.weights[f"mlp.{ours}"].to(wide),
            )

    def _teacher_maps(self, layer: int, maps: Tensor) -> None:
        found = []
        for text, whole in zip(self.texts, maps, strict=True):
            rows = torch.from_numpy(text.alignment.teacher).to(maps.device)
            keys = text.teacher_keys().to(maps)
            asked = whole[:, rows, : len(keys)] @ keys
            found.append(asked.to(self.run.device))
        for ours in self.run.layers_beside[layer]:
            weights = self.weights[f"attention.{ours}"].split(self.batch.counts)
            for x, y, weight in zip(self.maps.pop(ours), found, weights, strict=True):
                wide = torch.promote_types(x.dtype, torch.float32)
                add_maps(self.run.sums.heads[ours], x.to(wide), y.to(wide), weight.to(wide))


class Table:
    """A batch's rows laid out text by text, for what is decided within a text."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        """Take how many paired rows [B] each text has; none is 0."""
        size = torch.tensor(counts, device=device)
        self.filled = torch.arange(max(counts), device=device) < size[:, None]
        """[B, P_max], whether there is a row."""
        self.text = torch.repeat_interleave(torch.arange(len(counts), device=device), size)
        """[P], the text of each row."""
        self.middle = (size - 1) // 2

    def median(self, values: Tensor) -> Tensor:
        """Return per row [P] the (lower) median of its text's values [P]."""
        table = torch.full(self.filled.shape, torch.inf, dtype=values.dtype, device=values.device)
        table[self.filled] = values
        found = table.sort(dim=1).values.gather(1, self.middle[:, None])
        return found[self.text, 0]

    def weights(self, rows: Sequence[Tensor], options: Capture) -> Tensor:
        """Return what each row counts [P], float32 or wider.

        Args:
            rows: lengths of the residual stream [P], in each model.
            options: ``drop_massive``, ``token_weights``.
        """
        kept = torch.ones_like(rows[0])
        if options.drop_massive is not None:
            for length in rows:
                kept = kept * (length <= options.drop_massive * self.median(length))
        if options.token_weights == "token":
            return kept
        table = torch.zeros(self.filled.shape, dtype=kept.dtype, device=kept.device)
        table[self.filled] = kept
        return kept / table.sum(1).clamp(min=1)[self.text]
