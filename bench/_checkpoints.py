"""Where the two real checkpoints lie: beside a parent of the checkout, or nowhere."""

from __future__ import annotations

from pathlib import Path

NAMES = ("stories260k-hf", "babyllama105-hf")
"""The first cuts text by BPE, the second into characters."""


def checkpoint(name: str) -> Path | None:
    """Return the folder of a real checkpoint, None where it is not there."""
    parents = Path(__file__).resolve().parents
    folders = (parent / "shared/data/tiny_llm" / name for parent in parents)
    return next((folder for folder in folders if folder.is_dir()), None)
