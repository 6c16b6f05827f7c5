"""Teacher against student per batch: from how many heads on the transformer is the faster one.

Document 001 claims some 27 heads for batches of 32 and more than 400 for single queries. Here both
are timed in turns at 18, 64, 400 and 4096 heads of width 384, twice over.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from bench._report import Figure, options, print_table, verdict
from core.distill.latency import Crossover, Measurement, crossover, measure_crossover
from core.distill.latency_report import advise, draw_crossover
from core.distill.lda import MultiHeadLDA

WIDTH, CLUSTERS, BATCHES, THREADS = 384, (18, 64, 400, 4096), (1, 32, 4096), 2
SECONDS, ROUNDS = 0.5, 2
TEMPERATURE = 0.1
AGREE_BAR, REPEAT_BAR = 4.0, 2.0


def main() -> int:
    """Measure twice; compare the crossover of large batches with the one counted in operations."""
    parser = options(__doc__)
    parser.add_argument(
        "--draw", metavar="PNG", type=Path, help="draw both sides against the heads"
    )
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    rounds = [_measured() for _ in range(ROUNDS)]
    print(advise(rounds[-1]))
    if args.draw:
        draw_crossover(args.draw, rounds[-1])
    found = [crossover(each) for each in rounds]
    print_table(
        ["batch", "crossover", "and again", "by operations"],
        [
            (one.batch, one.words, other.words, f"{one.flops_heads or 0:.0f}")
            for one, other in zip(*found, strict=True)
        ],
    )
    largest = [next(each for each in one if each.batch == max(BATCHES)) for one in found]
    return verdict(
        "latency_crossover",
        Figure(
            f"crossover of batches of {max(BATCHES)} off the counted one, times",
            max(_apart(each) for each in largest),
            AGREE_BAR,
            at_most=True,
        ),
        Figure(
            f"medians of batches of {max(BATCHES)} between rounds, times",
            _repeated(*rounds),
            REPEAT_BAR,
            at_most=True,
        ),
        check=args.check,
    )


def _measured() -> list[Measurement]:
    return measure_crossover(
        CLUSTERS,
        WIDTH,
        BATCHES,
        seconds=SECONDS,
        teacher_for=lambda c, a: MultiHeadLDA(c, a, temperature=TEMPERATURE),
    )


def _apart(found: Crossover) -> float:
    """How many times the measured crossover is more or less than the counted one."""
    if found.heads is None or found.flops_heads is None:
        return float("nan")
    return max(found.heads / found.flops_heads, found.flops_heads / found.heads)


def _repeated(one: list[Measurement], other: list[Measurement]) -> float:
    """The largest ratio of a median to that of the other round, among the largest batches."""
    ratios = [
        mine.p50_ms / theirs.p50_ms
        for a, b in zip(one, other, strict=True)
        if a.batch == max(BATCHES)
        for mine, theirs in ((a.lda, b.lda), (a.transformer, b.transformer))
    ]
    return max(max(ratio, 1 / ratio) for ratio in ratios)


if __name__ == "__main__":
    sys.exit(main())
