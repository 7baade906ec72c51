"""Tables: what a calibration measured, one row per step, layer and head; a tensor of a safetensors file beside the recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from accelplug import files
from accelplug.call import ALL_HEADS
from accelplug.errors import AccelplugError, RecipeError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from accelplug.call import Clock, Layout, Share, Site

AXES = ("steps", "layers", "heads")
"""What the leading axes of a table can be, in this order."""

MAX_BYTES = 512 << 20
"""Largest file of tables that is read at all."""

HEADER = "accelplug"
"""The key of the safetensors header under which `Origin` is kept, as JSON."""


NUMBERS = ("uint8", "int8", "int16", "int32", "int64")
REALS = ("float16", "bfloat16", "float32", "float64")
"""Types that entries may have: where whole numbers are meant, the first."""


@dataclass(frozen=True)
class Bits:
    """What a table has for each head in place of one value: packed bits, int32, along so many axes of their own."""

    axes: int


@dataclass(frozen=True)
class Origin:
    """What a file of tables was made for, and by what.

    Attributes
    ----------
    model : class and config of the denoiser, as recipes match them; empty: any model.
    grid_thw : latent frames, patch rows, patch columns; None: any grid.
    steps : diffusion steps of the runs that were observed.
    patch : the method that was calibrated.
    axes : leading axes of each table, by key, of `AXES`.
    versions, git : packages, and the state of the source.
    notes : knobs of the calibration, the number of prompts, the seed.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    grid_thw: tuple[int, int, int] | None = None
    steps: int | None = None
    patch: str = ""
    axes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    git: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def to_header(self) -> dict[str, str]:
        """Return it as the metadata of a safetensors file."""
        return {
            HEADER: json.dumps(vars(self) | {"axes": {key: list(axes) for key, axes in self.axes.items()}}, sort_keys=True)
        }

    @classmethod
    def from_header(cls, header: Mapping[str, str] | None) -> Origin:
        """Read it from the metadata of a safetensors file; what is not there is left open. ValueError where it makes no sense."""
        from pydantic import TypeAdapter

        data = json.loads((header or {}).get(HEADER, "{}"))
        if not isinstance(data, dict) or (unknown := sorted(set(data) - set(cls.__dataclass_fields__))):
            raise ValueError(
                f"its header has unknown entries: {unknown}" if isinstance(data, dict) else "its header is not a mapping"
            )
        return TypeAdapter(cls).validate_python(data)


