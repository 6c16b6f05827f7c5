"""Every Python block of document 004 runs as printed, and prints what the document prints."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.source_documents import document, seeds

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "examples" / "source_documents"
FOUND = document("004")
ROWS = 100
BLOCK = re.compile(r"^```(python)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
GIVEN = {
    "student_coarse": (8, 5),
    "teacher_coarse": (8, 1536),
    "student_fine": (8, 25),
    "teacher_fine": (8, 1536),
}
"""What the document's fragments take as given, with its widths."""

needs_document = pytest.mark.skipif(
    FOUND is None, reason="document 004 lies beside the checkout only"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the document's checkpoint, and its package on the path."""
    torch.manual_seed(0)
    (tmp_path / "models").mkdir()
    centres = 2 * torch.randn(5, 1536)
    vectors = torch.nn.functional.normalize(
        centres[torch.arange(ROWS) % 5] + torch.randn(ROWS, 1536)
    )
    state = torch.nn.Linear(1536, 5).state_dict()
    torch.save({"embeddings": vectors, "model_state": state}, tmp_path / "models/teacher_1536d.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SOURCES))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "atlas"]:
        del sys.modules[name]


def text() -> str:
    assert FOUND is not None
    return FOUND.read_text(encoding="utf-8")


def sections() -> list[tuple[str, list[tuple[str, str | None]]]]:
    """Return (title, blocks) of each section; a block is its code and the output printed after."""
    made = []
    for part in re.split(r"^## ", text(), flags=re.MULTILINE):
        blocks: list[tuple[str, str | None]] = []
        for language, content in BLOCK.findall(part):
            if language:
                blocks.append((content, None))
            else:
                blocks[-1] = (blocks[-1][0], content)
        made.append((part.splitlines()[0], blocks))
    return made


def namespace() -> dict[str, Any]:
    """What a reader has by then: torch, the names imported further up, and the given tensors."""
    import atlas.training

    names = {name: getattr(atlas.training, name) for name in atlas.training.__all__}
    given = {name: torch.randn(*shape) for name, shape in GIVEN.items()}
    return {"__name__": "document_004", "torch": torch, **names, **given}


def run(code: str, names: dict[str, Any]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "document 004", "exec"), names)
    return out.getvalue()


@needs_document
def test_every_block_runs_and_prints_what_is_printed(folder: Path) -> None:
    ran = compared = 0
    said: dict[str, str] = {}
    for title, blocks in sections():
        names = namespace()
        for code, wanted in blocks:
            found = run(code, names)
            ran += 1
            if wanted is not None:
                assert found == wanted
                compared += 1
            said[title] = said.get(title, "") + found
    assert (ran, compared) == (16, 1)
    shown = re.findall(r"loss(?:=|: )(\d+\.\d{4})\b", "".join(said.values()))
    numbers = [float(text) for text in shown]
    assert len(numbers) == 58, "a basic, a combined and a KL loss, 5 stages and 50 epochs"
    assert all(0 < number < 10 for number in numbers)


@needs_document
def test_its_training_example_learns(folder: Path) -> None:
    [(_, [(code, _)])] = [found for found in sections() if found[0].startswith("Full Training")]

    said = run(code, namespace())

    stages = said.split("=== Curriculum Stage ")[1:]
    assert [re.findall(r"tau=(\S+)", stage)[0] for stage in stages] == [
        *("4.00", "3.12", "2.25", "1.38", "0.50")
    ]
    losses = [float(text) for text in re.findall(r"loss=(\S+),", said)]
    assert len(losses) == 50
    assert losses[9] < losses[0], "the first stage"
    assert losses[-1] < losses[0] / 2
    assert said.endswith("\nTraining complete!\n")


@needs_document
def test_every_name_that_it_imports_is_there(folder: Path) -> None:
    import atlas.training

    imports = re.findall(r"^from atlas\.training import (?:\(([^)]*)\)|([^\n(]*))$", text(), re.M)
    names = {name.strip() for pair in imports for part in pair for name in part.split(",")} - {""}
    assert len(names) >= 9
    assert names <= set(atlas.training.__all__)


def test_the_documents_are_found_beside_any_parent_of_the_checkout(tmp_path: Path) -> None:
    checkout = tmp_path / "a" / "b" / "checkout"
    checkout.mkdir(parents=True)
    (tmp_path / "shared" / "seeds").mkdir(parents=True)
    assert seeds(checkout / "tests" / "any.py") == tmp_path / "shared" / "seeds"
    assert seeds(Path("/any.py")) in (None, Path("/shared/seeds"))


def test_a_training_script_of_ones_own_runs(folder: Path) -> None:
    """The same ways through the interface, without the document."""
    from atlas import training

    config = training.CURRICULUM_CONFIG
    found = training.load_teacher_checkpoint(
        config.teacher_checkpoint, device=config.device, teacher_dim=config.teacher_dim
    )
    teacher = found["embeddings"]
    encoder = torch.nn.Linear(config.teacher_dim, config.student_dim)
    decoder = torch.nn.Linear(config.student_dim, config.teacher_dim)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    kept = []
    for stage in range(config.curriculum_stages):
        for rows in torch.arange(ROWS).split(config.batch_size):
            vectors = encoder(teacher[rows])
            reconstruction = (decoder(vectors) - teacher[rows]).square().sum(1).mean()
            loss, tau = training.curriculum_distill_step(
                vectors,
                teacher[rows],
                stage,
                config.get_tau_for_stage,
                config.alpha,
                reconstruction,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            kept.append((tau, loss.item()))
    assert [tau for tau, _ in kept[::4]] == [4.0, 3.125, 2.25, 1.375, 0.5]
    assert kept[-1][1] < kept[0][1]


def test_levels_of_one_student_add_up(folder: Path) -> None:
    from atlas.training import distill_loss

    whole, teacher = torch.randn(16, 25, requires_grad=True), torch.randn(16, 1536)

    loss = 0.7 * distill_loss(whole[:, :5], teacher) + 0.3 * distill_loss(whole, teacher)
    loss.backward()

    assert whole.grad is not None
    assert (whole.grad.abs().sum(0) > 0).all()
