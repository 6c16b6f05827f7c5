"""Models with skip adapters load, generate and round like others; never by a folder's code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from bench._float64 import in_float64, logits_of
from bench._folds import IDS, plan_of
from bench._tiny_models import config_of, reload, save_folder, tiny_model
from core.errors import DataInvalid
from core.transport.fold_folders import fold_folder, shape_of
from core.transport.fold_shards import SKIP_ADAPTERS
from core.transport.sliced import MODULE, load_folded, module_text, needs_module

FAMILIES = ("llama", "qwen2_tied", "qwen3_biases")


@pytest.mark.parametrize("model", FAMILIES)
def test_from_pretrained_runs_the_folders_module(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = _sliced(model, tmp_path, width=40)

    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

    assert type(loaded).__module__.startswith("transformers_modules.")
    torch.testing.assert_close(logits_of(loaded.eval(), IDS), logits_of(load_folded(folder), IDS))
    assert (folder / MODULE).read_text() == module_text()


@pytest.mark.parametrize("model", FAMILIES)
def test_transformers_alone_refuses_rather_than_drop_the_adapters(
    model: str, tmp_path: Path
) -> None:
    folder = _sliced(model, tmp_path)

    with pytest.raises(ValueError, match="custom code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_our_loader_never_runs_what_a_folder_carries(tmp_path: Path) -> None:
    folder = _sliced("llama", tmp_path)
    (folder / MODULE).write_text("raise RuntimeError('ran')\n")

    assert needs_module(folder)
    assert logits_of(load_folded(folder), IDS).isfinite().all()


def test_adapters_are_the_products_of_neighbouring_rotations(tmp_path: Path) -> None:
    plan = plan_of(shape_of(_saved("llama", tmp_path)), "sliced", width=40)
    folder = fold_folder(tmp_path / "m", tmp_path / "f", plan)

    found = load_file(folder / SKIP_ADAPTERS)

    names = ["layer.0", "layer.1", "layer.2", "final"]
    assert config_of(folder)["skip_adapters"] == [0, 1, 2]
    for layer in range(3):
        here, there = (plan.rotations[name] for name in names[layer : layer + 2])
        weight = found[f"model.layers.{layer}.skip_adapter.weight"]
        torch.testing.assert_close(weight, (here.mT @ there).mT.float())


@pytest.mark.parametrize("model", FAMILIES)
def test_generation_with_a_cache_is_that_of_the_model(model: str, tmp_path: Path) -> None:
    folder = _sliced(model, tmp_path, double=True)
    start = IDS[:1, :5]

    folded = in_float64(load_folded(folder)).generate(start, max_new_tokens=8, do_sample=False)

    want = in_float64(tiny_model(model)).generate(start, max_new_tokens=8, do_sample=False)
    assert torch.equal(folded, want)


def test_sixteen_bit_models_keep_their_adapters_in_float32(tmp_path: Path) -> None:
    source = save_folder(tiny_model("qwen2").bfloat16(), tmp_path / "m")
    folder = fold_folder(source, tmp_path / "f", plan_of(shape_of(source), "sliced"))
    plain = fold_folder(source, tmp_path / "g", plan_of(shape_of(source), "global"))

    folded = load_folded(folder)

    kinds = {name: weight.dtype for name, weight in folded.named_parameters()}
    assert kinds["model.layers.1.skip_adapter.weight"] == torch.float32
    assert kinds["model.layers.1.mlp.up_proj.weight"] == torch.bfloat16
    want = logits_of(tiny_model("qwen2").bfloat16().float(), IDS)
    errors = [float((logits_of(m, IDS) - want).std()) for m in (folded, reload(plain))]
    assert errors[0] < 1.5 * errors[1]


def test_a_width_that_heads_do_not_divide_loads_by_our_module(tmp_path: Path) -> None:
    plan = plan_of(shape_of(_saved("llama", tmp_path)), "global", width=50)
    folder = fold_folder(tmp_path / "m", tmp_path / "f", plan)

    assert plan.own_module
    assert not plan.turns
    assert not (folder / SKIP_ADAPTERS).exists()
    gap = logits_of(load_folded(folder), IDS) - logits_of(tiny_model("llama"), IDS)
    assert float(gap.abs().max()) < 1e-4


def test_folders_load_again_when_saved_by_transformers(tmp_path: Path) -> None:
    folder = _sliced("qwen3_biases", tmp_path)
    load_folded(folder).save_pretrained(tmp_path / "again")

    assert torch.equal(
        logits_of(load_folded(tmp_path / "again"), IDS), logits_of(load_folded(folder), IDS)
    )


def test_tokenizers_load_beside_a_module_of_ours(tmp_path: Path) -> None:
    folder = _sliced("llama", tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    assert (
        tokenizer("ab").input_ids == AutoTokenizer.from_pretrained(tmp_path / "m")("ab").input_ids
    )


def test_hidden_states_and_spread_placement_work(tmp_path: Path) -> None:
    folder = _sliced("llama", tmp_path)

    spread = load_folded(
        folder, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=str(tmp_path / "o")
    )

    with torch.no_grad():
        found = spread(IDS, output_hidden_states=True)
        want = load_folded(folder)(IDS, output_hidden_states=True)
    assert len(found.hidden_states) == 4
    torch.testing.assert_close(found.logits, want.logits)
    torch.testing.assert_close(found.hidden_states[2], want.hidden_states[2])


def test_strange_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match=r"config.json: not readable"):
        load_folded(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "sliced_gpt2"}')
    with pytest.raises(DataInvalid, match="'sliced_gpt2'; allowed: sliced_llama, sliced_qwen2"):
        load_folded(tmp_path)


def _saved(model: str, tmp_path: Path, *, double: bool = False) -> Path:
    made = tiny_model(model)
    return save_folder(made.double() if double else made, tmp_path / "m")


def _sliced(model: str, tmp_path: Path, *, width: int | None = None, double: bool = False) -> Path:
    source = _saved(model, tmp_path, double=double)
    plan = plan_of(shape_of(source), "sliced", width=width, permuted=True)
    return fold_folder(source, tmp_path / "f", plan)
