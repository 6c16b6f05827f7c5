"""Folded models beside what they were made of: logits in float64 and float32, weights unfolded.

Every family and variant of tiny random models, and the real small checkpoints where they lie beside
the checkout. Rotations and orders are random: any will do for a change of basis. The document's own
fold (``conjugate``) changes what a model computes; its column says by how much, and is no bar.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from bench._checkpoints import checkpoint
from bench._float64 import in_float64, logits_of
from bench._folds import IDS, plan_of
from bench._report import Figure, options, print_table, verdict
from bench._tiny_models import VARIANTS, save_folder, tiny_model
from core.transport.fold_folders import fold_folder, read_config, shape_of, weight_files
from core.transport.fold_plans import FoldPlan, Variant
from core.transport.sites import Tie
from core.transport.sliced import load_folded
from core.transport.unfolding import unfold_folder

FLOAT64_BAR, FLOAT32_BAR, UNFOLD_BAR = 1e-9, 1e-5, 1e-10
REAL = ("stories260k-hf", "babyllama105-hf")


@dataclass(frozen=True)
class Case:
    """One way to fold."""

    variant: Variant
    wider: bool = False
    permuted: bool = False
    tie: str = ""

    def plan(self, folder: Path, dtype: str) -> FoldPlan:
        """Plan it for a folder's model; wider: one and a half times."""
        shape = shape_of(folder)
        width = shape.width * 3 // 2 if self.wider else None
        tie: Tie | None = "stage" if self.tie == "stage" else None
        plan: FoldPlan = plan_of(
            shape, self.variant, width=width, tie=tie, permuted=self.permuted, dtype=dtype
        )
        return plan


CASES = {
    "permuted": Case("none", permuted=True),
    "global": Case("global"),
    "wider": Case("global", wider=True),
    "perm+global": Case("global", permuted=True),
    "sliced": Case("sliced", permuted=True),
    "stages": Case("sliced", tie="stage"),
    "sliced wider": Case("sliced", wider=True, permuted=True),
    "conjugate": Case("conjugate"),
}
EXACT = [name for name in CASES if name != "conjugate"]


@dataclass(frozen=True)
class Gaps:
    """Of one fold of one model."""

    float64: float
    """Largest difference of a logit."""
    float32: float
    """The same over the largest logit."""
    unfold: float
    """Largest difference of a weight, unfolded in float64."""


def main() -> int:
    """Fold all, print three tables."""
    check = options(__doc__).parse_args().check
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    found: dict[str, Mapping[str, Gaps]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in VARIANTS:
            folder = save_folder(tiny_model(name), Path(scratch) / name)
            found[name] = _measure(folder, Path(scratch) / f"{name} folds")
        for name in REAL:
            if real := checkpoint(name):
                found[name] = _measure(real, Path(scratch) / f"{name} folds")
    _table("float64: max abs", found, "float64")
    _table("float32: relative", found, "float32")
    _table("unfold: max abs", found, "unfold")
    if missing := [name for name in REAL if name not in found]:
        print(f"not measured, not beside this checkout: {', '.join(missing)}")
    gaps = [of[case] for of in found.values() for case in EXACT]
    unfolds = [gap.unfold for of in found.values() for gap in of.values()]
    return verdict(
        "fold_equivalence",
        Figure("float64 logits", max(gap.float64 for gap in gaps), FLOAT64_BAR, at_most=True),
        Figure("float32 logits", max(gap.float32 for gap in gaps), FLOAT32_BAR, at_most=True),
        Figure("unfolded weights", max(unfolds), UNFOLD_BAR, at_most=True),
        check=check,
    )


def _measure(folder: Path, scratch: Path) -> dict[str, Gaps]:
    scratch.mkdir()
    ids = IDS % shape_of(folder).vocabulary
    exact = logits_of(in_float64(load_folded(folder)), ids)
    plain = logits_of(load_folded(folder), ids)
    old = _weights(folder)
    found = {}
    for name, case in CASES.items():
        wide, narrow = (case.plan(folder, dtype) for dtype in ("float64", "keep"))
        folded = fold_folder(folder, scratch / f"{name} wide", wide)
        rounded = fold_folder(folder, scratch / f"{name} narrow", narrow)
        found[name] = Gaps(
            _largest(logits_of(in_float64(load_folded(folded)), ids) - exact),
            _largest(logits_of(load_folded(rounded), ids) - plain) / _largest(plain),
            _unfolded(folder, case, scratch / name, old),
        )
    return found


def _unfolded(folder: Path, case: Case, scratch: Path, old: Mapping[str, Tensor]) -> float:
    """Fold and unfold in float64: the model's weights, widened, are what must come back."""
    scratch.mkdir()
    wide = fold_folder(
        folder, scratch / "wide", FoldPlan(shape_of(folder), "none", dtype="float64")
    )
    plan = case.plan(wide, "keep")
    folded = fold_folder(wide, scratch / "folded", plan)
    back = _weights(unfold_folder(folded, scratch / "back", plan, config=read_config(wide)))
    if back.keys() != old.keys():
        return float("nan")
    return max(_largest(back[name] - old[name].double()) for name in old)


def _weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in weight_files(folder):
        found.update(load_file(folder / name))
    return found


def _largest(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, ord=float("inf")))


def _table(title: str, found: Mapping[str, Mapping[str, Gaps]], of: str) -> None:
    rows = [
        (name, *(f"{getattr(gaps[case], of):.1e}" for case in CASES))
        for name, gaps in found.items()
    ]
    print_table([title, *CASES], rows)
    print()


if __name__ == "__main__":
    sys.exit(main())
