"""Which pipelines of diffusers can be tiled: the table of docs/compatibility.md.

    python -m bench.compat [WORD ...] [--write]

Every image pipeline of the installed diffusers that can be built from tiny configurations (``tests/zoo.py``) runs
tiled. The page says what each check means.
"""

import argparse
import inspect
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import diffusers
import zoo  # type: ignore[import-not-found]

from bench import measure
from tiledcore import Execution, TiledPipeline, TilingConfig, apply_tiling, remove_tiling

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
TILE, ONE, SIZE = zoo.NATIVE, (zoo.NATIVE, zoo.NATIVE), (zoo.NATIVE * 3 // 2, zoo.NATIVE * 2)
GROW = ("BriaFiboEdit", "KontextInpaint", "KleinInpaint", "EditInpaint", "LongCatImageEdit")
"""Parts of names of classes whose references are as large as the canvas."""
SQUARE = [f"Kandinsky{name}Pipeline" for name in ("Img2Img", "V22Img2Img", "V22ControlnetImg2Img")]
"""Classes whose sides diffusers mixes up."""


@dataclass
class Row:
    """A class of pipelines; ``found`` has a mark or a reason for each of CHECKS."""

    name: str
    network: str
    found: dict[str, str] = field(default_factory=dict)
    not_built: str = ""
    deprecated: bool = False

    @property
    def refused(self) -> str:
        """Why the class is refused in tile mode, whatever it is asked; empty if it runs."""
        marks = {self.found.get(name, "yes") for name in CHECKS if name not in ("canvas mode", "removed")}
        return "" if "yes" in marks or len(marks) > 1 else marks.pop().partition(": ")[2]

    @property
    def wrong(self) -> bool:
        return any(mark.startswith("WRONG") for mark in self.found.values())


def check(cls: type) -> Row:
    """Build and run one class of pipelines."""
    row = Row(cls.__name__, zoo.network_class(cls) or "", deprecated="deprecated" in cls.__module__)
    try:
        pipe = zoo.build(cls)
        before = zoo.run(pipe, cls, ONE)
        if not before.isfinite().all():
            raise ValueError("not finite without tiling")
    except Exception as error:  # the table says what is missing
        row.not_built = first_line(error)
        return row
    for name, one in CHECKS.items():
        try:
            row.found[name] = one(pipe, cls, before)
        except (TypeError, ValueError, NotImplementedError) as error:
            row.found[name] = first_line(error)
        except Exception as error:
            row.found[name] = f"WRONG {type(error).__name__}: {first_line(error)}"
        remove_tiling(pipe)
    return row


def size_of(cls: type) -> tuple[int, int]:
    """A canvas of two by two tiles, in latent pixels."""
    return (SIZE[1], SIZE[1]) if cls.__name__ in SQUARE else SIZE


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].replace("|", "/")


