"""The rotational teacher with its exponential on JAX: the same algorithm, other last bits."""

from __future__ import annotations

from typing import Any

import torch

from core.distill.teachers._base import Bivectors, Teacher
from core.distill.teachers.rotational import RotationalTeacher
from core.errors import SpecInvalid
from core.rotations.action import Series
from core.specs.teachers import RotationalJax
from core.tensors.formats import Federated


class JaxRotationalTeacher(RotationalTeacher):
    """``rotational`` with the Chebyshev series compiled by XLA; routing and rest are torch's.

    It never calls ``jax.scipy.linalg.expm``, as document 000's did: under vmap that runs every
    branch and all squarings for each query, and it forms a d x d exponential to use one row.

    Within the tolerance of the torch teacher; the same bytes twice on the same device. Its
    fingerprint is its own, so no cache mixes their targets. Memory as for the torch teacher.
    """

    VERSION = 1

    def __init__(
        self,
        model: Federated,
        spec: RotationalJax,
        device: str | torch.device = "cpu",
        bivectors: Bivectors | None = None,
    ) -> None:
        """Take the model to a device; see FederatedTeacher.

        Raises:
            SpecInvalid: JAX is not installed, or not for this device.
        """
        self.series = jax_series(torch.device(device))
        super().__init__(model, spec, device, bivectors)


def jax_series(device: torch.device, **options: Any) -> Series:
    """Return the series on JAX; imports it, which takes a second the first time.

    Raises:
        SpecInvalid: JAX is not installed, or not for this device.
    """
    try:
        from core.rotations.jax_action import JaxSeries, device_of  # noqa: PLC0415 - optional
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("jax", "jaxlib"):
            raise
        raise SpecInvalid(
            "teacher: 'rotational_jax' needs JAX, which is not installed here; "
            "run: pip install 'stillroom[jax]', or take 'rotational'",
            pointer="/teacher/name",
        ) from error
    series = JaxSeries(**options)
    try:
        device_of(device)
    except (RuntimeError, IndexError) as error:
        raise SpecInvalid(
            f"teacher: 'rotational_jax' on {device}, where JAX has no such device; install JAX for "
            "it (for CUDA: pip install 'jax[cuda13]'), or take 'rotational'",
            pointer="/teacher/name",
        ) from error
    return series


TEACHER = Teacher(spec=RotationalJax, build=JaxRotationalTeacher)
