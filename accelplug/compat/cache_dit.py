"""What is asked of cache-dit 1.5, which is never imported: the mark that it leaves on what it wraps. tests/test_stack.py holds it."""

from __future__ import annotations

from typing import Any


def has_cache(denoiser: Any) -> bool:
    """Return whether cache-dit has put a step cache on a denoiser."""
    return bool(vars(denoiser).get("_is_cached", False))
