"""What documents 001 and 003 print, by block and table, and small models to try it on."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.distill.latency import benchmark_latency
from core.distill.lda import MultiHeadLDA
from core.distill.projection import evaluate_distillation, train_distillation
from core.distill.students.projection_transformer import ProjectionTransformer
from core.specs.architectures import optimal_architecture
from tests.source_documents import document

WIDTH = 384
OURS: dict[str, Callable[..., Any]] = {
    "optimal_architecture": optimal_architecture,
    "train_distillation": train_distillation,
    "evaluate_distillation": evaluate_distillation,
    "benchmark_latency": benchmark_latency,
}


def text(number: str) -> str:
    path = document(number)
    assert path is not None
    return path.read_text()


def blocks(number: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", text(number), re.MULTILINE | re.DOTALL)
    return [block.strip() for block in found]


def block(number: str, language: str, *words: str) -> str:
    """The one block that holds all these words."""
    [found] = [each for each in blocks(number, language) if all(w in each for w in words)]
    return found


def table(number: str, heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, without code marks."""
    after = text(number).split(heading, 1)[1]
    lines = re.search(r"^\|.*\n\|[-| ]+\n((?:\|.*\n)+)", after, re.MULTILINE)
    assert lines is not None
    return [
        [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        for line in lines[1].splitlines()
    ]


def namespace(**more: Any) -> dict[str, Any]:
    """What the documents take as imported, by their own names."""
    import typing

    names = {name: getattr(typing, name) for name in ("Dict", "List", "Tuple")}
    return {"torch": torch, "nn": nn, "F": functional, "MultiHeadLDA": MultiHeadLDA,
            "ProjectionTransformer": ProjectionTransformer, **names, **more}  # fmt: skip


def defined(source: str, name: str, **more: Any) -> Any:
    names = namespace(**more)
    exec(compile(source, f"<{name}>", "exec"), names)
    return names[name]


def drawn(rows: int, width: int = WIDTH, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, width, generator=generator), dim=1)


def small(**changes: Any) -> ProjectionTransformer:
    torch.manual_seed(0)
    return ProjectionTransformer(**{"embed_dim": 16, "num_heads": 4, "num_layers": 2, "ff_dim": 24}
                                 | changes)  # fmt: skip


def small_lda() -> MultiHeadLDA:
    return MultiHeadLDA(drawn(6, 16, seed=1), drawn(6, 16, seed=2), temperature=0.2)
