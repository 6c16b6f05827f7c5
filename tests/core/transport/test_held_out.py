from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import DataInvalid
from core.tensors.prompts import Prompts
from core.transport.held_out import HeldOut, draw

HOW = HeldOut(test_fraction=0.2, seed=3)


def prompts(texts: list[str], *, languages: list[str] | None = None, splits: str = "") -> Prompts:
    """``splits``: a letter for each text: t(rain), h(eld out), or a dot."""
    names = {"t": "train", "h": "test", ".": ""}
    count = len(texts)
    return Prompts(
        [f"p{row}" for row in range(count)],
        texts,
        languages or [""] * count,
        [""] * count,
        [names[letter] for letter in splits or "." * count],
    )


def numbered(count: int) -> list[str]:
    return [f"text {row}" for row in range(count)]


def test_told_splits_are_kept() -> None:
    assert draw(prompts(numbered(3), splits="tht"), HOW) == ["train", "test", "train"]


def test_a_share_of_the_rest_is_held_out() -> None:
    found = draw(prompts(numbered(50)), HOW)

    assert found.count("test") == 10
    assert found == draw(prompts(numbered(50)), HOW)
    assert found != draw(prompts(numbered(50)), HeldOut(0.2, seed=4))


def test_each_language_gives_its_share() -> None:
    languages = ["de"] * 10 + ["en"] * 25 + ["fr"] * 4 + ["ja"]

    found = draw(prompts(numbered(40), languages=languages), HOW)

    of = Counter(language for language, s in zip(languages, found, strict=True) if s == "test")
    # fr's share is 0.8, ja's 0.2: what is left over goes where a text stays to fit on.
    assert of == {"de": 2, "en": 5, "fr": 1}


def test_equal_texts_stay_on_one_side() -> None:
    found = draw(prompts(["same"] * 5 + numbered(5) + ["same"]), HeldOut(0.5, seed=0))

    assert len({found[0], *found[1:5], found[-1]}) == 1


def test_equal_text_goes_where_it_was_told() -> None:
    found = draw(prompts(["a", "b", "a", "c"], splits="..ht"), HOW)

    assert (found[0], found[2:]) == ("test", ["test", "train"])


def test_equal_texts_told_apart_are_refused() -> None:
    with pytest.raises(DataInvalid, match="prompts 'p0' and 'p2' are the same text"):
        draw(prompts(["a", "b", "a"], splits="t.h"), HOW)


def test_one_text_is_held_out_where_the_share_is_none() -> None:
    assert sorted(draw(prompts(["a", "b"]), HeldOut(0.01, seed=0))) == ["test", "train"]
    assert sorted(draw(prompts(["a", "b"]), HeldOut(0.89, seed=0))) == ["test", "train"]


def test_told_ones_suffice() -> None:
    assert draw(prompts(["a", "b", "c"], splits="h.."), HeldOut(0.1, seed=0))[1:] == ["train"] * 2


@pytest.mark.parametrize(
    ("texts", "splits", "why"),
    [
        (["a"], ".", "no text is held out"),
        (["a", "a"], "..", "no text is held out"),
        (["a", "b"], "tt", "no text is held out"),
        (["a", "b"], "hh", "all texts are held out"),
        (["a", "a"], "h.", "all texts are held out"),
    ],
)
def test_an_empty_side_is_refused(texts: list[str], splits: str, why: str) -> None:
    with pytest.raises(DataInvalid, match=why):
        draw(prompts(texts, splits=splits), HOW)


ROWS = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["", "de", "en"])),
    min_size=2,
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.floats(0.01, 0.89), st.integers(0, 99))
def test_both_sides_have_texts_and_none_is_on_both(
    rows: list[tuple[str, str]], share: float, seed: int
) -> None:
    texts = [text for text, _ in rows]
    of = prompts(texts, languages=[language for _, language in rows])
    if len(set(texts)) < 2:
        return

    found = draw(of, HeldOut(share, seed))

    held = {text for text, split in zip(texts, found, strict=True) if split == "test"}
    kept = {text for text, split in zip(texts, found, strict=True) if split == "train"}
    assert held
    assert kept
    assert not held & kept
    assert len(held) == min(max(1, round(share * len(set(texts)))), len(set(texts)) - 1)
