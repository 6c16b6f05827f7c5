from __future__ import annotations

import numpy as np
import pytest
import torch

from core.distill import routing
from core.errors import DataInvalid
from tests.core.distill._make import DIM


def ask(**changes: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(30, DIM, generator=generator)
    values: dict[str, object] = {
        "queries": torch.randn(20, DIM, generator=generator),
        "keys": keys,
        "cluster_of": torch.arange(30) % 3,
        "cluster_count": 3,
        "temperature": 0.7,
        "top_k": 5,
        **changes,
    }
    return routing.route(**values).dense()  # type: ignore[arg-type]


def test_weights_are_the_softmax_cut_to_the_nearest_and_merged_by_cluster() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(30, DIM, generator=generator)
    queries = torch.randn(20, DIM, generator=generator)
    full = (queries @ keys.T / 0.7).softmax(1)
    kept = torch.where(full >= full.topk(5).values[:, -1:], full, 0.0)
    kept /= kept.sum(1, keepdim=True)
    wanted = torch.stack([kept[:, torch.arange(30) % 3 == c].sum(1) for c in range(3)], 1)

    torch.testing.assert_close(ask(), wanted)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ask(exclude_rows=torch.arange(20))
    monkeypatch.setattr(routing, "BLOCK_ENTRIES", 90)
    torch.testing.assert_close(ask(exclude_rows=torch.arange(20)), whole)


def test_a_row_left_out_gets_no_weight_and_minus_one_leaves_none_out() -> None:
    keys = torch.eye(6)
    exclude = torch.stack([torch.arange(6), torch.full((6,), -1)], dim=1)
    common = {"queries": keys, "keys": keys, "cluster_of": torch.arange(6), "cluster_count": 6}

    left_out = ask(**common, top_k=6, exclude_rows=exclude)
    kept = ask(**common, top_k=6, exclude_rows=torch.full((6,), -1))

    assert (left_out.diagonal() == 0).all()
    torch.testing.assert_close(left_out.sum(1), torch.ones(6))
    assert (kept.diagonal() > 1 / 6).all()


def test_leaving_out_the_only_key_is_refused() -> None:
    with pytest.raises(DataInvalid, match="excludes all 1 training queries"):
        ask(
            queries=torch.ones(1, 3),
            keys=torch.ones(1, 3),
            cluster_of=torch.zeros(1, dtype=torch.int64),
            cluster_count=1,
            exclude_rows=torch.zeros(1, dtype=torch.int64),
        )


def test_a_query_and_its_duplicates_are_left_out_together() -> None:
    keys = np.eye(6, dtype=np.float32)
    keys[3], keys[5, 0] = keys[0], -0.0
    keys[4] = keys[5]
    keys[4, 0] = 0.0
    known = routing.EqualRows.among(keys)
    rows = known.rows(keys.astype(np.float64))

    weights = routing.route(
        torch.from_numpy(keys),
        torch.from_numpy(keys),
        torch.arange(6),
        cluster_count=6,
        temperature=1.0,
        top_k=6,
        exclude_rows=torch.tensor([[3, -1], [1, 2], [2, -1], [0, 5], [5, -1], [4, 4]]),
        equal_to=torch.from_numpy(known.first),
    ).dense()

    assert known.first.tolist() == [0, 1, 2, 0, 4, 4] == rows.tolist()
    assert known.rows(2 * keys).tolist() == [-1] * 6
    left_out = [[0, 3], [1, 2], [2], [0, 3, 4, 5], [4, 5], [4, 5]]
    assert [(row == 0).nonzero().flatten().tolist() for row in weights] == left_out


def test_many_equal_keys_cost_no_more_memory_than_few(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.ones((5000, 4), dtype=np.float32)
    keys[-1] = 2

    own = routing.own_rows(keys, keys)
    whole, _ = routing.nearest(
        torch.from_numpy(keys[:40]),
        torch.from_numpy(keys),
        top_k=1,
        exclude_rows=torch.from_numpy(own[:40]),
        equal_to=torch.from_numpy(routing.EqualRows.among(keys).first),
    )

    assert own.shape == (5000, 1)
    assert own[:-1].max() == 0
    assert own[-1] == 4999
    assert (whole == 4999).all()


def test_neighbours_of_one_cluster_give_it_exactly_all_the_weight() -> None:
    generator = torch.Generator().manual_seed(3)
    keys, queries = torch.randn(50, DIM, generator=generator), torch.randn(400, DIM)

    weights = ask(queries=queries, keys=keys, cluster_of=torch.zeros(50, dtype=torch.int64))

    assert (weights[:, 0] == 1).all()


def test_the_coldest_temperature_takes_the_nearest() -> None:
    assert ask(temperature=1e-35).amax(1).eq(1).all()
