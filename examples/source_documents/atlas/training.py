"""The names that document 004 imports, from where they are."""

from core.distill.distillation import (
    CURRICULUM_CONFIG,
    DEFAULT_OPENAI_CONFIG,
    FAST_CONFIG,
    DistillationConfig,
    combined_distill_loss,
    create_curriculum_schedule,
    curriculum_distill_step,
    distill_loss,
    get_tau_for_stage,
    kl_distill_loss,
    load_teacher_checkpoint,
)

__all__ = [
    "CURRICULUM_CONFIG",
    "DEFAULT_OPENAI_CONFIG",
    "FAST_CONFIG",
    "DistillationConfig",
    "combined_distill_loss",
    "create_curriculum_schedule",
    "curriculum_distill_step",
    "distill_loss",
    "get_tau_for_stage",
    "kl_distill_loss",
    "load_teacher_checkpoint",
]
