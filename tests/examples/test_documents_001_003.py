"""Documents 001 and 003: each name, default, table and snippet they print exists here and runs."""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
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
from core.specs.architectures import covering_architecture, optimal_architecture
from core.tensors.lda import LDA
from core.tensors.lda_db import save_lda_db
from scripts.test_transformer_distillation import main
from tests.source_documents import FOLDER, document

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(FOLDER is None, reason="the source documents are not beside here")
WIDTH, HEADS = 384, 18
OURS: dict[str, Callable[..., Any]] = {
    "optimal_architecture": optimal_architecture,
    "train_distillation": train_distillation,
    "evaluate_distillation": evaluate_distillation,
    "benchmark_latency": benchmark_latency,
}
CLOSE = {"rel": 1e-5, "abs": 1e-6}


def text(number: str) -> str:
    path = document(number)
    assert path is not None
    return path.read_text()


def blocks(number: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", text(number), re.MULTILINE | re.DOTALL)
    return [block.strip() for block in found]


def block(number: str, language: str, *words: str) -> str:
    """The one block that holds all these words."""
    [found] = [each for each in blocks(number, language) if all(w in each for w in words)]
    return found


def table(number: str, heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, without code marks."""
    after = text(number).split(heading, 1)[1]
    lines = re.search(r"^\|.*\n\|[-| ]+\n((?:\|.*\n)+)", after, re.MULTILINE)
    assert lines is not None
    return [
        [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        for line in lines[1].splitlines()
    ]


def namespace(**more: Any) -> dict[str, Any]:
    """What the documents take as imported, by their own names."""
    import typing

    names = {name: getattr(typing, name) for name in ("Dict", "List", "Tuple")}
    return {"torch": torch, "nn": nn, "F": functional, "MultiHeadLDA": MultiHeadLDA,
            "ProjectionTransformer": ProjectionTransformer, **names, **more}  # fmt: skip


def defined(source: str, name: str, **more: Any) -> Any:
    names = namespace(**more)
    exec(compile(source, f"<{name}>", "exec"), names)
    return names[name]


def drawn(rows: int, width: int = WIDTH, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, width, generator=generator), dim=1)


def make_lda() -> MultiHeadLDA:
    return MultiHeadLDA(drawn(HEADS, seed=1), drawn(HEADS, seed=2), temperature=0.2)


def small(**changes: Any) -> ProjectionTransformer:
    torch.manual_seed(0)
    return ProjectionTransformer(**{"embed_dim": 16, "num_heads": 4, "num_layers": 2, "ff_dim": 24}
                                 | changes)  # fmt: skip


def small_lda() -> MultiHeadLDA:
    return MultiHeadLDA(drawn(6, 16, seed=1), drawn(6, 16, seed=2), temperature=0.2)


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


def same_parameters(theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Same names, order and defaults; whatever else ours takes has a default of its own."""
    printed = list(inspect.signature(theirs).parameters.values())
    has = list(inspect.signature(ours).parameters.values())
    for one, other in zip(printed, has, strict=False):
        assert (one.name, one.default) == (other.name, other.default)
        assert other.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert len(has) >= len(printed)
    for more in has[len(printed) :]:
        assert more.kind is inspect.Parameter.KEYWORD_ONLY
        assert more.default is not inspect.Parameter.empty


def test_every_block_is_one_that_is_tested_here() -> None:
    counts = [
        (number, language, len(blocks(number, language)))
        for number in ("001", "003")
        for language in ("python", "bash")
    ]
    assert counts == [
        ("001", "python", 11),
        ("001", "bash", 1),
        ("003", "python", 4),
        ("003", "bash", 1),
    ]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        ("001", ("def optimal_architecture", "n_flat_heads: int")),
        ("001", ("def train_distillation", "lda_projection: MultiHeadLDA")),
    ],
)
def test_bare_signatures_are_ours(number: str, words: tuple[str, ...]) -> None:
    source = block(number, "python", *words) + ":\n    ..."
    name = source.split("def ", 1)[1].split("(")[0]
    theirs = defined(source, name)
    same_parameters(theirs, OURS[name])


@pytest.mark.parametrize("name", ["optimal_architecture", "train_distillation",
                                  "evaluate_distillation", "benchmark_latency"])  # fmt: skip
def test_printed_functions_take_what_ours_take(name: str) -> None:
    bodies = [each for each in blocks("001", "python") if f"def {name}" in each and "\n" in each]
    for source in bodies:
        if "->" not in source:
            same_parameters(defined(source, name), OURS[name])


