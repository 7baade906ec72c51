"""Private names of torch, its modules and its compiler, each with its contract below."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelplug.compat.contracts import contract, expect

DYNAMO_MODULE_NAME = "namedtuple_accelplug"
"""``__name__`` of re-bound globals. Dynamo looks globals up in ``sys.modules[__name__]``, but not for names that start so."""


@contract("torch: Dynamo traces re-bound globals as they are")
def _dynamo_globals() -> None:
    import torch

    def body(x: Any) -> Any:
        return double(x)  # type: ignore[name-defined]  # noqa: F821

    names = {"double": lambda x: 2 * x, "__name__": DYNAMO_MODULE_NAME, "__builtins__": __builtins__}
    rebound = types.FunctionType(body.__code__.replace(co_name="contract"), names)
    compiled = torch.compile(rebound, backend="eager", fullgraph=True)
    expect(torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0)), "Dynamo did not use the re-bound globals")


def comptime() -> Callable[[Callable[[Any], None]], None]:
    """Return what, called in traced code, has Dynamo call a function while it traces."""
    import torch

    return torch._dynamo.comptime.comptime


def traced_value(ctx: Any, name: str) -> Any:
    """Return the Python object that Dynamo traces as the local `name`; a tensor comes as a fake one."""
    variable = ctx.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker()
    return _concrete(variable)


def _concrete(variable: Any) -> Any:
    """Undo Dynamo's wrapping: constants and objects as they are, tensors as fake ones, through lists and dicts."""
    if variable.is_python_constant():
        return variable.as_python_constant()
    if (proxy := getattr(variable, "proxy", None)) is not None:
        return proxy.node.meta.get("example_value")
    items = getattr(variable, "items", None)
    if isinstance(items, dict):
        return {_concrete(key.vt): _concrete(value) for key, value in items.items()}
    if isinstance(items, list):
        return [_concrete(item) for item in items]
    return getattr(variable, "value", None)


def is_fake(x: Any) -> bool:
    """Whether a tensor has a shape alone, as under tracing."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(x, FakeTensor)


@contract("torch: Dynamo tells while it traces what local names hold, tensors as fake ones")
def _traced_values() -> None:
    import torch

    seen: dict[str, Any] = {}

    def look(ctx: Any) -> None:
        seen.update({name: traced_value(ctx, name) for name in ("x", "names", "number")})

    def body(x: Any, names: dict[str, Any], number: int) -> tuple[Any, bool]:
        if torch.compiler.is_compiling():
            comptime()(look)
        return x * number + names["y"], torch.compiler.is_compiling()

    x = torch.ones(2, 3)
    code = body.__code__.replace(co_name="contract")  # never traced before
    anew = types.FunctionType(code, globals(), None, None, body.__closure__)
    _, compiled = torch.compile(anew, backend="eager", fullgraph=True)(x, {"y": x, "list": [1, None]}, 2)
    if not compiled:
        return  # where the compiler is switched off nothing is traced
    expect(seen.get("number") == 2, f"comptime does not tell a number: {seen}")
    for fake in (seen["x"], seen["names"]["y"]):
        right = is_fake(fake) and fake.shape == x.shape
        expect(right, f"comptime tells a tensor as {type(fake).__name__}, not as FakeTensor")
    expect(seen["names"]["list"] == [1, None], "comptime does not tell a list in a dict")
    expect(not is_fake(x), "a tensor is taken for a FakeTensor")


def held(module: Any, name: str) -> Any:
    """Return what a module itself holds under a name, as an attribute or as a submodule, or None."""
    own = getattr(module, "__dict__", {})  # a stranger may pass anything
    return own.get(name, own.get("_modules", {}).get(name))


def unwrap_compiled(module: Any) -> Any:
    """Return the module inside what ``torch.compile(module)`` returned, or the module itself."""
    inner = held(module, "_orig_mod")
    return module if inner is None else inner


def submodule(module: Any, path: str) -> Any:
    """Return what is at a path inside a module now, looking through torch.compile, or None."""
    for name in path.split("."):
        module = getattr(unwrap_compiled(module), name, None)
    return unwrap_compiled(module) if module is not None else None


def is_wrapped(part: Any, module: Any) -> bool:
    """Whether `part` is what ``torch.compile(module)`` returned."""
    return part is not module and hasattr(part, "named_modules") and unwrap_compiled(part) is module


def is_compiled(module: Any) -> bool:
    """Whether a module, or one in it, goes through torch.compile."""
    return any(
        held(part, "_orig_mod") is not None or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


@contract("torch: a compiled module is known, and the one inside it")
def _compiled_modules() -> None:
    import torch

    module: Any = torch.nn.Linear(2, 2)
    outer: Any = torch.compile(module, backend="eager")
    expect(not is_compiled(module), "a module that is not compiled is taken for one")
    expect(unwrap_compiled(outer) is module, "torch.compile(module)._orig_mod is not the module")
    expect(unwrap_compiled(module) is module, "a module that is not compiled is unwrapped")
    if outer is not module:  # as it is where the compiler is switched off
        expect(is_compiled(torch.nn.Sequential(outer)), "torch.compile(module) has no submodule _orig_mod")
    module.compile(backend="eager")
    expect(is_compiled(torch.nn.Sequential(module)), "module.compile() leaves no _compiled_call_impl")


@contextmanager
def room_for_graphs(graphs: int) -> Iterator[None]:
    """Let Dynamo keep as many graphs of one function, where it gives up after 8. All graphs are dropped at the end."""
    import torch

    with _graphs(graphs):
        try:
            yield
        finally:
            torch._dynamo.reset()


def _graphs(limit: int) -> Any:
    import torch

    return torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=64 * limit)


@contract("torch: Dynamo's limit of graphs can be set")
def _graph_limit() -> None:
    import torch

    before = torch._dynamo.config.recompile_limit
    with _graphs(before + 1):
        expect(torch._dynamo.config.recompile_limit == before + 1, "torch._dynamo.config.recompile_limit was not set")
    expect(callable(torch._dynamo.reset), "torch._dynamo.reset is gone")


def with_parts(module: Any, parts: Mapping[str, Any]) -> Any:
    """Return another module of the same class that shares everything with `module`, but has other submodules under some names."""
    other = object.__new__(type(module))
    vars(other).update(vars(module), _modules={**module._modules, **parts})
    return other


@contract("torch: a module finds its submodules in _modules")
def _with_parts() -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    other = with_parts(module, {"1": torch.nn.Identity()})
    x = torch.randn(4, 2)
    expect(torch.equal(other(x), module[0](x)), "a submodule that was exchanged in _modules is not the one that runs")
    expect(isinstance(module[1], torch.nn.ReLU), "submodules are exchanged in the module they were taken from, too")
    expect(other[0] is module[0], "a module with other parts does not share the rest")


def is_looked_into(module: Any, ours: type) -> bool:
    """Whether somebody has hooks on a module, other than those of a class of ours, or a forward of their own."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return "forward" in vars(module) or not all(isinstance(hook, ours) for hook in hooks)


