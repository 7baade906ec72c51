"""Which patches there are: a literal table, so that listing them imports neither torch nor a patch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from accelplug.errors import NoMatchError, nearest

if TYPE_CHECKING:
    from accelplug.patches.base import Patch


@dataclass(frozen=True)
class PatchEntry:
    """One patch: the name recipes use, where its class is, and what it does."""

    name: str
    module: str
    cls: str
    family: str
    """What it changes; a rule takes at most one patch of a family."""
    summary: str
    cite: str


_PATCHES = {
    entry.name: entry
    for entry in (
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
            cite="arXiv 2504.16922",
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
            cite="arXiv 2303.17604",
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
            name="rectified",
            module="accelplug.patches.sparse.rectified",
            cls="Rectified",
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
            cite="arXiv 2603.08982",
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
            name="visual_bias",
            module="accelplug.patches.heads.visual_bias",
            cls="VisualBias",
            family="heads",
            summary="Later text attends more to images and less to the system prompt: a bias on spans.",
            cite="arXiv 2603.03825",
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
            cite="arXiv 2407.21771",
        ),
        PatchEntry(
            name="contrast",
            module="accelplug.patches.guidance.contrast",
            cls="Contrast",
            family="generation",
            summary="What pictures add to the logits of the text alone counts more, among likely tokens.",
            cite="arXiv 2407.21771",
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
}


def list_patches() -> tuple[PatchEntry, ...]:
    """Return all patches."""
    return tuple(_PATCHES.values())


def patch_entry(name: str) -> PatchEntry:
    """Return the table's entry of a patch.

    Raises
    ------
    NoMatchError
        If there is no patch of that name.
    """
    if not isinstance(name, str) or name not in _PATCHES:
        raise NoMatchError(f"There is no patch {name!r}{nearest(str(name), _PATCHES)}. Known: dense, {', '.join(_PATCHES)}.")
    return _PATCHES[name]


def patch_class(name: str) -> type[Patch]:
    """Import and return the class of a patch; see `patch_entry` for what it raises."""
    entry = patch_entry(name)
    return getattr(import_module(entry.module), entry.cls)
