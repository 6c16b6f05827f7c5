"""Script and notebook read what a transport wrote, and end in 1 where a rotation is broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from core.transport.rotation_files import save_rotations
from core.transport.rotation_ledger import write_folder, write_ledger
from scripts.rotation_sanity import main
from tests.core.transport.transported import transported

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks/rotation_sanity.ipynb"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = transported("layer")
    write_ledger(tmp_path / "ledger.json", made.ledger)
    write_folder(made.ledger, tmp_path)
    save_rotations(tmp_path / "rotations.safetensors", made.rotations)
    return tmp_path


def run(*arguments: object) -> Result:
    ended = CliRunner().invoke(main, list(map(str, arguments)))
    assert isinstance(ended.exception, SystemExit | None), ended.exc_info
    return ended


def test_it_prints_every_layer_and_draws(folder: Path) -> None:
    out = folder / "new/pictures"
    ended = run(folder / "ledger.json", folder / "rotations.safetensors", "--out", out)

    assert ended.exit_code == 0, ended.output
    for name in ("layer_0", "layer_2", "final", "0123456789abcdef"):
        assert name in ended.output
    assert (out / "errors.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "singular_values.png").stat().st_size > 1000


def test_a_folder_without_rotations_is_believed_and_says_so(folder: Path) -> None:
    ended = run(folder)

    assert ended.exit_code == 0, ended.output
    assert "errors are those of the ledger" in ended.output


def test_a_broken_tolerance_ends_in_one(folder: Path) -> None:
    ended = run(folder / "ledger.json", folder / "rotations.safetensors", "--tolerance", "1e-30")

    assert ended.exit_code == 1
    assert "8 problems" in ended.stderr
    assert "layer_0: error" in ended.stderr


def test_files_that_are_none_and_wrong_usage(folder: Path) -> None:
    (folder / "broken.json").write_text("{}")
    ended = run(folder / "broken.json")
    assert (ended.exit_code, "rotation_ledger" in ended.stderr) == (1, True)

    (folder / "broken.safetensors").write_bytes(b"no")
    ended = run(folder / "ledger.json", folder / "broken.safetensors")
    assert (ended.exit_code, "safetensors" in ended.stderr) == (1, True)

    assert run(folder / "nowhere.json").exit_code == 2
    assert run(folder / "ledger.json", "--tolerance", "0").exit_code == 2


def test_it_runs_as_a_program() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "scripts.rotation_sanity", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "LEDGER" in ended.stdout


def cells() -> list[str]:
    told = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (told["nbformat"], told["nbformat_minor"]) == (4, 5)
    assert all(not cell.get("outputs") for cell in told["cells"])
    return ["".join(cell["source"]) for cell in told["cells"] if cell["cell_type"] == "code"]


def run_cells() -> None:
    """Run the notebook's cells in order, in a folder that holds the files it names."""
    space: dict[str, Any] = {}
    for number, source in enumerate(cells()):
        exec(compile(source, f"cell {number}", "exec"), space)


def test_the_notebook_runs_as_it_stands(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "ledger.json").rename(folder / "rotation_ledger.json")
    monkeypatch.chdir(folder)

    run_cells()

    told = capsys.readouterr().out
    assert "layer_2" in told
    assert "all errors within" in told
    assert (folder / "rotation_sanity/errors.png").is_file()


def test_the_notebook_fails_on_another_ledger(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = json.loads((folder / "ledger.json").read_text())
    ledger["layers"][1]["singular_values"][0] *= 2
    write_ledger(folder / "rotation_ledger.json", ledger)
    monkeypatch.chdir(folder)

    with pytest.raises(AssertionError, match="layer_1: the singular values"):
        run_cells()


def test_layers_come_as_the_documents_files_once(folder: Path) -> None:
    asked = (folder / "ledger.json", "--layers", folder / "kept")

    first, again = run(*asked), run(*asked)

    assert first.exit_code == 0, first.output
    (one,) = (folder / "kept" / "rotations").iterdir()
    assert {"layer_0.json", "final.json", "index.json"} <= {path.name for path in one.iterdir()}
    assert run(folder / "kept").exit_code == 0
    assert again.exit_code == 1
    assert "is there already" in again.output
