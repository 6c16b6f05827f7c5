"""Models come in whole and true, from the operator's folders alone, and bring no code along."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from bench._jobs import Desk, run_job
from core.errors import DataInvalid, SpecInvalid
from core.kinds import import_model
from core.kinds._base import Produced
from core.tensors import model_folders, weight_files
from core.tensors.language_models import INDEX, LanguageModel, lay_out, load_language_model
from tests.core.transport.checkpoints import NAMES, checkpoint
from tests.core.transport.models import (
    VARIANTS,
    byte_tokenizer,
    config_of,
    reload,
    save_folder,
    tiny_model,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = torch.tensor([[256, 72, 101, 108, 108, 111]])


class World:
    """A root of models, and a service that may read it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "models"
        self.root.mkdir()
        self.desk = Desk(folder, model_roots=(self.root,))

    def run(self, **spec: Any) -> tuple[LanguageModel, Produced]:
        made = run_job(self.desk, import_model.Spec(**spec), {}).outputs["model"]
        return load_language_model(made.path), made

    def lay_out(self, model: LanguageModel) -> Path:
        return lay_out(model, self.desk.folder / "laid_out", self.desk.store.path)

    def refused(self, match: str, **spec: Any) -> None:
        """Import what is refused; the operator's paths stand in no message."""
        with pytest.raises((DataInvalid, SpecInvalid), match=match) as caught:
            self.run(**(spec or {"folder": "m"}))
        assert str(self.root) not in str(caught.value)
        assert len(str(caught.value)) < 800


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tiny_model("llama"), tmp_path_factory.mktemp("plain") / "m")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "m"
    return save_folder(tiny_model("llama"), folder, shard_bytes=30_000)


@pytest.fixture
def m(world: World, plain: Path) -> Path:
    """A good folder, named m, to be spoilt."""
    return Path(shutil.copytree(plain, world.root / "m"))


