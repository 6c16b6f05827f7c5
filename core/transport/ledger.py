"""What a transport ran on, frozen: every text, its split and its tokens, both models, the layers.

Document 002, sections 16.1 and 16.3. A JSON object; its ``run_id`` is a hash of all the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from core.errors import DataInvalid, SpecInvalid
from core.specs.transport import Capture
from core.tensors.language_models import LanguageModel
from core.tensors.prompts import Prompts
from core.transport import layer_maps
from core.transport.held_out import HeldOut, draw
from core.transport.pairs import Pair, pair
from core.transport.tokens import check_vocabularies, encode

FORMAT = ("ledger", 1)
BOUND = (
    *("system_prompt", "max_tokens", "alignment", "layer_map", "token_weights"),
    *("drop_bos", "drop_massive", "dtype"),
)
"""Options of the capture that another run must share; the others say how it is cut into work."""
Report = Callable[[float, float], None]


@dataclass(frozen=True)
class Side:
    """One of the two models, and what cuts text for it."""

    model: LanguageModel
    sha256: str
    """Of the model's artifact."""
    tokenizer: PreTrainedTokenizerBase

    def facts(self) -> dict[str, Any]:
        """Return what the ledger says of it."""
        return {
            "sha256": self.sha256,
            "source": self.model.source,
            "family": self.model.shape.family,
            "layers": self.model.shape.layers,
            "width": self.model.shape.width,
            "tokenizer": self.model.tokenizer,
            "tokens": self.model.tokens,
        }


def build(
    prompts: Prompts,
    prompts_sha256: str,
    *,
    student: Side,
    teacher: Side,
    capture: Capture,
    held_out: HeldOut,
    layer_map: Sequence[int] | None = None,
    report: Report = lambda done, total: None,
) -> dict[str, Any]:
    """Freeze a run: tokenise every text with both tokenizers, fix the split and the layers.

    Args:
        prompts: whose order is kept: an entry's place is the text's row.
        prompts_sha256: of their artifact.
        student: the model that is turned.
        teacher: the model whose basis is taken.
        capture: what is paired and how; of ``layer_map`` 'cka' the outcome is ``layer_map``.
        held_out: how texts without a split are drawn.
        layer_map: [L_s], of 'cka' alone: what ``cka.cka`` found.
        report: told texts done and all.

    Raises:
        DataInvalid: a vocabulary does not fit, a text has no token left, no split can be made, or
            one of its sides has no pair of tokens.
        SpecInvalid: a text is longer than a model's positions, or the layers do not fit.
    """
    vocabularies = check_vocabularies(student.model, teacher.model)
    depths = student.model.shape.layers, teacher.model.shape.layers
    layers = layer_maps.without_states(capture.layer_map, *depths)
    if layers is None:
        if layer_map is None:
            raise ValueError("layer_map 'cka': needed what cka.cka found")
        layers = layer_maps.explicit(layer_map, *depths)
    splits = draw(prompts, held_out)
    entries = []
    for row, split in enumerate(splits):
        entries.append(_entry(prompts, row, split, read(prompts, row, student, teacher, capture)))
        report(row + 1, len(splits))
    _check_pairs(entries)
    told = {
        "format": FORMAT[0],
        "version": FORMAT[1],
        "seed": held_out.seed,
        "test_fraction": held_out.test_fraction,
        "capture": capture.model_dump(mode="json"),
        "system_prompt_sha256": _sha256(capture.system_prompt),
        "layer_map": list(layers),
        "student": student.facts(),
        "teacher": teacher.facts(),
        "vocabularies": vocabularies.meta(),
        "software": {name: version(name) for name in ("tokenizers", "transformers")},
        "prompts_sha256": prompts_sha256,
        "prompts": entries,
        "totals": _totals(entries),
    }
    return {"run_id": run_id(told), **told}


def read(prompts: Prompts, row: int, student: Side, teacher: Side, capture: Capture) -> Pair:
    """Return one text as both models read it, and which of their tokens stand together.

    Raises:
        DataInvalid: no token of the text is left, or one is of no row of the embedding.
        SpecInvalid: it has more tokens than a model has positions.
    """
    both = []
    for who, side in (("student", student), ("teacher", teacher)):
        of = f"prompt {prompts.ids[row]!r}, {who}"
        try:
            found = encode(
                side.tokenizer,
                prompts.texts[row],
                system_prompt=capture.system_prompt,
                max_tokens=capture.max_tokens,
            )
        except DataInvalid as error:
            raise DataInvalid(f"{of}: {error.message}") from error
        shape = side.model.shape
        if len(found.ids) > shape.positions:
            raise SpecInvalid(
                f"max_tokens {capture.max_tokens}: {of}: {len(found.ids)} tokens, and the model "
                f"has {shape.positions} positions; allowed: at most so many",
                pointer="/capture/max_tokens",
            )
        if (highest := int(found.ids.max())) >= shape.vocabulary:
            raise DataInvalid(
                f"{of}: its tokenizer gives id {highest}, and the embedding has "
                f"{shape.vocabulary} rows; the tokenizer is of another model"
            )
        both.append(found)
    return pair(both[0], both[1], capture)


