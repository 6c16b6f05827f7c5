"""What a spec comes to over its inputs: which stages run, and on what. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping

from core.architectures.shape import ModelShape
from core.kinds._base import Input
from core.kinds._transport.spec import Spec
from core.specs.transport import Capture, Permute
from core.transport.sites import groups


class Plan:
    """What a spec comes to over its inputs; facts of their meta alone."""

    def __init__(self, spec: Spec, inputs: Mapping[str, Input]) -> None:
        self.spec, self.inputs = spec, inputs
        self.capture = spec.capture or Capture()
        """What is asked for; what was frozen is known to ``Given.capture``."""
        self.student = ModelShape.from_meta(inputs["student"].meta)
        self.teacher = ModelShape.from_meta(inputs["teacher"].meta)
        solved = spec.rotations is not None
        self.captures = spec.moments is None and not solved
        looks = not solved and spec.permutations is None and spec.states is None
        asked = spec.permute or Permute()
        self.permute = asked if looks and (asked.heads or asked.neurons) else None
        """What is looked for; None: nothing, or it is given."""
        self.rotates = spec.runs("rotate") and not solved
        self.folds = spec.runs("fold") and spec.folded is None
        self.frozen = spec.moments is not None or spec.states is not None
        """Whether the ledger comes with what is given."""

    @property
    def permuted(self) -> bool:
        """Whether a permutation goes into the fold."""
        return self.permute is not None or self.spec.permutations is not None

    @property
    def max_tokens(self) -> int:
        """Of a text: what is asked for, or what both models have positions for."""
        return min(self.capture.max_tokens, self.student.positions, self.teacher.positions)

    @property
    def blocks(self) -> int:
        """How many blocks the texts are cut into, or were."""
        if "states" in self.inputs:
            return int(self.inputs["states"].meta["shards"])
        texts: int = self.inputs["prompts"].meta["prompts"]
        return math.ceil(texts / self.capture.prompts_per_chunk)

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Each rotation's name, and the sites that share it."""
        rotate = self.spec.rotate
        return groups(self.student, tie=rotate.tie, stage_layers=rotate.stage_layers)

    @property
    def folded(self) -> tuple[str, ...]:
        """Which students are folded: ``permuted`` where it is asked for, and ``rotated``."""
        asked = self.permuted and "permuted" in self.spec.evaluate.variants
        return (*(("permuted",) if asked else ()), "rotated")

    @property
    def fold_chunks(self) -> tuple[tuple[str, int], ...]:
        """Variant and number of the file of every chunk, as many as there may be.

        A tied head gets a file of its own, and so do skip adapters.
        """
        shards, fold = self.inputs["student"].meta["shards"], self.spec.fold.variant
        more = int(self.student.tied and fold != "conjugate") + int(fold == "sliced")
        return tuple(
            (variant, number)
            for variant in self.folded
            for number in range(shards + (more if variant == "rotated" else 0))
        )

    @property
    def judged(self) -> tuple[str, ...]:
        """Which variants are evaluated: what is given folded has no permuted one beside it."""
        made = {"base", "rotated"} | (set(self.folded) if self.folds else set())
        return tuple(name for name in self.spec.evaluate.variants if name in made)