@pytest.fixture
def shards(world: World, sharded: Path) -> Path:
    return Path(shutil.copytree(sharded, world.root / "m"))


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file of a folder."""
    told = json.loads((folder / name).read_text())
    change(told)
    (folder / name).write_text(json.dumps(told))


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights of a folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("shard_bytes", [None, 30_000])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_comes_in_computes_what_the_folder_does(
    world: World, variant: str, shard_bytes: int | None
) -> None:
    folder = save_folder(tiny_model(variant), world.root / "deep", shard_bytes=shard_bytes)

    model, made = world.run(folder="deep")

    assert model.shape.family == VARIANTS[variant][0]
    assert (model.tokens, model.source) == (258, "folder deep")
    assert (len(model.shards) > 1) is (shard_bytes is not None)
    assert sum(file.size_bytes for file in model.shards) == made.meta["bytes"]
    assert {name for shard in model.shards for name in shard.tensors} == set(model.shape.tensors())
    with torch.no_grad():
        assert torch.equal(reload(world.lay_out(model))(IDS).logits, reload(folder)(IDS).logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_real_checkpoint_comes_in(world: World, name: str) -> None:
    real = checkpoint(name)
    if real is None:
        pytest.skip("the real checkpoints are not here")
    shutil.copytree(real, world.root / name)

    model, _ = world.run(folder=name)

    assert model.tokens == model.shape.vocabulary
    with torch.no_grad():
        assert torch.equal(
            reload(world.lay_out(model))(IDS % 100).logits, reload(real)(IDS % 100).logits
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_come_in_as_they_are(world: World, dtype: torch.dtype) -> None:
    folder = save_folder(tiny_model("qwen3").to(dtype), world.root / "m")

    model, _ = world.run(folder="m")

    assert model.shape.dtype == str(dtype).removeprefix("torch.")
    assert (world.lay_out(model) / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_the_same_folder_gives_the_same_bytes(world: World, shards: Path) -> None:
    first, second = world.run(folder="m"), world.run(folder="m")
    assert first[1].path == second[1].path, "the store names files by their bytes"


def test_every_file_stays_when_the_job_is_over(world: World, shards: Path) -> None:
    model, _ = world.run(folder="m")
    kept = {made.path for made in world.desk.found.values()}
    assert kept == {world.desk.store.path(file.sha256) for file in model.files}


def hub_cache(root: Path, source: Path) -> Path:
    """Lay a model out as a hub cache does: a snapshot of links to blobs."""
    cache = root / "models--some--model"
    snapshot = cache / "snapshots" / COMMIT
    for made in (cache / "refs", cache / "blobs", snapshot):
        made.mkdir(parents=True)
    (cache / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, cache / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    return cache


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_hub_cache_is_read_through_its_links(world: World, plain: Path, revision: str) -> None:
    hub_cache(world.root, plain)

    model, _ = world.run(hub="some/model", revision=revision)

    assert model.source == f"hub some/model@{COMMIT}"
    assert reload(world.lay_out(model)).config.hidden_size == 32


def test_of_a_hub_nothing_is_downloaded(world: World, plain: Path) -> None:
    world.refused("models--some--model is in none.*nothing is downloaded", hub="some/model")
    cache = hub_cache(world.root, plain)
    world.refused("revision 'v2'.*not in the cache", hub="some/model", revision="v2")
    (cache / "refs" / "main").write_text("../../../../etc")
    world.refused("revision 'main'", hub="some/model")
    (cache / "refs" / "main").write_text("f" * 40)
    world.refused("revision 'main'", hub="some/model")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("folder", "/etc"),
        ("folder", "../m"),
        ("folder", "a/../../m"),
        ("folder", "a//b"),
        ("folder", "."),
        ("folder", ""),
        ("folder", "a\\..\\b"),
        ("folder", "a\x00b"),
        ("hub", "../m"),
        ("hub", "a/../b"),
        ("hub", "model"),
        ("hub", "a--b/c"),
        ("hub", "a/b..c"),
        ("revision", "../../x"),
        ("revision", "a/../b"),
        ("revision", "/etc"),
    ],
)
def test_a_name_that_is_none_is_refused_at_the_door(field: str, value: str) -> None:
    told = {"hub": "some/model", field: value} if field == "revision" else {field: value}
    with pytest.raises(ValidationError, match=field):
        import_model.Spec(**told)


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({}, "exactly one"),
        ({"folder": "m", "hub": "a/b"}, "exactly one"),
        ({"folder": "m", "revision": "v1"}, "hub id alone"),
    ],
)
def test_one_source_is_named(told: dict[str, str], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        import_model.Spec.model_validate(told)


@pytest.mark.parametrize("spec", [{"folder": "m"}, {"hub": "a/b"}])
def test_without_roots_the_setting_is_named(world: World, spec: dict[str, str]) -> None:
    world.desk.model_roots = ()
    world.refused("STILL_MODEL_ROOTS is not set", **spec)


def test_nothing_outside_the_roots_is_read(world: World, plain: Path) -> None:
    world.refused("in none of the 1 root", folder="absent")
    (world.root / "way_out").symlink_to(plain)
    world.refused("leads out of the operator's roots", folder="way_out")
    (world.root / "itself").symlink_to(".")
    world.refused("leads out", folder="itself")
    (world.root / "round").symlink_to("round")
    world.refused("in none", folder="round")
    (world.root / "file").write_text("{}")
    world.refused("in none", folder="file")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"]
)
def test_a_file_that_leads_out_of_the_root_is_refused(
    world: World, plain: Path, m: Path, name: str
) -> None:
    (m / name).unlink()
    (m / name).symlink_to(plain / name)
    world.refused(f"{name}: a link that leads out")
    (m / name).unlink()
    (m / name).symlink_to("nowhere")
    world.refused(f"{name}: missing, or a link")
    (m / name).unlink()
    os.mkfifo(m / name)
    world.refused(f"{name}: not a regular file")


def test_a_link_inside_the_root_is_followed(world: World, m: Path) -> None:
    (m / "model.safetensors").rename(world.root / "elsewhere")
    (m / "model.safetensors").symlink_to("../elsewhere")
    assert world.run(folder="m")[0].shape.layers == 3


def test_nobodys_code_is_run_or_kept(world: World, m: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
    for name in ("configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (m / name).write_text(code)
    evil = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    more = {"trust_remote_code": True, "attn_implementation": "evil/kernel", "_name_or_path": "/x"}
    rewrite(m, "config.json", lambda told: told.update({"auto_map": evil, **more}))
    tokens = {"AutoTokenizer": ["tokenization_evil.T", None]}
    paths = {"vocab_file": "/etc/passwd", "name_or_path": "/x"}
    rewrite(m, "tokenizer_config.json", lambda told: told.update({"auto_map": tokens, **paths}))

    model, _ = world.run(folder="m")

    folder = world.lay_out(model)
    assert reload(folder).config.model_type == "llama"
    assert not ran.exists()
    assert not {file.name for file in model.files if file.name.endswith(".py")}
    left = config_of(folder).keys() | json.loads((folder / "tokenizer_config.json").read_text())
    assert not left & {"auto_map", *more, *paths}


def test_weights_that_are_pickled_are_never_read(world: World, m: Path) -> None:
    (m / "model.safetensors").unlink()
    world.refused(r"model.safetensors: missing, and no model.safetensors.index.json")
    (m / "pytorch_model.bin").write_bytes(b"\x80\x04")
    world.refused("pickled weights are never read")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(world: World, m: Path, name: str) -> None:
    (m / name).unlink()
    world.refused(f"{name}: missing")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "text", [b"{", b"\xff\xfe", b"[]", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 100_000]
)
def test_broken_json_is_refused(world: World, m: Path, name: str, text: bytes) -> None:
    (m / name).write_bytes(text)
    world.refused(f"{name}: ")


def test_what_is_too_large_is_refused(
    world: World, m: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (m / "config.json").write_text(" " * (2 << 20) + "{}")
    world.refused("config.json: more than 1048576 bytes")
    (m / "config.json").write_text("{}")
    (m / "chat_template.jinja").write_text("x" * (5 << 20))
    with pytest.raises(DataInvalid, match=r"chat_template.jinja: 5242880 bytes; allowed"):
        model_folders.list_files(model_folders.find_folder([world.root], "m"))


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
    world: World, m: Path, change: dict[str, Any], match: str
) -> None:
    rewrite(m, "config.json", lambda told: told.update(change))
    world.refused(match)


def test_what_transformers_takes_otherwise_is_refused(world: World) -> None:
    """Qwen3 without head_dim has heads of 128 there."""
    folder = save_folder(tiny_model("qwen3"), world.root / "m")
    rewrite(folder, "config.json", lambda told: told.pop("head_dim"))
    world.refused("transformers takes head_dim to be 128, this service 8")


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
    world: World, m: Path, change: Callable[[dict[str, torch.Tensor]], Any], match: str
) -> None:
    reweigh(m, change)
    world.refused(match)


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
def test_a_broken_shard_is_refused(world: World, m: Path, data: bytes, match: str) -> None:
    (m / "model.safetensors").write_bytes(data)
    world.refused(f"model.safetensors: .*{match}")


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/etc/passwd", "a/b.safetensors", ".hidden.safetensors", "x.bin"],
)
def test_an_index_names_files_of_the_folder_alone(world: World, shards: Path, name: str) -> None:
    rewrite(shards, INDEX, lambda told: told["weight_map"].update({"lm_head.weight": name}))
    world.refused(f"{INDEX}: file ")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"w": 3}])
def test_an_index_without_files_is_refused(world: World, shards: Path, weight_map: Any) -> None:
    rewrite(shards, INDEX, lambda told: told.update({"weight_map": weight_map}))
    world.refused(INDEX)


def test_the_shards_are_all_there_and_hold_every_weight_once(world: World, shards: Path) -> None:
    names = sorted(file.name for file in shards.glob("*.safetensors"))
    (shards / names[1]).rename(shards / "kept")
    world.refused(f"{names[1]}: missing")
    shutil.copy(shards / names[0], shards / names[1])
    world.refused("in 2 of the shards")


def test_the_index_is_written_anew_from_the_headers(world: World, shards: Path) -> None:
    """What the folder's says of which weight is where is not believed."""
    last = sorted(file.name for file in shards.glob("*.safetensors"))[-1]
    told = json.loads((shards / INDEX).read_text())["weight_map"]
    rewrite(shards, INDEX, lambda t: t["weight_map"].update({"model.norm.weight": last, "x": last}))

    model, _ = world.run(folder="m")

    assert json.loads((world.lay_out(model) / INDEX).read_text())["weight_map"] == told


