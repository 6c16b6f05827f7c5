"""What a transport would take, from shapes and options alone, before any model is loaded.

Operations and bytes are counted; seconds are those over the rates below, which are assumptions
about one large GPU and are told with the answer. Torch-free: plans are made in the API.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from core.architectures.shape import ITEM_BYTES, ModelShape
from core.specs.transport import Capture, Evaluate, Fold, Permute, Rotate
from core.transport.memory import (
    moments_bytes,
    permutable,
    permuted_layers,
    rotation_bytes,
    statistics_bytes,
    widened,
)
from core.transport.sites import groups, sites

CHARACTERS_PER_TOKEN = 4.0
"""Of English text under vocabularies of 30,000 and more; other scripts take more tokens."""


@dataclass(frozen=True)
class Rates:
    """What a device is taken to do, per second."""

    forward: float = 3e14
    """Operations of 16-bit matrix products."""
    single: float = 3e13
    """Of products in float32 without TF32."""
    double: float = 2e13
    """Of float64, decompositions among them."""
    bytes: float = 2e9
    """Read from or written to the store."""

    def told(self) -> dict[str, str]:
        """Return them in words."""
        return {
            "forward passes": f"{self.forward:.0e} operations/s in 16 bits",
            "moments": f"{self.single:.0e} operations/s in float32",
            "solves and folds": f"{self.double:.0e} operations/s in float64",
            "files": f"{self.bytes:.0e} bytes/s",
        }


ONE_GPU = Rates()


@dataclass(frozen=True)
class Texts:
    """How many texts there are and how long they are, in tokens, the system prompt included."""

    train: int
    held_out: int
    tokens: float
    """Of one, on average, by either tokenizer."""

    @classmethod
    def of(cls, meta: Mapping[str, int], *, capture: Capture, evaluate: Evaluate) -> Texts:
        """Guess from the meta of ``prompts``: characters over CHARACTERS_PER_TOKEN."""
        held_out = meta["held_out"] + round(meta["unsplit"] * evaluate.held_out)
        characters = meta["characters"] / meta["prompts"] + len(capture.system_prompt)
        tokens = min(float(capture.max_tokens), characters / CHARACTERS_PER_TOKEN + 1)
        return cls(max(1, meta["prompts"] - held_out), max(1, held_out), tokens)


@dataclass(frozen=True)
class StageCost:
    """Of all chunks of a stage together."""

    stage: str
    forward_flops: float = 0.0
    single_flops: float = 0.0
    double_flops: float = 0.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0

    @property
    def operations(self) -> float:
        """All of them, of whatever precision."""
        return self.forward_flops + self.single_flops + self.double_flops

    def seconds(self, rates: Rates) -> float:
        """Return the time on one device."""
        return (
            self.forward_flops / rates.forward
            + self.single_flops / rates.single
            + self.double_flops / rates.double
            + (self.read_bytes + self.written_bytes) / rates.bytes
        )


def backbone_parameters(shape: ModelShape) -> int:
    """Return the parameters that every token meets in the layers: no embedding, no head."""
    embeddings = shape.vocabulary * shape.width * (1 if shape.tied else 2)
    return shape.parameters - embeddings


def forward_flops(shape: ModelShape, *, tokens: float, length: float, head: bool) -> float:
    """Return the operations of a forward pass over ``tokens`` in texts of ``length`` each."""
    products = 2 * backbone_parameters(shape)
    causal = 2 * shape.layers * shape.heads * shape.head_dim * length
    logits = 2 * shape.vocabulary * shape.width if head else 0
    return tokens * (products + causal + logits)


def price(
    student: ModelShape,
    teacher: ModelShape,
    texts: Texts,
    *,
    capture: Capture,
    permute: Permute | None,
    rotate: Rotate,
    fold: Fold,
    evaluate: Evaluate,
) -> list[StageCost]:
    """Return the cost of each stage, in the order in which they run."""
    chunks = math.ceil(texts.train / capture.prompts_per_chunk)
    tokens = texts.train * texts.tokens
    s, t, pairs = student.width, teacher.width, len(sites(student))
    weights = student.size_bytes + teacher.size_bytes
    moments = moments_bytes(student, teacher)
    statistics = statistics_bytes(student, teacher, permute)
    matched = len(permuted_layers(permute, student.layers))
    neurons = permutable(student, teacher, permute)[0] * student.neurons * teacher.neurons
    parts = len(groups(student, tie=rotate.tie, stage_layers=rotate.stage_layers))
    wide = widened(student, teacher)
    growth = wide / s
    stored = student.parameters * growth * _item_bytes(student, fold)
    made = 1 + (permute is not None)
    return [
        StageCost(
            "capture",
            forward_flops=sum(
                forward_flops(shape, tokens=tokens, length=texts.tokens, head=False)
                for shape in (student, teacher)
            ),
            single_flops=2 * tokens * (pairs * (s * s + t * t + s * t) + matched * neurons),
            read_bytes=chunks * weights,
            written_bytes=chunks * (moments + statistics),
        ),
        StageCost("permute", read_bytes=chunks * statistics),
        StageCost(
            "rotate",
            # LAPACK: about 9 d^3 for a symmetric eigenproblem, 22 d^3 for all of an SVD.
            double_flops=parts * (9 * (s**3 + t**3) + 22 * wide**3),
            read_bytes=chunks * moments,
            written_bytes=float(parts * rotation_bytes(s, t, rotate)),
        ),
        StageCost(
            "fold",
            double_flops=2.0 * student.parameters * wide,
            read_bytes=made * student.size_bytes,
            written_bytes=stored + (made - 1) * student.size_bytes,
        ),
        _evaluation(student, teacher, texts, growth=growth, variants=len(evaluate.variants)),
    ]


def _evaluation(
    student: ModelShape, teacher: ModelShape, texts: Texts, *, growth: float, variants: int
) -> StageCost:
    """Every variant runs beside the teacher; a wider student has more to multiply."""
    tokens = texts.held_out * texts.tokens
    own = forward_flops(student, tokens=tokens, length=texts.tokens, head=True) * growth
    other = forward_flops(teacher, tokens=tokens, length=texts.tokens, head=True)
    return StageCost(
        "evaluate",
        forward_flops=variants * (own + other),
        read_bytes=variants * (student.size_bytes * growth + teacher.size_bytes),
    )


def _item_bytes(student: ModelShape, fold: Fold) -> int:
    return ITEM_BYTES[student.dtype if fold.dtype == "keep" else fold.dtype]
