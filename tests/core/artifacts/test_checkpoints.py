"""Stored embeddings from .pt, .npz and .safetensors: read without torch; what is none is named."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save as safe_bytes

from core.errors import DataInvalid
from core.tensors.embeddings import load_embeddings, save_embeddings
from core.tensors.shards import pack_text
from tests.core.artifacts.checkpoint_files import SOUND, VECTORS, rewritten, saved
from tests.core.artifacts.conftest import Reader
from tests.core.tensors.test_embeddings import some

LEFT_OUT = "model_state is left out: embeddings are looked up, no network is run"
NO_IDS = "no ids in the file: row numbers are used"


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
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


def test_torch_itself_reads_the_same_numbers() -> None:
    """What these tests save is what a user saves: torch's own safe loader agrees."""
    found = torch.load(io.BytesIO(SOUND), weights_only=True)
    torch.testing.assert_close(found["embeddings"], VECTORS)
