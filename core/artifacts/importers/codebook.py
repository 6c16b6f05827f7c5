"""A codebook of rotation planes from an .npz or our own .safetensors, checked, in one form.

Document 000 prints no layout of such a file: the .npz is the one ``save_codebook_npz`` writes.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from core.artifacts.importers.npy import read_npz
from core.artifacts.limits import Budget
from core.tensors.codebooks import from_arrays, load_codebook, save_codebook

NEEDED = "planes"
OPTIONAL = ("explained_variance_ratio", "n_components", "dim", "method")


def looks_like(names: Collection[str]) -> bool:
    """Tell whether an .npz with these members is meant as a codebook."""
    return f"{NEEDED}.npy" in names and "query_embeddings.npy" not in names


def from_npz(source: Path, target: Path, *, budget: Budget) -> tuple[dict[str, Any], list[str]]:
    """Read an .npz, write ``target``; return the codebook's meta and notes on what was left out."""
    table = read_npz(source, wanted=(NEEDED, *OPTIONAL), name="the .npz", budget=budget)
    codebook = from_arrays(table.arrays)
    save_codebook(target, codebook)
    notes = [f"ignored, no such field: {name[:100]}" for name in table.ignored[:50]]
    if "explained_variance_ratio" not in table.arrays:
        notes.append("no explained_variance_ratio: the planes count as explaining nothing")
    return codebook.meta(), notes


def from_file(source: Path, target: Path) -> tuple[dict[str, Any], list[str]]:
    """Rewrite a codebook that this service wrote as .safetensors; return its meta and no notes."""
    codebook = load_codebook(source)
    save_codebook(target, codebook)
    return codebook.meta(), []
