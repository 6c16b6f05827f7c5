"""What the tree promises a reader, beside the import contracts that lint-imports checks."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from core.registry import scan

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("api", "bench", "client", "core", "migrations", "scripts", "workers")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
VAGUE = {"utils", "util", "common", "helpers", "misc", "managers", "manager"}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_file_says_what_it_is_for_and_stays_short(path: Path) -> None:
    text = path.read_text()

    assert len(text.splitlines()) <= 400
    assert path.stem not in VAGUE
    assert not VAGUE & set(path.relative_to(ROOT).parts)
    if text:
        assert ast.get_docstring(ast.parse(text)), "the first line says what the file is for"


def test_functions_are_short() -> None:
    lengths = sorted(
        (node.end_lineno or 0) - node.body[0].lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )

    assert lengths[len(lengths) // 2] <= 10
    assert lengths[int(len(lengths) * 0.9)] <= 30


def test_api_and_client_start_without_torch() -> None:
    code = (
        "import sys, api.app, client.cli, core.kinds._base as kinds; kinds.kinds();"
        "sys.exit('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_plugin_file_without_its_constant_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "plugins"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "good.py").write_text("THING = 'a'\n")
    (package / "_private.py").touch()
    monkeypatch.syspath_prepend(tmp_path)

    assert dict(scan("plugins", "THING", str)) == {"good": "a"}
    scan.cache_clear()
    (package / "empty.py").touch()
    with pytest.raises(TypeError, match=r"plugins/empty\.py must define THING: str"):
        scan("plugins", "THING", str)
