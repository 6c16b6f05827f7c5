"""Documents 001 and 003: each name, default and table they print exists here and holds."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

from core.distill.projection import evaluate_distillation, train_distillation
from core.distill.students.projection_transformer import ProjectionTransformer
from core.specs.architectures import covering_architecture, optimal_architecture
from scripts.test_transformer_distillation import main
from tests.examples.documents import (
    OURS,
    block,
    blocks,
    defined,
    drawn,
    small,
    small_lda,
    table,
    text,
)
from tests.source_documents import FOLDER

pytestmark = pytest.mark.skipif(FOLDER is None, reason="the source documents are not beside here")


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
