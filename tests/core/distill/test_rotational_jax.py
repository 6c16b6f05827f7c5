from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from core.distill.backends import BACKENDS, compare_backends, time_in_turns
from core.distill.teachers.rotational import RotationalTeacher
from core.distill.teachers.rotational_jax import JaxRotationalTeacher
from core.errors import SpecInvalid
from core.specs.teachers import Rotational, RotationalJax
from tests.core.distill._make import make_model, make_teacher, some_queries


@pytest.fixture
def without_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python as if JAX had never been installed."""
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "core.rotations.jax_action", raising=False)


@pytest.mark.parametrize("told", [{}, {"compat": "legacy"}, {"dtype": "float64"}, {"top_k": 1}])
def test_the_jax_teacher_says_what_torch_says(told: dict[str, object]) -> None:
    ours = JaxRotationalTeacher(make_model(), RotationalJax.model_validate(told))
    torchs = RotationalTeacher(make_model(), Rotational.model_validate(told))
    queries = some_queries(200)

    gap = (ours.targets(queries) - torchs.targets(queries)).norm(dim=1)

    assert float(gap.max()) <= 2e-6
    assert ours.targets(queries).dtype == torchs.targets(queries).dtype
    assert ours.fingerprint() != torchs.fingerprint()


def test_jax_teachers_are_told_what_torchs_are() -> None:
    asked = {"top_k": 3, "temperature": 0.2, "tolerance": 1e-3, "compat": "legacy"}
    plain = Rotational.model_validate(asked).model_dump(exclude={"name"})
    assert RotationalJax.model_validate(asked).model_dump(exclude={"name"}) == plain


def test_every_teacher_is_listed_without_importing_jax() -> None:
    code = (
        "import sys; from core.distill.teachers._base import teachers;"
        "assert 'rotational_jax' in teachers(); sys.exit('jax' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.usefixtures("without_jax")
def test_where_the_library_is_missing_the_error_says_what_to_install() -> None:
    with pytest.raises(SpecInvalid, match=r"run: pip install 'stillroom\[jax\]'") as caught:
        JaxRotationalTeacher(make_model(), RotationalJax())

    assert caught.value.pointer == "/teacher/name"


def test_a_device_that_jax_does_not_have_is_refused() -> None:
    with pytest.raises(SpecInvalid, match="on cpu:99, where JAX has no such device"):
        JaxRotationalTeacher(make_model(), RotationalJax(), "cpu:99")


def test_the_backend_with_most_queries_a_second_is_chosen() -> None:
    answers = some_queries(10)
    times = iter([0.0, 5.0, 5.0, 6.0] + [0.0, 2.0, 2.0, 2.5] * 3)
    works = {"slow": lambda: answers, "quick": lambda: answers * 2}

    slow, quick = time_in_turns(works, torch.device("cpu"), queries=10, clock=lambda: next(times))

    assert (slow.queries_per_second, slow.compile_seconds, slow.difference) == (5, 3, 0)
    assert (quick.queries_per_second, quick.compile_seconds) == (20, 0.5)
    assert quick.difference == pytest.approx(1, abs=1e-6)


def test_backends_are_compared_on_one_block_with_jax_beside_torch() -> None:
    ticks = iter(np.arange(1000.0))
    found = compare_backends(
        make_model(), Rotational(), "cpu", queries=300, clock=lambda: float(next(ticks))
    )

    assert [timing.name for timing in found.timings] == list(BACKENDS)
    assert found.fastest == "rotational"  # of equally fast ones the first
    assert (found.queries, found.device, found.left_out) == (300, "cpu", ())
    assert found.difference <= 2e-6


@pytest.mark.usefixtures("without_jax")
def test_a_backend_that_is_not_installed_is_left_out_and_says_why() -> None:
    found = compare_backends(make_model(), make_teacher().spec, "cpu", queries=5)

    assert found.fastest == "rotational"
    [(name, why)] = found.left_out
    assert name == "rotational_jax"
    assert "stillroom[jax]" in why
    with pytest.raises(SpecInvalid, match=r"stillroom\[jax\]"):
        compare_backends(make_model(), Rotational(), "cpu", queries=5, among=("rotational_jax",))


def test_a_comparison_of_nothing_is_refused() -> None:
    with pytest.raises(SpecInvalid, match="queries: 0; allowed: from 1 up"):
        compare_backends(make_model(), Rotational(), "cpu", queries=0)
    with pytest.raises(SpecInvalid, match=r"backends: \['direct'\]; allowed: rotational, rot"):
        compare_backends(make_model(), Rotational(), "cpu", queries=1, among=("direct",))
    with pytest.raises(SpecInvalid, match="backends: none"):
        compare_backends(make_model(), Rotational(), "cpu", queries=1, among=())
