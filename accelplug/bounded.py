"""A small least-recently-used table: caches of plans and choices must not grow with every new resolution."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Bounded(Generic[K, V]):
    """A table of at most `size` entries that forgets the one unused for longest. Threads may share it; a copy or a pickle is empty."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._table: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._table)

    def __reduce__(self) -> tuple[type[Bounded[K, V]], tuple[int]]:
        return type(self), (self._size,)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """Return the value of `key`, made and kept if it is not there."""
        with self._lock:
            if key in self._table:
                self._table.move_to_end(key)
                return self._table[key]
        made = make()  # unlocked: it may take long, or ask other tables
        with self._lock:
            value = self._table.setdefault(key, made)  # threads that made one side by side share the first
            if len(self._table) > self._size:
                self._table.popitem(last=False)
        return value

    def peek(self, key: K) -> V | None:
        """Return the value of `key`, or None if it is not there."""
        return self._table.get(key)

    def put(self, key: K, value: V) -> None:
        """Set the value of `key`."""
        with self._lock:
            self._table.pop(key, None)
        self.get(key, lambda: value)

    def items(self) -> list[tuple[K, V]]:
        """Return keys with their values, least recently used first."""
        with self._lock:
            return list(self._table.items())

    def values(self) -> list[V]:
        """Return the values, least recently used first."""
        with self._lock:
            return list(self._table.values())

    def clear(self) -> None:
        """Forget everything."""
        self._table.clear()
