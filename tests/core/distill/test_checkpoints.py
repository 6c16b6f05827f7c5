"""A teacher's checkpoint from a local file: what is read, what is refused, and nothing is run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from core.distill.distillation import load_teacher_checkpoint, resolve_device
from core.errors import DataInvalid, SpecInvalid
from core.tensors.embeddings import save_embeddings
from tests.core.artifacts import hostile_pickles
from tests.core.distill.test_relational import normal
from tests.core.tensors.test_embeddings import some

VECTORS = normal(4, 16)


def saved(folder: Path, content: Any, **options: Any) -> Path:
    path = folder / "teacher.pt"
    torch.save(content, path, **options)
    return path


def test_a_checkpoint_is_read_with_all_its_schema(tmp_path: Path) -> None:
    model = torch.nn.Linear(16, 5)
    path = saved(
        tmp_path,
        {
            "embeddings": VECTORS,
            "inputs": VECTORS[:, :3],
            "ids": ["a", "b", "c", "d"],
            "groups": (1, 1, 2, 2),
            "texts": ["one", "two", "three", "four"],
            "model_state": model.state_dict(),
            "epoch": 3,
        },
    )

    found = load_teacher_checkpoint(path, device="cpu", teacher_dim=16)

    assert list(found) == ["embeddings", "inputs", "ids", "groups", "texts", "model_state"]
    torch.testing.assert_close(found["embeddings"], VECTORS)
    torch.testing.assert_close(found["inputs"], VECTORS[:, :3])
    assert (found["ids"], found["groups"]) == (["a", "b", "c", "d"], ["1", "1", "2", "2"])
    torch.nn.Linear(16, 5).load_state_dict(found["model_state"])


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    found = load_teacher_checkpoint(str(saved(tmp_path, {"embeddings": VECTORS, "ids": None})))

    assert list(found) == ["embeddings"]
    assert found.get("model_state") is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_becomes_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(VECTORS.to(dtype))

    found = load_teacher_checkpoint(saved(tmp_path, {"embeddings": parameter}))["embeddings"]

    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, VECTORS.to(dtype).float())


def test_older_files_and_views_are_read(tmp_path: Path) -> None:
    path = saved(tmp_path, {"embeddings": VECTORS.T}, _use_new_zipfile_serialization=False)

    torch.testing.assert_close(load_teacher_checkpoint(path)["embeddings"], VECTORS.T)


def test_safetensors_are_read_whatever_their_name(tmp_path: Path) -> None:
    save_embeddings(tmp_path / "own.pt", some())
    save_file({"embeddings": VECTORS.bfloat16(), "extra": VECTORS}, tmp_path / "plain")

    own = load_teacher_checkpoint(tmp_path / "own.pt")
    plain = load_teacher_checkpoint(tmp_path / "plain")

    assert list(own) == ["embeddings", "inputs", "ids", "groups", "texts"]
    np.testing.assert_array_equal(own["embeddings"].numpy(), some().embeddings)
    assert (own["ids"], own["texts"]) == (some().ids, some().texts)
    assert list(plain) == ["embeddings"]
    assert plain["embeddings"].dtype == torch.float32


def changed(at: Any, value: float) -> torch.Tensor:
    vectors = VECTORS.clone()
    vectors[at] = value
    return vectors


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"weights": VECTORS, "bias": 1}, "embeddings: missing; the file holds bias, weights"),
        ({}, "embeddings: missing; the file holds nothing"),
        (VECTORS, "holds a Tensor; needed a dict"),
        ([VECTORS], "holds a list; needed a dict"),
        ({"embeddings": [[1.0, 2.0]]}, "embeddings: a list; needed a tensor"),
        ({"embeddings": VECTORS[0]}, r"embeddings: shape \[16\]; needed"),
        ({"embeddings": VECTORS[:0]}, r"embeddings: shape \[0, 16\]"),
        ({"embeddings": VECTORS.to_sparse()}, "needed dense"),
        ({"embeddings": torch.ones(4, 16, dtype=torch.int64)}, "embeddings: dtype torch.int64"),
        ({"embeddings": torch.ones(4, 16, dtype=torch.complex64)}, "dtype torch.complex64"),
        ({"embeddings": changed((2, 1), torch.nan)}, "embeddings: row 2 holds NaN"),
        ({"embeddings": changed(3, torch.inf)}, "embeddings: row 3 holds NaN or infinity"),
        (
            {"embeddings": VECTORS.double() * 1e60},
            "embeddings: row 0 holds NaN or infinity .in float32",
        ),
        ({"embeddings": VECTORS, "inputs": VECTORS[:2]}, "inputs: 2 rows for 4"),
        ({"embeddings": VECTORS, "inputs": "x"}, "inputs: a str"),
        ({"embeddings": VECTORS, "ids": ["a"]}, "ids: 1 entries for 4"),
        ({"embeddings": VECTORS, "groups": [0.5] * 4}, "groups: a list; needed a list of text"),
        ({"embeddings": VECTORS, "texts": "abcd"}, "texts: a str; needed a list"),
        ({"embeddings": VECTORS, "model_state": VECTORS}, "model_state: a Tensor; needed a dict"),
        ({"embeddings": VECTORS, "model_state": {1: VECTORS}}, "model_state: a dict"),
    ],
)
def test_what_breaks_the_schema_is_named_with_its_path(
    tmp_path: Path, content: Any, told: str
) -> None:
    path = saved(tmp_path, content)
    with pytest.raises(DataInvalid, match=told) as caught:
        load_teacher_checkpoint(path)
    assert str(path) in caught.value.message


def test_another_width_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"embeddings": VECTORS})
    with pytest.raises(DataInvalid, match="embeddings: 16 dimensions; teacher_dim is 1536"):
        load_teacher_checkpoint(path, teacher_dim=1536)
    for wrong in (0, -1, "16", 16.0, True):
        with pytest.raises(SpecInvalid, match=r"teacher_dim .*; allowed"):
            load_teacher_checkpoint(path, teacher_dim=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["nowhere.pt", "", None, "."])
def test_a_file_that_is_not_there_is_named(path: Any) -> None:
    with pytest.raises(DataInvalid, match=r"checkpoint_path .*: no such file"):
        load_teacher_checkpoint(path)


def zipped(pickled: bytes) -> Callable[[Path], None]:
    """Write a checkpoint's archive around a pickle."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", pickled)
            archive.writestr("a/version", "3\n")
            archive.writestr("a/byteorder", "little")

    return write


