"""Time an LDA teacher against students on the worker that runs it, and say when to use which.

The one kind whose files differ from run to run: what it finds is how long things took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from core.errors import SpecInvalid
from core.kinds._base import Chunk, ChunkResult, Input, Kind, Metric, Produced, Stage
from core.kinds._files import float_bytes, write_json
from core.kinds._teacher import load_teacher, teacher_bytes
from core.specs.base import JobSpec, Reads, Reference
from core.specs.plain_students import HierarchicalRouter, ProjectionTransformer
from core.specs.sizes import Sizes
from core.specs.students import check_learns, parse_student
from core.specs.teachers import Lda

if TYPE_CHECKING:
    from torch import Tensor

    from core.distill.latency import Measurement

MOST_HEADS = 65_536


class Spec(JobSpec):
    """What is timed, at how many heads, in which batches."""

    kind: Literal["benchmark"] = "benchmark"
    model: Annotated[Reference, Reads("lda_model")] = Field(
        description="The teacher's; the teachers of other sizes have its widths."
    )
    student: Annotated[Reference, Reads("student")] | None = Field(
        None, description="A trained one, timed beside its own teacher."
    )
    architecture: Annotated[
        ProjectionTransformer | HierarchicalRouter, Field(discriminator="name")
    ] = Field(
        ProjectionTransformer(num_heads=None, num_layers=None),
        description="The student that is built, untrained, for every number of heads; null sizes "
        "are told by that number.",
    )
    clusters: Annotated[
        tuple[Annotated[int, Field(ge=1, le=MOST_HEADS)], ...], Field(min_length=1, max_length=16)
    ] = Field((18, 64, 400, 4096), description="Numbers of heads.")
    batches: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65_536)], ...], Field(min_length=1, max_length=8)
    ] = Field((1, 32, 4096), description="Queries at a time.")
    seconds: float = Field(
        0.5, gt=0, le=60, description="Of measuring, for each number of heads and batch."
    )


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """One chunk: what is compared must run on one machine."""
    model = inputs["model"].meta
    sizes = Sizes.of(model)
    if "student" in inputs and inputs["student"].meta["model"] != inputs["model"].sha256:
        raise SpecInvalid(
            "student: of another model; time it beside its own teacher", pointer="/student"
        )
    check_learns(spec.architecture, "lda_model")
    worlds = [Sizes(sizes.dim, sizes.width, heads, heads) for heads in spec.clusters]
    for world in worlds:
        try:
            spec.architecture.check_sizes(world)
        except SpecInvalid as error:  # told of a student; here it is the architecture
            raise SpecInvalid(
                f"clusters {world.clusters}: {error.message.replace('student.', 'architecture.')}",
                pointer=(error.pointer or "").replace("/student", "/architecture"),
            ) from error
    needed = teacher_bytes(model) + max(_needed_bytes(spec, world) for world in worlds)
    if "student" in inputs:
        own = parse_student(inputs["student"].meta["student"])
        needed += 2 * float_bytes(own.parameters(sizes))
    return [Stage("measure", 1, memory_bytes=needed)]


def _needed_bytes(spec: Spec, sizes: Sizes) -> int:
    """Return what a teacher of random heads takes, the student over it, and a batch of both."""
    batch, student = max(spec.batches), spec.architecture
    heads = 6 * float_bytes(sizes.clusters, sizes.dim + sizes.width)
    rows = float_bytes(batch, sizes.dim + sizes.width + 3 * sizes.clusters + student.units(sizes))
    return heads + rows + 2 * float_bytes(student.parameters(sizes))


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Measure, write, draw."""
    from core.distill.latency import crossover
    from core.distill.latency_report import advise, draw_crossover

    found = _measured(spec, chunk)
    folder = chunk.workdir
    own = [] if spec.student is None else _own(spec, chunk)
    whole = {
        "architecture": spec.architecture.model_dump(mode="json"),
        "measurements": [_row(each) for each in found],
        "own": [_row(each) for each in own],
        "crossover": [vars(each) for each in crossover(found)],
        **_machine(chunk),
    }
    picture, text = folder / "crossover.png", folder / "latency.md"
    draw_crossover(picture, found)
    text.write_text(_markdown(spec, advise(found), own, whole), encoding="utf-8")
    points = [
        Metric(f"ms/{side}/batch {each.batch}", each.heads, getattr(each, side).p50_ms)
        for each in found
        for side in ("lda", "transformer")
    ]
    return ChunkResult(
        outputs={
            "latency": write_json(folder / "latency.json", whole, format_name="latency"),
            "latency_md": Produced(text, "latency_md", text.name, "text/markdown"),
            "crossover": Produced(picture, "picture", picture.name, "image/png"),
        },
        metrics=points,
    )


