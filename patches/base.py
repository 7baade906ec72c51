"""What every method is made of: a `Config`, and two halves, `prepare` (eager) and `attend` (traced)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from accelplug.bounded import Bounded
from accelplug.kernels.attention import Backend, block_attention, measure_choice
from accelplug.kernels.orders import Tiles, tiles
from accelplug.kernels.plan import BlockPlan, Threshold, pool
from accelplug.kernels.rest import Drop, Pool

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import AttentionCall, Clock, Layout, Site
    from accelplug.families.vlm import Vlm


class Config(BaseModel):
    """Base of all configs: unknown keys, infinities and NaN are errors; values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Patch:
    """One method. Subclasses set `Config`, and write `prepare` and `attend`.

    `prepare` runs outside every compiled graph, when the layout, the step's policy or a table changes. `attend` is traced:
    it sees tensors and what `prepare` returned, neither the site nor the clock.
    """

    Config: ClassVar[type[Config]] = Config
    cite: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What the host must supply or refuse. Language models: ``hidden_states``, what enters the layer; ``blind``, a reading without the
    images; ``vision_attention``, the vision tower's; ``whole_prompt``, no prompt in pieces; ``probabilities``, scores that q, k and the
    mask say in full.
    """
    speed: ClassVar[bool] = True
    """Whether the method exists to be faster: such a patch is left dense where it would not pay (`gate="auto"`)."""
    processor: Any = None
    """A vision-language model's processor, where one was given to `accelplug.apply`."""

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config.model_validate(config or {})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"

    def prepare(self, site: Site, layout: Any, clock: Clock, state: dict[str, Any]) -> Any:
        """Return what `attend` needs here and now (tensors and floats), or None to run dense.

        `layout` is a `Layout` for denoisers and a `Prompt` for language models. There it is called at every layer of a forward
        that reads a prompt, and once, ahead of time, for all decode steps that follow; `state` is the sequence's own, shared by
        all layers, and `attend` may write to it while the prompt is read, which is never compiled.
        """
        raise UnimplementedHalf(type(self), "prepare")

    def attend(self, call: AttentionCall, params: Any) -> Tensor:
        """Return the attention output (B, H, S_q, D_v)."""
        raise UnimplementedHalf(type(self), "attend")

    def choose_backend(self, call: AttentionCall, params: Any) -> None:
        """Time the kernels that could answer `call` and remember the fastest. Nothing to choose by default."""

    def inspect(self, call: AttentionCall, params: Any) -> tuple[float | None, BlockPlan | None]:
        """Return what `call` costs as a fraction of dense, and its block plan, where there are such things."""
        return None, None


@dataclass(frozen=True, eq=False)
class Tools:
    """What a `GenerationPatch` is lent by its host. ``inputs`` are arguments of ``generate`` by name.

    Attributes
    ----------
    processor : what was given to `accelplug.apply`, or None.
    family : the model's family, None where it is not known.
    watch : ``with watch(look):`` has ``look(record, call, prompt, clock)`` see every attention call of this thread.
    images : inputs -> int16 (B, S), which image of its row a token shows, from 1; 0 for text and padding.
    grids : inputs -> rows and columns of tokens of each picture, in order.
    pictures : inputs -> the pictures, (3, H, W) float32 each, normalised: 0 is the mean pixel.
    replace : (inputs, pictures) -> inputs with other pictures of the same sizes.
    prompt_like : (inputs, text) -> inputs with the same images and another question, by the processor's chat template.
    questions : inputs -> the text that each row asks behind its image.
    matcher : folder -> a ``BlipForImageTextRetrieval`` and its tokenizer, read from there.
    """

    processor: Any
    family: Vlm | None
    watch: Callable[[Callable[..., None]], AbstractContextManager[None]]
    images: Callable[[Mapping[str, Any]], Tensor]
    grids: Callable[[Mapping[str, Any]], list[tuple[int, int]]]
    pictures: Callable[[Mapping[str, Any]], list[Tensor]]
    replace: Callable[[Mapping[str, Any], Sequence[Tensor]], dict[str, Any]]
    prompt_like: Callable[[Mapping[str, Any], str], dict[str, Any]]
    questions: Callable[[Mapping[str, Any]], list[str]]
    matcher: Callable[[str], tuple[Any, Any]]


class GenerationPatch(Patch):
    """A method that needs more than one forward: it stands around ``generate``. Several of them nest, the first outermost."""

    speed = False

    def generate(self, model: Any, call: Callable[..., Any], inputs: dict[str, Any], tools: Tools) -> Any:
        """Return what ``call(**inputs)`` would have returned, the method applied.

        Parameters
        ----------
        model : the model, for passes of the method's own; its ``generate`` is the plain one here.
        call : ``generate`` as it is without this patch.
        inputs : arguments of ``generate``, by name, ``input_ids`` among them.
        tools : what the host lends.
        """
        raise UnimplementedHalf(type(self), "generate")


class UnimplementedHalf(TypeError):
    """A `Patch` subclass lacks one of its two halves."""

    def __init__(self, cls: type, half: str) -> None:
        super().__init__(f"{cls.__name__} must define {half}(); see accelplug/patches/base.py.")


