"""The transformers host: language models and vision-language models.

The way in is one attention function under a private name, and for every attention module that a rule names a *live view* of its
config: the same class, the same ``__dict__``, but ``_attn_implementation`` answers our name. The model's own config is untouched,
so masks are made for the model's own kernel, and the vision tower and other layers run as before.

What a forward is about travels with it as an extra keyword argument, from the decoder down to the attention function, and what
is known of a sequence lives on its cache. So threads, several sequences at a time, beams and copies of caches need no care, and
a compiled decode step reads tensors only.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from accelplug import compat
from accelplug.call import ALL_HEADS, FULL_ATTENTION, Behind, Clock, Kind, Prompt, Share, Site
from accelplug.errors import NoMatchError, UnsupportedError
from accelplug.families.vlm import Vlm, vlm_of, why_no_vlm
from accelplug.hosts import interface
from accelplug.hosts.attention import AttentionRecord, patches_of
from accelplug.hosts.blind import Blind
from accelplug.hosts.encoders import EncoderHost, facts_of_tower
from accelplug.hosts.generation import Generation
from accelplug.hosts.host import Host, Setup
from accelplug.hosts.images import VisionTower
from accelplug.hosts.models import DENOISERS, attention_modules, decoder_of, flat_config, is_language_model, towers_of
from accelplug.hosts.placement import Placed
from accelplug.hosts.prompts import NO_IMAGE, asked_of, visual_tokens
from accelplug.hosts.reach import reach
from accelplug.hosts.reader import PromptReader
from accelplug.hosts.record import LEFT_DENSE, Choice, Decide, given
from accelplug.hosts.stream import (
    AHEAD,
    ASKED,
    CURRENT,
    DECODE,
    FORWARD,
    PREFILL,
    STREAM,
    TOLD,
    UNPATCHED,
    Forward,
    Stream,
    as_it_is,
)
from accelplug.hosts.tensor_parallel import TensorParallel
from accelplug.hosts.undo import Undo
from accelplug.recipe import ModelFacts
from accelplug.registry import BENEATH, entry_of

logger = logging.getLogger("accelplug")

ROUNDING = 0.02
"""Rows of a cache whose largest keys differ by less, as a share of the largest of all, are of one prompt: beams."""
OF_A_FORWARD = ("blind", "forward")
"""What a patch's state holds for the forward that reads a prompt alone."""


def _nothing() -> None:
    """What a reference gives whose thing is gone."""


