"""Which layer of the teacher stands beside each of the student's: by depth, or told. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from core.errors import SpecInvalid

POINTER = "/capture/layer_map"


def without_states(
    asked: Literal["proportional", "cka"] | Sequence[int], student_layers: int, teacher_layers: int
) -> tuple[int, ...] | None:
    """Return the map where no state is needed for it; None for ``cka``.

    Raises:
        SpecInvalid: a told map does not fit.
    """
    if asked == "cka":
        return None
    if asked == "proportional":
        return proportional(student_layers, teacher_layers)
    return explicit([int(layer) for layer in asked], student_layers, teacher_layers)


def proportional(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Map by depth: first to first, last to last, the others to the nearest.

    ``l -> floor(l (L_t - 1) / (L_s - 1) + 1/2)``; a student's only layer goes to the last.
    """
    if student_layers == 1:
        return (teacher_layers - 1,)
    # In whole numbers: a half is always rounded up, whatever the layers.
    last, far = student_layers - 1, teacher_layers - 1
    return tuple((2 * layer * far + last) // (2 * last) for layer in range(student_layers))


def explicit(layer_map: Sequence[int], student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Return a told map.

    Raises:
        SpecInvalid: not one layer of the teacher for each of the student's, or the depth falls.
    """
    if len(layer_map) != student_layers:
        raise SpecInvalid(
            f"layer_map: {len(layer_map)} entries for {student_layers} layers of the student; name "
            "one of the teacher's for each",
            pointer=POINTER,
        )
    for layer, other in enumerate(layer_map):
        if not 0 <= other < teacher_layers:
            raise SpecInvalid(
                f"layer_map: entry {layer} is {other}; allowed: 0 to {teacher_layers - 1}",
                pointer=POINTER,
            )
        if layer and other < layer_map[layer - 1]:
            raise SpecInvalid(
                f"layer_map: entry {layer} is {other} behind {layer_map[layer - 1]}; a deeper "
                "layer of the student needs one of the teacher's that is no less deep",
                pointer=POINTER,
            )
    return tuple(layer_map)
