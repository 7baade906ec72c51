"""How much of a large intermediate is held at a time: longer ones are made piece by piece."""

CHUNK = 1 << 24
"""Most numbers of an intermediate that are held at a time; 64 MiB in float32."""


def at_once(numbers: int) -> int:
    """Return how many rows of so many numbers are made at a time, at least one."""
    return max(CHUNK // numbers, 1)
