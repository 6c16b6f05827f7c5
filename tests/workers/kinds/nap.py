"""A chunk that takes its time and says so: for tests of what happens meanwhile."""

import time
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from core.kinds._base import Chunk, ChunkResult, Input, Kind, Produced, Stage
from core.specs.base import JobSpec


class Spec(JobSpec):
    """How many chunks, and how long each takes."""

    kind: Literal["nap"] = "nap"
    chunks: int = Field(1, ge=1)
    seconds: float = Field(1.0, ge=0)
    mode: Literal["fanned", "chained"] = "fanned"


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    return [Stage("nap", spec.chunks, spec.mode)]


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    until = time.monotonic() + spec.seconds
    while (left := until - time.monotonic()) > 0:
        chunk.progress(spec.seconds - left, spec.seconds)
        time.sleep(min(0.02, left))
    path = chunk.workdir / "nap.txt"
    path.write_text(f"{chunk.index}\n")
    return ChunkResult(outputs={f"nap_{chunk.index}": Produced(path, "text", "nap.txt")})


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Sleep.",
    example={"kind": "nap"},
    outputs={"nap_0": "text"},
)
