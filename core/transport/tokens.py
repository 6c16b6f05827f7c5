"""Texts as tokens, with the characters that each token ends at; what two vocabularies share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from core.errors import DataInvalid
from core.tensors.language_models import LanguageModel
from core.transport.foreign import loaded

SEPARATOR = "\n\n"
"""Between the system prompt and the text."""
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Encoded:
    """The tokens of one text, behind its system prompt; T tokens.

    Characters are counted from the start of the text itself: those of the system prompt are < 0.
    """

    ids: Ints
    """[T]"""
    starts: Ints
    """[T] the first character of each token, as the tokenizer says it (it may trim spaces)."""
    ends: Ints
    """[T] never falling: up to which character the state at a token has read. Tokens that are
    pieces of one character (bytes) all end behind it."""
    counts: Flags
    """[T] whether a token is of the text proper: not special, and none of it before the text."""
    special: Flags
    """[T] what the tokenizer puts around a text, such as a token for its beginning."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load tokenizer.json as it stands; no code of the folder is run.

    AutoTokenizer may put the family's own way of cutting in its place, where the class named beside
    it is another; equal files would then no longer cut alike.

    Raises:
        DataInvalid: there is none that transformers loads.
    """
    tokenizer: PreTrainedTokenizerBase = loaded(PreTrainedTokenizerFast, folder, "tokenizer.json")
    return tokenizer


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, system_prompt: str, max_tokens: int
) -> Encoded:
    """Tokenise system prompt, ``SEPARATOR`` and text in one go, as they would be served.

    Args:
        tokenizer: of ``load_tokenizer``.
        text: not empty.
        system_prompt: empty: none, and no line between.
        max_tokens: the rest is cut off, behind a whole character.

    Raises:
        DataInvalid: no token of the text itself is left.
    """
    prefix = system_prompt + SEPARATOR if system_prompt else ""
    found = tokenizer(
        prefix + text,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    ids: Ints = np.asarray(found["input_ids"], dtype=np.int64)
    special = np.asarray(found["special_tokens_mask"], dtype=np.bool_)
    spans = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2) - len(prefix)
    # A special token has read what stood before it; the tokenizer gives it no place.
    ends = np.where(special, -len(prefix), spans[:, 1])
    ends = np.maximum.accumulate(ends) if len(ends) else ends
    starts = np.where(special, ends, spans[:, 0])
    kept = _cut(ends, special, max_tokens)
    counts = (~special & (starts >= 0) & (ends > 0))[:kept]
    if not counts.any():
        raise DataInvalid(f"the text {text[:40]!r}: {_why_none(ends, special, max_tokens)}")
    return Encoded(ids[:kept], starts[:kept], ends[:kept], counts, special[:kept])


def _why_none(ends: Ints, special: Flags, most: int) -> str:
    plain = ends[~special]
    before = int((plain <= 0).sum())
    if before == len(plain):
        return "the tokenizer makes no token of it"
    if before + int(special[:most].sum()) < most:
        return "its only token begins in the system prompt, so no token is of the text alone"
    return f"the system prompt before it has {before} tokens, and max_tokens is {most}"


def _cut(ends: Ints, special: Flags, most: int) -> int:
    """Return how many tokens stay: at most ``most``, and no character in part."""
    if len(ends) <= most:
        return len(ends)
    if special[most] or ends[most] != ends[most - 1]:
        return most
    return int(np.searchsorted(ends, ends[most], side="left"))


@dataclass(frozen=True)
class Vocabularies:
    """What the tokenizers and vocabularies of two models share."""

    same: bool
    """Whether both cut text alike (equal tokenizer.json), so that ids mean the same."""
    shared: int
    """Ids that mean the same in both, 0 .. shared - 1; rows beyond are padding. 0: none."""
    words: tuple[str, ...]
    """What differs, for the report."""

    def meta(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return {"same": self.same, "shared": self.shared, "words": list(self.words)}


def check_vocabularies(student: LanguageModel, teacher: LanguageModel) -> Vocabularies:
    """Compare two models by what their artifacts say, before any of them is loaded.

    Raises:
        DataInvalid: a tokenizer gives ids that its model has no row for, or equal tokenizers are
            said to give different numbers of ids.
    """
    for who, model in (("student", student), ("teacher", teacher)):
        rows = model.shape.vocabulary
        if not 1 <= model.tokens <= rows:
            raise DataInvalid(
                f"{who}: its tokenizer gives {model.tokens} ids, its embedding has {rows} rows; "
                "each id needs a row"
            )
    same = student.tokenizer == teacher.tokenizer
    if same and student.tokens != teacher.tokens:
        raise DataInvalid(
            f"equal tokenizers, and yet {student.tokens} ids of the student beside "
            f"{teacher.tokens} of the teacher; import one of the models again"
        )
    return Vocabularies(same, student.tokens if same else 0, _words(student, teacher, same=same))


def _words(student: LanguageModel, teacher: LanguageModel, *, same: bool) -> tuple[str, ...]:
    words = []
    if not same:
        words.append(
            f"the tokenizers differ ({student.tokens} and {teacher.tokens} ids): tokens are "
            "aligned by the characters they end at, and logits cannot be compared id by id"
        )
    for who, model in (("student", student), ("teacher", teacher)):
        if padding := model.shape.vocabulary - model.tokens:
            words.append(f"{padding} rows of the {who}'s vocabulary are padding: no text has them")
    if student.shape.vocabulary != teacher.shape.vocabulary:
        words.append(
            f"the embeddings have {student.shape.vocabulary} and {teacher.shape.vocabulary} rows"
        )
    return tuple(words)
