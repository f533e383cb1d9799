"""The command line ``tiledcore``: its options, and one line for every error."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from tiledcore import __version__
from tiledcore.cli.choices import DTYPES, SCHEDULERS, STRENGTH
from tiledcore.cli.console import CommandError, lasting_output, launched, leads, say
from tiledcore.cli.plan import add_arguments as add_plan

WINDOWS = ("ramp", "core", "mean", "gaussian")
EXAMPLES = """\
tiledcore generate "relief map of a rugged coast" --size 2048x2048 --out coast.png
tiledcore generate "a river delta" --size 1024x512 --wrap x --seed 7 --out delta.png
tiledcore generate "a mountain lake" --init-image coast.png --strength 0.4 --out lake.png
tiledcore info coast.png
tiledcore view coast.png      (all options: tiledcore generate --help)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code. ``TILEDCORE_DEBUG=1`` adds an error's traceback."""
    given = sys.argv[1:] if argv is None else list(argv)
    with lasting_output():
        if not given:
            print(EXAMPLES)
            return 0
        try:
            args = _parser().parse_args(_with_values(given))
            args.command(args)
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get("TILEDCORE_DEBUG") == "1":
                traceback.print_exc()
            interrupted = isinstance(error, KeyboardInterrupt)
            said = "interrupted, nothing was written" if interrupted else f"error: {_explain(error)}"
            if not launched():
                say(f"tiledcore: {said}")
                return 130 if interrupted else 2
            from tiledcore.parallel.launch import tells

            if tells():
                line = "" if leads() else "\n"  # rank 0's progress bar may stand there
                say(f"{line}tiledcore: rank {os.environ['RANK']}: {said}", always=True)
            os._exit(2)  # messages to processes that are gone would hold up the end
    return 0


def _with_values(argv: list[str]) -> list[str]:
    """The arguments; ``--seed=--`` is refused here, because argparse fails on it."""
    for arg in argv[: argv.index("--")] if "--" in argv else argv:
        if re.fullmatch(r"--?[\w-]+=--", arg):
            raise CommandError(f"{arg[:-3]}: '--' is no value (see tiledcore --help)")
    return argv


def _command(module: str, name: str) -> Callable[[argparse.Namespace], None]:
    """A command whose module is only imported when it runs."""

    def run(args: argparse.Namespace) -> None:
        getattr(import_module(f"tiledcore.cli.{module}"), name)(args)

    return run


# ----------------------------------------------------------------------------- info


def info(args: argparse.Namespace) -> None:
    from tiledcore.cli.request import read_image
    from tiledcore.io.images import read_metadata, readable

    metadata = read_image(read_metadata, args.file)
    if metadata is None:
        raise CommandError(f"{args.file}: holds no tiledcore settings (only PNG and TIFF files can)")
    if args.json:
        print(json.dumps(metadata, indent=2))
        return
    tiling = metadata.pop("tiling", {})
    rows = {**metadata, **tiling}
    for key, value in rows.items():
        line = f"{key.replace('_', ' '):<18}{readable(key, value)}"
        # The file may come from anywhere: no control characters for the terminal.
        print("".join(c if c.isprintable() else " " for c in line))


