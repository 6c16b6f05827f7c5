"""What kinds share: blocks of rows, sizes, small JSON files with the same bytes every time."""

import json
import math
from pathlib import Path
from typing import Any

from core.kinds._base import Produced


def float_bytes(*shape: int) -> int:
    """Return what a float32 tensor of this shape takes."""
    return 4 * math.prod(shape)


def write_json(path: Path, value: Any, *, format_name: str, **meta: Any) -> Produced:
    """Write JSON with sorted keys; no NaN."""
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")
    return Produced(path, format_name, path.name, "application/json", meta)


def read_json(path: Path) -> Any:
    """Read what write_json wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def blocks(total: int, size: int) -> list[tuple[int, int]]:
    """Cut range(total) into (start, stop) pieces of ``size``, the last one shorter."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]
