"""Folded models compute what the models compute; the document's own fold is what it says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bench._float64 import in_float64, logits_of
from bench._folds import IDS, orders, plan_of, rotation
from bench._tiny_models import VARIANTS, config_of, reload, save_folder, tiny_model
from core.architectures.shape import ModelShape
from core.errors import DataInvalid, SpecInvalid
from core.transport.fold_folders import fold_folder, shape_of
from core.transport.fold_plans import FoldPlan, Variant, folded_config
from core.transport.folding import Recipe, inverse, norm_names, recipe
from core.transport.permutations import LayerPermutation
from core.transport.sliced import load_folded
from tests.core.transport.checkpoints import NAMES, needs_real, real

CASES: dict[str, tuple[Variant, int | None]] = {
    "permuted alone": ("none", None),
    "global": ("global", None),
    "global, wider": ("global", 48),
    "sliced": ("sliced", None),
    "sliced, wider": ("sliced", 40),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", VARIANTS)
def test_folded_logits_are_those_of_the_model(model: str, case: str, tmp_path: Path) -> None:
    source = save_folder(tiny_model(model).double(), tmp_path / "model")
    variant, width = CASES[case]
    plan = plan_of(shape_of(source), variant, width=width, permuted=True)

    folded = load_folded(fold_folder(source, tmp_path / "folded", plan))

    assert folded.config.hidden_size == (width or 32)
    want = logits_of(in_float64(tiny_model(model)), IDS)
    assert float((logits_of(in_float64(folded), IDS) - want).abs().max()) < 1e-12


@pytest.mark.parametrize("model", VARIANTS)
def test_float32_models_stay_what_they_are_to_rounding(model: str, tmp_path: Path) -> None:
    source = save_folder(tiny_model(model), tmp_path / "model")
    plan = plan_of(shape_of(source), "global", permuted=True)

    folded = reload(fold_folder(source, tmp_path / "folded", plan))

    want = logits_of(tiny_model(model), IDS)
    gap = (logits_of(folded, IDS) - want).abs().max() / want.abs().max()
    assert float(gap) < 1e-5


def test_stages_turn_once_each(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama").double(), tmp_path / "model")
    plan = plan_of(shape_of(source), "sliced", tie="stage", stage_layers=2)

    folded = load_folded(fold_folder(source, tmp_path / "folded", plan))

    assert plan.turns == (1,)  # layers 0, 1 | 2 and the final norm
    want = logits_of(in_float64(tiny_model("llama")), IDS)
    assert float((logits_of(in_float64(folded), IDS) - want).abs().max()) < 1e-12


def test_one_rotation_for_all_sliced_is_a_plain_model(tmp_path: Path) -> None:
    source = save_folder(tiny_model("qwen2"), tmp_path / "model")
    shape = shape_of(source)
    one = fold_folder(source, tmp_path / "one", plan_of(shape, "sliced", tie="global"))
    other = fold_folder(source, tmp_path / "other", plan_of(shape, "global"))

    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in other.iterdir())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


@needs_real
@pytest.mark.parametrize("name", NAMES)
def test_real_checkpoints_stay_what_they_are(name: str, tmp_path: Path) -> None:
    source = real(name)
    shape = shape_of(source)
    want = logits_of(in_float64(reload(source)), IDS % shape.vocabulary)

    plan = plan_of(shape, "global", width=160, permuted=True, dtype="float64")
    folded = in_float64(load_folded(fold_folder(source, tmp_path / "folded", plan)))

    assert float((logits_of(folded, IDS % shape.vocabulary) - want).abs().max()) < 1e-9


@pytest.mark.parametrize("model", ["llama_biases", "qwen3_tied"])
def test_folded_norms_are_ones_and_the_head_stands_alone(model: str, tmp_path: Path) -> None:
    source = save_folder(tiny_model(model), tmp_path / "model")
    plan = plan_of(shape_of(source), "global", width=48)

    folded = reload(fold_folder(source, tmp_path / "folded", plan))

    weights = folded.state_dict()
    assert all(bool((weights[name] == 1).all()) for name in norm_names(plan.shape))
    assert folded.lm_head.weight.data_ptr() != folded.model.embed_tokens.weight.data_ptr()
    assert plan.folded_shape() == shape_of(tmp_path / "folded")
    assert not plan.folded_shape().tied


def test_configuration_changes_only_in_what_the_fold_is_about() -> None:
    config = {"rope_parameters": {"rope_theta": 5e5}, "torch_dtype": "float32", "vocab_size": 272}
    told = tiny_model("llama_tied").config.to_dict()
    plan = plan_of(_shape("llama_tied"), "global", width=48, dtype="bfloat16")

    made = folded_config({**told, **config}, plan)

    changed = {name for name in made if made[name] != {**told, **config}.get(name)}
    assert changed == {"hidden_size", "tie_word_embeddings", "dtype"} | (
        set() if told.get("architectures") else {"architectures"}
    )
    assert made["dtype"] == "bfloat16"
    assert "torch_dtype" not in made


def test_a_wider_stream_keeps_its_root_mean_square(tmp_path: Path) -> None:
    source = save_folder(tiny_model("qwen3").double(), tmp_path / "model")
    plan = plan_of(shape_of(source), "global", width=48)
    folded = in_float64(reload(fold_folder(source, tmp_path / "folded", plan)))
    model = in_float64(tiny_model("qwen3"))

    with torch.no_grad():
        old = model(IDS, output_hidden_states=True).hidden_states[1]
        new = folded(IDS, output_hidden_states=True).hidden_states[1]

    R = plan.rotations["global"]
    torch.testing.assert_close(new, math.sqrt(48 / 32) * old @ R)
    torch.testing.assert_close(new.pow(2).mean(-1), old.pow(2).mean(-1))
    assert config_of(tmp_path / "folded")["rms_norm_eps"] == config_of(source)["rms_norm_eps"]


def test_conjugate_is_the_documents_six_products(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama_biases").double(), tmp_path / "model")
    plan = plan_of(shape_of(source), "conjugate")

    folded = load_file(fold_folder(source, tmp_path / "folded", plan) / "model.safetensors")

    old = load_file(source / "model.safetensors")
    for layer in range(3):
        R = plan.rotations[f"layer.{layer}"]
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
            whole = f"model.layers.{layer}.{name}_proj.weight"
            torch.testing.assert_close(folded[whole], old[whole] @ R)
        for name in ("self_attn.o", "mlp.down"):
            whole = f"model.layers.{layer}.{name}_proj"
            torch.testing.assert_close(folded[f"{whole}.weight"], R.mT @ old[f"{whole}.weight"])
            torch.testing.assert_close(folded[f"{whole}.bias"], old[f"{whole}.bias"] @ R)
    for name in (*norm_names(plan.shape), "model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(folded[name], old[name])
    assert not plan.exact


def test_conjugate_does_not_compute_what_the_model_computed(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama").double(), tmp_path / "model")
    plan = plan_of(shape_of(source), "conjugate", tie="global")

    folded = reload(fold_folder(source, tmp_path / "folded", plan))

    want = logits_of(tiny_model("llama").double(), IDS)
    assert float((logits_of(folded, IDS) - want).abs().max()) > 0.1


def test_permuting_alone_moves_numbers_and_makes_none(tmp_path: Path) -> None:
    source = save_folder(tiny_model("qwen2_tied").bfloat16(), tmp_path / "model")
    plan = plan_of(shape_of(source), "none", permuted=True)

    folded = load_file(fold_folder(source, tmp_path / "folded", plan) / "model.safetensors")

    old = load_file(source / "model.safetensors")
    moved = plan.permutations[1]
    rows = [head * 8 + at for head in moved.heads or () for at in range(8)]
    whole = "model.layers.1.self_attn."
    assert folded.keys() == old.keys()
    assert torch.equal(folded[f"{whole}q_proj.weight"], old[f"{whole}q_proj.weight"][rows])
    assert torch.equal(folded[f"{whole}q_proj.bias"], old[f"{whole}q_proj.bias"][rows])
    assert torch.equal(folded[f"{whole}o_proj.weight"], old[f"{whole}o_proj.weight"][:, rows])
    up, neurons = "model.layers.1.mlp.up_proj.weight", list(moved.neurons or ())
    assert torch.equal(folded[up], old[up][neurons])


@settings(max_examples=30, deadline=None)
@given(
    rows=st.permutations(range(5)),
    columns=st.permutations(range(4)),
    kind=st.sampled_from(["orders", "reads", "writes"]),
    seed=st.integers(0, 99),
)
def test_inverse_undoes_a_recipe(rows: list[int], columns: list[int], kind: str, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 4, dtype=torch.float64, generator=random)
    gamma = torch.rand(4, dtype=torch.float64, generator=random) + 0.5
    made = {
        "orders": Recipe(rows=torch.tensor(rows), columns=torch.tensor(columns)),
        "reads": Recipe(rows=torch.tensor(rows), before=gamma, right=rotation(4, 6, seed)),
        "writes": Recipe(columns=torch.tensor(columns), left=rotation(5, 7, seed), scale=1.5),
    }[kind]

    there = _apply(made, weight)

    torch.testing.assert_close(_apply(inverse(made, "weight"), there), weight)


@pytest.mark.parametrize(
    ("moved", "told"),
    [
        (LayerPermutation(0, neurons=tuple(range(47))), "layer 0: neurons must be an order of 0"),
        (LayerPermutation(0, neurons=(0,) * 48), "neurons must be an order"),
        (LayerPermutation(0, kv_heads=(1, 0)), "heads must move with their KV group of 2"),
        (LayerPermutation(0, heads=(2, 3, 0, 1)), "heads must move with their KV group of 2"),
        (LayerPermutation(0, kv_heads=(1, 2), heads=(0, 1, 2, 3)), "kv_heads must be an order"),
    ],
)
def test_orders_that_are_none_are_refused(moved: LayerPermutation, told: str) -> None:
    plan = FoldPlan(_shape("llama"), "none", permutations={0: moved})

    with pytest.raises(DataInvalid, match=told):
        [recipe(plan, name, {}) for name in plan.shape.tensors()]


def test_query_heads_may_move_inside_their_group() -> None:
    plan = FoldPlan(
        _shape("llama"), "none", permutations={0: LayerPermutation(0, heads=(1, 0, 2, 3))}
    )

    made = recipe(plan, "model.layers.0.self_attn.q_proj.weight", {})

    assert made.rows is not None
    assert made.rows.tolist() == [*range(8, 16), *range(8), *range(16, 32)]
    assert recipe(plan, "model.layers.0.self_attn.k_proj.weight", {}).rows is None


def test_maps_that_are_no_rotations_are_refused() -> None:
    shape = _shape("llama")
    R = rotation(32, 32, 0)
    bad = {
        r"needed R R\^T = I": R * 1.001,
        r"needed \[32, d >= 32\] float64": R.float(),
        r"is \[31, 32\]": R[:31],
        "moves rows by nan": R * float("nan"),
    }
    for told, matrix in bad.items():
        with pytest.raises(DataInvalid, match=told):
            FoldPlan(shape, "global", {"global": matrix}).rotation(0)
    with pytest.raises(DataInvalid, match=r"layer.1 is missing"):
        FoldPlan(shape, "sliced", {"layer.0": R}, "layer").rotation(1)
    with pytest.raises(DataInvalid, match="none given"):
        FoldPlan(shape, "global").folded_shape()
    with pytest.raises(DataInvalid, match="leads to width 40, another to 32"):
        FoldPlan(shape, "sliced", {"layer.0": R, "layer.1": rotation(32, 40, 1)}, "layer").rotation(
            1
        )


def test_variants_that_cannot_be_are_refused() -> None:
    shape, R = _shape("llama"), rotation(32, 48, 0)
    with pytest.raises(SpecInvalid, match="tied by layer"):
        FoldPlan(shape, "global", {"layer.0": R}, "layer")
    with pytest.raises(SpecInvalid, match="from width 32 to 48"):
        FoldPlan(shape, "conjugate", {"global": R}).rotation(0)
    with pytest.raises(SpecInvalid, match="takes no rotations"):
        FoldPlan(shape, "none", {"global": R})
    with pytest.raises(SpecInvalid, match="dtype 'int8'; allowed: keep"):
        FoldPlan(shape, "none", dtype="int8")


def test_missing_norms_and_strange_names_are_refused() -> None:
    plan = plan_of(_shape("llama"), "global")
    with pytest.raises(DataInvalid, match=r"model.norm.weight: missing among the norms"):
        recipe(plan, "lm_head.weight", {})
    with pytest.raises(DataInvalid, match="no weight of a llama of 3 layers"):
        recipe(plan, "model.layers.3.mlp.up_proj.weight", {})


def test_orders_of_heads_keep_biases_and_norms_of_heads_in_step() -> None:
    shape = _shape("qwen3_biases")
    plan = FoldPlan(shape, "none", permutations=orders(shape, 3))
    prefix = "model.layers.2.self_attn."

    weight, bias = (recipe(plan, f"{prefix}k_proj.{kind}", {}) for kind in ("weight", "bias"))

    assert weight.rows is not None
    assert bias.columns is not None
    assert torch.equal(weight.rows, bias.columns)
    assert recipe(plan, f"{prefix}k_norm.weight", {}) == Recipe()


def _shape(model: str) -> ModelShape:
    return ModelShape.of(tiny_model(model).config.to_dict())


def _apply(made: Recipe, weight: torch.Tensor) -> torch.Tensor:
    """Apply a recipe by its definition."""
    if made.rows is not None:
        weight = weight[made.rows]
    if made.columns is not None:
        weight = weight[:, made.columns]
    if made.before is not None:
        weight = weight * made.before
    if made.left is not None:
        weight = made.left.mT @ weight
    if made.right is not None:
        weight = weight @ made.right
    if made.after is not None:
        weight = weight * made.after
    return weight * made.scale
