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
MAX_SIDE = 384
"""Frames wider or higher than this are shrunk for the page, in pixels."""
LOSSLESS_PIXELS = 2_000_000
"""Clips of more pixels than this, over all frames, are embedded with loss: a page must open on a telephone."""


def page(comparison: Comparison) -> str:
    """Return the page as text. Clips are embedded as sprite sheets, one image a clip."""
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
    """Return a clip (F, H, W, 3) uint8 as one WebP image with its frames in rows, and how to cut it."""
    from PIL import Image

    frames, height, width, _ = clip.shape
    shrink = max(1.0, max(height, width) / MAX_SIDE)
    height, width = round(height / shrink), round(width / shrink)
    columns = math.ceil(math.sqrt(frames * height / width))  # nearly square: WebP ends at 16,383 pixels a side
    sheet = Image.new("RGB", (columns * width, -(-frames // columns) * height))
    for index, pixels in enumerate(clip):
        frame = Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX)
        sheet.paste(frame, (index % columns * width, index // columns * height))
    file = io.BytesIO()
    sheet.save(file, "WEBP", lossless=frames * height * width <= LOSSLESS_PIXELS, quality=88)
    source = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return {"frames": frames, "height": height, "width": width, "columns": columns, "source": source}


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
