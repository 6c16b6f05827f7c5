import importlib.util
import json
import socket
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

from tests.client.fake import World

DEMO = Path(__file__).parents[2] / "examples" / "wordnet" / "demo.py"
ROWS = [
    {"name": "raw", "hits": {"1": 0.83, "5": 0.9, "10": 0.95}, "cosine_mean": 0.5},
    {"name": "student", "hits": {"1": 0.89, "5": 0.96, "10": 0.98}, "cosine_mean": 0.99},
]
REPORT = {"evaluation": {"rows": ROWS}}


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    found = importlib.util.spec_from_file_location("wordnet_demo", DEMO)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def ran(demo: ModuleType, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    world.instant, world.part_limit_bytes = True, 64 << 20
    world.metrics = {"queries_per_second/student": [[0, 12345.0]]}
    for name, file in (("student_pt", "student.pt"), ("student_onnx", "student.onnx")):
        world.offer(name, name.encode(), file)
    world.offer("report", json.dumps(REPORT).encode(), "report.json")
    world.offer("report_md", b"# report", "report.md")
    for name in ("model", "targets", "student"):
        world.offer(name, name.encode())
    return CliRunner().invoke(demo.demo, ["--url", world.url, "--json", "names.json"])


def test_the_chain_is_submitted_at_once_by_reference(ran: Result, world: World) -> None:
    assert ran.exit_code == 0, ran.output
    fit, cache, distill, evaluate = (job["spec"] for job in world.keys.values())
    ids = [job["id"] for job in world.keys.values()]
    pairs = world.uploads["up_0"]["artifact"]
    assert fit["pairs"] == evaluate["pairs"] == pairs
    assert cache["model"] == distill["model"] == evaluate["model"] == f"{ids[0]}/model"
    assert distill["targets"] == f"{ids[1]}/targets"
    assert evaluate["student"] == f"{ids[2]}/student"


def test_files_figures_and_hashes_are_left(ran: Result, world: World, tmp_path: Path) -> None:
    files = {path.name for path in (tmp_path / "demo-output").iterdir()}
    assert files == {"student.pt", "student.onnx", "report.json", "report.md"}
    student = next(line for line in ran.output.splitlines() if line.startswith("student "))
    assert student.split() == ["student", "0.8900", "0.9600", "0.9800", "0.990000", "12,345"]
    names = json.loads((tmp_path / "names.json").read_text())
    assert names["fit_federated"]["model"] in world.blobs
    assert list(names) == ["fit_federated", "cache_targets", "distill", "evaluate"]


@pytest.mark.parametrize(
    ("options", "env"),
    [(["--data-dir", "taken/data"], {}), ([], {"STILL_DATA_DIR": "taken/data"})],
)
def test_a_service_that_cannot_start_is_told(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    env: dict[str, str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file where the data folder should be")
    ran = CliRunner().invoke(demo.demo, options, env=env)
    assert ran.exit_code == 1
    assert "the service ended" in ran.output


def test_a_port_in_use_is_refused_before_anything_is_asked_there(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = CliRunner().invoke(demo.demo, [], env={"STILL_PORT": str(port)})
    assert ran.exit_code == 1
    assert f"port {port}: Address already in use" in ran.output
    assert f"--url http://127.0.0.1:{port}" in ran.output
