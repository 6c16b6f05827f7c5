"""Documents 001 and 003: the code they print runs, and gives what ours gives."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from core.distill.latency import benchmark_latency
from core.distill.lda import MultiHeadLDA
from core.distill.projection import evaluate_distillation, train_distillation
from core.distill.students.projection_transformer import ProjectionTransformer
from core.tensors.lda import LDA
from core.tensors.lda_db import save_lda_db
from tests.examples.documents import (
    OURS,
    block,
    blocks,
    defined,
    drawn,
    small,
    small_lda,
    text,
)
from tests.source_documents import FOLDER

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(FOLDER is None, reason="the source documents are not beside here")
HEADS = 18
CLOSE = {"rel": 1e-5, "abs": 1e-6}


def make_lda() -> MultiHeadLDA:
    return MultiHeadLDA(drawn(HEADS, seed=1), drawn(HEADS, seed=2), temperature=0.2)


def write_db(path: Path) -> None:
    """18 heads and two questions near each."""
    centroids, answers = drawn(HEADS, seed=1).numpy(), drawn(HEADS, seed=2).numpy()
    cluster_of = np.arange(2 * HEADS) % HEADS
    asked = centroids[cluster_of] + 0.5 * drawn(2 * HEADS, seed=3).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    model = LDA(
        centroids=centroids,
        answers=answers,
        maps=None,
        queries=asked,
        targets=answers[cluster_of],
        cluster_of=cluster_of,
        cluster_ids=[f"cluster {number}" for number in range(HEADS)],
        train_rows=np.arange(len(asked)),
        held_out_rows=np.zeros(0, np.int64),
        manifest={"temperature": 0.2},
    )
    save_lda_db(path, {"lda": model})


class Printed(nn.Module):
    """The class whose body document 001 prints in two pieces."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        start = defined(block("001", "python", "def __init__", "self.input_proj"), "__init__")
        start(self, *sizes)

    def forward(self, asked: Tensor) -> Tensor:
        source = block("001", "python", "def forward", "self.output_proj(x.squeeze(1))")
        answers: Tensor = defined(source, "forward")(self, asked)
        return answers


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # of the printed constructor
def test_the_layers_are_those_printed_and_say_the_same() -> None:
    torch.manual_seed(0)
    theirs, ours = Printed(16, 4, 2, 24), small(dropout=0.1)
    kinds = [(name, type(part)) for name, part in theirs.named_modules() if name]
    assert kinds == [(name, type(part)) for name, part in ours.named_modules() if name]
    ours.load_state_dict(theirs.state_dict())
    for asked in drawn(5, 16).split(1):  # one by one: printed without batch_first, rows would mix
        found, wanted = ours.eval()(asked), theirs.eval()(asked)
        assert torch.allclose(found, wanted, atol=1e-6)


def test_the_printed_training_is_ours_in_full_batch() -> None:
    source = block("001", "python", "def train_distillation", "optimizer.step()")
    theirs, ours = small(), small()
    asked = drawn(20, 16, seed=4)

    wanted = defined(source, "train_distillation")(theirs, small_lda(), asked, 5, 0.7, 1e-3)
    found = train_distillation(
        ours, small_lda(), asked, 5, 0.7, 1e-3, batch_size=None, mse_reduction="mean", augment=0
    )

    assert list(found) == list(wanted)
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, **CLOSE)
    for mine, printed in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, printed, atol=1e-7)


@pytest.mark.parametrize("number", ["001", "003"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7])
def test_the_printed_loss_is_ours(number: str, weight: float) -> None:
    [formula] = re.findall(r"^```\nL = (.*)\n```", text(number), re.MULTILINE)
    student, lda, asked = small(), small_lda(), drawn(20, 16, seed=4)
    pred, target = student(asked).detach(), lda(asked)
    names = {
        "lam": weight,
        "MSE": functional.mse_loss,
        "cosine_sim": lambda a, b: functional.cosine_similarity(a, b).mean(),
        "pred": pred,
        "target": target,
    }
    wanted = float(eval(formula.replace("λ", "lam").replace("×", "*"), names))
    history = train_distillation(
        student, lda, asked, 1, weight, batch_size=None, mse_reduction="mean", augment=0
    )
    assert history["loss"] == pytest.approx([wanted], **CLOSE)


