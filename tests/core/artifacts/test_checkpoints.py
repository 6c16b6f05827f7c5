"""Stored embeddings from .pt, .npz and .safetensors: read without torch; nothing is executed."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as safe_bytes

from core.artifacts.importers import restricted_pickle
from core.artifacts.importers.torch_values import TORCH
from core.artifacts.limits import MIB, Limits
from core.errors import DataInvalid, TooLarge
from core.tensors.embeddings import load_embeddings, save_embeddings
from core.tensors.shards import pack_text
from tests.core.artifacts import hostile_pickles
from tests.core.artifacts.conftest import Reader, read_here
from tests.core.artifacts.hostile_pickles import P2, call, text
from tests.core.tensors.test_embeddings import some

VECTORS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
LEFT_OUT = "model_state is left out: embeddings are looked up, no network is run"
NO_IDS = "no ids in the file: row numbers are used"


def saved(content: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def rewritten(data: bytes, changes: dict[str, bytes | None]) -> bytes:
    """Return a zip with some members, by the end of their names, changed, left out or added."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        members = {name: old.read(name) for name in old.namelist()}
        root = next(iter(members)).split("/")[0]
        for name, content in changes.items():
            members[f"{root}/{name}"] = content or b""
            if content is None:
                del members[f"{root}/{name}"]
        for name, content in members.items():
            new.writestr(name, content)
    return out.getvalue()


def test_a_real_checkpoint_is_read_in_the_sandbox(sandboxed: Reader) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    data = saved(
        {
            "embeddings": VECTORS,
            "inputs": VECTORS[:, :3].contiguous(),
            "ids": ["a", "b", "c", "é"],
            "groups": [1, 1, 2, 2],
            "texts": ("one", "two\nlines", "", "four"),
            "model_state": model.state_dict(),
            "epoch": 3,
        }
    )

    found = sandboxed(data, file_name="teacher 1536d.pt")

    assert (found.format, found.file_name) == ("embeddings", "teacher 1536d.safetensors")
    assert found.notes == [LEFT_OUT, "ignored, no such field: epoch"]
    back = load_embeddings(found.path)
    np.testing.assert_array_equal(back.embeddings, VECTORS.numpy())
    assert back.inputs is not None
    np.testing.assert_array_equal(back.inputs, VECTORS[:, :3].numpy())
    assert back.ids == ["a", "b", "c", "é"]
    assert back.groups == ["1", "1", "2", "2"]
    assert back.texts == ["one", "two\nlines", "", "four"]
    assert back.train_rows.tolist() == [0, 1, 2, 3]
    assert back.held_out_rows.tolist() == []
    assert back.manifest == {"source": "imported", "pairs": None}
    assert found.meta == back.meta()


def test_reading_a_checkpoint_needs_no_torch() -> None:
    code = "import sys, core.artifacts.importers.sniff; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


