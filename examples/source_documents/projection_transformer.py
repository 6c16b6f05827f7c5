"""The module that document 001 imports: its names, from where this project keeps them."""

from core.distill.latency import benchmark_latency
from core.distill.projection import evaluate_distillation, train_distillation
from core.distill.students.projection_transformer import ProjectionTransformer
from core.specs.architectures import optimal_architecture

__all__ = [
    "ProjectionTransformer",
    "benchmark_latency",
    "evaluate_distillation",
    "optimal_architecture",
    "train_distillation",
]