class LanguageHost(Host):
    """One language model with the attention of some layers answered by patches.

    Parameters
    ----------
    model : the language model, out of its wrappers.
    setup : what the plug hands in.
    watched : whether all layers are entered, to be looked at by `watching`.
    """

    library = "transformers"
    name = "decoder"
    called = "a language model"
    expects = "a transformers model with get_decoder()"
    gives = "answers"
    serves = frozenset({"heads", "prefill", "decode", "memory", "generation"})
    abilities = dict.fromkeys(("compare", "tune", "calibrate", "inspect", "mark"), "a language model")

    @classmethod
    def knows(cls, model: Any) -> bool:
        """Whether it has a decoder."""
        return is_language_model(model)

    @classmethod
    def parts(cls, model: Any) -> dict[str, Any]:
        """Return the base model, whose decoder is entered, and the vision towers of known families."""
        return {cls.name: model.base_model, **{name: tower for name, (tower, _) in towers_of(model).items()}}

    @classmethod
    def facts(cls, model: Any) -> ModelFacts:
        """Return the classes, the config by dotted keys, and which kind of language model it is."""
        names = tuple(kind.__name__ for kind in type(model).__mro__)
        vlm = vlm_of(model) is not None
        tower = next((facts_of_tower(tower) for tower, _ in towers_of(model).values()), None)
        return ModelFacts(names, flat_config(model.config.to_dict()), vlm=vlm, llm=not vlm, tower=tower)

    @classmethod
    def of(cls, model: Any, parts: Mapping[str, Any], setup: Setup) -> list[Host]:
        """Make the host of the decoder, and those of the towers in which a rule names attention."""
        towers = [EncoderHost(name, tower, family, setup) for name, (tower, family) in towers_of(model).items()]
        return [cls(model, setup), *(host for host in towers if host.named)]

    @classmethod
    def names(cls, model: Any) -> tuple[str, ...]:
        """Return the names of denoisers: a rule for one cannot hold here, but is not a slip of the pen."""
        return DENOISERS

    def __init__(self, model: Any, setup: Setup, *, watched: bool = False) -> None:
        self.recipe = setup.recipe
        self.generation = Generation(self, setup.around, setup.processor)
        self.watched = watched or bool(setup.around)
        self.model, self.ledger = model, setup.ledger
        self.root = self.base = model.base_model
        self.decoder = decoder_of(model)
        self.family: Vlm | None = vlm_of(model)
        self.signature, self.outer = (inspect.signature(type(m).forward) for m in (self.base, model))
        self.skipped: dict[str, str] = {}
        self.sees = self.family is not None or getattr(self.base.config, "vision_config", None) is not None
        """Whether the model looks at images."""
        self.tensor_parallel = TensorParallel.of(model)
        self.records = self._records(setup.decide)
        both = {id(c.patch): c for r in self.records for c in r.choice.stages if c.patch and "rehearsal" in c.patch.needs}
        self.generation.around += tuple(both.values())
        self.watched = self.watched or bool(both)
        crosses = any(record.site.kind == "cross" for record in self.records)
        self.visual_tokens = {} if crosses else visual_tokens(self.base.config)
        self.no_image = "its images are read by cross-attention, and are not tokens of the prompt" if crosses else NO_IMAGE
        self._require_readings(crosses)
        self.reader = PromptReader(self.base, self.family, self.visual_tokens, self.needs, setup.processor, self.recipe)
        self.tower = VisionTower(self.base) if "vision_attention" in self.needs else None
        self.streams: WeakSet[Any] = WeakSet()
        self.left: WeakKeyDictionary[Any, ref[Tensor]] = WeakKeyDictionary()
        """The first keys of every cache as the last forward left them: other ones may lie at the same address."""
        self._read_last: Callable[[], Stream | None] = _nothing
        """The sequence whose prompt was read last, as long as its cache is kept; for reports."""
        self.undo = Undo()

    def _records(self, decide: Decide) -> list[AttentionRecord]:
        modules = list(attention_modules(self.decoder))
        layers = compat.transformers.number_of_layers(self.decoder)
        tensors = self.tensor_parallel
        heads = ALL_HEADS if tensors is None else Share(tensors.rank, tensors.ranks)
        records: list[AttentionRecord] = []
        for path, module in modules:
            if not compat.transformers.looks_kernel_up(type(module)):
                self.skipped[path] = f"{type(module).__name__} does not ask transformers for its attention function"
                continue
            if compat.transformers.masks_by_name(type(module)):
                self.skipped[path] = (
                    f"{type(module).__name__} chooses keys, and hides the others under eager and sdpa attention alone"
                )
                continue
            cross = compat.transformers.crosses(type(module))
            if cross:
                self.skipped[path] = f"{type(module).__name__} reads keys that are not tokens of the prompt"
            kind: Kind = "cross" if cross else "self"
            layer_type = compat.transformers.layer_type(module)
            site = Site(path, self.name, kind, module.layer_idx, layers, heads, layer_type, tuple(sorted(self.serves)))
            choice = LEFT_DENSE if cross else decide(site, None, PREFILL)
            records.append(AttentionRecord(self, len(records), module, site, module.config, choice))
        if not records and (reason := why_no_vlm(self.model)) is not None:
            raise UnsupportedError(f"{type(self.model).__name__} has no attention that can be entered: {reason}")
        if not records:
            raise NoMatchError(
                f"{type(self.model).__name__} has no attention that can be entered: expected modules with layer_idx, config and "
                f"num_key_value_groups that call transformers' attention interface, found {len(modules)} such modules"
                f"{''.join(f', and {reason}' for reason in dict.fromkeys(self.skipped.values()))}."
            )
        self._require_sight(records)
        self._check(records)
        return records

    def _check(self, records: list[AttentionRecord]) -> None:
        """Have patches refuse what cannot work on this model, where the rules put them; those around generate may look everywhere."""
        text, everywhere = self.model.config.get_text_config(), [record.site for record in records]
        sizes = (getattr(text, name, None) for name in ("num_attention_heads", "hidden_size"))
        heads, width = (size if isinstance(size, int) else sys.maxsize for size in sizes)
        for around in (choice.patch for choice in self.generation.around if choice.patch is not None):
            around.check(everywhere, heads, width)
        for patch in patches_of(records):
            patch.check([record.site for record in records if patch in record.patches], heads, width)

    def _require_sight(self, records: list[AttentionRecord]) -> None:
        """Refuse patches that look at images on a class of which it is known that they cannot."""
        around = [choice.patch for choice in self.generation.around if choice.patch is not None]
        entries = [entry_of(patch) for patch in (*patches_of(records), *around)]
        looking = [entry.name for entry in entries if entry.family in ("heads", "generation")]
        if looking and (reason := why_no_vlm(self.model)) is not None:
            raise UnsupportedError(f"{looking[0]} looks at images, and on {type(self.model).__name__} it cannot: {reason}")

    def _require_readings(self, crosses: bool) -> None:
        """Refuse patches that have a prompt read without its images where a model's layers cannot be run alone; or logits, of none."""
        if "logits" in self.needs and getattr(self.model, "get_output_embeddings", lambda: None)() is None:
            raise UnsupportedError(
                f"{self.recipe} reads logits, and {type(self.model).__name__} has no output embedding. Take visual_bias or pai."
            )
        if "blind" not in self.needs:
            return
        reason = None
        if crosses:
            reason = "its images are read by cross-attention, and are not tokens that could be left out"
        elif not hasattr(self.decoder, "layers"):
            reason = f"its decoder, {type(self.decoder).__name__}, has no layers that can be run one by one"
        elif required := compat.transformers.must_be_given(self.base):
            reason = f"it cannot be read without {', '.join(sorted(required))}"
        if reason is not None:
            raise UnsupportedError(
                f"{type(self.model).__name__} is read by this recipe a second time without its images, which cannot be done: {reason}. "
                "Take visual_bias, var or pai."
            )

    # ------------------------------------------------------------------------------------------------- in and out

    def install(self, undo: Undo) -> None:
        """Put the function, views and hooks in place; `undo` restores what is then still ours."""
        self.undo = undo
        undo.add(self._forget)
        interface.enter(self)
        for record in self.records:
            if (self.watched and record.site.kind == "self") or record.choice.chosen:
                undo.put(record.module, STREAM, record)
                undo.put(
                    record.module, "config", compat.transformers.config_view(record.config, compat.transformers.ATTENTION)
                )
        self.reader.images.install(undo)
        if self.tower is not None:
            self.tower.install(undo)
        compat.transformers.forget_compiled_call(self.model)  # Dynamo does not guard on hooks
        if self.watched or "hidden_states" in self.needs:
            watched = {record.site.module for record in self.records if self.watched or record.patches}
            for path in {module.rpartition(".")[0] for module in watched}:
                layer = self.decoder.get_submodule(path)
                undo.hook(layer, "register_forward_pre_hook", partial(_before_layer, self, layer), with_kwargs=True)
        undo.hook(self.decoder, "register_forward_pre_hook", self._before_decoder, with_kwargs=True)
        undo.hook(self.base, "register_forward_hook", self._after_base, always_call=True)
        undo.hook(self.base, "register_forward_pre_hook", self._before_base, with_kwargs=True, prepend=True)
        if self.model is not self.base:
            undo.hook(self.model, "register_forward_hook", self._after_model, always_call=True)
            undo.hook(self.model, "register_forward_pre_hook", self._before_model, with_kwargs=True)
        self.generation.install(undo)

    def _forget(self) -> None:
        """Leave caches, transformers' table, this thread and the decode step that generate() compiled without us."""
        if self._current() is not None:
            CURRENT.set(None)
        for cache in list(self.streams):
            if getattr(vars(cache).get(STREAM), "host", None) is self:
                delattr(cache, STREAM)
                _give_back(cache)
        self.streams.clear()
        self.left.clear()
        interface.leave(self)
        compat.transformers.forget_compiled_call(self.model)

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageHost:
        """A copy of a cache carries its stream, and the stream its host."""
        return self

    def __reduce__(self) -> tuple:
        """A pickled cache comes back with a stream that no host knows as its own."""
        return type(None), ()

    @property
    def needs(self) -> frozenset[str]:
        """What the recipe's patches ask of the host."""
        return frozenset().union(*(patch.needs for patch in patches_of(self.records)))

    def collect(self) -> None:
        """Count what compiled code could not."""
        for record in self.records:
            if record.missed:
                record.missed = False
                self.ledger.fell_back(record.site.module, "a compiled call whose images or mask are not known")

    def placed(self) -> list[Placed]:
        """What runs where: around generate first, then by layers, as it stands for the decode steps of the sequence read last."""
        around = [Placed(None, choice.name, choice.patch) for choice in self.generation.around]
        at_sites = [
            (record, choice) for record in self.records if record.site.kind != "cross" for choice in record.choice.stages
        ]
        return around + [self._placed(record, choice) for record, choice in at_sites]

    def _placed(self, record: AttentionRecord, choice: Choice) -> Placed:
        stream = self._read_last()
        top = choice is record.choice  # what stands beneath has no part in decode steps
        params = stream.decode[record.index] if top and stream is not None and stream.decode else None
        reason = params if isinstance(params, str) else choice.reason
        return Placed(
            record.site,
            choice.name,
            choice.patch,
            None if isinstance(params, str) else params,
            None if stream is None else stream.prompt,
            reason,
        )

    def unrouted(self) -> list[str]:
        """Modules that a rule names, whose attention never came by."""
        return [record.site.module for record in self.records if record.patches and not record.routed]

    def reach(self) -> str | None:
        """How much of a prompt's time rules can touch, where rules say how it is read."""
        beneath = [r for r in self.records if any(p.family in BENEATH for p in r.patches)]
        full = [r for r in beneath if r.site.layer_type == FULL_ATTENTION]
        stream = self._read_last()
        tokens = None if stream is None else stream.prompt.image.shape[1]
        return reach(self.decoder, self.records, full, tokens) if beneath else None

    # ------------------------------------------------------------------------------------------------- the forward

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module is self.model and not torch.compiler.is_compiling():
            inputs = self.outer.bind_partial(module, *args, **kwargs).arguments
            ASKED.set(asked_of({**inputs, **inputs.get("kwargs", {})}))

    def _after_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module is self.model and not torch.compiler.is_compiling():
            ASKED.set(1)
            told, _ = TOLD.get(), TOLD.set(None)
            if told is not None and isinstance(logits := getattr(output, "logits", None), Tensor):
                self._tell(*told, logits)

    def _tell(self, stream: Stream, hidden: Tensor | None, logits: Tensor) -> None:
        """Hand the logits (B, n, vocabulary) of a forward's last n tokens to the patches that ask for them."""
        unembed, answers = self.model.get_output_embeddings(), stream.prompt.answers
        if hidden is None or isinstance(answers, int):
            last = logits[:, -1]
        else:  # with padding behind the prompt
            at = (answers[:, -1:, None] - (hidden.shape[1] - logits.shape[1])).clamp(min=0).to(logits.device)
            last = logits.take_along_dim(at, 1)[:, 0]
        if hidden is not None and not torch.allclose(unembed(hidden[:, -1]), logits[:, -1], rtol=1e-2, atol=1e-2):
            raise UnsupportedError(
                f"{self.recipe} reads the logits of image tokens, and {type(self.model).__name__} does more to logits than its output "
                "embedding: it caps or scales them. Take visual_bias or pai."
            )
        for patch in patches_of(self.records):
            if "logits" in patch.needs:
                patch.learn(Behind(stream.prompt, last, hidden, unembed), stream.states.setdefault(id(patch), {}))

    def _before_base(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if module is not self.base or torch.compiler.is_compiling():
            return None
        if FORWARD in kwargs:  # a forward of our own
            forward = kwargs.pop(FORWARD)
        elif UNPATCHED.get():
            forward = Forward(companion=as_it_is)
        else:
            forward = Forward(inputs=given(self.signature, args, kwargs))
        forward.host, forward.parent = self, self._current()
        CURRENT.set(forward)
        return args, kwargs

    def _current(self) -> Forward | None:
        """This thread's forward of this model."""
        forward = CURRENT.get()
        return forward if forward is not None and forward.host is self else None

    def _open(self, forward: Forward, inputs: dict[str, Any]) -> None:
        """Say what a forward is: which sequences, and whether it reads a prompt or decodes."""
        ids, embeds, cache = inputs.get("input_ids"), inputs.get("inputs_embeds"), compat.transformers.cache_given(inputs)
        tokens = ids if ids is not None else embeds
        if tokens is None or compat.transformers.packs_sequences(inputs):
            return
        forward.cache = cache
        rows, new = tokens.shape[:2]
        if ids is not None and cache is None and (begun := self.generation.begun(ids)) is not None:
            self._grow(forward, begun, ids, inputs)
            return
        stream = None if cache is None else vars(cache).get(STREAM)
        stream = stream if stream is not None and stream.host is self else None
        past = 0 if cache is None else int(cache.get_seq_length())
        if past and stream is not None:
            self.streams.add(cache)  # it may be a copy
            self._follow(stream, cache, rows)
        if past and (stream is None or rows != len(stream.prompt.image)):
            return
        if stream is not None and past:
            stream.tokens = _tokens(stream, cache, past, new, inputs)
            if new == 1:
                forward.stream = stream
                return
            known, past = stream.prompt, stream.tokens - new
            prompt = self.reader.read(known, ids, embeds, inputs, past)
            self._refuse_pieces(known, prompt)
            stream.prompt = prompt
        else:
            last = _last_position(inputs)
            shift = 0 if last is None else last + 1 - new
            stream = Stream(self, self.reader.read(None, ids, embeds, inputs, 0), tokens=new, shift=shift)
            self.generation.note(stream)
        if cache is not None:
            self._keep(stream, cache)
        self._prepare_blind(stream, inputs)
        self._prepare_tower(stream)
        forward.stream, forward.clock = stream, PREFILL

    def _refuse_pieces(self, known: Prompt, prompt: Prompt) -> None:
        """Refuse a prompt that is read in pieces where a patch must have it whole, or has changed a row that it took for the answer's.

        `prompt` goes on where `known` ends; drafts do not count, and tokens that were answered in between begin a new turn.
        """
        answered = prompt.past > known.image.shape[1]
        if not prompt.drafts and (
            "whole_prompt" in self.needs or ("answers" in self.needs and known.shows and not answered)
        ):
            raise UnsupportedError(
                f"{self.recipe} reads the whole prompt at once, and this one comes in pieces. Leave out "
                "prefill_chunk_size, read a prefix that questions share with each of them, or start a new cache for a new turn."
            )

    def _grow(self, forward: Forward, begun: Stream, ids: Tensor, inputs: dict[str, Any]) -> None:
        """Go on with an answer that is generated without a cache: all of it is read anew, and patches choose where its prompt ends."""
        stream = Stream(self, self.reader.grown(begun.prompt, ids, inputs), begun.states, tokens=ids.shape[1])
        self._prepare_blind(stream, inputs)
        forward.stream, forward.clock = stream, PREFILL

    def _keep(self, stream: Stream, cache: Any) -> None:
        setattr(cache, STREAM, stream)
        self.streams.add(cache)

    def _leave(self, cache: Any) -> None:
        """Remember the first keys of a cache."""
        if (keys := compat.transformers.first_keys(cache)) is not None:
            self.left[cache] = ref(keys)

    def _follow(self, stream: Stream, cache: Any, rows: int) -> None:
        """Follow a cache whose rows were repeated, or changed places, since the last forward."""
        known = len(stream.prompt.image)
        if rows != known and rows % known == 0:
            self._take_rows(stream, torch.arange(known).repeat_interleave(rows // known))
        elif stream.told_apart is not None and self.left.get(cache, _nothing)() is not compat.transformers.first_keys(cache):
            now, old = compat.transformers.rows_told_apart(cache, stream.prompt.image.shape[1]), stream.told_apart
            if now is None or now.shape != old.shape:
                return
            old = old.to(now.device).float()
            apart = (now.float()[:, None] - old).abs().amax((2, 3)) / old.abs().amax()  # [row now, row then]
            if not bool((apart.diagonal() < ROUNDING).all()) and bool((apart.amin(-1) < ROUNDING).all()):
                self._take_rows(stream, apart.argmin(-1))

    def _take_rows(self, stream: Stream, rows: Tensor) -> None:
        if any(stream.states.values()):
            raise UnsupportedError(
                "The rows of a cache were repeated or changed places after its prompt was read, and a patch remembers its rows one "
                "by one. Repeat or sort the inputs instead, as generate(num_return_sequences=...) does."
            )
        known: dict[str, Any] = {f.name: getattr(stream.prompt, f.name) for f in fields(Prompt)}
        taken = {name: x[rows.to(x.device)] for name, x in known.items() if isinstance(x, Tensor)}
        stream.prompt = Prompt(**{**known, **taken})
        if stream.told_apart is not None:
            stream.told_apart = stream.told_apart[rows.to(stream.told_apart.device)]
        self._prepare_decode(stream)

    def mark(self, image: Tensor | None) -> None:
        """Take the images of this thread's prompts to be where `image` says, (B, S) bool or numbers from 1; None to look for them."""
        self.reader.mark(image)

    def _after_base(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module is not self.base or torch.compiler.is_compiling():
            return
        if (forward := self._current()) is None:
            return
        CURRENT.set(forward.parent)
        if output is None or forward.stream is None:
            return
        cache = forward.cache if forward.cache is not None else compat.transformers.cache_of(output)
        if cache is not None:
            whole = cache.get_seq_length() == forward.stream.tokens
            forward.stream.keys = compat.transformers.keys_at(cache) if whole else None
            if forward.stream.told_apart is not None or forward.clock is PREFILL:
                self._leave(cache)
        if "logits" in self.needs:
            TOLD.set((forward.stream, output[0] if forward.clock is PREFILL else None))
        if forward.clock is not PREFILL:
            return
        for state in forward.stream.states.values():
            for name in OF_A_FORWARD:
                state.pop(name, None)
        if cache is not None:
            if forward.cache is None:
                self._keep(forward.stream, cache)
            several = len(forward.stream.prompt.image) > 1
            forward.stream.told_apart = (
                compat.transformers.rows_told_apart(cache, forward.stream.tokens) if several else None
            )
            self._prepare_decode(forward.stream)
            for record in self.records:  # those of a cache that the forward made itself
                self.keep_layer(record, forward.stream, cache)

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if module is not self.decoder or FORWARD in kwargs:
            return None
        if torch.compiler.is_compiling():
            cache = compat.transformers.cache_given(kwargs)
            stream = getattr(cache, STREAM, None)
            forward = stream.step if stream is not None else None
        else:
            forward = self._current()
            if forward is None or forward.handed:
                return None
            forward.handed = True
            if forward.inputs is not None:
                inputs, forward.inputs = forward.inputs, None
                self._open(forward, inputs)
                self._read_ahead(forward, args, kwargs)
        if forward is None:
            return None
        return args, {**kwargs, FORWARD: forward}

    # ----------------------------------------------------------------------------------------------------- patches

    def prepare(self, choice: Choice, site: Site, stream: Stream, clock: Clock) -> Any:
        """Ask a patch what it needs at a site, None to run dense."""
        patch = choice.patch
        if patch is None or (clock is AHEAD and "ahead" not in patch.needs):
            return None
        return patch.prepare(site, stream.prompt, clock, stream.states.setdefault(id(patch), {}))

    def _prepare_decode(self, stream: Stream) -> None:
        """Have everything ready that decode steps need, outside of their graph."""
        self._read_last = ref(stream)
        stream.decode = [self.prepare(record.choice, record.site, stream, DECODE) for record in self.records]
        stream.step = Forward(stream)

    def keep_layer(self, record: AttentionRecord, stream: Stream, cache: Any) -> None:
        """Have a patch keep the keys and values of its layer, where it asks for it."""
        from accelplug.hosts.kept import hand_over  # it has transformers' classes for bases

        patch = record.choice.patch
        if patch is None or "cache" not in patch.needs:
            return
        params = self.prepare(record.choice, record.site, stream, DECODE)
        if params is not None and not isinstance(params, str):
            hand_over(cache, record.module.layer_idx, partial(patch.keep, params=params), record.choice.name)

    def _read_ahead(self, forward: Forward, args: tuple, kwargs: dict[str, Any]) -> None:
        """For patches that ask what the model makes of a prompt before they change it: read it once, without a cache."""
        stream = forward.stream
        if "ahead" not in self.needs or stream is None or forward.clock is not PREFILL or stream.prompt.past:
            return
        if not bool(stream.prompt.visual.any()):
            return
        tokens = stream.prompt.image.shape[1]
        plain = {name: x for name, x in kwargs.items() if name not in compat.transformers.CACHE_NAMES}
        plain |= {name: False for name in ("use_cache", "output_attentions", "output_hidden_states") if name in kwargs}
        masks = compat.transformers.without_room(kwargs.get("attention_mask"), tokens)
        self.decoder(*args, **{**plain, "attention_mask": masks, FORWARD: Forward(stream, clock=AHEAD)})

    def _prepare_blind(self, stream: Stream, inputs: dict[str, Any]) -> None:
        """For patches that ask what the model would do without the images: read the text alone."""
        if "blind" not in self.needs or stream.prompt.past or not bool(stream.prompt.visual.any()):
            return
        blind = Blind(self.base, self.decoder, stream.prompt, inputs, self.undo)
        for patch in patches_of(self.records):
            if "blind" in patch.needs:
                stream.states.setdefault(id(patch), {})["blind"] = blind

    def _prepare_tower(self, stream: Stream) -> None:
        """For patches that ask what the vision tower's class token looks at, in the images of this forward."""
        past, new = stream.prompt.past, stream.prompt.visual[:, stream.prompt.past :]
        if self.tower is None or not bool(new.any()):
            return
        maps = self.tower.take(new)
        if maps is None:
            raise UnsupportedError(
                f"{self.recipe} reads the vision tower's attention, and the images of this prompt were encoded before "
                "apply() or elsewhere. Pass pixel_values."
            )
        for patch in patches_of(self.records):
            if "vision_attention" in patch.needs:
                stream.states.setdefault(id(patch), {})["vision_attention"] = tuple(pad(x, (past, 0)) for x in maps)


def _give_back(cache: Any) -> None:
    from accelplug.hosts.kept import give_back

    give_back(cache)


def _before_layer(host: LanguageHost, layer: nn.Module, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Hand what enters a layer to its attention, while a prompt is read."""
    forward = kwargs.get(FORWARD)
    if module is not layer or forward is None or forward.clock is not PREFILL:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, FORWARD: replace(forward, hidden=compat.transformers.entering(layer, hidden))}


def _tokens(stream: Stream, cache: Any, past: int, new: int, inputs: dict[str, Any]) -> int:
    """How many tokens a sequence has with the new ones: more than its cache holds, where that was pruned."""
    if past >= stream.tokens:  # nothing is missing; on a GPU, looking at positions would wait for it
        return past + new
    if getattr(compat.transformers.cache_layer(cache, 0), "kept", None) is not None:  # its length is that of the sequence
        return past + new
    mask, last = inputs.get("attention_mask"), _last_position(inputs)
    told = [mask.shape[1]] if isinstance(mask, Tensor) and mask.ndim == 2 else []
    if last is not None:
        told.append(last + 1 - stream.shift)
    if not told and stream.keys != compat.transformers.keys_at(cache):
        told.append(stream.tokens + new)
    return max(past + new, *told) if told else past + new


def _last_position(inputs: dict[str, Any]) -> int | None:
    """The largest position id that a forward was given, None where it was given none for each token."""
    positions = inputs.get("position_ids")
    return int(positions.max()) if isinstance(positions, Tensor) and positions.ndim == 2 else None
