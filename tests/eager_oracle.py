"""What the head patches do to a whole model, said a second time: plain float64 probabilities, no cache, no kernel, no host.

A stock model is read once over the prompt and the tokens that were answered, with its attention replaced by a softmax over all
keys that its own mask lets a row read. A method is written from its paper's formulas, as what it makes of those probabilities.
Attention is causal, so that row ``n - 1 + t`` of the result is the logits of step t of an answer to a prompt of n tokens, and no
bookkeeping of a cache can be wrong.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from accelplug.hosts.models import decoder_of
from accelplug.testing.language_models import forward

NAME = "plain_probabilities"
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Tokens:
    """What the tokens of a batch are: bool (B, S) each."""

    valid: Tensor
    prompt: Tensor
    """Asked, not answered."""
    visual: Tensor
    """Shown by images and videos."""
    system: Tensor
    """Text ahead of the images."""
    question: Tensor
    """Text of the prompt behind the first image."""
    content: Tensor
    """Of it, what moves the gaze."""
    later: Tensor
    """Text behind the first image, asked or answered."""
    answering: Tensor
    """Tokens behind which an answer stands, or nothing."""

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor, asked: Tensor, visual: tuple[int, ...]) -> Tokens:
        """Read them off ids (B, S), the mask of what is no padding, bool (S,) columns that were asked, and ids of what is visual."""
        valid = mask.bool()
        prompt = valid & asked
        shown = prompt & torch.isin(ids, torch.tensor(visual))
        behind = shown.cumsum(-1) > 0
        later = valid & behind & ~shown
        system = prompt & ~behind & shown.any(-1, keepdim=True)
        answering = torch.zeros_like(valid)
        for row, here in zip(answering, valid, strict=True):
            columns = here.nonzero().flatten().tolist()
            for column, following in zip(columns, [*columns[1:], None], strict=True):
                row[column] = following is None or not (asked[column] and asked[following])
        return cls(valid, prompt, shown, system, later & prompt, later & prompt, later, answering)


@dataclass(frozen=True)
class Call:
    """One layer's attention: scores (B, H, S, S), -inf where a row may not read; values (B, H, S, D); what entered the layer (B, S, C)."""

    layer: int
    scores: Tensor
    v: Tensor
    hidden: Tensor
    tokens: Tokens

    @property
    def p(self) -> Tensor:
        """Probabilities (B, H, S, S): exactly 0 where a row may not read, and in rows that may read nothing."""
        return self.scores.softmax(-1).nan_to_num(0.0)

    def rows(self, where: Tensor, new: Tensor) -> Tensor:
        """Probabilities `new` in some rows, bool (B, S), of sequences that show an image; the model's own elsewhere."""
        return torch.where((where & self.tokens.visual.any(-1, keepdim=True))[:, None, :, None], new, self.p)


class Method:
    """The model's own attention."""

    def prepare(self, oracle: Oracle, given: Inputs) -> None:
        """Find out what must be known of a prompt before it is answered."""

    def attend(self, call: Call) -> Tensor:
        """Outputs of all heads (B, H, S, D)."""
        return call.p @ call.v


class Look(Method):
    """The model's own attention, kept by layer."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}

    def attend(self, call: Call) -> Tensor:
        self.calls[call.layer] = call
        return call.p @ call.v


@dataclass
class Telling(Method):
    """Another method, whose attention and layers' inputs are kept."""

    method: Method

    def prepare(self, oracle: Oracle, given: Inputs) -> None:
        self.method.prepare(oracle, given)
        self.attention: dict[int, Tensor] = {}
        self.hidden: dict[int, Tensor] = {}

    def attend(self, call: Call) -> Tensor:
        unit = torch.eye(call.scores.shape[-1], dtype=call.v.dtype).expand_as(call.scores)
        scales = isinstance(self.method, Vhr | Spin)  # what is read, not where
        self.attention[call.layer] = call.p if scales else self.method.attend(replace(call, v=unit))
        self.hidden[call.layer] = call.hidden
        return self.method.attend(call)


