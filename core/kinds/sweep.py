"""Train several students on one teacher's targets side by side, and say which to take and why."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from core.errors import SpecInvalid
from core.kinds._base import Chunk, ChunkResult, Input, Kind, Metric, Produced, Stage
from core.kinds._memory import export_bytes
from core.kinds._training import (
    TrainingSpec,
    check_student,
    curves,
    data_of,
    epoch_chunks,
    export_files,
    last_score,
    made_file,
    make_targets,
    needed_bytes,
    targets_stage,
    teacher_spec,
    train_some,
)
from core.specs.base import Reads, Reference
from core.specs.sizes import Sizes
from core.specs.students import RotorProduct, Student
from core.specs.variants import MOST, Value, Variant, expand

ROUND = "train_"
ROUNDS = 256
"""Most rounds: each is a stage, and a stage waits for its slowest variant."""


class Spec(TrainingSpec):
    """Which teacher, which students, how to train them and by what to choose."""

    kind: Literal["sweep"] = "sweep"
    model: Annotated[Reference, Reads("federated_model")] = Field(description="The teacher's.")
    students: Annotated[tuple[Student, ...], Field(min_length=1, max_length=MOST)] = Field(
        (RotorProduct(),), description="Those compared; with a grid, what its values change."
    )
    grid: dict[str, Annotated[tuple[Value, ...], Field(min_length=1, max_length=MOST)]] = Field(
        default_factory=dict,
        max_length=16,
        description="Values to try, by field of a student: {'planes': [2, 4, 8]}. Every "
        f"combination, of each student that has the fields; at most {MOST} in all.",
    )
    criterion: Literal["auto", "aic", "bic", "held_out"] = Field(
        "auto",
        description="auto: AIC where it is defined for all, else the held-out log score. aic and "
        "bic where undefined: the report refuses them and takes the log score.",
    )

    @model_validator(mode="after")
    def _variants_are_sound(self) -> Spec:
        self.variants()
        if self.training.checkpoint_interval is not None:
            raise ValueError(
                f"training.checkpoint_interval {self.training.checkpoint_interval}: a round of a "
                "sweep is whole epochs; leave it null and say training.epochs_per_chunk"
            )
        if self.rounds() > ROUNDS:
            raise ValueError(
                f"training.epochs {self.training.epochs} in chunks of training.epochs_per_chunk "
                f"{self.training.epochs_per_chunk} are {self.rounds()} rounds; allowed: 1 to "
                f"{ROUNDS}, raise epochs_per_chunk"
            )
        return self

    def rounds(self) -> int:
        """How many rounds, one after another, train every variant."""
        return epoch_chunks(self.training)

    def variants(self) -> list[Variant]:
        """Every student to train, in the order of the chunks."""
        return expand(self.students, self.grid)


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """Targets where none are given, a round of training after the other, the judging, the report.

    Every variant is a chunk of every round, so that they spread over the pool.
    """
    variants, model = spec.variants(), inputs["model"].meta
    _check_variants(spec, variants, inputs)
    needed = max(needed_bytes(spec, each.student, inputs) for each in variants)
    wide = max(export_bytes(model, each.student) for each in variants)
    rounds = [Stage(_round(number), len(variants), memory_bytes=needed) for number in _rounds(spec)]
    return [
        targets_stage(spec, inputs),
        *rounds,
        Stage("judge", len(variants), memory_bytes=needed),
        Stage("report", 1, memory_bytes=max(needed, wide)),
    ]


def _rounds(spec: Spec) -> range:
    return range(1, spec.rounds() + 1)


def _round(number: int) -> str:
    return f"{ROUND}{number}"


def _check_variants(spec: Spec, variants: Sequence[Variant], inputs: Mapping[str, Input]) -> None:
    """Refuse variants that width or teacher do not allow, or that the model makes the same."""
    model = inputs["model"].meta
    known: dict[str, Variant] = {}
    for variant in variants:
        try:
            check_student(spec, variant.student, inputs)
            _check_retrieves(variant.student, Sizes.of(model))
        except SpecInvalid as error:
            field = (error.pointer or "").rpartition("/")[2]
            pointer = f"/grid/{field}" if field in spec.grid else "/students"
            raise SpecInvalid(f"{variant.name}: {error.message}", pointer=pointer) from error
        alike = variant.student.alike(Sizes.of(model))
        first = known.setdefault(alike, variant)
        if first is not variant:
            told, other = variant.student.model_dump(), first.student.model_dump()
            changed = [name for name in spec.grid if told.get(name) != other.get(name)]
            raise SpecInvalid(
                f"{variant.name} is the same student as {first.name} at width {model['dim']} and "
                f"{model['rows']} training queries",
                pointer=f"/grid/{changed[0]}" if changed else "/students",
            )


def _check_retrieves(student: Student, sizes: Sizes) -> None:
    """Refuse codes: a sweep chooses by how well true targets are found."""
    if student.compares(sizes) == "relations":
        raise SpecInvalid(
            f"student.name '{student.name}': its codes have no cosine to the targets by which a "
            f"sweep chooses; allowed: students that answer with {sizes.width} dimensions",
            pointer=f"/student/{'dim' if getattr(student, 'dim', None) else 'name'}",
        )


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one chunk of whichever stage."""
    steps = {"targets": make_targets, "judge": _judge, "report": _report}
    return steps.get(chunk.stage, _train)(spec, chunk)


