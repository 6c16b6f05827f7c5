"""Tests on the two real checkpoints, which skip where those are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench._checkpoints import NAMES, checkpoint

needs_real = pytest.mark.skipif(
    None in map(checkpoint, NAMES), reason="the real checkpoints are not beside this checkout"
)


def real(name: str) -> Path:
    """Return the folder of a real checkpoint, in a test that ``needs_real``."""
    found = checkpoint(name)
    assert found is not None
    return found