class Oracle:
    """A float64 copy of a stock model, read by way of `Method`."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).double()
        self.model.config.get_text_config()._attn_implementation = {"": NAME}
        self.layers = decoder_of(self.model).layers
        names = ("image_token_id", "video_token_id")
        places = (self.model.config, getattr(self.model.config, "vision_config", None))
        self.visual = tuple(x for place in places for name in names if (x := getattr(place, name, None)) is not None)
        self.told: dict[str, Tensor] = {}
        """Spans of `Tokens` that somebody knows better, bool (B, prompt): what of a prompt is whose."""
        self._hidden: Tensor = torch.empty(0)
        self._method, self._layers = Method(), set[int]()
        self._outputs: dict[int, Tensor] = {}
        for layer in self.layers:
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._hidden = hidden if hidden.ndim == 3 else hidden[0]  # Gemma 3n's other streams are no layer's own

    def _attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **kwargs: Any) -> Any:
        assert kwargs.get("softcap") is kwargs.get("s_aux") is None
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = (q @ k.mT * scaling).masked_fill(mask < 0, -torch.inf)
        call = Call(module.layer_idx, scores, v, self._hidden, self._tokens)
        self._outputs[call.layer] = call.p @ v
        out = self._method.attend(call) if call.layer in self._layers else call.p @ v
        return out.transpose(1, 2).contiguous(), None

    def read(self, given: Inputs, method: Method, layers: Iterable[int], asked: Tensor | None = None) -> Tensor:
        """Logits (B, S, V) of all rows, with a method in some layers; all columns were asked, or those that are bool (S,) `asked`."""
        asked = torch.ones(given["input_ids"].shape[1], dtype=torch.bool) if asked is None else asked
        self._tokens = Tokens.of(given["input_ids"], given["attention_mask"], asked, self.visual)
        if self.told and asked.shape[0] >= next(iter(self.told.values())).shape[1]:  # a prompt without its images is shorter
            more = {name: pad(span, (0, asked.shape[0] - span.shape[1])) for name, span in self.told.items()}
            self._tokens = replace(self._tokens, **more)
        self._method, self._layers, self._outputs = method, set(layers), {}
        with _registered(self._attend):
            return forward(self.model, {**given, "use_cache": False})

    def outputs(self, given: Inputs, method: Method, layers: Iterable[int]) -> dict[int, Tensor]:
        """By layer, what the heads bring of each row of a prompt before the method has its say there: (B, H, S, D)."""
        self.read(given, method, layers)
        return self._outputs

    def answer(
        self,
        method: Method,
        given: Inputs,
        ids: Tensor | None = None,
        layers: Iterable[int] | None = None,
        asked: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, S, V) of a prompt and of what follows it.

        Parameters
        ----------
        given : the prompt.
        ids : (B, S), the prompt and what follows.
        layers : where the method is, all if left out.
        asked : bool (S,), columns that were asked; the prompt if left out.
        """
        given = {key: x.double() if x.is_floating_point() else x for key, x in given.items()}
        ids = given["input_ids"] if ids is None else ids
        self.of_method = list(range(len(self.layers)) if layers is None else layers)
        method.prepare(self, given)
        asked = torch.arange(ids.shape[1]) < given["input_ids"].shape[1] if asked is None else asked
        return self.read(extended(given, ids), method, self.of_method, asked)


@contextmanager
def _registered(attend: Any) -> Iterator[None]:
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    try:
        yield
    finally:
        for table in (AttentionInterface, AttentionMaskInterface):
            table._global_mapping.pop(NAME)


def extended(given: Inputs, ids: Tensor) -> Inputs:
    """Inputs of a prompt with the answer behind it: text, and no padding."""
    more = ids.shape[1] - given["input_ids"].shape[1]
    fill = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
    longer = {key: pad(given[key], (0, more), value=x) for key, x in fill.items() if key in given}
    return {**given, **longer, "input_ids": ids}


def normalised(p: Tensor) -> Tensor:
    """Attention whose rows sum to 1."""
    return p / p.sum(-1, keepdim=True)


def mass(p: Tensor, span: Tensor) -> Tensor:
    """Attention of every head and row to a span of keys, bool (B, S): (B, H, S)."""
    return (p * span[:, None, None]).sum(-1)


def strongest(x: Tensor, share: float) -> Tensor:
    """The share of heads with the largest values, bool; x (H,)."""
    order = sorted(range(len(x)), key=lambda h: -float(x[h]))
    return torch.tensor([h in order[: round(share * len(x))] for h in range(len(x))])


# ------------------------------------------------------------------------------------------------------------- the methods


