"""Texts as two models read them: which of their rows stand together, and batches of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.specs.transport import Capture
from core.transport.alignment import Alignment, align, columns
from core.transport.tokens import Encoded, Ints


@dataclass(frozen=True)
class Pair:
    """One text, cut by both tokenizers."""

    student: Encoded
    teacher: Encoded
    alignment: Alignment
    """The rows that count."""

    @property
    def tokens(self) -> int:
        """Of the longer of both, with the system prompt."""
        return max(len(self.student.ids), len(self.teacher.ids))

    def teacher_keys(self) -> Tensor:
        """Return [T_t, P] float32: 1 where the teacher's token ends in the student's of that pair.

        Attention maps of the teacher times this are attention to the student's paired tokens.
        """
        place = np.full(len(self.student.ids), -1, dtype=np.int64)
        place[self.alignment.student] = np.arange(len(self.alignment))
        inside = columns(self.student, self.teacher)
        pair = np.where(inside >= 0, place[inside], -1)
        found = torch.zeros(len(inside), len(self.alignment))
        rows = np.flatnonzero(pair >= 0)
        found[torch.from_numpy(rows), torch.from_numpy(pair[rows])] = 1.0
        return found


def pair(student: Encoded, teacher: Encoded, options: Capture) -> Pair:
    """Align one text's tokens and leave out those that are of no text.

    With ``drop_bos`` whatever stands first in either model is left out, be it a special token or
    the text's own first. Without it, special first tokens of both are a pair too.

    Args:
        student: of ``tokens.encode``.
        teacher: of the same text.
        options: of them ``alignment`` and ``drop_bos``.
    """
    found = align(student, teacher, how=options.alignment)
    if options.drop_bos:
        first = found.teacher if found.teacher_start is None else found.teacher_start
        return Pair(student, teacher, _rows(found, (found.student > 0) & (first > 0)))
    if student.special[0] and teacher.special[0]:
        found = _with_first(found)
    return Pair(student, teacher, found)


def _rows(of: Alignment, kept: np.ndarray) -> Alignment:
    if of.teacher_start is None or of.teacher_stop is None:
        return Alignment(of.student[kept], of.teacher[kept])
    spans = of.teacher_start[kept], of.teacher_stop[kept]
    return Alignment(of.student[kept], of.teacher[kept], *spans)


def _with_first(of: Alignment) -> Alignment:
    def before(column: Ints, first: int) -> Ints:
        return np.concatenate([np.asarray([first], dtype=np.int64), column])

    if of.teacher_start is None or of.teacher_stop is None:
        return Alignment(before(of.student, 0), before(of.teacher, 0))
    spans = before(of.teacher_start, 0), before(of.teacher_stop, 1)
    return Alignment(before(of.student, 0), before(of.teacher, 0), *spans)


@dataclass(frozen=True)
class Batch:
    """Texts that are computed at once, padded at their ends; P paired rows of B texts."""

    texts: tuple[int, ...]
    """Numbers of the texts, [B]."""
    counts: tuple[int, ...]
    """[B] paired rows of each text; they stand together, text after text."""
    student_ids: Tensor
    """[B, T_s] int64, padded with 0: attention looks backwards, so no real token sees them."""
    teacher_ids: Tensor
    """[B, T_t] int64"""
    student_rows: Tensor
    """[P] int64, rows of the student's stream as [B T_s, d]."""
    teacher_rows: Tensor
    """[P] int64, rows of the teacher's stream as [B T_t, d]."""
    spans: tuple[Tensor, Tensor] | None
    """Of span_average: rows of the teacher [Q] int64, and how many [P] int64 make up each pair."""

    def __len__(self) -> int:
        return len(self.student_rows)

    @property
    def tokens(self) -> int:
        """Tokens that both models compute, padding among them."""
        return self.student_ids.numel() + self.teacher_ids.numel()


def plan_batches(pairs: Sequence[Pair], *, batch_tokens: int) -> list[list[int]]:
    """Put texts of like length together: the numbers of each batch's texts.

    Longest first, so that what memory cannot hold shows at once; texts without a paired row are
    left out. Equal arguments give equal batches.

    Args:
        pairs: the texts.
        batch_tokens: most tokens of a batch in either model, padding counted; a text that is
            longer than that is a batch of its own.
    """
    order = sorted(
        (number for number, text in enumerate(pairs) if len(text.alignment)),
        key=lambda number: (-pairs[number].tokens, number),
    )
    found: list[list[int]] = []
    for number in order:
        last = found[-1] if found else None
        if last and (len(last) + 1) * pairs[last[0]].tokens <= batch_tokens:
            last.append(number)
        else:
            found.append([number])
    return found


def make_batch(pairs: Sequence[Pair], numbers: Sequence[int]) -> Batch:
    """Pad some texts and place their paired rows in the padded whole."""
    of = [pairs[number] for number in numbers]
    student_ids = _padded([text.student.ids for text in of])
    teacher_ids = _padded([text.teacher.ids for text in of])
    student = [text.alignment.student + at * student_ids.shape[1] for at, text in enumerate(of)]
    width = teacher_ids.shape[1]
    teacher = [text.alignment.teacher + at * width for at, text in enumerate(of)]
    return Batch(
        texts=tuple(numbers),
        counts=tuple(len(text.alignment) for text in of),
        student_ids=student_ids,
        teacher_ids=teacher_ids,
        student_rows=torch.from_numpy(np.concatenate(student)),
        teacher_rows=torch.from_numpy(np.concatenate(teacher)),
        spans=_spans(of, width),
    )


def _padded(ids: Sequence[Ints]) -> Tensor:
    whole = np.zeros((len(ids), max(map(len, ids))), dtype=np.int64)
    for row, of in zip(whole, ids, strict=True):
        row[: len(of)] = of
    return torch.from_numpy(whole)


def _spans(of: Sequence[Pair], width: int) -> tuple[Tensor, Tensor] | None:
    starts, sizes = [], []
    for at, text in enumerate(of):
        start, stop = text.alignment.teacher_start, text.alignment.teacher_stop
        if start is None or stop is None:
            return None
        starts.append(start + at * width)
        sizes.append(stop - start)
    size = np.concatenate(sizes)
    # Rows start, start + 1, .. of each span behind each other.
    before = np.cumsum(size) - size
    rows = np.arange(size.sum()) + np.repeat(np.concatenate(starts) - before, size)
    return torch.from_numpy(rows), torch.from_numpy(size)
