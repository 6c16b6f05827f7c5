"""JSON as the service takes it: finite numbers, each key once, whole characters, not too deep."""

import json
import math
from typing import Any

DEPTH = 100


class NotTaken(ValueError):
    """JSON in form, and nothing that a spec may hold."""


def loads(text: str) -> Any:
    """Read JSON.

    Raises:
        json.JSONDecodeError: it is none.
        NotTaken: the service would refuse or misread it.
    """
    try:
        value = json.loads(
            text, parse_constant=_number, parse_float=_number, object_pairs_hook=_object
        )
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise NotTaken(f"nests deeper than {DEPTH} levels") from error
    except ValueError as error:  # Python reads no whole number of more than 4300 digits
        raise NotTaken(str(error)) from error
    _check(value)
    return value


def is_text(text: str) -> bool:
    """Tell whether a text can be sent: no stray bytes, no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise NotTaken(f"{text[:40]} is not a finite number")
    return value


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in items:
        if key in found:
            raise NotTaken(f"names the key {key[:60]!r} twice")
        found[key] = value
    return found


def _check(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH:
            raise NotTaken(f"nests deeper than {DEPTH} levels")
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += [*each.keys(), *each.values()]
            elif isinstance(each, list):
                inner += each
            elif isinstance(each, str) and not is_text(each):
                raise NotTaken(f"{each[:60]!r} holds half a character")
        level = inner
