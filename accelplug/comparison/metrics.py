"""What runs are judged by: one table of clips against dense clips, one of answers. A new metric is a line there, and its function.

Clips are float arrays (F, H, W, 3) in [0, 1]; a still has F = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from accelplug.comparison.evaluators.statistics import mcc, ratio
from accelplug.comparison.lpips import lpips, no_lpips
from accelplug.comparison.questions import Item, Reply

Clip = NDArray[np.float32]
Mask = NDArray[np.bool_]


def psnr_db(clip: Clip, reference: Clip, mask: Mask | None = None) -> float:
    """Peak signal-to-noise ratio in dB, over the pixels of `mask` (F, H, W) if given; infinite for equal clips.

    NaN where the mask is empty.
    """
    error = np.square(clip.astype(np.float64) - reference)
    if mask is not None:
        if not mask.any():
            return math.nan
        error = error[mask]
    mse = float(error.mean())
    return math.inf if mse == 0 else -10 * math.log10(mse)


def ssim(clip: Clip, reference: Clip) -> float:
    """Structural similarity, mean over frames (torchmetrics, Gaussian window of 11 pixels)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float() for x in (clip, reference))
    return float(structural_similarity_index_measure(a, b, data_range=1.0))


def foreground_psnr_db(clip: Clip, reference: Clip, foreground: Callable[[NDArray[np.uint8]], Mask]) -> float:
    """PSNR in dB over the union of both clips' objects: on a flat background a missing object would hardly count."""
    mask = foreground(to_uint8(clip)) | foreground(to_uint8(reference))
    return psnr_db(clip, reference, mask)


def flicker(clip: Clip, reference: Clip) -> float | None:
    """Distance of what changes from frame to frame, relative to the reference's changes (L2); None where nothing changes there."""
    change, expected = np.diff(clip.astype(np.float64), axis=0), np.diff(reference.astype(np.float64), axis=0)
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(change - expected)) / size if size else None