def test_hostile_pickles_are_refused_and_never_executed(tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil.pt"
    pickles = hostile_pickles.armed(str(marker))
    assert len(pickles) > 25
    for evil in pickles.values():
        for write in (zipped(evil), lambda path, evil=evil: path.write_bytes(evil)):
            write(path)
            with pytest.raises(DataInvalid, match=r"evil\.pt: "):
                load_teacher_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"text", b"\x80\x02.", b"\0" * 8 + b"{}", b"\x93NUMPY"]
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(DataInvalid, match=r"broken\.pt: not a checkpoint"):
        load_teacher_checkpoint(path)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"embeddings": VECTORS})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataInvalid, match="not a checkpoint"):
        load_teacher_checkpoint(path)


def test_a_whole_module_is_code_and_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"embeddings": VECTORS, "model": torch.nn.Linear(2, 2)})
    with pytest.raises(DataInvalid, match="no code is run"):
        load_teacher_checkpoint(path)
    path.write_bytes(pickle.dumps({"embeddings": VECTORS.numpy()}))
    with pytest.raises(DataInvalid, match="no code is run"):
        load_teacher_checkpoint(path)


def test_devices_are_resolved_or_named() -> None:
    there = torch.cuda.is_available()
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if there else "cpu")
    for unknown in ("gpu", "cuda:99", "", "mps", None):
        with pytest.raises(SpecInvalid, match=r"device .*; this machine has: auto, cpu") as caught:
            resolve_device(unknown)  # type: ignore[arg-type]
        assert caught.value.pointer == "/device"
    if not there:
        with pytest.raises(SpecInvalid, match="device 'cuda'"):
            load_teacher_checkpoint("nowhere.pt", device="cuda")
