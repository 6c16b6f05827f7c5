"""How much a foreign file may ask of us. Spent while bytes appear, never on a header's promise."""

from dataclasses import dataclass

from core.errors import TooLarge

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds of one import. The operating system enforces the first six."""

    memory_bytes: int = 8192 * MIB
    """Address space of the import process; a model needs about twice its size."""
    cpu_seconds: int = 600
    wall_seconds: float = 900.0
    output_bytes: int = 8192 * MIB
    """Of any one file written."""
    open_files: int = 64
    processes: int = 0
    """New processes or threads; the superuser is exempt, so the process refuses them itself too."""
    inflated_bytes: int = 8192 * MIB
    """Of everything unpacked, nested archives counted again."""
    member_bytes: int = 4096 * MIB
    """Of one member of an archive, inflated."""
    members: int = 10_000
    ratio: int = 200
    """Inflated to compressed, once a member has grown past ``ratio_floor_bytes``."""
    ratio_floor_bytes: int = 64 * MIB
    header_bytes: int = 8 * MIB
    """Of a .safetensors header."""
    line_bytes: int = 4 * MIB
    """Of one line of a text file."""
    pickle_bytes: int = 512 * MIB
    pickle_opcodes: int = 10_000_000
    pickle_depth: int = 32
    clusters: int = 20_000
    dim: int = 16_384


class Budget:
    """Counts unpacked bytes down to the limit."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._left = limits.inflated_bytes

    def spend(self, size_bytes: int, name: str) -> None:
        """Count ``size_bytes`` just unpacked, or raise TooLarge."""
        self._left -= size_bytes
        if self._left < 0:
            raise TooLarge(
                f"{name}: the file unpacks to more than {self.limits.inflated_bytes} bytes in all"
            )

    def check_member(self, name: str, *, size_bytes: int, compressed_bytes: int) -> None:
        """Raise TooLarge where a member's inflated size, told or reached, is out of bounds."""
        limits = self.limits
        if size_bytes > limits.member_bytes:
            raise TooLarge(f"{name}: {size_bytes} bytes; the limit is {limits.member_bytes}")
        grown = size_bytes > limits.ratio_floor_bytes
        if grown and size_bytes > limits.ratio * max(compressed_bytes, 1):
            raise TooLarge(
                f"{name}: unpacks to more than {limits.ratio} times its size; "
                "compress it less or store it plain"
            )