def test_the_printed_metrics_are_ours() -> None:
    source = block("001", "python", "def evaluate_distillation")
    student, lda, asked = small(), small_lda(), drawn(20, 16, seed=4)
    wanted = defined(source, "evaluate_distillation")(student, lda, asked)
    found = evaluate_distillation(student, lda, asked)
    assert list(found)[:4] == list(wanted)
    wanted["std_cosine"] *= (19 / 20) ** 0.5  # over n - 1 there, over n here
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, **CLOSE)


def test_the_printed_benchmark_gives_our_first_keys() -> None:
    source = block("001", "python", "def benchmark_latency")
    student, lda, asked = small().eval(), small_lda(), drawn(40, 16)
    with torch.no_grad():
        wanted = defined(source, "benchmark_latency")(lda, student, asked)
    found = benchmark_latency(lda, student, asked, batches=(), seconds=0.01)
    assert set(wanted) < set(found)
    assert all(found[name] > 0 for name in wanted)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder with the documents' module names."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "source_documents")


@pytest.mark.usefixtures("importable")
def test_the_complete_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_db(tmp_path / "lda.db")
    torch.save(drawn(8, seed=5), tmp_path / "embeddings.pt")
    # It leaves out its import of torch and of the judge, and where the test data come from.
    names = {
        "torch": torch,
        "evaluate_distillation": evaluate_distillation,
        "test_data": drawn(4, seed=6),
    }
    with contextlib.chdir(tmp_path):
        exec(block("001", "python", "MultiHeadLDA.load", "print("), names)
    assert len(names["history"]["loss"]) == 200  # type: ignore[index]
    assert re.fullmatch(r"Mean cosine similarity: -?\d\.\d{4}\n", capsys.readouterr().out)


@pytest.mark.usefixtures("importable")
def test_document_003s_snippets_run_in_a_row() -> None:
    names: dict[str, Any] = {**OURS, "ProjectionTransformer": ProjectionTransformer}
    names |= {"lda": make_lda(), "train_data": drawn(6, seed=5), "data": drawn(6, seed=5)}
    exec(block("003", "python", "transformer = ProjectionTransformer(", "embed_dim=384"), names)
    before = copy.deepcopy(names["transformer"])
    exec(block("003", "python", "history = train_distillation("), names)
    assert list(names["history"]) == ["loss", "mse", "cosine"]
    assert names["history"]["cosine"][-1] < names["history"]["cosine"][0]
    assert before.config == names["transformer"].config
    exec(block("003", "python", "from projection_transformer import"), names)
    assert names["ProjectionTransformer"] is ProjectionTransformer


@pytest.mark.usefixtures("importable")
def test_the_module_of_the_documents_has_every_name() -> None:
    import multi_head_lda  # type: ignore[import-not-found]
    import projection_transformer  # type: ignore[import-not-found]

    assert multi_head_lda.MultiHeadLDA is MultiHeadLDA
    for name, ours in {**OURS, "ProjectionTransformer": ProjectionTransformer}.items():
        assert getattr(projection_transformer, name) is ours


def test_the_printed_command_line_runs(tmp_path: Path) -> None:
    [command] = blocks("001", "bash")
    assert blocks("003", "bash") == [command]
    python, script, *arguments = shlex.split(command.replace("\\\n", " "))
    assert python == "python3"
    write_db(tmp_path / arguments[arguments.index("--db") + 1])
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # noqa: TID251
    ran = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "after 200 epochs" in ran.stdout
    assert "student: 4 heads, 2 layers; H^L nearest to 18 is 4^2" in ran.stdout
    assert "For batches of 32:" in ran.stdout