def _entry(prompts: Prompts, row: int, split: str, texts: Pair) -> dict[str, Any]:
    return {
        "id": prompts.ids[row],
        "sha256": _sha256(prompts.texts[row]),
        "language": prompts.languages[row],
        "licence": prompts.licences[row],
        "split": split,
        "student_tokens": len(texts.student.ids),
        "teacher_tokens": len(texts.teacher.ids),
        "pairs": len(texts.alignment),
        "cut": bool(
            min(texts.student.ends[-1], texts.teacher.ends[-1]) < len(prompts.texts[row].rstrip())
        ),
    }


def _check_pairs(entries: Sequence[Mapping[str, Any]]) -> None:
    for split in ("train", "test"):
        if not any(entry["pairs"] for entry in entries if entry["split"] == split):
            raise DataInvalid(
                f"no text of split {split!r} has a token with a partner; send longer texts"
            )


def _totals(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count texts and tokens of each split."""
    return {
        split: {
            "prompts": len(of),
            **{
                name: sum(entry[name] for entry in of)
                for name in ("student_tokens", "teacher_tokens", "pairs", "cut")
            },
        }
        for split in ("train", "test")
        for of in ([entry for entry in entries if entry["split"] == split],)
    }


def run_id(ledger: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits: of the SHA-256 of all that a ledger says beside them."""
    rest = {name: value for name, value in ledger.items() if name != "run_id"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return _sha256(text)[:16]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load_ledger(path: Path) -> dict[str, Any]:
    """Read a ledger's JSON.

    Raises:
        DataInvalid: no ledger, or not as it was frozen.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        told = (found["format"], found["version"])
        same = told == FORMAT and found["run_id"] == run_id(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataInvalid(f"not a readable ledger: {error}") from error
    if not same:
        raise DataInvalid(
            f"ledger: format {told[0]!r}, version {told[1]!r}, run_id {found['run_id']!r}; needed "
            f"{FORMAT[0]!r}, version {FORMAT[1]}, and the run_id of what it says: it was changed"
        )
    return dict(found)


def training_rows(ledger: Mapping[str, Any]) -> list[int]:
    """Return rows of the prompts that are fitted on, rising."""
    return _rows(ledger, "train")


def held_out_rows(ledger: Mapping[str, Any]) -> list[int]:
    """Return rows of the prompts that are never fitted on, rising."""
    return _rows(ledger, "test")


def _rows(ledger: Mapping[str, Any], split: str) -> list[int]:
    return [row for row, entry in enumerate(ledger["prompts"]) if entry["split"] == split]


def check(
    ledger: Mapping[str, Any],
    prompts: Prompts,
    *,
    student_sha256: str,
    teacher_sha256: str,
    capture: Capture | None = None,
) -> None:
    """Compare what is at hand with what was frozen.

    Args:
        ledger: of ``build`` or ``load_ledger``.
        prompts: all of them.
        student_sha256: of the student's artifact.
        teacher_sha256: of the teacher's.
        capture: options of a stage that reads the texts again; None: none does.

    Raises:
        DataInvalid: a model, a text or an option is another; it is named.
    """
    for who, sha256 in (("student", student_sha256), ("teacher", teacher_sha256)):
        if (frozen := ledger[who]["sha256"]) != sha256:
            raise DataInvalid(
                f"{who}: {sha256[:12]}… is not {frozen[:12]}…, which run {ledger['run_id']} froze"
            )
    entries = ledger["prompts"]
    if len(entries) != len(prompts.texts):
        raise DataInvalid(
            f"prompts: {len(prompts.texts)}; run {ledger['run_id']} froze {len(entries)}"
        )
    for entry, name, text in zip(entries, prompts.ids, prompts.texts, strict=True):
        if (entry["id"], entry["sha256"]) != (name, _sha256(text)):
            raise DataInvalid(
                f"prompt {name!r}: not the text that run {ledger['run_id']} froze as "
                f"{entry['id']!r}, {entry['sha256'][:12]}…"
            )
    if capture is not None:
        _check_capture(ledger, capture)


def _check_capture(ledger: Mapping[str, Any], capture: Capture) -> None:
    asked = capture.model_dump(mode="json")
    for name in BOUND:
        if asked[name] != ledger["capture"][name]:
            raise DataInvalid(
                f"capture.{name}: {str(asked[name])[:60]!r}; run {ledger['run_id']} froze "
                f"{str(ledger['capture'][name])[:60]!r}"
            )
