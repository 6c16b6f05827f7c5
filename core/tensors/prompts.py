"""The artifact ``prompts``: short texts with language, licence and split, as one .safetensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompts:
    """Texts in the order they were sent; columns of equal length."""

    ids: list[str]
    texts: list[str]
    languages: list[str]
    """Such as ``en``; empty where nobody said."""
    licences: list[str]
    """Empty where nobody said."""
    splits: list[str]
    """``train``, ``test``, or empty: left to the job, by its seed."""
