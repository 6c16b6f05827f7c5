"""Which texts are held out: those told, and of the rest a share of each language, by a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import DataInvalid
from core.tensors.prompts import Prompts


@dataclass(frozen=True)
class HeldOut:
    """How texts without a split are drawn."""

    test_fraction: float
    """Of the distinct ones, in (0, 1)."""
    seed: int


def draw(prompts: Prompts, how: HeldOut) -> list[str]:
    """Return ``train`` or ``test`` for every text; what was told is kept.

    Equal texts stay on one side, that of the one that was told. Of the other distinct texts
    a share is held out, at least one where none was told, from each language as its
    share; what rounding leaves over goes to languages that keep a text to fit on.

    Args:
        prompts: of which order and columns decide, beside the seed.
        how: the share of the others, and the seed.

    Raises:
        DataInvalid: equal texts are told apart, or one side would be empty.
    """
    told = _told(prompts)
    homes: dict[str, list[str]] = {}
    seen = set()
    for text, language in zip(prompts.texts, prompts.languages, strict=True):
        if not told[text] and text not in seen:
            seen.add(text)
            homes.setdefault(language, []).append(text)
    count = _count(len(seen), set(told.values()), how.test_fraction)
    chosen = _choose(homes, count, how.seed)
    return [told[text] or ("test" if text in chosen else "train") for text in prompts.texts]


def _told(prompts: Prompts) -> dict[str, str]:
    """Return for each distinct text the split that was told, or nothing."""
    told: dict[str, str] = {}
    by: dict[str, str] = {}
    for name, text, split in zip(prompts.ids, prompts.texts, prompts.splits, strict=True):
        if split and told.get(text) and split != told[text]:
            raise DataInvalid(
                f"splits: prompts {by[text]!r} and {name!r} are the same text, one to train on and "
                "one held out; give both one split"
            )
        if split or text not in told:
            told[text], by[text] = split, name
    return told


def _count(free: int, told: set[str], test_fraction: float) -> int:
    """Return how many of the distinct texts without a split are held out."""
    count = round(test_fraction * free)
    if "test" not in told:
        count = max(1, count)
    if "train" not in told:
        count = min(count, free - 1)
    count = min(max(count, 0), free)
    if not count and "test" not in told:
        raise DataInvalid(
            "splits: no text is held out; needed two different texts, one of them of split 'test' "
            "or without a split"
        )
    if count == free and "train" not in told:
        raise DataInvalid(
            "splits: all texts are held out; needed one of split 'train' or without a split"
        )
    return count


def _choose(homes: Mapping[str, Sequence[str]], count: int, seed: int) -> set[str]:
    """Draw ``count`` texts, of each language its share."""
    free = sum(len(texts) for texts in homes.values())
    shares = {language: divmod(count * len(texts), free) for language, texts in homes.items()}
    taken = {language: whole for language, (whole, _) in shares.items()}

    def turn(language: str) -> tuple[bool, int, str]:
        return taken[language] + 1 >= len(homes[language]), -shares[language][1], language

    for language in sorted(taken, key=turn)[: count - sum(taken.values())]:
        taken[language] += 1
    random = np.random.default_rng(seed)
    chosen = set()
    for language in sorted(homes):
        order = random.permutation(len(homes[language]))[: taken[language]]
        chosen |= {homes[language][number] for number in order}
    return chosen