VIEWS = {
    "plain": VECTORS,
    "transposed": VECTORS.T,
    "every other row": VECTORS[::2],
    "some columns": VECTORS[:, 2:5],
    "a parameter": torch.nn.Parameter(VECTORS),
    "a parameter's view": torch.nn.Parameter(VECTORS).detach()[1:3],
    "float64": VECTORS.double(),
    "float16": VECTORS.half(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_and_dtypes_come_as_torch_sees_them(here: Reader, name: str) -> None:
    found = here(saved({"embeddings": VIEWS[name]}))

    back = load_embeddings(found.path).embeddings
    wanted = VIEWS[name].detach().numpy()
    assert back.dtype == wanted.dtype
    np.testing.assert_array_equal(back, wanted)
    assert found.notes == [NO_IDS]


def test_bfloat16_is_widened_exactly_and_said(here: Reader) -> None:
    vectors = VECTORS.bfloat16()

    found = here(saved({"embeddings": vectors, "inputs": vectors}))

    back = load_embeddings(found.path)
    np.testing.assert_array_equal(back.embeddings, vectors.float().numpy())
    assert found.notes[0] == "embeddings: bfloat16, widened to float32 (exactly)"


def test_big_endian_numbers_are_turned(here: Reader) -> None:
    data = saved({"embeddings": VECTORS})
    turned = VECTORS.numpy().astype(">f4").tobytes()

    found = here(rewritten(data, {"byteorder": b"big", "data/0": turned}))

    np.testing.assert_array_equal(load_embeddings(found.path).embeddings, VECTORS.numpy())


def test_numpy_arrays_labels_as_tensors_and_plain_facts_are_read(here: Reader) -> None:
    content = {
        "embeddings": VECTORS.numpy(),
        "groups": torch.tensor([3, 3, 4, 4]),
        "ids": np.array(["a", "b", "c", "d"]),
        "model_state": None,
        "shape": VECTORS.shape,
        "where": torch.device("cuda:1"),
        "dtype": torch.float32,
        "optimizer": {"lr": 0.1, "betas": (0.9, 0.99), "state": {0: {"step": torch.tensor(1.0)}}},
    }

    found = here(saved(content))

    back = load_embeddings(found.path)
    np.testing.assert_array_equal(back.embeddings, VECTORS.numpy())
    assert (back.ids, back.groups) == (["a", "b", "c", "d"], ["3", "3", "4", "4"])
    names = ("dtype", "optimizer", "shape", "where")
    assert found.notes == [f"ignored, no such field: {name}" for name in names]


def test_tables_with_embeddings_are_read(here: Reader, tmp_path: Path) -> None:
    labels = {"ids": ["a", "b", "c", "d"], "texts": ["one", "two", "three", "four"]}
    found = here(npz(embeddings=VECTORS.numpy(), other=np.ones(2), **labels))
    back = load_embeddings(found.path)
    assert (back.ids, back.texts) == (labels["ids"], labels["texts"])
    assert found.notes == ["ignored, no such field: other"]
    assert found.format == "embeddings"


def test_foreign_safetensors_with_embeddings_are_read(here: Reader) -> None:
    texts, offsets = pack_text(["one", "two", "three", "four"])
    tensors = {
        "embeddings": VECTORS.numpy(),
        "texts": texts,
        "texts_offsets": offsets,
        "groups": np.arange(4),
        "other": np.ones(2),
    }
    found = here(safe_bytes(tensors))
    back = load_embeddings(found.path)
    assert (back.texts, back.groups) == (["one", "two", "three", "four"], ["0", "1", "2", "3"])
    assert found.notes == ["ignored, no such field: other", NO_IDS]


def test_own_embeddings_come_back_byte_for_byte(sandboxed: Reader, tmp_path: Path) -> None:
    save_embeddings(tmp_path / "e", some())
    data = (tmp_path / "e").read_bytes()

    found = sandboxed(data, file_name="e.safetensors")

    assert found.format == "embeddings"
    assert found.path.read_bytes() == data
    assert found.meta == some().meta()


def test_pairs_stay_pairs(here: Reader) -> None:
    pair = {"query_embeddings": VECTORS.numpy(), "target_embeddings": VECTORS.numpy()}
    assert here(npz(**pair, embeddings=VECTORS.numpy())).format == "pairs"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"weights": VECTORS}, "holds 'weights'; needed a dict with 'embeddings'"),
        ({}, "holds an empty dict; needed"),
        (VECTORS, "holds one tensor; needed a dict with 'embeddings'"),
        ([VECTORS], "holds a list; needed a dict"),
        (torch.nn.Linear(6, 2).state_dict(), "holds 'weight', 'bias'; needed"),
        ({"embeddings": [[1.0, 2.0]]}, "embeddings: a list; needed a tensor"),
        ({"embeddings": None}, "embeddings: a NoneType; needed a tensor"),
        ({"embeddings": VECTORS, "inputs": "x"}, "inputs: a str; needed a tensor"),
        ({"embeddings": VECTORS[0]}, r"embeddings: shape \[6\]"),
        ({"embeddings": torch.ones(4, 6, dtype=torch.int64)}, "embeddings: dtype int64"),
        ({"embeddings": VECTORS * torch.nan}, "embeddings: row 0 holds NaN"),
        ({"embeddings": VECTORS, "inputs": VECTORS[:2]}, "inputs: 2 rows for 4"),
        ({"embeddings": VECTORS, "ids": ["a"]}, "ids: 1 entries for 4"),
        ({"embeddings": VECTORS, "ids": ["a"] * 4}, "ids: 'a' appears more than once"),
        ({"embeddings": VECTORS, "groups": [0.5] * 4}, "groups: entry 0 is a float"),
        ({"embeddings": VECTORS, "texts": VECTORS}, "texts: float32 of shape"),
        ({"embeddings": VECTORS, "texts": "abcd"}, "texts: a str; needed a list of text"),
        (
            {"embeddings": VECTORS[:1].clone().expand(4, 6)},
            "an expanded view; save it with .contiguous",
        ),
        ({"embeddings": VECTORS.to_sparse()}, "asks for 'torch._utils._rebuild_sparse_tensor'"),
        ({"embeddings": VECTORS.to(torch.complex64)}, "asks for 'torch.ComplexFloatStorage'"),
        ({"embeddings": VECTORS, "m": torch.nn.Linear(2, 2)}, "asks for 'torch.nn.modules.linear"),
    ],
)
def test_what_is_no_checkpoint_of_embeddings_is_named(
    here: Reader, content: Any, told: str
) -> None:
    with pytest.raises(DataInvalid, match=told):
        here(saved(content))


