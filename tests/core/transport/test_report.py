"""The report says what happened, in a table and in words, and is the same bytes every time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.specs.transport import Gates
from core.transport.gates import Facts, check
from core.transport.report import PICTURES, table, write_report
from core.transport.report_words import sentences
from tests.core.transport.transported import Transported, transported


def write(folder: Path, made: Transported, **more: Any) -> dict[str, Path]:
    folder.mkdir()
    given: dict[str, Any] = {"facts": made.facts, "gates": made.gates, "ledger": made.ledger}
    return write_report(folder, title="A to B", settings={"seed": 0}, **{**given, **more})


def words(facts: Facts, ledger: dict[str, Any] | None = None) -> str:
    return "\n".join(sentences(facts, ledger))


def changed(scores: Any, **overall: float | None) -> dict[str, Any]:
    return {**scores, "overall": {**scores["overall"], **overall}}


def test_equal_facts_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, transported("layer")) for name in "ab")

    assert set(first) == {"report_json", "report_md", *PICTURES}
    for name, path in first.items():
        hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, second[name])]
        assert hashes[0] == hashes[1], name


def test_the_report_holds_table_gates_sites_and_languages(tmp_path: Path) -> None:
    made = transported()
    paths = write(tmp_path / "report", made)

    told = json.loads(paths["report_json"].read_text())
    rows = {(row["variant"], row["metric"]): row["value"] for row in told["table"]}
    scores = made.facts.scores
    assert rows["rotated", "cosine"] == scores["rotated"]["overall"]["cosine"]
    assert rows["base", "kl"] == scores["base"]["tokens"]["kl"]
    assert rows["rotated", "unfold_error"] == 1e-12
    assert rows["teacher", "bits_per_character"] > 0
    assert [gate["name"] for gate in told["gates"]] == [gate.name for gate in made.gates]
    text = paths["report_md"].read_text()
    for part in ("| variant | metric | value |", "## Gates", "mlp.2", "| de |", "unsaid", "A to B"):
        assert part in text
    for name in PICTURES:
        assert paths[name].name in text


def test_words_say_what_each_toggle_bought_and_that_no_knowledge_moved() -> None:
    made = transported()
    told = words(made.facts, made.ledger)

    before, after = (made.facts.scores[v]["overall"]["cosine"] for v in ("base", "rotated"))
    assert f"from {before:.4f} to {after:.4f}" in told
    assert "transfers no knowledge" in told
    assert "changes neither the residual stream nor a prediction" in told
    assert "KL and surprisal cannot change" in told
    assert "Within the shared subspace" in told
    assert "gained most in" in told
    assert "too few to tell" in told
    assert "Householder refinement of global" in told
    assert "hurt no layer's attention maps" in told
    assert "hurt no layer's SwiGLU neurons" in told


def test_words_tell_failures() -> None:
    facts = transported().facts
    rotated = facts.scores["rotated"]
    weak = changed(rotated, cosine=0.2, seen=0.3, mean_only=0.4)
    weak["sites"] = {**weak["sites"], "mlp.1": {**weak["sites"]["mlp.1"], "cosine": -1.0}}
    weak["unavailable"] = {"kl": "the tokenizers differ"}
    hurt = [{**of, "heads": {**of["heads"], "after": 0.1}} for of in facts.permutations]
    skipped = {"layer": 3, "heads": {"skipped": "no order"}, "neurons": {"skipped": "no order"}}
    fold = replace(facts.folds["rotated"], fold="conjugate", exact=False, logits_relative=0.5)
    told = words(
        replace(
            facts,
            scores={**facts.scores, "rotated": weak},
            permutations=[*hurt, skipped],
            folds={"rotated": fold},
        )
    )

    assert "no more than a null gives" in told
    assert "teacher's own coordinates it is 0.3000" in told
    assert "0.75 that document 002 hopes for is not reached" in told
    assert "lowered the cosine at mlp.1" in told
    assert "Matching hurt layer 0, layer 1, layer 2" in told
    assert "were not matched: no order" in told
    assert "does not compute what the student computed" in told
    assert "Not to be had: `kl`: the tokenizers differ." in told


def test_reflections_are_told_by_what_they_gained() -> None:
    made = transported()
    ledger = json.loads(json.dumps(made.ledger))
    for entry in [*ledger["layers"], ledger["final"]]:
        entry["diagnostics"]["refine"] |= {"skipped": None, "reflections": 2, "measured": 1.5}

    assert "refinement of global: 2 reflections, which gained 1.5" in words(made.facts, ledger)


def test_stages_that_did_not_run_leave_their_parts_out(tmp_path: Path) -> None:
    facts = Facts()
    made = Transported(transported().rotations, {}, facts, check(Gates(), facts))
    paths = write(tmp_path / "none", made, ledger=None)

    assert set(paths) == {"report_json", "report_md"}
    assert "Nothing was compared" in paths["report_md"].read_text()
    assert table(facts) == []


@pytest.mark.parametrize("missing", ["cosine", "seen", "mean_only", "subspace", "shuffled"])
def test_a_number_that_is_not_to_be_had_breaks_nothing(missing: str, tmp_path: Path) -> None:
    made = transported()
    scores = {}
    for variant, told in made.facts.scores.items():
        sites = {site: {**of, missing: None} for site, of in told["sites"].items()}
        scores[variant] = {**changed(told, **{missing: None}), "sites": sites}
    facts = replace(made.facts, scores=scores)
    paths = write(tmp_path / "less", replace(made, facts=facts, gates=check(Gates(), facts)))

    assert json.loads(paths["report_json"].read_text())["table"]
