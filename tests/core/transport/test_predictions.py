"""Which tokens are judged, and how far a fold's logits are from the model's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench._tiny_models import save_folder, tiny_model
from core.transport.fold_folders import fold_folder
from core.transport.fold_plans import FoldPlan
from core.transport.predictions import logits_change, scored
from core.transport.sliced import load_folded
from core.transport.streams import shape_of
from core.transport.tokens import Encoded
from tests.core.transport.held_out import random_rotation, read, turned

CPU = torch.device("cpu")


def encoded(ends: list[int], *, special: int = 0, before: int = 0) -> Encoded:
    """A text cut at ``ends``, behind special tokens and tokens of a system prompt."""
    starts = [0, *ends[:-1]]
    lead = special + before
    place = [-9] * special + [-5] * before
    return Encoded(
        ids=np.arange(lead + len(ends)),
        starts=np.array(place + starts),
        ends=np.array(place + ends),
        counts=np.arange(lead + len(ends)) >= lead,
        special=np.arange(lead + len(ends)) < special,
    )


@pytest.mark.parametrize(
    ("of", "other", "positions", "characters"),
    [
        (encoded([2, 5, 9], special=1), encoded([2, 5, 9], special=1), [1, 2, 3], 9),
        (encoded([2, 5, 9], before=2), encoded([9], special=1), [2, 3, 4], 9),
        (encoded([2, 5, 9]), encoded([2, 5, 9]), [1, 2], 7),  # nothing predicts the first
        (encoded([2, 5, 9], special=1), encoded([3, 9]), [3], 4),  # nor the other's first
        (encoded([2, 5, 9], special=1), encoded([6], special=1), [1, 2], 5),  # cut at 6
        (encoded([9]), encoded([9]), [], 0),
    ],
)
def test_only_characters_that_both_models_predict_count(
    of: Encoded, other: Encoded, positions: list[int], characters: int
) -> None:
    found, covered = scored(of, other)

    assert found.tolist() == positions
    assert covered == characters


def test_logits_change_is_that_of_whole_logits() -> None:
    old, new = tiny_model(), tiny_model(seed=1)
    texts = [pair.student.ids for pair in read()]

    found = logits_change(old, new, texts, device=CPU)

    logits = [
        torch.cat([model(torch.from_numpy(ids)[None]).logits[0] for ids in texts]).detach()
        for model in (old, new)
    ]
    p, q = (of.double().log_softmax(-1) for of in logits)
    assert found.tokens == sum(map(len, texts))
    assert found.largest_change == pytest.approx(float((logits[0] - logits[1]).abs().max()))
    assert found.largest_logit == pytest.approx(float(logits[0].abs().max()))
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)


def test_an_exact_turn_leaves_logits_and_another_model_does_not() -> None:
    model = tiny_model("qwen3_tied").double()
    texts = [pair.student.ids for pair in read()]

    kept = logits_change(model, turned(model, random_rotation(32)), texts, device=CPU)
    other = logits_change(model, tiny_model("qwen3_tied", seed=1).double(), texts, device=CPU)

    assert kept.relative < 1e-5  # norms of transformers compute in float32
    assert other.relative > 0.1


@pytest.mark.parametrize("fold", ["global", "sliced"])
def test_a_folded_folder_computes_what_the_model_does(fold: str, tmp_path: Path) -> None:
    model = tiny_model("llama_tied")
    tie = "global" if fold == "global" else "layer"
    groups = ["global"] if fold == "global" else ["layer.0", "layer.1", "layer.2", "final"]
    turns = {name: random_rotation(32, 48, seed=seed) for seed, name in enumerate(groups)}
    plan = FoldPlan(shape_of(model), fold, turns, tie=tie)  # type: ignore[arg-type]
    folded = fold_folder(save_folder(model, tmp_path / "model"), tmp_path / "folded", plan)

    texts = [pair.student.ids for pair in read()]
    found = logits_change(model, load_folded(folded), texts, device=CPU)

    assert found.relative < 1e-5
