"""Models come in whole and true, from the operator's folders alone, and bring no code along."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from bench._tiny_models import (
    VARIANTS,
    config_of,
    reload,
    save_folder,
    tiny_model,
)
from core.kinds import import_model
from core.tensors.language_models import INDEX
from tests.core.kinds.shelf import Shelf, reweigh, rewrite
from tests.core.transport.checkpoints import NAMES, needs_real, real

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = torch.tensor([[256, 72, 101, 108, 108, 111]])


@pytest.mark.parametrize("shard_bytes", [None, 30_000])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_comes_in_computes_what_the_folder_does(
    shelf: Shelf, variant: str, shard_bytes: int | None
) -> None:
    folder = save_folder(tiny_model(variant), shelf.root / "deep", shard_bytes=shard_bytes)

    model, made = shelf.run(folder="deep")

    assert model.shape.family == VARIANTS[variant][0]
    assert (model.tokens, model.source) == (258, "folder deep")
    assert (len(model.shards) > 1) is (shard_bytes is not None)
    assert sum(file.size_bytes for file in model.shards) == made.meta["bytes"]
    assert {name for shard in model.shards for name in shard.tensors} == set(model.shape.tensors())
    with torch.no_grad():
        assert torch.equal(reload(shelf.lay_out(model))(IDS).logits, reload(folder)(IDS).logits)


@needs_real
@pytest.mark.parametrize("name", NAMES)
def test_a_real_checkpoint_comes_in(shelf: Shelf, name: str) -> None:
    folder = real(name)
    shutil.copytree(folder, shelf.root / name)

    model, _ = shelf.run(folder=name)

    assert model.tokens == model.shape.vocabulary
    with torch.no_grad():
        assert torch.equal(
            reload(shelf.lay_out(model))(IDS % 100).logits, reload(folder)(IDS % 100).logits
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_come_in_as_they_are(shelf: Shelf, dtype: torch.dtype) -> None:
    folder = save_folder(tiny_model("qwen3").to(dtype), shelf.root / "m")

    model, _ = shelf.run(folder="m")

    assert model.shape.dtype == str(dtype).removeprefix("torch.")
    assert (shelf.lay_out(model) / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_the_same_folder_gives_the_same_bytes(shelf: Shelf, shards: Path) -> None:
    first, second = shelf.run(folder="m"), shelf.run(folder="m")
    assert first[1].path == second[1].path, "the store names files by their bytes"


def test_every_file_stays_when_the_job_is_over(shelf: Shelf, shards: Path) -> None:
    model, _ = shelf.run(folder="m")
    kept = {made.path for made in shelf.desk.found.values()}
    assert kept == {shelf.desk.store.path(file.sha256) for file in model.files}


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
def test_a_hub_cache_is_read_through_its_links(shelf: Shelf, plain: Path, revision: str) -> None:
    hub_cache(shelf.root, plain)

    model, _ = shelf.run(hub="some/model", revision=revision)

    assert model.source == f"hub some/model@{COMMIT}"
    assert reload(shelf.lay_out(model)).config.hidden_size == 32


def test_of_a_hub_nothing_is_downloaded(shelf: Shelf, plain: Path) -> None:
    shelf.refused("models--some--model is in none.*nothing is downloaded", hub="some/model")
    cache = hub_cache(shelf.root, plain)
    shelf.refused("revision 'v2'.*not in the cache", hub="some/model", revision="v2")
    (cache / "refs" / "main").write_text("../../../../etc")
    shelf.refused("revision 'main'", hub="some/model")
    (cache / "refs" / "main").write_text("f" * 40)
    shelf.refused("revision 'main'", hub="some/model")


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
def test_without_roots_the_setting_is_named(shelf: Shelf, spec: dict[str, str]) -> None:
    shelf.desk.model_roots = ()
    shelf.refused("STILL_MODEL_ROOTS is not set", **spec)


def test_nothing_outside_the_roots_is_read(shelf: Shelf, plain: Path) -> None:
    shelf.refused("in none of the 1 root", folder="absent")
    (shelf.root / "way_out").symlink_to(plain)
    shelf.refused("leads out of the operator's roots", folder="way_out")
    (shelf.root / "itself").symlink_to(".")
    shelf.refused("leads out", folder="itself")
    (shelf.root / "round").symlink_to("round")
    shelf.refused("in none", folder="round")
    (shelf.root / "file").write_text("{}")
    shelf.refused("in none", folder="file")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"]
)
def test_a_file_that_leads_out_of_the_root_is_refused(
    shelf: Shelf, plain: Path, m: Path, name: str
) -> None:
    (m / name).unlink()
    (m / name).symlink_to(plain / name)
    shelf.refused(f"{name}: a link that leads out")
    (m / name).unlink()
    (m / name).symlink_to("nowhere")
    shelf.refused(f"{name}: missing, or a link")
    (m / name).unlink()
    os.mkfifo(m / name)
    shelf.refused(f"{name}: not a regular file")


def test_a_link_inside_the_root_is_followed(shelf: Shelf, m: Path) -> None:
    (m / "model.safetensors").rename(shelf.root / "elsewhere")
    (m / "model.safetensors").symlink_to("../elsewhere")
    assert shelf.run(folder="m")[0].shape.layers == 3


def test_nobodys_code_is_run_or_kept(shelf: Shelf, m: Path, tmp_path: Path) -> None:
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

    model, _ = shelf.run(folder="m")

    folder = shelf.lay_out(model)
    assert reload(folder).config.model_type == "llama"
    assert not ran.exists()
    assert not {file.name for file in model.files if file.name.endswith(".py")}
    left = config_of(folder).keys() | json.loads((folder / "tokenizer_config.json").read_text())
    assert not left & {"auto_map", *more, *paths}


def test_the_index_is_written_anew_from_the_headers(shelf: Shelf, shards: Path) -> None:
    """What the folder's says of which weight is where is not believed."""
    last = sorted(file.name for file in shards.glob("*.safetensors"))[-1]
    told = json.loads((shards / INDEX).read_text())["weight_map"]
    rewrite(shards, INDEX, lambda t: t["weight_map"].update({"model.norm.weight": last, "x": last}))

    model, _ = shelf.run(folder="m")

    assert json.loads((shelf.lay_out(model) / INDEX).read_text())["weight_map"] == told


