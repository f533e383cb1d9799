"""The parts of the GPU suite: python -m bench.gpu_parts PART ROWS [--dry-run]. Run by bench/gpu_suite.py.

A part yields rows, and each is written at once. The dry run has the same code on small shapes and networks.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from bench import bench_vae, measure, suite
from bench.case import Case, relative_error
from tiledcore import TiledPipeline, TilingConfig
from tiledcore.memory.architectures import architecture
from tiledcore.vae.exact import exact_bands

Row = dict[str, Any]
HALVES = (torch.float16, torch.bfloat16)
WORKERS = 14  # processes that compile at once, each with some of the kernels' variants
ROOM = 24 << 30  # bytes that the SDXL part may allocate
UNET = {"norm_num_groups": 8, "cross_attention_dim": 32, "sample_size": 16, "layers_per_block": 1}
SMALL: dict[str, dict[str, Any]] = {
    "sd15": UNET | {"block_out_channels": (16, 16, 32, 32), "attention_head_dim": 2},
    "sdxl": UNET
    | {"block_out_channels": (16, 32, 32), "attention_head_dim": 2, "transformer_layers_per_block": 1}
    | {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80},
    "vae": {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 128},
}
"""What the dry run changes in the configurations."""


@dataclass(frozen=True)
class Where:
    """The device, and whether it is the dry run."""

    device: torch.device
    dry: bool

    @property
    def network_dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.float16

    def row(self, case: str, way: str) -> Row:
        """The start of a network's row."""
        return {"case": case, "name": way, "dtype": str(self.network_dtype).removeprefix("torch.")}

    def timed(self, cases: list[Case], dtypes: tuple[torch.dtype, ...], seconds: float) -> Iterator[Row]:
        """Check and time cases. One that fails gives one row, and the others go on."""
        for dtype in dtypes[-1:] if self.dry else dtypes:
            ceiling = measure.ceilings(self.device, torch.float32 if self.dry else dtype, 0.3)
            for case in cases:
                spent = seconds / 10 if self.dry else seconds
                for row in suite.run_case(case, self.device, dtype, spent, 3, ceiling):
                    yield row | {"dtype": str(dtype).removeprefix("torch.")}


def start(where: Where) -> Iterator[Row]:
    """Machine, ceilings, one capture; and all kernels compiled, by many processes at once."""
    command = [sys.executable, "-m", "bench.gpu_parts", "compile", "-", *["--dry-run"] * where.dry]
    count = 1 if where.dry else WORKERS
    compiling = [subprocess.Popen([*command, f"--share={i}/{count}"]) for i in range(count)]
    about = measure.machine(where.device)
    if not where.dry:
        free, total = torch.cuda.mem_get_info()
        about["memory"] = f"cuDNN {torch.backends.cudnn.version()}, {free >> 30} of {total >> 30} GiB free"
    yield {"case": "machine", "name": "–", "text": ", ".join(about.values()), "about": about}
    failed = sum(process.wait() != 0 for process in compiling)
    yield {"case": "compile", "name": f"{count} processes", "text": f"{failed} failed"}
    for dtype in (torch.float32,) if where.dry else HALVES:
        found = measure.ceilings(where.device, dtype)
        yield {"case": "ceilings", "name": "–", "dtype": str(dtype)[6:], "text": suite.best(found), **found}
    if not where.dry:
        yield {"case": "capture", "name": "replay", **small_capture(where.device)}


def small_capture(device: torch.device) -> Row:
    x = torch.randn(512, 512, device=device)
    y = x @ x
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x @ x
    x.normal_()
    y.fill_(torch.nan)
    graph.replay()
    error = relative_error(y, x @ x)
    return {"error": error, "text": "replayed"} if error < 1e-3 else {"wrong": f"a replay differs by {error:.2g}"}


def production() -> list[Case]:
    """Every op, small cases of production's shapes, and attention with parts of patches and by TMA."""
    return [case for case in suite.chosen([], quick=True) if not case.op.startswith("vae")]


def compile_share(where: Where, share: str) -> None:
    """Run some cases once, so that Triton's cache on the disk has their kernels."""
    index, count = map(int, share.split("/"))
    jobs = [(case, dtype) for dtype in HALVES for case in production()]
    for case, dtype in jobs[index::count][: 1 if where.dry else None]:
        for run in case.prepare(where.device, dtype).runs.values():
            run()


