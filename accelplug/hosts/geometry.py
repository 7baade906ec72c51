"""The host of geometry transformers: VGGT, pi3, Depth-Anything 3 and their kin, which read all frames of a scene at once.

Blocks that attend within a frame alternate with such that attend over the tokens of all frames. The latter are entered: a frame has
hundreds of tokens, a scene a hundred thousand. No library has these models, so they are known by their attributes
(`families.geometry`), and nothing is asked of an attention module but that it calls ``scaled_dot_product_attention`` somewhere in its
forward. While that runs, a mode of torch's functions is on, which hands the call to us: q, k and v come from the module's own
projections, norms and rotary embedding. No class, module or global is changed.

A call's tokens come frame by frame. A patch sees the special tokens of all frames ahead, then their patches as one grid
(frames, rows, columns), so that patches that know of no frames keep special tokens dense. A forward is a run: nothing outlives it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.errors import UnsupportedError
from accelplug.families.geometry import KNOWN_ALTERNATIONS, Alternation, alternation_of
from accelplug.hosts.answering import AnsweringByForward, OneForward, asks_for_gradients
from accelplug.hosts.host import Host, Setup
from accelplug.hosts.rebind import dense_sdpa
from accelplug.hosts.site import SiteRecord, scale_of
from accelplug.hosts.undo import Undo
from accelplug.kernels.frames import frame_by_frame, specials_first
from accelplug.recipe import ModelFacts


@dataclass(eq=False)
class Glimpse(OneForward):
    """What one forward was given to see, and what was settled for it.

    Attributes
    ----------
    pictures : B * S, of all frames of all scenes.
    rows, columns : patches of a picture.
    """

    pictures: int
    rows: int
    columns: int


class _SeenHere(threading.local):
    """The forward that a thread is in."""

    def __init__(self) -> None:
        self.seen: Glimpse | None = None


class GeometryHost(AnsweringByForward, Host):
    """One geometry transformer with the attention of some global layers answered by patches.

    Parameters
    ----------
    root, family : the module that holds the blocks, and how it is built.
    setup : what the plug hands in.
    """

    library = "torch"
    called = "a geometry transformer"
    expects = "a geometry transformer (VGGT, VGGT-Omega, pi3, Depth-Anything 3)"
    gives = "geometry"
    serves = frozenset({"geometry", "sparse", "tokens"})
    abilities = dict.fromkeys(("compare",), "a geometry transformer")
    name = "geometry"

    @classmethod
    def knows(cls, model: Any) -> bool:
        """Whether blocks alternate in it, in a way that is known or not."""
        return isinstance(model, nn.Module) and any(
            hasattr(module, "frame_blocks") or alternation_of(module) for module in model.modules()
        )

    @classmethod
    def parts(cls, model: Any) -> dict[str, Any]:
        """Return the module that holds the blocks.

        Raises
        ------
        UnsupportedError
            If it is of a family that is not known.
        """
        found = next((module for module in model.modules() if alternation_of(module)), None)
        if found is None:
            known = "; ".join(
                f"{family.name} ({', '.join((family.blocks, *family.beside, family.special, family.eye))})"
                for family in KNOWN_ALTERNATIONS
            )
            raise UnsupportedError(
                f"{type(model).__name__} has frame_blocks and is not a geometry transformer that is known: expected a module with the "
                f"attributes of one of these, and patch_size: {known}. Load the model from its authors' code."
            )
        return {cls.name: found}

    @classmethod
    def facts(cls, model: Any) -> ModelFacts:
        """Return the classes of the model, and what it is made of: its family and its numbers."""
        root = cls.parts(model)[cls.name]
        family = alternation_of(root)
        names = dict.fromkeys(kind.__name__ for one in (model, root) for kind in type(one).__mro__)
        layers = len(family.global_blocks(root)) if family is not None else 0
        return ModelFacts(tuple(names), {"family": family and family.name, "global_layers": layers})

    @classmethod
    def of(cls, model: Any, parts: Mapping[str, Any], setup: Setup) -> list[GeometryHost]:
        """Make the host."""
        root = parts[cls.name]
        family = alternation_of(root)
        return [] if family is None else [cls(root, family, setup)]

    def __init__(self, root: Any, family: Alternation, setup: Setup) -> None:
        super().__init__(root, setup)
        self.family = family
        numbers = family.global_blocks(root)
        blocks = getattr(root, family.blocks)
        self.skipped: dict[str, str] = {}
        self.records = [
            GeometryRecord(
                self,
                blocks[number].attn,
                Site(
                    f"{family.blocks}.{number}.attn",
                    self.name,
                    "self",
                    layer,
                    len(numbers),
                    takes=tuple(sorted(self.serves)),
                ),
            )
            for layer, number in enumerate(numbers)
        ]
        self.named = [record for record in self.records if self.decide(record.site, None, Clock()).chosen]
        """The attention modules that rules name."""
        self._here = _SeenHere()

    @property
    def special(self) -> int:
        """Tokens of its own that a frame has, ahead of its patches."""
        return int(getattr(self.root, self.family.special))

    # ------------------------------------------------------------------------------------------------- in and out

    def install(self, undo: Undo) -> None:
        """Put doors and hooks in place; `undo` restores what is then still ours."""
        for record in self.named:
            undo.put(record.module, "forward", GlobalDoor(record, record.module.forward))
        undo.hook(getattr(self.root, self.family.eye), "register_forward_pre_hook", self._look, with_kwargs=True)
        undo.hook(self.root, "register_forward_hook", self._leave_forward, always_call=True)

    def _look(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Begin a forward: the pictures of all frames come by."""
        pixels = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim == 4), None)
        size = self.root.patch_size
        rows, columns = size if isinstance(size, tuple | list) else (size, size)
        self._here.seen = None
        self.collect()
        self.passed.note(self.now)
        if pixels is not None:
            self._here.seen = Glimpse(len(pixels), pixels.shape[-2] // int(rows), pixels.shape[-1] // int(columns))

    def _leave_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module is self.root:
            self._here.seen = None
            self.check_rules(False)

    # --------------------------------------------------------------------------------------------- the call itself

    def layout(self, q: Tensor) -> Layout | str:
        """Say how the tokens of a call lie, once special ones are first; or why that is not known."""
        seen = self._here.seen
        if seen is None:
            return f"no pictures (B * S, 3, H, W) came by at {self.family.eye}"
        frames = seen.pictures // len(q)
        special = self.special
        layout = Layout(
            (frames, seen.rows, seen.columns), frames * special, special=special, reference=self.family.reference
        )
        if frames * len(q) != seen.pictures or layout.length != q.shape[-2]:
            return (
                f"{q.shape[-2]} tokens where {frames} frames of {seen.rows} x {seen.columns} patches and {special} special tokens "
                f"have {layout.length}"
            )
        return layout

    def attend(
        self,
        record: SiteRecord,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        scale: float | None,
        dense: Callable[..., Tensor],
        blocked: str | None,
    ) -> Tensor:
        """Answer one attention call of `record`; tensors (B, H, S, D), frame by frame."""
        assert isinstance(record, GeometryRecord)
        record.routed = True
        masked = None if mask is None else "its attention has a mask"
        layout = blocked or asks_for_gradients(self.root, q) or masked or self.layout(q)
        if isinstance(layout, str):
            here = self.left_dense(record.site, layout)
        else:
            here = self.settled_in(self._here.seen, record.site, layout, q.device)
        record.settled = here
        if here.reason is not None:
            self.ledger.fell_back(record.site.module, here.reason)
        if here.patch is None or isinstance(layout, str):
            return self.answer(record, here, q, None, here.reason, dense, None)
        parts = layout.grid_thw[0], layout.special
        q, k, v = (specials_first(x, *parts) for x in (q, k, v))
        call = AttentionCall(q, k, v, None, scale_of(q, scale), dense_sdpa(q, k, v, scale=scale), error=here.error)
        return frame_by_frame(
            self.answer(record, here, q, call, None, lambda: specials_first(dense(), *parts), None), *parts
        )

    # ------------------------------------------------------------------------------------------------------- reports

    def collect(self) -> None:
        """Count what compiled code left dense."""
        for record in self.records:
            if record.missed:
                record.missed = False
                self.ledger.fell_back(record.site.module, "compiled code is left dense")

    def unrouted(self) -> list[str]:
        """Modules that a rule names, whose attention never came by: they call no ``scaled_dot_product_attention``."""
        return [record.site.module for record in self.named if not record.routed]


@dataclass(eq=False)
class GeometryRecord(SiteRecord):
    """What stands at one attention module that reads all frames."""

    site: Site


@dataclass(frozen=True, eq=False)
class GlobalDoor:
    """Stands in for an attention module's forward, and has its attention answered by the record."""

    record: GeometryRecord
    forward: Callable[..., Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            self.record.missed = True
            return self.forward(*args, **kwargs)
        with _AttentionAsked(self.record):
            return self.forward(*args, **kwargs)


class _AttentionAsked(TorchFunctionMode):
    """While it is on, what asks torch for attention asks a record."""

    def __init__(self, record: GeometryRecord) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._attend(*args, **kwargs) if func is scaled_dot_product_attention else func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        kind, blocked = query.device.type, "the call has dropout or is causal" if dropout_p or is_causal else None
        casts = torch.is_autocast_enabled(kind)
        if casts:  # what autocast would do next: norms leave queries and keys in float32, and values are not
            query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
        given: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        dense = dense_sdpa(query, key, value, attn_mask=attn_mask, **given)
        with torch.autocast(kind, enabled=False) if casts else nullcontext():
            return self.record.host.attend(self.record, query, key, value, attn_mask, scale, dense, blocked)
