"""Terms of the loss that other packages bring: a distribution installed in a folder of its own."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from core.distill.losses._base import Loss, losses
from core.distill.training import run_epochs
from core.errors import SpecInvalid
from core.registry import LOSS_PLUGINS, installed, names
from core.specs.training import Training
from tests.core.distill._codes import code_data, code_state
from tests.core.distill._make import make_training
from tests.core.distill.test_training import quiet

MODULE = "plugged_losses"
TAU = """
from core.distill.losses._base import Loss
LOSS = Loss(compute=lambda batch: 0.0 * batch.student.sum() + batch.tau)
OTHER = "no loss"
VECTOR = Loss(compute=lambda batch: batch.student.square().mean(1))
NUMBER = Loss(compute=lambda batch: 0.5)
"""
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "hierarchical.md"
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a package whose entry points are told as name = attribute."""

    def put(source: str = TAU, **points: str) -> None:
        folder = tmp_path / "site"
        info = folder / "plugged-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
        lines = [f"{name} = {MODULE}:{value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{LOSS_PLUGINS}]", *lines, ""]))
        (folder / f"{MODULE}.py").write_text(source)
        monkeypatch.syspath_prepend(folder)

    installed.cache_clear()
    yield put
    installed.cache_clear()
    sys.modules.pop(MODULE, None)


def train(
    custom: dict[str, float], own: dict[str, float] | None = None, **told: object
) -> list[dict[str, float]]:
    training: Training = make_training(losses={"custom": custom, **(own or {})}, **told)
    state = code_state(training)
    run_epochs(state, code_data(training), 0, training.epochs, quiet)
    return state.history


def test_an_installed_term_is_found_without_being_imported(install: Install) -> None:
    assert "mine" not in names("core.distill.losses", LOSS_PLUGINS)
    install(mine="LOSS")
    assert "mine" in names("core.distill.losses", LOSS_PLUGINS)
    assert MODULE not in sys.modules
    assert list(installed(LOSS_PLUGINS, Loss)) == ["mine"]
    assert set(losses()) == set(names("core.distill.losses", LOSS_PLUGINS))


def test_a_term_of_ones_own_sees_the_temperature_of_every_stage(install: Install) -> None:
    install(mine="LOSS")

    rows = train({"mine": 1.0}, epochs=4, curriculum={"stages": 2}, accumulate=2)

    assert [row["mine"] for row in rows] == [4.0, 4.0, 0.5, 0.5]
    assert [row["mine"] for row in train({"mine": 1.0}, epochs=1, tau=2.5)] == [2.5]
    assert "mine" not in train({"mine": 0.0}, epochs=1)[0]


def test_an_unknown_name_says_which_there_are(install: Install) -> None:
    install(mine="LOSS")
    with pytest.raises(SpecInvalid, match=r"custom\.yours: no such term .* mine, mse") as caught:
        train({"yours": 1.0})
    assert caught.value.pointer == "/training/losses/custom/yours"


def test_what_is_no_loss_is_named(install: Install) -> None:
    install(mine="OTHER")
    with pytest.raises(TypeError, match=f"entry point mine = {MODULE}:OTHER must be a Loss"):
        train({"mine": 1.0})


@pytest.mark.parametrize(
    ("attribute", "told"), [("VECTOR", r"torch.float32 of shape \[32\]"), ("NUMBER", "gave float")]
)
def test_a_term_that_gives_no_scalar_is_named(install: Install, attribute: str, told: str) -> None:
    install(mine=attribute)
    with pytest.raises(SpecInvalid, match=f"custom.mine: .*{told}") as caught:
        train({"mine": 1.0})
    assert caught.value.pointer == "/training/losses/custom/mine"


def test_the_guides_term_trains_a_student(install: Install) -> None:
    text = DOCUMENT.read_text()
    source = next(b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "LOSS =" in b)
    [entry] = re.findall(r'"stillroom\.losses"\]\n(\w+) = "my_losses:LOSS"', text)
    install(source, **{entry: "LOSS"})

    rows = train({entry: 0.5}, {"neighbour_kl": 0, "reconstruction": 0}, epochs=8, tau=2.0)

    assert rows[-1][entry] < 0.8 * rows[0][entry]
    assert rows[0]["loss"] == pytest.approx(0.5 * rows[0][entry])
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in rows)
