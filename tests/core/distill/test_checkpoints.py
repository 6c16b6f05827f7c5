"""A teacher's checkpoint from a local file: what is read, what is refused, and nothing is run."""

from __future__ import annotations

import io
import pickle
import random
import warnings
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


EXPANDED = torch.zeros(1, 1).expand(10**7, 10**6)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    QUANTISED = torch.quantize_per_tensor(VECTORS, 0.1, 0, torch.qint8)
    NESTED = torch.nested.nested_tensor([VECTORS, VECTORS[:2]])


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
        (
            {"embeddings": VECTORS.to_sparse()},
            "embeddings: of layout torch.sparse_coo; needed a dense",
        ),
        ({"embeddings": EXPANDED}, "embeddings: shape .* over 1 stored numbers, an expanded view"),
        ({"embeddings": VECTORS.to("meta")}, "embeddings: a meta tensor"),
        ({"embeddings": NESTED}, "embeddings: a nested tensor"),
        ({"embeddings": VECTORS, "inputs": NESTED}, "inputs: a nested tensor"),
        ({"embeddings": QUANTISED}, "embeddings: a quantised tensor"),
        ({"embeddings": changed(1, 0.0)}, "embeddings: row 1 is all zeros"),
        ({"embeddings": VECTORS, "inputs": changed(3, 0.0)}, "inputs: row 3 is all zeros"),
        ({"embeddings": VECTORS, "ids": ["a", "b", "a", "c"]}, "ids: 'a' appears more than once"),
        (
            {"embeddings": VECTORS, "ids": torch.zeros(1, dtype=torch.int8).expand(10**12)},
            "ids: shape .* an expanded view",
        ),
        (
            {"embeddings": VECTORS, "model_state": {"w": VECTORS.to("meta")}},
            "model_state: 'w' is a meta tensor",
        ),
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


def test_a_pickle_cut_inside_a_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    pickled = pickle.dumps({"embeddings": 70_000}, 2)
    assert b"J" in pickled, "BININT"
    for write in (zipped(pickled[:-6]), lambda path: path.write_bytes(pickled[:-6])):
        write(path)
        with pytest.raises(DataInvalid, match=r"cut\.pt: not a checkpoint"):
            load_teacher_checkpoint(path)


@pytest.mark.parametrize("zipped_file", [True, False])
def test_of_damaged_files_nothing_but_data_invalid_comes(
    tmp_path: Path, *, zipped_file: bool
) -> None:
    path, chance, out = tmp_path / "damaged.pt", random.Random(0), io.BytesIO()
    content = {"embeddings": VECTORS, "ids": [*"abcd"], "epoch": 70_000}
    torch.save(content, out, _use_new_zipfile_serialization=zipped_file)
    refused = 0
    for turn in range(500):
        data = bytearray(out.getvalue())
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(min(len(data), 700))] = chance.randrange(256)
        path.write_bytes(data if turn % 3 else data[: chance.randrange(len(data))])
        try:
            load_teacher_checkpoint(path)
        except DataInvalid:
            refused += 1
    assert refused > 300


@pytest.mark.parametrize("name", ["os.system, protocol 0", "posix.system", "eval"])
def test_what_a_hostile_pickle_asks_for_is_named(tmp_path: Path, name: str) -> None:
    path, evil = tmp_path / "evil.pt", hostile_pickles.armed(str(tmp_path / "executed"))[name]
    asked = {"eval": "eval", "posix.system": "posix.system"}.get(name, "os.system")
    for write in (zipped(evil), lambda path: path.write_bytes(evil)):
        write(path)
        with pytest.raises(DataInvalid, match=rf"\(no code is run\): it names {asked}$"):
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
