// The one function that csrc/blend_tiles.cu offers: no torch, so that nvcc alone compiles it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tiledcore {

enum class Element { f16, bf16, f32, f64 };
enum class Window { mean, gaussian, ramp };

struct Blend {
  const void* tiles;       // [T, planes, h, w]
  const int32_t* offsets;  // [T, 2]
  void* out;               // [planes, H, W]
  int32_t T, planes, H, W, h, w, ramp;
};

constexpr int64_t LIMIT = 1 << 20;  // of T, H and W: a tile's key has 20 bits for each

cudaError_t launch_blend_tiles(
    const Blend& blend, Element element, Window window, cudaStream_t stream);

}  // namespace tiledcore