@dataclass
class VisualBias(Method):
    """Attention of later text times a weight on images and one on the system prompt, renormalised; or its scores (2503.13107)."""

    image_weight: float
    system_weight: float
    heads: list[int] | None = None
    weigh: str = "attention"

    def attend(self, call: Call) -> Tensor:
        tokens, p = call.tokens, call.p
        weight = (1 + (self.image_weight - 1) * tokens.visual + (self.system_weight - 1) * tokens.system)[:, None, None]
        weighed = (call.scores * weight).softmax(-1).nan_to_num(0.0) if self.weigh == "scores" else normalised(p * weight)
        new = call.rows(tokens.later, weighed)
        changed = [h for h in range(p.shape[1]) if self.heads is None or h in self.heads]
        return p.index_copy(1, torch.tensor(changed), new[:, changed]) @ call.v


@dataclass
class Pai(Method):
    """``s + alpha |s|`` on images in rows that answer (2407.21771); or the mean of ``|s|`` over heads (2411.16724)."""

    alpha: float
    sizes: str = "head"

    def attend(self, call: Call) -> Tensor:
        size = call.scores.abs()
        size = size.mean(1, keepdim=True) if self.sizes == "mean" else size
        return raised(call, self.alpha * call.tokens.visual.double(), size) @ call.v


def raised(call: Call, share: Tensor, size: Tensor | None = None) -> Tensor:
    """Attention of rows that answer with scores raised by a share, (B, S) by key, of their size."""
    size = call.scores.abs() if size is None else size
    scores = torch.where(call.scores.isfinite(), call.scores + share[:, None, None] * size, -torch.inf)
    return call.rows(call.tokens.answering, scores.softmax(-1).nan_to_num(0.0))


@dataclass
class Imbalance(Method):
    """As PAI, on what the class token of the vision tower looks at early (local), and late by far the most (summary) (2501.12206)."""

    local_alpha: float
    summary_alpha: float
    local_share: float = 0.25
    head_share: float = 1.0

    def prepare(self, oracle: Oracle, given: Inputs) -> None:
        tower = oracle.model.base_model.vision_tower
        tower.set_attn_implementation("eager")
        maps = tower(given["pixel_values"], output_attentions=True).attentions
        first, late = (maps[i][:, :, 0, 1:].sum(1) for i in (0, -2))  # [images, patches]
        share = torch.zeros_like(first)
        for i in range(len(share)):
            low, high = (late[i].quantile(q) for q in (0.25, 0.75))
            summary = late[i] > high + 1.5 * (high - low)
            share[i] = torch.where(strongest(first[i], self.local_share), self.local_alpha, 0.0)
            share[i][summary] = self.summary_alpha
        shown = torch.isin(given["input_ids"], torch.tensor(oracle.visual))
        self.share = torch.zeros(shown.shape, dtype=share.dtype).masked_scatter(shown, share)

    def attend(self, call: Call) -> Tensor:
        new = raised(call, pad(self.share, (0, call.hidden.shape[1] - self.share.shape[1])))
        for b, i in call.tokens.answering.nonzero().tolist():
            lookers = strongest(mass(call.p, call.tokens.visual)[b, :, i], self.head_share)
            new[b, ~lookers, i] = call.p[b, ~lookers, i]
        return new @ call.v


@dataclass
class Var(Method):
    """A fraction of what heads spend on sinks goes to the image's other tokens (2503.03321)."""

    move_fraction: float
    min_nonsink_ratio: float
    min_visual_mass: float
    sink_dims: list[int] | str
    sink_threshold: float

    def _massive(self, first: Tensor) -> list[int]:
        """Dimensions in which a row's first token, normalised (C,), is massive: four at most, unless they are named."""
        if not isinstance(self.sink_dims, str):
            return list(self.sink_dims)
        size = first.abs()
        massive = (size >= max(self.sink_threshold, 100 * float(size.quantile(0.5)))).nonzero().flatten()
        return sorted(massive.tolist(), key=lambda d: -float(size[d]))[:4]

    def attend(self, call: Call) -> Tensor:
        x = call.hidden
        x, sinks = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), torch.zeros_like(call.tokens.prompt)
        for b, prompt in enumerate(call.tokens.prompt):
            for dim in self._massive(x[b, prompt][0]):
                sinks[b] |= prompt & (x[b, :, dim].abs() >= self.sink_threshold)
        rest = call.tokens.visual & ~sinks
        sinks &= (sinks & call.tokens.visual).any(-1, keepdim=True)
        p, seen = call.p, mass(call.p, call.tokens.visual)
        chosen = (seen >= self.min_visual_mass) & (mass(p, rest) / seen >= self.min_nonsink_ratio)
        moved = self.move_fraction * mass(p, sinks) / mass(p, rest)
        factor = 1 - self.move_fraction * sinks[:, None, None] + rest[:, None, None] * moved[..., None]
        return call.rows(call.tokens.later, torch.where(chosen[..., None], p * factor, p)) @ call.v


