"""A fold undone gives the model's weights again, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench._folds import plan_of
from bench._tiny_models import VARIANTS, reload, save_folder, tiny_model
from core.errors import DataInvalid
from core.transport.fold_folders import fold_folder, read_config, shape_of, weight_files
from core.transport.fold_plans import FoldPlan, Variant
from core.transport.fold_shards import read_norms
from core.transport.unfolding import round_trip, unfold_folder, unfold_shard

CASES: dict[str, tuple[Variant, int | None]] = {
    "permuted alone": ("none", None),
    "global": ("global", None),
    "global, wider": ("global", 48),
    "sliced": ("sliced", None),
    "conjugate": ("conjugate", None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", VARIANTS)
def test_unfolding_restores_the_weights(model: str, case: str, tmp_path: Path) -> None:
    variant, width = CASES[case]
    source = save_folder(tiny_model(model).double(), tmp_path / "m", shard_bytes=60_000)
    plan = plan_of(shape_of(source), variant, width=width, permuted=True)
    folded = fold_folder(source, tmp_path / "folded", plan)

    back = unfold_folder(folded, tmp_path / "back", plan, config=read_config(source))

    want, found = _weights(source), _weights(back)
    assert want.keys() == found.keys()
    assert max(float((found[name] - want[name]).abs().max()) for name in want) < 1e-12
    assert not reload(back).config.tie_word_embeddings or "lm_head.weight" not in found


def test_weights_of_sixteen_bits_come_back_from_a_wider_fold_exactly(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama_tied").bfloat16(), tmp_path / "m")
    plan = plan_of(shape_of(source), "global", width=48, permuted=True, dtype="float32")
    folded = fold_folder(source, tmp_path / "folded", plan)

    back = unfold_folder(folded, tmp_path / "back", plan, config=read_config(source))

    want, found = _weights(source), _weights(back)
    assert all(found[name].dtype == torch.bfloat16 for name in found)
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("variant", ["global", "sliced", "conjugate"])
@pytest.mark.parametrize("model", ["llama_biases", "qwen2_tied", "qwen3"])
def test_round_trip_says_what_is_left_before_rounding(
    model: str, variant: Variant, tmp_path: Path
) -> None:
    source = save_folder(tiny_model(model).bfloat16(), tmp_path / "m")
    plan = plan_of(shape_of(source), variant, permuted=True)
    path = source / "model.safetensors"

    found = round_trip(path, plan, norms=read_norms([path], plan))

    assert 0 < found.error < 1e-13
    assert found.weight in plan.shape.tensors() or found.weight == "lm_head.weight"
    assert found.lost == 0


def test_round_trip_notices_a_map_that_is_no_rotation(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama"), tmp_path / "m")
    path = source / "model.safetensors"
    good = plan_of(shape_of(source), "global").rotations["global"]
    random = torch.Generator().manual_seed(5)
    off = good + 1e-10 * torch.randn(32, 32, dtype=torch.float64, generator=random)
    plan = FoldPlan(shape_of(source), "global", {"global": off})

    assert 1e-11 < round_trip(path, plan, norms=read_norms([path], plan)).error < 1e-7


def test_gammas_of_zero_are_told_and_cannot_be_undone(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama").double(), tmp_path / "m")
    _change(source, lambda held: held["model.norm.weight"][3:5].zero_())
    plan = plan_of(shape_of(source), "global")
    path = source / "model.safetensors"
    folded = fold_folder(source, tmp_path / "folded", plan)

    found = round_trip(path, plan, norms=read_norms([path], plan))

    assert found.lost == 2
    assert found.error < 1e-13
    with pytest.raises(DataInvalid, match=r"lm_head.weight: 2 entries of its norm's gamma are 0"):
        unfold_folder(folded, tmp_path / "back", plan, config=read_config(source))


def test_a_model_changed_after_the_fold_is_not_unfolded(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama_tied"), tmp_path / "m")
    plan = plan_of(shape_of(source), "global")
    config = read_config(source)

    folded = fold_folder(source, tmp_path / "a", plan)
    _change(folded, lambda held: held["lm_head.weight"][7].mul_(1.01))
    with pytest.raises(DataInvalid, match="cannot be tied again"):
        unfold_folder(folded, tmp_path / "a_back", plan, config=config)

    folded = fold_folder(source, tmp_path / "b", plan)
    _change(folded, lambda held: held["model.norm.weight"][0].mul_(1.01))
    with pytest.raises(DataInvalid, match=r"model.norm.weight: not all ones"):
        unfold_folder(folded, tmp_path / "b_back", plan, config=config)


def test_another_models_fold_is_refused(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama"), tmp_path / "m")
    plan = plan_of(shape_of(source), "global", width=48)
    norms = read_norms([source / "model.safetensors"], plan)

    with pytest.raises(DataInvalid, match=r"shape \[272, 32\]; needed \[272, 48\]"):
        unfold_shard(source / "model.safetensors", tmp_path / "out", plan, norms=norms)


def _change(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    for name in weight_files(folder):
        held = load_file(folder / name)
        if {"lm_head.weight", "model.norm.weight"} & held.keys():
            try:
                change(held)
            except KeyError:
                continue
            save_file(held, folder / name, {"format": "pt"})


def _weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in weight_files(folder):
        found.update(load_file(folder / name))
    return found