def relative_distance(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """L2 distance of latents over the norm of the reference."""
    a, b = latents.double(), reference.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def to_uint8(clip: Clip) -> NDArray[np.uint8]:
    """Float in [0, 1] to bytes."""
    return np.rint(np.clip(clip, 0, 1) * 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------- the tables


@dataclass(frozen=True)
class Metric:
    """A figure that budgets may bound.

    Attributes
    ----------
    name : in budgets.
    better : the side on which it is good.
    title, unit, digits : how it is shown; the unit may be empty.
    needs : what must be there for it, in words; empty if nothing must.
    """

    name: str
    better: Literal[">=", "<="]
    title: str
    unit: str = ""
    digits: int = 3
    needs: str = ""

    @property
    def higher_is_better(self) -> bool:
        """Which side is good."""
        return self.better == ">="

    @property
    def heading(self) -> str:
        """Its title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    @property
    def key(self) -> str:
        """Its name in samples and in JSON."""
        return f"{self.name}_db" if self.unit == "dB" else self.name


@dataclass(frozen=True)
class Beside:
    """A run beside the dense run of the same prompt and seed, which is None where the run is that one.

    Attributes
    ----------
    latents, dense_latents : of the last step, where the pipeline shows them.
    foreground, detect, prompt : see `accelplug.compare`.
    """

    clip: Clip
    dense: Clip | None
    latents: torch.Tensor | None = None
    dense_latents: torch.Tensor | None = None
    foreground: Callable[[NDArray[np.uint8]], Mask] | None = None
    detect: Callable[[NDArray[np.uint8], str], float] | None = None
    prompt: str = ""


@dataclass(frozen=True)
class ClipMetric(Metric):
    """A figure of a pipeline's run.

    Attributes
    ----------
    of : what a run scores, or None where something it needs is not there.
    missing : why it cannot be measured on this machine; None where it can, or always can.
    recorded : its name in a `measured` row; empty if it stands in none.
    columns : what the table shows of it: ``mean``, ``worst``.
    """

    of: Callable[[Beside], float | None] = lambda run: None
    missing: Callable[[], str | None] = lambda: None
    recorded: str = ""
    columns: tuple[Literal["mean", "worst"], ...] = ("mean",)


def _against(score: Callable[[Clip, Clip], float | None]) -> Callable[[Beside], float | None]:
    return lambda run: None if run.dense is None else score(run.clip, run.dense)


def _foreground(run: Beside) -> float | None:
    return None if run.dense is None or run.foreground is None else foreground_psnr_db(run.clip, run.dense, run.foreground)


def _agreement(run: Beside) -> float | None:
    return None if run.detect is None else float(run.detect(to_uint8(run.clip), run.prompt))


def _latent_distance(run: Beside) -> float | None:
    return None if run.latents is None or run.dense_latents is None else relative_distance(run.latents, run.dense_latents)


MEAN_AND_WORST: tuple[Literal["mean", "worst"], ...] = ("mean", "worst")
METRICS: Mapping[str, ClipMetric] = {
    metric.name: metric
    for metric in (
        ClipMetric("psnr", ">=", "PSNR", "dB", 1, of=_against(psnr_db), recorded="psnr_db", columns=MEAN_AND_WORST),
        ClipMetric(
            "fg_psnr",
            ">=",
            "foreground PSNR",
            "dB",
            1,
            "foreground=",
            of=_foreground,
            recorded="foreground_psnr_db",
            columns=MEAN_AND_WORST,
        ),
        ClipMetric("ssim", ">=", "SSIM", of=_against(ssim), recorded="ssim"),
        ClipMetric("flicker", "<=", "flicker", needs="frames that differ", of=_against(flicker), recorded="flicker"),
        ClipMetric("agreement", ">=", "agreement", digits=2, needs="detect=", of=_agreement),
        ClipMetric(
            "latent_distance", "<=", "distance of latents", needs="latents of the pipeline", of=_latent_distance, columns=()
        ),
        ClipMetric("lpips", "<=", "LPIPS", of=_against(lpips), missing=no_lpips, recorded="lpips"),
    )
}
"""Of pipelines, by name."""
BY_KEY = {metric.key: metric for metric in METRICS.values()}


@dataclass(frozen=True)
class AnswerMetric(Metric):
    """A figure of a language model's answers.

    Attributes
    ----------
    counts : what adds up over questions.
    figure : the figure, from sums of the counts; NaN where nothing can be said.
    objective : whether a search may aim at it by itself: saying always the same must not do well.
    undefined : what it counts as in a gain where it is NaN.
    """

    counts: Callable[[Item, Reply], Sequence[float]] | None = None
    figure: Callable[..., float] = ratio
    objective: bool = False
    undefined: float = math.nan

    def value(self, asked: Sequence[Item], replies: Sequence[Reply]) -> float:
        """Return what replies are worth."""
        rows = [self.counts(item, reply) for item, reply in zip(asked, replies, strict=True)] if self.counts else []
        return self.figure(*map(sum, zip(*rows, strict=True))) if rows else math.nan

    def gain(self, before: float, after: float) -> float:
        """Return how much better a value is than another."""
        before, after = (self.undefined if math.isnan(value) else value for value in (before, after))
        return after - before if self.higher_is_better else before - after


def _right_answer(item: Item, reply: Reply) -> list[float]:
    return [reply.right, reply.said is not None]


def _four_ways(item: Item, reply: Reply) -> list[float]:
    """Right of yes, yes, right of no, no, by the truth."""
    return [item.truth is truth and x for truth in (True, False) for x in (reply.right, reply.said is not None)]


def _matthews(tp: float, yes: float, tn: float, no: float) -> float:
    return mcc(int(tp), int(no - tn), int(yes - tp), int(tn))


def _yes_by_truth(truth: bool) -> Callable[[Item, Reply], list[float]]:
    """Yes among the answers to questions whose truth this is."""
    return lambda item, reply: [item.truth is truth and x for x in (reply.yes is True, reply.said is not None)]


def _nats(item: Item, reply: Reply) -> list[float]:
    return [reply.nll if reply.tokens else 0.0, reply.tokens]


ANSWERS, POLAR, LIKELIHOODS = "answers", "questions of yes and no", "likelihoods of the references"
ANSWER_METRICS: Mapping[str, AnswerMetric] = {
    metric.name: metric
    for metric in (
        AnswerMetric("accuracy", ">=", "accuracy", needs=ANSWERS, counts=_right_answer, objective=True),
        AnswerMetric("mcc", ">=", "MCC", needs=POLAR, counts=_four_ways, figure=_matthews, objective=True, undefined=0.0),
        AnswerMetric("recall", ">=", "recall", needs=POLAR, counts=_yes_by_truth(True)),
        AnswerMetric("hallucination", "<=", "hallucination", needs=POLAR, counts=_yes_by_truth(False)),
        AnswerMetric(
            "nll", "<=", "negative log-likelihood", "nats a token", needs=LIKELIHOODS, counts=_nats, objective=True
        ),
        AnswerMetric("speed", ">=", "speed"),
    )
}
"""Of language models, by name: accuracy, share that is right; mcc, Matthews correlation; recall, yes where it is so; hallucination,
yes where it is not; nll of the references; speed, stock seconds over a patch's."""


def figures(asked: Sequence[Item], replies: Sequence[Reply]) -> dict[str, float]:
    """Return what replies are worth by all metrics of answers; NaN where it was not asked for or nothing can be said."""
    return {name: metric.value(asked, replies) for name, metric in ANSWER_METRICS.items() if metric.counts is not None}