@dataclass(frozen=True, eq=False)
class Table:
    """A tensor with a row per step, layer and head, as far as its axes say. Two tables are equal if their bytes are.

    Attributes
    ----------
    values : Tensor [*axes, ...], on the CPU. The steps' axis has as many rows as there are spans of equal length in a run.
    axes : its leading axes, of ``steps``, ``layers``, ``heads``, in this order.
    sha256 : of the file that it came from, or of the values.
    key : its name in that file.
    origin : what it was made for.
    """

    values: Tensor
    axes: tuple[str, ...] = ("layers", "heads")
    sha256: str = ""
    key: str = "table"
    origin: Origin = Origin()

    def __post_init__(self) -> None:
        if list(self.axes) != [name for name in AXES if name in self.axes] or self.values.ndim < len(self.axes):
            raise RecipeError(
                f"The axes of table {self.key!r} must be among {', '.join(AXES)}, in this order, and no more than the tensor has, "
                f"got {', '.join(self.axes) or 'none'} for a tensor of shape {tuple(self.values.shape)}."
            )
        if not self.sha256:
            import torch

            kind = f"{self.values.dtype} {tuple(self.values.shape)}".encode()
            data = self.values.detach().cpu().contiguous().flatten().view(torch.uint8)
            object.__setattr__(self, "sha256", hashlib.sha256(kind + data.numpy().tobytes()).hexdigest())

    @classmethod
    def read(cls, path: Path, sha256: str, key: str) -> Table:
        """Read a table from a file.

        Raises
        ------
        RecipeError
            If the file is missing, too large, not the one that `sha256` names, no safetensors file, or has no such key.
        """
        from safetensors import SafetensorError, safe_open

        try:
            if not path.is_file():
                raise RecipeError(f"{path}: there is no such file. Tables stand beside the recipe that names them.")
            if (size := path.stat().st_size) > MAX_BYTES:
                raise RecipeError(f"{path}: a file of tables has at most {MAX_BYTES} bytes, this one has {size}.")
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read: {error}") from error
        if found != sha256:
            raise RecipeError(
                f"{path}: its sha256 is {found}, the recipe says {sha256}. It is another file than the recipe was written for: "
                "fetch the right one, or calibrate again."
            )
        try:
            with safe_open(path, "pt") as tables:
                origin = Origin.from_header(tables.metadata())
                if key not in (keys := list(tables.keys())):
                    raise RecipeError(
                        f"{path}: there is no table {key!r}{nearest(key, keys)}. It has: {', '.join(sorted(keys))}."
                    )
                return cls(tables.get_tensor(key), tuple(origin.axes.get(key, AXES[1:])), sha256, key, origin)
        except RecipeError:
            raise
        except (SafetensorError, ValueError, LookupError, AttributeError, OSError, RuntimeError) as error:
            raise RecipeError(f"{path}: not a file of tables: {error}") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and (self.sha256, self.key) == (other.sha256, other.key)

    def __hash__(self) -> int:
        return hash((self.sha256, self.key))

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.values.shape))
        return f"Table({self.key}, {' '.join(self.axes)}, {shape}, sha256 {self.sha256[:16]})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        by_name = core_schema.plain_serializer_function_ser_schema(
            lambda table: {"table": {"sha256": table.sha256, "key": table.key}}, when_used="json"
        )
        return core_schema.is_instance_schema(cls, cls_repr="table: {file, sha256, key}", serialization=by_name)

    def require_entries(self, one: Any, table: Any = None) -> None:
        """Refuse entries that could not stand as one value for all heads.

        Parameters
        ----------
        one : type of that value, with its bounds; of a ``Literal`` the entries are places in it, from 0.
        table : type of the table, ``Annotated[Table, Bits(2)]`` where a head has more than one entry.

        Raises
        ------
        ValueError
            If an entry is out of bounds, no number, or of another kind, or the tensor has other axes than it says.
        """
        from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

        bits = next((mark for mark in getattr(table, "__metadata__", ()) if isinstance(mark, Bits)), None)
        shape, own = tuple(self.values.shape), bits.axes if bits else 0
        if "heads" not in self.axes or len(shape) != len(self.axes) + own or 0 in shape:
            raise ValueError(
                f"table {self.key!r}: expected the axes {', '.join(self.axes)} with heads among them"
                f"{f', {own} of packed bits' if own else ''} and none of length 0, got a tensor of shape {shape}"
            )
        places = get_args(one) if get_origin(one) is Literal else ()
        kind = get_args(one)[0] if get_origin(one) is Annotated else one
        dtypes = ("int32",) if bits else NUMBERS if places or kind is int else NUMBERS + REALS
        if (dtype := str(self.values.dtype).removeprefix("torch.")) not in dtypes:
            raise ValueError(f"table {self.key!r}: expected entries of type {', '.join(dtypes)}, got {dtype}")
        if bits:
            return
        bounds: Any = Annotated[int, Field(ge=0, lt=len(places))] if places else one
        for extreme in (self.values.min(), self.values.max()):  # bounds hold for all if they hold for both; NaN is both
            try:
                TypeAdapter(bounds, config=ConfigDict(allow_inf_nan=False)).validate_python(extreme.item())
            except ValidationError as error:
                there = self.values.isnan() if extreme.isnan() else self.values == extreme
                at = ", ".join(map(str, there.nonzero()[0].tolist()))
                why = error.errors(include_url=False)[0]["msg"].removeprefix("Input ")
                raise ValueError(f"table {self.key!r}: entry [{at}] is {extreme.item():g}, and {why}") from None

    def missing(self, site: Site, clock: Clock) -> str | None:
        """Why no row can be told here and now, or None."""
        if "layers" in self.axes and site.layer is None:
            return "a table has a row per layer, and this attention stands in none"
        if "steps" in self.axes and (clock.step is None or clock.steps is None):
            return (
                "a table has a row per step, and which of how many this is is not known; tell it by plug.step(index, steps)"
            )
        return None

    def require(self, site: Site, layout: Layout | None, heads: int | None = None) -> None:
        """Refuse to be used where it was not made for, as far as layout and number of heads are known.

        Raises
        ------
        RecipeError
            If it was made for another grid of tokens, or has no row for the site's layer or for its heads.
        """
        made_for = self.origin.grid_thw
        if layout is not None and made_for not in (None, layout.grid_thw):
            wanted, there = ("x".join(map(str, grid)) for grid in (made_for, layout.grid_thw))
            raise RecipeError(
                f"{self!r} was made for {wanted} tokens (frames x rows x columns), this run has {there}. "
                "Run at that size, take another recipe, or calibrate for this one: accelplug calibrate."
            )
        if "layers" in self.axes and (rows := self.values.shape[self.axes.index("layers")]) != site.layers:
            raise RecipeError(
                f"{self!r} has rows for {rows} layers, {site.denoiser} has {site.layers}. Calibrate for this model."
            )
        own = self.values.shape[self.axes.index("heads")] if "heads" in self.axes else heads
        if heads is not None and own != heads:
            raise RecipeError(f"{self!r} has rows for {own} heads, {site.module} has {heads}. Calibrate for this model.")

    def by_head(self) -> Tensor:
        """Return the entries of a table of layers and heads: float32 (layers, heads).

        Raises
        ------
        RecipeError
            If it has other axes.
        """
        if self.axes != AXES[1:]:
            raise RecipeError(f"{self!r}: expected a table of layers and heads, got one of {', '.join(self.axes)}.")
        return self.values.float()

    def at(self, site: Site, clock: Clock) -> Tensor:
        """Return the row of a layer now, for the heads that the site's calls have: [heads, ...]."""
        return self.rows(bucket(clock, self.values.shape[0]) if "steps" in self.axes else 0, site.layer, site.heads)

    def rows(self, step: int, layer: int | None, heads: Share = ALL_HEADS) -> Tensor:
        """Return what stands in a row of the steps' axis and in a layer's, as far as there are such axes: [heads, ...]."""
        index = {"steps": step, "layers": layer or 0}
        found = self.values[tuple(index[axis] for axis in self.axes if axis != "heads")]
        return heads.part(found) if "heads" in self.axes else found


def bucket(clock: Clock, number: int) -> int:
    """Which of `number` spans of equal length the present step lies in; a run of `number` steps has one each."""
    return min((clock.step or 0) * number // max(clock.steps or 1, 1), number - 1)


def require_place(path: Path) -> None:
    """Refuse to write tables over a file that holds something else, such as a model's weights.

    Raises
    ------
    AccelplugError
        If there is one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            ours = HEADER in (file.metadata() or {})
    except FileNotFoundError:
        return
    except (SafetensorError, OSError):
        ours = False
    if not ours:
        raise AccelplugError(
            f"{path} holds no tables of accelplug, and those of the recipe would go there. Give another name."
        )


def write_tables(path: Path, tables: Mapping[str, Tensor], origin: Origin) -> dict[str, dict[str, Any]]:
    """Write tables to a safetensors file; return by key how a recipe beside it refers to them. See `require_place`."""
    from safetensors.torch import save

    require_place(path)
    data = save(dict(tables), origin.to_header())
    files.write(path, data)
    sha256 = hashlib.sha256(data).hexdigest()
    return {key: {"table": {"file": path.name, "sha256": sha256, "key": key}} for key in tables}
