from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result

from core.distill.export import load_student
from core.distill.lda import MultiHeadLDA
from core.tensors.lda import LDA
from core.tensors.lda_db import save_lda_db
from scripts.test_transformer_distillation import main
from tests.core.distill._lda import DIM, HEADS, WIDTH, drawn, questions

ROOT = Path(__file__).resolve().parents[2]
QUICK = "--embed-dim 16 --ff-dim 24 --epochs 3 --no-latency"


def write_db(path: Path, *, width: int = DIM, rows: int = 60) -> Path:
    """Six heads and questions near them."""
    asked = questions(rows).numpy()
    answers, cluster_of = drawn(HEADS, width, seed=2).numpy(), np.arange(rows) % HEADS
    model = LDA(
        centroids=drawn(HEADS, DIM, seed=1).numpy(),
        answers=answers,
        maps=None,
        queries=asked,
        targets=answers[cluster_of],
        cluster_of=cluster_of,
        cluster_ids=[f"cluster {number}" for number in range(HEADS)],
        train_rows=np.arange(rows),
        held_out_rows=np.zeros(0, np.int64),
        manifest={"temperature": 0.2},
    )
    save_lda_db(path, {"lda": model})
    return path


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return write_db(tmp_path / "lda.db")


def run(db: Path, arguments: str) -> Result:
    ended = CliRunner().invoke(main, ["--db", str(db), *arguments.split()])
    assert isinstance(ended.exception, SystemExit | None), ended.exc_info
    return ended


def failed(db: Path, arguments: str, *, code: int = 1) -> str:
    ended = run(db, arguments)
    assert ended.exit_code == code, ended.output
    return ended.stderr


def test_document_001s_flags_and_defaults() -> None:
    printed = {
        "--epochs": 200,
        "--cosine-weight": 0.7,
        "--num-heads": 4,
        "--num-layers": 2,
        "--embed-dim": 384,
    }
    options = {option.opts[0]: option for option in main.params}
    assert {name: options[name].default for name in printed} == printed
    assert options["--db"].required
    assert all(isinstance(option, click.Option) and option.help for option in main.params)


def test_it_trains_judges_and_says_both_nulls(db: Path) -> None:
    ended = run(db, QUICK)
    assert ended.exit_code == 0, ended.stderr
    assert "6 heads, 60 questions, 12 questions kept" in ended.stdout
    for word in ("raw question", "mean vector", "ridge", "student", "teacher", "centred_cosine",
                 "4^1", "after 3 epochs: loss"):  # fmt: skip
        assert word in ended.stdout
    assert "no nearer to its teacher than a linear map" in ended.stdout


def test_a_second_run_prints_the_same(db: Path) -> None:
    assert run(db, QUICK).stdout == run(db, QUICK).stdout
    assert run(db, QUICK).stdout != run(db, f"{QUICK} --seed 1").stdout


def test_longer_training_beats_the_linear_map(tmp_path: Path) -> None:
    db = write_db(tmp_path / "many.db", rows=240)
    text = run(
        db,
        "--embed-dim 16 --ff-dim 64 --epochs 60 --no-latency --learning-rate 3e-3 --batch-size 64",
    ).stdout
    rows = {line[:14].strip(): line[14:].split() for line in text.splitlines()}
    assert float(rows["student"][0]) > 0.98
    assert float(rows["student"][0]) > float(rows["ridge"][0]) > float(rows["mean vector"][0])
    assert "no nearer" not in text


@pytest.mark.parametrize("width", [DIM, WIDTH])
def test_the_weights_are_written_and_are_the_student(tmp_path: Path, width: int) -> None:
    db = write_db(tmp_path / "lda.db", width=width)
    ended = run(db, f"{QUICK} --output {tmp_path}/made/student.pt")
    assert ended.exit_code == 0, ended.stderr
    files = {path.name for path in (tmp_path / "made").iterdir()}
    assert files == {"student.pt", "student.safetensors", "student.onnx"}
    kept = torch.load(tmp_path / "made" / "student.pt", weights_only=True)
    assert '"name": "projection_transformer"' in kept["header"]
    assert '"ridge_cosine"' in kept["header"]
    again = load_student(tmp_path / "made" / "student.safetensors")
    session = onnxruntime.InferenceSession(str(tmp_path / "made" / "student.onnx"))
    [said] = session.run(None, {"queries": questions(3).numpy()})
    wanted = again(questions(3)).detach().numpy()
    assert wanted.shape == (3, width)
    assert np.abs(np.asarray(said) - wanted).max() < 1e-5


