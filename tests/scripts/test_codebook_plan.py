"""Options that exclude each other or say nothing are refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from scripts.train_orthogonal_codebook import main


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--save-transformer a.safetensors", "--save-transformer a.safetensors: names the .pt"),
        ("--save-transformer a.onnx", "a.onnx: names the .pt"),
        ("--layers 5 --student-option layers=2", "--student-option layers: another option says it"),
        ("--student-option name=canonical", "--student-option name: say --student"),
        (
            "--build-pca --student-option codebook=null",
            "--student-option codebook: another option says it",
        ),
        ("--device tpu", "--device 'tpu'; allowed: cpu, cuda"),
        ("--device cuda:x", "--device 'cuda:x'"),
        (
            "--student rotor_product --layers 3",
            "--layers 3: rotor_product has no such field",
        ),
        ("--student-option foo=3", "--student-option foo 3: canonical has no such field; it has"),
        ("--lr nan", "--lr nan: Input should be a finite number"),
        ("--teacher orthogonal --compat legacy", "--compat 'legacy': orthogonal has no such field"),
        ("--student nope", "'nope' is not one of 'canonical', 'rotor_product'"),
        ("--teacher direct --bivector-cache b.npz", "--bivector-cache: needs a teacher or planes"),
    ],
)
@pytest.mark.parametrize("api", [False, True])
def test_what_says_nothing_is_refused(
    tmp_path: Path, options: str, told: str, *, api: bool
) -> None:
    model = tmp_path / "model.pkl"
    model.touch()
    where = ["--api", "http://127.0.0.1:9"] if api else []
    given = ["--train", "--federated-model", str(model), *where, *options.split()]

    ended = CliRunner().invoke(main, given)

    assert ended.exit_code == 2
    assert told in ended.output


def test_a_deeply_nested_option_is_a_text_the_student_refuses(tmp_path: Path) -> None:
    model = tmp_path / "model.pkl"
    model.touch()
    deep = "layers=" + "[" * 100_000
    given = ["--train", "--federated-model", str(model), "--student-option", deep]
    ended = CliRunner().invoke(main, given)
    assert ended.exit_code == 2
    assert "layers" in ended.output
