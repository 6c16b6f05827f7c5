"""The LDA teacher is its formula, in float64 too, whatever the sizes; and its files hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.distill import lda as lda_module
from core.distill.lda import MultiHeadLDA
from core.errors import DataInvalid
from core.tensors.lda import Mode, save_lda
from core.tensors.lda_db import save_lda_db
from tests.core.distill._lda_formula import drawn, reference
from tests.core.tensors._lda import DIM, HEADS, WIDTH, some_lda

MODES: tuple[Mode, ...] = get_args(Mode)


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    rows=st.integers(1, 7),
    heads=st.integers(1, 9),
    dim=st.integers(2, 8),
    width=st.integers(2, 8),
    temperature=st.floats(0.01, 10),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**16),
)
def test_the_formula_in_float64(
    mode: Mode,
    rows: int,
    heads: int,
    dim: int,
    width: int,
    temperature: float,
    scale: float,
    seed: int,
) -> None:
    queries, centroids = drawn(seed, rows, dim) * scale, drawn(seed + 1, heads, dim)
    values = drawn(seed + 2, heads, width) if mode == "answers" else drawn(3, heads, dim, width)
    module = MultiHeadLDA(
        torch.from_numpy(centroids), **{mode: torch.from_numpy(values)}, temperature=temperature
    )

    weights, answers = reference(queries, centroids, values, temperature)

    given_queries = torch.from_numpy(queries)
    np.testing.assert_allclose(module.weights(given_queries), weights, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        module(given_queries), answers, rtol=1e-9, atol=1e-9 * (1 + np.abs(answers).max())
    )
    assert module.num_heads == heads


@pytest.mark.parametrize("mode", MODES)
def test_float32_is_near_float64(mode: Mode) -> None:
    model = some_lda(mode)
    heads = model.answers if model.maps is None else model.maps
    assert heads is not None
    weights, answers = reference(model.queries, model.centroids, heads, 0.03)

    module = MultiHeadLDA.of(model)

    found = module(torch.from_numpy(model.queries))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, answers, atol=1e-4)
    np.testing.assert_allclose(module.weights(torch.from_numpy(model.queries)), weights, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_one_query_is_a_batch_of_one_and_none_is_none(mode: Mode) -> None:
    module = MultiHeadLDA.of(some_lda(mode))
    query = torch.from_numpy(some_lda().queries[0])

    assert module(query).shape == (WIDTH,)
    assert module.weights(query).shape == (HEADS,)
    torch.testing.assert_close(module(query), module(query[None])[0])
    assert module(query[None][:0]).shape == (0, WIDTH)
    with pytest.raises(DataInvalid, match=r"queries: shape \[5\]; needed \[B, 6\] or \[6\]"):
        module(query[:5])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-44, 1e30, 3e38])
def test_no_length_gives_nan_and_zero_weighs_all_alike(mode: Mode, value: float) -> None:
    module = MultiHeadLDA.of(some_lda(mode))
    queries = torch.zeros(2, DIM)
    queries[0, 1] = value
    queries[1] = torch.nan

    weights = module.weights(queries)

    assert weights[0].isfinite().all()
    assert weights[0].sum().item() == pytest.approx(1)
    if value == 0:
        torch.testing.assert_close(weights[0], torch.full((HEADS,), 1 / HEADS))
        if mode == "maps":
            assert not module(queries)[0].any()
    else:
        towards = torch.zeros(DIM)
        towards[1] = 1
        torch.testing.assert_close(weights[0], module.weights(towards), atol=1e-5, rtol=1e-4)
    assert module(queries)[1].isnan().all(), "NaN stays in its own row"


def test_maps_in_blocks_are_the_same() -> None:
    heads, dim, rows = 4096, 64, 200
    maps = torch.from_numpy(drawn(1, heads, dim, 2)).float()
    module = MultiHeadLDA(
        torch.from_numpy(drawn(0, heads, dim)).float(), maps=maps, temperature=0.1
    )
    queries = torch.from_numpy(drawn(2, rows, dim)).float()
    assert rows * heads * dim > 3 * lda_module.BLOCK_ENTRIES

    found = module(queries)

    each = torch.cat([module(query[None]) for query in queries[::37]])
    torch.testing.assert_close(found[::37], each, atol=1e-4, rtol=1e-4)


def test_the_dtype_is_the_buffers_and_gradients_reach_the_query() -> None:
    module = MultiHeadLDA.of(some_lda()).double()
    query = torch.from_numpy(some_lda().queries).requires_grad_()

    answer = module(query)
    answer.sum().backward()

    assert answer.dtype == torch.float64
    assert query.grad is not None
    assert query.grad.any()
    assert not list(module.parameters())
    half = MultiHeadLDA.of(some_lda()).bfloat16()
    assert half(query.detach()).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["lda.db", "lda.safetensors"])
def test_heads_come_back_exactly_from_either_file(tmp_path: Path, mode: Mode, name: str) -> None:
    module = MultiHeadLDA.of(some_lda(mode))

    module.save(tmp_path / name)
    back = MultiHeadLDA.load(str(tmp_path / name))

    assert back.cluster_ids == module.cluster_ids
    assert back.temperature == module.temperature
    for key, value in module.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    queries = torch.from_numpy(some_lda().queries)
    assert torch.equal(back(queries), module(queries))


def test_load_tells_files_by_their_bytes_and_takes_a_projection(tmp_path: Path) -> None:
    save_lda_db(tmp_path / "a.safetensors", {"one": some_lda(), "two": some_lda("maps")})
    save_lda(tmp_path / "b.db", some_lda())

    assert MultiHeadLDA.load(tmp_path / "a.safetensors").maps is not None
    assert MultiHeadLDA.load(tmp_path / "a.safetensors", "one").answers is not None
    assert MultiHeadLDA.load(tmp_path / "b.db").num_heads == HEADS
    with pytest.raises(DataInvalid, match="holds one model"):
        MultiHeadLDA.load(tmp_path / "b.db", "one")
    (tmp_path / "c").write_bytes(b"neither of the two")
    with pytest.raises(DataInvalid, match="not a readable"):
        MultiHeadLDA.load(tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        MultiHeadLDA.load(tmp_path / "d")


def test_what_float32_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    module = MultiHeadLDA(torch.full((2, 2), 1 / 3).double() + 1e-12, torch.eye(2).double(),
                          temperature=1.0)  # fmt: skip
    with pytest.raises(DataInvalid, match=r"centroids: torch.float64 that float32 cannot hold"):
        module.save(tmp_path / "lda.db")
    module.float().save(tmp_path / "lda.db")


ONES = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("heads", "match"),
    [
        ({}, "exactly one of the two"),
        ({"answers": ONES, "maps": torch.ones(3, 4, 4)}, "exactly one of the two"),
        ({"answers": ONES[:2]}, r"answers: shape \[2, 4\]; needed \[3, 'm >= 1'\]"),
        ({"maps": ONES}, r"maps: shape \[3, 4\]; needed \[3, 4, 'm >= 1'\]"),
        ({"maps": torch.ones(3, 5, 4)}, r"maps: shape \[3, 5, 4\]"),
        ({"answers": ONES.double()}, "answers: torch.float64 on cpu"),
        ({"answers": ONES / 0}, "answers: holds NaN or infinity"),
        ({"answers": ONES, "centroids": ONES * 0}, "centroids: row 0 is all zeros"),
        ({"answers": ONES, "centroids": ONES[0]}, r"centroids: shape \[4\]"),
        ({"answers": ONES, "centroids": [[1.0]]}, "centroids: a list; needed a tensor"),
        ({"maps": np.ones((3, 4, 4))}, "maps: a ndarray; needed a tensor"),
        ({"answers": ONES, "centroids": ONES.long()}, "centroids: torch.int64"),
        ({"answers": ONES, "temperature": 0.0}, "temperature: 0.0"),
        ({"answers": ONES, "temperature": float("nan")}, "temperature: nan"),
        ({"answers": ONES, "cluster_ids": ["a", "a", "b"]}, "'a' appears 2 times"),
    ],
)
def test_what_is_no_teacher_is_refused(heads: dict[str, Any], match: str) -> None:
    with pytest.raises(DataInvalid, match=match):
        MultiHeadLDA(**{"centroids": ONES, "temperature": 0.1, **heads})
