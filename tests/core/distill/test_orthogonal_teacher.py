"""The blend kept to a codebook's planes, against float64 exponentials."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from core.distill.teachers.orthogonal import OrthogonalTeacher
from core.errors import SpecInvalid
from core.rotations.codebook import angles_of
from core.rotations.skew import from_planes
from core.specs.codebooks import CanonicalPlanes, PrincipalPlanes
from core.specs.teachers import Orthogonal
from tests.core.distill._make import CLUSTERS, DIM, make_model, make_teacher, some_queries


def teacher(
    codebook: CanonicalPlanes | PrincipalPlanes, dtype: str = "float64"
) -> OrthogonalTeacher:
    spec = Orthogonal.model_validate({"codebook": codebook.model_dump(), "dtype": dtype})
    return OrthogonalTeacher(make_model(), spec)


@pytest.mark.parametrize(
    "codebook",
    [
        CanonicalPlanes(n_components=5),
        PrincipalPlanes(n_components=4),
        PrincipalPlanes(n_components=9, disjoint=False),
    ],
)
def test_answers_are_the_exponential_inside_the_planes(
    codebook: CanonicalPlanes | PrincipalPlanes,
) -> None:
    found, queries = teacher(codebook), some_queries(6).double()
    weights = found.mixture(queries).dense()
    planes = torch.from_numpy(found.codebook.planes).double()
    angles = weights @ angles_of(found.bivectors, found.codebook).double()

    answers = found.targets(queries).numpy()

    for query, own, answer in zip(queries, angles, answers, strict=True):
        blend = from_planes(planes.flatten(0, 1).T, own).numpy()
        wanted = query.numpy() @ found.anchor.numpy() @ expm(blend)
        np.testing.assert_allclose(answer, wanted, atol=1e-6)


def test_more_planes_come_nearer_to_the_rotational_teacher() -> None:
    queries = some_queries()
    wanted = make_teacher().targets(queries)
    cosines = []
    for m in (1, 8, CLUSTERS * (DIM // 2)):
        some = teacher(PrincipalPlanes(n_components=m, disjoint=False), "float32")
        cosines.append(float(torch.cosine_similarity(some.targets(queries), wanted).mean()))
    assert cosines == sorted(cosines)
    assert cosines[-1] > 1 - 1e-5, "the planes of all clusters span every blend"


def test_a_width_with_too_few_planes_is_refused_by_name() -> None:
    with pytest.raises(
        SpecInvalid, match=r"teacher\.codebook\.n_components 64; width 12"
    ) as caught:
        Orthogonal().check_width(DIM)
    assert caught.value.pointer == "/teacher/codebook/n_components"


@pytest.mark.parametrize("disjoint", [True, False])
def test_an_answer_does_not_depend_on_the_others_of_its_batch(disjoint: bool) -> None:  # noqa: FBT001
    found = teacher(PrincipalPlanes(n_components=5, disjoint=disjoint))
    queries = some_queries(40).double()
    alone = torch.cat([found.targets(query[None]) for query in queries[:5]])
    torch.testing.assert_close(found.targets(queries)[:5], alone, rtol=0, atol=1e-13)
