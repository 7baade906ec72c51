"""Head patches on whole models against plain float64 probabilities: prompts and every step of their answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import accelplug
from tests.eager_oracle import METHODS, Inputs, Method, Oracle
from tests.tiny_language_models import IMAGE, VIDEO, VLM, build, forward, inputs

WORKING: dict[str, dict[str, Any]] = {
    "visual_bias": {"image_weight": 6.0, "system_weight": 0.3},
    "var": {
        "move_fraction": 0.6,
        "sink_dims": [5, 9],
        "sink_threshold": 1.2,
        "min_visual_mass": 0.1,
        "min_nonsink_ratio": 0.4,
    },
    "vhr": {"gain": 2.0},
    "gift": {"saliency_layer": 1, "enhance": [2, 4], "alpha": 3.0},
    "pai": {"alpha": 2.0},
    "imbalance": {"local_alpha": 4.0, "summary_alpha": 2.0},
}
TOWER = {"llava"}
"""Families whose vision tower has a class token and one image token a patch, which imbalance needs."""
STEPS = 4
CLOSE = {"atol": 5e-6, "rtol": 0.0}


def sharp(name: str) -> Any:
    """A tiny model in float64 whose heads look at some tokens and not at others."""
    model = build(name).double()
    for path, parameter in model.get_decoder().named_parameters():
        if path.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.mul_(8)
        if path.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.add_(1)
    return model


def double(given: Inputs) -> Inputs:
    """Pixels in float64."""
    return {key: x.double() if x.is_floating_point() else x for key, x in given.items()}


def answered(model: Any, given: Inputs, **how: Any) -> tuple[Tensor, Tensor]:
    """Ids (B, S) of prompts and answers, and the logits (B, steps, V) that the answers were taken from."""
    plain = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    more = {"suppress_tokens": [IMAGE, VIDEO], "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    out = model.generate(**given, **{**plain, **more, **how})
    logits = torch.stack(out.logits, 1)
    if how.get("num_beams", 1) > 1:
        logits = logits[out.beam_indices, torch.arange(logits.shape[1])]
    return out.sequences, logits.double()


def hold(name: str, patch: str, given: Inputs, **how: Any) -> None:
    """Assert that a patched model says of a prompt, and at every step of its answer, what the oracle says."""
    model, given = sharp(name), double(given)
    with accelplug.apply(model, {"patch": patch, "with": WORKING[patch]}, strict=True) as plug:
        prompt = forward(model, given)
        ids, steps = answered(model, given, **how)
        assert not plug.report().fallbacks
    oracle = Oracle(model)
    expected, stock = (oracle.answer(method, given, ids) for method in (METHODS[patch](**WORKING[patch]), Method()))
    asked, valid = given["input_ids"].shape[1], given["attention_mask"].bool()
    torch.testing.assert_close(prompt[valid], expected[:, :asked][valid], **CLOSE)
    torch.testing.assert_close(steps, expected[:, asked - 1 : -1], **CLOSE)
    assert ((expected - stock)[:, asked - 1 :].abs().amax((1, 2)) > 1e-2).all()


PAIRS = [(patch, name) for patch in WORKING for name in VLM if patch != "imbalance" or name in TOWER]


@pytest.mark.parametrize(("patch", "name"), PAIRS)
def test_every_patch_on_every_family(patch, name):
    """A batch padded on the left, whose second row shows two images; grouped heads; Gemma 3's windows of 8."""
    hold(name, patch, inputs(name))