_HOOKS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}
"""Where a torch module keeps its forward hooks, and what it knows of them beside."""


def drop_hook(names: dict[str, Any], hook: Any) -> None:
    """Take a forward hook out of the ``__dict__`` of a torch module, if it is there."""
    for hooks, notes in _HOOKS.items():
        for key in [key for key, found in names[hooks].items() if found is hook]:
            for note in notes:
                names[note].pop(key, None)
            del names[hooks][key]


def times_written(x: Any) -> int:
    """Return a number that every write into a tensor raises."""
    return x._version


@contract("torch: hooks on modules and writes into tensors can be seen")
def _hooks_and_writes() -> None:
    import torch

    x, module = torch.zeros(2), torch.nn.Linear(2, 2)  # type: torch.Tensor, Any
    expect(not is_looked_into(module, type(None)), "a module without hooks is taken for one with")
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        with register(repr):
            expect(
                is_looked_into(module, type(None)), "a hook on a module is in neither _forward_hooks nor _forward_pre_hooks"
            )
    tables = {name for hooks, notes in _HOOKS.items() for name in (hooks, *notes)}
    module.register_forward_pre_hook(repr, with_kwargs=True)
    module.register_forward_hook(repr, with_kwargs=True, always_call=True)
    filled = {name for name, value in vars(module).items() if isinstance(value, dict) and value and "forward" in name}
    expect(filled == tables, f"hooks stand in {sorted(filled)}, expected {sorted(tables)}")
    drop_hook(vars(module), repr)
    expect(not any(vars(module)[name] for name in tables), "a dropped hook leaves something behind")
    expect(held(torch.nn.ModuleDict({"inner": module}), "inner") is module, "a submodule is not in _modules")
    before = times_written(x)
    x += 1
    expect(times_written(x) > before, "Tensor._version does not count writes")


KERNELS_WITH_LSE = {
    "cpu": "_scaled_dot_product_flash_attention_for_cpu",
    "half": "_scaled_dot_product_flash_attention",
    "single": "_scaled_dot_product_efficient_attention",
}
"""Torch's own kernels of attention that give log-sum-exps: on CPUs, and on GPUs in half and in single precision."""


def attention_with_lse(q: Any, k: Any, v: Any, scale: float) -> tuple[Any, Any] | None:
    """Attend by the kernel that torch would take, (B, H, S, D) each, and keep the logarithm of each row's sum of exponentials.

    Returns
    -------
    out : (B, H, S_q, D), and lse : float32 (B, H, S_q); None on devices whose kernels do not give it.
    """
    import torch

    if q.device.type not in ("cpu", "cuda"):
        return None
    single = q.dtype == torch.float32
    kernel = "cpu" if q.device.type == "cpu" else "single" if single else "half"
    more = (None, True) if kernel == "single" else ()  # no bias, and the log-sum-exp
    out, lse = getattr(torch.ops.aten, KERNELS_WITH_LSE[kernel])(q, k, v, *more, scale=scale)[:2]
    return out, lse[..., : q.shape[-2]]


@contract("torch: kernels of attention that give log-sum-exps")
def _log_sum_exps() -> None:
    import torch

    for name in KERNELS_WITH_LSE.values():
        expect(hasattr(torch.ops.aten, name), f"torch.ops.aten has no {name}")
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    found = attention_with_lse(q, k, k, 0.5)
    logits = 0.5 * q @ k.mT
    expect(found is not None and torch.allclose(found[1], logits.logsumexp(-1), atol=1e-5), "another log-sum-exp")
    expect(found is not None and torch.allclose(found[0], logits.softmax(-1) @ k, atol=1e-5), "another output")


@contract("torch: a mode of functions is asked for attention")
def _attention_goes_through_modes() -> None:
    import torch
    from torch.overrides import TorchFunctionMode

    asked = []

    class Asked(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(1, 1, 2, 8)
    with Asked():
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    expect(asked == [torch.nn.functional.scaled_dot_product_attention], f"a mode was asked for {asked}")
