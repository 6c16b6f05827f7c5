"""Which of the teacher's tokens stands beside each of the student's, by the characters they read.

A state has read all characters up to its token's end, and no more. So the partner of a student's
token is the teacher's first token that has read at least as far (document 002, section 3, averages
over the span instead; ``span_average`` does that). Where several tokens make up one character,
as bytes do, the tokenizers tell no more than the character: its pieces count as equal parts of it,
so that the last piece, which completes it, stands beside the last, and equal tokenisations are
aligned token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from core.transport.tokens import Encoded, Ints

How = Literal["last", "span_average"]


@dataclass(frozen=True)
class Alignment:
    """P pairs of rows, in the order of the text; a token with no partner has none."""

    student: Ints
    """[P] the student's tokens, rising."""
    teacher: Ints
    """[P] for each the teacher's first token that has read as far; never falling."""
    teacher_start: Ints | None = None
    """[P], of ``span_average`` alone: the mean of rows teacher_start .. teacher_stop - 1."""
    teacher_stop: Ints | None = None
    """[P], ``teacher + 1``."""

    def __len__(self) -> int:
        return len(self.student)


def align(student: Encoded, teacher: Encoded, *, how: How) -> Alignment:
    """Pair the tokens of one text, cut by two tokenizers behind the same system prompt.

    Only tokens of the text proper are paired. A student's token is left out where the teacher was
    cut before its end, or where the teacher's token reaches back into the system prompt.

    Args:
        student: of ``tokens.encode``.
        teacher: of the same text.
        how: ``last``: the state at the first token that has read as far. ``span_average``: the
            mean over all tokens that share a character with the student's, which mixes in states
            that have read less.
    """
    read, by_teacher = _reached(student), _reached(teacher)
    mine, theirs = np.flatnonzero(student.counts), np.flatnonzero(teacher.counts)
    ends, teacher_ends = read[mine], by_teacher[theirs]
    partner = np.searchsorted(teacher_ends, ends, side="left")
    kept = partner < len(theirs)
    partner, mine = partner[kept], mine[kept]
    if how == "last":
        return Alignment(mine, theirs[partner])
    # A token's characters begin where those of the one before it ended; the first's, at the text.
    before = np.concatenate([[-np.inf], read[:-1]])[mine]
    first = np.searchsorted(teacher_ends, np.maximum(before, 0.0), side="right")
    return Alignment(mine, theirs[partner], theirs[first], theirs[partner] + 1)


def columns(student: Encoded, teacher: Encoded) -> Ints:
    """Return for each of the teacher's tokens the student's in which it ends: [T_t], -1: none.

    Sums of the teacher's attention over equal entries are attention to the student's tokens. The
    system prompt takes part; special tokens before it stand beside those of the other, in order.
    """
    found: Ints = np.full(len(teacher.ids), -1, dtype=np.int64)
    mine, theirs = np.flatnonzero(~student.special), np.flatnonzero(~teacher.special)
    inside = np.searchsorted(_reached(student)[mine], _reached(teacher)[theirs], side="left")
    kept = inside < len(mine)
    found[theirs[kept]] = mine[inside[kept]]
    leading = min(_leading(student), _leading(teacher))
    found[:leading] = np.arange(leading)
    return found


def _leading(of: Encoded) -> int:
    """Count the special tokens in front."""
    return int(np.argmin(of.special)) if not of.special.all() else len(of.special)


def _reached(of: Encoded) -> NDArray[np.float64]:
    """Return up to where each token has read [T]: n tokens with one end share its character.

    Special tokens get what the token before them has. Shares are compared exactly: j / n of one
    tokenizer and the equal i / m of the other are the same float64.
    """
    plain = np.flatnonzero(~of.special)
    ends = of.ends[plain]
    begins = np.concatenate([[True], ends[1:] != ends[:-1]])[: len(ends)]
    run = np.cumsum(begins) - 1
    rank = np.arange(len(ends)) - np.flatnonzero(begins)[run] + 1
    reached = of.ends.astype(np.float64)
    reached[plain] = ends - 1 + rank / np.bincount(run, minlength=1)[run]
    return reached