def every_op(where: Where) -> Iterator[Row]:
    cases = production()
    yield from where.timed(cases[::6] if where.dry else cases, HALVES, 0.3)
    tool = shutil.which("compute-sanitizer")
    row = {"case": "compute-sanitizer", "name": "gather_tiles"}
    if tool is None:
        yield row | {"not_run": "compute-sanitizer is not installed"}
        return
    command = [sys.executable, "-m", "bench", "run", "gather_tiles", "--quick", "--rounds", "1", "--seconds", "0.1"]
    done = subprocess.run([tool, "--error-exitcode", "9", *command], capture_output=True, text=True, timeout=40)
    yield row | ({"text": "no error"} if done.returncode == 0 else {"wrong": done.stdout[-300:]})


def attentions(where: Where) -> Iterator[Row]:
    """Ours in place, ours by gathering, and dense; FlexAttention comes last, because it has to be compiled."""
    known = suite.chosen(["neighbor_attention: odd, D=40" if where.dry else "neighbor_attention"], quick=where.dry)
    shown = [case for case in known if where.dry or not case.quick]
    yield from where.timed([case for case in shown if "FlexAttention" not in case.name], HALVES, 1.0)
    yield from where.timed([case for case in shown if "FlexAttention" in case.name], HALVES[:1], 1.0)


def memory_bound(where: Where) -> Iterator[Row]:
    """Blend, fused step, gather and norm against a copy, for images of 4096² to 16384²."""
    ops = ("blend_tiles", "fused_step: DPM++", "gather_tiles", "group_norm_silu")
    cases = [case for op in ops for case in suite.chosen([op], quick=False)]
    yield from where.timed(cases[::5] if where.dry else cases, HALVES[:1], 0.3)


def pipeline(name: str, where: Where) -> Any:
    """``"sd15"`` or ``"sdxl"`` with random weights and without text encoders: prompts are given as embeddings."""
    found = architecture(name)
    if where.dry:
        found = replace(found, network=replace(found.network, config=dict(found.network.config) | SMALL[name]))
        found = replace(found, vae=replace(found.vae, config=dict(found.vae.config) | SMALL["vae"]))
    with where.device:
        made = {"unet": found.network.make(), "vae": found.vae.make()}
    parts: dict[str, Any] = {name: part.eval().to(where.network_dtype) for name, part in made.items()}
    parts["scheduler"] = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1)
    parts |= dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor"))
    if name == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    else:
        pipe = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, side: int, steps: int, **more: Any) -> Tensor:
    """Latents ``[1, 4, side, side]`` after some steps with guidance, from the same embeddings and noise each time."""
    unet, generator = pipe.unet, torch.Generator().manual_seed(0)
    width, pooled = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim
    text = torch.randn(2, 1, 77, width, generator=generator).to(unet.device, unet.dtype)
    given: dict[str, Any] = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1], "output_type": "latent"}
    if pooled:
        width = pooled - 6 * unet.config.addition_time_embed_dim
        both = torch.randn(2, 1, width, generator=generator).to(unet.device, unet.dtype)
        given |= {"pooled_prompt_embeds": both[0], "negative_pooled_prompt_embeds": both[1]}
    size = pipe.vae_scale_factor * side
    return pipe(**given, height=size, width=size, num_inference_steps=steps, generator=generator, **more).images


def graphs(where: Where) -> Iterator[Row]:
    """Replayed steps against eager ones: time and result; with an adapter switched, and with three steps of LCM."""
    for name, tile in (("sd15", 16),) if where.dry else (("sd15", 64), ("sdxl", 128)):
        pipe, tiling, title = pipeline(name, where), TilingConfig(tile=tile), f"{name}, tile {tile}"
        graph_mode: Any = "auto" if where.dry else True
        ways = {n: TiledPipeline.from_pipe(pipe, tiling=tiling, cuda_graph=mode)
                for n, mode in (("eager", False), ("graph", graph_mode))}  # fmt: skip
        side = tile * 3 // 2
        yield from replayed(where, title, ways, side, 6)
        if find_spec("peft") is None:
            yield {"case": f"{title}, adapter", "name": "graph", "not_run": "peft is not installed"}
        else:
            from peft import LoraConfig

            pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
            yield from replayed(where, f"{title}, adapter on", ways, side, 4)
            pipe.unet.disable_adapters()
            yield from replayed(where, f"{title}, adapter off", ways, side, 4)
        for wrapped in ways.values():
            wrapped.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
        yield from replayed(where, f"{title}, LCM", ways, side, 3)
        del pipe, ways, wrapped
        torch.cuda.empty_cache()


