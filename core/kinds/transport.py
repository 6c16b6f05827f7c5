"""Bring a student into a teacher's basis by rotations in closed form (document 002).

The stages are in ``_transport``, a file each; which of them run, and on what, says ``plan.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from core.kinds._base import Chunk, ChunkResult, Kind
from core.kinds._transport import capturing, folding, freezing, judging, solving
from core.kinds._transport.spec import Spec
from core.kinds._transport.stages import count_cost, stages

STEPS: Mapping[str, Callable[[Spec, Chunk], ChunkResult]] = {
    "ledger": freezing.ledger,
    "capture": capturing.capture,
    "collect": capturing.collect,
    "permute": solving.permute,
    "rotate": solving.rotate,
    "bind": solving.bind,
    "fold": folding.fold,
    "pack": folding.pack,
    "evaluate": judging.evaluate,
    "report": judging.report,
    "gates": judging.gates,
}


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one chunk of whichever stage."""
    return STEPS[chunk.stage](spec, chunk)


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Turn a language model into another's basis, exactly, without training.",
    example={
        "kind": "transport",
        "student": "0" * 64,
        "teacher": "1" * 64,
        "prompts": "2" * 64,
        "capture": {"system_prompt": "You are a tour guide."},
    },
    outputs={
        "ledger": "transport_ledger",
        "moments": "moments",
        "states": "states",
        "permutations": "permutations",
        "rotations": "rotations",
        "model": "language_model",
        "model_permuted": "language_model",
        "rotation_ledger": "rotation_ledger",
        "report": "report",
        "report_md": "report_md",
        **dict.fromkeys(("cosines", "sizes", "likeness", "singular_values", "errors"), "picture"),
    },
    cost=count_cost,
)
