"""The host of image encoders of transformers: DINOv2, SigLIP, CLIP, ViT and their kin, alone or as the vision tower of another model.

The way in is that of language models: one attention function under a private name, and for every attention module that a rule names
a live view of its config. The module is given q, k and v; how their tokens lie is told by what the tower itself was given: the size of
the pictures, or the grids of several that are packed into one sequence.

A `Piece` attends to itself alone: a batch of pictures of one size, the rows of a padded batch that have one size, or one picture of a
packed sequence. Each has a layout and a plan of its own. A forward is a run: nothing outlives it.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from accelplug import compat
from accelplug.bounded import Bounded
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.errors import NoMatchError, UnsupportedError
from accelplug.families.encoders import Encoder, list_encoders, patch_hw, raster_places, window_units, windowed_layers
from accelplug.hosts import interface
from accelplug.hosts.answering import AnsweringByForward, OneForward, asks_for_gradients
from accelplug.hosts.entrance import Entrance, Within
from accelplug.hosts.forecast import Forecast, Forecaster
from accelplug.hosts.gate import Verdict
from accelplug.hosts.host import Host, Setup
from accelplug.hosts.models import attends, flat_config, is_image_encoder, is_of_timm, towers_of
from accelplug.hosts.record import given
from accelplug.hosts.site import Settled, SiteRecord, scale_of
from accelplug.hosts.stream import STREAM
from accelplug.hosts.undo import Undo
from accelplug.recipe import ModelFacts


@dataclass(frozen=True, eq=False)
class Piece:
    """Tokens that attend to each other and to no others.

    Attributes
    ----------
    layout : how they lie, once they are in raster order.
    rows : of the batch, int64 (n,); None for all.
    tokens : of the sequence; None for all.
    raster : int64 (S,), which of them has each place of the raster; None where they come in it.
    """

    layout: Layout
    rows: Tensor | None = None
    tokens: slice | None = None
    raster: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether it is all of a call, as it comes."""
        return self.rows is None and self.tokens is None and self.raster is None

    def of(self, x: Tensor) -> Tensor:
        """Take it out of a call's tensor (B, H, S, D)."""
        x = x if self.rows is None else x[self.rows.to(x.device)]
        x = x if self.tokens is None else x[:, :, self.tokens]
        return x if self.raster is None else x[:, :, self.raster.to(x.device)]

    def put(self, out: Tensor, answer: Tensor) -> None:
        """Put its answer where it was taken from."""
        if self.raster is not None:
            answer = torch.empty_like(answer).index_copy_(2, self.raster.to(answer.device), answer)
        rows = slice(None) if self.rows is None else self.rows.to(out.device)
        out[rows, :, slice(None) if self.tokens is None else self.tokens] = answer


@dataclass(eq=False)
class Brought(OneForward):
    """What one forward of a tower brought, and what was settled for it.

    Attributes
    ----------
    pieces : what its calls are made of, in order; none where how its tokens lie is not understood, and `reason` says why.
    tokens : of the sequence.
    calls : by attention module, how many calls came: packed pictures may come one by one.
    masks : what masks came to, by their id, and the masks themselves.
    """

    pieces: tuple[Piece, ...] = ()
    tokens: int = 0
    reason: str | None = None
    calls: Counter[str] = field(default_factory=Counter)
    masks: dict[int, tuple[Any, Tensor | None]] = field(default_factory=dict)

    def of_call(self, module: str, tokens: int) -> tuple[Piece, ...]:
        """Return the pieces of a call; none where it has another number of tokens than they."""
        if tokens == self.tokens:
            return self.pieces
        piece = self.pieces[self.calls[module] % len(self.pieces)]  # the model calls for one after the other
        self.calls[module] += 1
        return (replace(piece, tokens=None),) if piece.layout.length == tokens else ()


class _OfThread(threading.local):
    """The forward that a thread is in."""

    def __init__(self) -> None:
        self.brought: Brought | None = None


