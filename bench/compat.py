"""Which pipelines of diffusers can be tiled: the table of docs/compatibility.md.

    python -m bench.compat [WORD ...] [--write]

Every image pipeline of the installed diffusers that can be built from tiny configurations (``tests/zoo.py``) runs
tiled. WORD: only classes with it in their names. ``--write``: write the page.
"""

import argparse
import inspect
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import diffusers
import zoo  # type: ignore[import-not-found]

from tiledcore import Execution, TiledPipeline, TilingConfig, apply_tiling, remove_tiling

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
TILE, ONE, SIZE = zoo.NATIVE, (zoo.NATIVE, zoo.NATIVE), (zoo.NATIVE * 3 // 2, zoo.NATIVE * 2)
GROW = (
    "BriaFiboEdit",
    "KontextInpaint",
    "KleinInpaint",
    "EditInpaint",
    "LongCatImageEdit",
)  # references as large as the canvas
SQUARE = (
    "KandinskyImg2ImgPipeline",
    "KandinskyV22Img2ImgPipeline",
    "KandinskyV22ControlnetImg2ImgPipeline",
)  # diffusers mixes up their sides
CHECKS: dict[str, str] = {
    "one tile": "a canvas of one tile gives the bits of the pipeline without tiling",
    "arguments": "what the network gets for a tile has the shapes and values that an image of that size has",
    "2x2 tiles": "a canvas of 2x2 tiles is finite, and tile batches of 1 and 4 agree",
    "default": "a TiledPipeline with its default tiling runs on that canvas",
    "canvas mode": "one network call with neighbour attention; not needed for tiling",
    "removed": "after `remove_tiling` the bits are those of before",
}

NOTES = """
Reference images (Kontext, FLUX.2, Qwen-Image Edit) are seen whole by every tile; an image to edit that lies beside the
canvas (DreamLite) is cut with it. Some pipelines choose the size of their image themselves: a call that asks for
another one is refused in one line that says what to give or set:

- HiDreamImagePipeline: `pipe.default_sample_size` = square root of the area in px / 8
- Kandinsky5T2IPipeline, Kandinsky5I2IPipeline: `pipe.resolutions = [(width, height)]`
- FluxKontextPipeline: `max_area=height * width, _auto_resize=False` in the call
- PixArt, Sana, HunyuanDiT: `use_resolution_binning=False` in the call (a TiledPipeline gives it)
- QwenImage21Pipeline: `use_kv_cache=False` in the call, because tiles cannot share a cache
- Ideogram4Pipeline: its noise levels follow the size; for those of a tile lower `mu` by half the logarithm of
  (area of the canvas / area of a tile)

## A pipeline as it is set up

| what | in tile mode | test |
|---|---|---|
| torchao int8, optimum-quanto int8, GGUF, bitsandbytes 8 and 4 bit | as without tiling; run on a CPU, bitsandbytes \
with its own layers because diffusers' loader of it asks for a GPU | `tests/pipeline/test_quantised.py` |
| layers in float8, group, model and sequential offload, `compile_repeated_blocks`, fused projections, LoRA swapped,\
 an attention backend | as without tiling, each with every other feature | `python tests/pair_matrix.py` |
| FirstBlockCache, MagCache, TaylorSeer | a state for each tile batch, kept as long as the call; tiles must stay in \
place (`motion="still"`) | `tests/tiles/test_transformers_refused.py` |
| PyramidAttentionBroadcast, FasterCache, TextKVCache, SeaCache | refused in one line: tiles would share their state\
 | the same |
| guidance objects (`diffusers.guiders`) | as without tiling: they see the blended predictions | \
`tests/pipeline/test_modular.py` |
| ModularPipeline | `apply_tiling` on it, see below | the same |
| base and refiner (`denoising_end`, `denoising_start`) | each is tiled by itself | `tests/pipeline/test_pairs.py` |

A ModularPipeline is tiled like any other; its blocks stay as they are:

```python
from diffusers import FluxAutoBlocks
from tiledcore import TiledPipeline, TilingConfig, apply_tiling

parts = TiledPipeline.from_pretrained("earth-flux").components
pipe = FluxAutoBlocks().init_pipeline()
pipe.update_components(**{name: part for name, part in parts.items() if name in pipe.components})
apply_tiling(pipe, TilingConfig(tile=64))
image = pipe(prompt="satellite image of dunes", height=1024, width=1536, num_inference_steps=4, output="images")[0]
```
"""


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
        found = [self.found.get(name, "") for name in CHECKS if name not in ("canvas mode", "removed")]
        return found[0].partition(": ")[2] if self.found and len(set(found)) == 1 and found[0] != "yes" else ""

    @property
    def wrong(self) -> list[str]:
        return [f"{name}: {mark}" for name, mark in self.found.items() if mark.startswith("WRONG")]


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
    checks: list[Callable[..., str]] = [_one_tile, _arguments, _several, _default, _canvas, _removed]
    for name, one in zip(CHECKS, checks, strict=True):
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


def _one_tile(pipe: Any, cls: type, before: Tensor) -> str:
    return "yes" if torch.equal(zoo.run(apply_tiling(pipe, TilingConfig(tile=TILE)), cls, ONE), before) else "WRONG"


def seen(pipe: Any, call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The arguments of each call of a pipeline's network, by name, during ``call``."""
    network: Any = getattr(pipe, "transformer", None) or pipe.unet
    calls: list[dict[str, Any]] = []
    names = list(inspect.signature(type(network).forward).parameters)[1:]

    def note(_: Any, args: Any, kwargs: Any) -> None:
        calls.append(dict(zip(names, args, strict=False)) | kwargs)

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        call()
    finally:
        handle.remove()
    return calls


def _arguments(pipe: Any, cls: type, before: Tensor) -> str:
    image = seen(pipe, lambda: zoo.run(pipe, cls, ONE))[0]
    tiling = TilingConfig(tile=TILE, overlap=TILE // 4)
    apply_tiling(pipe, tiling, Execution(tile_batch=1))
    tile = seen(pipe, lambda: zoo.run(pipe, cls, size_of(cls)))[0]
    differs = []
    for name, given in image.items():
        if name == "return_dict":
            continue
        for one, other in zip(tree_leaves(given), tree_leaves(tile[name]), strict=True):
            if not isinstance(one, Tensor):
                known = isinstance(one, int | float | str | tuple)
                if known and one != other and not any(word in cls.__name__ for word in GROW):
                    return f"WRONG {name}: {other} in place of {one}"
            elif one.shape != other.shape and not any(word in cls.__name__ for word in GROW):
                return f"WRONG {name}: {tuple(other.shape)} in place of {tuple(one.shape)}"
            elif one.shape != other.shape or not torch.equal(one, other):
                differs.append(name)
    # The first argument is the canvas.
    named = sorted({name for name in differs if name not in ("sample", "hidden_states", "x", "args")})
    return f"but {', '.join(named)}" if named else "yes"


def _several(pipe: Any, cls: type, before: Tensor) -> str:
    tiling = TilingConfig(tile=TILE, overlap=TILE // 4)
    one, four = (zoo.run(apply_tiling(pipe, tiling, Execution(tile_batch=n)), cls, size_of(cls)) for n in (1, 4))
    if not one.isfinite().all():
        return "WRONG not finite"
    whole = zoo.run(remove_tiling(pipe), cls, size_of(cls))
    if whole.shape != one.shape or torch.equal(whole, one):
        return f"WRONG {tuple(one.shape)}, as without tiling" if whole.shape == one.shape else "WRONG shape"
    error = float((one - four).abs().max() / one.abs().max())
    return "yes" if error < 1e-4 else f"WRONG tile_batch 1 and 4 differ by {error:.1e}"


def _default(pipe: Any, cls: type, before: Tensor) -> str:
    result = zoo.run(TiledPipeline.from_pipe(pipe), cls, size_of(cls))
    return "yes" if result.isfinite().all() else "WRONG not finite"


def _canvas(pipe: Any, cls: type, before: Tensor) -> str:
    result = zoo.run(apply_tiling(pipe, TilingConfig(tile=TILE, mode="canvas")), cls, size_of(cls))
    return "yes" if result.isfinite().all() else "WRONG not finite"


def _removed(pipe: Any, cls: type, before: Tensor) -> str:
    return "yes" if torch.equal(zoo.run(pipe, cls, ONE), before) else "WRONG"


def table(rows: list[Row]) -> str:
    """The page."""
    tried = [row for row in rows if row.found and not row.refused]
    now, former = ([row for row in tried if row.deprecated == old] for old in (False, True))
    works = [row for row in now if row.found["one tile"] == "yes" and row.found["2x2 tiles"] == "yes"]
    reasons: dict[str, int] = {}

    def mark(text: str) -> str:
        if text == "yes" or text.startswith(("WRONG", "but ")):
            return text
        text = re.sub(r"^(network|pipe)=\w+: |^[\w.]+\.(?=attn|attentions)\S*: ", "", text)
        return f"[{reasons.setdefault(text, len(reasons) + 1)}]"

    def cells(some: list[Row]) -> list[str]:
        return [
            f"\n| pipeline | network | {' | '.join(CHECKS)} |",
            f"|---|---|{'---|' * len(CHECKS)}",
            *(f"| {r.name} | {r.network} | {' | '.join(mark(r.found[name]) for name in CHECKS)} |" for r in some),
        ]

    def why(some: list[Row]) -> list[str]:
        groups: dict[str, list[str]] = {}
        for row in some:
            groups.setdefault(row.refused or row.not_built, []).append(row.name)
        return [f"- {', '.join(names)}: {reason}" for reason, names in groups.items()]

    lines = [
        "# Compatibility\n",
        f"Written by `python -m bench.compat --write` with diffusers {diffusers.__version__}: every image pipeline, "
        "built from tiny random networks\nwithout a download. "
        f"{len(works)} of {len(now)} classes run in tile mode, {sum(bool(r.refused) for r in rows)} more are refused. "
        "A number is a reason below the table.\n",
        *(f"- **{name}**: {text}" for name, text in CHECKS.items()),
        *cells(now),
        "\nRefused in one line, before anything runs:\n",
        *why([row for row in rows if row.refused]),
        "\nDeprecated by diffusers:",
        *cells(former),
        NOTES,
        "Reasons:\n",
        *(f"{number}. {text}" for text, number in reasons.items()),
        "\nNot built, so not known:\n",
        *why([row for row in rows if row.not_built]),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compat", description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
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
        PAGE.write_text(table(rows))
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