def replayed(where: Where, case: str, ways: dict[str, Any], side: int, steps: int) -> Iterator[Row]:
    """Time the second call of each way, and compare its result with that of eager steps."""
    results = {}
    for way, wrapped in ways.items():
        call(wrapped, side, steps)  # loads, compiles and captures
        begin = time.perf_counter()
        results[way] = call(wrapped, side, steps)
        bool(results[way].isfinite().all())  # waits for the device
        seconds, done = time.perf_counter() - begin, wrapped.report.graph
        error = relative_error(results[way], results["eager"])
        row = where.row(f"{case}, {steps} steps", way) | {"error": error}
        row["memory"] = f"{done.captures} captures, {done.replays} replays"
        good = error <= suite.LIMITS[where.network_dtype]
        yield row | ({"seconds": seconds} if good else {"wrong": f"differs by {error:.2g} from eager steps"})


def sdxl(where: Where) -> Iterator[Row]:
    """SDXL's UNet within 24 GiB: seconds of the second step, peak predicted and measured, share of the ceiling."""
    if not where.dry:
        torch.cuda.set_per_process_memory_fraction(min(1.0, ROOM / torch.cuda.mem_get_info()[1]))
    pipe = pipeline("sdxl", where)
    ceiling = measure.ceilings(where.device, where.network_dtype, 0.3)["matmul_flops_per_second"]
    for pixels in (256,) if where.dry else (4096, 8192):
        for mode in ("tiles", "canvas"):
            row = where.row(f"SDXL {pixels}²", mode)
            try:
                yield row | within_room(pipe, pixels, mode, where, ceiling)
            except Exception as error:  # out of memory: the other mode may fit
                yield row | {"wrong": suite.reason(error)}


def within_room(pipe: Any, pixels: int, mode: Any, where: Where, ceiling: float) -> Row:
    wrapped: Any = TiledPipeline.from_pipe(pipe, tiling=TilingConfig(mode=mode), memory_budget=ROOM)
    times: list[float] = []

    def note(*_: Any) -> dict[str, Any]:
        if not where.dry:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return {}

    if not where.dry:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result = call(wrapped, pixels // pipe.vae_scale_factor, 2, callback_on_step_end=note)
    if not bool(result.isfinite().all()):
        return {"wrong": "the latents are not finite"}
    phases = [phase for phase in wrapped.report.plan.phases if phase.name in ("network", "step")]
    text = f"predicted {max(phase.peak for phase in phases) / 2**30:.2f}"
    if not where.dry:
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        text += f", allocated {allocated / 2**30:.2f}, reserved {reserved / 2**30:.2f}"
    seconds = times[1] - times[0]
    share = max(phase.flops for phase in phases) / seconds / ceiling
    return {"seconds": seconds, "of_ceiling": share, "memory": f"{text} GiB", "plan": wrapped.report.plan.summary}


def vae(where: Where) -> Iterator[Row]:
    """SDXL's decoder in exact bands: checked against the whole image, then images that do not fit whole."""
    kind = "small like SDXL's" if where.dry else "SDXL's"
    yield from where.timed(suite.chosen([f"vae_decode: {kind}"], quick=where.dry), (torch.float32,), 1.0)
    decoder = bench_vae.build(kind, where.device, where.network_dtype)
    for pixels in (256,) if where.dry else (4096, 8192):
        latents = torch.randn(1, 4, pixels // 8, pixels // 8, device=where.device).to(where.network_dtype)
        begin = time.perf_counter()
        with torch.inference_mode(), exact_bands(decoder):
            peak, image = measure.peak_growth(partial(decoder.decode, latents), where.device)
        done = {"seconds": time.perf_counter() - begin, "peak_bytes": peak}
        good = bool(image.sample.isfinite().all())
        yield where.row(f"decode {pixels}²", "exact bands") | (done if good else {"wrong": "not finite"})


PARTS: dict[str, Callable[[Where], Iterator[Row]]] = {
    "start": start, "ops": every_op, "attention": attentions, "blend": memory_bound, "graph": graphs, "sdxl": sdxl,
    "vae": vae,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "compile"])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--share", default="0/1", help="of the kernels to compile: this process / all processes")
    args = parser.parse_args()
    where = Where(torch.device("cpu" if args.dry_run else "cuda"), args.dry_run)
    torch.seed()  # other inputs in each process
    torch.backends.cudnn.allow_tf32 = False  # float32 is what others are compared with
    if args.part == "compile":
        compile_share(where, args.share)
        return
    with args.rows.open("a") as target:
        for row in PARTS[args.part](where):
            target.write(json.dumps({"part": args.part} | row, ensure_ascii=False) + "\n")
            target.flush()


if __name__ == "__main__":
    main()
