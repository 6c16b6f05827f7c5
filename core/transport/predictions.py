"""What two models predict for the same texts: surprisal, KL, agreement; logits block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from core.transport.memory import BLOCK_LOGITS
from core.transport.scores import TokenScores
from core.transport.tokens import Encoded, Ints


@dataclass(frozen=True)
class Predictions:
    """Rows that predict a token each, N of them, in the order of the texts."""

    head: nn.Module
    """From the final states to logits."""
    hidden: Tensor
    """[N, d], behind the final norm, as the head takes them."""
    ids: Tensor
    """[N] int64, the tokens that came."""
    texts: list[int]
    """[N], the number of each row's text."""


def scored(of: Encoded, other: Encoded) -> tuple[Ints, int]:
    """Say which tokens of a text are judged, and how many characters they are.

    Only characters that both models predict count, so that surprisal by character compares them:
    not those of a first token with nothing before it, nor those behind where either text was cut.

    Args:
        of: the text as this model reads it.
        other: as the other one does.

    Returns:
        Positions [N] of the tokens, each >= 1, and the characters they cover.
    """
    first = max(_unpredicted(of), _unpredicted(other))
    last = min(int(of.ends[of.counts].max()), int(other.ends[other.counts].max()))
    found = of.counts & (of.starts >= first) & (of.ends <= last)
    found[0] = False
    positions: Ints = np.flatnonzero(found).astype(np.int64)
    if not len(positions):
        return positions, 0
    begins = max(first, int(of.ends[positions[0] - 1]), 0)
    return positions, int(of.ends[positions[-1]]) - begins


def _unpredicted(of: Encoded) -> int:
    return int(of.ends[0]) if of.counts[0] else 0


def score_tokens(scores: TokenScores, own: Predictions) -> None:
    """Add the surprisal of every row's token, in nats."""
    for rows, logits in _blocks(own):
        _add_nats(scores, own, rows, functional.log_softmax(logits, -1))


def compare_tokens(
    scores: TokenScores,
    teacher_scores: TokenScores,
    own: Predictions,
    teacher: Predictions,
    *,
    shared: int,
) -> None:
    """Add both models' surprisal, and KL(teacher || student) and agreement of the likeliest id.

    Args:
        scores: of the student, gets KL and agreement too.
        teacher_scores: of the teacher.
        own: the student's rows.
        teacher: the teacher's, of the very same tokens.
        shared: ids 0 .. shared - 1 mean the same in both; others are left out of KL and
            agreement, and what is left is normalised anew.
    """
    for (rows, mine), (_, theirs) in zip(
        _blocks(own, like=teacher), _blocks(teacher, like=own), strict=True
    ):
        _add_nats(scores, own, rows, functional.log_softmax(mine, -1))
        _add_nats(teacher_scores, teacher, rows, functional.log_softmax(theirs, -1))
        p = functional.log_softmax(theirs[:, :shared], -1)
        q = functional.log_softmax(mine[:, :shared].to(p), -1)
        kl = (p.exp() * (p - q)).sum(-1, dtype=torch.float64).tolist()
        agree = (p.argmax(-1) == q.argmax(-1)).tolist()
        for text, k, a in zip(own.texts[rows], kl, agree, strict=True):
            scores.add(text, kl=k, agree=a, compared=1)


def _blocks(of: Predictions, *, like: Predictions | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows and their logits [n, V], in float32 or wider.

    Args:
        of: whose.
        like: other predictions whose vocabulary must fit a block too.
    """
    vocabulary = max(_vocabulary(each.head) for each in (of, like) if each is not None)
    step = max(1, BLOCK_LOGITS // vocabulary)
    for start in range(0, len(of.ids), step):
        rows = slice(start, start + step)
        logits: Tensor = of.head(of.hidden[rows])
        yield rows, logits.to(torch.promote_types(logits.dtype, torch.float32))


def _vocabulary(head: nn.Module) -> int:
    return int(head.out_features)  # type: ignore[arg-type]  # a module's attributes have no types


def _add_nats(scores: TokenScores, of: Predictions, rows: slice, logs: Tensor) -> None:
    ids = of.ids[rows].to(logs.device)
    nats = -logs.gather(-1, ids[:, None])[:, 0].double()
    for text, value in zip(of.texts[rows], nats.tolist(), strict=True):
        scores.add(text, tokens=1, nats=value)


@dataclass(frozen=True)
class LogitsChange:
    """How far a fold's logits are from those of the model it was made from."""

    largest_change: float
    """Of any logit of any token."""
    largest_logit: float
    """Of the old model, without its sign."""
    kl: float
    """KL(old || new), mean over tokens, in nats."""
    tokens: int

    @property
    def relative(self) -> float:
        """The largest change over the largest logit."""
        return self.largest_change / self.largest_logit if self.largest_logit else 0.0


@torch.no_grad()
def logits_change(
    old: PreTrainedModel, new: PreTrainedModel, texts: Sequence[Ints], *, device: torch.device
) -> LogitsChange:
    """Compare what two models of one tokenizer say, text by text: every logit of every token.

    Args:
        old: the model that was folded.
        new: the fold.
        texts: ids [T] each, at least one.
        device: where ids go for both.
    """
    change = largest = kl = 0.0
    tokens = 0
    for ids in texts:
        asked = torch.from_numpy(ids)[None].to(device)
        states = [model.base_model(input_ids=asked, use_cache=False)[0][0] for model in (old, new)]
        target = asked[0].to(states[0].device)
        a, b = (
            Predictions(head_of(model), state, target, [])
            for model, state in zip((old, new), states, strict=True)
        )
        for (_, before), (_, after) in zip(_blocks(a), _blocks(b), strict=True):
            after = after.to(before)
            change = max(change, float((after - before).abs().max()))
            largest = max(largest, float(before.abs().max()))
            p, q = functional.log_softmax(before, -1), functional.log_softmax(after, -1)
            kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        tokens += len(ids)
    return LogitsChange(change, largest, kl / tokens, tokens)


def head_of(model: PreTrainedModel) -> nn.Module:
    """Return what makes logits of a model's final states."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise TypeError(f"{type(model).__name__} has no head")
    return head