class EncoderHost(AnsweringByForward, Host):
    """One image encoder with the attention of some layers answered by patches.

    Parameters
    ----------
    name, tower, family : the part.
    setup : what the plug hands in.
    """

    library = "transformers"
    called = "an image encoder"
    expects = "a transformers image encoder of a known family (DINOv2, SigLIP, CLIP, ViT ...)"
    gives = "features"
    serves = frozenset({"sparse", "tokens", "bias"})
    abilities = dict.fromkeys(("compare", "inspect"), "an image encoder")

    @classmethod
    def knows(cls, model: Any) -> bool:
        """Whether it is given pictures and has no decoder."""
        return is_image_encoder(model)

    @classmethod
    def parts(cls, model: Any) -> dict[str, Any]:
        """Return the towers.

        Raises
        ------
        UnsupportedError
            If its family is not known, or it is not of transformers.
        """
        if is_of_timm(model):
            raise UnsupportedError(
                f"{type(model).__name__} is a model of timm, whose attention modules look no kernel up: there is no way in that can be "
                "taken back. Load the weights in transformers, where there are such: Dinov2Model, SiglipVisionModel ..."
            )
        found = {name: tower for name, (tower, _) in towers_of(model).items()}
        if not found:
            known = ", ".join(family.name for family in list_encoders())
            raise UnsupportedError(
                f"{type(model).__name__} is an image encoder of a family that is not known: expected {known}. Say how its patches lie: "
                "accelplug.families.encoders.register_encoder(Encoder(...))."
            )
        return found

    @classmethod
    def facts(cls, model: Any) -> ModelFacts:
        """Return the classes of the model and of its first tower, and the tower's config."""
        return facts_of_tower(next(iter(cls.parts(model).values())), model)

    @classmethod
    def of(cls, model: Any, parts: Mapping[str, Any], setup: Setup) -> list[EncoderHost]:
        """Make a host for each tower.

        Raises
        ------
        NoMatchError
            If none has attention that can be entered.
        """
        made = [cls(name, tower, family, setup) for name, (tower, family) in towers_of(model).items()]
        if not any(host.records for host in made):
            raise NoMatchError(
                f"{type(model).__name__} has no attention that can be entered: expected modules with a config that call transformers' "
                f"attention interface; {sum(len(host.skipped) for host in made)} of its layers read windows."
            )
        return made

    def __init__(self, name: str, tower: Any, family: Encoder, setup: Setup) -> None:
        super().__init__(tower, setup)
        self.name, self.family = name, family
        self.enters = setup.enters
        self.signature = inspect.signature(type(tower).forward)
        self.skipped: dict[str, str] = {}
        self.records = self._records()
        self.named = [record for record in self.records if self.decide(record.site, None, Clock()).chosen]
        """The attention modules that rules name."""
        self.forecaster = Forecaster(name, self.meter, self.records, self.passed, self.decide, self.gate, stepped=False)
        self._orders: Bounded[tuple[int, ...], Tensor] = Bounded(64)
        self._here = _OfThread()
        self._came_through = False

    def _records(self) -> list[EncoderRecord]:
        modules = [(path, module) for path, module in self.root.named_modules() if attends(module)]
        windowed = windowed_layers(self.root.config, len(modules))
        self.skipped |= {modules[layer][0]: "it reads windows by the model's own design" for layer in windowed}
        takes = tuple(sorted(self.serves))
        return [
            EncoderRecord(
                self, module, Site(path, self.name, "self", layer, len(modules), takes=takes), config=module.config
            )
            for layer, (path, module) in enumerate(modules)
            if layer not in windowed
        ]

    # ------------------------------------------------------------------------------------------------- in and out

    def install(self, undo: Undo) -> None:
        """Put the function, views and hooks in place; `undo` restores what is then still ours."""
        undo.add(partial(interface.leave, self))
        interface.enter(self)
        for record in self.named:
            if STREAM in vars(record.module):
                raise UnsupportedError(
                    f"A patch of the recipe reads the vision tower's attention at {record.site.module}, and another shall answer it. "
                    "Take one of them."
                )
            undo.put(record.module, STREAM, Door(record))
            undo.put(record.module, "config", compat.transformers.config_view(record.config, compat.transformers.ATTENTION))
            if self.enters:
                Entrance(record).install(undo)
        undo.hook(self.root, "register_forward_hook", self._leave_forward, always_call=True)
        undo.hook(self.root, "register_forward_hook", self._after_forward)
        undo.hook(self.root, "register_forward_pre_hook", self._before_forward, with_kwargs=True)

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            compat.torch.comptime()(_begin_at_trace)
            return
        if module is not self.root:  # a deep copy of it
            return
        self.collect()
        inputs = given(self.signature, args, kwargs)
        self.begin(inputs)
        pixels = next((x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()), None)
        if pixels is not None and self.gate.mode != "off" and self.gate.may_time(pixels.device):
            self.meter.begin(tuple(pixels.shape), pixels.dtype, pixels.device)

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Begin a forward. Where every call of it is one piece, settle what runs, for compiled code too."""
        brought = self._here.brought = self._understood(inputs)
        self.passed.note(self.now)
        one = brought.pieces[0] if len(brought.pieces) == 1 and brought.pieces[0].whole else None
        for record in self.named:
            layout, device = None if one is None else one.layout, _device_of(record.module)
            record.settled = self.settled_in(brought, record.site, layout, device)

    def _understood(self, inputs: Mapping[str, Any]) -> Brought:
        """Say how the tokens of a forward lie, by its arguments."""
        pixels, config = inputs.get("pixel_values"), self.root.config
        if self.family.pixels == "images":
            if not isinstance(pixels, Tensor) or pixels.ndim != 4:
                return Brought(reason="it was given no pixel_values (B, C, H, W)")
            rows, columns = (int(length) // size for length, size in zip(pixels.shape[-2:], patch_hw(config), strict=True))
            layout = Layout((1, rows, columns), self.family.ahead(config))
            return Brought((Piece(layout),), layout.length)
        if torch.compiler.is_compiling():
            return Brought(reason="compiled code does not say how large its pictures are")
        return self._padded(inputs) if self.family.pixels == "padded" else self._packed(inputs)

    def _padded(self, inputs: Mapping[str, Any]) -> Brought:
        """Rows of one size are a piece, without their padding."""
        pixels, shapes = inputs.get("pixel_values"), inputs.get("spatial_shapes")
        if not isinstance(pixels, Tensor) or not isinstance(shapes, Tensor):
            return Brought(reason="it was given no pixel_values (B, N, C) with spatial_shapes (B, 2)")
        by_size: dict[tuple[int, int], list[int]] = {}
        for row, (height, width) in enumerate(shapes.tolist()):
            by_size.setdefault((height, width), []).append(row)
        pieces = []
        for (height, width), rows in by_size.items():
            tokens = None if height * width == pixels.shape[1] else slice(0, height * width)
            pieces.append(Piece(Layout((1, height, width)), None if len(by_size) == 1 else torch.tensor(rows), tokens))
        return Brought(tuple(pieces), pixels.shape[1])

    def _packed(self, inputs: Mapping[str, Any]) -> Brought:
        """Every frame of every picture is a piece, in the order of the sequence."""
        grids, config = inputs.get("grid_thw"), self.root.config
        if not isinstance(grids, Tensor) or inputs.get("window_index") is not None:
            return Brought(reason="it was given no grid_thw (N, 3), or an order of its own")
        pieces: list[Piece] = []
        start = 0
        for frames, rows, columns in grids.tolist():
            raster = self._raster(rows, columns, config.spatial_merge_size, window_units(config))
            for _ in range(frames):
                pieces.append(Piece(Layout((1, rows, columns)), None, slice(start, start + rows * columns), raster))
                start += rows * columns
        return Brought(tuple(pieces), start)

    def _raster(self, *order: int) -> Tensor:
        """Which token of a packed picture has each place of its raster; see `raster_places`."""
        return self._orders.get(order, lambda: torch.tensor(raster_places(*order)).argsort())

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling() or module is not self.root:
            return
        self.meter.end()
        if not self._came_through:  # once is enough
            self._came_through = True
            for path in self.unrouted():
                self.ledger.fell_back(path, "its attention never came by in the first forward")
        self.check_rules(False)

    def _leave_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not torch.compiler.is_compiling() and module is self.root:
            self._here.brought = None

    # --------------------------------------------------------------------------------------------- the call itself

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
        """Answer one eager attention call of `record`, piece by piece."""
        record = cast(EncoderRecord, record)
        record.routed = True
        if isinstance(record.settled.patch, Within) and blocked is None and mask is None:
            return self._answer(record, record.settled, (q, k, v), None, scale, dense)
        pieces, valid, reason = self._taken(record.site, q, mask, blocked)
        found = [self.settled_in(self._here.brought, record.site, piece.layout, q.device) for piece in pieces]
        if not any(here.patch for here in found):
            here = found[0] if found else self.left_dense(record.site, reason)
            return self._answer(record, here, (q, k, v), None, scale, dense)
        if pieces[0].whole:
            return self._answer(record, found[0], (q, k, v), valid, scale, dense)
        out = q.new_zeros(*q.shape[:3], v.shape[-1])  # padding says nothing, and nobody reads it
        for piece, here in zip(pieces, found, strict=True):
            parts = piece.of(q), piece.of(k), piece.of(v)
            piece.put(out, self._answer(record, here, parts, None, scale, _dense_on(dense, *parts)))
        return out

    def _answer(
        self,
        record: EncoderRecord,
        here: Settled,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        scale: float | None,
        dense: Callable[..., Tensor],
    ) -> Tensor:
        """Answer one piece."""
        record.settled, q = here, qkv[0]
        clocked = self.meter.clock(q.device)
        if here.reason is not None:
            self.ledger.fell_back(record.site.module, here.reason)
        call = None if here.patch is None else AttentionCall(*qkv, mask, scale_of(q, scale), dense, error=here.error)
        return self.answer(record, here, q, call, here.reason, dense, clocked)

    def _taken(
        self, site: Site, q: Tensor, mask: Any, blocked: str | None
    ) -> tuple[tuple[Piece, ...], Tensor | None, str | None]:
        """The pieces of a call and which keys of theirs may be read, bool (B, S); or none, and why."""
        brought = self._here.brought
        reason = blocked or asks_for_gradients(self.root, q)
        if reason is None and brought is None:
            reason = f"{type(self.root).__name__} itself was not called in this thread"
        if reason is None and brought is not None:
            reason = brought.reason
        if reason is not None or brought is None:
            return (), None, reason
        pieces = brought.of_call(site.module, q.shape[-2])
        if not pieces:
            return (), None, f"{q.shape[-2]} tokens where the pictures have {brought.tokens}"
        if mask is None:
            return pieces, None, None
        if id(mask) not in brought.masks:
            brought.masks[id(mask)] = mask, compat.transformers.keys_that_may_be_read(mask, q.shape[-2])
        valid = brought.masks[id(mask)][1]
        if valid is None:
            return (), None, f"a mask of shape {tuple(getattr(mask, 'shape', ()))} is more than key padding"
        if self.family.pixels == "images":
            return pieces, valid.expand(len(q), -1), None
        for piece in pieces:
            said = valid if piece.rows is None else valid[piece.rows.to(valid.device)]
            if not bool((said == (torch.arange(said.shape[-1], device=said.device) < piece.layout.length)).all()):
                return (), None, "its mask does not say what its spatial_shapes say"
        return pieces, None, None

    # ------------------------------------------------------------------------------------------------------- reports

    def collect(self) -> None:
        """Count what compiled code could not."""
        for record in self.records:
            if record.missed:
                record.missed = False
                self.ledger.fell_back(
                    record.site.module, "a mask, a length or a flag of the compiled call is not understood"
                )

    def unrouted(self) -> list[str]:
        """Modules that a rule names, whose attention never came by."""
        return [r.site.module for r in self.named if r.latest.choice.patch is not None and not r.routed]

    def compiled(self) -> list[str]:
        """What ran in compiled code, where calls are not counted."""
        traced = Counter(r.latest.choice.name if r.latest.patch is not None else "dense" for r in self.records if r.traced)
        return [f"{name} at {number} modules of {self.name}" for name, number in traced.items()]

    def forecasts(self) -> list[Forecast]:
        """What the timings so far predict, by size of the pictures."""
        return self.forecaster.forecasts()

    def share_of(self, verdict: Verdict) -> float | None:
        """Share in a forward of the calls that a verdict is about; None where none was measured."""
        return self.meter.share_of(verdict)


def facts_of_tower(tower: Any, model: Any = None) -> ModelFacts:
    """Return what recipes match a tower by: its classes, behind those of the model around it, and its config."""
    names = dict.fromkeys(kind.__name__ for one in (model, tower) if one is not None for kind in type(one).__mro__)
    return ModelFacts(tuple(names), flat_config(tower.config.to_dict()), encoder=True)


@dataclass(eq=False)
class EncoderRecord(SiteRecord):
    """What stands at one attention module of an image encoder."""

    site: Site
    config: Any = None
    """The module's own config."""


