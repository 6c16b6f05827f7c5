"""The real small checkpoints, where the data folder lies beside a parent of the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest


def _folder() -> Path | None:
    parents = Path(__file__).resolve().parents
    folders = (parent / "shared/data/tiny_llm" for parent in parents)
    return next((folder for folder in folders if folder.is_dir()), None)


FOLDER = _folder()
"""None where it is not there: tests that read it skip."""
needs_real = pytest.mark.skipif(FOLDER is None, reason="the real checkpoints are not here")


def real(name: str) -> Path:
    """Return the folder of ``stories260k-hf`` (BPE) or ``babyllama105-hf`` (characters)."""
    assert FOLDER is not None
    return FOLDER / name
