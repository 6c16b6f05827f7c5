"""Which student is taken: against a simulated truth in float64, whose number of planes is known."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import ive
from torch import Tensor
from torch.nn import functional

from core.distill import vmf
from core.distill.batches import left_out_answers
from core.distill.curriculum import teacher_answers, training_data
from core.distill.fitting import global_rotation
from core.distill.judging import Judged, Residuals, baseline_chord, effective_dim, effective_rows
from core.distill.judging import judge as judge_student
from core.distill.selection import Criterion, Line, cluster_error, one_standard_error, select
from core.distill.sweep_report import markdown, write_sweep
from core.distill.teachers.rotational import RotationalTeacher
from core.rotations.logarithm import rotation_log
from core.rotations.planes import plane_factors, rotate_in_planes
from core.rotations.procrustes import procrustes
from core.specs.codebooks import CanonicalPlanes, PrincipalPlanes
from core.specs.teachers import Rotational
from core.tensors.shards import Array
from tests.core.distill._make import make_data, make_model, make_student, make_training

D, CLUSTERS, TRUTH = 12, 40, 3


@cache
def simulated(seed: int, rows: int = 400) -> list[Judged]:
    """Rotations in 0 to 6 planes, fitted to noisy targets that were turned in TRUTH planes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = torch.linalg.qr(normal(D, 2 * TRUTH)).Q
    angles = torch.tensor([1.2, 0.8, 0.5], dtype=torch.float64)

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
        queries = functional.normalize(normal(count, D), dim=1)
        noise = 0.1 * normal(count, D) * D**-0.5
        return (
            queries,
            rotate_in_planes(queries, base, angles) + noise,
            torch.arange(count) % CLUSTERS,
        )

    shown, hidden = draw(rows), draw(200)
    factors = plane_factors(rotation_log(procrustes(shown[0], shown[1])[None]).bivectors)
    found = []
    for planes in range(D // 2 + 1):
        own, sizes = factors.bases[0, :, : 2 * planes], factors.angles[0, :planes]
        inside, outside = (
            Residuals.of(rotate_in_planes(q, own, sizes), y, g, clusters=CLUSTERS)
            for q, y, g in (shown, hidden)
        )
        found.append(
            Judged(
                name=f"{planes} planes",
                parameters=planes * (2 * D - 2 * planes - 1),
                stored_bytes=planes * 1_000_000,
                trained=True,
                held_in=inside.squares.numpy(),
                held_out=outside.squares.numpy(),
                groups=hidden[2].numpy(),
                effective_rows=effective_rows(inside),
                effective_dim=effective_dim(inside),
            )
        )
    return found


def baseline(candidates: list[Judged]) -> float:
    return float(candidates[0].held_in.mean())


@pytest.mark.parametrize(("criterion", "most"), [("aic", 4), ("bic", 3), ("held_out", 3)])
def test_about_as_many_planes_are_taken_as_made_the_data(criterion: Criterion, most: int) -> None:
    for seed in range(4):
        candidates = simulated(seed)
        found = select(candidates, dim=D, baseline=baseline(candidates), criterion=criterion)

        assert found.used == criterion
        assert f"{TRUTH} planes" <= found.chosen <= f"{most} planes"


def test_residuals_over_their_own_sigma_always_take_the_smallest() -> None:
    """The trap: their squares sum to the same whatever a candidate does."""
    candidates = simulated(0)
    own = [
        float((found.held_in / (found.held_in.mean() / (D - 1))).sum()) + 2 * found.parameters
        for found in candidates
    ]

    assert int(np.argmin(own)) == 0
    assert np.ptp(np.array(own) - [2 * found.parameters for found in candidates]) < 1e-6
    assert select(candidates, dim=D, baseline=baseline(candidates)).chosen != candidates[0].name


def test_the_working_form_is_the_exact_likelihood_at_high_concentration() -> None:
    """n (d - 1) d log(1 - R^2) against twice the exact maximal log-likelihoods."""
    rng = np.random.default_rng(0)
    near, far = (scale * rng.chisquare(D - 1, size=500) for scale in (1e-5, 3e-5))

    exact = [
        -2 * vmf.log_density(s, vmf.concentration(float(s.mean()), D), D).sum() for s in (near, far)
    ]

    working = 500 * (D - 1) * math.log(near.mean() / far.mean())
    assert exact[0] - exact[1] == pytest.approx(working, rel=1e-3)


def test_the_criteria_are_the_formulas() -> None:
    candidates = [replace(found, effective_rows=300.0) for found in simulated(1)]
    found = select(candidates, dim=D, baseline=baseline(candidates))
    best = min(candidates, key=lambda each: each.held_in.mean())

    for line, given in zip(found.lines, candidates, strict=True):
        fit = 300.0 * best.effective_dim * math.log1p(-line.r2)
        assert line.aic == pytest.approx(fit + 2 * given.parameters)
        assert line.bic == pytest.approx(fit + given.parameters * math.log(300.0))


def test_aic_is_refused_in_words_where_parameters_outnumber_effective_rows() -> None:
    candidates = [replace(found, effective_rows=45.0) for found in simulated(0)]

    found = select(candidates, dim=D, baseline=baseline(candidates), criterion="aic")

    assert found.used == "held_out"
    assert found.undefined == ["3 planes", "4 planes", "5 planes", "6 planes"]
    assert [line.aic is None for line in found.lines] == [False] * 3 + [True] * 4
    assert "AIC was asked for and is refused" in found.words[1]
    assert "3 planes, 4 planes, 5 planes and 1 more" in found.words[1]
    assert found.chosen == "3 planes"
    assert select(candidates, dim=D, baseline=1.0).used == "held_out"
    assert select(candidates[:3], dim=D, baseline=1.0).used == "aic"


def line(name: str, size: int, score: float, error: float | None = 0.5) -> Line:
    return Line(name, 99 - size, size, 0.5, None, None, 0.9, 10.0, score, error, 0.0, None)


def test_the_smallest_within_one_standard_error_of_the_best_is_taken() -> None:
    lines = [line("small", 1, 9.4), line("middle", 5, 9.5), line("best", 9, 10.0)]

    assert one_standard_error(lines) == 1
    assert one_standard_error([*lines, line("like", 5, 9.6)]) == 3, "the better of equals"
    assert one_standard_error([line("a", 1, 9.9), line("b", 2, 10.0, None)]) == 1


def test_a_standard_error_counts_clusters_not_rows() -> None:
    rng = np.random.default_rng(0)
    values, groups = np.repeat(rng.normal(size=30), 20), np.repeat(np.arange(30), 20)

    by_cluster = cluster_error(values, groups)

    assert by_cluster == pytest.approx(values[::20].std(ddof=1) / math.sqrt(30))
    assert cluster_error(values, np.arange(600)) == pytest.approx(
        values.std(ddof=1) / math.sqrt(600)
    )
    assert cluster_error(values, np.zeros(600)) == cluster_error(values, np.arange(600))
    assert cluster_error(values[:1], groups[:1]) is None


def residuals(errors: Array, groups: Array) -> Residuals:
    """Residuals as given, without the sphere."""
    wide = torch.from_numpy(errors)
    sums = torch.zeros(int(groups.max()) + 1, wide.shape[1], dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(groups), wide)
    return Residuals(wide.square().sum(1), wide.mT @ wide, sums)


def test_rows_that_err_alike_count_once() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(25), 20)

    alike = residuals(np.repeat(rng.normal(size=(25, 8)), 20, axis=0), groups)
    apart = [effective_rows(residuals(rng.normal(size=(500, 8)), groups)) for _ in range(100)]

    assert effective_rows(alike) == pytest.approx(25)
    assert max(apart) == 500, "never more than there are"
    assert np.mean(apart) == pytest.approx(480, rel=0.02), "the effect varies by a tenth, above 1"


