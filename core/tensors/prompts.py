"""The artifact ``prompts``: short texts with language, licence and split, as one .safetensors."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.manifests import shown

FORMAT = ("prompts", 1)
MOST = 1_000_000
"""Prompts of one artifact."""
LONGEST = 1_000_000
"""Characters of one text."""
LABEL_LENGTH = 200
"""Characters of an id or a licence."""
LANGUAGES = 1000
"""Different ones of one artifact."""
SPLITS = ("train", "test", "")
COLUMNS = ("ids", "texts", "languages", "licences", "splits")
_LANGUAGE = re.compile(r"[A-Za-z0-9-]{0,35}")
_NO_LABEL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_NO_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""A text may have lines and tabs; a name may not."""


@dataclass(frozen=True)
class Prompts:
    """Texts in the order they were sent; columns of equal length."""

    ids: list[str]
    """Unique."""
    texts: list[str]
    """None without a letter; lines and tabs are kept."""
    languages: list[str]
    """Such as ``en``; empty where nobody said."""
    licences: list[str]
    """Empty where nobody said."""
    splits: list[str]
    """``train``, ``test``, or empty: left to the job, by its seed."""

    def meta(self) -> dict[str, Any]:
        """Return the facts a plan needs; lengths are in characters."""
        lengths = [len(text) for text in self.texts]
        return {
            "prompts": len(lengths),
            "characters": sum(lengths),
            "longest": max(lengths, default=0),
            "held_out": self.splits.count("test"),
            "unsplit": self.splits.count(""),
            "languages": dict(sorted(Counter(self.languages).items())),
        }


def complaint(column: str, value: str) -> str | None:
    """Return what is wrong with one entry of a column, in words that follow its name, or None."""
    if found := (_NO_TEXT if column == "texts" else _NO_LABEL).search(value):
        return (
            f"{shown(value)} holds U+{ord(found[0]):04X}, a control character or half a "
            "character; take it out"
        )
    return _RULES[column](value)


def _text(text: str) -> str | None:
    if not text.strip():
        return "is empty; take the prompt out"
    if len(text) > LONGEST:
        return f"has {len(text)} characters; allowed: {LONGEST}, cut it up"
    return None


def _label(least: int) -> Callable[[str], str | None]:
    def rule(label: str) -> str | None:
        if least <= len(label) <= LABEL_LENGTH:
            return None
        return f"has {len(label)} characters; allowed: {least} to {LABEL_LENGTH}"

    return rule


def _language(code: str) -> str | None:
    if _LANGUAGE.fullmatch(code):
        return None
    return f"{shown(code)}; needed a code such as 'en' or 'pt-BR', 35 letters, digits and - at most"


def _split(name: str) -> str | None:
    return None if name in SPLITS else f"{shown(name)}; allowed: 'train', 'test', or empty"


_RULES: Mapping[str, Callable[[str], str | None]] = {
    "ids": _label(1),
    "texts": _text,
    "languages": _language,
    "licences": _label(0),
    "splits": _split,
}


def check_prompts(prompts: Prompts) -> None:
    """Raise DataInvalid naming the field, the value and the fix."""
    count = len(prompts.texts)
    if not 1 <= count <= MOST:
        raise DataInvalid(f"texts: {count}; needed 1 to {MOST}")
    for name in COLUMNS:
        column = getattr(prompts, name)
        if len(column) != count:
            raise DataInvalid(f"{name}: {len(column)} entries for {count} texts")
        for row, value in enumerate(column):
            if wrong := complaint(name, value):
                raise DataInvalid(f"{name}: entry {row}: {wrong}")
    if len(different := set(prompts.languages)) > LANGUAGES:
        raise DataInvalid(f"languages: {len(different)} different ones; allowed: {LANGUAGES}")
    twice = [name for name, times in Counter(prompts.ids).items() if times > 1]
    if twice:
        raise DataInvalid(
            f"ids: {shown(twice[0])} appears more than once ({len(twice)} such ids); make ids "
            "unique"
        )


def save_prompts(path: Path, prompts: Prompts) -> None:
    """Write checked prompts as one .safetensors; equal ones give equal bytes."""
    check_prompts(prompts)
    tensors = {}
    for name in COLUMNS:
        tensors[name], tensors[f"{name}_offsets"] = shards.pack_text(getattr(prompts, name))
    shards.save(path, tensors, _manifest(prompts))


def _manifest(prompts: Prompts) -> dict[str, Any]:
    return {"format": FORMAT[0], "version": FORMAT[1], **prompts.meta()}


def load_prompts(path: Path) -> Prompts:
    """Read and check what save_prompts wrote.

    Raises:
        DataInvalid: another format, a column missing, damaged text, or a manifest that says other
            than the columns do.
    """
    tensors, manifest = shards.load(path)
    told = manifest.get("format"), manifest.get("version")
    if told != FORMAT:
        raise DataInvalid(
            f"manifest: format {shown(told[0])}, version {shown(told[1])}; needed "
            f"{FORMAT[0]!r}, version {FORMAT[1]}"
        )
    needed = [part for name in COLUMNS for part in (name, f"{name}_offsets")]
    if missing := [name for name in needed if name not in tensors]:
        raise DataInvalid(
            f"{', '.join(missing)}: missing; the file holds {', '.join(sorted(tensors)) or 'none'}"
        )
    columns = {
        name: shards.unpack_text(tensors[name], tensors[f"{name}_offsets"]) for name in COLUMNS
    }
    found = Prompts(**columns)
    check_prompts(found)
    _check_manifest(found, manifest)
    return found


def _check_manifest(found: Prompts, manifest: Mapping[str, Any]) -> None:
    written = _manifest(found)
    for name in manifest:
        if name not in written:
            raise DataInvalid(f"manifest: {shown(name)} is not known; known: {', '.join(written)}")
    for name, value in written.items():
        # As text: to Python 1, 1.0 and True are equal.
        if _json(manifest.get(name)) != _json(value):
            raise DataInvalid(
                f"manifest: {name} is {shown(manifest.get(name))}; needed {shown(value)}"
            )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
