"""How many numbers layers hold, and how many they keep of a query while it trains. Torch-free."""

from __future__ import annotations


def linear(dim: int, width: int) -> int:
    """Count a matrix and a bias."""
    return dim * width + width


def perceptron(dim: int, hidden: int, layers: int, width: int) -> int:
    """Count the layers, and the mean and the scale of what they are given."""
    inner = linear(dim, hidden) + (layers - 1) * linear(hidden, hidden)
    return inner + linear(hidden, width) + dim + 1


def perceptron_units(dim: int, hidden: int, layers: int, width: int) -> int:
    """Bound what a query's gradient keeps: each hidden unit three times, for GELU and dropout."""
    return 4 * dim + 3 * layers * hidden + width
