from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from core.distill.latency import (
    LEAST_ROUNDS,
    WARM_UPS,
    Measurement,
    Timing,
    benchmark_latency,
    crossover,
    flops_lda,
    flops_transformer,
    measure,
    measure_crossover,
    time_in_turns,
)
from core.distill.latency_report import advise, draw_crossover
from core.distill.lda import MultiHeadLDA
from core.errors import DataInvalid, SpecInvalid
from tests.core.distill._lda import DIM, drawn, make_lda, make_transformer, questions

PRINTED = ("lda_single_ms", "transformer_single_ms", "lda_batch_ms", "transformer_batch_ms")


class Side:
    """Takes as long as it says: moves the clock by so many seconds a call, and so many a row."""

    def __init__(self, clock: Clock, per_call: float, per_row: float = 0.0) -> None:
        self.clock, self.per_call, self.per_row = clock, per_call, per_row
        self.sizes: list[int] = []

    def __call__(self, asked: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        self.sizes.append(len(asked))
        self.clock.now += self.per_call + self.per_row * len(asked)
        return asked


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def teacher_for(centroids: Tensor, answers: Tensor) -> MultiHeadLDA:
    return MultiHeadLDA(centroids, answers, temperature=0.1)


def test_what_is_told_is_what_was_taken() -> None:
    clock = Clock()
    lda, student = Side(clock, 0.001, 0.0001), Side(clock, 0.004)
    found = benchmark_latency(
        lda, student, questions(5), 8, batches=(1, 8, 100), seconds=0.2, clock=clock
    )
    assert found["lda_single_ms"] == pytest.approx(1.1)
    assert found["transformer_single_ms"] == pytest.approx(4)
    assert found["lda_batch_ms"] == pytest.approx(1.8)
    assert found["transformer_batch_ms"] == pytest.approx(4)
    assert found["lda_p50_ms_per_query_8"] == pytest.approx(1.8 / 8)
    assert found["transformer_p95_ms_per_query_100"] == pytest.approx(0.04)
    assert set(lda.sizes) == {1, 8, 100}, "a batch is whole however few queries there are"
    assert lda.sizes == student.sizes
    assert found["threads"] == torch.get_num_threads()


def test_both_take_turns_and_a_slow_moment_is_no_median() -> None:
    clock, order = Clock(), []

    def side(name: str, slow_at: int) -> Callable[[Tensor], Tensor]:
        calls = itertools.count()

        def answer(asked: Tensor) -> Tensor:
            order.append(name)
            clock.now += 9.0 if next(calls) == slow_at else 0.001
            return asked

        return answer

    taken = time_in_turns(
        side("lda", WARM_UPS), side("student", -1), questions(), batch=1, seconds=0.01, clock=clock
    )
    assert taken[0].p50_ms == pytest.approx(1)
    assert taken[0].p95_ms > 1000
    assert taken[0].calls == taken[1].calls == LEAST_ROUNDS
    pairs = [tuple(order[at : at + 2]) for at in range(0, len(order), 2)]
    assert all(set(pair) == {"lda", "student"} for pair in pairs)
    assert {pair[0] for pair in pairs[WARM_UPS:]} == {"lda", "student"}, "they swap who goes first"


def test_modules_are_timed_in_eval_and_left_as_found() -> None:
    lda, student = make_lda(), make_transformer(dropout=0.5).train()
    found = benchmark_latency(lda, student, questions(), batches=(1,), seconds=0.001)
    assert student.training
    assert all(found[name] > 0 for name in PRINTED)
    assert all(value.grad is None for value in student.parameters())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batches": (0,)}, "batches"),
        ({"seconds": 0}, "seconds"),
    ],
)
def test_sizes_that_cannot_be_are_named(changes: dict[str, object], name: str) -> None:
    with pytest.raises(SpecInvalid, match=name):
        benchmark_latency(make_lda(), make_transformer(), questions(), **changes)  # type: ignore[arg-type]


def test_no_queries_are_refused() -> None:
    with pytest.raises(DataInvalid, match="queries"):
        benchmark_latency(make_lda(), make_transformer(), questions()[:0])