def test_the_effective_dimension_is_that_of_the_noise_even_from_few_rows() -> None:
    """Five equal directions of eight; the plain ratio of 20 rows would say about four."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(50):
        errors = np.zeros((20, 8))
        errors[:, :5] = rng.normal(size=(20, 5))
        found.append(effective_dim(residuals(errors, np.zeros(20, np.int64))))

    assert np.mean(found) == pytest.approx(5, rel=0.06)
    one = residuals(np.outer(rng.normal(size=20), rng.normal(size=8)), np.zeros(20, np.int64))
    assert effective_dim(one) == pytest.approx(1)


def test_blocks_of_residuals_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(30, D, generator=generator) for _ in range(2))
    groups = torch.arange(30) % 4

    whole = Residuals.of(a, b, groups, clusters=4)
    parts = [
        Residuals.of(a[rows], b[rows], groups[rows], clusters=4)
        for rows in (slice(0, 7), slice(7, 30))
    ]

    for name, value in vars(parts[0] + parts[1]).items():
        torch.testing.assert_close(value, getattr(whole, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("order", "x"), [(0.0, 35.0), (5.0, 40.0), (14.5, 60.0), (60.0, 80.0)])
def test_the_bessel_series_agrees_with_scipy(order: float, x: float) -> None:
    assert vmf.log_bessel(order, x) == pytest.approx(math.log(ive(order, x)), abs=2e-8)


def test_bessel_is_known_where_scipy_underflows() -> None:
    """I_nu(x) -> (x / 2)^nu / nu! for small x, and exp(-x) I -> 1 / sqrt(2 pi x) for large x."""
    assert ive(400.0, 1.0) == 0
    first = 400 * math.log(0.5) - math.lgamma(401)
    assert vmf.log_bessel(400.0, 1.0) == pytest.approx(first - 1 + 0.25 / 401, abs=1e-6)
    assert vmf.log_bessel(1.0, 1e12) == pytest.approx(-0.5 * math.log(2 * math.pi * 1e12))


@pytest.mark.parametrize("dim", [2, 3, 12, 384])
@pytest.mark.parametrize("chord", [1e-7, 1e-3, 0.3, 1.2, 1.9])
def test_the_concentration_solves_its_equation(dim: int, chord: float) -> None:
    k = vmf.concentration(chord, dim)

    ratio = math.exp(vmf.log_bessel(dim / 2, k) - vmf.log_bessel(dim / 2 - 1, k))
    assert 2 * (1 - ratio) == pytest.approx(chord, rel=1e-6)


@pytest.mark.parametrize("k", [0.1, 5.0, 500.0])
def test_the_density_integrates_to_one_on_the_sphere(k: float) -> None:
    """d = 3: 2 pi times the integral over mu.y; a chord squared is 2 - 2 mu.y."""
    middle = (np.arange(200_000) + 0.5) / 100_000 - 1

    total = 2 * np.pi * np.exp(vmf.log_density(2 - 2 * middle, k, 3)).sum() / 100_000

    assert total == pytest.approx(1, rel=1e-5)


def test_a_student_is_judged_on_its_training_and_validation_rows() -> None:
    data = make_data(make_training())
    steps: list[int] = []

    found = judge_student("r", make_student("rotor_product"), data, lambda: steps.append(1))

    assert len(found.held_in) == len(data.train)
    assert len(found.held_out) == len(found.groups) == len(data.validation)
    assert len(steps) == 2
    rows = data.validation
    answers = left_out_answers(make_student("rotor_product"), data, rows)
    cosines = torch.cosine_similarity(answers.double(), data.real.teacher[rows].double())
    np.testing.assert_allclose(1 - found.held_out / 2, cosines.detach().numpy(), atol=1e-12)
    assert 0 < found.held_in.mean() < baseline_chord(data)


def test_the_baseline_counts_a_query_once() -> None:
    model = make_model()
    more = np.concatenate([np.arange(len(model.queries)), np.zeros(40, np.int64)])
    heavy = replace(
        model,
        queries=model.queries[more],
        targets=model.targets[more],
        cluster_of=model.cluster_of[more],
        train_rows=np.arange(len(more)),
    )
    teacher = RotationalTeacher(heavy, Rotational())
    targets = teacher_answers(teacher, lambda done, total: None)
    data = training_data(teacher, targets, make_training(), seed=0)
    once = data.train[data.same[data.train] == data.train]
    turn = global_rotation(heavy.queries[once], targets[once].numpy())
    turned = heavy.queries[once] @ turn
    wanted = torch.cosine_similarity(torch.from_numpy(turned), targets[once].double())

    assert baseline_chord(data) == pytest.approx(2 - 2 * float(wanted.mean()), rel=1e-6)
    assert len(once) < len(data.train)


def test_what_was_judged_comes_back(tmp_path: Path) -> None:
    found = simulated(0)[2]

    found.save(tmp_path / "judged.safetensors")

    again = Judged.load(tmp_path / "judged.safetensors")
    for name, value in vars(found).items():
        np.testing.assert_array_equal(getattr(again, name), value)


def test_free_planes_are_counted_by_the_dimension_of_their_manifold() -> None:
    """One plane: 2 (d - 2) and its angle; all of them: so(d)."""
    clusters, router = 4, (D * 4 + 4) + (D * 16 + 16) + 16 * 4

    counts = [
        make_student("rotor_product", planes=planes, train_planes=trained).free_parameters()
        for planes, trained in ((1, False), (6, False), (6, True))
    ]

    assert counts[0] == router + clusters * (2 * (D - 2) + 1)
    assert counts[1] == counts[2] == router + clusters * D * (D - 1) // 2
    assert (
        make_student("rotor_product", router="exact", planes=1).free_parameters() == clusters * 21
    )


def test_planes_count_whoever_keeps_them_and_a_basis_does_not() -> None:
    few, more = (make_student("nlerp_geodesic", planes=m).free_parameters() for m in (2, 5))
    small, wide = (make_student("shared_subspace", subspace=r) for r in (4, 6))

    assert more - few == 4 * (5 * (2 * D - 11) - 2 * (2 * D - 5))
    assert wide.free_parameters() - small.free_parameters() == (
        6 * (D - 6) + 4 * 15 - 4 * (D - 4) - 4 * 6
    )


def test_planes_of_a_codebook_count_where_they_are_the_teachers() -> None:
    def counted(codebook: CanonicalPlanes | PrincipalPlanes) -> int:
        changes = {"codebook": codebook, "n_components": None, "heads": 1}
        return make_student("canonical", **changes).free_parameters()

    axes, disjoint, free = (
        counted(CanonicalPlanes(n_components=3)),
        counted(PrincipalPlanes(n_components=3)),
        counted(PrincipalPlanes(n_components=3, disjoint=False)),
    )
    assert disjoint - axes == 3 * (2 * D - 7)
    assert free - axes == 3 * 2 * (D - 2)


def test_the_report_says_which_and_why_and_has_the_same_bytes_again(tmp_path: Path) -> None:
    candidates = simulated(0)
    found = select(candidates, dim=D, baseline=baseline(candidates), criterion="held_out")
    (tmp_path / "again").mkdir()

    files, again = (
        write_sweep(folder, found, title="Planes", facts={"seed": 0})
        for folder in (tmp_path, tmp_path / "again")
    )

    text = files["sweep_md"].read_text()
    assert "**Take 3 planes: with 3 MB it is the smallest of 7" in text
    assert "| **3 planes** | 51 | 3 MB |" in text
    for name, path in files.items():
        assert path.read_bytes() == again[name].read_bytes()


def test_what_is_undefined_or_unknown_is_told_as_such() -> None:
    one = replace(simulated(0)[2], held_out=np.array([0.1]), groups=np.array([0]))
    few = [replace(one, effective_rows=2.0, trained=False, name=name) for name in ("a", "b")]

    found = select(few, dim=D, baseline=float(one.held_in.mean()) / 2)

    assert found.line("a").standard_error is None
    text = markdown(found, title="t", facts={})
    assert "| undefined | undefined |" in text
    assert "(unknown)" in text
    assert "Warning: a is no nearer to the teacher than one global rotation." in text
    assert "Nothing is trained of a, b" in text
    assert "One held-out query alone" in text


def test_a_smaller_student_that_is_close_already_is_named() -> None:
    near, nearer = (
        replace(simulated(0)[3], name=name, stored_bytes=k, held_in=s, held_out=s, groups=groups)
        for groups in (np.arange(200) % CLUSTERS,)
        for name, k, s in (
            ("near", 20_000, np.linspace(1e-3, 1.2e-3, 200)),
            ("nearer", 30_000, np.linspace(1e-6, 1.2e-6, 200)),
        )
    )

    found = select([near, nearer], dim=D, baseline=1.0)

    assert found.chosen == "nearer"
    assert any("near has 0.99945 with 0.02 MB" in sentence for sentence in found.words)
    assert not any("has no noise" in word for word in select([near], dim=D, baseline=1.0).words)


def test_a_student_that_answers_nothing_finite_is_named() -> None:
    from core.errors import DataInvalid

    student = make_student("rotor_product")
    with torch.no_grad():
        student.get_parameter("angles").fill_(math.nan)

    with pytest.raises(DataInvalid, match=r"broken: .* NaN"):
        judge_student("broken", student, make_data(make_training()), lambda: None)
