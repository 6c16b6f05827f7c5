"""Whatever the bytes, reading them gives a valid import or one of our errors, nothing else."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from core.artifacts.importers import restricted_pickle
from core.artifacts.limits import MIB, Limits
from core.errors import StillroomError
from core.tensors.formats import (
    Pairs,
    check_federated,
    check_pairs,
    load_federated,
    load_pairs,
    save_pairs,
)
from core.tensors.prompts import check_prompts, load_prompts
from tests.core.artifacts.conftest import read_here, read_sandboxed
from tests.core.artifacts.federated_files import model, npz, tarred, zipped

LIMITS = Limits(
    memory_bytes=1024 * MIB, inflated_bytes=64 * MIB, member_bytes=32 * MIB, pickle_opcodes=100_000
)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _own_pairs() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "pairs"
        save_pairs(path, Pairs(ids=list("abc"), queries=np.eye(3), targets=np.eye(3)))
        return path.read_bytes()


def _own_model() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        return read_here(zipped(model(clusters=2).files()), Path(name)).path.read_bytes()


SOUND = {
    "npz": npz({"query_embeddings": np.eye(3), "target_embeddings": np.eye(3)}),
    "npz with ids": npz(
        {"query_embeddings": np.eye(3), "target_embeddings": np.eye(3), "ids": np.arange(3)},
        compressed=True,
    ),
    "json lines": b'{"text": "a b", "id": 1}\n{"text": "\xc3\xa9", "id": "x", "split": "test"}\n',
    "table": b"id\ttext\tlicence\nx\ta b\tMIT\ny\t\xc3\xa9\tMIT\n",
    "pairs": _own_pairs(),
    "model": _own_model(),
    "zip": zipped(model(clusters=2).files()),
    "tar": tarred(model(clusters=2).files(), mode="w:"),
    "tar.gz": tarred(model(clusters=2).files()),
}
PICKLE = model(clusters=2).files()["toy.pkl"]


def check(data: bytes) -> None:
    """Read ``data``; what comes out must be valid, what is raised must be ours."""
    with tempfile.TemporaryDirectory() as name:
        try:
            found = read_here(data, Path(name), limits=LIMITS)
        except StillroomError:
            return
        if found.format == "pairs":
            check_pairs(load_pairs(found.path))
        elif found.format == "prompts":
            check_prompts(load_prompts(found.path))
        else:
            check_federated(load_federated(found.path))


MAGICS = st.sampled_from(
    [
        b"",
        b"PK\x03\x04",
        b"\x1f\x8b\x08\x00",
        b"\x80\x04",
        b"\x93NUMPY\x01\x00",
        b"\x40" + bytes(7) + b"{",
        b'{"text": "',
        b"text\n",
    ]
)


@QUICK
@given(MAGICS, st.binary(max_size=600))
@example(b"", b"\x00" * 257 + b"ustar" + b"\x00" * 300)
def test_random_bytes(magic: bytes, rest: bytes) -> None:
    check(magic + rest)


@QUICK
@given(st.sampled_from(sorted(SOUND)), st.floats(0, 1))
def test_truncations(name: str, kept: float) -> None:
    check(SOUND[name][: int(len(SOUND[name]) * kept)])


CHANGES = st.lists(
    st.tuples(st.floats(0, 0.9999), st.binary(min_size=1, max_size=6)), min_size=1, max_size=4
)


def mutated(data: bytes, changes: list[tuple[float, bytes]]) -> bytes:
    for place, new in changes:
        at = int(place * len(data))
        data = data[:at] + new + data[at + len(new) :]
    return data


@settings(QUICK, max_examples=400)
@given(st.sampled_from(sorted(SOUND)), CHANGES)
def test_mutations(name: str, changes: list[tuple[float, bytes]]) -> None:
    check(mutated(SOUND[name], changes))


@settings(QUICK, max_examples=300)
@given(CHANGES)
def test_mutated_pickles(changes: list[tuple[float, bytes]]) -> None:
    check(zipped({**model(clusters=2).files(), "toy.pkl": mutated(PICKLE, changes)}))


OPCODES = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=1),
        st.sampled_from([bytes((code,)) for code in b"(}])tRbsuaeN0"]),
        st.sampled_from(
            [b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cbuiltins\nset\n", b"X\x01\x00\x00\x00a"]
        ),
        st.sampled_from(
            [b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy.core.multiarray\nscalar\n",
             b"cnumpy.core.numeric\n_frombuffer\n", b"cpathlib\nPath\n", b"c_codecs\nencode\n",
             b"C\x04abcd", b"X\x02\x00\x00\x00f4", b"K\x01", b"\x94", b"h\x00", b"\x85", b"\x86"]
        ),
    ),
    max_size=30,
)  # fmt: skip


@settings(QUICK, max_examples=1500)
@given(OPCODES)
def test_random_opcodes(opcodes: list[bytes]) -> None:
    try:
        restricted_pickle.loads(b"\x80\x04" + b"".join(opcodes) + b".", limits=LIMITS)
    except StillroomError:
        return


@settings(QUICK, max_examples=15)
@given(st.sampled_from(sorted(SOUND)), CHANGES)
def test_mutations_through_the_sandbox(name: str, changes: list[tuple[float, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = read_sandboxed(mutated(SOUND[name], changes), Path(folder), limits=LIMITS)
        except StillroomError:
            assert list((Path(folder) / "work").iterdir()) == []
        else:
            assert list((Path(folder) / "work").iterdir()) == [found.path]


@pytest.mark.parametrize("name", SOUND)
def test_the_unchanged_files_are_sound(name: str, tmp_path: Path) -> None:
    assert read_here(SOUND[name], tmp_path, limits=LIMITS).format in (
        "pairs",
        "prompts",
        "federated_model",
    )
