#!/bin/sh
# Nsight on each part of the engine. Usage: bench/profile.sh OUT [nsys|ncu]; needs a CUDA device and the tools.
# The ranges tiledcore::gather, network, attention, blend, step and decode are NVTX ranges.
set -eu
out=${1:?folder for the reports}
mkdir -p "$out"

if [ "${2:-nsys}" = nsys ]; then
    # The whole loop: kernels, launches, ranges. Nodes of a graph are traced one by one.
    nsys profile --trace=cuda,nvtx --cuda-graph-trace=node --force-overwrite=true --output "$out/generate" \
        tiledcore generate "relief map of a rugged coast" --size 2048x2048 --steps 4 --seed 0 --out "$out/generate.png"
    nsys stats --report nvtx_gpu_proj_sum,cuda_gpu_kern_sum "$out/generate.nsys-rep"
else
    # Each kernel alone, from its cases: bandwidth, tensor cores, occupancy, stalls.
    for op in gather_tiles blend_tiles fused_step group_norm_silu neighbor_attention; do
        ncu --set full --kernel-name "regex:${op}.*" --launch-skip 5 --launch-count 3 --force-overwrite \
            --export "$out/$op" python -m bench run "$op" --quick --dtype float16 --rounds 2
    done
fi
