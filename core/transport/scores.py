"""Sums over held-out rows and tokens: what an evaluation keeps while texts stream by.

Of a row its cosine is kept, and nothing as wide as the residual stream but one pair of sums a site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NATS_PER_BIT = math.log(2)


class SiteScores:
    """How near a student's rows are to the teacher's at one site, over any number of batches.

    D is the common width, ``max(d_student, d_teacher)``; rows come scaled to the RMS 1 over D
    coordinates, the narrower ones padded with zeros (``at_width``).
    """

    def __init__(
        self,
        texts: int,
        *,
        teacher_width: int,
        mean: Tensor | None = None,
        subspace: Tensor | None = None,
    ) -> None:
        """Start with no rows.

        Args:
            texts: how many there are; rows say theirs by its number.
            teacher_width: d_t; the teacher's rows are zero beyond.
            mean: [d_t], the teacher's mean row on training texts: the null that knows nothing of
                a row. None: not to be had.
            subspace: [d_t, k] orthonormal columns, the teacher's side of the shared subspace.
        """
        self._mean, self._subspace, self._width = mean, subspace, teacher_width
        self._cosines: list[Tensor] = []
        self._by_text = torch.zeros(2, texts, dtype=torch.float64)
        self._rows = self._shuffled = 0
        self._sums: dict[str, float] = {}
        self._channels: tuple[Tensor, Tensor] | None = None

    def add(
        self,
        x: Tensor,
        y: Tensor,
        *,
        rms: tuple[Tensor, Tensor],
        texts: Tensor,
        partner: Tensor,
    ) -> None:
        """Count aligned rows.

        Args:
            x: [P, D] float, the student's.
            y: [P, D] float, the teacher's.
            rms: two of [P]: of the streams themselves, before the norm; the student's first.
            texts: [P] int64, the number of each row's text.
            partner: [P] int64, whose student row each teacher row is shown as the shuffled null.
        """
        if not len(x):
            return
        cosines = _cosine(x, y)
        self._cosines.append(cosines.float().cpu())
        by_text = torch.stack([cosines, torch.ones_like(cosines)]).cpu()
        self._by_text.index_add_(1, texts.cpu(), by_text)
        self._rows += len(x)
        seen, own = x[:, : self._width], y[:, : self._width]
        if self._width < x.shape[1]:
            self._plus("seen", _cosine(seen, own).sum())
        if len(x) > 1:  # a row alone has no stranger
            self._plus("shuffled", _cosine(seen[partner], own).sum())
            self._shuffled += len(x)
        if self._mean is not None:
            mean = padded(self._mean, y.shape[1]).to(y)
            self._plus("mean_only", _cosine(mean.expand_as(y), y).sum())
        if self._subspace is not None:
            basis = padded(self._subspace.mT, y.shape[1]).mT.to(y)
            self._plus("subspace", _cosine(x @ basis, y @ basis).sum())
        own, teacher = (size.to(x.device).double() for size in rms)
        self._add_sizes(x, y, own, teacher, cosines)

    def _add_sizes(self, x: Tensor, y: Tensor, xs: Tensor, ys: Tensor, cosines: Tensor) -> None:
        squares = [row.double().square().sum(0).cpu() for row in (x, y)]
        if self._channels is None:
            self._channels = (torch.zeros_like(squares[0]), torch.zeros_like(squares[1]))
        for total, square in zip(self._channels, squares, strict=True):
            total += square
        self._plus("difference", (x.double() - y.double()).square().sum())
        self._plus("stream_x", xs.square().sum())
        self._plus("stream_y", ys.square().sum())
        self._plus("stream_xy", (xs * ys * cosines).sum())

    def _plus(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(value)

    @property
    def rows(self) -> int:
        """How many rows were counted."""
        return self._rows

    def by_text(self) -> Tensor:
        """Return [2, texts] float64: each text's sum of cosines, and its rows."""
        return self._by_text

    def result(self) -> dict[str, Any]:
        """Return the site's scores as JSON values; None where there is nothing to say.

        ``cosine`` is the mean over rows and ``p5`` its 5th percentile. ``seen`` is the mean cosine
        in the teacher's own coordinates, which differs where the student is wider: what it has
        beyond, no rotation can take away. ``shuffled``, also there, ``mean_only`` and ``subspace``
        are mean cosines too. ``difference_rms`` is the RMS of the rows' difference
        over the teacher's RMS (document 002, section 16.2); ``stream_rms_ratio`` and
        ``stream_difference_rms`` are of the streams before the norm, the student's RMS over the
        teacher's and the difference's over the teacher's; ``channel_rms_factor`` is the median over
        channels of the larger of two RMS over the smaller, None where half of the channels or more
        are zero on one side alone.
        """
        if not self._rows or self._channels is None:
            return {"rows": 0, **dict.fromkeys(RESULTS)}
        cosines = torch.cat(self._cosines).double()
        sums, n = dict(self._sums), self._rows
        ys = max(sums["stream_y"], 1e-300)
        streams = sums["stream_x"] + sums["stream_y"] - 2 * sums["stream_xy"]
        mean = float(cosines.mean())
        sums.setdefault("seen", mean * n)
        found = {
            "cosine": mean,
            "p5": float(torch.quantile(cosines, 0.05)) if n <= MOST_SORTED else _p5(cosines),
            **{
                name: sums[name] / n if name in sums else None
                for name in ("seen", "mean_only", "subspace")
            },
            "shuffled": sums["shuffled"] / self._shuffled if self._shuffled else None,
            "difference_rms": math.sqrt(
                sums["difference"] / max(float(self._channels[1].sum()), 1e-300)
            ),
            "stream_rms_ratio": math.sqrt(sums["stream_x"] / ys),
            "stream_difference_rms": math.sqrt(max(0.0, streams) / ys),
            "channel_rms_factor": _factor(*self._channels),
        }
        return {"rows": n, **found}