@pytest.mark.parametrize("out_dim", [None, 10])
@pytest.mark.parametrize("layers", [1, 3])
def test_flops_are_those_torch_counts(layers: int, out_dim: int | None) -> None:
    student = make_transformer(num_layers=layers, out_dim=out_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student(questions(1))
    assert counter.get_total_flops() == flops_transformer(DIM, layers, 32, out_dim)
    lda = make_lda(width=out_dim or DIM)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lda(questions(1))
    assert counter.get_total_flops() == flops_lda(lda.num_heads, DIM, out_dim)


def test_equal_widths_cost_4_n_d() -> None:
    assert flops_lda(18, 384) == 4 * 18 * 384


def made(heads: int, ratio: float, *, batch: int = 32, flops: int = 4000) -> Measurement:
    return Measurement(
        heads, batch, Timing(ratio, ratio, 5), Timing(1.0, 1.0, 5), 4 * heads, flops, 8 * heads, 800
    )


def test_a_power_law_is_interpolated_exactly() -> None:
    [found] = crossover([made(n, (n / 123) ** 0.8) for n in (18, 64, 400, 4096)])
    assert found.heads == pytest.approx(123)
    assert found.words == "~123"
    assert found.flops_heads == pytest.approx(1000)


@given(st.floats(1, 5000), st.floats(0.2, 2))
def test_a_crossover_lies_between_what_was_measured(at: float, slope: float) -> None:
    [found] = crossover([made(n, (n / at) ** slope) for n in (400, 18, 4096)])
    if at > 4096 * (1 + 1e-9):
        assert (found.heads, found.words) == (None, "> 4096")
    elif at < 18 * (1 - 1e-9):
        assert (found.heads, found.words) == (None, "< 18")
    elif 18 * (1 + 1e-9) < at < 4096 * (1 - 1e-9):
        assert found.heads == pytest.approx(at)


def test_noise_below_is_passed_over_and_batches_are_apart() -> None:
    rows = [made(n, r) for n, r in ((18, 1.1), (64, 0.5), (400, 0.9), (4096, 2.0))]
    rows += [made(n, 0.5, batch=1) for n in (18, 4096)]
    found = crossover(rows)
    assert [each.batch for each in found] == [32, 1]
    assert found[0].heads is not None
    assert 400 < found[0].heads < 4096
    assert found[1].words == "> 4096"


def test_one_measurement_claims_a_side_alone() -> None:
    assert crossover([made(18, 2.0)])[0].words == "< 18"
    assert crossover([made(18, 0.5)])[0].words == "> 18"
    assert crossover([made(18, 0.5, flops=0)])[0].flops_heads is None
    with pytest.raises(SpecInvalid, match="measurements"):
        crossover([])


def test_synthetic_teachers_of_many_heads_are_measured_against_one_student() -> None:
    asked: list[tuple[int, ...]] = []

    def noted(centroids: Tensor, answers: Tensor) -> nn.Module:
        asked.append((*centroids.shape, *answers.shape))
        assert torch.allclose(centroids.norm(dim=1), torch.ones(len(centroids)))
        return teacher_for(centroids, answers)

    found = measure_crossover(
        (40, 2), DIM, (4, 1), lambda _: make_transformer(), 0.001, teacher_for=noted
    )
    assert [(each.batch, each.heads) for each in found] == [(4, 2), (4, 40), (1, 2), (1, 40)]
    assert asked == [(2, DIM, 2, DIM), (40, DIM, 40, DIM)]
    assert {each.transformer_flops for each in found} == {flops_transformer(DIM, 2, 32)}
    assert found[0].lda_flops == flops_lda(2, DIM)
    assert all(each.lda.p50_ms > 0 and each.transformer.p50_ms > 0 for each in found)


def test_document_001s_student_is_the_default() -> None:
    [found] = measure_crossover((3,), 24, (2,), seconds=0.001, teacher_for=teacher_for)
    assert found.transformer_flops == flops_transformer(24, 2, 512)


def test_a_student_that_says_no_sizes_has_no_flops() -> None:
    found = measure(make_lda(), nn.Identity(), questions(), heads=6, batch=1, seconds=0.001)
    assert (found.transformer_flops, found.transformer_bytes) == (0, 0)


def test_advice_follows_the_measurements() -> None:
    rows = [made(n, n / 100, batch=b) for b in (1, 32) for n in (18, 400)]
    rows += [made(n, 0.5, batch=4096) for n in (18, 400)]
    text = advise(rows)
    assert "For single queries: the LDA below 100 heads, the student from there on." in text
    assert "For batches of 32: the LDA below 100 heads" in text
    assert "For batches of 4096: the LDA, up to 400 heads at least." in text
    assert "as the LDA does with 100 heads" in text
    assert "LDA 5.6x" in text
    assert "student 4.0x" in text
    assert len(text.splitlines()[0]) == len(text.splitlines()[1])
    assert "from 18 heads on at least" in advise([made(18, 2.0), made(64, 3.0)])
    with pytest.raises(SpecInvalid, match="measurements"):
        advise([])


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    rows = [made(n, n / 100, batch=b) for b in (1, 32) for n in (18, 400)]
    draw_crossover(tmp_path / "a.png", rows)
    draw_crossover(tmp_path / "b.png", rows)
    draw_crossover(tmp_path / "one.png", [made(18, 0.5)])
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert data == (tmp_path / "b.png").read_bytes()


def test_unit_rows_are_the_seeds_alone() -> None:
    seen: list[Tensor] = []

    def noted(centroids: Tensor, answers: Tensor) -> nn.Module:
        seen.append(centroids)
        return teacher_for(centroids, answers)

    for seed in (0, 0, 1):
        measure_crossover(
            (3,), DIM, (1,), lambda _: make_transformer(), 0.001, teacher_for=noted, seed=seed
        )
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert math.isclose(float(drawn(1, 3, seed=0).norm()), 1, rel_tol=1e-6)
