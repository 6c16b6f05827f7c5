"""What a fold took out of a model: its gammas, kept beside the weights so that they come back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from core.errors import DataInvalid
from core.tensors import shards

RECORD = "fold_record.safetensors"
"""In the folded folder; transformers reads what config.json and the index name, so not this."""
MANIFEST = {"format": "fold_record", "version": 1}


def write_record(path: Path, norms: Mapping[str, Tensor]) -> None:
    """Write the gammas, [d_s] float64 by whole name; equal ones give equal bytes."""
    shards.save(path, {name: gamma.numpy() for name, gamma in norms.items()}, MANIFEST)


def read_record(path: Path) -> dict[str, Tensor]:
    """Read what ``write_record`` wrote: the norms that ``unfold`` needs.

    Raises:
        DataInvalid: not such a file.
    """
    tensors, manifest = shards.load(path)
    if manifest != MANIFEST:
        raise DataInvalid("fold record: needed format 'fold_record', version 1")
    found = {name: torch.from_numpy(array) for name, array in tensors.items()}
    for name, gamma in found.items():
        if gamma.ndim != 1 or gamma.dtype != torch.float64 or not bool(gamma.isfinite().all()):
            raise DataInvalid(f"{name[:200]}: needed [d] float64, finite")
    return found