RESULTS = (
    "cosine",
    "p5",
    "seen",
    "shuffled",
    "mean_only",
    "subspace",
    "difference_rms",
    "stream_rms_ratio",
    "stream_difference_rms",
    "channel_rms_factor",
)
"""The names of a site's scores."""
MOST_SORTED = 1 << 24
"""Values that torch.quantile takes."""


def at_width(rows: Tensor, width: int, turn: Tensor | None = None) -> Tensor:
    """Bring normalised rows to the common width D and to the RMS 1 there.

    Args:
        rows: [P, d], of the RMS 1 over d coordinates.
        width: D >= d.
        turn: [d, D], ``rows @ turn`` is meant; None: zeros stand in the missing coordinates.
    """
    scaled = rows * math.sqrt(width / rows.shape[1])
    return padded(scaled, width) if turn is None else scaled @ turn.to(rows)


def padded(rows: Tensor, width: int) -> Tensor:
    """Fill the last axis up to ``width`` with zeros."""
    return functional.pad(rows, (0, width - rows.shape[-1]))


def strangers(rows: int, seed: int) -> Tensor:
    """Return [rows] int64, a random order in which no row has its own place, where two or more are.

    All rows are one cycle (Sattolo's permutations, drawn evenly).
    """
    cycle = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    partner = torch.empty(rows, dtype=torch.int64)
    partner[cycle] = cycle.roll(-1)
    return partner


class TokenScores:
    """Surprisal, and agreement with the teacher, over any number of tokens."""

    NAMES = ("tokens", "characters", "nats", "kl", "agree", "compared")

    def __init__(self, texts: int) -> None:
        """Start with no tokens; ``texts``: how many there are."""
        self._by_text = torch.zeros(len(self.NAMES), texts, dtype=torch.float64)

    def add(self, text: int, **sums: float) -> None:
        """Add to a text's sums: any of ``NAMES``; nats and KL in nats, the others counts."""
        for name, value in sums.items():
            self._by_text[self.NAMES.index(name), text] += value

    def result(self, texts: Sequence[int] | None = None) -> dict[str, Any]:
        """Return means as JSON values, over some texts or all.

        ``nats_per_token`` compares models of one tokenizer alone, ``bits_per_character`` any two;
        ``kl`` [nats per token] and ``top1_agreement`` are None where nothing could be compared.
        """
        sums = self._by_text if texts is None else self._by_text[:, list(texts)]
        of = dict(zip(self.NAMES, sums.sum(1).tolist(), strict=True))
        return {
            "tokens": int(of["tokens"]),
            "nats_per_token": _ratio(of["nats"], of["tokens"]),
            "bits_per_character": _ratio(of["nats"] / NATS_PER_BIT, of["characters"]),
            "kl": _ratio(of["kl"], of["compared"]),
            "top1_agreement": _ratio(of["agree"], of["compared"]),
        }


def mean_over_sites(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return every score's mean over the sites that have one; of channels the median.

    None where a site lacks it: a mean over other sites would compare what is not alike.
    """
    found: dict[str, Any] = {}
    for name in RESULTS:
        values = [scores[name] for scores in sites.values()]
        if not values or any(value is None for value in values):
            found[name] = None
        elif name == "channel_rms_factor":
            found[name] = float(torch.tensor(values, dtype=torch.float64).median())
        else:
            found[name] = math.fsum(values) / len(values)
    return found


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Return [P] float64; 0 where a row is 0."""
    dots, xs, ys = ((a * b).sum(-1, dtype=torch.float64) for a, b in ((x, y), (x, x), (y, y)))
    return dots / (xs * ys).sqrt().clamp(min=1e-300)


def _p5(values: Tensor) -> float:
    return float(values.kthvalue(max(1, round(0.05 * len(values)))).values)


def _factor(xs: Tensor, ys: Tensor) -> float | None:
    """Return the median over channels of the larger RMS over the smaller; of sums of squares."""
    alive = (xs > 0) | (ys > 0)
    if not alive.any():
        return None
    ratio = (xs[alive] / ys[alive]).sqrt()
    factor = float(torch.maximum(ratio, 1 / ratio).median())
    return factor if math.isfinite(factor) else None


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None
