"""States that are kept: the moments made of them, and shards that were damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench._tiny_models import tiny_model
from core.errors import DataInvalid
from core.specs.transport import Capture
from core.transport.moments import Captured
from core.transport.pairs import Pair
from core.transport.sites import sites
from core.transport.states import StateWriter, describe, lay_out_states, read_states
from core.transport.streams import shape_of
from tests.core.transport.readings import BYTES, MERGES, captured, paired

OPTIONS = Capture(batch_tokens=64, drop_massive=1.5, token_weights="text")


def kept(
    folder: Path, dtype: Any = "float32", *, pairs: Sequence[Pair] = ()
) -> tuple[Path, Path, Captured]:
    """Capture with the states kept: the shard, the JSON beside it, the moments."""
    student, teacher = tiny_model(), tiny_model("qwen3", seed=1, hidden_size=48)
    pairs = pairs or paired(OPTIONS, student=BYTES, teacher=MERGES)
    layout = lay_out_states(
        pairs,
        [f"text-{number}" for number in range(len(pairs))],
        sites=sites(shape_of(student)),
        widths=(32, 48),
        batch_tokens=OPTIONS.batch_tokens,
        dtype=dtype,
    )
    path, beside = folder / "states.safetensors", folder / "states.json"
    writer = StateWriter(path, layout)
    found = captured(student, teacher, pairs, OPTIONS, keep=writer)
    writer.close()
    beside.write_text(json.dumps(describe(path, layout, facts={"run_id": "0" * 16})))
    return path, beside, found


def test_moments_of_kept_states_are_those_of_the_capture(tmp_path: Path) -> None:
    path, beside, direct = kept(tmp_path)

    found = read_states(path, beside).moments()

    assert list(found.sites) == list(direct.sites)
    for site, moments in found.sites.items():
        for what, sums in moments.tensors().items():
            assert torch.equal(sums, direct.sites[site].tensors()[what]), (site, what)


def test_bfloat16_halves_the_rows_and_rounds_them(tmp_path: Path) -> None:
    path, beside, direct = kept(tmp_path, "bfloat16")

    states = read_states(path, beside)
    found = states.moments()

    for site, moments in found.sites.items():
        exact = direct.sites[site]
        assert torch.equal(moments.n, exact.n)
        torch.testing.assert_close(moments.xy, exact.xy, rtol=0, atol=0.01 * float(exact.n))
    assert states.layout.size_bytes == 7 * states.layout.rows * ((32 + 48) * 2 + 4)


def test_the_json_beside_a_shard_says_which_rows_are_whose(tmp_path: Path) -> None:
    path, beside, direct = kept(tmp_path)

    told = json.loads(beside.read_text())

    assert {text["id"] for text in told["prompts"]} == {f"text-{number}" for number in range(4)}
    assert sum(text["tokens"] for text in told["prompts"]) == told["tokens"] == sum(told["batches"])
    assert (told["layers"], told["size_bytes"]) == ([0, 2], path.stat().st_size)
    weight = [weight for _, _, weight in read_states(path, beside).batches("final")]
    torch.testing.assert_close(torch.cat(weight).sum().double(), direct.sites["final"].n)
    first = told["prompts"][1]
    rows = torch.cat(weight)[first["start"] : first["start"] + first["tokens"]]
    torch.testing.assert_close(float(rows.sum()), 1.0)


def test_a_flipped_bit_is_refused_before_a_row_is_read(tmp_path: Path) -> None:
    path, beside, _ = kept(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[-5] ^= 1
    path.write_bytes(whole)

    with pytest.raises(DataInvalid, match="the shard is corrupt"):
        read_states(path, beside)


def _other(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda told: told.__setitem__(key, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other("format", "moments"), "needed format 'states'"),
        (_other("tokens", 7), "tokens of texts"),
        (_other("batches", []), "tokens of texts"),
        (_other("dtype", "int8"), "allowed: float32, bfloat16"),
        (_other("dtype", "bfloat16"), "the JSON says"),
        (_other("widths", [32]), "not a readable JSON"),
        (_other("widths", [32, 47]), "the JSON says"),
        (_other("sites", ["final"]), "not those of the JSON's sites"),
        (_other("prompts", [{"id": "a"}]), "not a readable JSON"),
        (lambda told: told.pop("sha256"), "not a readable JSON"),
    ],
)
def test_a_json_that_does_not_fit_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    path, beside, _ = kept(tmp_path)
    told = json.loads(beside.read_text())
    damage(told)
    beside.write_text(json.dumps(told))

    with pytest.raises(DataInvalid, match=message):
        read_states(path, beside)


def test_text_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path, beside, _ = kept(tmp_path)
    beside.write_text("[" * 5)

    with pytest.raises(DataInvalid, match="not a readable JSON"):
        read_states(path, beside)


def test_rows_that_were_never_written_are_noticed(tmp_path: Path) -> None:
    layout = lay_out_states(paired(), list("abcd"), sites=["final"], widths=(2, 3), batch_tokens=64)
    writer = StateWriter(tmp_path / "states.safetensors", layout)

    with pytest.raises(ValueError, match=r"lacking of final\.student"):
        writer.close()
