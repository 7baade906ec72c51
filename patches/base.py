"""What every method is made of: a `Config`, and two halves, `prepare` (eager) and `attend` (traced)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from accelplug.errors import AccelplugError, RecipeError, refused_values
from accelplug.kernels.orders import Tiles
from accelplug.kernels.plan import BlockPlan
from accelplug.kernels.spans import unit_values
from accelplug.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall, Behind, Clock, KeptKeys, Kind, Site


MAX_NUMBER = (1 << 31) - 1
"""Largest size of any number in a config: beyond it nothing has a meaning, and kernels count in 32 bits."""


class Config(BaseModel):
    """Base of all configs: unknown keys, infinities, NaN and numbers beyond `MAX_NUMBER` are errors; values do not change.

    A field that takes a `Table` holds every entry of it against what it would take as one value for all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    layer_numbers: ClassVar[frozenset[str]] = frozenset()
    """Fields that are layers, or ranges of them, 0-based: a recipe may tell them in percent of the model's depth."""

    @classmethod
    def read(cls, given: Any, what: str) -> Self:
        """Return settings from a mapping or from such settings; None for the defaults. `what` they are is told in errors.

        Raises
        ------
        RecipeError
            If a key is unknown, or has a value that it cannot have.
        """
        try:
            return cls.model_validate({} if given is None else given)
        except ValidationError as error:
            raise RecipeError(f"{what}: {refused_values(error, cls.model_fields)}.") from error

    @classmethod
    def kinds(cls, field: str) -> tuple[Any, ...]:
        """Return the types that a field may have, without their bounds: ``float``, ``Table``, a ``Literal`` ..."""
        return tuple(get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in cls._choices(field))

    @classmethod
    def _choices(cls, field: str) -> tuple[Any, ...]:
        annotation = cls.model_fields[field].annotation
        return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)

    @field_validator("*")
    @classmethod
    def _values_are_sound(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, Table):
            value.require_entries(*cls._choices(info.field_name or "")[:2])
        elif any(abs(number) > MAX_NUMBER for number in _scalars(value)):
            raise ValueError(f"numbers go to {MAX_NUMBER} in size")
        return value