@dataclass
class Vhr(Method):
    """The heads that differ most from what they are without the image count more, in all rows (2412.13949)."""

    gain: float
    drop_outliers: bool = True

    def prepare(self, oracle: Oracle, given: Inputs) -> None:
        ids, valid = given["input_ids"], given["attention_mask"].bool()
        tokens = Tokens.of(ids, valid, torch.ones(ids.shape[1], dtype=torch.bool), oracle.visual)
        self.gains: dict[int, Tensor] = {}
        self.divergence: dict[int, Tensor] = {}
        for layer in oracle.of_method:  # each chosen with the gains of those before in force
            seeing, gains = oracle.outputs(given, self, self.gains).get(layer), dict(self.gains)
            if seeing is None:  # a layer of another kind
                continue
            chosen = torch.zeros(seeing.shape[:2], dtype=torch.bool)
            for b in tokens.visual.any(-1).nonzero().flatten().tolist():
                text = ids[b, valid[b] & ~tokens.visual[b]][None]
                self.gains = {at: x[b : b + 1] for at, x in gains.items()}
                blind = oracle.outputs({"input_ids": text, "attention_mask": torch.ones_like(text)}, self, gains)[layer]
                last = int(valid[b].nonzero().max())
                vhd, ta = (seeing[b, :, last] - blind[0, :, -1]).norm(dim=-1), blind[0, :, -1].square().sum(-1)
                only_blind = (vhd > vhd.mean() + vhd.std(correction=0)) & (ta > ta.mean() + ta.std(correction=0))
                self.divergence.setdefault(layer, torch.zeros_like(seeing[..., 0, 0]))[b] = vhd.clone()
                vhd[(only_blind & self.drop_outliers) | (vhd < 1e-5)] = 0  # where a window holds no image, rounding is left
                chosen[b] = vhd > vhd.quantile(0.5)
            self.gains = {**gains, layer: torch.where(chosen, self.gain, 1.0).double()}

    def attend(self, call: Call) -> Tensor:
        return call.p @ call.v * self.gains[call.layer][..., None, None]


@dataclass
class Gift(Method):
    """What the question made the model look at, rows that answer look at more; the question does not lose by it (2510.22067)."""

    saliency_layer: int
    enhance: list[int]
    alpha: float
    balance: float = 1.0
    head_share: float = 0.5

    def prepare(self, oracle: Oracle, given: Inputs) -> None:
        self.weight: Tensor | None = None
        oracle.read(given, self, [self.saliency_layer])

    def _read(self, call: Call) -> None:
        """The map of weights, (B, S), of a plain pass."""
        self.weight = torch.ones_like(call.hidden[..., 0])
        for b in call.tokens.visual.any(-1).nonzero().flatten().tolist():
            p, visual = call.p[b], call.tokens.visual[b]
            moves = torch.zeros_like(p[:, 0])  # [H, S]
            for i in call.tokens.content[b].nonzero().flatten().tolist():
                moves += (p[:, i] - p[:, i - 1]).clamp(min=0)
            heads = strongest(moves[:, visual].sum(-1), self.head_share)
            gaze = moves[heads].mean(0)[visual]
            mean, spread = gaze.mean(), gaze.std(correction=0)
            gaze = gaze.clamp(mean - 3 * spread, mean + 3 * spread)
            self.weight[b, visual] = torch.exp(self.alpha * (gaze - gaze.min()) / (gaze.max() - gaze.min()))

    def attend(self, call: Call) -> Tensor:
        if self.weight is None:
            self._read(call)
        elif self.enhance[0] <= call.layer < self.enhance[1]:
            return self._shifted(call, self.weight) @ call.v
        return call.p @ call.v

    def _shifted(self, call: Call, weight: Tensor) -> Tensor:
        tokens, new = call.tokens, call.p.clone()
        for b, i in (tokens.answering & tokens.visual.any(-1, keepdim=True)).nonzero().tolist():
            visual, question = (span[b].nonzero().flatten() for span in (tokens.visual, tokens.question))
            row = new[b, :, i]  # [H, S]
            seen, read = row[:, visual].sum(-1), row[:, question].sum(-1)
            lookers, askers = strongest(seen, self.head_share), strongest(read, self.head_share)
            row[:, visual] *= torch.where(lookers[:, None], weight[b, visual], 1.0)
            grown = row[lookers][:, visual].sum() / seen[lookers].sum() if seen.any() else 1.0  # no image in the window
            row[:, question] *= torch.where(askers, self.balance * grown, 1.0)[:, None]
            new[b, :, i] = normalised(row)
        return new