# ----------------------------------------------------------------------------- arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tiledcore", description="One coherent image of any size from many tiles.")
    parser.add_argument("--version", action="version", version=f"tiledcore {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    making = commands.add_parser("generate", help="make an image")
    making.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=".png or .tif (hold the settings), .jpg or .webp"
    )
    making.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="save the run there, and go on from what is there"
    )
    making.add_argument(
        "--checkpoint-every", type=_integer(1), metavar="N", help="evaluations between two saves; default 1"
    )
    making.add_argument(
        "--preview", type=Path, metavar="FILE", help="show a small picture there meanwhile: .png or .jpg"
    )
    making.add_argument(
        "--preview-every", type=_integer(1), metavar="N", help="evaluations between two previews; default 5"
    )
    making.set_defaults(command=_command("generate", "generate"))
    _add_generate(making)
    timing = commands.add_parser("profile", help="where the time of generate goes")
    timing.add_argument("--trace", type=Path, metavar="FILE", help="also write a Chrome trace there (.json)")
    timing.set_defaults(command=_command("profile", "profile"), out=None, checkpoint=None, checkpoint_every=None)
    _add_generate(timing)
    add_plan(commands.add_parser("plan", help="how an image would fit a memory budget"), _size, _integer)
    viewing = commands.add_parser("view", help="show a picture of any size, its tiles and regions in a browser")
    viewing.add_argument("file", type=Path, help="a picture: a TIFF of any size, or what fits into memory")
    viewing.add_argument("--port", type=_integer(0, 65535), default=0, metavar="N", help="default: any that is free")
    viewing.add_argument("--no-browser", action="store_true", help="only print the address")
    viewing.set_defaults(command=_command("view", "view"))
    about = commands.add_parser("info", help="print the settings that a PNG or TIFF was made with")
    about.add_argument("file", type=Path)
    about.add_argument("--json", action="store_true", help="as JSON, as they are stored")
    about.set_defaults(command=info)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", metavar="PROMPT")
    add(
        "--size",
        type=_size,
        metavar="WIDTHxHEIGHT",
        help="in pixels; default 1024x1024, or that of --init-image, of which 4x is four times each side",
    )
    add("--seed", type=_integer(0, 2**64 - 1), metavar="N", help="default: random, and printed")
    add(
        "--model",
        default="earth",
        metavar="NAME",
        help="hub id or folder, or one of the embedded models, earth (default) and earth-flux",
    )
    add("--negative-prompt", metavar="PROMPT")
    add("--steps", type=_integer(1), metavar="N", help="default: the model's own")
    add("--guidance", type=_guidance, metavar="G", help="default: the model's own")
    add("--scheduler", choices=SCHEDULERS, metavar="NAME", help=", ".join(SCHEDULERS))
    add("--init-image", type=Path, metavar="FILE", help="start from it, resized to --size")
    add(
        "--strength",
        type=_strength,
        metavar="S",
        help=f"how much of --init-image, or of a stage, to replace, above 0 up to 1; default {STRENGTH}",
    )
    add("--mask", type=Path, metavar="FILE", help="change --init-image only where this is white")
    add("--keep-colour", action="store_true", help="give the result the low frequencies of --init-image")
    add(
        "--stages",
        type=_stages,
        metavar="auto|FACTOR",
        help="one composition: make it at the model's size, then enlarge and refine by at most FACTOR (auto: 2)",
    )
    add("--regions", type=Path, metavar="FILE", help="parts of the image with prompts of their own: a TOML scene")
    add("--device", metavar="NAME", help="default cuda where there is one, else cpu")
    add("--dtype", choices=DTYPES, help="default fp16 on cuda, else fp32")
    add(
        "--budget",
        metavar="BYTES",
        help="of tensors on the device, such as 24GiB: run within it or refuse; the process needs more beside",
    )
    title = "tiling (sizes in latent pixels, usually of 8 px; default of UNets and FLUX: --motion moving)"
    _add_tiling(parser.add_argument_group(title))


def _add_tiling(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--mode", choices=("tiles", "canvas"), help="windows through the model, or one whole canvas")
    add("--tile", type=_pair(1), metavar="N|HxW", help="default: the model's own size")
    add("--overlap", type=_pair(0), metavar="N|HxW", help="of adjacent tiles; default: tile / 8")
    add("--window", choices=WINDOWS, help="how tiles are blended; default ramp")
    add("--ramp", type=_integer(1), metavar="N", help="width of the ramp; default: the overlap")
    add("--motion", choices=("still", "moving"), help="whether tiles move from step to step; then they hardly overlap")
    add(
        "--halo",
        type=_pair(0),
        metavar="N|HxW",
        help="canvas mode: what a tile's attention sees of its neighbours; default: tile / 2",
    )
    add("--wrap", choices=("x", "y", "xy"), default="", help="axes that join up at the borders")
    add(
        "--tile-batch",
        type=_integer(1),
        default=4,
        metavar="N",
        help="tiles at a time; the fewer the less memory; default 4",
    )


def _stages(text: str) -> str | float:
    value = _float(text)
    if text != "auto" and not 1 < value <= 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto or a number above 1 up to 4")
    return text if text == "auto" else value


def _size(text: str) -> tuple[int, int] | int:
    if re.fullmatch(r"[1-9]\d?x", text):
        return int(text[:-1])
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 2048x1024")
    return int(match[1]), int(match[2])


def _pair(low: int) -> Callable[[str], tuple[int, int]]:
    def parse(text: str) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
        pair = (int(match[1]), int(match[2] or match[1])) if match else (-1, -1)
        if min(pair) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not N or HxW from {low}, as in 32 or 32x64")
        return pair

    return parse


def _integer(low: int, high: int = 10**6) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if re.fullmatch(r"[0-9]{1,20}", text) is None or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {low} to {high}")
        return int(text)

    return parse


def _guidance(text: str) -> float:
    value = _float(text)
    if not 0 <= value <= 1000:  # far larger ones overflow, and the image is black
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1000")
    return value


def _strength(text: str) -> float:
    value = _float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# ----------------------------------------------------------------------------- messages


def _explain(error: BaseException) -> str:
    """An error in one line."""
    text = textwrap.shorten(str(error), 400, placeholder=" ...")
    if _is_out_of_memory(error):
        return "out of memory: lower --tile-batch, use --dtype fp16, or make --size smaller"
    if isinstance(error, CommandError | ValueError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text} (TILEDCORE_DEBUG=1 shows where)"


def _is_out_of_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError by its name, because torch may not be imported yet.
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("out of memory" in text or "allocate memory" in text))
    )


if __name__ == "__main__":
    sys.exit(main())
