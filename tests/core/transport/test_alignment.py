from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench._tiny_models import byte_tokenizer
from core.transport.alignment import Alignment, align, columns
from core.transport.tokens import Encoded, encode, load_tokenizer
from tests.core.transport.checkpoints import needs_real, real


def encoded(ends: list[int], *, special: int = 0, system: int = 0) -> Encoded:
    """Tokens that end there, behind so many special ones; the first ``system`` do not count."""
    T = special + len(ends)
    of = np.arange(T)
    before = min([0, *ends]) - 1
    known = np.array([before] * special + ends, dtype=np.int64)
    starts = np.concatenate([[before], known[:-1]])
    counts = of >= special + system
    return Encoded(of, starts, known, counts, of < special)


def pairs(found: Alignment) -> list[tuple[int, int]]:
    return list(zip(found.student.tolist(), found.teacher.tolist(), strict=True))


def spans(found: Alignment) -> list[tuple[int, int]]:
    assert found.teacher_start is not None
    assert found.teacher_stop is not None
    return list(zip(found.teacher_start.tolist(), found.teacher_stop.tolist(), strict=True))


def test_token_takes_the_first_that_has_read_as_far() -> None:
    found = align(encoded([2, 3, 7]), encoded([1, 2, 5, 7]), how="last")

    assert pairs(found) == [(0, 1), (1, 2), (2, 3)]
    assert found.student.dtype == found.teacher.dtype == np.int64


def test_average_covers_the_tokens_span() -> None:
    found = align(encoded([2, 3, 7]), encoded([1, 2, 5, 7]), how="span_average")

    assert pairs(found) == [(0, 1), (1, 2), (2, 3)]
    assert spans(found) == [(0, 2), (2, 3), (2, 4)]


def test_bytes_of_a_character_end_with_the_byte_that_completes_it() -> None:
    character = encoded([1, 2, 3])
    three_bytes = encoded([1, 2, 2, 2, 3])

    assert pairs(align(character, three_bytes, how="last")) == [(0, 0), (1, 3), (2, 4)]
    assert pairs(align(three_bytes, character, how="last")) == [
        (0, 0), (1, 1), (2, 1), (3, 1), (4, 2)
    ]  # fmt: skip


def test_token_that_ends_inside_the_teachers_takes_its_first_piece() -> None:
    # The teacher's token 0 has read character 0 and the first byte of character 1.
    assert pairs(align(encoded([1, 2]), encoded([2, 2, 2]), how="last")) == [(0, 0), (1, 2)]


def test_cut_teacher_leaves_the_rest_without_partner() -> None:
    found = align(encoded([1, 2, 3, 4]), encoded([2, 3]), how="span_average")

    assert pairs(found) == [(0, 0), (1, 0), (2, 1)]


def test_special_tokens_and_system_prompt_have_no_part() -> None:
    student = encoded([-3, 0, 2, 4], special=1, system=2)
    teacher = encoded([0, 1, 2, 4], system=1)

    found = align(student, teacher, how="span_average")

    assert pairs(found) == [(3, 2), (4, 3)]
    assert spans(found) == [(1, 3), (3, 4)]


def test_closing_token_is_no_partner() -> None:
    text = encoded([1, 2])
    closed = Encoded(
        np.arange(3),
        np.array([0, 1, 2]),
        np.array([1, 2, 2]),
        np.array([True, True, False]),
        np.array([False, False, True]),
    )

    assert pairs(align(text, closed, how="last")) == [(0, 0), (1, 1)]
    assert columns(text, closed).tolist() == [0, 1, -1]
    assert columns(closed, text).tolist() == [0, 1]


def test_nothing_shared_gives_no_pairs() -> None:
    found = align(encoded([5]), encoded([2]), how="span_average")

    assert len(found) == 0


def test_columns_put_each_token_where_it_ends() -> None:
    student = encoded([-1, 2, 3, 7], special=2)
    teacher = encoded([-3, -1, 1, 2, 5, 7, 9], special=1)

    assert columns(student, teacher).tolist() == [0, 2, 2, 3, 3, 5, 5, -1]


ENDS = st.lists(st.integers(1, 12), min_size=1, max_size=12).map(sorted)


def reached(ends: list[int]) -> list[Fraction]:
    return [
        end - 1 + Fraction(ends[: row + 1].count(end), ends.count(end))
        for row, end in enumerate(ends)
    ]


