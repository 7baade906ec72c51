"""What goes by a name: our own, and what other packages bring, by a call or by an entry point of an installed package."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from accelplug.errors import AccelplugError

Known = TypeVar("Known")


class EntryPoints:
    """What installed packages offer under one group; see `read`.

    Parameters
    ----------
    group : of the entry points, ``accelplug.patches``.
    register : takes each object that is offered.
    """

    def __init__(self, group: str, register: Callable[[Any], Any]) -> None:
        self.group, self._register = group, register
        self.broken: dict[str, str] = {}
        """What could not be loaded or registered: name of the entry point -> package and reason."""
        self._lock, self._was_read = threading.RLock(), False

    def read(self) -> None:
        """Load and register all of them, once a process. A package that fails is warned of, remembered as broken, and left out."""
        with self._lock:
            if self._was_read:
                return
            self._was_read = True  # ahead of the work: while a package is imported it may ask for names itself
            for point in entry_points(group=self.group):
                try:
                    self._register(point.load())
                except (Exception, SystemExit) as error:  # whatever it is, it is that package's fault and must not be ours
                    package = point.dist.name if point.dist is not None else point.value
                    self.broken[point.name] = f"the package {package} offers it, and fails: {type(error).__name__}: {error}"
                    warnings.warn(
                        f"{self.group}: {point.name!r} is left out: {self.broken[point.name]}", RuntimeWarning, stacklevel=2
                    )


class Catalog(Generic[Known]):
    """Things of one sort by their names. Our own come first and stay; entry points are read when a name is missing.

    Parameters
    ----------
    sort : what they are, for messages: ``patch``.
    own : ours; names may share a thing.
    points : where others come from beside `add`.
    """

    def __init__(self, sort: str, own: Mapping[str, Known], points: EntryPoints) -> None:
        self._sort, self._points = sort, points
        self._things = dict(own)

    def get(self, name: str) -> Known | None:
        """Return what goes by a name, None if nothing does."""
        if name not in self._things:
            self._points.read()
        return self._things.get(name)

    def of(self, model: Any) -> Known | None:
        """Return what goes by the name of a model's class, or of the first class that it derives from; None if nothing does."""
        return next((known for cls in type(model).__mro__ if (known := self.get(cls.__name__)) is not None), None)

    def all(self) -> tuple[Known, ...]:
        """Return every thing once: ours, then those of others in the order in which they came."""
        self._points.read()
        return tuple({id(thing): thing for thing in self._things.values()}.values())

    def why_not(self, name: str) -> str:
        """Return ``": <package> offers it, and fails: ..."`` where an entry point of that name is broken, else an empty string."""
        return f": {self._points.broken[name]}" if name in self._points.broken else ""

    def add(self, names: Iterable[str], thing: Known) -> None:
        """Give a thing its names; what is here already may come again.

        Raises
        ------
        AccelplugError
            If another thing has one of them; then nothing is added.
        """
        for name in names:
            if (other := self._things.get(name, thing)) != thing:
                raise AccelplugError(
                    f"The {self._sort} {name!r} cannot be registered: expected a name that is free, and there is {other!r}. "
                    "Give it another name."
                )
        self._things = {**self._things, **dict.fromkeys(names, thing)}

    def drop(self, thing: Known) -> None:
        """Take out a thing that was added."""
        self._things = {name: kept for name, kept in self._things.items() if kept != thing}