def test_the_same_command_writes_the_same_bytes(db: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run(db, f"{QUICK} --output {tmp_path}/{name}/s.pt").exit_code == 0
    for file in ("s.pt", "s.safetensors", "s.onnx"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_document_001s_own_training_is_an_option(db: Path) -> None:
    legacy = run(db, f"{QUICK} --compat legacy")
    assert legacy.exit_code == 0
    assert legacy.stdout != run(db, QUICK).stdout
    assert run(db, f"{QUICK} --full-batch --augment 0").exit_code == 0
    for other in ("--full-batch", "--batch-size 3", "--augment 0.1"):
        assert other.split()[0] in failed(db, f"{QUICK} --compat legacy {other}", code=2)
    assert "--batch-size" in failed(db, f"{QUICK} --full-batch --batch-size 3", code=2)


def test_both_sides_are_timed_and_advice_is_given(db: Path) -> None:
    quick = QUICK.replace("--no-latency", "--seconds 0.001")
    ended = run(db, quick)
    assert ended.exit_code == 0, ended.stderr
    for word in ("microseconds per query", "4096", "For single queries:", "For batches of 32:",
                 "For batches of 4096:", "Memory:"):  # fmt: skip
        assert word in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--no-latency", "--embed-dim: 384, but the questions"),
        (f"{QUICK} --num-heads 5", "--num-heads: num_heads 5 does not divide"),
        (f"{QUICK} --learning-rate 1e30", "--learning-rate: learning_rate 1e+30"),
        (f"{QUICK} --projection other", "other"),
    ],
)
def test_what_cannot_be_is_said_without_a_traceback(db: Path, arguments: str, words: str) -> None:
    assert words in failed(db, arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--epochs 0", "--epochs"),
        ("--cosine-weight 1.5", "--cosine-weight"),
        ("--augment 1", "--augment"),
        ("--test-fraction 0", "--test-fraction"),
        ("--learning-rate 0", "--learning-rate"),
        ("--output x.onnx", "--output"),
        ("--seconds 0", "--seconds"),
        ("--compat new", "--compat"),
    ],
)
def test_wrong_options_are_named(db: Path, arguments: str, words: str) -> None:
    assert words in failed(db, arguments, code=2)


def test_a_place_that_cannot_be_written_is_said_before_training(db: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = run(db, f"{QUICK} --output {tmp_path}/file/student.pt")
    assert ended.exit_code == 1
    assert "file" in ended.stderr
    assert "epochs" not in ended.stdout


def test_files_that_are_no_database_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database")
    assert "Error" in failed(tmp_path / "text.db", QUICK)
    assert "--db" in failed(tmp_path / "absent.db", QUICK, code=2)


def test_a_database_without_questions_or_with_one_is_said_to_be(tmp_path: Path) -> None:
    heads = MultiHeadLDA(drawn(3, DIM, seed=1), drawn(3, DIM, seed=2), temperature=0.2)
    heads.save(tmp_path / "bare.db")
    ended = run(tmp_path / "bare.db", QUICK)
    assert ended.exit_code == 0
    assert "centroids stand for them" in ended.stderr
    alone = MultiHeadLDA(drawn(1, DIM, seed=1), drawn(1, DIM, seed=2), temperature=0.2)
    alone.save(tmp_path / "alone.db")
    assert "at least 2" in failed(tmp_path / "alone.db", QUICK)


def test_it_runs_as_a_file_and_help_needs_no_torch(db: Path) -> None:
    script = str(ROOT / "scripts" / "test_transformer_distillation.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # noqa: TID251
    ran = subprocess.run(
        [sys.executable, script, "--db", str(db), *QUICK.split()],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    code = (
        "import sys, scripts.test_transformer_distillation as s;"
        "s.main(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], env=env, check=False, capture_output=True)
    assert shown.returncode == 0
    assert b"Exit codes" in shown.stdout
