"""The command line ``tiledcore``: its options, and one line for every error."""

import argparse
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar, cast

from tiledcore import __version__
from tiledcore.cli.console import DTYPES, SCHEDULERS, STRENGTH, Lasting, launched, leads, say

T = TypeVar("T")

# The module of a command, where it has another name. It is only imported when the command runs.
MODULES = {"profile": "generate", "plan": "explain", "info": "view"}
EXAMPLES = """\
tiledcore generate "relief map of a rugged coast" --size 2048x2048 --out coast.png
tiledcore generate "a river delta" --size 1024x512 --wrap x --seed 7 --out delta.png
tiledcore generate "a mountain lake" --init-image coast.png --strength 0.4 --out lake.png
tiledcore info coast.png
tiledcore view coast.png      (all options: tiledcore generate --help)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code. ``TILEDCORE_DEBUG=1`` adds an error's traceback."""
    given = sys.argv[1:] if argv is None else list(argv)
    # A closed stdout or stderr does not end the command, which may have an image to write.
    out, err = (cast(TextIO, Lasting(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        if not given:
            print(EXAMPLES)
            return 0
        try:
            args = parser("--help-all" in given).parse_args(given)
            module = import_module(f"tiledcore.cli.{MODULES.get(args.command, args.command)}")
            getattr(module, args.command)(args)
        except (Exception, KeyboardInterrupt) as error:
            if launched():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it when another process ends too
            if os.environ.get("TILEDCORE_DEBUG") == "1":
                traceback.print_exc()
            interrupted = isinstance(error, KeyboardInterrupt)
            said = "interrupted, nothing was written" if interrupted else f"error: {_explain(error)}"
            if not launched():
                say(f"tiledcore: {said}")
                return 130 if interrupted else 2
            from tiledcore.parallel.ranks import tells

            if tells():
                line = "" if leads() else "\n"  # rank 0's progress bar may stand there
                say(f"{line}tiledcore: rank {os.environ['RANK']}: {said}", always=True)
            os._exit(2)  # messages to processes that are gone would hold up the end
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def parser(everything: bool = False) -> argparse.ArgumentParser:
    """The parser of all commands; ``everything``: the help also lists the less common options."""
    top = _Parser(prog="tiledcore", description="One coherent image of any size from many tiles.")
    top.add_argument("--version", action="version", version=f"tiledcore {__version__}")
    commands = top.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, usage, text in (
        ("generate", "PROMPT --out FILE", "make an image"),
        ("profile", "PROMPT", "where the time of generate goes"),
    ):
        usage = f"tiledcore {name} {usage} [options]"
        _add_generate(commands.add_parser(name, help=text, usage=usage, add_help=False), everything, name == "generate")
    _add_plan(commands.add_parser("plan", help="how an image would fit a memory budget"))
    viewing = commands.add_parser("view", help="show a picture of any size, its tiles and regions in a browser")
    viewing.add_argument("file", type=Path, help="a picture: a TIFF of any size, or what fits into memory")
    viewing.add_argument("--port", type=_integer(0, 65535), default=0, metavar="N", help="default: any that is free")
    viewing.add_argument("--no-browser", action="store_true", help="only print the address")
    about = commands.add_parser("info", help="print the settings that a PNG or TIFF was made with")
    about.add_argument("file", type=Path)
    about.add_argument("--json", action="store_true", help="as JSON, as they are stored")
    return top


def _add_generate(parser: argparse.ArgumentParser, everything: bool, writes: bool) -> None:
    """The options of ``generate``, and of ``profile``, which writes no file; ``rare`` ones only if ``everything``."""

    def group(title: str) -> Callable[..., None]:
        add_argument = parser.add_argument_group(title).add_argument

        def add(*names: str, rare: bool = False, help: str, **options: Any) -> None:
            add_argument(*names, help=argparse.SUPPRESS if rare and not everything else help, **options)

        return add

    add = group("the image")
    add("prompt", metavar="PROMPT", help="what it shows")
    if writes:
        add("--out", type=Path, required=True, metavar="FILE", help=".png or .tif (hold the settings), .jpg or .webp")
    add("--size", type=_size, metavar="WIDTHxHEIGHT", help="in px; default 1024x1024, or that of --init-image")
    add("--seed", type=_integer(0, 2**64 - 1), metavar="N", help="default: random, and printed")
    add("--negative-prompt", rare=True, metavar="PROMPT", help="what it must not show")

    add = group("the model")
    add("--model", default="earth", metavar="NAME", help="earth (default), earth-flux, a folder or a hub id")
    add("--steps", type=_integer(1), metavar="N", help="default: the model's own")
    add("--guidance", rare=True, type=_number(0, 1000), metavar="G", help="default: the model's own")
    add("--scheduler", rare=True, choices=SCHEDULERS, metavar="NAME", help=", ".join(SCHEDULERS))

    add = group("one composition")
    stages = "enlarge in stages, by at most FACTOR each; auto: 2"
    add("--stages", type=_number(1, 4, above=True, word="auto"), metavar="auto|FACTOR", help=stages)
    add("--regions", type=Path, metavar="FILE", help="parts with prompts of their own: a TOML scene")
    add("--wrap", choices=("x", "y", "xy"), default="", help="axes on which the borders fit together")

    add = group("start from a picture")
    add("--init-image", type=Path, metavar="FILE", help="resized to --size; --size 4x: four times each side")
    strength = f"how much of it, or of a stage, to replace; default {STRENGTH}"
    add("--strength", type=_number(0, 1, above=True), metavar="S", help=strength)
    add("--mask", type=Path, metavar="FILE", help="change it only where this is white")
    add("--keep-colour", rare=True, action="store_true", help="give the result the low frequencies of --init-image")

    add = group("long runs and memory")
    if writes:
        add("--checkpoint", type=Path, metavar="DIR", help="save the run there, and go on from what is there")
        add("--preview", type=Path, metavar="FILE", help="show a small picture there meanwhile")
        every = "evaluations between two previews; default 5"
        add("--preview-every", rare=True, type=_integer(1), metavar="N", help=every)
    else:
        parser.set_defaults(out=None, checkpoint=None, preview=None, preview_every=None)
    add("--budget", metavar="BYTES", help="of tensors, such as 24GiB: run within it or refuse")
    add("--device", rare=True, type=_device, metavar="NAME", help="default cuda where there is one, else cpu")
    add("--dtype", rare=True, choices=DTYPES, help="default fp16 on cuda; bf16 on a CPU that computes in it; else fp32")
    batch = "tiles at a time; the fewer the less memory; default 4"
    add("--tile-batch", rare=True, type=_integer(1), default=4, metavar="N", help=batch)

    add = group("tiling (sizes in latent pixels, usually of 8 px; default of UNets and FLUX: --motion moving)")
    mode = "windows through the model, or one whole canvas; default tiles"
    add("--mode", rare=True, choices=("tiles", "canvas"), help=mode)
    add("--tile", rare=True, type=_pair, metavar="N|HxW", help="default: the model's own size")
    add("--overlap", rare=True, type=_pair, metavar="N|HxW", help="of adjacent tiles; default: tile / 8")
    add("--window", rare=True, metavar="NAME", help="how tiles are blended: ramp (default), core, mean or gaussian")
    add("--ramp", rare=True, type=_integer(1), metavar="N", help="width of the ramp; default: the overlap")
    motion = "whether tiles move from step to step; then they hardly overlap"
    add("--motion", rare=True, choices=("still", "moving"), help=motion)
    halo = "canvas mode: what a tile's attention sees of its neighbours; default: tile / 2"
    add("--halo", rare=True, type=_pair, metavar="N|HxW", help=halo)

    add = group("help")
    if writes:
        add("--explain", action="store_true", help="print what would be done and why, and stop")
    add("-h", "--help", action="help", help="show the common options")
    add("--help-all", action="help", help="show all options")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    models = "sd15, sdxl, sd3, flux, earth, earth-flux, or a folder in diffusers' format (weights are not read)"
    add("--model", default="earth", metavar="NAME", help=models)
    add("--size", type=_size, required=True, metavar="WIDTHxHEIGHT", help="of the image, in pixels")
    add("--budget", required=True, metavar="BYTES", help="of memory on the device, such as 24GiB or 24GB")
    add("--mode", choices=("tiles", "canvas"), help="default: whichever fits with the fewest FLOPs")
    add("--images", type=_integer(1), default=1, metavar="N", help="made at a time; default 1")
    add("--gpus", type=_integer(1), default=1, metavar="N", help="processes of torchrun that share the work; default 1")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="to plan for; it need not be there. Default cuda")
    add("--dtype", choices=DTYPES, help="default as for generate")
    add("--json", action="store_true", help="as JSON")


def _typed(convert: Callable[[str], T | None], valid: str) -> Callable[[str], T]:
    """The type of an option: ``convert`` gives the value of its text, or None or a ValueError if the text is wrong."""

    def parse(text: str) -> T:
        with suppress(ValueError):
            if (value := convert(text)) is not None:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} {valid}")

    return parse


def _integer(low: int, high: int = 10**6) -> Callable[[str], int]:
    return _typed(
        lambda text: n if low <= (n := int(text)) <= high else None, f"is not an integer from {low} to {high}"
    )


def _number(low: float, high: float, above: bool = False, word: str | None = None) -> Callable[[str], float | str]:
    """A number from ``low``, or ``above`` it, to ``high``; or else ``word``."""

    def convert(text: str) -> float | str | None:
        if text == word:
            return text
        value = float(text)
        return value if low < value <= high or (value == low and not above) else None

    valid = f"a number above {low:g} up to {high:g}" if above else f"a number from {low:g} to {high:g}"
    return _typed(convert, f"is not {f'{word} or ' if word else ''}{valid}")


def _matching(pattern: str, convert: Callable[..., T], valid: str) -> Callable[[str], T]:
    """A text that matches ``pattern``, whose groups ``convert`` takes."""
    return _typed(lambda text: convert(*match.groups()) if (match := re.fullmatch(pattern, text)) else None, valid)


_device = _matching(r"(cpu|cuda(?::\d{1,3})?)", str, "must be cpu, cuda or cuda:N")
_pair = _matching(r"(\d{1,6})(?:x(\d{1,6}))?", lambda y, x: (int(y), int(x or y)), "is not N or HxW, as in 32 or 32x64")
_size = _matching(
    r"([1-9]\d?)x|([1-9]\d{0,5})x([1-9]\d{0,5})",
    lambda times, width, height: int(times) if times else (int(width), int(height)),
    "is not WIDTHxHEIGHT, such as 2048x1024",
)


def _explain(error: BaseException) -> str:
    """An error in one line."""
    text = textwrap.shorten(str(error), 400, placeholder=" ...")
    # torch.OutOfMemoryError by its name, because torch may not be imported yet.
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if memory or (isinstance(error, RuntimeError) and re.search("out of memory|allocate memory", str(error), re.I)):
        return "out of memory: lower --tile-batch, use --dtype fp16, or make --size smaller"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text} (TILEDCORE_DEBUG=1 shows where)"
