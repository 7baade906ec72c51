"""Geometry transformers: every family that is known, by stand-ins with the same attributes; what each method reads; what is kept."""

from __future__ import annotations

import copy
import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accelplug
from accelplug import heads_outputs_alone, zoo
from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.cli import main
from accelplug.comparison.walks import Reconstruction, Walks, deviation_of, reconstruction_of
from accelplug.errors import AccelplugError, NoMatchError, UnsupportedError
from accelplug.families.geometry import KNOWN_ALTERNATIONS
from accelplug.hosts.outputs import bytes_of_outputs, layers_read
from accelplug.hosts.rebind import dense_sdpa
from accelplug.kernels.frames import batch_as_frames, frame_by_frame, frames_as_batch, specials_first
from accelplug.kernels.merge import match, merge, slot_sizes, unmerge
from accelplug.kernels.thinned import attend_lse, exchange, farthest_first, smaller_grid
from accelplug.patches.geometry.avggt import Avggt
from accelplug.patches.geometry.fastvggt import FastVggt
from accelplug.patches.geometry.flashvggt import FlashVggt
from accelplug.patches.geometry.spark3r import Spark3R
from accelplug.patches.tokens import sharing
from accelplug.testing.geometry import GEOMETRY_TRIED
from accelplug.testing.laws import Law, Subject, laws, run_once, snapshot_of, text_stays_dense
from accelplug.testing.models import Built, build_denoiser
from accelplug.zoo.geometry import VGGT
from accelplug.zoo.rooms import FIELD_OF_VIEW, quaternion_of, rays
from benchmarks.geometry import above_dense, growth_of
from tests.patch_rows import ROWS

FRAMES, PATCHES = 3, 15
SELECTED: dict[str, dict[str, Any]] = {
    "rows": {"block": 8, "density": 0.3, "rows": 2, "backend": "reference"},
    "sol": {"block": 8, "tau": 0.5, "band": 0, "backend": "reference"},
    "tome": {"ratio": 0.5},
}
"""Methods that know of no frames."""


def built(family: str = "vggt") -> Built:
    return build_denoiser(GEOMETRY_TRIED[family])


def recipe(patch: str, settings: dict[str, Any] | None = None, **where: Any) -> dict[str, Any]:
    rule = {"patch": patch, "with": dict(ROWS[patch].working) if settings is None else settings}
    return {"rules": [{"where": where, **rule} if where else rule]}


# ------------------------------------------------------------------------------------------------------------- the host


@pytest.mark.parametrize("patch", SELECTED)
@pytest.mark.parametrize("family", GEOMETRY_TRIED)
def test_methods_that_know_of_no_frames_serve_too(family: str, patch: str) -> None:
    model, inputs = built(family)
    dense, before = run_once(model, inputs), snapshot_of(model)
    with accelplug.apply(model, recipe(patch, SELECTED[patch]), gate="off", strict=True) as plug:
        assert not torch.equal(run_once(model, inputs), dense)
        assert plug.report().served[patch]
        assert not plug.report().unrouted
    assert snapshot_of(model) == before
    assert torch.equal(run_once(model, inputs), dense)


@pytest.mark.parametrize("patch", ["rows", "sol", "tome"])
def test_special_tokens_stay_dense(patch: str) -> None:
    text_stays_dense(ROWS[patch], GEOMETRY_TRIED["vggt"])


def test_the_kernel_that_reads_everything_is_dense() -> None:
    model, inputs = built()
    whole = {"block": 8, "density": None, "top_p": 1 - 1e-9, "backend": "reference"}
    dense = run_once(model, inputs)
    with accelplug.apply(model, recipe("rows", whole), gate="off", strict=True):
        torch.testing.assert_close(run_once(model, inputs), dense, rtol=1e-3, atol=1e-4)


def test_what_is_repaired_says_its_error() -> None:
    model, inputs = built()
    settings = {**SELECTED["rows"], "repair": "output_query", "probes": 8}
    with accelplug.apply(model, recipe("rows", settings), gate="off", strict=True) as plug:
        run_once(model, inputs)
        report = plug.report()
    assert 0 < report.errors["rows"].median < 1
    assert not report.unestimated


