"""generate() with something before, around or behind it: the door for methods that need more than one forward."""

from __future__ import annotations

import functools
import inspect
import types
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelplug.hosts.transformers import LanguageHost
    from accelplug.patches.base import GenerationPatch

_INSIDE: ContextVar[bool] = ContextVar("accelplug_generating", default=False)


class Generation:
    """A model's ``generate``, wrapped on the instance by a recipe's generation patches, the first one outermost."""

    def __init__(self, host: LanguageHost, patches: tuple[GenerationPatch, ...], processor: Any) -> None:
        self.host, self.patches, self.processor = host, patches, processor
        self._wrapped: _Generate | None = None

    def install(self) -> None:
        """Put the wrapper in place, if there is anything to wrap with."""
        if self.patches:
            self._wrapped = vars(self.host.model)["generate"] = _Generate(self, self.host.model.generate)

    def remove(self) -> None:
        """Leave the model as it was."""
        if self._wrapped is not None and vars(self.host.model).get("generate") is self._wrapped:
            del vars(self.host.model)["generate"]
        self._wrapped = None


class _Generate:
    """Stands in for ``generate``. A copied or pickled model gets the plain method."""

    def __init__(self, generation: Generation, own: Any) -> None:
        functools.update_wrapper(self, own)
        self.__signature__ = inspect.signature(own)
        self._generation, self._own = generation, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _INSIDE.get():  # a pass that a patch asked for
            return self._own(*args, **kwargs)
        inputs = inspect.signature(self._own).bind_partial(*args, **kwargs).arguments
        inputs |= inputs.pop("kwargs", {})
        if "inputs" in inputs:
            inputs["input_ids"] = inputs.pop("inputs")
        call = self._own
        for patch in reversed(self._generation.patches):
            call = functools.partial(_through, patch, self._generation, call)
        token = _INSIDE.set(True)
        try:
            return call(**inputs)
        finally:
            _INSIDE.reset(token)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        model = memo.get(id(self._generation.host.model), self._generation.host.model)
        return types.MethodType(type(model).generate, model)

    def __reduce__(self) -> tuple:
        return getattr, (self._generation.host.model, "generate")


def _through(patch: GenerationPatch, generation: Generation, call: Any, **inputs: Any) -> Any:
    generation.host.ledger.served[type(patch).__name__.lower()] += 1
    return patch.generate(generation.host.model, call, inputs, generation.processor)
