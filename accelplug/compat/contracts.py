"""A contract: a function that raises when a host library no longer behaves as the code beside it relies on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import ModuleType

Check = Callable[[], None]


def contract(promise: str) -> Callable[[Check], Check]:
    """Make a function the check of a promise, ``library: what is relied on``."""

    def keep(check: Check) -> Check:
        vars(check)["promise"] = promise
        return check

    return keep


def contracts_of(module: ModuleType) -> Iterator[tuple[str, Check]]:
    """Yield (promise, check) of all contracts that stand in a module."""
    for value in list(vars(module).values()):  # Dynamo adds globals while a check runs
        if getattr(value, "__module__", None) == module.__name__ and hasattr(value, "promise"):
            yield value.promise, value


def expect(condition: object, message: str) -> None:
    """Raise RuntimeError unless a condition of a contract holds."""
    if not condition:
        raise RuntimeError(message)


def why_broken(check: Check) -> str | None:
    """Run a contract apart from what the process is set to; return what no longer holds, or None."""
    import torch

    dtype = torch.get_default_dtype()
    apart = (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
    )
    try:
        with ExitStack() as stack, warnings.catch_warnings():
            for context in apart:
                stack.enter_context(context)
            torch.set_default_dtype(torch.float32)
            warnings.simplefilter("ignore")
            check()
    except Exception as error:  # whatever a library has come to do
        return str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"
    finally:
        torch.set_default_dtype(dtype)
    return None