def test_under_autocast_queries_keys_and_values_have_one_dtype() -> None:
    """VGGT's own scripts run it so: its norms leave queries and keys in float32."""
    model, inputs = built()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = run_once(model, inputs)
        for patch in ("avggt", "fastvggt"):
            with accelplug.apply(model, recipe(patch, dict(ROWS[patch].neutral)), gate="off"):
                assert torch.equal(run_once(model, inputs), dense)
            with accelplug.apply(model, recipe(patch), gate="off", strict=True):
                patched = run_once(model, inputs)
            assert torch.isfinite(patched).all()
            assert not torch.equal(patched, dense)


def test_a_copy_is_stock() -> None:
    model, inputs = built()
    dense = run_once(model, inputs)
    with accelplug.apply(model, recipe("avggt"), gate="off"):
        assert not torch.equal(run_once(model, inputs), dense)
        assert torch.equal(run_once(copy.deepcopy(model), inputs), dense)


def test_every_family_is_known_by_its_attributes() -> None:
    assert set(GEOMETRY_TRIED) == {family.name for family in KNOWN_ALTERNATIONS}
    for family, numbers in {"vggt": [0, 1, 2, 3], "pi3": [1, 3], "depth-anything-3": [3, 5], "vggt-omega": [0, 2]}.items():
        model, _ = built(family)
        with accelplug.apply(model, recipe("avggt"), gate="off") as plug:
            assert [int(site.module.split(".")[1]) for site in plug.sites] == numbers
            assert [site.layer for site in plug.sites] == list(range(len(numbers)))


@pytest.mark.parametrize(
    ("family", "special", "reference"),
    [("vggt", 5, True), ("pi3", 5, False), ("depth-anything-3", 1, True), ("vggt-omega", 3, True)],
)
def test_how_tokens_lie(family: str, special: int, reference: bool) -> None:
    model, inputs = built(family)
    with accelplug.apply(model, recipe("flashvggt"), gate="off") as plug:
        run_once(model, {name: torch.cat([x, x]) for name, x in inputs.items()})
        layouts = {row.layout for row in plug.where() if row.params is not None}
    assert layouts == {Layout((FRAMES, 3, 5), FRAMES * special, special=special, reference=reference)}


def test_what_alternates_in_another_way_is_refused() -> None:
    model: Any = nn.Module()
    model.frame_blocks = nn.ModuleList()
    with pytest.raises(
        UnsupportedError, match=r"has frame_blocks and is not a geometry transformer that is known.*vggt-omega"
    ):
        accelplug.apply(model, recipe("avggt"))
    with pytest.raises(NoMatchError):
        accelplug.apply(built()[0], recipe("avggt", layers="9:"))
    with pytest.raises(UnsupportedError, match=r"tune: expected .*, got VGGT, a geometry transformer"):
        accelplug.tune(built()[0], {"prompt": "a"})


def test_attention_that_asks_torch_for_nothing_is_said() -> None:
    model, inputs = built()
    for block in model.aggregator.global_blocks:
        block.attn.forward = lambda x, pos=None, attn=block.attn: attn.proj(x)
    with accelplug.apply(model, recipe("avggt"), gate="off") as plug:
        run_once(model, inputs)
        assert len(plug.report().unrouted) == 4


def test_masks_and_training_are_left_dense_or_refused() -> None:
    model, inputs = built("depth-anything-3")
    block = model.pretrained.blocks[3]
    stock = block.forward
    block.forward = lambda x, pos=None, attn_mask=None: stock(x, pos=pos, attn_mask=torch.zeros(x.shape[1], x.shape[1]))
    with accelplug.apply(model, recipe("fastvggt"), gate="off") as plug:
        run_once(model, inputs)
        assert plug.report().served == {"dense": 1, "fastvggt": 1}
    model, inputs = built()
    model.requires_grad_(True).train()
    with accelplug.apply(model, recipe("fastvggt"), gate="off"), pytest.raises(UnsupportedError, match="training mode"):
        model(**inputs)


# --------------------------------------------------------------------------------------------------------- what is read


LAYOUT = Layout((FRAMES, 3, 5), FRAMES * 2, special=2, reference=True)
SCALE = 0.3


def call_on(layout: Layout = LAYOUT, batch: int = 2, seed: int = 0) -> AttentionCall:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, 2, layout.length, 16, generator=g) for _ in range(3))
    return AttentionCall(q, k, v, None, SCALE, dense_sdpa(q, k, v, scale=SCALE))


def attend(patch: Any, call: AttentionCall, layer: int = 1, layers: int = 3) -> Tensor:
    return patch.attend(call, patch.prepare(Site("blocks", "geometry", "self", layer, layers), LAYOUT, Clock(), {}))