SOUND = saved({"embeddings": VECTORS})


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_an_old_checkpoint_is_told_as_one(here: Reader, protocol: int) -> None:
    old = {"_use_new_zipfile_serialization": False, "pickle_protocol": protocol}
    with pytest.raises(DataInvalid, match=r"a PyTorch checkpoint of the old format, .*; allowed: "):
        here(saved({"embeddings": VECTORS}, **old))


def test_a_bare_pickle_is_told_what_is_allowed(here: Reader) -> None:
    told = r"a bare \.pkl.* a federated_model, lda_model, embeddings, codebook"
    with pytest.raises(DataInvalid, match=told):
        here(pickle.dumps({"embeddings": VECTORS.numpy()}, 2))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data/0": None}, "lacks 'archive/data/0'"),
        ({"data/0": b"1234"}, "embeddings: its storage has 4 bytes, 24 numbers need 96"),
        ({"byteorder": b"middle"}, "byteorder is 'middle'; needed little or big"),
        ({"data.pkl": b""}, "truncated or damaged"),
        ({"inner/data.pkl": b"."}, "holds 2 data.pkl; needed one"),
    ],
)
def test_a_damaged_archive_is_named(here: Reader, changes: Any, told: str) -> None:
    with pytest.raises(DataInvalid, match=told):
        here(rewritten(SOUND, changes))


def test_a_storage_key_is_a_name_in_the_archive_and_no_path(here: Reader) -> None:
    pickled = tensor_pickle(key="../../../../etc/passwd")
    with pytest.raises(DataInvalid, match=r"lacks 'archive/data/\.\./"):
        here(rewritten(SOUND, {"data.pkl": pickled}))


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def tensor_pickle(
    *,
    key: str = "0",
    storage: bytes = b"ctorch\nFloatStorage\n",
    numel: int = 24,
    offset: int = 0,
    shape: tuple[int, ...] = (4, 6),
    stride: tuple[int, ...] = (6, 1),
) -> bytes:
    """Return {"embeddings": a tensor} as torch writes it, with anything in it."""
    told = b"(" + text("storage") + storage + text(key) + text("cpu") + number(numel) + b"tQ"
    sizes = [b"(" + b"".join(map(number, each)) + b"t" for each in (shape, stride)]
    empty = b"ccollections\nOrderedDict\n)R"
    tensor = call("torch._utils _rebuild_tensor_v2", told, number(offset), *sizes, b"\x89", empty)
    return P2 + b"}" + text("embeddings") + tensor + b"s."


