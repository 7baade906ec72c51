"""Which patches there are: ours, a literal table, so that listing them imports neither torch nor a patch; and those of others.

Another package's patch is registered by `register_patch`, or named by an entry point of the group ``accelplug.patches``, which is
read when it is first needed. See docs/extending.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from accelplug.call import Kind
from accelplug.catalog import Catalog, EntryPoints
from accelplug.errors import AccelplugError, NoMatchError, nearest

if TYPE_CHECKING:
    from accelplug.patches.base import Patch

PatchClass = TypeVar("PatchClass", bound="type[Patch]")


@dataclass(frozen=True)
class PatchEntry:
    """One patch: the name recipes use, where its class is, and what it does."""

    name: str
    module: str
    cls: str
    family: str
    """What it changes, a key of `PATCH_FAMILIES`; a rule takes at most one patch of a family."""
    summary: str
    cite: str
    registered: type[Patch] | None = field(default=None, repr=False)
    """The class, where it is not one of ours."""
    kinds: tuple[Kind, ...] = ("self", "joint")
    """The kinds of attention that rules without ``kind`` mean; ``cross`` is for those alone that have it here."""


PATCH_FAMILIES = {
    "sparse": "which keys a denoiser's queries read",
    "tokens": "which of a denoiser's tokens attend",
    "bias": "what is added to a denoiser's scores",
    "texts": "which of several prompts a denoiser's tokens read",
    "geometry": "which tokens of other frames a geometry transformer reads",
    "guidance": "what a denoiser's predictions are led away from",
    "heads": "where a language model's heads look",
    "prefill": "which keys a language model's prompt reads",
    "decode": "which keys a language model's next token reads",
    "memory": "which keys of a language model's sequence are kept",
    "generation": "what stands around a language model's generate",
}
"""What a patch may change, which decides what models take it."""

BENEATH = ("prefill",)
"""Families that stand beneath a head patch of the same layer, for which what they give is dense attention; each has rules of its own."""

Stage = Literal["attention", "beneath", "guidance"]
"""What a rule is about: attention as it answers, what stands beneath that, or a forward beside it, to be guided by. Rules of one stage
leave those of the others alone, but that ``dense`` is for all."""
STAGES: tuple[Stage, ...] = ("attention", "beneath", "guidance")


def stage_of(family: str) -> Stage:
    """Return which stage the patches of a family are chosen for."""
    return "beneath" if family in BENEATH else "guidance" if family == "guidance" else "attention"


RESERVED = ("dense", "rest", "budget", "heads", "layers")
"""Names that mean something else to recipes and to `accelplug.calibrate`."""

_OWN = (
    PatchEntry(
        name="radial",
        module="accelplug.patches.sparse.radial",
        cls="Radial",
        family="sparse",
        summary="Static video mask: the spatial window halves as the distance in time doubles.",
        cite="arXiv 2506.19852",
    ),
    PatchEntry(
        name="neighborhood",
        module="accelplug.patches.sparse.neighborhood",
        cls="Neighborhood",
        family="sparse",
        summary="Every query reads a window around it on the token grid; strided, dilated or causal.",
        cite="arXiv 2504.16922, 2403.04690, 2209.15001",
    ),
    PatchEntry(
        name="sol",
        module="accelplug.patches.sparse.sol",
        cls="Sol",
        family="sparse",
        summary="Key blocks whose pooled score stands out are read exactly, all others through one pooled key each.",
        cite="arXiv 2607.24027",
    ),
    PatchEntry(
        name="rows",
        module="accelplug.patches.sparse.rows",
        cls="SampledRows",
        family="sparse",
        summary="A few exact rows of each query block say which key blocks the others read; the rest is pooled.",
        cite="arXiv 2406.15486",
    ),
    PatchEntry(
        name="proxy",
        module="accelplug.patches.sparse.proxy",
        cls="Proxy",
        family="sparse",
        summary="Near windows are read exactly, each far window through one key that stands for it. Experimental.",
        cite="arXiv 2409.04005",
    ),
    PatchEntry(
        name="tome",
        module="accelplug.patches.tokens.tome",
        cls="Tome",
        family="tokens",
        summary="Tokens that look alike are merged before attention; each key counts as often as it has tokens.",
        cite="arXiv 2303.17604, 2210.09461, 2312.01026, 2509.10918",
    ),
    PatchEntry(
        name="toma",
        module="accelplug.patches.tokens.toma",
        cls="Toma",
        family="tokens",
        summary="The tokens that cover a window best stand for it; every token spreads over those that are like it.",
        cite="arXiv 2509.10918",
    ),
    PatchEntry(
        name="todo",
        module="accelplug.patches.tokens.todo",
        cls="Todo",
        family="tokens",
        summary="Keys and values of one token a cell stand for all of it; queries stay as they are.",
        cite="arXiv 2402.13573",
    ),
    PatchEntry(
        name="agent",
        module="accelplug.patches.tokens.agent",
        cls="Agent",
        family="tokens",
        summary="A few agents, the means of queries, read all keys; queries read the agents. Experimental.",
        cite="arXiv 2312.08874",
    ),
    PatchEntry(
        name="ptdit",
        module="accelplug.patches.tokens.ptdit",
        cls="PtDit",
        family="tokens",
        summary="Windows read each other by proxies, tokens their window and one moved by half: for models trained so. Experimental.",
        cite="arXiv 2409.04005",
    ),
    PatchEntry(
        name="avggt",
        module="accelplug.patches.geometry.avggt",
        cls="Avggt",
        family="geometry",
        summary="Early global layers read their own frame alone, middle ones a token of each window of the others.",
        cite="arXiv 2512.02541",
    ),
    PatchEntry(
        name="fastvggt",
        module="accelplug.patches.geometry.fastvggt",
        cls="FastVggt",
        family="geometry",
        summary="Tokens of all frames are merged into those of the first and of a few cells, and share the result.",
        cite="arXiv 2509.02560",
    ),
    PatchEntry(
        name="spark3r",
        module="accelplug.patches.geometry.spark3r",
        cls="Spark3R",
        family="geometry",
        summary="Queries are merged mildly inside groups, keys and values pruned hard, by a factor of each layer's own.",
        cite="arXiv 2605.06270",
    ),
    PatchEntry(
        name="flashvggt",
        module="accelplug.patches.geometry.flashvggt",
        cls="FlashVggt",
        family="geometry",
        summary="Frames are read through a few descriptors each, key frames whole; trained so there. Approximate, experimental.",
        cite="arXiv 2512.01540",
    ),
    PatchEntry(
        name="freeswim",
        module="accelplug.patches.sparse.freeswim",
        cls="FreeSwim",
        family="sparse",
        summary="Windows of the training size, moved inward at borders, for larger images and frames.",
        cite="arXiv 2511.14712",
    ),
    PatchEntry(
        name="lvsa",
        module="accelplug.patches.sparse.lvsa",
        cls="Lvsa",
        family="sparse",
        summary="Videos longer than trained: each frame reads a window and anchors that move on with every step.",
        cite="arXiv 2605.31057",
    ),
    PatchEntry(
        name="freelong",
        module="accelplug.patches.sparse.freelong",
        cls="FreeLong",
        family="sparse",
        summary="Videos longer than trained: windows and the whole, each for its band of frequencies over time. Experimental.",
        cite="arXiv 2507.00162, 2407.19918",
    ),
    PatchEntry(
        name="svg",
        module="accelplug.patches.sparse.svg",
        cls="Svg",
        family="sparse",
        summary="Each head reads the frames around or the places around; a few queries tell which.",
        cite="arXiv 2502.01776",
    ),
    PatchEntry(
        name="vmoba",
        module="accelplug.patches.sparse.vmoba",
        cls="Vmoba",
        family="sparse",
        summary="Queries or blocks of them choose slabs of frames, columns or cuboids, by turns; all of a head compete. Experimental.",
        cite="arXiv 2506.23858",
    ),
    PatchEntry(
        name="bilevel",
        module="accelplug.patches.sparse.bilevel",
        cls="Bilevel",
        family="sparse",
        summary="Regions read the regions whose means score highest, and those around them.",
        cite="arXiv 2303.08810",
    ),
    PatchEntry(
        name="bias",
        module="accelplug.patches.heads.bias",
        cls="Bias",
        family="bias",
        summary="An additive bias by distance on the token grid, in extra head dimensions of the model's own kernel.",
        cite="arXiv 2505.12044",
    ),
    PatchEntry(
        name="segments",
        module="accelplug.patches.guidance.segments",
        cls="Segments",
        family="texts",
        summary="Several prompts for one video, each read by its own frames. Trained in the paper, here untrained. Experimental.",
        cite="arXiv 2503.19881",
        kinds=("joint", "cross"),
    ),
    PatchEntry(
        name="headhunter",
        module="accelplug.patches.guidance.headhunter",
        cls="HeadHunter",
        family="guidance",
        summary="Predictions are led away from those with chosen heads drawn towards identity (SoftPAG): a forward more a step.",
        cite="arXiv 2506.10978",
    ),
    PatchEntry(
        name="regions",
        module="accelplug.patches.guidance.regions",
        cls="Regions",
        family="texts",
        summary="Prompts for boxes of a picture, each read by what lies in its box. Experimental.",
        cite="arXiv 2505.16976",
        kinds=("joint", "cross"),
    ),
    PatchEntry(
        name="second_path",
        module="accelplug.patches.guidance.second_path",
        cls="SecondPath",
        family="texts",
        summary="Cross-attention of a dense forward in that of windows, so that they agree on the scene. Experimental.",
        cite="arXiv 2511.14712",
        kinds=("cross",),
    ),
    PatchEntry(
        name="rectified",
        module="accelplug.patches.sparse.rectified",
        cls="RectifiedSpaAttn",
        family="sparse",
        summary="Likeliest and neighbouring key blocks are read, weighed against the mean values of the others.",
        cite="arXiv 2511.19835",
    ),
    PatchEntry(
        name="psa",
        module="accelplug.patches.sparse.psa",
        cls="Psa",
        family="sparse",
        summary="The less a key block matters, the more of its keys are read as one: exactly, by 2, by 4, by 8, not at all.",
        cite="arXiv 2512.04025",
    ),
    PatchEntry(
        name="svg_ear",
        module="accelplug.patches.sparse.svg_ear",
        cls="SvgEar",
        family="sparse",
        summary="Alike tokens share blocks; what pooling would get most wrong is read exactly, the rest is pooled.",
        cite="arXiv 2603.08982, 2505.18875",
    ),
    PatchEntry(
        name="hierarchical",
        module="accelplug.patches.sparse.hierarchical",
        cls="Hierarchical",
        family="sparse",
        summary="A block's own keys one by one, every other block as one, weighed once for all its rows. Experimental.",
        cite="arXiv 2509.15448",
    ),
    PatchEntry(
        name="sparse_vdit",
        module="accelplug.patches.sparse.sparse_vdit",
        cls="SparseVdit",
        family="sparse",
        summary="Every head is full, skipped, a diagonal, many diagonals or stripes, as an offline search found.",
        cite="arXiv 2506.03065",
    ),
    PatchEntry(
        name="paro",
        module="accelplug.patches.sparse.paro",
        cls="Paro",
        family="sparse",
        summary="For every head the order of axes in which its attention falls into blocks, and a static mask of them.",
        cite="arXiv 2506.16054",
    ),
    PatchEntry(
        name="sta",
        module="accelplug.patches.sparse.sta",
        cls="Sta",
        family="sparse",
        summary="Windows of whole tiles around the query's own, one for each head, from a search.",
        cite="arXiv 2502.04507",
    ),
    PatchEntry(
        name="prefill_rows",
        module="accelplug.patches.sparse.prefill_rows",
        cls="PrefillRows",
        family="prefill",
        summary="A few exact rows of each block of a prompt say which past key blocks the others read.",
        cite="arXiv 2406.15486",
    ),
    PatchEntry(
        name="flashprefill",
        module="accelplug.patches.sparse.flashprefill",
        cls="FlashPrefill",
        family="prefill",
        summary="A prompt reads the past key blocks whose mean key scores within a factor of the best.",
        cite="arXiv 2603.06199, 2608.19758",
    ),
    PatchEntry(
        name="xattention",
        module="accelplug.patches.sparse.xattention",
        cls="XAttention",
        family="prefill",
        summary="A prompt reads the past key blocks that hold most of the attention along antidiagonals.",
        cite="arXiv 2503.16428",
    ),
    PatchEntry(
        name="triangle",
        module="accelplug.patches.sparse.triangle",
        cls="Triangle",
        family="prefill",
        summary="A prompt reads its first tokens and a window, its last rows read everything.",
        cite="arXiv 2507.21526",
    ),
    PatchEntry(
        name="power",
        module="accelplug.patches.sparse.power",
        cls="Power",
        family="prefill",
        summary="A prompt reads blocks at distances of powers of two, its first tokens and a window. Experimental.",
        cite="arXiv 2503.03588",
    ),
    PatchEntry(
        name="superlinear",
        module="accelplug.patches.sparse.superlinear",
        cls="Superlinear",
        family="prefill",
        summary="A prompt reads a few spans of keys, of candidates that thin out with distance. Experimental.",
        cite="arXiv 2601.18401",
    ),
    PatchEntry(
        name="landmark",
        module="accelplug.patches.sparse.landmark",
        cls="Landmark",
        family="prefill",
        summary="A prompt reads the few past key blocks that a softmax over their mean keys weighs most. Experimental.",
        cite="arXiv 2305.16300",
    ),
    PatchEntry(
        name="dynamic_mask",
        module="accelplug.patches.sparse.dynamic_mask",
        cls="DynamicMask",
        family="prefill",
        summary="A prompt reads so many keys as a budget says, by how they fit and how large their values are. Experimental.",
        cite="arXiv 2508.02124",
    ),
    PatchEntry(
        name="stream",
        module="accelplug.patches.sparse.stream",
        cls="StreamingWindow",
        family="prefill",
        summary="A prompt reads its first tokens and a sliding window.",
        cite="arXiv 2309.17453",
    ),
    PatchEntry(
        name="pages",
        module="accelplug.patches.sparse.pages",
        cls="Pages",
        family="decode",
        summary="A decode step reads the pages of keys with the largest bound of q.k, the first tokens and the newest. Experimental.",
        cite="arXiv 2406.10774",
    ),
    PatchEntry(
        name="clusters",
        module="accelplug.patches.sparse.clusters",
        cls="Clusters",
        family="decode",
        summary="A decode step reads the tokens of the clusters of keys that weigh most, and the means of the next. Experimental.",
        cite="arXiv 2505.02922, 2602.05191",
    ),
    PatchEntry(
        name="retrieval",
        module="accelplug.patches.sparse.retrieval",
        cls="Retrieval",
        family="decode",
        summary="Keys lie in CPU memory; a decode step reads those that an index finds, the first tokens and the newest. Experimental.",
        cite="arXiv 2409.10516",
    ),
    PatchEntry(
        name="duo",
        module="accelplug.patches.memory.duo",
        cls="Duo",
        family="memory",
        summary="Heads that retrieve keep all keys; the others first tokens, a window, and one token for the rest.",
        cite="arXiv 2410.10819, 2407.15891",
    ),
    PatchEntry(
        name="snapkv",
        module="accelplug.patches.memory.snapkv",
        cls="SnapKV",
        family="memory",
        summary="Keys of a prompt that its last tokens look at are kept, the others let go of: the baseline.",
        cite="arXiv 2404.14469",
    ),
    PatchEntry(
        name="visual_bias",
        module="accelplug.patches.heads.visual_bias",
        cls="VisualBias",
        family="heads",
        summary="Later text attends more to images and less to the system prompt: a bias on spans.",
        cite="arXiv 2603.03825, 2503.13107",
    ),
    PatchEntry(
        name="var",
        module="accelplug.patches.heads.var",
        cls="Var",
        family="heads",
        summary="What heads spend on attention sinks goes to the other image tokens.",
        cite="arXiv 2503.03321",
    ),
    PatchEntry(
        name="vhr",
        module="accelplug.patches.heads.vhr",
        cls="Vhr",
        family="heads",
        summary="Heads in which the image makes the most difference are made louder.",
        cite="arXiv 2412.13949",
    ),
    PatchEntry(
        name="gift",
        module="accelplug.patches.heads.gift",
        cls="Gift",
        family="heads",
        summary="The answer keeps looking at what the question pointed at.",
        cite="arXiv 2510.22067",
    ),
    PatchEntry(
        name="imbalance",
        module="accelplug.patches.heads.imbalance",
        cls="Imbalance",
        family="heads",
        summary="Image tokens that the vision tower marks as local or as summaries are raised.",
        cite="arXiv 2501.12206",
    ),
    PatchEntry(
        name="pai",
        module="accelplug.patches.heads.pai",
        cls="Pai",
        family="heads",
        summary="Scores of image tokens are raised by a share of their size: the baseline.",
        cite="arXiv 2407.21771, 2411.16724",
    ),
    PatchEntry(
        name="adaptive_boost",
        module="accelplug.patches.heads.adaptive_boost",
        cls="AdaptiveBoost",
        family="heads",
        summary="The image counts more where the last token was unsure, or not what the image shows. Experimental.",
        cite="arXiv 2602.13600",
    ),
    PatchEntry(
        name="ilvad",
        module="accelplug.patches.heads.ilvad",
        cls="Ilvad",
        family="heads",
        summary="Evidence that layers come back to is looked at more, and words that were said from it. Experimental.",
        cite="arXiv 2605.20965",
    ),
    PatchEntry(
        name="adhh",
        module="accelplug.patches.heads.adhh",
        cls="Adhh",
        family="heads",
        summary="Heads that are known to hallucinate let go of text where it holds them. Experimental.",
        cite="OpenReview Bjq4W7P2Us",
    ),
    PatchEntry(
        name="spin",
        module="accelplug.patches.heads.spin",
        cls="Spin",
        family="heads",
        summary="Heads that look at the image least are turned down, token by token. Experimental.",
        cite="arXiv 2505.16411",
    ),
    PatchEntry(
        name="farsight",
        module="accelplug.patches.heads.farsight",
        cls="FarSight",
        family="heads",
        summary="Rows of the prompt may leave attention in registers behind them, which hold nothing. Experimental.",
        cite="arXiv 2505.16652",
    ),
    PatchEntry(
        name="moh",
        module="accelplug.patches.heads.moh",
        cls="Moh",
        family="heads",
        summary="Heads that add little to the residual stream are left out. Experimental.",
        cite="arXiv 2410.11842",
    ),
    PatchEntry(
        name="contrast",
        module="accelplug.patches.guidance.contrast",
        cls="Contrast",
        family="generation",
        summary="What pictures add to the logits of the text alone counts more, among likely tokens.",
        cite="arXiv 2407.21771, 2501.12206",
    ),
    PatchEntry(
        name="carve",
        module="accelplug.patches.guidance.carve",
        cls="Carve",
        family="generation",
        summary="The answer is given on what the question, unlike a description, makes the model look at: the rest is cut away.",
        cite="arXiv 2509.06461",
    ),
    PatchEntry(
        name="agla",
        module="accelplug.patches.guidance.agla",
        cls="Agla",
        family="generation",
        summary="Logits are added to those on the image with all but what the question is about masked.",
        cite="arXiv 2406.12718",
    ),
)


def list_patches() -> tuple[PatchEntry, ...]:
    """Return all patches: ours, then those of others. Of ours, none is imported."""
    return PATCH_CATALOG.all()


def patch_entry(name: str) -> PatchEntry:
    """Return the table's entry of a patch.

    Raises
    ------
    NoMatchError
        If there is no patch of that name.
    """
    entry = PATCH_CATALOG.get(name) if isinstance(name, str) else None
    if entry is None:
        known = [entry.name for entry in list_patches()]
        why = PATCH_CATALOG.why_not(str(name)) or nearest(str(name), known)
        raise NoMatchError(f"There is no patch {name!r}{why}. Known: dense, {', '.join(known)}.")
    return entry


def patch_class(name: str) -> type[Patch]:
    """Import and return the class of a patch; see `patch_entry` for what it raises."""
    entry = patch_entry(name)
    return entry.registered or getattr(import_module(entry.module), entry.cls)


def entry_of(patch: str | Patch | type[Patch]) -> PatchEntry:
    """Return the entry of a patch, given its name, an instance, or its class, which need not be registered.

    Raises
    ------
    NoMatchError
        If there is no patch of that name.
    AccelplugError
        If it is not a patch, is not finished, or goes by the name of another.
    """
    if isinstance(patch, str):
        return patch_entry(patch)
    cls = patch if isinstance(patch, type) else type(patch)
    entry = _described(cls)
    known = PATCH_CATALOG.get(entry.name)
    if known is not None and (known.module, known.cls) == (entry.module, entry.cls):
        return known
    _require(cls, "used", _unfinished(cls, entry.family))
    if known is not None:
        raise AccelplugError(
            f"{_full_name(cls)} goes by the name {entry.name!r}, and so does {known.module}.{known.cls}; give it a `name` of its own."
        )
    return entry


def register_patch(cls: PatchClass) -> PatchClass:
    """Make a patch of another package known by its name: to recipes, `list_patches`, and all that takes a patch's name.

    Parameters
    ----------
    cls : a class that derives from `Patch`, with these class attributes: ``name``, small letters, digits and underscores; ``cite``,
        where the method was published, or ``unpublished``; ``summary``, one line on what it does; ``family``, a key of
        `PATCH_FAMILIES`, where its base class does not say. What is registered already may come again; a class of the same module
        and name takes its place, as when a notebook's cell is run again.

    Returns
    -------
    The class: it may stand above it as a decorator.

    Raises
    ------
    AccelplugError
        If it is not such a class, naming all that it lacks, or another patch has its name.
    """
    entry = _described(cls)
    if entry.registered is None:  # one of ours
        return cls
    _require(cls, "registered", [*_unfinished(cls, entry.family), *_undescribed(cls)])
    known = PATCH_CATALOG.get(entry.name)
    if known is not None and known.registered and (known.module, known.cls) == (entry.module, entry.cls):
        PATCH_CATALOG.drop(known)
    PATCH_CATALOG.add([entry.name], entry)
    return cls


PATCH_CATALOG: Catalog[PatchEntry] = Catalog(
    "patch", {entry.name: entry for entry in _OWN}, EntryPoints("accelplug.patches", register_patch)
)


def _described(cls: Any) -> PatchEntry:
    """What a class says of itself. Without a name it goes by that of the class."""
    from accelplug.patches.base import Patch

    if not (isinstance(cls, type) and issubclass(cls, Patch)):
        raise AccelplugError(
            f"Expected a patch, a class that derives from accelplug.patches.base.Patch, or an instance of one; got {cls!r}."
        )
    own = next((entry for entry in _OWN if (entry.module, entry.cls) == (cls.__module__, cls.__qualname__)), None)
    name = cls.name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
    return own or PatchEntry(name, cls.__module__, cls.__qualname__, cls.family, cls.summary, cls.cite, cls, cls.kinds)


def _unfinished(cls: type[Patch], family: str) -> Iterator[str]:
    """Why a patch cannot run."""
    from accelplug.patches.base import NEEDS, Config

    template = next(base for base in cls.__mro__ if "writes" in vars(base))
    for half in cls.writes:
        if getattr(cls, half) is getattr(template, half):
            yield f"it does not define {half}(), as each {template.__name__} must"
    if family not in PATCH_FAMILIES:
        kinds = "; ".join(f"{kind}, {what}" for kind, what in PATCH_FAMILIES.items())
        yield f"`family` must say what it changes ({kinds}), got {family!r}{nearest(str(family), PATCH_FAMILIES)}"
    if not (isinstance(cls.Config, type) and issubclass(cls.Config, Config)):
        yield f"`Config` must derive from accelplug.patches.base.Config, got {cls.Config!r}"
    if unknown := sorted(set(cls.needs) - NEEDS):
        yield f"`needs` names {', '.join(unknown)}, and a host supplies {', '.join(sorted(NEEDS))}"


def _undescribed(cls: type[Patch]) -> Iterator[str]:
    """What others cannot know of a patch."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", str(cls.name)) or cls.name in RESERVED:
        but = f", but for {' and '.join(RESERVED)}"
        yield f"`name` must be small letters, digits and underscores, a letter first{but}, got {cls.name!r}"
    if not str(cls.cite).strip():
        yield "`cite` must say where it was published, as 'arXiv 2506.19852', or 'unpublished'"
    if not str(cls.summary).strip() or "\n" in str(cls.summary):
        yield "`summary` must say in one line what it does"
    bare = [key for key, value in getattr(cls.Config, "model_fields", {}).items() if not value.description]
    if bare:
        yield f"every field of its Config needs a description, and {', '.join(bare)} has none: Field(..., description=...)"


def _require(cls: type[Patch], what: str, faults: Iterable[str]) -> None:
    if found := list(faults):
        raise AccelplugError(f"{_full_name(cls)} cannot be {what} as a patch: {'; '.join(found)}. See docs/extending.md.")


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
