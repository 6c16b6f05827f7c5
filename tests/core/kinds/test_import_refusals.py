"""A folder that holds no whole and sound model is refused, in words that say what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from bench._tiny_models import (
    byte_tokenizer,
    save_folder,
    tiny_model,
)
from core.errors import DataInvalid
from core.kinds import import_model
from core.tensors import model_folders, weight_files
from core.tensors.language_models import INDEX
from tests.core.kinds.shelf import Shelf, reweigh, rewrite


def test_weights_that_are_pickled_are_never_read(shelf: Shelf, m: Path) -> None:
    (m / "model.safetensors").unlink()
    shelf.refused(r"model.safetensors: missing, and no model.safetensors.index.json")
    (m / "pytorch_model.bin").write_bytes(b"\x80\x04")
    shelf.refused("pickled ones are never read")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(shelf: Shelf, m: Path, name: str) -> None:
    (m / name).unlink()
    shelf.refused(f"{name}: missing")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "text", [b"{", b"\xff\xfe", b"[]", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 100_000]
)
def test_broken_json_is_refused(shelf: Shelf, m: Path, name: str, text: bytes) -> None:
    (m / name).write_bytes(text)
    shelf.refused(f"{name}: ")


def test_what_is_too_large_is_refused(
    shelf: Shelf, m: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (m / "config.json").write_text(" " * (2 << 20) + "{}")
    shelf.refused("config.json: more than 1048576 bytes")
    (m / "config.json").write_text("{}")
    (m / "chat_template.jinja").write_text("x" * (5 << 20))
    with pytest.raises(DataInvalid, match=r"chat_template.jinja: 5242880 bytes; allowed"):
        model_folders.list_files(model_folders.find_folder([shelf.root], "m"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; allowed"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"num_hidden_layers": 2}, "layers.2.*no weight of a llama model of 2 layers"),
        ({"num_hidden_layers": 4}, "layers.3.*in 0 of the shards"),
        ({"hidden_size": 64, "head_dim": 8}, "shape .*; needed"),
        ({"dtype": "bfloat16"}, "dtype float32; needed bfloat16"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true, and lm_head.weight differs"),
        ({"rope_parameters": {"rope_type": "unheard_of"}}, "config.json: transformers refuses"),
        ({"pad_token_id": "x"}, "config.json: transformers refuses"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    shelf: Shelf, m: Path, change: dict[str, Any], match: str
) -> None:
    rewrite(m, "config.json", lambda told: told.update(change))
    shelf.refused(match)


def test_what_transformers_takes_otherwise_is_refused(shelf: Shelf) -> None:
    """Qwen3 without head_dim has heads of 128 there."""
    folder = save_folder(tiny_model("qwen3"), shelf.root / "m")
    rewrite(folder, "config.json", lambda told: told.pop("head_dim"))
    shelf.refused("transformers takes head_dim to be 128, this service 8")


def _nan(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")


def _rename(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.extra.weight"] = weights.pop("model.norm.weight")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_nan, r"model.layers.1.mlp.down_proj.weight\[3, 5\] is not a finite number"),
        (
            lambda w: w["model.norm.weight"].__setitem__(0, float("-inf")),
            r"norm.weight\[0\] is not",
        ),
        (_rename, "'model.layers.1.extra.weight' is no weight"),
        (lambda w: w.pop("model.norm.weight"), "model.norm.weight: in 0 of the shards"),
        (lambda w: w.update({"lm_head.weight": w["lm_head.weight"][:9].clone()}), r"\[9, 32\]"),
        (lambda w: w.update({"model.norm.weight": torch.ones(32).half()}), "dtype float16; needed"),
        (lambda w: w.update({"model.norm.weight": torch.ones(32).char()}), "dtype I8; needed"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    shelf: Shelf, m: Path, change: Callable[[dict[str, torch.Tensor]], Any], match: str
) -> None:
    reweigh(m, change)
    shelf.refused(match)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_width_of_number_is_looked_at(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "w"
    weight = torch.full((7, 5), torch.finfo(dtype).max, dtype=dtype)
    save_file({"w": weight}, path)
    read: list[int] = []
    weight_files.check_finite(path, weight_files.read_header(path), read.append)
    assert sum(read) == weight.nbytes
    weight[4, 2] = float("inf")
    save_file({"w": weight}, path)
    with pytest.raises(DataInvalid, match=r"w\[4, 2\]"):
        weight_files.check_finite(path, weight_files.read_header(path), read.append)


def _header(text: bytes, *, told: int | None = None, after: bytes = b"") -> bytes:
    return (len(text) if told is None else told).to_bytes(8, "little") + text + after


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "a header of 0 bytes"),
        (_header(b"{}", told=1 << 62), "a header of 4611686018427387904 bytes; allowed"),
        (_header(b"{}", told=1 << 20), "not a readable"),
        (_header(b"not json"), "not a readable"),
        (_header(b"[" * 5000), "not a readable"),
        (_header(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'), "not a readable"),
        (_header(b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}', after=b"1234"), "not"),
        (
            _header(
                b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
                after=b"1234",
            ),
            "names a key twice",
        ),
    ],
)
def test_a_broken_shard_is_refused(shelf: Shelf, m: Path, data: bytes, match: str) -> None:
    (m / "model.safetensors").write_bytes(data)
    shelf.refused(f"model.safetensors: .*{match}")


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/etc/passwd", "a/b.safetensors", ".hidden.safetensors", "x.bin"],
)
def test_an_index_names_files_of_the_folder_alone(shelf: Shelf, shards: Path, name: str) -> None:
    rewrite(shards, INDEX, lambda told: told["weight_map"].update({"lm_head.weight": name}))
    shelf.refused(f"{INDEX}: file ")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"w": 3}])
def test_an_index_without_files_is_refused(shelf: Shelf, shards: Path, weight_map: Any) -> None:
    rewrite(shards, INDEX, lambda told: told.update({"weight_map": weight_map}))
    shelf.refused(INDEX)


def test_the_shards_are_all_there_and_hold_every_weight_once(shelf: Shelf, shards: Path) -> None:
    names = sorted(file.name for file in shards.glob("*.safetensors"))
    (shards / names[1]).rename(shards / "kept")
    shelf.refused(f"{names[1]}: missing")
    shutil.copy(shards / names[0], shards / names[1])
    shelf.refused("in 2 of the shards")


def _without_offsets(folder: Path) -> None:
    rewrite(folder, "tokenizer.json", lambda told: told.update({"model": {"type": "Nothing"}}))


def _panic(folder: Path) -> None:
    broken = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    rewrite(folder, "tokenizer.json", lambda told: told.update({"normalizer": broken}))


def _panic_later(folder: Path) -> None:
    single = [{"SpecialToken": {"id": "<zz>", "type_id": 0}}]
    broken = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    rewrite(folder, "tokenizer.json", lambda told: told.update({"post_processor": broken}))


def _too_many_tokens(folder: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(20)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_without_offsets, "tokenizer.json: transformers refuses it"),
        (_panic, "tokenizer.json: transformers refuses it"),
        (_panic_later, "tokenizer.json: transformers refuses it"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: transformers refuses"),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\xff"), "tokenizer.json: transformers"),
        (_too_many_tokens, "gives ids up to 277; the model embeds 272"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    shelf: Shelf, m: Path, spoil: Callable[[Path], Any], match: str
) -> None:
    spoil(m)
    shelf.refused(match)


def test_a_folder_that_changes_meanwhile_is_refused(shelf: Shelf, m: Path) -> None:
    found = model_folders.find_folder([shelf.root], "m")
    sizes = model_folders.list_files(found)
    with (m / "tokenizer.json").open("ab") as file:
        file.write(b"\n")
    target = shelf.desk.folder / "copied"
    with pytest.raises(DataInvalid, match="when the job looked first"):
        import_model._copy_bytes(
            found, "tokenizer.json", sizes["tokenizer.json"], target, lambda _: None
        )
