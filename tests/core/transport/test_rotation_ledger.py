"""The ledger says per layer what document 002 asks for, as one file or a folder, and is checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import DataInvalid
from core.transport import sanity
from core.transport.rotation_ledger import build, entries, read, write_folder, write_ledger
from core.transport.sanity import inspect
from core.transport.sites import Tie
from tests.core.transport.transported import transported


@pytest.mark.parametrize("tie", ["global", "stage", "layer"])
def test_every_layer_says_what_was_done_and_what_came_of_it(tie: Tie) -> None:
    made = transported(tie)
    scores = made.facts.scores

    for layer, entry in enumerate(made.ledger["layers"]):
        one = made.rotations.maps[entry["group"]]
        assert entry["layer"] == entry["teacher_layer"] == layer
        assert entry["stage"] == layer // 2
        assert entry["k"] == 24
        assert entry["singular_values"] == one.singular_values.tolist()
        assert entry["rotation"]["errors"]["core"] < 1e-12
        assert sorted(entry["permutation"]["neurons"]) == list(range(48))
        assert entry["likeness"]["layer"] == layer
        cosine = entry["points"]["mlp"]["cosine"]
        assert cosine["base"] == scores["base"]["sites"][f"mlp.{layer}"]["cosine"]
        assert cosine["rotated"] == scores["rotated"]["sites"][f"mlp.{layer}"]["cosine"]
        assert cosine["shuffled"] == scores["rotated"]["sites"][f"mlp.{layer}"]["shuffled"]
        assert entry["points"]["attention"]["rms"]["difference_rms"].keys() == scores.keys()
    final = made.ledger["final"]
    assert final["layer"] is None
    assert final["points"].keys() == {"final"}
    assert final["group"] == {"global": "global", "stage": "stage.1", "layer": "final"}[tie]


def test_file_and_folder_hold_the_same_and_equal_ledgers_equal_bytes(tmp_path: Path) -> None:
    ledger = transported("layer").ledger
    write_ledger(tmp_path / "ledger.json", ledger)
    run = write_folder(ledger, tmp_path / "a")
    again = write_folder(ledger, tmp_path / "b")

    assert run == tmp_path / "a/rotations/0123456789abcdef"
    assert (run / "layer_2.json").is_file()
    for path in (tmp_path / "ledger.json", run, tmp_path / "a"):
        assert read(path) == ledger
    for file in run.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_a_ledger_needs_every_group_and_its_own_layers() -> None:
    made = transported("layer")
    lacking = {group: one for group, one in made.rotations.maps.items() if group != "layer.1"}
    given: dict[str, Any] = {
        "run_id": "a",
        "layer_map": range(3),
        "permutations": {},
        "likeness": (),
        "scores": {},
        "seed": 0,
    }
    with pytest.raises(DataInvalid, match=r"layer\.1 is missing"):
        build(replace(made.rotations, maps=lacking), **given)
    with pytest.raises(DataInvalid, match="2 entries"):
        build(made.rotations, **{**given, "layer_map": (0, 1)})
    bare = build(made.rotations, **given)
    assert bare["layers"][0]["permutation"] == {"heads": None, "kv_heads": None, "neurons": None}


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda told: told.update(format="permutations"), "format"),
        (lambda told: told.update(run_id="../up"), "run_id"),
        (lambda told: told.update(layers=[]), "layers"),
        (lambda told: told["layers"].pop(0), "not of layer 0"),
        (lambda told: told["layers"][1].update(k="8"), "layer_1: k '8'"),
        (lambda told: told["layers"][1].pop("points"), "layer_1: points"),
        (lambda told: told["final"]["rotation"].update(errors={}), "final: rotation.errors"),
        (lambda told: told["final"]["rotation"].update(orthogonal=1), "final: rotation.orthogonal"),
        (lambda told: told["final"]["singular_values"].append("x"), "needed a number"),
        (lambda told: told["final"]["points"].update(final=[]), "points.'final'"),
        (lambda told: told["final"]["rotation"].pop("round_trip"), "final: rotation.round_trip"),
    ],
)
def test_a_broken_ledger_is_refused_in_words(change: Change, words: str, tmp_path: Path) -> None:
    told = json.loads(json.dumps(transported().ledger))
    change(told)
    (tmp_path / "ledger.json").write_text(json.dumps(told))

    with pytest.raises(DataInvalid, match=words):
        read(tmp_path / "ledger.json")


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_what_is_no_ledger_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(DataInvalid, match="not a readable rotation ledger"):
        read(tmp_path / "ledger.json")


def test_a_folder_is_read_within_itself(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="0 runs"):
        read(tmp_path)
    run = write_folder(transported().ledger, tmp_path)
    index = json.loads((run / "index.json").read_text())
    for files, words in (
        (["../secret"], "within the folder"),
        ([], "files"),
        (["x.json"], "x.json"),
    ):
        (run / "index.json").write_text(json.dumps({**index, "files": files}))
        with pytest.raises(DataInvalid, match=words):
            read(run)


def test_errors_are_computed_anew_from_the_rotations() -> None:
    made = transported("layer")
    told = json.loads(json.dumps(made.ledger))
    for entry in entries(told):
        entry["rotation"]["errors"]["rows"] = 0.5  # what the ledger says counts for nothing

    believed, measured = inspect(told), inspect(told, made.rotations)

    assert all("0.5 is above" in row.problems[0] for row in believed)
    assert not sanity.problems(measured)
    assert all(row.recomputed and row.error < 1e-12 for row in measured)
    assert [row.name for row in measured] == ["layer_0", "layer_1", "layer_2", "final"]
    assert all(row.after > row.before for row in measured)


def test_a_broken_rotation_and_another_runs_are_told() -> None:
    made = transported("layer")
    one = made.rotations.maps["layer.1"]
    broken = {**made.rotations.maps, "layer.1": replace(one, full=one.full * 1.001)}  # type: ignore[type-var]
    rows = inspect(made.ledger, replace(made.rotations, maps=broken))
    assert [bool(row.problems) for row in rows] == [False, True, False, False]

    turned = {**made.rotations.maps, "final": replace(one, singular_values=torch.ones(24).double())}  # type: ignore[type-var]
    rows = inspect(made.ledger, replace(made.rotations, maps=turned))
    assert sanity.problems(rows) == ["final: the singular values are not those of the rotations"]

    with pytest.raises(DataInvalid, match="not of one run"):
        inspect(made.ledger, transported("stage").rotations)
    with pytest.raises(DataInvalid, match="final is missing"):
        inspect(
            made.ledger,
            replace(made.rotations, maps={"layer.0": one, "layer.1": one, "layer.2": one}),
        )
