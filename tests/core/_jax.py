"""JAX is an extra: where it is missing, its tests are skipped on a desk and fail in CI."""

from __future__ import annotations

import importlib.util
import os

import pytest


def require_jax(*, module: bool = False) -> None:
    """Skip the test, or the whole module, unless JAX is there; fail where CI is set."""
    if importlib.util.find_spec("jax") is not None:
        return
    reason = "JAX is missing; run: pip install 'stillroom[jax]'"
    if os.environ.get("CI"):  # noqa: TID251 - no setting of the service
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=module)
