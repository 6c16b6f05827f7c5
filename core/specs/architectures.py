"""How many heads H and layers L stand for N flat heads (H^L = N), in integers. Torch-free."""

from __future__ import annotations

from operator import index

from core.errors import SpecInvalid


def optimal_architecture(n_flat_heads: int, prefer_h: int = 4) -> tuple[int, int]:
    """Choose the L for which H^L is nearest to N: document 001's rule, in exact arithmetic.

    Of the two powers around N the nearer one counts, the lower one where both are equally near;
    at least one layer. The nearest may lie below N (64 for 100): ``covering_architecture`` never
    does.

    Args:
        n_flat_heads: N, from 1 up.
        prefer_h: H, from 2 up.

    Returns:
        (H, L).

    Raises:
        SpecInvalid: an argument is no integer or too small.
    """
    n = whole_number(n_flat_heads, "n_flat_heads", least=1)
    h = whole_number(prefer_h, "prefer_h", least=2)
    below, layers = h, 1
    while below * h <= n:
        below, layers = below * h, layers + 1
    return (h, layers) if abs(below - n) <= abs(below * h - n) else (h, layers + 1)


def covering_architecture(n_flat_heads: int, *, dim: int | None = None) -> tuple[int, int]:
    """Choose the fewest heads in all, H * L, with H^L >= N.

    Of equal sums the fewer layers: layers run one after another, heads side by side.

    Args:
        n_flat_heads: N, from 1 up.
        dim: width that H must divide, as attention asks; None where it need not.

    Returns:
        (H, L); (1, 1) for a single flat head.

    Raises:
        SpecInvalid: an argument is no integer or too small, or no number of heads divides ``dim``
            and covers N (a width of 1 has one head).
    """
    n = whole_number(n_flat_heads, "n_flat_heads", least=1)
    allowed = None if dim is None else _divisors(whole_number(dim, "dim", least=1))
    if n == 1:
        return (1, 1)
    if allowed == [1]:
        raise SpecInvalid(f"dim 1 has one head, which covers 1 and not {n}", pointer="/dim")
    best: tuple[int, int] | None = None
    for layers in range(1, n.bit_length() + 1):  # 2^bit_length > n: two heads cover it there
        root = _root_above(n, layers)
        heads = root if allowed is None else next((h for h in allowed if h >= root), None)
        if heads is not None and (best is None or heads * layers < best[0] * best[1]):
            best = (heads, layers)
    assert best is not None
    return best


def whole_number(value: object, name: str, *, least: int) -> int:
    """Return an integer of at least ``least``, whatever integer type it came in.

    Raises:
        SpecInvalid: it is none, or too small; the message names it.
    """
    allowed = f"{name} {value!r}; allowed: whole numbers from {least} up"
    if isinstance(value, bool):
        raise SpecInvalid(allowed, pointer=f"/{name}")
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise SpecInvalid(allowed, pointer=f"/{name}") from error
    if number < least:
        raise SpecInvalid(allowed, pointer=f"/{name}")
    return number


def _root_above(n: int, power: int) -> int:
    """The smallest h >= 2 with h^power >= n >= 2, by bisection."""
    low, high = 1, 1 << -(-n.bit_length() // power)  # low^power < n <= high^power
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if middle**power >= n else (middle, high)
    return high


def _divisors(number: int) -> list[int]:
    small = [each for each in range(1, _root_above(number, 2) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})
