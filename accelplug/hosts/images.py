"""How many tokens each image takes, and on which grid: told by the model's own image encoder, which generate() calls ahead."""

from __future__ import annotations

import functools
import inspect
import types
from contextvars import ContextVar
from typing import Any

from torch import Tensor

METHOD = "get_image_features"

_SIZES: ContextVar[tuple[int, ...]] = ContextVar("accelplug_sizes", default=())


class ImageEncoder:
    """Stands in for a base model's ``get_image_features`` on the instance and listens: nothing else can hear it.

    generate() encodes images before the first forward, and passes on neither pixels nor grids.
    """

    def __init__(self, base: Any) -> None:
        self._base = base
        self._own = getattr(base, METHOD, None)
        self._listener: _Listener | None = None

    def install(self) -> None:
        """Begin to listen."""
        if self._own is not None and METHOD not in vars(self._base):
            self._listener = vars(self._base)[METHOD] = _Listener(self._base, self._own)

    def remove(self) -> None:
        """Leave the model as it was."""
        if self._listener is not None and vars(self._base).get(METHOD) is self._listener:
            del vars(self._base)[METHOD]
        self._listener = None

    @staticmethod
    def take() -> list[int]:
        """Return the tokens of each image that was encoded last in this thread, in order of rows; once."""
        sizes = _SIZES.get()
        _SIZES.set(())
        return list(sizes)


class _Listener:
    """Calls the encoder and notes how many tokens came of each image. A copied or pickled model gets the plain method."""

    def __init__(self, base: Any, own: Any) -> None:
        functools.update_wrapper(self, own)
        self.__signature__ = inspect.signature(own)
        self._base, self._own = base, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._own(*args, **kwargs)
        features = getattr(out, "pooler_output", out)
        if isinstance(features, (list, tuple)) and all(isinstance(x, Tensor) for x in features):
            sizes = tuple(len(x) for x in features)
        elif isinstance(features, Tensor):
            sizes = (features.shape[-2],) * (features.shape[0] if features.ndim > 2 else 1)
        else:
            sizes = ()
        _SIZES.set(sizes)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        base = memo.get(id(self._base), self._base)
        return types.MethodType(getattr(type(base), METHOD), base)

    def __reduce__(self) -> tuple:
        return getattr, (self._base, METHOD)