@dataclass(frozen=True, eq=False)
class Door:
    """Stands at an attention module, and hands what transformers asks to its record. Read inside compiled graphs."""

    record: EncoderRecord

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, forward: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Answer one call: (B, H, S, D) in, ((B, S, H, D_v), probabilities or None) out."""
        config = self.record.config
        name = compat.transformers.attention_name(config)
        base = compat.transformers.attention_function(name, type(module))
        asked = compat.transformers.seen_by(name, module, config)
        scale, its_own, maps = kwargs.get("scaling"), mask, [None]
        blocked = compat.transformers.adds_to_attention(module, kwargs)
        if not torch.compiler.is_compiling() and compat.transformers.attention_is_collected():
            blocked = "attention maps are asked for"

        def dense(
            q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None, *, attn_mask: Any = its_own
        ) -> Tensor:
            q, k, v = (own if x is None else x for own, x in zip(of_call, (q, k, v), strict=True))
            if attn_mask is not its_own and attn_mask is not None:
                return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)
            more = kwargs if q is of_call[0] else compat.transformers.of_one_sequence(kwargs, q, k)
            out, maps[0] = base(asked, q, k, v, attn_mask, **more)
            return out.transpose(1, 2)

        of_call = q, k, v
        out = self.record.attend(q, k, v, mask, scale, dense, blocked)
        return out.transpose(1, 2), None if blocked is None else maps[0]


def _dense_on(dense: Callable[..., Tensor], *piece: Tensor) -> Callable[..., Tensor]:
    """Dense attention of one piece, whose tokens may all be read."""

    def answer(
        q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None, *, attn_mask: Tensor | None = None
    ) -> Tensor:
        q, k, v = (own if x is None else x for own, x in zip(piece, (q, k, v), strict=True))
        return dense(q, k, v, attn_mask=attn_mask)

    return answer


def _device_of(module: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in module.parameters()), None)


def _begin_at_trace(ctx: Any) -> None:
    """Settle a tower while Dynamo traces its pre-hook: the shapes are known, the tensors are fake."""
    host, args, kwargs = (compat.torch.traced_value(ctx, name) for name in ("self", "args", "kwargs"))
    host.begin(given(host.signature, args, kwargs))
