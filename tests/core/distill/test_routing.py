from __future__ import annotations

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