@settings(max_examples=300, deadline=None)
@given(ENDS, ENDS)
def test_alignment_is_that_of_the_definition(mine: list[int], theirs: list[int]) -> None:
    read, by_teacher = reached(mine), reached(theirs)
    wanted, wanted_spans = [], []
    for row, end in enumerate(read):
        begin = read[row - 1] if row else Fraction(0)
        far = [column for column, other in enumerate(by_teacher) if other >= end]
        if not far:
            continue
        wanted.append((row, far[0]))
        sharing = [
            column
            for column, other in enumerate(by_teacher)
            if other > begin and (by_teacher[column - 1] if column else Fraction(0)) < end
        ]
        wanted_spans.append((sharing[0], sharing[-1] + 1))

    assert pairs(align(encoded(mine), encoded(theirs), how="last")) == wanted
    found = align(encoded(mine), encoded(theirs), how="span_average")
    assert pairs(found) == wanted
    assert spans(found) == wanted_spans
    assert [stop - 1 for _, stop in spans(found)] == [partner for _, partner in wanted]


@settings(max_examples=200, deadline=None)
@given(ENDS, ENDS)
def test_no_partner_has_read_more_than_it_must(mine: list[int], theirs: list[int]) -> None:
    for row, partner in pairs(align(encoded(mine), encoded(theirs), how="last")):
        assert theirs[partner] >= mine[row]
        # The token before has not read so far, unless both are in the midst of one character.
        assert partner == 0 or theirs[partner - 1] <= mine[row]


@settings(max_examples=100, deadline=None)
@given(ENDS)
def test_equal_tokens_give_the_identity(ends: list[int]) -> None:
    same = [(row, row) for row in range(len(ends))]

    assert pairs(align(encoded(ends), encoded(ends), how="last")) == same
    averaged = align(encoded(ends), encoded(ends), how="span_average")
    assert pairs(averaged) == same
    assert spans(averaged) == [(row, row + 1) for row in range(len(ends))]
    assert columns(encoded(ends), encoded(ends)).tolist() == list(range(len(ends)))


@settings(max_examples=200, deadline=None)
@given(ENDS, ENDS)
def test_columns_are_those_of_the_definition(mine: list[int], theirs: list[int]) -> None:
    read = reached(mine)
    wanted = [
        next((row for row, end in enumerate(read) if end >= other), -1) for other in reached(theirs)
    ]

    assert columns(encoded(mine), encoded(theirs)).tolist() == wanted


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Merges the three bytes of each of 東 and 京."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    merges = []
    for character in "東京":
        a, b, c = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        ).pre_tokenize_str(character)[0][0]
        for pair in ((a, b), (a + b, c)):
            if pair not in merges:
                merges.append(pair)
                vocabulary.setdefault("".join(pair), len(vocabulary))
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("system_prompt", ["", "Be kind, 京."])
def test_merged_characters_meet_their_last_byte(system_prompt: str) -> None:
    text = "a 東京!"
    merged, bytewise = character_tokenizer(), byte_tokenizer()
    student = encode(merged, text, system_prompt=system_prompt, max_tokens=99)
    teacher = encode(bytewise, text, system_prompt=system_prompt, max_tokens=99)

    found = align(student, teacher, how="last")

    assert len(found) == int(student.counts.sum()) == 5
    for row, partner in pairs(found):
        assert merged.decode(student.ids[: row + 1]) == bytewise.decode(
            teacher.ids[: partner + 1], skip_special_tokens=True
        )


@needs_real
@pytest.mark.parametrize("how", ["last", "span_average"])
def test_real_tokenizers_meet_at_the_end_of_each_token(how: str) -> None:
    text = "Once upon a time, there was a little girl named Lily.\nShe said: “Oh, 東京!”"
    bpe, letters = load_tokenizer(real("stories260k-hf")), load_tokenizer(real("babyllama105-hf"))
    one = encode(bpe, text, system_prompt="Tell a story.", max_tokens=400)
    other = encode(letters, text, system_prompt="Tell a story.", max_tokens=400)

    found = align(one, other, how=how)  # type: ignore[arg-type]

    assert found.student.tolist() == np.flatnonzero(one.counts).tolist()
    ends, covering = one.ends[found.student], other.ends[found.teacher]
    assert (covering >= ends).all()
    plain = other.starts[found.teacher] + 1 == covering  # tokens of one character: no more is read
    assert (covering == ends)[plain].all()
    assert plain.sum() >= 30
    back = align(other, one, how="last")
    assert (one.ends[back.teacher] >= other.ends[back.student]).all()
    assert len(back) == int(other.counts.sum())
