"""What the import process may do, and what becomes of it when it does too much."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core.artifacts.limits import MIB, Limits
from core.artifacts.sandbox import canonical_name, import_file
from core.errors import ChunkCrashed, DataInvalid, TooLarge
from tests.core.artifacts.conftest import Reader
from tests.core.artifacts.federated_files import model, npz, zipped

ROOT = Path(__file__).parents[3]
PAIRS = npz({"query_embeddings": np.eye(3), "target_embeddings": np.eye(3)})


def confined(code: str, *, limits: str = "Limits()") -> subprocess.CompletedProcess[str]:
    """Run code in a process confined as an import is."""
    start = (
        "import sys, os; sys.path.append(sys.argv[1])\n"
        "from core.artifacts.sandbox_main import confine\n"
        "from core.artifacts.limits import Limits\n"
        f"confine({limits})\n"
    )
    command = [sys.executable, "-I", "-c", start + code, str(ROOT)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={"OPENBLAS_NUM_THREADS": "1"}
    )


@pytest.mark.parametrize(
    "code",
    [
        "os.system('true')",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.kill(os.getppid(), 9)",
        "import subprocess; subprocess.run(['true'])",
        "import socket; socket.socket()",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import ctypes; ctypes.CDLL(None)",
        "import pickle; pickle.loads(b'cos\\nsystem\\n.')",
    ],
)
def test_a_confined_process_refuses_what_no_import_needs(code: str) -> None:
    done = confined(code)
    assert done.returncode == 1
    assert "PermissionError: reading a file never needs" in done.stderr


def test_a_confined_process_is_short_of_memory_and_file_size(tmp_path: Path) -> None:
    tight = f"Limits(memory_bytes={512 * MIB}, output_bytes=1000)"
    assert "MemoryError" in confined("bytes(1 << 30)", limits=tight).stderr
    write = (
        f"file = open({str(tmp_path / 'file')!r}, 'wb'); file.write(bytes(50_000)); file.close()"
    )
    assert "File too large" in confined(write, limits=tight).stderr


@pytest.fixture
def uploaded(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / "upload"
        path.write_bytes(data)
        return path

    return write


LAZY = Limits(wall_seconds=0.01)


@pytest.mark.parametrize(
    ("limits", "error", "reason"),
    [
        (LAZY, DataInvalid, r"took more than 0\.01 s and was stopped"),
        (Limits(memory_bytes=40 * MIB), TooLarge, "more than 41943040 bytes of memory"),
        (Limits(output_bytes=50_000), TooLarge, "a file of more than 50000 bytes"),
        (Limits(inflated_bytes=500_000), TooLarge, "more than 500000 bytes in all"),
        (Limits(member_bytes=500_000), TooLarge, "the limit is 500000"),
    ],
)
def test_each_limit_ends_an_import_with_its_reason(
    sandboxed: Reader, tmp_path: Path, limits: Limits, error: type[Exception], reason: str
) -> None:
    rows = np.random.default_rng(0).normal(size=(2000, 100))
    big = npz({"query_embeddings": rows, "target_embeddings": rows})

    with pytest.raises(error, match=reason):
        sandboxed(big, limits=limits)
    assert list((tmp_path / "work").iterdir()) == []


def test_processor_time_is_limited(sandboxed: Reader, tmp_path: Path) -> None:
    evil = b"\x80\x02" + b"N0" * 5_000_000 + b"N."

    with pytest.raises(DataInvalid, match="processor time"):
        sandboxed(zipped({**model().files(), "toy.pkl": evil}), limits=Limits(cpu_seconds=1))
    assert list((tmp_path / "work").iterdir()) == []


def test_a_process_that_does_not_start_is_no_fault_of_the_file(
    uploaded: Callable[[bytes], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such interpreter >&2; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))

    with pytest.raises(ChunkCrashed, match="ended with 3: no such interpreter"):
        import_file(uploaded(PAIRS), file_name="x", workdir=tmp_path)


def test_the_import_sees_no_environment(
    uploaded: Callable[[bytes], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = tmp_path / "shown"
    spy = tmp_path / "python"
    spy.write_text(f"#!/bin/sh\n/usr/bin/env > {shown}\nexit 3\n")
    spy.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(spy))
    monkeypatch.setenv("STILLROOM_SECRET", "hunter2")

    with pytest.raises(ChunkCrashed):
        import_file(uploaded(PAIRS), file_name="x", workdir=tmp_path)

    names = {line.split("=")[0] for line in shown.read_text().splitlines()}
    shells_own = {"PWD", "OLDPWD", "SHLVL", "_"}
    assert names - shells_own == {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}


def test_it_works_from_any_folder(
    uploaded: Callable[[bytes], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, elsewhere = uploaded(PAIRS), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "numpy.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(elsewhere)

    found = import_file(source, file_name="x.npz", workdir=elsewhere)

    assert found.meta["rows"] == 3
    assert sorted(os.listdir(elsewhere)) == sorted([found.path.name, "numpy.py"])


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("pairs.npz", "pairs.safetensors"),
        ("model.tar.gz", "model.safetensors"),
        ("../../etc/passwd", "passwd.safetensors"),
        ("C:\\temp\\x.zip", "x.safetensors"),
        ("a\r\nSet-Cookie: b.npz", "aSet-Cookie: b.safetensors"),
        ("..", "imported.safetensors"),
        ("", "imported.safetensors"),
        ("é" * 400, "é" * 150 + ".safetensors"),
    ],
)
def test_a_clients_name_is_shown_and_nothing_more(told: str, shown: str) -> None:
    assert canonical_name(told) == shown


def test_limits_are_values() -> None:
    assert replace(Limits(), members=3).members == 3
