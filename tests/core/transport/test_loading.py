"""Models loaded for reading: wherever their weights rest, and folders that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench._tiny_models import VARIANTS, config_of, save_folder, tiny_model
from core.errors import DataInvalid
from core.transport.fold_folders import fold_folder
from core.transport.fold_plans import FoldPlan
from core.transport.loading import load_model
from core.transport.sites import groups, layer_of, sites
from core.transport.streams import normalised, reading, run_backbone, shape_of, states
from tests.core.transport.checkpoints import needs_real, real

CPU = torch.device("cpu")
IDS = torch.arange(1, 41).reshape(2, 20)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_spread_model_gives_the_same_states(variant: str, tmp_path: Path) -> None:
    folder = save_folder(tiny_model(variant), tmp_path / "model", shard_bytes=20_000)
    offload = tmp_path / "offload"
    offload.mkdir()

    whole = load_model(folder, device=CPU)
    spread = load_model(
        folder, device=CPU, placement="spread", max_memory={"cpu": 30_000}, offload=offload
    )

    assert any(weight.device.type == "meta" for weight in spread.parameters())
    found, beside = states(spread, IDS), states(whole, IDS)
    assert list(found) == sites(shape_of(whole))
    for site, rows in found.items():
        assert torch.equal(rows, beside[site])


@torch.no_grad()
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_states_are_what_transformers_hands_on_without_gamma(variant: str) -> None:
    model = tiny_model(variant)

    found = states(model, IDS)

    out = model.base_model(input_ids=IDS, output_hidden_states=True)
    for layer, hidden in enumerate(out.hidden_states[:-1]):
        torch.testing.assert_close(found[f"attention.{layer}"], normalised(hidden, 1e-6))
    final: Any = model.base_model.norm
    torch.testing.assert_close(found["final"] * final.weight, out.last_hidden_state)


def test_padding_at_the_end_changes_no_real_state() -> None:
    model = tiny_model("qwen3")
    padded = torch.cat([IDS[:1, :9], torch.zeros(1, 30, dtype=torch.int64)], dim=1)

    alone, beside = states(model, IDS[:1, :9]), states(model, padded)

    for site, rows in alone.items():
        torch.testing.assert_close(beside[site][:, :9], rows)


def test_hooks_are_gone_afterwards_and_show_only_what_was_asked_for() -> None:
    model = tiny_model()

    assert list(states(model, IDS, only=["mlp.1", "final"])) == ["mlp.1", "final"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_maps_need_eager_attention(tmp_path: Path) -> None:
    folder = save_folder(tiny_model(), tmp_path / "model")
    seen: dict[int, torch.Tensor] = {}

    with (
        pytest.raises(ValueError, match="needed 'eager'"),
        reading(load_model(folder, device=CPU), maps=seen.__setitem__, layers=[0]),
    ):
        pass
    model = load_model(folder, device=CPU, maps=True)
    with reading(model, maps=seen.__setitem__, layers=[0, 2]):
        run_backbone(model, IDS)

    assert {tuple(maps.shape) for maps in seen.values()} == {(2, 4, 20, 20)}
    assert list(seen) == [0, 2]
    torch.testing.assert_close(seen[2].sum(-1), torch.ones(2, 4, 20))


@pytest.mark.parametrize(
    ("asked", "stored", "computes"),
    [
        ("auto", torch.bfloat16, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float64", torch.float32, torch.float64),
    ],
)
def test_dtype_is_what_was_asked_for(
    asked: Any, stored: torch.dtype, computes: torch.dtype, tmp_path: Path
) -> None:
    folder = save_folder(tiny_model().to(stored), tmp_path / "model")

    model = load_model(folder, device=CPU, dtype=asked)

    assert {weight.dtype for weight in model.parameters()} == {computes}
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not model.training


def test_a_weight_that_is_lacking_is_not_made_up(tmp_path: Path) -> None:
    folder = save_folder(tiny_model(), tmp_path / "model")
    shard = folder / "model.safetensors"
    weights = load_file(shard)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, shard, metadata={"format": "pt"})

    with pytest.raises(DataInvalid, match=r"missing weights model\.layers\.1\.mlp\.up_proj"):
        load_model(folder, device=CPU)


def test_a_weight_that_the_model_has_no_place_for_is_refused(tmp_path: Path) -> None:
    folder = save_folder(tiny_model("llama_biases"), tmp_path / "model")
    config = config_of(folder)
    (folder / "config.json").write_text(json.dumps({**config, "mlp_bias": False}))

    with pytest.raises(DataInvalid, match="unexpected weights"):
        load_model(folder, device=CPU)


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = save_folder(tiny_model(), tmp_path / "model")
    config = config_of(folder)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))

    with pytest.raises(DataInvalid, match=r"gate_proj|size mismatch|mismatched"):
        load_model(folder, device=CPU)


@pytest.mark.parametrize("damage", ["config", "shard", "nothing"])
def test_what_is_no_model_is_refused(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if damage == "nothing":
        folder.mkdir()
    else:
        save_folder(tiny_model(), folder)
    if damage == "config":
        (folder / "config.json").write_text("{")
    if damage == "shard":
        shard = folder / "model.safetensors"
        shard.write_bytes(shard.read_bytes()[:1000])

    with pytest.raises(DataInvalid, match=r"not a model.s folder|config\.json: not readable"):
        load_model(folder, device=CPU)


@needs_real
@pytest.mark.parametrize(("name", "width"), [("stories260k-hf", 64), ("babyllama105-hf", 128)])
def test_real_checkpoints_are_read(name: str, width: int) -> None:
    found = states(load_model(real(name), device=CPU), IDS)

    assert len(found) == 11
    assert found["final"].shape == (2, 20, width)
    means = found["mlp.4"].square().mean(-1)
    assert bool(((means > 0.9) & (means < 1.001)).all())


@pytest.mark.parametrize("variant", ["llama_tied", "qwen2", "qwen3"])
def test_a_stream_that_turns_is_read_in_the_basis_of_each_layer(
    variant: str, tmp_path: Path
) -> None:
    model = tiny_model(variant)
    folder = save_folder(model, tmp_path / "model")
    random = torch.Generator().manual_seed(1)
    maps = {
        group: torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=random)).Q
        for group in groups(shape_of(model), tie="layer", stage_layers=1)
    }
    plan = FoldPlan(shape_of(model), "sliced", maps, tie="layer")
    folded = fold_folder(folder, tmp_path / "folded", plan)

    turned = load_model(folded, device=CPU)

    assert shape_of(turned).family == shape_of(model).family
    before, after = states(model, IDS), states(turned, IDS)
    for site, rows in before.items():
        expected = rows.double() @ maps[plan.group(layer_of(site))]
        torch.testing.assert_close(after[site].double(), expected, rtol=0, atol=1e-4)