def test_the_hand_written_pickle_is_read(here: Reader) -> None:
    found = here(rewritten(SOUND, {"data.pkl": tensor_pickle()}))
    np.testing.assert_array_equal(load_embeddings(found.path).embeddings, VECTORS.numpy())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"offset": 1}, "reaches past its storage"),
        ({"offset": -1}, "impossible size"),
        ({"shape": (5, 6)}, "an expanded view"),
        ({"shape": (-4, 6)}, "impossible size"),
        ({"shape": (2**30, 2**30), "stride": (0, 0)}, "an expanded view"),
        ({"stride": (7, 1)}, "reaches past its storage"),
        ({"stride": (-6, 1)}, "impossible size"),
        ({"stride": (1,)}, "shape and stride do not fit"),
        ({"shape": (1,) * 9, "stride": (1,) * 9}, "shape and stride do not fit"),
        ({"numel": -1}, "unknown type or size"),
        ({"numel": 2**30}, "its storage has 96 bytes"),
        ({"storage": b"cnumpy\nndarray\n"}, "unknown type or size"),
        ({"storage": text("FloatStorage")}, "no torch storage"),
        ({"storage": b"ctorch\nQInt8Storage\n"}, "asks for 'torch.QInt8Storage'"),
    ],
)
def test_a_tensor_that_lies_about_itself_is_refused(here: Reader, changes: Any, told: str) -> None:
    with pytest.raises(DataInvalid, match=told):
        here(rewritten(SOUND, {"data.pkl": tensor_pickle(**changes)}))


def test_hostile_pickles_in_a_checkpoint_are_refused(tmp_path: Path, sandboxed: Reader) -> None:
    """All in this process, by the reader that the sandbox uses; some in the sandbox too."""
    marker = tmp_path / "executed"
    armed = hostile_pickles.armed(str(marker))
    every = {**armed, **hostile_pickles.quiet(str(marker))}
    for number_of, evil in enumerate(every.values()):
        folder = tmp_path / str(number_of)
        folder.mkdir()
        with pytest.raises((DataInvalid, TooLarge)):
            read_here(
                rewritten(SOUND, {"data.pkl": evil}), folder, limits=Limits(pickle_opcodes=500_000)
            )
        assert not (folder / "out.safetensors").exists()
    for name in ("posix.system", "eval", "nested pickle", "dotted path", "reduce in a dict"):
        with pytest.raises(DataInvalid, match="pickle"):
            sandboxed(rewritten(SOUND, {"data.pkl": armed[name]}), file_name="evil.pt")
    assert not marker.exists()


def test_attributes_of_a_dict_are_read_over_and_set_nowhere() -> None:
    evil = hostile_pickles.quiet("x")["build on a dict"]
    assert restricted_pickle.loads(evil, limits=Limits(), dialect=TORCH) == {}


def test_lists_that_share_each_other_cost_no_memory(here: Reader, tmp_path: Path) -> None:
    laughs = hostile_pickles.quiet("x")["laughs"]
    shared = P2 + b"}" + text("embeddings") + laughs[2:-1] + b"s."
    for pickled, told in ((laughs, "holds a list; needed a dict"), (shared, "embeddings: a list")):
        with pytest.raises(DataInvalid, match=told):
            here(rewritten(SOUND, {"data.pkl": pickled}), limits=Limits())
        (tmp_path / "scratch").rmdir()


