"""Taking changes of a model back. Each is written down before it is made, so that whatever interrupts us leaves what can be finished."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelplug import compat

_ABSENT = object()
_GETSTATE = "__getstate__"

Back = Callable[[dict[str, Any]], object]
"""Takes a change back in the ``__dict__`` of an instance, or in that of a copy to come."""


class Undo:
    """A journal of changes. `run` takes them back, the last one first.

    Every step may be taken twice, so that a `run` that was interrupted can be run again. An instance that was changed through
    `touch`, `put` or `hook` is copied and pickled as if it had not been: what comes of it is stock, and needs no accelplug.

    Parameters
    ----------
    within : the journal that also takes these changes back, if it is run first. For changes that last a moment.
    """

    def __init__(self, within: Undo | None = None) -> None:
        self._steps: list[_Change | Callable[[], object]] = []
        self._within = within
        if within is not None:
            within.add(self._run)

    def __bool__(self) -> bool:
        """Whether anything is left to take back."""
        return bool(self._steps)

    def add(self, step: Callable[[], object]) -> None:
        """Write down how to take back what is done next; taken twice, it must do no harm."""
        self._steps.append(step)

    def touch(self, owner: Any, back: Back) -> None:
        """Write down how to take back the change of an instance that is made next."""
        found = vars(owner).get(_GETSTATE)
        state = found if isinstance(found, _StockState) else _StockState(owner)
        if self not in state.journals:
            self.add(partial(state.leave, self))
            state.journals.append(self)
            vars(owner)[_GETSTATE] = state
        self._steps.append(_Change(weakref.ref(owner), back))

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an instance. It is set back to what it was, unless somebody else has set it since."""
        self.touch(owner, partial(_put_back, name=name, value=value, before=vars(owner).get(name, _ABSENT)))
        vars(owner)[name] = value

    def hook(self, module: Any, register: str, hook: Callable[..., Any], **options: Any) -> None:
        """Register a hook of torch by the name of the module's method, ``register_forward_hook``, with its options."""
        self.touch(module, partial(compat.torch.drop_hook, hook=hook))
        getattr(module, register)(hook, **options)

    def run(self) -> None:
        """Take everything back. An interrupt or error is let through when that is done.

        A step that fails twice stays in the journal, to be tried again by the next `run`; it keeps no other from being taken.
        """
        try:
            self._run()
        except BaseException:
            self._run()
            raise
        if self._within is not None and self._run in self._within._steps:
            self._within._steps.remove(self._run)

    def _run(self) -> None:
        failed: list[_Change | Callable[[], object]] = []
        errors: list[Exception] = []
        try:
            while self._steps:
                step = self._steps[-1]
                try:
                    step()
                except Exception as error:
                    errors.append(error)
                    try:
                        step()  # in its turn: those ahead of it may need what it takes back
                    except Exception:
                        failed.insert(0, step)
                if self._steps and self._steps[-1] is step:  # another thread may have come in between
                    del self._steps[-1]
                elif step in self._steps:
                    self._steps.remove(step)
        finally:
            self._steps[:0] = failed
        if errors:
            raise errors[0]

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *_: object) -> None:
        self.run()

    def take_back(self, owner: Any, names: dict[str, Any]) -> None:
        """Take the changes of an instance back in the ``__dict__`` of a copy of it."""
        for step in reversed(self._steps):
            if isinstance(step, _Change) and step.owner() is owner:
                step.back(names)


@dataclass(frozen=True, eq=False)
class _Change:
    """A change of an instance."""

    owner: weakref.ref[Any]
    back: Back

    def __call__(self) -> None:
        if (owner := self.owner()) is not None:
            self.back(vars(owner))


def _put_back(names: dict[str, Any], name: str, value: Any, before: Any) -> None:
    if names.get(name) is not value:
        return
    if before is _ABSENT:
        del names[name]
    else:
        names[name] = before


class _StockState:
    """Stands in for ``__getstate__`` on an instance: what is copied or pickled of it is as if we had not touched it."""

    def __init__(self, owner: Any) -> None:
        self._owner = weakref.ref(owner)
        self.journals: list[Undo] = []

    def __call__(self) -> dict[str, Any]:
        owner = self._owner()
        cls: Any = type(owner)
        state = {name: _own(value) for name, value in cls.__getstate__(owner).items() if value is not self}
        for journal in self.journals:
            journal.take_back(owner, state)
        return state

    def leave(self, journal: Undo) -> None:
        """Forget a journal, and go with the last one."""
        self.journals = [other for other in self.journals if other is not journal]
        owner = self._owner()
        if owner is not None and not self.journals and vars(owner).get(_GETSTATE) is self:
            del vars(owner)[_GETSTATE]


def _own(value: Any) -> Any:
    """A table or list of its own, so that changes can be taken back in it: hooks stand in such."""
    return value.copy() if type(value) in (dict, OrderedDict, list) else value
