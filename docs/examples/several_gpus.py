"""One image by several processes: torchrun --nproc-per-node 2 docs/examples/several_gpus.py"""

import argparse
import os

import torch
import torch.distributed as dist

from tiledcore import TiledPipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="earth", help="an embedded model, a folder, or a name on the hub")
parser.add_argument("--size", type=int, default=1024, help="of each side, in px")
parser.add_argument("--steps", type=int, default=12)
args = parser.parse_args()

rank, cuda = int(os.environ.get("RANK", 0)), torch.cuda.is_available()
device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
if cuda:
    torch.cuda.set_device(device)
if "RANK" in os.environ:  # started by torchrun
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
pipe = TiledPipeline.from_pretrained(args.model)  # every process has the whole model
pipe.to(device)

image = pipe(  # all processes must make the same call, with the same seed
    "topographic map of a rugged coast",
    height=args.size,
    width=args.size,
    num_inference_steps=args.steps,
    guidance_scale=3.0,
    generator=torch.Generator().manual_seed(0),
).images[0]
if rank == 0:
    image.save("several_gpus.png")
if "RANK" in os.environ:
    print(pipe.report.ranks)
    dist.destroy_process_group()