def _measured(spec: Spec, chunk: Chunk) -> list[Measurement]:
    """Time teachers of every number of heads and an untrained student each."""
    from core.distill.latency import measure

    found, counts, batches = [], sorted(set(spec.clusters)), list(dict.fromkeys(spec.batches))
    for number, heads in enumerate(counts):
        teacher, student, queries = _synthetic(spec, chunk, heads)
        for place, batch in enumerate(batches):
            chunk.progress(number * len(batches) + place, len(counts) * len(batches))
            found.append(
                measure(
                    teacher,
                    student,
                    queries[:batch],
                    heads=heads,
                    batch=batch,
                    seconds=spec.seconds,
                )
            )
    order = {batch: place for place, batch in enumerate(batches)}
    return sorted(found, key=lambda each: (order[each.batch], each.heads))


def _synthetic(spec: Spec, chunk: Chunk, heads: int) -> tuple[Any, Any, Tensor]:
    """Build a teacher of random heads, a student over it, and the largest batch of queries."""
    from core.distill.latency import synthetic_lda
    from core.distill.students._base import build_student
    from core.distill.teachers.lda import LdaTeacher

    sizes = Sizes.of(chunk.input("model").meta)
    model, queries = synthetic_lda(
        heads, dim=sizes.dim, width=sizes.width, rows=max(spec.batches), seed=spec.seed
    )
    teacher = LdaTeacher(model, Lda(), chunk.device)
    student = build_student(spec.architecture, teacher, spec.seed)
    return teacher.heads, student.to(chunk.device), queries.to(chunk.device)


def _own(spec: Spec, chunk: Chunk) -> list[Measurement]:
    """Time the trained student beside its own teacher, on the teacher's training queries."""
    import torch

    from core.distill.export import load_student
    from core.distill.latency import measure
    from core.distill.teachers.lda import LdaTeacher

    teacher = load_teacher(chunk, chunk.input("model").sha256, Lda())
    assert isinstance(teacher, LdaTeacher)
    link = chunk.workdir / "student.safetensors"
    link.symlink_to(chunk.fetch(chunk.input("student").sha256))
    student = load_student(link).to(chunk.device)
    queries = torch.from_numpy(teacher.queries).to(chunk.device)
    found = []
    for batch in dict.fromkeys(spec.batches):
        chunk.progress(0, 1)
        found.append(
            measure(
                teacher.heads,
                student,
                queries,
                heads=teacher.heads.num_heads,
                batch=batch,
                seconds=spec.seconds,
            )
        )
    return found


def _row(found: Measurement) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(found), "times_faster": found.times_faster}


def _machine(chunk: Chunk) -> dict[str, Any]:
    import torch

    return {"device": chunk.device, "threads": torch.get_num_threads()}


def _markdown(spec: Spec, advice: str, own: Sequence[Measurement], facts: Mapping[str, Any]) -> str:
    lines = [
        f"# {spec.name or 'Latency'}",
        "",
        f"Measured on {facts['device']} with {facts['threads']} threads; medians of whole batches.",
        "",
        "```text",
        advice,
        "```",
        "",
        "![time per query against the number of heads](crossover.png)",
        "",
    ]
    if own:
        lines += ["## The trained student beside its own teacher", ""]
        lines += [
            f"- batches of {each.batch}: teacher ({each.heads} heads) {each.lda.p50_ms:.3f} ms, "
            f"student {each.transformer.p50_ms:.3f} ms"
            for each in own
        ]
        lines.append("")
    return "\n".join(lines)


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Time a teacher against students here, and say when to use which.",
    example={"kind": "benchmark", "model": "0" * 64, "student": "1" * 64},
    outputs={"latency": "latency", "latency_md": "latency_md", "crossover": "picture"},
    timed=True,
)
