"""Document 004's configuration of a distillation from stored embeddings, and its presets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from core.specs.base import Closed
from core.specs.schedules import COLDEST, HOTTEST, ScheduleType, TauSchedule

Relation = Literal["neighbour_kl", "relational_kl"]
"""Terms of the loss that compare relations and have a temperature."""

Tau = Annotated[float, Field(ge=COLDEST, le=HOTTEST)]


class DistillationConfig(Closed):
    """What is distilled into what, and how. Fields and printed values are document 004's.

    ``curriculum`` says which temperatures are in force: those of its schedule, stage by stage, or
    ``tau`` throughout. ``get_tau_for_stage`` answers for both.
    """

    teacher_checkpoint: str = Field(
        "models/teacher_1536d.pt",
        min_length=1,
        max_length=4096,
        description="Path of the teacher's stored embeddings, .pt or .safetensors.",
    )
    teacher_dim: int = Field(1536, ge=2, le=65_536, description="Width of the teacher's vectors.")
    student_dim: int = Field(5, ge=2, le=16_384, description="Width of the student's vectors.")
    tau: Tau = Field(1.0, description="Temperature of the relations, without a curriculum.")
    alpha: float = Field(
        0.7, ge=0, le=1, description="Weight of distillation; reconstruction has 1 - alpha."
    )
    device: str = Field(
        "cpu",
        pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$",
        description="auto: CUDA where there is one, else the CPU.",
    )
    curriculum: bool = Field(
        default=False, description="Whether the temperature changes by stages."
    )
    curriculum_stages: int = Field(5, ge=1, le=256, description="Of a curriculum.")
    curriculum_tau_schedule: tuple[Tau, Tau] = Field(
        (4.0, 0.5), description="Temperatures of a curriculum's first and last stage."
    )
    curriculum_schedule_type: ScheduleType = Field(
        "linear", description="How the temperature goes from the first to the last."
    )
    epochs: int = Field(10, ge=1, le=100_000, description="Of every stage.")
    batch_size: int = Field(
        32, ge=3, le=65_536, description="Rows; relations are between the rows of a batch."
    )
    learning_rate: float = Field(1e-4, gt=0, le=10)

    def get_tau_for_stage(self, stage: int) -> float:
        """Return the temperature in force at a stage, counted from 0; the nearest one's outside.

        Raises:
            SpecInvalid: ``stage`` is not a whole number.
        """
        start, end = self.curriculum_tau_schedule if self.curriculum else (self.tau, self.tau)
        schedule = TauSchedule(start, end, self.curriculum_stages, self.curriculum_schedule_type)
        return schedule(stage)

    def job(self, model: str, *, term: Relation = "neighbour_kl") -> dict[str, Any]:
        """Return the JSON of a ``distill`` job with these settings.

        The student is ``hierarchical`` of one level, ``student_dim`` wide; document 004's two
        levels are its ``levels`` [5, 25]. ``alpha`` 1 leaves out the decoder, ``alpha`` 0 the
        temperatures, which nothing would act on. ``teacher_checkpoint`` and ``teacher_dim`` say
        what to upload; the job takes the width of the model as it is.

        Args:
            model: SHA-256 or ``job_id/model`` of stored embeddings, whose rows ``hold_out`` split.
            term: what ``alpha`` weighs. ``relational_kl`` is what ``distill_loss`` computes for
                unequal widths; ``neighbour_kl``, the student's own default, keeps more neighbours.
        """
        stages = self.curriculum_stages if self.curriculum else 1
        losses = {"neighbour_kl": 0.0, term: self.alpha, "reconstruction": 1 - self.alpha}
        training = {
            "epochs": self.epochs * stages,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "losses": losses,
            **(self._temperatures() if self.alpha else {}),
        }
        student: dict[str, Any] = {"name": "hierarchical", "levels": [self.student_dim]}
        student["level_weights"] = [1.0]
        if self.alpha == 1:
            student["decoder"] = 0
        device = {"auto": "any", "cpu": "cpu"}.get(self.device, "gpu")
        told = {"student": student, "training": training, "device": device}
        return {"kind": "distill", "model": model, **told}

    def _temperatures(self) -> dict[str, Any]:
        if not self.curriculum:
            return {"tau": self.tau}
        start, end = self.curriculum_tau_schedule
        told = {"stages": self.curriculum_stages, "schedule": self.curriculum_schedule_type}
        return {"curriculum": {**told, "start_tau": start, "end_tau": end}}


def get_tau_for_stage(config: DistillationConfig, stage: int) -> float:
    """Return the temperature in force at a stage: ``config.get_tau_for_stage`` as a function."""
    return config.get_tau_for_stage(stage)


DEFAULT_OPENAI_CONFIG = DistillationConfig()
"""1536 dimensions, as OpenAI's embeddings have, to 5; one temperature."""

CURRICULUM_CONFIG = DistillationConfig(
    curriculum=True, curriculum_stages=5, curriculum_tau_schedule=(4.0, 0.5)
)
"""The same with temperatures from 4.0 to 0.5 in 5 stages."""

FAST_CONFIG = DistillationConfig(batch_size=16, epochs=3, learning_rate=1e-3)
"""A quick look: smaller batches, fewer epochs, larger steps."""
