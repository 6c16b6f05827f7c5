"""Files of weights are folded one by one, in blocks, to the same bytes each time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench._float64 import logits_of
from bench._folds import IDS, plan_of
from bench._tiny_models import VARIANTS, reload, save_folder, tiny_model
from core.architectures.shape import ModelShape
from core.errors import DataInvalid
from core.tensors.language_models import LanguageModel, ModelFile
from core.transport import memory
from core.transport.fold_folders import fold_folder, shape_of, weight_files
from core.transport.fold_records import RECORD, read_record
from core.transport.fold_shards import (
    SKIP_ADAPTERS,
    fold_shard,
    fold_task,
    read_norms,
    shard_plan,
    tasks,
)

SHARD_BYTES = 20_000
"""So that tiny models come in several files, and a norm often in another than what it scales."""


@pytest.mark.parametrize("model", VARIANTS)
def test_several_files_fold_to_what_one_does(model: str, tmp_path: Path) -> None:
    one = save_folder(tiny_model(model), tmp_path / "one")
    several = save_folder(tiny_model(model), tmp_path / "several", shard_bytes=SHARD_BYTES)
    plan = plan_of(shape_of(one), "global", width=40, permuted=True)

    fold_folder(one, tmp_path / "a", plan)
    fold_folder(several, tmp_path / "b", plan)

    found = _weights(tmp_path / "b")
    want = _weights(tmp_path / "a")
    assert len(weight_files(tmp_path / "b")) > 3
    assert want.keys() == found.keys()
    assert all(torch.equal(want[name], found[name]) for name in want)
    assert torch.equal(
        logits_of(reload(tmp_path / "a"), IDS), logits_of(reload(tmp_path / "b"), IDS)
    )


def test_every_file_is_a_task_and_an_untied_head_one_more(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama_tied"), tmp_path / "m", shard_bytes=SHARD_BYTES)
    files = weight_files(source)
    shape = shape_of(source)

    found = shard_plan(_described(source), plan_of(shape, "global"))

    assert [task.source for task in found[:-1]] == sorted(files)
    assert [task.target for task in found] == [
        f"model-{number:05d}-of-{len(files) + 1:05d}.safetensors"
        for number in range(1, len(files) + 2)
    ]
    assert (found[-1].makes, found[-1].tensors) == ("head", ("lm_head.weight",))
    assert "model.embed_tokens.weight" in files[found[-1].source or ""]
    names = [name for task in found for name in task.tensors]
    assert sorted(names) == sorted(plan_of(shape, "global").folded_shape().tensors())
    assert not any(
        task.makes == "head" for task in shard_plan(_described(source), plan_of(shape, "conjugate"))
    )


def test_a_chunk_needs_only_the_rotations_that_its_task_names(tmp_path: Path) -> None:
    source = save_folder(tiny_model("qwen3_tied"), tmp_path / "m", shard_bytes=SHARD_BYTES)
    whole = plan_of(shape_of(source), "sliced", width=40)
    fold_folder(source, tmp_path / "folded", whole)
    norms = read_norms([source / name for name in weight_files(source)], whole)

    for task in shard_plan(_described(source), whole):
        few = {group: whole.rotations[group] for group in task.groups}
        path = None if task.source is None else source / task.source
        plan = replace(whole, rotations=few)
        fold_task(task, path, tmp_path / task.target, plan=plan, norms=norms)
        assert (tmp_path / task.target).read_bytes() == (
            tmp_path / "folded" / task.target
        ).read_bytes()
    assert any(len(task.groups) == 1 for task in shard_plan(_described(source), whole))


def test_the_same_plan_gives_the_same_bytes_and_blocks_change_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_folder(tiny_model("llama_biases").double(), tmp_path / "m")
    plan = plan_of(shape_of(source), "global", width=48, permuted=True)
    fold_folder(source, tmp_path / "a", plan)
    fold_folder(source, tmp_path / "b", plan)
    monkeypatch.setattr(memory, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(memory, "OUT_ROWS", 7)
    fold_folder(source, tmp_path / "c", plan)

    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in names
    )
    for name, weight in _weights(tmp_path / "a").items():
        torch.testing.assert_close(_weights(tmp_path / "c")[name], weight)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_the_rounded_float64_fold(dtype: str, tmp_path: Path) -> None:
    narrow = getattr(torch, dtype)
    source = save_folder(tiny_model("qwen2").to(narrow), tmp_path / "m")
    wide = save_folder(tiny_model("qwen2").to(narrow).double(), tmp_path / "wide")
    plan = plan_of(shape_of(source), "global", permuted=True)
    fold_folder(source, tmp_path / "folded", plan)
    fold_folder(wide, tmp_path / "exact", plan_of(shape_of(wide), "global", permuted=True))

    exact = _weights(tmp_path / "exact")
    for name, weight in _weights(tmp_path / "folded").items():
        assert weight.dtype == narrow
        assert torch.equal(weight, exact[name].to(narrow))
    assert reload(tmp_path / "folded").dtype == narrow


def test_weights_may_change_their_dtype(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama").bfloat16(), tmp_path / "m")
    plan = plan_of(shape_of(source), "global", dtype="float32")

    fold_folder(source, tmp_path / "folded", plan)

    assert {weight.dtype for weight in _weights(tmp_path / "folded").values()} == {torch.float32}
    assert shape_of(tmp_path / "folded").dtype == "float32"


def test_a_head_that_is_stored_though_tied_is_the_embedding(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama_tied"), tmp_path / "m")
    want = logits_of(tiny_model("llama_tied"), IDS)
    stored = load_file(source / "model.safetensors")
    stored["lm_head.weight"] = torch.full_like(stored["model.embed_tokens.weight"], 9.0)
    save_file(stored, source / "model.safetensors", {"format": "pt"})

    for variant in ("global", "none"):
        plan = plan_of(shape_of(source), variant)
        folded = reload(fold_folder(source, tmp_path / variant, plan))
        assert float((logits_of(folded, IDS) - want).abs().max()) < 1e-4


def test_progress_is_told_in_bytes_and_may_stop_the_work(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama"), tmp_path / "m")
    plan = plan_of(shape_of(source), "global")
    norms = read_norms([source / "model.safetensors"], plan)
    told: list[tuple[float, float]] = []

    fold_shard(
        source / "model.safetensors",
        tmp_path / "out",
        plan,
        norms=norms,
        report=lambda *progress: told.append(progress),
    )

    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1] > 1000

    def stop(done: float, total: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold_shard(source / "model.safetensors", tmp_path / "out", plan, norms=norms, report=stop)


def test_the_gammas_stay_beside_the_weights(tmp_path: Path) -> None:
    source = save_folder(tiny_model("qwen3"), tmp_path / "m")
    plan = plan_of(shape_of(source), "global")
    fold_folder(source, tmp_path / "folded", plan)

    found = read_record(tmp_path / "folded" / RECORD)

    old = _weights(source)
    assert len(found) == 2 * 3 + 1
    assert all(torch.equal(gamma, old[name].double()) for name, gamma in found.items())
    with pytest.raises(DataInvalid, match="needed format 'fold_record'"):
        read_record(source / "model.safetensors")


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def spoil(name: str, value: float) -> Path:
        source = tmp_path / f"{name}{value}"
        save_folder(tiny_model("llama"), source)
        weights = load_file(source / "model.safetensors")
        weights[name][0, 0] = value
        save_file(weights, source / "model.safetensors", {"format": "pt"})
        return source

    for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        for value, dtype in ((float("nan"), "keep"), (1e6, "float16")):
            source = spoil(name, value)
            plan = plan_of(shape_of(source), "global", dtype=dtype)
            with pytest.raises(DataInvalid, match=f"{name}: a number is not finite, or too large"):
                fold_folder(source, tmp_path / f"out{name}{value}", plan)


def test_files_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama"), tmp_path / "m")
    plan = plan_of(shape_of(source), "global")
    path = source / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"

    def change(made: Callable[[dict[str, Tensor]], Any]) -> None:
        copied = dict(weights)
        made(copied)
        save_file(copied, path, {"format": "pt"})

    change(lambda held: held.pop(name))
    with pytest.raises(DataInvalid, match=f"{name} is not in its files exactly once"):
        fold_folder(source, tmp_path / "a", plan)
    change(lambda held: held.update({name: torch.zeros(48, 31)}))
    with pytest.raises(DataInvalid, match=rf"{name}: shape \[48, 31\]; needed \[48, 32\]"):
        fold_folder(source, tmp_path / "b", plan)
    change(lambda held: held.update({name: torch.zeros(48, 32, dtype=torch.int64)}))
    with pytest.raises(DataInvalid, match=f"{name}: dtype I64; allowed: F64, F32"):
        fold_folder(source, tmp_path / "c", plan)
    change(lambda held: held.update({"model.layers.9.x": torch.zeros(2)}))
    with pytest.raises(DataInvalid, match=r"model.layers.9.x: no weight of a llama"):
        fold_folder(source, tmp_path / "d", plan)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataInvalid, match=r"not a readable .safetensors file"):
        fold_folder(source, tmp_path / "e", plan)
    path.unlink()
    with pytest.raises(DataInvalid, match=r"needed model.safetensors or an index"):
        fold_folder(source, tmp_path / "f", plan)


def test_weights_stored_twice_and_models_with_adapters_are_refused(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama"), tmp_path / "m")
    plan = plan_of(shape_of(source), "global")
    names = weight_files(source)["model.safetensors"]
    with pytest.raises(DataInvalid, match="a weight is not in its files exactly once"):
        tasks({"a.safetensors": names, "b.safetensors": names[:1]}, plan)
    with pytest.raises(DataInvalid, match="fold the model that it was made from"):
        shard_plan(replace(_described(source), adapters=True), plan)


def test_an_index_may_not_leave_its_folder(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama"), tmp_path / "m", shard_bytes=SHARD_BYTES)
    index = source / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["lm_head.weight"] = "../other.safetensors"
    index.write_text(json.dumps(told))

    with pytest.raises(DataInvalid, match="is no file of the folder"):
        weight_files(source)
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(DataInvalid, match="needed a JSON object with a weight_map"):
            weight_files(source)


def test_memory_is_the_maps_one_weight_that_writes_and_a_block() -> None:
    shape = replace(
        _small(), width=2048, neurons=11008, layers=36, vocabulary=151_936, dtype="bfloat16"
    )

    def asked(maps: int) -> int:
        return memory.fold_bytes(shape, width=5120, maps=maps, variant="global")

    maps = 8 * 2048 * 5120 + 8 * 73 * 2048
    down = 2 * 2048 * 11008 + 2 * 512 * 11008
    assert maps + down < asked(1) <= maps + down + memory.BLOCK_BYTES
    assert asked(3) - asked(1) == 2 * 8 * 2048 * 5120


def test_tasks_of_sliced_folds_end_with_the_adapters(tmp_path: Path) -> None:
    source = save_folder(tiny_model("llama"), tmp_path / "m")
    plan = plan_of(shape_of(source), "sliced")

    found = tasks(weight_files(source), plan)

    assert [task.target for task in found] == ["model-00001-of-00001.safetensors", SKIP_ADAPTERS]
    assert found[-1].tensors == tuple(f"model.layers.{n}.skip_adapter.weight" for n in range(3))


def _small() -> ModelShape:
    return ModelShape.of(tiny_model("qwen2_tied").config.to_dict())


def _weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in weight_files(folder):
        found.update(load_file(folder / name))
    return found


def _described(folder: Path) -> LanguageModel:
    files = tuple(ModelFile(name, "", 1, held) for name, held in weight_files(folder).items())
    return LanguageModel(shape_of(folder), files, "", 258, "a test")
