"""Sol-Attn: the threshold, what it selects, and its limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from accelplug.call import AttentionCall, Clock, Layout, Site
from accelplug.patches.base import Scores
from accelplug.patches.sparse.sol import Sol

SITE = Site("blocks.0.attn1", "transformer", "self", 0, 1)


def call_of(layout: Layout, batch: int = 1, heads: int = 2, dim: int = 16, mask=None) -> AttentionCall:
    q, k, v = (torch.randn(batch, heads, layout.length, dim) for _ in range(3))

    def dense(q=q, k=k, v=v):
        return F.scaled_dot_product_attention(q, k, v)

    return AttentionCall(q, k, v, mask, dim**-0.5, dense)


def lowered(patch: Sol, call: AttentionCall, layout: Layout):
    return patch.inspect(call, patch.prepare(SITE, layout, Clock(), {}))[1]


@pytest.mark.parametrize("order", ["raster", "morton"])
@pytest.mark.parametrize("text", [(0, 0), (5, 0), (0, 9)])
def test_everything_is_dense_attention(order, text):
    layout = Layout((3, 5, 7), *text)
    call = call_of(layout, batch=2)
    patch = Sol({"block": 8, "tau": -1e9, "order": order, "backend": "reference"})
    out = patch.attend(call, patch.prepare(SITE, layout, Clock(), {}))
    torch.testing.assert_close(out, call.dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("band", [0, 1, 2])
def test_nothing_stands_out_leaves_band_and_text(band):
    layout = Layout((3, 5, 7), text_after=9)
    patch = Sol({"block": 8, "tau": 1e9, "band": band})
    plan = lowered(patch, call_of(layout), layout)
    text = torch.arange(plan.members.shape[-1]) >= -(-105 // 8)
    at = torch.arange(len(text))
    expected = ((at[:, None] - at).abs() <= band) | text | text[:, None]
    assert torch.equal(plan.members, expected.expand_as(plan.members))


def test_the_neutral_setting_is_left_to_dense():
    assert Sol({"tau": "dense"}).prepare(SITE, Layout((2, 4, 4)), Clock(), {}) is None


@pytest.mark.parametrize("statistic", ["diag", "exact"])
@pytest.mark.parametrize(("tau", "share"), [(1.0, 0.159), (1.5, 0.067), (2.0, 0.0228)])
def test_share_of_gaussian_keys(tau, share, statistic):
    layout = Layout((8, 16, 32))
    patch = Sol({"block": 8, "tau": tau, "band": 0, "statistic": statistic})
    plan = lowered(patch, call_of(layout, heads=4), layout)
    off_diagonal = ~torch.eye(plan.members.shape[-1], dtype=torch.bool)
    assert float(plan.members[..., off_diagonal].double().mean()) == pytest.approx(share, rel=0.15)


def test_statistics_agree_where_channels_are_uncorrelated():
    keys = torch.cat([torch.eye(4), -torch.eye(4)]) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    scores = Scores(torch.randn(2, 3, 5, 4), keys.expand(2, 3, 8, 4), 0.5)
    counted = torch.ones(8, dtype=torch.bool)
    diag, exact = (Sol({"statistic": statistic}).threshold(scores, counted) for statistic in ("diag", "exact"))
    torch.testing.assert_close(diag, exact)


@pytest.mark.parametrize("statistic", ["diag", "exact"])
def test_threshold_is_mean_plus_deviations_of_the_score(statistic):
    """A second statement of the formula, block by block in float64."""
    scores = Scores(torch.randn(1, 2, 6, 4), torch.randn(1, 2, 9, 4), 0.3)
    counted = torch.arange(9) < 7
    theta = Sol({"tau": 1.3, "statistic": statistic}).threshold(scores, counted)
    a = 0.3 * math.log2(math.e)
    for h in range(2):
        keys = scores.k_pool[0, h, :7].double()
        covariance = torch.cov(keys.T, correction=0)
        covariance = covariance if statistic == "exact" else covariance.diag().diag()
        for m in range(6):
            q = scores.q_pool[0, h, m].double()
            expected = a * (q @ keys.mean(0)) + 1.3 * torch.sqrt(a * a * (q @ covariance @ q) + 1e-6)
            assert float(theta[0, h, m]) == pytest.approx(float(expected), rel=1e-5)


def test_lower_tau_reads_more():
    layout = Layout((4, 6, 7))
    call = call_of(layout)
    plans = [lowered(Sol({"block": 8, "tau": tau, "band": 0}), call, layout).members for tau in (2.0, 1.0, 0.0, -1.0)]
    for fewer, more in itertools.pairwise(plans):
        assert (more | ~fewer).all()
        assert more.sum() > fewer.sum()


def test_batch_entries_are_independent_and_padding_does_not_disturb():
    layout = Layout((3, 5, 7), text_after=8)
    mask = torch.ones(2, layout.length, dtype=torch.bool)
    mask[0, -3:] = False
    call = call_of(layout, batch=2, mask=mask)
    patch = Sol({"block": 8, "tau": 0.5, "backend": "reference"})
    params = patch.prepare(SITE, layout, Clock(), {})
    both = patch.attend(call, params)
    for b in range(2):
        alone = AttentionCall(
            call.q[b : b + 1], call.k[b : b + 1], call.v[b : b + 1], mask[b : b + 1], call.scale, call.dense
        )
        torch.testing.assert_close(patch.attend(alone, params), both[b : b + 1])
    call.k[0, :, -3:] = 1e4  # keys that may not be read
    torch.testing.assert_close(patch.attend(call, params)[:, :, :-3], both[:, :, :-3])


@pytest.mark.parametrize("statistic", ["diag", "exact"])
def test_traces_in_one_graph(statistic):
    layout = Layout((3, 5, 7), text_before=4)
    call = call_of(layout)
    patch = Sol({"block": 8, "statistic": statistic, "backend": "blocked", "order": "morton"})
    params = patch.prepare(SITE, layout, Clock(), {})

    def attend(q, k, v):
        return patch.attend(AttentionCall(q, k, v, None, call.scale, call.dense), params)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(call.q, call.k, call.v), attend(call.q, call.k, call.v))