def other_calls() -> dict[str, bytes]:
    plain = tensor_pickle()[len(P2) + 1 + len(text("embeddings")) : -2]
    return {
        "torch.load": P2 + call("torch load", text("x")) + b".",
        "torch.hub": P2 + call("torch.hub load", text("a"), text("b")) + b".",
        "storage from file": P2 + call("torch FloatStorage", text("/etc/passwd")) + b".",
        "a storage as a value": P2 + b"ctorch\nFloatStorage\n.",
        "a tensor of a list": P2 + call("torch._utils _rebuild_tensor_v2", *[b"]"] * 6) + b".",
        "a tensor of nothing": P2 + call("torch._utils _rebuild_tensor_v2") + b".",
        "a parameter of text": P2
        + call("torch._utils _rebuild_parameter", *[text("x")] * 3)
        + b".",
        "a parameter of too much": P2
        + call("torch._utils _rebuild_parameter", plain, *[b"N"] * 5)
        + b".",
        "a size of text": P2 + call("torch Size", b"(" + text("x") + b"t") + b".",
        "a device of a dict": P2 + call("torch device", b"}") + b".",
        "state of a tensor": P2 + plain + b"}b.",
        "items of a tensor": P2 + plain + b"K\x01K\x02s.",
        "call of a tensor": P2 + plain + b")R.",
        "a tensor as a key": P2 + b"}" + plain + b"K\x01s.",
        "persistent text": P2 + text("os.system") + b"Q.",
        "persistent nothing": P2 + b"NQ.",
        "persistent mark": P2 + b"(Q.",
        "persistent, protocol 0": b"Pstorage\n.",
    }


@pytest.mark.parametrize("name", other_calls())
def test_torch_names_build_tensors_alone(name: str) -> None:
    with pytest.raises(DataInvalid):
        restricted_pickle.loads(other_calls()[name], limits=Limits(), dialect=TORCH)


def test_torch_names_are_refused_outside_checkpoints() -> None:
    with pytest.raises(DataInvalid, match=r"asks for 'torch\._utils\._rebuild_tensor_v2'"):
        restricted_pickle.loads(tensor_pickle(), limits=Limits())
    with pytest.raises(DataInvalid, match="uses BINPERSID, which plain data never needs"):
        restricted_pickle.loads(P2 + b"NQ.", limits=Limits())


def test_limits_hold(here: Reader, tmp_path: Path) -> None:
    big = saved({"embeddings": torch.ones(1 << 10, 1 << 9)})
    with pytest.raises(TooLarge, match="2097152 bytes; the limit is 1048576"):
        here(big, limits=Limits(member_bytes=MIB))
    (tmp_path / "scratch").rmdir()
    with pytest.raises(TooLarge, match="unpacks to more than"):
        here(big, limits=Limits(inflated_bytes=MIB))


OPCODES = [
    *(b"}", b"]", b")", b"(", b"t", b"s", b"u", b"R", b"b", b"Q", b"N", b"0", b"\x85", b"\x86"),
    *(b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n"),
    *(text("storage"), text("0"), b"K\x00", b"K\x06", b"ctorch\nfloat32\n", b"q\x00", b"h\x00"),
    tensor_pickle()[2:-1],
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(OPCODES), max_size=25))
def test_any_order_of_known_opcodes_is_data_or_refused(opcodes: list[bytes]) -> None:
    with contextlib.suppress(DataInvalid):
        restricted_pickle.loads(P2 + b"".join(opcodes) + b".", limits=Limits(), dialect=TORCH)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, len(SOUND) - 1), value=st.integers(0, 255))
def test_a_changed_byte_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    data = SOUND[:at] + bytes([value]) + SOUND[at + 1 :]
    with contextlib.suppress(DataInvalid, TooLarge):
        read_here(data, tmp_path_factory.mktemp("changed"))


def test_torch_itself_reads_the_same_numbers() -> None:
    """What these tests save is what a user saves: torch's own safe loader agrees."""
    found = torch.load(io.BytesIO(SOUND), weights_only=True)
    torch.testing.assert_close(found["embeddings"], VECTORS)
