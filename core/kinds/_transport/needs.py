"""What a chunk of each stage needs of its device, by the formulas of memory. Torch-free.

Of its device at least: a GPU's worker works out moments, rotations and folds on the processor
beside it, and is asked for as much all the same.
"""

from __future__ import annotations

from dataclasses import replace

from core.architectures.shape import ModelShape
from core.kinds._transport.plan import Plan
from core.transport import memory
from core.transport.sites import sites

SCRATCH_BYTES = 2**28
"""What a chunk holds beside what is counted: tokenizers, one batch's bookkeeping, pictures."""


class Needs:
    """In bytes, by stage; a chunk of any other needs SCRATCH_BYTES."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._student, self._teacher = plan.student, plan.teacher
        self._maps = memory.permutable(plan.student, plan.teacher, plan.permute)[1]
        self._tokens = max(plan.capture.batch_tokens, plan.max_tokens)

    @property
    def ledger(self) -> int:
        """Both models and their states, where layers are compared by them."""
        if self._plan.capture.layer_map != "cka":
            return SCRATCH_BYTES
        student, teacher = self._student, self._teacher
        rows = memory.CKA_ROWS + self._plan.max_tokens
        states = 4 * rows * sum(shape.layers * shape.width for shape in (student, teacher))
        compared = 2 * states + 8 * memory.CKA_ROWS**2 * (student.layers + 3)
        return SCRATCH_BYTES + self._weights(student) + self._weights(teacher) + compared

    @property
    def capture(self) -> int:
        """Both models, all sums, what one batch keeps and what it makes of itself."""
        plan, student, teacher = self._plan, self._student, self._teacher
        sums = memory.moments_bytes(student, teacher, plan.permute)
        if plan.spec.states is not None:
            return SCRATCH_BYTES + sums
        kept = memory.kept_bytes(
            student,
            teacher,
            plan.permute,
            batch_tokens=plan.capture.batch_tokens,
            max_tokens=plan.max_tokens,
            dtype=self._dtype(student),
        )
        passes = max(self._forward(shape, maps=self._maps) for shape in (student, teacher))
        passes += memory.products_bytes(student, teacher, plan.permute, tokens=self._tokens)
        models = self._weights(student) + self._weights(teacher)
        return SCRATCH_BYTES + models + sums + kept + passes

    @property
    def permute(self) -> int:
        """One layer's statistics, and the matching of its neurons."""
        plan = self._plan
        return SCRATCH_BYTES + memory.match_bytes(plan.student, plan.teacher, plan.permute)

    @property
    def rotate(self) -> int:
        """The moments of all sites of the largest group, and the solve."""
        plan = self._plan
        most = max(len(of) for of in plan.groups.values())
        return SCRATCH_BYTES + memory.rotate_bytes(
            plan.student, plan.teacher, plan.spec.rotate, sites=most
        )

    @property
    def rotations(self) -> int:
        """All rotations, and what the checks of one take."""
        wide = memory.widened(self._student, self._teacher)
        return SCRATCH_BYTES + self._all_rotations + 4 * 8 * wide**2

    @property
    def fold(self) -> int:
        """All rotations, and one weight."""
        plan, asked = self._plan, self._plan.spec.fold
        weight = memory.fold_bytes(
            plan.student,
            width=memory.widened(plan.student, plan.teacher),
            maps=0,
            variant=asked.variant,
            dtype=asked.dtype,
            permuted=(plan.permuted, plan.permuted),
            adapters=asked.variant == "sliced" and len(plan.groups) > 1,
        )
        return SCRATCH_BYTES + self._all_rotations + weight

    @property
    def evaluate(self) -> int:
        """A variant beside the student it was made from, and then beside the teacher."""
        plan, student, teacher = self._plan, self._student, self._teacher
        variant = student if set(plan.judged) == {"base"} else self._folded
        shapes, tokens = (variant, teacher), self._tokens
        layers = set(plan.spec.evaluate.layers)
        read = 2 * len(layers) + 1 if layers else len(sites(student))
        # Normalised rows and their lengths in float32; of one site what scores make of them.
        widest = max(shape.width for shape in shapes)
        kept = tokens * (read * 4 * (variant.width + 1) + 3 * 8 * widest)
        beside = self._weights(teacher) + kept + max(self._forward(shape) for shape in shapes)
        if variant is not student:
            beside = max(beside, self._weights(student))
        logits = memory.predictions_bytes(max(shape.vocabulary for shape in shapes), tokens=tokens)
        held = self._weights(variant) + self._adapters
        return SCRATCH_BYTES + self._all_rotations + held + beside + logits

    @property
    def _adapters(self) -> int:
        """Skip adapters of a variant, [d_r, d_r] each, in float32 at least."""
        if self._plan.spec.fold.variant != "sliced":
            return 0
        wide = memory.widened(self._student, self._teacher)
        return 4 * wide**2 * (len(self._plan.groups) - 1)

    @property
    def _folded(self) -> ModelShape:
        """Of the rotated student: wider, and with a head of its own."""
        fold = self._plan.spec.fold.variant
        wide = memory.widened(self._student, self._teacher)
        return replace(self._student, width=wide, tied=self._student.tied and fold == "conjugate")

    @property
    def _all_rotations(self) -> int:
        plan = self._plan
        one = memory.rotation_bytes(plan.student.width, plan.teacher.width, plan.spec.rotate)
        return len(plan.groups) * one

    def _dtype(self, shape: ModelShape) -> str:
        asked = self._plan.capture.dtype
        return shape.dtype if asked == "auto" else asked

    def _weights(self, shape: ModelShape) -> int:
        spread = self._plan.capture.placement == "spread"
        count = memory.resident_bytes if spread else memory.weights_bytes
        return count(shape, self._dtype(shape))

    def _forward(self, shape: ModelShape, *, maps: bool = False) -> int:
        return memory.forward_bytes(
            shape,
            batch_tokens=self._tokens,
            max_tokens=self._plan.max_tokens,
            dtype=self._dtype(shape),
            maps=maps,
        )
