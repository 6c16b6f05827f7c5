"""Document 000's student in all its forms: three ways to turn, three codebooks, two biases."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from core.distill.export import export_student, load_student, to_onnx
from core.distill.students._base import build_student, restore_student
from core.distill.students._turns import turn, turn_angles
from core.distill.students.canonical import CanonicalStudent
from core.distill.training import TrainState, run_epochs
from core.errors import DataInvalid, SpecInvalid
from core.rotations.codebook import bases_of
from core.rotations.skew import from_planes
from core.specs.canonical import Canonical
from core.specs.sizes import Sizes
from tests.core.distill._make import (
    DIM,
    make_data,
    make_student,
    make_teacher,
    make_training,
    some_queries,
)
from tests.core.distill.test_export import disturbed, run_onnx

TYPES = ("additive", "composed", "bivector_blend")
CODEBOOKS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"method": "pca", "n_components": 4},
    {"method": "pca", "n_components": 4, "disjoint": False},
    {"method": "combined", "n_components": 3, "planes_per_cluster": 3},
)
FORMS = [
    {"transformer_type": form, "codebook": codebook, "bias": bias, "angle_scale": scale}
    for (form, codebook), (bias, scale) in zip(
        itertools.product(TYPES, CODEBOOKS),
        itertools.cycle([("angle", 3.0), ("vector", 2.5), ("none", 1.5)]),
        strict=False,
    )
] + [{"transformer_type": form, "bias": "vector"} for form in TYPES]
LEGACY = {"compat": "legacy", "transformer_type": "composed"}
"""Left out of what keeps lengths: its softplus scale changes them."""


def spec_of(form: dict[str, Any]) -> Canonical:
    own = {"n_components": 4} if form.get("codebook") is None else {}
    return Canonical.model_validate({"layers": 2, "heads": 3, **own, **form})


def student_of(form: dict[str, Any], *, noise: float = 0.3) -> CanonicalStudent:
    """Built from the teacher, then with something to say in every parameter."""
    student = build_student(spec_of(form), make_teacher(), 0)
    assert isinstance(student, CanonicalStudent)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=noise)
    return student.eval()


def name_of(form: dict[str, Any]) -> str:
    return "-".join(str(value) for value in form.values())


every_form = pytest.mark.parametrize("form", FORMS, ids=name_of)
any_form = pytest.mark.parametrize("form", [*FORMS, LEGACY], ids=name_of)


@every_form
def test_every_form_keeps_lengths(form: dict[str, Any]) -> None:
    queries = some_queries() * torch.linspace(0.1, 10, 50)[:, None]
    lengths = student_of(form)(queries).norm(dim=1)
    torch.testing.assert_close(lengths, queries.norm(dim=1), rtol=1e-6, atol=0)


@any_form
@pytest.mark.parametrize("rows", [1, 7])
def test_onnx_says_what_torch_says_in_every_form(form: dict[str, Any], rows: int) -> None:
    student, queries = student_of(form), some_queries(rows)
    if rows > 1:
        queries[0] = 0
    found, wanted = run_onnx(to_onnx(student), queries), student(queries).detach()
    assert np.abs(found - wanted.numpy()).max() < 2e-6
    assert (wanted - queries).abs().max() > 0.05, "it does something"


@any_form
def test_every_form_comes_back_from_its_files(form: dict[str, Any], tmp_path: Path) -> None:
    student = student_of(form)
    files = export_student(student, tmp_path)
    for path in (files.torch, files.safetensors):
        again = load_student(path)
        assert torch.equal(again(some_queries()), student(some_queries()))
        assert again.config == student.config


@any_form
def test_every_parameter_of_every_form_gets_a_gradient(form: dict[str, Any]) -> None:
    student = student_of(form, noise=0.05)
    student(some_queries())[:, 0].sum().backward()
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@every_form
def test_a_batch_is_its_rows_in_every_form(form: dict[str, Any]) -> None:
    student, queries = student_of(form), some_queries(5)
    single = torch.cat([student(query[None]) for query in queries])
    torch.testing.assert_close(student(queries), single, rtol=0, atol=1e-6)
    assert student(queries[:0]).shape == (0, DIM)


def parts(planes: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    weights = torch.rand(3, len(planes), generator=generator, dtype=torch.float64)
    return queries, weights / weights.sum(1, keepdim=True)


def planes_of(*, disjoint: bool) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(3, 8, 2, generator=generator, dtype=torch.float64)
    if disjoint:
        values = torch.linalg.qr(torch.cat(list(values), 1)).Q.T.reshape(3, 2, 8).mT
    return torch.linalg.qr(values).Q.mT.contiguous()


@pytest.mark.parametrize("disjoint", [True, False])
def test_each_form_is_its_definition(*, disjoint: bool) -> None:
    planes = planes_of(disjoint=disjoint)
    queries, weights = parts(planes)
    scale, constant = 1.5, torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)

    def turned(form: str) -> Tensor:
        angles = turn_angles(form, weights, scale, constant)
        return turn(form, queries, planes, weights, angles, disjoint=disjoint, radius=3.0)

    for row, query in enumerate(queries):
        angles = scale * weights[row] + constant
        single = [from_planes(plane.T, torch.ones(1).double()) for plane in planes]
        summed = torch.zeros(8).double()
        composed = query
        for plane, turning in enumerate(single):
            whole = torch.linalg.matrix_exp((scale + constant[plane]) * turning)
            summed = summed + weights[row, plane] * (query @ whole)
            composed = composed @ torch.linalg.matrix_exp(angles[plane] * turning)
        blend = from_planes(bases_of(planes), angles)
        wanted = {
            "additive": summed,
            "composed": composed,
            "bivector_blend": query @ torch.linalg.matrix_exp(blend),
        }
        for form in TYPES:
            torch.testing.assert_close(turned(form)[row], wanted[form], rtol=0, atol=1e-6)


def test_disjoint_planes_make_composed_and_blend_one_map_and_others_do_not() -> None:
    for codebook in CODEBOOKS:
        both = [
            student_of({"transformer_type": form, "codebook": codebook, "angle_scale": 3.0})
            for form in TYPES
        ]
        added, composed, blended = (student(some_queries()) for student in both)
        same = (composed - blended).abs().max() < 1e-6
        assert same == both[0].config["disjoint"]
        assert same == (not codebook or codebook.get("disjoint", True))
        assert (added - composed).abs().max() > 1e-3


def test_all_weight_in_one_plane_is_the_same_turn_in_every_form() -> None:
    planes = planes_of(disjoint=False)
    queries, _ = parts(planes)
    weights = torch.eye(3, dtype=torch.float64)
    answers = [
        turn(
            form,
            queries,
            planes,
            weights,
            turn_angles(form, weights, 2.0, None),
            disjoint=False,
            radius=2.0,
        )
        for form in TYPES
    ]
    torch.testing.assert_close(answers[0], answers[1])
    torch.testing.assert_close(answers[0], answers[2], rtol=0, atol=1e-6)


def test_the_angle_of_all_weight_is_the_scale() -> None:
    student = make_student("canonical", n_components=1, layers=1, angle_scale=2.0)
    queries = torch.zeros(1, DIM)
    queries[0, 0] = 1
    found = student(queries)[0]
    assert found[:2].tolist() == pytest.approx([math.cos(2), math.sin(2)], abs=1e-6)


def test_planes_of_the_teacher_start_from_its_anchor() -> None:
    teacher = make_teacher()
    form = {"codebook": {"method": "pca", "n_components": 6}, "angle_scale": 1e-6}
    student = build_student(spec_of(form), teacher, 0)
    torch.testing.assert_close(
        student(some_queries()), some_queries() @ teacher.anchor, rtol=0, atol=1e-5
    )


def test_planes_are_those_of_the_weighed_bivectors_and_are_kept_in_the_state() -> None:
    student = student_of({"codebook": {"method": "pca", "n_components": 4}})
    assert student.planes.shape == (4, 2, DIM)
    assert "planes" in student.state_dict()
    assert "planes" not in dict(student.named_parameters())
    other = student_of({"codebook": {"method": "pca", "n_components": 4, "solver": "incremental"}})
    cosines = torch.einsum("mij,mkj->mik", student.planes, other.planes)
    torch.testing.assert_close(torch.linalg.svdvals(cosines), torch.ones(4, 2), rtol=0, atol=1e-3)


def test_legacy_scales_every_query_alike_and_changes_no_direction() -> None:
    plain, legacy = (make_student("canonical", compat=compat) for compat in (None, "legacy"))
    assert torch.equal(legacy(some_queries()), plain(some_queries())), "it starts at 1"
    with torch.no_grad():
        legacy.get_parameter("scale").fill_(2.0)
    factor = math.log(1 + math.exp(2))
    torch.testing.assert_close(legacy(some_queries()), factor * plain(some_queries()))


def test_training_leaves_the_legacy_scale_where_angles_cannot_see_it() -> None:
    training = make_training(epochs=4)
    state = TrainState.start(make_student("canonical", compat="legacy"), training, seed=0)
    before = float(state.student.get_parameter("scale").detach())
    run_epochs(state, make_data(training), 0, 4, lambda done, total: None)
    assert float(state.student.get_parameter("scale").detach()) == before


def test_planes_of_the_teacher_come_nearer_to_it_than_canonical_ones() -> None:
    training = make_training(epochs=8, learning_rate=2e-2)
    reached = []
    for form in (
        {"n_components": 6},
        {"codebook": {"method": "pca", "n_components": 6}, "bias": "angle"},
    ):
        student = build_student(spec_of(form), make_teacher(), 0)
        state = TrainState.start(student, training, seed=0)
        run_epochs(state, make_data(training), 0, 8, lambda done, total: None)
        reached.append(state.best_score)
    assert reached[1] > reached[0] + 0.05


def test_a_student_of_before_there_were_codebooks_comes_back() -> None:
    student = make_student("canonical")
    state = student.state_dict()
    assert sorted(state) == sorted(
        f"layers.{layer}.{part}"
        for layer in range(2)
        for part in ("keys", "query.bias", "query.weight")
    )
    config = {"name": "canonical", "dim": DIM, "n_components": 4, "layers": 2, "heads": 3}

    again = restore_student(config, state)

    assert torch.equal(again(some_queries()), student(some_queries()))
    stored = {"name": "canonical", "n_components": 64, "layers": 3, "heads": 4}
    assert Canonical.model_validate(stored).planes() == Canonical().planes()


def test_a_spec_comes_back_as_it_was_stored() -> None:
    for form in (*FORMS, LEGACY, {}):
        spec = spec_of(form)
        assert Canonical.model_validate(spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize(
    ("form", "match"),
    [
        ({"n_components": 4, "codebook": {"method": "pca"}}, "n_components 4 beside codebook"),
        ({"compat": "legacy", "angle_scale": 2}, "angle_scale 2 with compat 'legacy'"),
        ({"angle_scale": 0}, "greater than 0"),
        ({"angle_scale": 1e9}, "less than or equal to 256"),
        ({"transformer_type": "optimus"}, "additive"),
        ({"codebook": {"method": "oracle"}}, "canonical"),
        ({"codebook": {"method": "pca", "solver": "guess"}}, "full"),
        ({"codebook": {"method": "canonical", "disjoint": True}}, "disjoint"),
    ],
)
def test_what_a_student_cannot_be_told_is_refused(form: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        Canonical.model_validate(form)


@pytest.mark.parametrize(
    ("form", "match", "pointer"),
    [
        (
            {"codebook": {"method": "pca", "n_components": 7}},
            "student.codebook.n_components 7; width 12 has 6 planes, allowed: 1 to 6",
            "/student/codebook/n_components",
        ),
        (
            {"codebook": {"method": "pca", "n_components": 67, "disjoint": False}},
            "width 12 has 66 planes",
            "/student/codebook/n_components",
        ),
        ({"n_components": 7}, "student.n_components 7", "/student/n_components"),
        ({"heads": 5}, "heads 5 does not divide", "/student/heads"),
    ],
)
def test_what_the_width_cannot_hold_is_refused(
    form: dict[str, Any], match: str, pointer: str
) -> None:
    with pytest.raises(SpecInvalid, match=match) as caught:
        spec_of(form).check_sizes(Sizes(DIM, DIM, 100, 4))
    assert caught.value.pointer == pointer


def test_a_config_that_no_spec_allows_is_refused() -> None:
    student = disturbed("canonical", {})
    for changes in ({"bias": "heavy"}, {"layers": 0}, {"unheard_of": 1}):
        with pytest.raises(DataInvalid, match="the student's config"):
            restore_student({**student.config, **changes}, student.state_dict())


def test_where_rotations_cancel_a_layer_leaves_its_query() -> None:
    student = student_of(
        {"transformer_type": "additive", "n_components": 2, "angle_scale": math.pi}, noise=0
    )
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("keys"):  # both planes weigh a half
                parameter.zero_()
    queries = torch.eye(DIM)[:3]  # two in the first plane, one in the second
    found = student(queries).detach()
    torch.testing.assert_close(found, queries)
    np.testing.assert_allclose(run_onnx(to_onnx(student), queries), queries.numpy(), atol=1e-6)