def seen(pipe: Any, call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The arguments of each call of a pipeline's network, by name, during ``call``."""
    network: Any = getattr(pipe, "transformer", None) or pipe.unet
    calls: list[dict[str, Any]] = []
    names = list(inspect.signature(type(network).forward).parameters)[1:]

    def note(_: Any, args: Any, kwargs: Any) -> None:
        calls.append(dict(zip(names, args, strict=False)) | kwargs)

    with network.register_forward_pre_hook(note, with_kwargs=True):
        call()
    return calls


def _same(result: Tensor, before: Tensor) -> str:
    return "yes" if torch.equal(result, before) else "WRONG"


def _finite(result: Tensor) -> str:
    return "yes" if result.isfinite().all() else "WRONG not finite"


def _tiled(pipe: Any, cls: type, size: tuple[int, int], tile_batch: int = 4, **tiling: Any) -> Tensor:
    result: Tensor = zoo.run(apply_tiling(pipe, TilingConfig(tile=TILE, **tiling), Execution(tile_batch)), cls, size)
    return result


def _arguments(pipe: Any, cls: type, _: Tensor) -> str:
    image = seen(pipe, lambda: zoo.run(pipe, cls, ONE))[0]
    tile = seen(pipe, lambda: _tiled(pipe, cls, size_of(cls), 1, overlap=TILE // 4))[0]
    grows, differs = any(word in cls.__name__ for word in GROW), set()
    for name in sorted(image.keys() - {"return_dict"}):
        for one, other in zip(tree_leaves(image[name]), tree_leaves(tile[name]), strict=True):
            if not isinstance(one, Tensor):
                if isinstance(one, int | float | str | tuple) and one != other and not grows:
                    return f"WRONG {name}: {other} in place of {one}"
            elif one.shape != other.shape and not grows:
                return f"WRONG {name}: {tuple(other.shape)} in place of {tuple(one.shape)}"
            elif not torch.equal(one, other):
                differs.add(name)
    named = sorted(differs - {"sample", "hidden_states", "x", "args"})  # these are the canvas
    return f"but {', '.join(named)}" if named else "yes"


def _several(pipe: Any, cls: type, _: Tensor) -> str:
    one, four = (_tiled(pipe, cls, size_of(cls), count, overlap=TILE // 4) for count in (1, 4))
    if not one.isfinite().all():
        return "WRONG not finite"
    whole = zoo.run(remove_tiling(pipe), cls, size_of(cls))
    if whole.shape != one.shape or torch.equal(whole, one):
        return f"WRONG {tuple(one.shape)}, as without tiling" if whole.shape == one.shape else "WRONG shape"
    error = float((one - four).abs().max() / one.abs().max())
    return "yes" if error < 1e-4 else f"WRONG tile_batch 1 and 4 differ by {error:.1e}"


CHECKS: dict[str, Callable[[Any, type, Tensor], str]] = {
    "one tile": lambda pipe, cls, before: _same(_tiled(pipe, cls, ONE), before),
    "arguments": _arguments,
    "2x2 tiles": _several,
    "default": lambda pipe, cls, _: _finite(zoo.run(TiledPipeline.from_pipe(pipe), cls, size_of(cls))),
    "canvas mode": lambda pipe, cls, _: _finite(_tiled(pipe, cls, size_of(cls), mode="canvas")),
    "removed": lambda pipe, cls, before: _same(zoo.run(pipe, cls, ONE), before),
}
"""What is tried of a pipeline, in this order. The third argument is its image of one tile without tiling."""


def table(rows: list[Row]) -> str:
    """The part of the page between its markers."""
    tried = [row for row in rows if row.found and not row.refused]
    now, former = ([row for row in tried if row.deprecated == old] for old in (False, True))
    works = [row for row in now if row.found["one tile"] == row.found["2x2 tiles"] == "yes"]
    reasons: dict[str, int] = {}

    def mark(text: str) -> str:
        if text == "yes" or text.startswith(("WRONG", "but ")):
            return text
        text = re.sub(r"^(network|pipe)=\w+: |^[\w.]+\.(?=attn|attentions)\S*: ", "", text)
        return f"[{reasons.setdefault(text, len(reasons) + 1)}]"

    def cells(some: list[Row]) -> str:
        marks = [[row.name, row.network, *(mark(row.found[name]) for name in CHECKS)] for row in some]
        return measure.markdown(["pipeline", "network", *CHECKS], marks)

    def why(some: list[Row]) -> Iterator[str]:
        groups: dict[str, list[str]] = {}
        for row in some:
            groups.setdefault(row.refused or row.not_built, []).append(row.name)
        return (f"- {', '.join(names)}: {reason}" for reason, names in groups.items())

    refused = [row for row in rows if row.refused]
    lines = [
        f"With diffusers {diffusers.__version__}, {len(works)} of {len(now)} classes run in tile mode, "
        f"{len(refused)} more are refused. A number is a reason below the table.\n",
        cells(now),
        "\nRefused in one line, before anything runs:\n",
        *why(refused),
        "\nDeprecated by diffusers:\n",
        cells(former),
        "\nReasons:\n",
        *(f"{number}. {text}" for text, number in reasons.items()),
        "\nNot built, so not known:\n",
        *why([row for row in rows if row.not_built]),
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compat", description=__doc__)
    parser.add_argument("words", nargs="*", help="only classes with one of these in their names")
    parser.add_argument("--write", action="store_true", help="write the table into the page")
    args = parser.parse_args(argv)
    if args.write and args.words:
        parser.error("--write: the table has all classes; must be without WORD")
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    rows = []
    for cls in zoo.classes():
        if not args.words or any(word in cls.__name__ for word in args.words):
            started = time.perf_counter()
            rows.append(row := check(cls))
            marks = row.not_built or " | ".join(mark[:90] for mark in row.found.values())
            print(f"{row.name}: {marks} ({time.perf_counter() - started:.1f} s)", flush=True)
    if args.write:
        before, start, rest = PAGE.read_text().partition("<!-- classes -->\n")
        PAGE.write_text(before + start + table(rows) + rest[rest.index("\n<!-- /classes -->") :])
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
