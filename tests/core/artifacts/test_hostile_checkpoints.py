"""A checkpoint that lies, is damaged or would run something: refused, and nothing is executed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.artifacts.importers import restricted_pickle
from core.artifacts.importers.torch_values import TORCH
from core.artifacts.limits import MIB, Limits
from core.errors import DataInvalid, TooLarge
from core.tensors.embeddings import load_embeddings
from tests.core.artifacts import hostile_pickles
from tests.core.artifacts.checkpoint_files import SOUND, VECTORS, rewritten, saved, tensor_pickle
from tests.core.artifacts.conftest import Reader, read_here
from tests.core.artifacts.hostile_pickles import P2, call, text


def test_a_storage_key_is_a_name_in_the_archive_and_no_path(here: Reader) -> None:
    pickled = tensor_pickle(key="../../../../etc/passwd")
    with pytest.raises(DataInvalid, match=r"lacks 'archive/data/\.\./"):
        here(rewritten(SOUND, {"data.pkl": pickled}))


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