def test_of_several_sets_of_weights_the_one_that_transformers_takes_comes_in(
    world: World, m: Path
) -> None:
    (m / INDEX).write_text("{}")
    (m / "consolidated.safetensors").write_bytes(b"something else")
    model, _ = world.run(folder="m")
    assert [shard.name for shard in model.shards] == ["model.safetensors"]
    assert INDEX not in {file.name for file in model.files}


def test_a_tied_head_that_is_stored_as_well_is_passed_over(world: World) -> None:
    folder = save_folder(tiny_model("llama_tied"), world.root / "m")
    embedding = "model.embed_tokens.weight"
    reweigh(folder, lambda w: w.update({"lm_head.weight": w[embedding].clone()}))

    model, _ = world.run(folder="m")

    assert "lm_head.weight" not in model.shards[0].tensors
    assert torch.equal(
        reload(world.lay_out(model))(IDS).logits, tiny_model("llama_tied")(IDS).logits
    )
    reweigh(folder, lambda w: w["lm_head.weight"].__setitem__((0, 0), 7.0))
    world.refused("tie_word_embeddings is true, and lm_head.weight differs")


def test_buffers_of_older_files_are_passed_over(world: World, m: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    reweigh(m, lambda w: w.update({name: torch.full((4,), float("nan"))}))
    model, _ = world.run(folder="m")
    assert name not in model.shards[0].tensors


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
    world: World, m: Path, spoil: Callable[[Path], Any], match: str
) -> None:
    spoil(m)
    world.refused(match)


def test_a_folder_that_changes_meanwhile_is_refused(world: World, m: Path) -> None:
    found = model_folders.find_folder([world.root], "m")
    sizes = model_folders.list_files(found)
    with (m / "tokenizer.json").open("ab") as file:
        file.write(b"\n")
    target = world.desk.folder / "copied"
    with pytest.raises(DataInvalid, match="when the job looked first"):
        import_model._copy_bytes(
            found, "tokenizer.json", sizes["tokenizer.json"], target, lambda _: None
        )