def _scalars(value: Any) -> Iterator[float]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _scalars(item)
    elif isinstance(value, int | float):
        yield value


Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Of random draws."""
Numbers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
"""Of heads or dimensions, 0-based."""


NEEDS = frozenset(
    [
        "hidden_states",
        "blind",
        "ahead",
        "vision_attention",
        "turns",
        "whole_prompt",
        "answers",
        "scores",
        "probabilities",
        "cache",
        "first_forward",
        "logits",
        "rehearsal",
    ]
)
"""All that a `Patch` may need of its host."""


@dataclass(frozen=True, eq=False)
class Inside:
    """What stands in the place of what enters the projections of an attention module.

    Attributes
    ----------
    hidden : (B, n, C), what enters now.
    attend : answers the attention call among these.
    leave : makes what leaves the module, (B, n, C'), into what leaves it for all tokens, (B, N, C').
    """

    hidden: Tensor
    attend: Callable[[AttentionCall], Tensor]
    leave: Callable[[Tensor], Tensor]


class Patch:
    """One method. A subclass nests its `Config`, and writes `prepare` and `attend`; its module says what it is, with the paper's
    equations, shapes and units.

    `prepare` runs outside every compiled graph, when the layout, the step's policy or a table changes. `attend` is traced:
    it sees tensors and what `prepare` returned, neither the site nor the clock.
    """

    Config: ClassVar[type[Config]] = Config
    name: ClassVar[str] = ""
    """What recipes call it. With `cite`, `summary` and `family` for patches of other packages: those of ours stand in the registry."""
    cite: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    family: ClassVar[str] = ""
    kinds: ClassVar[tuple[Kind, ...]] = ("self", "joint")
    """Patches of other packages: the kinds of attention that rules without ``kind`` mean; cross-attention is for those that have it."""
    writes: ClassVar[tuple[str, ...]] = ("prepare", "attend")
    """The methods that a subclass must write."""
    ladder: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Patches of other packages: settings that `accelplug.tune` tries where it is told to try the patch, the likeliest first."""
    Calibration: ClassVar[type[Any] | None] = None
    """What `accelplug.calibrate` measures for the method, where it takes tables: a `patches.calibration.Calibration`."""
    needs: frozenset[str] = frozenset()
    """What the host must supply or refuse, of `NEEDS`. All are a language model's:

    ``hidden_states`` : what enters the layer.
    ``blind`` : outputs of the same prompt with its image tokens removed.
    ``ahead`` : a plain forward over the prompt before the one that answers; `prepare` is called in it with phase ``ahead``.
    ``vision_attention`` : attention maps of the vision tower.
    ``turns`` : where the system's turn ends and the user's begins.
    ``whole_prompt`` : the prompt in one forward, not in pieces.
    ``answers`` : as ``whole_prompt``, but later turns may follow: a row that answers is known when it is read.
    ``scores`` : what is added to q.k is added to what the softmax takes; no soft cap comes between.
    ``probabilities`` : q, k and the mask say in full what the softmax takes; no sink logits, soft cap or position bias.
    ``first_forward`` : the first prompt of a sequence in one forward, which `generate` may not cut; further turns may follow.
    ``cache`` : a dynamic cache, in whose place it may `keep` keys and values.
    ``rehearsal`` : to stand around ``generate``, as a `GenerationPatch` does, beside attending.
    ``logits`` : `learn` is told what came of every forward. Rows keep their places: no beams, no drafts.
    """
    speed: ClassVar[bool] = True
    """Whether the method exists to be faster: such a patch is left dense where it would not pay (`gate="auto"`)."""
    estimates: bool = False
    """Whether `attend` writes an estimate of its error into ``call.error``, and may take ``call.ticket``; may be a property."""
    enters: bool = False
    """Denoisers and image encoders: whether the host calls `enter` in the place of `attend`; may be a property."""
    ahead: ClassVar[bool] = False
    """Denoisers: whether it takes part in a forward ahead of the one that answers, with phase ``ahead``; others are dense there."""
    repairs: str = ""
    """How `attend` takes its own error off, in words; empty where it does not; may be a property."""
    about_images: ClassVar[bool] = True
    """Of a language model's patch: whether a prompt without an image is nothing to it, and is left as it is."""
    processor: Any = None
    """A vision-language model's processor, where one was given to `accelplug.apply`."""

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config.read(config, f"Settings of {type(self).__name__}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.config)})"

    def check(self, sites: Sequence[Site], heads: int, width: int) -> None:
        """Refuse a config that cannot work at the sites that a language model's rules give it, of `heads` heads and `width` channels.

        Called at apply.

        Raises
        ------
        AccelplugError
        """

    def prepare(self, site: Site, layout: Any, clock: Clock, state: dict[str, Any]) -> Any:
        """Return what `attend` needs here and now (tensors and floats), None to run dense, or why it must, which is counted.

        * Denoiser: `layout` is a `Layout`. Called when the layout, the step's policy or a table changes. `state` belongs to one site
          and guidance branch; its key "shared" holds a dict that all sites of the branch share.
        * Language model, prefill: `layout` is a `Prompt`. Called at every layer of a forward that reads a prompt. `state` belongs to
          the sequence and is shared by all layers; `attend` may write to it, since prefill is never compiled.
        * Language model, decode: called once, ahead of time, for all decode steps that follow.
        * `state` lives until the end of the run, or of the sequence.
        """
        raise UnimplementedHalf(type(self), "prepare")

    def keep(self, keys: Tensor, values: Tensor, params: Any) -> KeptKeys | None:
        """Return what keeps a cache layer's keys and values (B, H_kv, S, D) from now on; None leaves them as they are.

        Asked of language models' patches that need ``cache``, once a prompt was read, with what `prepare` returned for decode steps.
        Later calls of the layer have it as ``call.kept``, until the cache is reset.
        """
        return None

    def learn(self, behind: Behind, state: dict[str, Any]) -> None:
        """Take in what came of a forward, outside of every graph; `state` is what `prepare` is given for the sequence.

        Asked of language models' patches that need ``logits``. Tensors in params are changed in their place: decode steps have them.
        """

    def idles(self, call: AttentionCall, params: Any) -> bool:
        """Whether a language model's call is better left to the model's own attention, which is counted as dense: a short sequence."""
        return False

    def declines(self, call: AttentionCall, params: Any) -> str | None:
        """Return why a language model's call must run dense for reasons that `prepare` cannot see, which is counted; None to attend."""
        return None

    def attend(self, call: AttentionCall, params: Any) -> Tensor:
        """Return the attention output (B, H, S_q, D_v)."""
        raise UnimplementedHalf(type(self), "attend")

    def enter(self, hidden: Tensor, params: Any) -> Inside:
        """Return what is put in the place of what enters an attention module, (B, N, C), where `enters`; `hidden` itself to look at it.

        Fewer tokens can enter modules that are given nothing else for each of them, as position embeddings are.
        """
        raise UnimplementedHalf(type(self), "enter")

    def wants_ahead(self, params: Any) -> bool:
        """Whether a denoiser's forward to come is to be run once ahead; asked anew behind that."""
        return False

    def attention(self, call: AttentionCall, params: Any) -> Tensor:
        """Return where heads look, (B, H, S_q, S_k), for users who ask a language model for it: what `attend` makes of unit vectors."""
        return self.attend(unit_values(call), params)

    def choose_backend(self, call: AttentionCall, params: Any) -> None:
        """Time the kernels that could answer `call` and remember the fastest. Nothing to choose by default."""

    def inspect(self, call: AttentionCall, params: Any) -> tuple[float | None, BlockPlan | None]:
        """Return what `call` costs as a fraction of dense, and its block plan, where there are such things."""
        return None, None

    def kept(self, call: AttentionCall, params: Any, plan: BlockPlan | None) -> Tensor | None:
        """Return the share of its true attention that each head finds in what is read, float32 (B, H), from a few exact rows; or None.

        `plan` is what `inspect` returned.
        """
        return None

    def shared_order(self, params: Any) -> Tiles | None:
        """Return the order into which every call with these params puts its tokens, where they could come in it; None if not."""
        return None

    def in_order(self, params: Any) -> Any:
        """Return the params of a call whose tokens come in the order that `shared_order` gave."""
        return params


class UnimplementedHalf(AccelplugError, TypeError):
    """A `Patch` subclass lacks a method that it must write."""

    def __init__(self, cls: type, half: str) -> None:
        super().__init__(f"{cls.__name__} must define {half}(); see docs/extending.md.")
