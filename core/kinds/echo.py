"""Write a text file. The smallest kind there is: read it first."""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from core.kinds._base import Chunk, ChunkResult, Input, Kind, Metric, Produced, Stage
from core.specs.base import JobSpec


class Spec(JobSpec):
    """A text, how often to say it, and in how many chunks."""

    kind: Literal["echo"] = "echo"
    text: str = Field(min_length=1, max_length=200)
    times: int = Field(1, ge=1, le=1_000, description="Lines, one chunk each.")


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """One chunk per line, each appending to what the one before it wrote."""
    return [Stage("lines", spec.times, "chained")]


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Write the lines so far and one more."""
    before = chunk.latest("lines")
    said = before["so_far"].path.read_text(encoding="utf-8") if before else ""
    path = chunk.workdir / "echo.txt"
    path.write_text(said + spec.text + "\n", encoding="utf-8")
    chunk.progress(1, 1)
    text = Produced(path, "text", "echo.txt", "text/plain", {"lines": chunk.index + 1})
    lines = [Metric("lines", chunk.index, chunk.index + 1.0)]
    if chunk.index + 1 < chunk.chunks:
        return ChunkResult(checkpoints={"so_far": text}, metrics=lines)
    return ChunkResult(outputs={"text": text}, metrics=lines)


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Write a text file, one chunk per line.",
    example={"kind": "echo", "text": "hello", "times": 3},
    outputs={"text": "text"},
)