def owner(layout: Layout = LAYOUT) -> Tensor:
    """The frame of each token, special ones first."""
    frames = torch.arange(layout.grid_thw[0])
    return torch.cat([frames.repeat_interleave(layout.special), frames.repeat_interleave(PATCHES)])


def masked(call: AttentionCall, may_read: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Attention over keys that may be read, bool (S_q, S_k)."""
    logits = (SCALE * call.q @ call.k.mT + bias).masked_fill(~may_read, -torch.inf)
    return logits.softmax(-1) @ call.v


def test_early_layers_read_their_own_frame() -> None:
    call, own = call_on(), owner()
    torch.testing.assert_close(attend(Avggt(), call, layer=0), masked(call, own[:, None] == own), rtol=1e-4, atol=1e-5)


def test_late_layers_stay_dense() -> None:
    assert Avggt({"dense_layers": 0.3}).prepare(Site("blocks", "geometry", "self", 2, 3), LAYOUT, Clock(), {}) is None


def windows(high: int, wide: int) -> Tensor:
    """Which keys are read, bool (S,): special ones, the first frame, and the first of each window."""
    read = torch.zeros(LAYOUT.length, dtype=torch.bool)
    read[: LAYOUT.text_before + PATCHES] = True
    read[LAYOUT.text_before + PATCHES :].view(2, 3, 5)[:, ::high, ::wide] = True
    return read


@pytest.mark.parametrize("count", ["log", "none"])
def test_middle_layers_read_windows_their_own_key_and_a_mean(count: str) -> None:
    call, read = call_on(), windows(2, 2)
    mean_k, mean_v = (x[:, :, ~read].mean(2, keepdim=True) for x in (call.k, call.v))
    logits = SCALE * call.q @ torch.cat([call.k, mean_k], 2).mT
    if count == "log":
        logits[..., -1] += float((~read).sum().log())
    may = torch.cat(
        [read.expand(LAYOUT.length, -1) | torch.eye(LAYOUT.length, dtype=torch.bool), torch.ones(LAYOUT.length, 1) > 0], 1
    )
    expected = logits.masked_fill(~may, -torch.inf).softmax(-1) @ torch.cat([call.v, mean_v], 2)
    torch.testing.assert_close(attend(Avggt({"count": count}), call), expected, rtol=1e-4, atol=1e-5)


def test_windows_alone() -> None:
    call = call_on()
    patch = Avggt({"own_key": False, "mean_key": False, "window_hw": [2, 3]})
    torch.testing.assert_close(
        attend(patch, call), masked(call, windows(2, 3).expand(LAYOUT.length, -1)), rtol=1e-4, atol=1e-5
    )


def test_a_key_for_a_window_of_equal_ones_is_exact() -> None:
    """Where a window's keys and values are alike, one that counts as often gives what all of them give."""
    call = call_on()
    for x in (call.k, call.v):
        grid = x[:, :, LAYOUT.text_before :].view(2, 2, FRAMES, 3, 5, 16)
        grid[:, :, :, 1] = grid[:, :, :, 0]
        for column in (1, 3):
            grid[:, :, :, :, column] = grid[:, :, :, :, column - 1]
    torch.testing.assert_close(
        attend(Spark3R({"query_ratio": 0.0, "windows": [[2, 2]]}), call), call.dense(), rtol=1e-4, atol=1e-5
    )


def test_merged_tokens_share_their_result_and_special_ones_ask_for_themselves() -> None:
    call, patch = call_on(), FastVggt()
    params = patch.prepare(Site("blocks", "geometry", "self", 0, 3), LAYOUT, Clock(), {})
    made = params.partition
    taken = torch.cat([made.source[0], made.destination[0]])
    assert taken.min() >= LAYOUT.text_before, "special tokens are neither merged nor merged into"
    assert set(range(LAYOUT.text_before, LAYOUT.text_before + PATCHES)) <= set(made.destination[0].tolist())
    assert len(taken.unique()) == len(taken)
    assert params.merged == made.sources, "a ratio of .9 is more than there are sources"
    out = patch.attend(call, params)
    assert len(out[0, 0].unique(dim=0)) == LAYOUT.length - params.merged
    density, _ = patch.inspect(call, params)
    assert density == pytest.approx(((LAYOUT.length - params.merged) / LAYOUT.length) ** 2)


def test_layers_in_a_row_share_a_match() -> None:
    calls, patch, state = (call_on(), call_on(seed=1)), FastVggt({"ratio": 0.4, "reuse_layers": 2}), dict[str, Any]()
    sites = (Site("blocks", "geometry", "self", layer, 3) for layer in (0, 1))
    leader, follower = (patch.prepare(site, LAYOUT, Clock(), state) for site in sites)
    patch.attend(calls[0], leader)
    slots = LAYOUT.length - leader.merged
    slot = match(calls[0].k.mean(1), leader.partition, leader.merged)
    q, k, v = (merge(x, slot, slots) for x in (calls[1].q, calls[1].k, calls[1].v))
    logits = SCALE * q @ k.mT + slot_sizes(slot, slots).log()[:, None, None]
    torch.testing.assert_close(patch.attend(calls[1], follower), unmerge(logits.softmax(-1) @ v, slot), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layers", "matches"), [(1, 4), (3, 2), (4, 1)])
def test_a_forward_makes_its_own_matches(layers: int, matches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = built()
    made: list[Tensor] = []
    monkeypatch.setattr(sharing, "match", lambda metric, *others: made.append(metric) or match(metric, *others))
    with accelplug.apply(model, recipe("fastvggt", {"reuse_layers": layers}), gate="off", strict=True):
        for forwards in (1, 2):
            run_once(model, inputs)
            assert len(made) == forwards * matches


def test_key_frames_are_read_whole_and_once() -> None:
    call, patch = call_on(), FlashVggt({"factor": 3, "every": 2, "count": "none"})
    params = patch.prepare(Site("blocks", "geometry", "self", 0, 3), LAYOUT, Clock(), {})
    assert params.key_frames == 2
    seen: list[Tensor] = []
    spied = AttentionCall(
        call.q, call.k, call.v, None, SCALE, lambda q, k, v, attn_mask: seen.append(k) or call.dense(q=q, k=k, v=v)
    )
    patch.attend(spied, params)
    assert seen[0].shape[2] == LAYOUT.text_before + 2 * PATCHES + 1
    density, _ = patch.inspect(call, params)
    assert density == seen[0].shape[2] / LAYOUT.length
    middle = call.k[:, :, LAYOUT.text_before :].unflatten(2, (FRAMES, 3, 5))[:, :, :, 1, 1]  # factor 3: the middle one
    assert any(torch.allclose(seen[0][0, :, -1], middle[0, :, frame]) for frame in (1, 2))


@pytest.mark.parametrize("count", ["log", "none"])
@pytest.mark.parametrize("every", [2, 9])
def test_a_frame_reads_its_own_patches_for_its_descriptors(every: int, count: str) -> None:
    call, patch = call_on(), FlashVggt({"factor": 2, "every": every, "count": count, "own": True})
    params = patch.prepare(Site("blocks", "geometry", "self", 0, 3), LAYOUT, Clock(), {})
    q, k, v = (frame_by_frame(x, FRAMES, 2).unflatten(2, (FRAMES, -1)) for x in (call.q, call.k, call.v))
    whole = farthest_first(k[:, :, :, 2:].mean((1, 3)), params.key_frames)[:, : params.key_frames].tolist()
    few_k, few_v = (  # two special tokens and two descriptors, each of 7.5 patches
        torch.cat([x[:, :, :, :2], smaller_grid(x[:, :, :, 2:].unflatten(3, (3, 5)), 2).flatten(3, 4)], 3) for x in (k, v)
    )
    bias = torch.tensor([0.0, 0.0, 1.0, 1.0]) * (math.log(7.5) if count == "log" else 0.0)
    expected, pairs = torch.empty_like(q), 0
    for sample, frame in product(range(2), range(FRAMES)):
        exact = {frame, *whole[sample]}
        asking = SCALE * q[sample, :, frame]
        logits = torch.cat(
            [
                asking @ k[sample, :, other].mT if other in exact else asking @ few_k[sample, :, other].mT + bias
                for other in range(FRAMES)
            ],
            -1,
        )
        values = torch.cat([(v if other in exact else few_v)[sample, :, other] for other in range(FRAMES)], 1)
        expected[sample, :, frame] = logits.softmax(-1) @ values
        pairs += logits[0].numel()
    out = frame_by_frame(patch.attend(call, params), FRAMES, 2).unflatten(2, (FRAMES, -1))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    density, _ = patch.inspect(call, params)
    assert density == pytest.approx(pairs / 2 / LAYOUT.length**2)


OWN = Subject("flashvggt", {"factor": 1, "own": True}, {"factor": 2, "every": 3, "own": True}, only=("vggt", "pi3"))


@pytest.mark.parametrize("law", laws(OWN, models=GEOMETRY_TRIED), ids=str)
def test_the_laws_hold_where_frames_read_their_own(law: Law) -> None:
    law()


ARRIVING = {"factor": 3, "every": 9, "chunk": 2, "keep": 2}


@pytest.mark.parametrize("own", [False, True])
def test_a_chunk_is_told_what_it_was_told_before_later_frames_came(own: bool) -> None:
    layout = Layout((5, 3, 5), 5 * 2, special=2, reference=True)
    call, patch, site = call_on(layout), FlashVggt({**ARRIVING, "own": own}), Site("blocks", "geometry", "self", 0, 3)
    out = frame_by_frame(patch.attend(call, patch.prepare(site, layout, Clock(), {})), 5, 2)
    early = Layout((4, 3, 5), 4 * 2, special=2, reference=True)
    q, k, v = (specials_first(frame_by_frame(x, 5, 2)[:, :, : early.length], 4, 2) for x in (call.q, call.k, call.v))
    alone = AttentionCall(q, k, v, None, SCALE, dense_sdpa(q, k, v, scale=SCALE))
    first = frame_by_frame(patch.attend(alone, patch.prepare(site, early, Clock(), {})), 4, 2)
    torch.testing.assert_close(out[:, :, : early.length], first)
    read = [list(one) for one in patch.chunks(5)]
    if own:
        assert read == [[[0, 1], []], [[0, 2, 3], []], [[0, 4], [2]]]
    else:
        assert read == [[[0], [1]], [[0], [2, 3]], [[0], [2, 4]]]
    density, _ = patch.inspect(call, patch.prepare(site, layout, Clock(), {}))
    keys = [len(whole) * 17 + len(others) * 3 for whole, others in read]
    assert density == pytest.approx((2 * keys[0] + 2 * keys[1] + keys[2]) / 5 / layout.length)


def test_one_chunk_is_all_frames_at_once() -> None:
    call = call_on()
    at_once = attend(FlashVggt({"factor": 3}), call)
    torch.testing.assert_close(attend(FlashVggt({"factor": 3, "chunk": FRAMES}), call), at_once)


# ------------------------------------------------------------------------------------------------------------- kernels


def test_frames_come_and_go() -> None:
    x = torch.randn(2, 2, 3 * 7, 4)
    first = specials_first(x, 3, 2)
    assert torch.equal(first[:, :, :6], x.unflatten(2, (3, 7))[:, :, :, :2].flatten(2, 3))
    assert torch.equal(frame_by_frame(first, 3, 2), x)
    apart = frames_as_batch(first, 3, 2)
    assert torch.equal(apart[1], x[0, :, 7:14])
    assert torch.equal(batch_as_frames(apart, 3, 2), first)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_log_sum_exps(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's kernel, and by blocks of rows where no kernel gives them."""
    if device == "meta":
        monkeypatch.setattr("accelplug.compat.torch.attention_with_lse", lambda *args: None)
    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    out, lse = attend_lse(q, k, v, SCALE)
    torch.testing.assert_close(lse, (SCALE * q @ k.mT).logsumexp(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, (SCALE * q @ k.mT).softmax(-1) @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_keys_give_way_to_others(dtype: torch.dtype, atol: float) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 12, 8, generator=g).to(dtype) for _ in range(3))
    thrice_k, thrice_v = (x[:, :, [0, 1, 2, 3, 4, 5, 4, 5, 4, 5]] for x in (k, v))
    gone, come = ([x[:, :, some] for x in (k, v)] for some in (slice(4, 6), slice(4, 12)))
    found = exchange(q, attend_lse(q, thrice_k, thrice_v, SCALE), gone, come, SCALE, 3)
    expected = (SCALE * q.float() @ k.float().mT).softmax(-1) @ v.float()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("factor", "size"), [(2, (4, 6)), (3, (3, 7)), (4, (8, 9))])
def test_a_smaller_grid_is_bilinear(factor: int, size: tuple[int, int]) -> None:
    x = torch.randn(1, *size, 4)
    whole = x[:, : size[0] // factor * factor, : size[1] // factor * factor].permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(
        whole, (size[0] // factor, size[1] // factor), mode="bilinear", align_corners=False
    ).permute(0, 2, 3, 1)
    torch.testing.assert_close(smaller_grid(x, factor), expected)


def test_the_farthest_comes_next() -> None:
    x = torch.tensor([[[0.0], [1.0], [9.0], [5.0]], [[3.0], [3.5], [0.0], [3.1]]])
    assert farthest_first(x, 3).tolist() == [[0, 2, 3, 1], [0, 2, 1, 3]]


# ------------------------------------------------------------------------------------------------------- layers' outputs


def test_outputs_that_nobody_reads_are_not_kept() -> None:
    model, inputs = built()
    dense, before = run_once(model, inputs), snapshot_of(model)
    assert layers_read(model) == {0, 3}
    with torch.no_grad():
        stock, _ = model.aggregator(**inputs)
        with heads_outputs_alone(model):
            assert torch.equal(run_once(model, inputs), dense)
            outputs, _ = model.aggregator(**inputs)
    assert snapshot_of(model) == before
    assert [bool(output.isnan().any()) for output in outputs] == [False, True, True, False]
    held, all_of_it = (sum(output.untyped_storage().nbytes() for output in each) for each in (outputs, stock))
    width = model.config["embed_dim"]
    assert all_of_it == bytes_of_outputs(FRAMES, 20, width, 4, itemsize=4)
    assert held == bytes_of_outputs(FRAMES, 20, width, 2, itemsize=4) + 2 * 4


def test_outputs_are_kept_beside_a_recipe() -> None:
    model, inputs = built()
    with accelplug.apply(model, recipe("avggt"), gate="off"):
        patched = run_once(model, inputs)
        with heads_outputs_alone(model, layers=[0]):
            assert torch.equal(run_once(model, inputs), patched)


def test_a_model_that_gathers_no_outputs_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no aggregator"), heads_outputs_alone(built("pi3")[0]):
        pass
    with pytest.raises(UnsupportedError, match="no head that says"), heads_outputs_alone(built("vggt-omega")[0]):
        pass


# ------------------------------------------------------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def truth() -> Reconstruction:
    return Walks(frames=(3,), rooms=1, size=(28, 42)).walks[0].truth


def test_the_scale_of_a_reconstruction_is_free_and_angles_are_told(truth: Reconstruction) -> None:
    large, turned = truth.poses.clone(), truth.poses.clone()
    large[:, :3, 3] *= 2
    same = deviation_of(Reconstruction(large, 2 * truth.points), truth)
    assert max(same.rotation_deg, same.direction_deg) < 0.1
    assert max(same.depth, same.chamfer) < 1e-3
    cos, sin = math.cos(math.radians(10)), math.sin(math.radians(10))
    turned[1:, :3, :3] = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]]) @ turned[1:, :3, :3]
    other = deviation_of(Reconstruction(turned, truth.points), truth)
    assert other.rotation_deg == pytest.approx(10, abs=0.1)
    assert other.chamfer > 0.01
    deeper = truth.points.clone()
    deeper[0] *= 1.5  # a third of the pixels: the median stays
    assert deviation_of(Reconstruction(truth.poses, deeper), truth).depth == pytest.approx(0.5 / 3, abs=1e-3)


def test_what_models_say_is_read(truth: Reconstruction) -> None:
    height, width = truth.points.shape[1:3]
    field = torch.tensor([2 * math.atan(height / width * math.tan(FIELD_OF_VIEW / 2)), FIELD_OF_VIEW])
    pose = torch.cat([truth.poses[:, :3, 3], quaternion_of(truth.poses[:, :3, :3]), field.expand(3, -1)], -1)
    of_vggt = {"pose_enc": pose[None], "depth": truth.points[None, ..., 2:]}
    of_pi3 = {"camera_poses": torch.linalg.inv(truth.poses)[None], "local_points": truth.points[None]}
    for said in (of_vggt, of_pi3):
        found = reconstruction_of(said)
        torch.testing.assert_close(found.poses, truth.poses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.points, truth.points, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedError, match="got logits"):
        reconstruction_of({"logits": pose})


def test_compare_tells_poses_points_and_growth() -> None:
    model, _ = built()
    before = snapshot_of(model)
    recipes = {"thinned": recipe("avggt"), "as it is": recipe("avggt", dict(ROWS["avggt"].neutral))}
    found = accelplug.compare(model, recipes, Walks(frames=(2, 4), rooms=1, size=(28, 42)), progress=False)
    assert snapshot_of(model) == before
    assert [row.name for row in found.rows] == ["dense", "thinned", "as it is"]
    assert found["as it is"].mean("to_dense", "depth") == 0
    assert found["thinned"].mean("to_dense", "depth") > 0
    assert found["thinned"].density < found["as it is"].density == 1
    assert all(row.growth is not None and row.mean("to_truth", "chamfer") > 0 for row in found.rows)
    assert "drawn rooms of 2, 4 frames" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["rows"][1]["on"][0]["frames"] == 2
    own = accelplug.compare(model, recipe("fastvggt"), {"mine": torch.rand(2, 3, 28, 42)}, progress=False)
    assert math.isnan(own.rows[0].mean("to_truth", "depth"))
    assert own.rows[0].growth is None
    with pytest.raises(AccelplugError, match="two frames or more"):
        Walks({"mine": torch.rand(1, 3, 28, 42)})


# ------------------------------------------------------------------------------------------------- the small one of our own


@pytest.fixture(scope="module")
def boxes() -> VGGT:
    return VGGT.from_pretrained(zoo.path("vggt-boxes"))


def test_the_bundled_model_is_small(boxes: VGGT) -> None:
    files = [file for file in zoo.path("vggt-boxes").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10_000_000
    assert {file.suffix for file in files} <= {".json", ".md", ".safetensors"}


@torch.no_grad()
def test_the_bundled_model_sees_rooms_by_its_global_attention(boxes: VGGT) -> None:
    walks = Walks(frames=(8,), rooms=3, degrees=60.0).walks
    known = rays(84, 112).view(84, 112, 3)

    def mean_error(name: str) -> float:
        found = [deviation_of(reconstruction_of(boxes(walk.pictures[None]), known), walk.truth) for walk in walks]
        return sum(getattr(one, name) for one in found) / len(found)

    whole = {name: mean_error(name) for name in ("rotation_deg", "direction_deg")}
    with accelplug.apply(boxes, recipe("avggt", {"frame_layers": 1.0, "dense_layers": 0.0}), gate="off", strict=True):
        alone = {name: mean_error(name) for name in whole}
    assert all(whole[name] < 0.6 * alone[name] for name in whole), (whole, alone)


def test_the_bundled_model_has_a_recipe_of_its_own(boxes: VGGT) -> None:
    with accelplug.apply(boxes, gate="off") as plug:
        assert plug.recipe.name == "vggt-boxes/balanced"


def test_the_benchmark_tells_growth_and_errors_above_dense() -> None:
    rows = {(frames, "dense"): {"ms": [frames**1.5, frames**1.5]} for frames in (10, 20, 80)}
    assert growth_of(rows, "dense") == pytest.approx(1.5)
    assert math.isnan(growth_of(rows, "avggt"))
    far = [{"to_truth_rotation_deg": rotation, "to_truth_direction_deg": 4.0} for rotation in (3.0, 2.0)]
    assert above_dense(*far) == pytest.approx(1.5)
    assert above_dense({}, far[1]) is None


def test_the_command_line_takes_geometry_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, recipe, report = tmp_path / "model", tmp_path / "mine.yaml", tmp_path / "walks.json"
    VGGT(embed_dim=32, depth=2, num_heads=2, layers=(0, 1)).save_pretrained(folder)
    recipe.write_text("schema: 1\nmodel: mine\nmatch: {class: VGGT}\ndefault: a\nrecipes: {a: {rules: [{patch: avggt}]}}\n")
    assert main(["compare", str(folder), "--recipe", str(recipe), "--frames", "2", "--report", str(report)]) == 0
    assert "2 drawn rooms of 2 frames" in capsys.readouterr().out
    assert [row["name"] for row in json.loads(report.read_text())["rows"]] == ["dense", "a"]
    for command in (
        ["inspect", str(folder)],
        ["tune", str(folder), "-o", str(tmp_path / "t.yaml")],
        ["compare", str(folder), "--prompt", "a"],
    ):
        assert main(command) == 2
        assert "a geometry transformer" in capsys.readouterr().err
    (folder / "model.safetensors").write_bytes(b"")
    assert main(["compare", str(folder)]) == 2
    assert "cannot be loaded as a geometry transformer" in capsys.readouterr().err