@dataclass
class Adhh(Method):
    """Listed heads drop their attention to text behind the image where it holds them (AD-HH)."""

    heads: list[list[int]]
    threshold: float = 0.4
    keep: float = 0.0

    def attend(self, call: Call) -> Tensor:
        tokens, p = call.tokens, call.p.clone()
        for b, i in (tokens.answering & tokens.visual.any(-1, keepdim=True)).nonzero().tolist():
            for head in [head for layer, head in self.heads if layer == call.layer]:
                row = p[b, head, i]
                row[tokens.later[b]] *= self.keep if row[tokens.later[b]].sum() >= self.threshold else 1
        return p @ call.v


@dataclass
class Spin(Method):
    """Outputs of the heads whose scores of the image sum to least are turned down in rows that answer (2505.16411)."""

    keep_share: float
    gain: float

    def attend(self, call: Call) -> Tensor:
        tokens, out = call.tokens, call.p @ call.v
        for b, i in tokens.answering.nonzero().tolist():
            seen = tokens.visual[b] & call.scores[b, 0, i].isfinite()
            towards = call.scores[b, :, i, seen].sum(-1).tolist()
            least = sorted(range(len(towards)), key=lambda h: towards[h])[
                : len(towards) - int(self.keep_share * len(towards))
            ]
            if seen.any():
                out[b, least, i] *= self.gain
        return out


@dataclass
class AdaptiveBoost(Method):
    """Scores of images raised, of the prompt's text lowered, by how unsure the model was of the token before (2602.13600)."""

    alpha: float
    scale: float
    image_boost: float
    text_divisor: float

    def attend(self, call: Call) -> Tensor:
        tokens, scores = call.tokens, call.scores.clone()
        for b, i in (self.risk[:, : scores.shape[-1]] > 0).nonzero().tolist():
            scores[b, :, i, tokens.visual[b]] *= 1 + (self.image_boost - 1) * self.risk[b, i]
            scores[b, :, i, tokens.prompt[b] & ~tokens.visual[b]] /= self.text_divisor
        return scores.softmax(-1).nan_to_num(0.0) @ call.v

    def follow(self, oracle: Oracle, given: Inputs, ids: Tensor, asked: Tensor, layers: Iterable[int]) -> Tensor:
        """Logits (B, S, V) of a prompt and its answer, which are read once for each token of it: a row's risk is known behind the last."""
        self.risk = torch.zeros(ids.shape, dtype=torch.float64)
        shown = torch.isin(ids, torch.tensor(oracle.visual)) & asked
        logits = oracle.read(extended(given, ids), self, layers, asked)
        for i in range(given["input_ids"].shape[1], ids.shape[1]):
            for b in (shown.any(-1) & ~asked[i]).nonzero().flatten().tolist():
                last = int(extended(given, ids)["attention_mask"][b, :i].nonzero().max())
                p = logits[b, last].softmax(-1)
                entropy = -(p * p.log()).sum() / math.log(len(p))
                grounded = logits[b, shown[b]].softmax(-1)[:, p.argmax()].max()
                self.risk[b, i] = min(1.0, float((self.alpha * entropy + (1 - self.alpha) * (1 - grounded)) / self.scale))
            logits = oracle.read(extended(given, ids), self, layers, asked)
        return logits


