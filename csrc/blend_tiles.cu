// CUDA implementation of tiledcore::blend_tiles in gather form, for machines without Triton.
//
// A warp owns 32 pixels of a canvas row, a few planes deep. Its lanes search the offsets together
// for the next tile over these pixels, in the order of the corners: no shared memory, no barrier,
// no atomics, one order of summation. Every tile element that has weight is read once, every canvas
// element is written once. Compiled for every GPU in tests/test_csrc_cuda.py; not run there.
#include "blend_tiles.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace tiledcore {
namespace {

constexpr int WARP = 32, ROWS = 8, PLANES = 4;
constexpr int FIELD = 20;
constexpr unsigned long long MASK = (1ull << FIELD) - 1, END = ~0ull;

__device__ float widen(float v) { return v; }
__device__ double widen(double v) { return v; }
__device__ float widen(__half v) { return __half2float(v); }
__device__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ void narrow(float v, float* to) { *to = v; }
__device__ void narrow(double v, double* to) { *to = v; }
__device__ void narrow(float v, __half* to) { *to = __float2half_rn(v); }
__device__ void narrow(float v, __nv_bfloat16* to) { *to = __float2bfloat16_rn(v); }

// A pixel's coordinate within a tile that starts at `start` on a circle of `size`.
__device__ int inside(int pixel, int start, int size) {
  return pixel >= start ? pixel - start : pixel - start + size;
}

// Whole pixels to the nearer border of the tile; negative outside it.
__device__ int depth(int u, int extent) { return min(u, extent - 1 - u); }

// The smallest key (y, x, place in the list) above `after`, counted from 1 so that 0 precedes all,
// of a tile over some of the pixels x0 .. x0 + columns - 1 of row y. The whole warp calls it.
__device__ unsigned long long next_tile(
    const Blend& b, unsigned long long after, int y, int x0, int columns) {
  unsigned long long best = END;
  for (int t = threadIdx.x; t < b.T; t += WARP) {
    const int ty = b.offsets[2 * t], tx = b.offsets[2 * t + 1];
    // Two arcs of a circle overlap if and only if one of them contains the start of the other.
    const bool across = inside(x0, tx, b.W) < b.w || inside(tx, x0, b.W) < columns;
    const unsigned long long key =
        ((static_cast<unsigned long long>(ty) << 2 * FIELD) |
         (static_cast<unsigned long long>(tx) << FIELD) | static_cast<unsigned long long>(t)) + 1;
    if (across && inside(y, ty, b.H) < b.h && key > after && key < best) {
      best = key;
    }
  }
  for (int lane = WARP / 2; lane > 0; lane /= 2) {
    const unsigned long long other = __shfl_xor_sync(0xffffffffu, best, lane);
    best = other < best ? other : best;
  }
  return best;
}

// The weight along one axis, relative to the deepest tile over the pixel (which has 1).
template <Window W, typename Acc>
__device__ Acc weight(int depth, int deepest, int extent, int ramp) {
  if (depth < 0) {
    return Acc(0);
  }
  const Acc gap = static_cast<Acc>(deepest - depth);
  if (W == Window::mean) {
    return Acc(1);
  }
  if (W == Window::gaussian) {
    // exp(-c^2/0.02) / exp(-c_deepest^2/0.02), c = 0.5 - (depth + 0.5) / extent, with the
    // difference of squares taken apart: exact where the plain form would cancel.
    const Acc length = static_cast<Acc>(extent);
    return exp(Acc(-50) * gap * static_cast<Acc>(extent - 1 - depth - deepest) / (length * length));
  }
  const Acc fade = Acc(1) - gap / static_cast<Acc>(ramp);
  return fade > Acc(0) ? fade : Acc(0);
}

// Four blocks a multiprocessor: left to itself, ptxas aims at six and spills.
template <typename T, typename Acc, Window W>
__global__ void __launch_bounds__(WARP * ROWS, 4) blend_tiles_kernel(const Blend b) {
  // One grid axis for everything: the others end at 65535. A warp stays or leaves as a whole.
  const int blocks_x = (b.W + WARP - 1) / WARP, blocks_y = (b.H + ROWS - 1) / ROWS;
  const int x0 = blockIdx.x % blocks_x * WARP;
  const int y = blockIdx.x / blocks_x % blocks_y * ROWS + threadIdx.y;
  const int first = blockIdx.x / (blocks_x * blocks_y) * PLANES;
  const int x = x0 + threadIdx.x, columns = min(WARP, b.W - x0);
  if (y >= b.H) {
    return;
  }

  int deepest_y = -1, deepest_x = -1;
  if (W != Window::mean) {
    for (auto key = next_tile(b, 0, y, x0, columns); key != END;
         key = next_tile(b, key, y, x0, columns)) {
      const int ty = (key - 1) >> 2 * FIELD, tx = ((key - 1) >> FIELD) & MASK;
      deepest_y = max(deepest_y, depth(inside(y, ty, b.H), b.h));
      deepest_x = max(deepest_x, depth(inside(x, tx, b.W), b.w));
    }
  }

  Acc total = 0, sum[PLANES] = {};
  for (auto key = next_tile(b, 0, y, x0, columns); key != END;
       key = next_tile(b, key, y, x0, columns)) {
    const int u = inside(y, (key - 1) >> 2 * FIELD, b.H);
    const int v = inside(x, ((key - 1) >> FIELD) & MASK, b.W);
    const Acc share = weight<W, Acc>(depth(u, b.h), deepest_y, b.h, b.ramp) *
                      weight<W, Acc>(depth(v, b.w), deepest_x, b.w, b.ramp);
    if (x >= b.W || !(share > Acc(0))) {
      continue;  // what has no weight is not read
    }
    total += share;
    // 64 bits: the buffer of the tiles can exceed 2^31 elements.
    const int64_t plane = static_cast<int64_t>((key - 1) & MASK) * b.planes + first;
    const T* from = static_cast<const T*>(b.tiles) + (plane * b.h + u) * b.w + v;
#pragma unroll
    for (int p = 0; p < PLANES; ++p) {
      if (first + p < b.planes) {
        sum[p] += share * widen(from[static_cast<int64_t>(p) * b.h * b.w]);
      }
    }
  }
  if (x < b.W) {
    T* to = static_cast<T*>(b.out) + (static_cast<int64_t>(first) * b.H + y) * b.W + x;
#pragma unroll
    for (int p = 0; p < PLANES; ++p) {
      if (first + p < b.planes) {
        narrow(sum[p] / total, to + static_cast<int64_t>(p) * b.H * b.W);
      }
    }
  }
}

template <typename T, typename Acc>
cudaError_t launch(const Blend& b, Window window, cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>((b.W + WARP - 1) / WARP) *
                         ((b.H + ROWS - 1) / ROWS) * ((b.planes + PLANES - 1) / PLANES);
  if (blocks == 0) {
    return cudaSuccess;
  }
  if (blocks >= int64_t{1} << 31) {
    return cudaErrorInvalidConfiguration;
  }
  const dim3 grid(static_cast<unsigned>(blocks)), block(WARP, ROWS);
  switch (window) {
    case Window::mean:
      blend_tiles_kernel<T, Acc, Window::mean><<<grid, block, 0, stream>>>(b);
      break;
    case Window::gaussian:
      blend_tiles_kernel<T, Acc, Window::gaussian><<<grid, block, 0, stream>>>(b);
      break;
    case Window::ramp:
      blend_tiles_kernel<T, Acc, Window::ramp><<<grid, block, 0, stream>>>(b);
      break;
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_blend_tiles(
    const Blend& blend, Element element, Window window, cudaStream_t stream) {
  switch (element) {
    case Element::f16:
      return launch<__half, float>(blend, window, stream);
    case Element::bf16:
      return launch<__nv_bfloat16, float>(blend, window, stream);
    case Element::f32:
      return launch<float, float>(blend, window, stream);
    case Element::f64:
      return launch<double, double>(blend, window, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace tiledcore