class BlockConfig(Config):
    """The keys that all block-sparse methods share."""

    block: int = Field(128, ge=8, le=1024, multiple_of=8, description="Slots per query and key block.")
    rest: Literal["drop", "pool"] = Field("drop", description="What becomes of the key blocks that are not selected.")
    rest_weight: float = Field(1.0, ge=0.0, le=1.0, description="Factor on log(length) of a pooled block (rest: pool).")
    backend: Backend = Field("auto", description="Kernel that runs the plan: auto, triton, flex, blocked or reference.")


@dataclass(frozen=True, eq=False)
class BlockParams:
    """What a block-sparse `attend` needs: the tiles, and the plan where it does not depend on the scores."""

    tiles: Tiles
    plan: BlockPlan | None

    def to(self, device: torch.device | str) -> BlockParams:
        """Return the params with their tensors on `device`."""
        return BlockParams(self.tiles.to(device), self.plan and self.plan.to(device))


@dataclass(frozen=True, eq=False)
class Scores:
    """What a selector by scores sees: pooled queries (B, H, M, D) and keys (B, H, N, D), float32, and the scale.

    `k_number`, float32 (B|1, 1, N), is how many keys each pooled key is the mean of; 0 where all are masked.
    """

    q_pool: Tensor
    k_pool: Tensor
    k_number: Tensor
    scale: float


class BlockSparse(Patch):
    """Template of the block-sparse methods: order, select, run the kernel, un-order.

    A subclass writes `select`, and `order` where tokens do not lie in raster order. With ``static = True`` the plan depends on
    the layout alone and is made once in `prepare`; otherwise `select` is called with pooled scores, inside the graph.
    """

    Config: ClassVar[type[Config]] = BlockConfig
    static: ClassVar[bool] = True
    config: BlockConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._prepared: Bounded[Layout, BlockParams] = Bounded(16)

    def neutral(self, layout: Layout) -> bool:
        """Whether this config reads every key of `layout`: then the call runs dense, bit for bit."""
        return False

    def order(self, layout: Layout) -> Tiles:
        """Return how tokens line up in blocks; raster by default."""
        return tiles(layout, "raster", self.config.block)

    def select(self, tiles: Tiles, scores: Scores | None = None) -> BlockPlan | Threshold:
        """Return the key blocks that each query block reads; text rows and text columns must be among them."""
        raise UnimplementedHalf(type(self), "select")

    def prepare(self, site: Site, layout: Layout, clock: Clock, state: dict[str, Any]) -> BlockParams | None:
        if self.neutral(layout):
            return None
        return self._prepared.get(layout, lambda: self._params(layout))

    def _params(self, layout: Layout) -> BlockParams:
        tiles = self.order(layout)
        plan = self.select(tiles) if self.static else None
        return BlockParams(tiles, plan)  # type: ignore[arg-type]  # a static selector has no scores to set a threshold on

    def attend(self, call: AttentionCall, params: BlockParams) -> Tensor:
        return params.tiles.unpermute(block_attention(**self._arguments(call, params)))

    def choose_backend(self, call: AttentionCall, params: BlockParams) -> None:
        if self.config.backend == "auto":
            measure_choice(**self._arguments(call, params))

    def inspect(self, call: AttentionCall, params: BlockParams) -> tuple[float, BlockPlan]:
        arguments = self._arguments(call, params)
        plan = arguments["plan"]
        if isinstance(plan, Threshold):
            scores = self._scores(arguments["q"], arguments["k"], params.tiles, arguments["key_mask"], call.scale)
            plan = plan.lower(scores.q_pool, scores.k_pool, call.scale)
        exact = float(plan.density().mean())
        if self.config.rest == "drop":
            return exact, plan
        # A pooled block costs one key.
        pooled_keys = (~plan.members & (plan.k_len > 0)).double().sum(-1) @ plan.q_len.double()
        return exact + float((pooled_keys / (plan.q_len.sum() * plan.k_len.sum())).mean()), plan

    def _arguments(self, call: AttentionCall, params: BlockParams) -> dict[str, Any]:
        """Everything that `block_attention` takes, in block order."""
        tiles = params.tiles
        q, k, v = (tiles.permute(x) for x in (call.q, call.k, call.v))
        key_mask = call.mask
        if key_mask is not None and tiles.gather is not None:
            key_mask = key_mask.index_select(-1, tiles.gather)
        plan: BlockPlan | Threshold | None = params.plan
        if plan is None:
            plan = self.select(tiles, self._scores(q, k, tiles, key_mask, call.scale))
        rest = Drop() if self.config.rest == "drop" else Pool(self._pool_weight(q))
        return {
            "q": q,
            "k": k,
            "v": v,
            "plan": plan,
            "rest": rest,
            "scale": call.scale,
            "key_mask": key_mask,
            "backend": self.config.backend,
        }

    def _scores(self, q: Tensor, k: Tensor, tiles: Tiles, key_mask: Tensor | None, scale: float) -> Scores:
        lengths = tiles.lengths(self.config.block)
        q_pool, _ = pool(q, lengths, self.config.block)
        k_pool, k_number = pool(k, lengths, self.config.block, key_mask)
        return Scores(q_pool, k_pool.repeat_interleave(q.shape[1] // k.shape[1], 1), k_number, scale)

    def _pool_weight(self, q: Tensor) -> Tensor | None:
        if self.config.rest_weight == 1.0:
            return None
        return torch.full((q.shape[1],), self.config.rest_weight, device=q.device)
