"""An uploaded lda.db, read as tables alone, as an lda_model. Its newest projection is taken."""

from pathlib import Path
from typing import Any

from core.artifacts.limits import Limits
from core.tensors.lda import save_lda
from core.tensors.lda_db import load_lda_db, projection_names
from core.tensors.manifests import shown
from core.tensors.sqlite_tables import MAGIC


def looks_like(head: bytes) -> bool:
    """Tell whether a file starts like an SQLite database."""
    return head.startswith(MAGIC)


def from_file(source: Path, target: Path, *, limits: Limits) -> tuple[dict[str, Any], list[str]]:
    """Read the newest projection, write ``target``; return the model's meta and notes.

    Raises:
        DataInvalid: names table, row and field; or the schema is more than plain tables.
    """
    model = load_lda_db(source, most_heads=limits.clusters, most_dim=limits.dim)
    save_lda(target, model)
    notes = []
    if others := projection_names(source)[:-1]:
        names = ", ".join(shown(name) for name in others[:20])
        notes.append(
            f"projection {shown(model.manifest['projection'])} was taken, the newest; "
            f"{len(others)} other(s) left out: {names}"
        )
    if model.manifest.get("questions") == "centroids":
        notes.append(
            "no questions in the file: the centroids stand in their place, with the answers of "
            "their heads as targets"
        )
    return model.meta(), notes
