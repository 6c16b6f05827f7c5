from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from core.distill.export import export_student, load_student, student_facts, to_onnx
from core.distill.students._base import StudentModule, students
from core.errors import DataInvalid
from tests.core.distill._make import make_student, some_queries

CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in students()] + [
    (name, {"router": router})
    for name in ("nlerp_geodesic", "rotor_product", "shared_subspace")
    for router in ("exact", "projected")
]
every_case = pytest.mark.parametrize(("name", "changes"), CASES)


def run_onnx(data: bytes | str, queries: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype]:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"queries": queries.numpy()})[0])


def disturbed(name: str, changes: dict[str, Any]) -> StudentModule:
    """A student whose every parameter has something to say."""
    student = make_student(name, **changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    student.retract()
    return student.eval()


@every_case
@pytest.mark.parametrize("rows", [1, 37])
def test_onnx_says_what_torch_says(name: str, changes: dict[str, Any], rows: int) -> None:
    student, queries = disturbed(name, changes), some_queries(rows)
    queries[0] = 0
    found = run_onnx(to_onnx(student), queries)
    assert np.abs(found - student(queries).detach().numpy()).max() < 1e-5


@every_case
def test_an_empty_batch_is_an_empty_answer(name: str, changes: dict[str, Any]) -> None:
    student = disturbed(name, changes)
    none = some_queries(0)
    assert (
        run_onnx(to_onnx(student), none).shape == student(none).shape == (0, student.output_dim())
    )


@every_case
def test_both_weight_files_bring_the_student_back(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    student = disturbed(name, changes)

    files = export_student(student, tmp_path, facts={"seed": 3})

    for path in (files.torch, files.safetensors):
        again = load_student(path)
        assert torch.equal(again(some_queries()), student(some_queries()))
        assert again.config == student.config
    assert student_facts(files.safetensors)["facts"] == {"seed": 3}
    assert set(files.sizes()) == {"student.pt", "student.safetensors", "student.onnx"}
    plain = torch.load(files.torch, weights_only=True)
    assert set(plain) == {"header", "state"}


PROGRAM = """
import hashlib, pathlib, sys
from core.distill.export import export_student
from tests.core.distill._make import make_student
for name in ("canonical", "rotor_product"):
    folder = pathlib.Path(sys.argv[1]) / name
    folder.mkdir(parents=True)
    files = export_student(make_student(name), folder, facts={"b": "name", "a": 1.5})
    for path in (files.torch, files.safetensors, files.onnx):
        print(hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / f"run {number}" / ("deeper" * number))],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    printed = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert len(printed[0].split()) == 6
    assert printed[0] == printed[1]


def test_an_export_holds_no_path_and_is_the_same_anywhere(tmp_path: Path) -> None:
    digests = []
    for name in ("here", "over there"):
        (tmp_path / name).mkdir()
        files = export_student(make_student("rotor_product"), tmp_path / name)
        data = [path.read_bytes() for path in (files.torch, files.safetensors, files.onnx)]
        for word in (b"/core/", b"site-packages", b".py", b"home", b"over there"):
            assert not any(word in part for part in data)
        digests.append([hashlib.sha256(part).hexdigest() for part in data])
    assert digests[0] == digests[1]


def test_onnx_scales_for_the_router_as_torch_does() -> None:
    student = disturbed("rotor_product", {})
    with torch.no_grad():
        student.get_buffer("router.length").fill_(1e-3)
    queries = 1e-3 * some_queries()
    found = run_onnx(to_onnx(student), queries)
    wanted = student(queries).detach().numpy()
    assert np.abs(found - wanted).max() < 1e-8
    with torch.no_grad():
        student.get_buffer("router.length").fill_(1.0)
    assert np.abs(student(queries).detach().numpy() - wanted).max() > 1e-6


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.pt").write_bytes(b"no zip")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    torch.save({"header": "{}", "state": {}}, tmp_path / "other.pt")
    for name in ("broken.pt", "list.pt", "broken.safetensors", "other.pt", "student.onnx"):
        with pytest.raises(DataInvalid):
            load_student(tmp_path / name)


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


def test_a_file_that_wants_to_run_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"header": Trap(), "state": {}}, tmp_path / "trap.pt")
    with pytest.raises(DataInvalid):
        load_student(tmp_path / "trap.pt")
    assert "code ran" not in capsys.readouterr().out
