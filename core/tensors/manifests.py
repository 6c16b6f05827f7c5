"""What a model's manifest may say, and how a stranger's value is checked and shown."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from core.errors import DataInvalid

COLDEST, HOTTEST = 1e-35, 1e35
"""Bounds of a temperature: a share of a row's squared norm, so it is wide; float32 holds both."""
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Raise DataInvalid where a text holds a control character or half of a surrogate pair."""
    for row, text in enumerate(texts):
        if found := _UNPRINTABLE.search(text):
            raise DataInvalid(
                f"{name}: entry {row} ({shown(text)}) holds U+{ord(found[0]):04X}, a control "
                "character or half a character; take it out"
            )


def shown(value: Any) -> str:
    """Return a stranger's value as a message may hold it: short, printable."""
    if isinstance(value, str):
        return repr(value[:60])
    if value is None or isinstance(value, int | float | np.number):
        return str(value)[:60]
    return f"a {type(value).__name__}"


def check_temperature(value: Any) -> float:
    """Return the temperature, or raise DataInvalid unless it is a number float32 can divide by."""
    number = isinstance(value, int | float | np.integer | np.floating)
    if number and not isinstance(value, bool) and COLDEST <= value <= HOTTEST:
        return float(value)
    raise DataInvalid(
        f"temperature: {shown(value)}; needed a finite number > 0, {COLDEST:g} to {HOTTEST:g}"
    )


Check = Callable[[Any], bool]


def _number(low: float, high: float, kind: Any = int | float) -> Check:
    return lambda v: isinstance(v, kind) and not isinstance(v, bool) and low <= v <= high


def _just(value: Any) -> Check:
    return lambda v: type(v) is type(value) and v == value


def _one_of(*values: str | None) -> Check:
    return lambda v: v in values


def _sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(text, str) and not _UNPRINTABLE.search(text) for text in value
    )


def _object(fields: Mapping[str, Check], *, optional: str = "") -> Check:
    return lambda v: (
        isinstance(v, dict)
        and v.keys() | {optional} == fields.keys() | {optional}
        and all(fields[name](inner) for name, inner in v.items())
    )


_CLUSTERING = _object(
    {
        "method": _one_of("kmeans", "mst", "groups"),
        "max_clusters": _number(1, 4096, int),
        "min_cluster_size": _number(1, 1_000_000, int),
    },
    optional="max_clusters",
)
_SCORE = _object(
    {
        "strength": _number(0, 1e300),
        "temperature": _number(COLDEST, HOTTEST),
        "log_score": _number(-1e300, 1e300),
        "hit1": _number(0, 1),
        "cosine": _number(-1.01, 1.01),
    }
)
_SOURCE = _object(
    {
        "model": _sha256,
        "clusters": _number(1, 1_000_000, int),
        "rows": _number(1, 1_000_000_000, int),
        "temperature": _number(COLDEST, HOTTEST),
        "top_k": _number(1, 1024, int),
    }
)
_FACTS: Mapping[str, tuple[Check, str]] = {
    "temperature": (_number(COLDEST, HOTTEST), f"a number, {COLDEST:g} to {HOTTEST:g}"),
    "pairs": (
        lambda v: v is None or _sha256(v),
        "null or the SHA-256 of pairs, 64 lower-case hex digits",
    ),
    "anchor": (_one_of("global", "identity", "none"), "global, identity or none"),
    "clustering": (_CLUSTERING, "method, max_clusters, min_cluster_size as a job gives them"),
    "compat": (_one_of("legacy", None), "legacy or null"),
    "top_k": (_number(1, 1024, int), "a whole number, 1 to 1024"),
    "seed": (_number(0, 2**31 - 1, int), "a whole number, 0 to 2147483647"),
    "test_fraction": (_number(0, 1), "a number, 0 to 1"),
    "strength": (_number(0, 1e300), "a finite number >= 0"),
    "scores": (
        lambda v: isinstance(v, list) and all(map(_SCORE, v)),
        "a list of strength, temperature, log_score, hit1 and cosine, all finite numbers",
    ),
    "source": (_one_of("imported"), "imported"),
    "cluster_ids": (_texts, "a list of texts without control characters"),
    "reflected_clusters": (_texts, "a list of texts without control characters"),
    "largest_deviation": (_number(0, 1), "a number, 0 to 1"),
    "split": (_one_of("query", "cluster"), "query or cluster"),
    "sources": (
        lambda v: isinstance(v, list) and bool(v) and all(map(_SOURCE, v)),
        "a list of model (SHA-256), clusters, rows, temperature and top_k",
    ),
}
"""What a manifest may say beside format, version and counts, and how it must be said."""
_NAMED = (
    lambda v: isinstance(v, str) and 1 <= len(v) <= 200 and _texts([v]),
    "a text of 1 to 200 letters without control characters",
)
_SHARED = (
    *("temperature", "pairs", "clustering", "seed", "test_fraction", "split"),
    *("strength", "scores", "source"),
)
LDA_FACTS: Mapping[str, tuple[Check, str]] = {
    **{name: _FACTS[name] for name in _SHARED},
    "projection": _NAMED,
    "embedding_model": _NAMED,
    "questions": (_one_of("centroids"), "centroids"),
}
"""The same of an LDA model. ``projection`` and ``embedding_model`` are what an lda.db calls them;
``questions``: the file had none, so the centroids stand in their place."""


def check_manifest(
    manifest: Mapping[str, Any],
    written: Mapping[str, Any],
    *,
    clusters: int,
    rows: int,
    facts: Mapping[str, tuple[Check, str]] = _FACTS,
) -> None:
    """Refuse a manifest that says anything unknown, malformed or other than the arrays.

    Args:
        manifest: as found.
        written: what it must say if it says it: format, version and the counts.
        clusters: of the arrays.
        rows: of the arrays, training queries.
        facts: what it may say beside; of a federated model where left out.
    """
    for name, found in manifest.items():
        if name not in written and name not in facts:
            raise DataInvalid(f"manifest: {shown(name)} is not known; known: {', '.join(facts)}")
        check, needed = facts.get(name) or (_just(written[name]), shown(written[name]))
        if not check(found):
            raise DataInvalid(f"manifest: {name} is {shown(found)}; needed {needed}")
    ids = manifest.get("cluster_ids")
    if ids is not None and (len(ids) != clusters or len(set(ids)) != len(ids)):
        raise DataInvalid(f"manifest: cluster_ids; needed {clusters} different ones")
    if set(manifest.get("reflected_clusters", ())) - set(ids or ()):
        raise DataInvalid("manifest: reflected_clusters; needed some of cluster_ids")
    for name, count in (("clusters", clusters), ("rows", rows)):
        told = sum(source[name] for source in manifest.get("sources", ()))
        if "sources" in manifest and told != count:
            raise DataInvalid(f"manifest: sources have {told} {name} in all; needed {count}")