def test_of_several_sets_of_weights_the_one_that_transformers_takes_comes_in(
    shelf: Shelf, m: Path
) -> None:
    (m / INDEX).write_text("{}")
    (m / "consolidated.safetensors").write_bytes(b"something else")
    model, _ = shelf.run(folder="m")
    assert [shard.name for shard in model.shards] == ["model.safetensors"]
    assert INDEX not in {file.name for file in model.files}


def test_a_tied_head_that_is_stored_as_well_is_passed_over(shelf: Shelf) -> None:
    folder = save_folder(tiny_model("llama_tied"), shelf.root / "m")
    embedding = "model.embed_tokens.weight"
    reweigh(folder, lambda w: w.update({"lm_head.weight": w[embedding].clone()}))

    model, _ = shelf.run(folder="m")

    assert "lm_head.weight" not in model.shards[0].tensors
    assert torch.equal(
        reload(shelf.lay_out(model))(IDS).logits, tiny_model("llama_tied")(IDS).logits
    )
    reweigh(folder, lambda w: w["lm_head.weight"].__setitem__((0, 0), 7.0))
    shelf.refused("tie_word_embeddings is true, and lm_head.weight differs")


def test_buffers_of_older_files_are_passed_over(shelf: Shelf, m: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    reweigh(m, lambda w: w.update({name: torch.full((4,), float("nan"))}))
    model, _ = shelf.run(folder="m")
    assert name not in model.shards[0].tensors