def test_document_003s_outline_of_the_rule_takes_what_ours_takes() -> None:
    outline = block("003", "python", "def optimal_architecture", "...")
    same_parameters(defined(outline, "optimal_architecture"), optimal_architecture)


def test_the_class_takes_what_ours_takes() -> None:
    source = (
        block("001", "python", "class ProjectionTransformer", "def __init__") + ":\n        ..."
    )
    same_parameters(defined(source, "ProjectionTransformer"), ProjectionTransformer)


@pytest.mark.parametrize("prefer_h", [2, 3, 4, 5, 7, 10])
def test_the_printed_rule_says_what_ours_says(prefer_h: int) -> None:
    theirs = defined(block("001", "python", "l_exact", "equiv_floor"), "optimal_architecture")
    for n in [*range(1, 1100), 5**7 - 1, 5**7, 5**7 + 1, 10**12, 3**20]:
        assert theirs(n, prefer_h) == optimal_architecture(n, prefer_h), n


def test_the_printed_examples_hold() -> None:
    lines = block("001", "python", "optimal_architecture(18)", "(64)").splitlines()
    listed = re.findall(r"- `(optimal_architecture\(\d+\))` (→.*)", text("003"))
    lines += [f"{call} # {said}" for call, said in listed]
    assert len(lines) == 5
    for line in lines:
        call, said = line.split("#")
        heads, layers, power = map(int, re.findall(r"\d+", said)[:3])
        found = eval(call, {"optimal_architecture": optimal_architecture})
        assert found == (heads, layers)
        assert heads**layers == power


@pytest.mark.parametrize(
    ("number", "heading"), [("001", "## Overview: H^L = N"), ("003", "Q1: What is the H^L = N")]
)
def test_the_table_of_powers_holds(number: str, heading: str) -> None:
    rows = table(number, heading)
    assert len(rows) == 3
    for row in rows:
        heads, layers = (int(each) for each in re.findall(r"\d+", " ".join(row[:-1])))
        power = int(row[-1].rsplit("=", 1)[1])
        assert heads**layers == power
        assert optimal_architecture(power) == covering_architecture(power) == (heads, layers)


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


@pytest.mark.parametrize("number", ["001", "003"])
def test_expected_metrics_have_a_key(number: str) -> None:
    keys = evaluate_distillation(small(), small_lda(), drawn(4, 16))
    heading = "### Expected Results" if number == "001" else "Q8: What validation metrics"
    named = {
        "Mean Cosine Similarity": "mean_cosine",
        "Min Cosine Similarity": "min_cosine",
        "Standard Deviation": "std_cosine",
    }
    assert {named[row[0]] for row in table(number, heading)} <= set(keys)


def test_the_printed_benchmark_gives_our_first_keys() -> None:
    source = block("001", "python", "def benchmark_latency")
    student, lda, asked = small().eval(), small_lda(), drawn(40, 16)
    with torch.no_grad():
        wanted = defined(source, "benchmark_latency")(lda, student, asked)
    found = benchmark_latency(lda, student, asked, batches=(), seconds=0.01)
    assert set(wanted) < set(found)
    assert all(found[name] > 0 for name in wanted)


@pytest.mark.parametrize(
    ("heading", "ours"),
    [
        ("Selects H and L given target N flat heads.", optimal_architecture),
        ("Trains transformer to match LDA outputs.", train_distillation),
        ("### Constructor", ProjectionTransformer),
    ],
)
def test_tables_of_parameters_are_ours(heading: str, ours: Callable[..., Any]) -> None:
    taken = inspect.signature(ours).parameters
    rows = table("001", heading)
    assert [row[0] for row in rows] == list(taken)[: len(rows)]
    for name, kind, *rest in rows:
        if kind in ("int", "float"):
            assert taken[name].annotation == kind
        if len(rest) == 2:
            default = taken[name].default
            required = default is inspect.Parameter.empty
            assert "required" if required else float(rest[0]) == pytest.approx(default)
            assert required == (rest[0] == "required")


def test_hyperparameters_are_the_defaults() -> None:
    taken = inspect.signature(train_distillation).parameters
    flags = {option.name: option.default for option in main.params}
    for name, default, _ in table("003", "Q12: What are the key hyperparameters"):
        has = taken[name].default if name in taken else flags[name]
        assert has == pytest.approx(float(default)), name


def test_arguments_of_the_script_are_those_printed() -> None:
    options = {option.opts[0]: option for option in main.params}
    for flag, default, _ in table("001", "### Arguments"):
        if default == "required":
            assert options[flag].required
        else:
            assert options[flag].default == ast.literal_eval(default)


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