@dataclass
class Ilvad(Method):
    """Evidence that layers come back to in an answer begun ahead is looked at more, and words said from it (2605.20965)."""

    enhance: list[int]
    tau: float
    alpha: float
    beta: float
    tokens: int

    def attend(self, call: Call) -> Tensor:
        tokens, p, asked = call.tokens, call.p.clone(), self.evidence.shape[1]
        if call.layer == 0:
            self.sum = torch.zeros(tokens.valid.shape, dtype=p.dtype)
        on = pad(self.evidence, (0, p.shape[-1] - asked))  # [B, S]
        for b, i in (tokens.later & tokens.visual.any(-1, keepdim=True)).nonzero().tolist():
            row = call.p[b, :, i]  # [H, S]
            seen = strongest((row * on[b]).sum(-1) / (row[:, tokens.visual[b]].sum(-1) + 1e-8), 0.5)
            self.sum[b, i] += (row[seen] * on[b]).sum(-1).mean()
            if i < asked - 1 or not self.enhance[0] <= call.layer < self.enhance[1]:
                continue
            words = [k for k in tokens.later[b].nonzero().flatten().tolist() if k <= i]
            said = torch.stack([self._said(b, k, i, asked) for k in words])
            bound = 3 * (said.std() if len(said) > 1 else said.new_zeros(()))
            cut, low, high = said.clamp(said.mean() - bound, said.mean() + bound), said.min(), said.max()
            new, read = row.clone(), strongest(row[:, words].sum(-1), 0.5)
            new[seen] *= torch.exp(self.alpha * on[b])
            weight = self.beta + ((cut - low) / (high - low) if high > low else 0 * cut)
            new[:, words] *= torch.where(read[:, None], weight, 1.0)
            p[b, :, i] = normalised(new)
        return p @ call.v

    def _said(self, b: int, key: int, row: int, asked: int) -> Tensor:
        """From how much evidence a word was said, as a row knows it: the prompt's last one of the layers so far."""
        if key >= asked:
            return self.total[b, key - 1]
        told = self.sum if row == asked - 1 else self.total
        return told[b, key] if key < asked - 1 else torch.zeros((), dtype=told.dtype)

    def follow(self, oracle: Oracle, given: Inputs, ids: Tensor, asked: Tensor, layers: Iterable[int]) -> Tensor:
        """Logits (B, S, V) of a prompt, padded on the left, and its answer, which are read once for each token of it."""
        ahead, end = given["input_ids"], given["input_ids"].shape[1]
        for _ in range(self.tokens - 1):
            said = oracle.read(extended(given, ahead), Method(), [], torch.arange(ahead.shape[1]) < end)
            ahead = torch.cat([ahead, said[:, -1:].argmax(-1)], 1)
        look = Look()
        oracle.read(extended(given, ahead), look, layers, torch.arange(ahead.shape[1]) < end)
        shown = torch.isin(given["input_ids"], torch.tensor(oracle.visual))
        self.evidence = torch.zeros(shown.shape, dtype=torch.float64)
        for b in shown.any(-1).nonzero().flatten().tolist():
            by_layer = []
            for call in look.calls.values():
                rows = [call.p[b, :, i, :end][:, shown[b]] for i in range(end, ahead.shape[1])]  # [H, V] each
                by_layer.append(torch.stack([row[strongest(row.sum(-1), 0.5)].mean(0) for row in rows]).mean(0))
            marks, mean = [(a > self.tau * a.mean()).double() for a in by_layer], torch.stack(by_layer).mean(0)
            found = sum((after - before).clamp(min=0) for before, after in itertools.pairwise(marks))
            found = found * (mean > mean.mean())
            found = found.clamp(found.mean() - 3 * found.std(), found.mean() + 3 * found.std())
            if found.max() > found.min():
                self.evidence[b, shown[b]] = (found - found.min()) / (found.max() - found.min())
        self.total = torch.zeros(ids.shape, dtype=torch.float64)
        for _ in range(ids.shape[1] - end + 1):
            logits = oracle.read(extended(given, ids), self, layers, asked)
            self.total = self.sum.clone()
        return logits


@dataclass
class FarSight(Method):
    """Keys behind a row of the prompt stand as registers in its softmax, and are dropped behind it (2505.16652)."""

    sigma: float = 0.8
    fade: float = 0.25
    slopes: bool = True
    strength: float = 1.0

    def attend(self, call: Call) -> Tensor:
        tokens, p, heads = call.tokens, call.p.clone(), call.scores.shape[1]
        for b in tokens.visual.any(-1).nonzero().flatten().tolist():
            places = tokens.prompt[b].nonzero().flatten().tolist()
            for rank, i in enumerate(places[:-1]):
                distance = torch.arange(1, len(places) - rank).double()
                decay = self.sigma * (1 - self.fade * rank / (len(places) - 1))
                rates = torch.tensor([decay + self.slopes * 2 ** (-8 * (h + 1) / heads) for h in range(heads)]).double()
                registers = -rates[:, None] * distance + math.log(self.strength)
                p[b, :, i] = torch.cat([call.scores[b, :, i], registers], -1).softmax(-1)[:, : p.shape[-1]]
        return p @ call.v


METHODS: dict[str, type[Method]] = {
    "visual_bias": VisualBias,
    "var": Var,
    "vhr": Vhr,
    "gift": Gift,
    "pai": Pai,
    "imbalance": Imbalance,
    "adaptive_boost": AdaptiveBoost,
    "adhh": Adhh,
    "ilvad": Ilvad,
    "spin": Spin,
    "farsight": FarSight,
}
