"""Features of a pipeline in pairs on tiny SDXL and tiny FLUX: ``python tests/pair_matrix.py [sdxl] [flux]``.

For each pair two runs are compared: the fused loop with tile batches of 4, and the pipeline's own loop with single
tiles. ``=``: equal to float rounding. ``-``: refused in one line, the same by both. Anything else is a fault.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from PIL import Image
from tiny import tiny_sdxl
from tiny_transformers import build, tiny_flux

from tiledcore import Execution, Pull, Region, TiledPipeline, TilingConfig

HEIGHT, WIDTH = 192, 256
PICTURE = Image.effect_noise((WIDTH, HEIGHT), 60).convert("RGB")
MASK = Image.fromarray(((np.mgrid[:HEIGHT, :WIDTH][1] > 100) * 255).astype(np.uint8))
REGIONS = [Region("a dog", box=(0, 0, 128, HEIGHT), feather=16)]


def _network(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def _lora(pipe: Any) -> None:
    adapter = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for name in ("one", "two"):
            _network(pipe).add_adapter(adapter, adapter_name=name)
    _network(pipe).set_adapter("two")  # swapped


def _float8(pipe: Any) -> None:
    _network(pipe).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _sequential(pipe: Any) -> None:
    """What ``enable_sequential_cpu_offload`` does to the network; on transformers' encoders accelerate fails."""
    cpu_offload(_network(pipe), torch.device("cpu"), offload_buffers=True)


def _group_offload(pipe: Any) -> None:
    devices = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    _network(pipe).enable_group_offload(**devices, offload_type="leaf_level")


SETUPS: dict[str, Callable[[Any], Any]] = {
    "fused projections": lambda pipe: _network(pipe).fuse_qkv_projections(),
    "lora swapped": _lora,
    "float8 layers": _float8,
    "group offload": _group_offload,
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential offload": _sequential,
    "compiled blocks": lambda pipe: _network(pipe).compile_repeated_blocks(backend="eager"),
    "attention backend": lambda pipe: _network(pipe).set_attention_backend("native"),
    "cache": lambda pipe: _network(pipe).enable_cache(FirstBlockCacheConfig(threshold=1e6)),  # reuses whenever it can
}
"""What is done to the pipeline before it is wrapped."""
CALLS: dict[str, dict[str, Any]] = {
    "moving tiles": {"tiling": TilingConfig(tile=16, motion="moving")},
    "wrap": {"tiling": TilingConfig(tile=16, overlap=4, wrap=True)},
    "canvas mode": {"tiling": TilingConfig(tile=16, mode="canvas")},
    "regions": {"regions": REGIONS},
    "prompt per tile": {"prompt_for_tile": lambda box: "a dog" if box[0] < 100 else "ice"},
    "image": {"image": PICTURE, "strength": 0.8},
    "mask": {"image": PICTURE, "mask_image": MASK, "strength": 0.8},
    "pull": {"image": PICTURE, "strength": 0.8, "pull": Pull()},
    "two images": {"num_images_per_prompt": 2},
    "no guidance": {"guidance_scale": 1.0},
    "stages": {"stages": "auto"},
}
"""Arguments of the call."""
NAMES = (*SETUPS, *CALLS)
MAKERS: dict[str, Callable[[], Any]] = {"sdxl": tiny_sdxl, "flux": lambda: build(tiny_flux)}


def run(make: Callable[[], Any], names: tuple[str, ...], fused: bool) -> Any:
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 4, "output_type": "latent"}
    for name in names:
        if name in SETUPS:
            SETUPS[name](pipe)
        else:
            call |= CALLS[name]
    call["generator"] = torch.Generator().manual_seed(0)
    tiling = TilingConfig(tile=16, overlap=4)
    made = TiledPipeline(pipe, tiling, execution=Execution(4 if fused else 1), fused=fused)("a cat", **call).images
    return made if isinstance(made, torch.Tensor) else torch.from_numpy(np.asarray(made[0]).copy())


def outcome(make: Callable[[], Any], names: tuple[str, ...]) -> str:
    """``=``, ``-`` and why, or what is wrong."""
    found: list[Any] = []
    for fused in (True, False):
        try:
            found.append(run(make, names, fused))
        except (ValueError, TypeError) as error:
            found.append(str(error))
        except Exception as error:  # every other kind is a fault, and belongs in the table
            return f"{type(error).__name__}: {error}"
    one, other = found
    if isinstance(one, str) or isinstance(other, str):
        return f"- {one}" if one == other and "\n" not in one else f"differs: {one} / {other}"[:300]
    if not torch.isfinite(one).all():
        return "not finite"
    error = float((one - other).abs().max() / other.abs().max())
    return "=" if error < 1e-3 else f"differs by {error:.1e}"


def pairs(model: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """All pairs of features, and single ones as pairs with themselves, with their outcomes."""
    for a, b in combinations_with_replacement(NAMES, 2):
        if model == "sdxl" and "cache" in (a, b):  # diffusers has none for UNets
            continue
        if {a, b} == {"model offload", "sequential offload"}:  # one replaces the other
            continue
        same = CALLS.get(a, {}).keys() & CALLS.get(b, {}).keys() if a != b else set()
        if not same:
            names = (a,) if a == b else (a, b)
            yield names, outcome(MAKERS[model], names)


def main(models: list[str]) -> int:
    wrong = 0
    for model in models or list(MAKERS):
        found = dict(pairs(model))
        print(f"\n{model}\n" + " " * 20 + " ".join(f"{i:>2}" for i in range(len(NAMES))))
        for i, a in enumerate(NAMES):
            cells = [found.get((a,) if a == b else (a, b), found.get((b, a), " "))[:1] for b in NAMES[: i + 1]]
            print(f"{i:>2} {a:<17}" + " ".join(f"{cell:>2}" for cell in cells))
        for names, text in found.items():
            if text != "=":
                print(f"{' + '.join(names)}: {text}")
                wrong += not text.startswith("-")
    print(f"\n{wrong} faults")
    return min(wrong, 1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
