"""The page: one self-contained HTML file made of `report.html` and the comparison's data."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from accelplug.comparison.result import Comparison, Row

TEMPLATE = Path(__file__).with_name("report.html")
MAX_WIDTH = 384
"""Frames wider than this are shrunk for the page, in pixels."""


def page(comparison: Comparison) -> str:
    """Return the page as text. Clips are embedded as sprite sheets, one image per clip."""
    data = {
        **comparison.to_dict(),
        "headings": comparison.headings(),
        "table": [{"kind": row.kind, "cells": comparison.cells(row)} for row in comparison.rows],
        "pareto": [point for row in comparison.rows if (point := _point(comparison, row))],
        "floor": [
            {"name": r.name, "psnr": _finite(r.mean(_metric(comparison)))} for r in comparison.rows if r.kind == "floor"
        ],
        "metric": "foreground PSNR" if _metric(comparison) == "fg_psnr_db" else "PSNR",
        "clips": [
            {"name": name, "prompt": prompt, "seed": seed, **sprite(clip)}
            for (name, prompt, seed), clip in comparison.clips.items()
        ],
    }
    text = json.dumps(data).replace("</", "<\\/")  # so that no text of the data ends the script
    return TEMPLATE.read_text().replace("/*DATA*/null", text)


def sprite(clip: np.ndarray) -> dict[str, Any]:
    """Return a clip (F, H, W, 3) uint8 as one image with its frames below each other, and its frame size."""
    from PIL import Image

    every = -(-clip.shape[2] // MAX_WIDTH)
    clip = clip[:, ::every, ::every]
    frames, height, width, _ = clip.shape
    file = io.BytesIO()
    Image.fromarray(clip.reshape(frames * height, width, 3)).save(file, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"frames": frames, "height": height, "width": width, "source": source}


def _metric(comparison: Comparison) -> str:
    return "fg_psnr_db" if any(row.values("fg_psnr_db") for row in comparison.rows) else "psnr_db"


def _point(comparison: Comparison, row: Row) -> dict[str, Any] | None:
    quality = _finite(row.mean(_metric(comparison)))
    if row.kind not in ("recipe", "cache") or quality is None:
        return None
    worst = _finite(row.worst(_metric(comparison)))
    return {"name": row.name, "kind": row.kind, "speedup": comparison.speedup(row).p50, "psnr": quality, "worst": worst}


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
