"""The students of documents 001 and 004 that need no rotation: linear, mlp, hierarchical."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from sklearn.decomposition import PCA

from core.distill.export import to_onnx
from core.distill.nulls import fit_ridge
from core.distill.students._base import Shown, StudentModule, build_student
from core.distill.students.hierarchical import HierarchicalStudent
from core.distill.students.linear import LinearStudent, principal_axes
from core.distill.students.mlp import MlpStudent
from core.distill.teachers.checkpoint import CheckpointTeacher
from core.errors import SpecInvalid
from core.specs.plain_students import Hierarchical, Linear, Mlp
from core.specs.sizes import Sizes
from core.specs.teachers import Checkpoint
from core.tensors.shards import Array
from tests.core.distill._codes import SMALL, code_student, code_teacher
from tests.core.distill._make import DIM, make_embeddings, some_queries
from tests.core.distill.test_export import run_onnx


def linear(spec: Linear, *, inputs: bool = True) -> LinearStudent:
    student = build_student(spec, code_teacher(inputs=inputs), 3)
    assert isinstance(student, LinearStudent)
    return student


def angles(a: Array, b: Array) -> Array:
    """Principal angles between two column spaces, rad, without acos (Bjorck and Golub 1973)."""
    a, b = (np.linalg.qr(x)[0] for x in (a, b))
    left = b - a @ (a.T @ b)
    return np.arcsin(np.linalg.svd(left, compute_uv=False).clip(0, 1))


@pytest.mark.parametrize("dim", [2, 5, DIM - 1])
def test_a_linear_map_of_the_embeddings_themselves_starts_as_pca(dim: int) -> None:
    rows = code_teacher(inputs=False).truths.astype(np.float64)
    pca = PCA(dim, svd_solver="full").fit(rows)

    student = linear(Linear(dim=dim), inputs=False)

    assert angles(student.layer.weight.detach().T.double().numpy(), pca.components_.T).max() < 1e-2
    codes = student(torch.from_numpy(rows.astype(np.float32))).detach().numpy()
    signs = np.sign((codes * pca.transform(rows)).sum(0))
    np.testing.assert_allclose(codes, signs * pca.transform(rows), atol=2e-2)
    assert student.compares == "relations"


def test_a_linear_map_of_the_answers_width_starts_as_ridge() -> None:
    teacher = code_teacher()
    queries, truths = torch.from_numpy(teacher.queries), torch.from_numpy(teacher.truths)

    student = linear(Linear())

    wanted = fit_ridge(queries, truths, seed=3)(some_queries())
    torch.testing.assert_close(student(some_queries()).double(), wanted, rtol=0, atol=1e-5)
    assert student.compares == "vectors"


def test_a_wider_answer_has_nothing_to_be_fitted_to() -> None:
    sizes = Sizes(DIM, DIM, 100)
    with pytest.raises(SpecInvalid, match="allowed: 1 to 12, or start 'random'") as caught:
        Linear(dim=13).check_sizes(sizes)
    assert caught.value.pointer == "/student/dim"
    Linear(dim=13, start="random").check_sizes(sizes)
    assert linear(Linear(dim=13, start="random"))(some_queries()).shape == (50, 13)


@pytest.mark.parametrize(("rows", "width", "count"), [(80, 12, 4), (80, 12, 12), (6, 12, 5)])
def test_principal_axes_are_sklearns_with_plain_signs(rows: int, width: int, count: int) -> None:
    random = np.random.default_rng(rows)
    vectors = random.normal(size=(rows, width)) * np.linspace(3, 1, width) + 5
    wanted = PCA(count, svd_solver="full").fit(vectors).components_.T

    found = principal_axes(torch.from_numpy(vectors), count).numpy()

    assert found.shape == (width, count)
    largest = found[np.abs(found).argmax(0), np.arange(count)]
    assert (largest > 0).all()
    signs = np.sign((found * wanted).sum(0))
    np.testing.assert_allclose(found, signs * wanted, atol=1e-9)
    again = principal_axes(torch.from_numpy(vectors[::-1].copy()), count).numpy()
    np.testing.assert_allclose(again, found, atol=1e-9)


@pytest.mark.parametrize("spec", [Mlp(hidden=16, layers=2), Hierarchical.model_validate(SMALL)])
def test_inputs_are_standardised_whatever_their_unit(spec: Mlp | Hierarchical) -> None:
    model = make_embeddings()
    assert model.inputs is not None
    moved = replace(model, inputs=(1000 * model.inputs + 70).astype(np.float32))
    found: list[StudentModule] = [
        build_student(spec, CheckpointTeacher(each, Checkpoint()), 0).eval()
        for each in (model, moved)
    ]
    body = found[0].body if isinstance(found[0], MlpStudent) else found[0].get_submodule("encoder")
    queries = code_teacher().queries.astype(np.float64)
    np.testing.assert_allclose(body.mean, queries.mean(0), atol=1e-6)  # type: ignore[arg-type]
    spread = np.sqrt(((queries - queries.mean(0)) ** 2).mean())
    assert float(body.scale) == pytest.approx(spread, rel=1e-6)  # type: ignore[arg-type]
    torch.testing.assert_close(
        found[1](1000 * some_queries() + 70), found[0](some_queries()), rtol=0, atol=1e-3
    )


def test_equal_inputs_have_no_spread_to_divide_by() -> None:
    model = make_embeddings()
    alike = replace(model, inputs=np.ones_like(model.embeddings))
    student = build_student(Mlp(hidden=8, layers=1), CheckpointTeacher(alike, Checkpoint()), 0)
    assert student(torch.ones(2, DIM)).isfinite().all()


def test_noise_and_dropout_are_of_training_alone() -> None:
    student = code_student()
    student.train()
    assert not torch.equal(student(some_queries()), student(some_queries()))
    student.eval()
    assert torch.equal(student(some_queries()), student(some_queries()))
    assert student.draws
    assert not code_student(noise=0.0, dropout=0.0).draws


def test_noise_is_as_long_as_told_and_leaves_lengths() -> None:
    student, seen = code_student(noise=0.5, dropout=0.0), []
    first = student.get_submodule("encoder.layers.0")
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    queries = 3 * some_queries(1).expand(4000, -1)
    student.train()(queries)

    encoder = student.encoder
    moved = seen[0] * encoder.scale + encoder.mean
    torch.testing.assert_close(moved.norm(dim=1), queries.norm(dim=1))
    cosine = torch.cosine_similarity(moved, queries).mean()
    # Gaussian noise of length 0.5 across a unit vector: about 1 / sqrt(1 + 0.5^2).
    assert float(cosine) == pytest.approx(1 / 1.25**0.5, abs=0.02)


def test_codes_are_nested_and_a_decoder_brings_them_back() -> None:
    student = code_student().eval()
    asked = Shown(some_queries(), torch.zeros(50, 0), torch.zeros(50, 0), torch.full((50, 1), -1))
    routed = student.routed(asked)
    assert routed.vectors.shape == (50, 5)
    assert routed.decoded is not None
    assert routed.decoded.shape == (50, DIM)
    decoded = student.decode(routed.vectors)
    assert decoded is not None
    assert torch.equal(decoded, routed.decoded)
    assert student.levels == ((2, 0.7), (5, 0.3))
    assert (student.output_dim(), student.compares) == (5, "relations")

    bare = code_student(decoder=0).eval()
    assert bare.decode(routed.vectors) is None
    assert bare.routed(asked).decoded is None
    assert not bare.decodes


def test_an_exported_student_is_the_encoder_alone() -> None:
    with_decoder, bare = code_student().eval(), code_student(decoder=0).eval()
    bare.encoder.load_state_dict(with_decoder.encoder.state_dict())
    data = to_onnx(with_decoder)

    assert data == to_onnx(bare)
    found = run_onnx(data, some_queries())
    assert found.shape == (50, 5)
    graph = onnx.load_from_string(data).graph
    held = sum(int(np.prod(each.dims)) for each in graph.initializer)
    wanted = sum(value.numel() for value in with_decoder.encoder.state_dict().values())
    assert held == wanted


def test_a_config_brings_levels_and_decoder_back() -> None:
    student = code_student(levels=(1, 3, 4), level_weights=(0.5, 0.3, 0.2))
    again = HierarchicalStudent(
        **{k: v for k, v in student.config.items() if k not in ("name", "target_dim")}
    )
    again.load_state_dict(student.state_dict())
    assert again.config == student.config
    assert again.levels == student.levels
    assert torch.equal(again.eval()(some_queries()), student.eval()(some_queries()))