def _train(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Train one variant for one round, from where it stood after the last."""
    from core.tensors import shards

    number = int(chunk.stage.removeprefix(ROUND))
    variant = spec.variants()[chunk.index]
    before = _state(chunk, number - 1, chunk.index) if number > 1 else None
    if before is not None and shards.load_manifest(before.path)["stopped"]:
        path = chunk.workdir / "state.safetensors"
        shutil.copyfile(before.path, path)
        kept = Produced(path, before.format, path.name, meta=before.meta)
        return ChunkResult(checkpoints={"state": kept})
    state, made, rows = train_some(spec, variant.student, before, chunk)
    return ChunkResult(
        checkpoints={"state": made},
        metrics=curves(rows, suffix=f"/{variant.name}"),
        score=1.0 - last_score(state.history),
    )


def _state(chunk: Chunk, number: int, index: int) -> Produced:
    return chunk.outputs(_round(number))[index]["state"]


def _judge(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Measure one variant on the rows that the model was fitted to, the validation rows apart."""
    from core.distill.judging import judge
    from core.distill.state import TrainState

    data = data_of(spec, chunk)
    student = TrainState.load(_state(chunk, spec.rounds(), chunk.index).path).result()
    found = judge(
        spec.variants()[chunk.index].name,
        student.to(chunk.device),
        data,
        lambda: chunk.progress(0, 1),
    )
    path = chunk.workdir / "judged.safetensors"
    found.save(path)
    return ChunkResult(checkpoints={"judged": Produced(path, "judged", path.name)})


def _report(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Compare, write the report, and export the student that is taken."""
    from core.distill.judging import Judged, baseline_chord
    from core.distill.selection import select
    from core.distill.state import TrainState
    from core.distill.sweep_report import write_sweep

    judged = [Judged.load(made["judged"].path) for made in chunk.outputs("judge")]
    chunk.progress(0, 3)
    found = select(
        judged,
        dim=chunk.input("model").meta["dim"],
        baseline=baseline_chord(data_of(spec, chunk)),
        criterion=spec.criterion,
    )
    chunk.progress(1, 3)
    place = [each.name for each in judged].index(found.chosen)
    state = TrainState.load(_state(chunk, spec.rounds(), place).path)
    outputs = export_files(spec, spec.variants()[place].student, state, chunk)
    chunk.progress(2, 3)
    files = write_sweep(chunk.workdir, found, title=spec.name or "Sweep", facts=_facts(spec, chunk))
    outputs["sweep"] = made_file(files["sweep_json"], "sweep", "application/json")
    outputs["sweep_md"] = made_file(files["sweep_md"], "sweep_md", "text/markdown")
    outputs["scores"] = made_file(files["scores_png"], "picture", "image/png")
    scores = [Metric(f"log_score/{line.name}", 0, line.log_score) for line in found.lines]
    sizes = [Metric(f"parameters/{line.name}", 0, float(line.parameters)) for line in found.lines]
    return ChunkResult(outputs=outputs, metrics=[*scores, *sizes])


def _facts(spec: Spec, chunk: Chunk) -> dict[str, Any]:
    """What was compared and how it was trained, for the report."""
    from core.tensors import shards

    states = [shards.load_manifest(made["state"].path) for made in chunk.outputs(_last(spec))]
    return {
        "model": chunk.input("model").sha256,
        "teacher": teacher_spec(spec, chunk).model_dump(mode="json"),
        "training": spec.training.recipe(),
        "seed": spec.seed,
        "variants": {
            variant.name: {
                "student": variant.student.model_dump(mode="json"),
                "epochs": state["epoch"],
                "best_validation_score": state["best_score"],
            }
            for variant, state in zip(spec.variants(), states, strict=True)
        },
    }


def _last(spec: Spec) -> str:
    return _round(spec.rounds())


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Train several students side by side and say which to take.",
    example={
        "kind": "sweep",
        "model": "0" * 64,
        "targets": "1" * 64,
        "students": [{"name": "rotor_product"}],
        "grid": {"planes": [4, 8, 16]},
    },
    outputs={
        "student": "student",
        "student_pt": "student_pt",
        "student_onnx": "student_onnx",
        "training": "training",
        "sweep": "sweep",
        "sweep_md": "sweep_md",
        "scores": "picture",
    },
)
