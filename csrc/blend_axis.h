// Shared code of the CPU kernels that blend tiles: weights per axis, the grid of tiles, the loop over
// the tiles of a band of canvas rows, and the conversion of each dtype.
//
// The weights are separable and the tiles form a grid of rows and columns, so only a small table of
// normalised weights is stored for each tile row and each tile column. Tiles are summed row by row,
// then column by column, independent of their order in the list.
#pragma once

#include "common.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

namespace tiledcore {
namespace {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// 64 KiB of sums, a small part of any L2 cache. A band of rows reads some contiguous kilobytes from
// each tile, which the hardware prefetches well.
constexpr int64_t BAND_ELEMENTS = 16384;

template <typename Acc>
struct Axis {
  std::vector<int64_t> starts;  // distinct and ascending
  std::vector<Acc> weights;     // [starts, extent]
  std::vector<int64_t> first, last;  // where each start's weights are not zero: [first, last)
};

inline double relative_weight(
    const std::string& window, int64_t ramp, int64_t extent, int64_t depth, int64_t deepest) {
  const double gap = static_cast<double>(deepest - depth);
  if (window == "mean") {
    return 1.0;
  }
  if (window == "gaussian") {
    // exp(-c^2/0.02) / exp(-c_deepest^2/0.02), c = 0.5 - (depth + 0.5) / extent, with the difference of
    // squares factored, which avoids cancellation.
    const double side = static_cast<double>(extent - 1 - depth - deepest);
    return std::exp(-50.0 * gap * side / (static_cast<double>(extent) * extent));
  }
  return std::max(0.0, 1.0 - gap / static_cast<double>(ramp));
}

template <typename Acc>
Axis<Acc> make_axis(
    std::vector<int64_t> starts, int64_t extent, int64_t size, const std::string& window,
    int64_t ramp) {
  std::sort(starts.begin(), starts.end());
  starts.erase(std::unique(starts.begin(), starts.end()), starts.end());
  const int64_t count = static_cast<int64_t>(starts.size());
  const auto depth = [&](int64_t u) { return std::min(u, extent - 1 - u); };

  std::vector<int64_t> deepest(size, -1);
  for (const int64_t start : starts) {
    for (int64_t u = 0; u < extent; ++u) {
      int64_t& d = deepest[(start + u) % size];
      d = std::max(d, depth(u));
    }
  }
  std::vector<double> exact(count * extent), total(size, 0.0);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t u = 0; u < extent; ++u) {
      const int64_t at = (starts[i] + u) % size;
      exact[i * extent + u] = relative_weight(window, ramp, extent, depth(u), deepest[at]);
      total[at] += exact[i * extent + u];
    }
  }

  Axis<Acc> axis{starts, std::vector<Acc>(count * extent), {}, {}};
  for (int64_t i = 0; i < count; ++i) {
    int64_t first = extent, last = 0;
    for (int64_t u = 0; u < extent; ++u) {
      const double weight = exact[i * extent + u] / total[(starts[i] + u) % size];
      axis.weights[i * extent + u] = static_cast<Acc>(weight);
      if (weight > 0) {
        first = std::min(first, u);
        last = u + 1;
      }
    }
    axis.first.push_back(first);
    axis.last.push_back(last);
  }
  return axis;
}

// The positions of the tiles and their weights.
template <typename Acc>
struct Plan {
  int64_t H, W, h, w;
  Axis<Acc> down, across;
  std::vector<int64_t> grid;  // the tile at each (row, column)
};

template <typename Acc>
Plan<Acc> make_plan(
    const Tensor& offsets, int64_t H, int64_t W, int64_t h, int64_t w, const std::string& window,
    int64_t ramp) {
  const int64_t T = offsets.size(0);
  const int32_t* at = offsets.const_data_ptr<int32_t>();
  std::vector<int64_t> ys, xs;
  for (int64_t t = 0; t < T; ++t) {
    ys.push_back(at[2 * t]);
    xs.push_back(at[2 * t + 1]);
  }
  Plan<Acc> plan{
      H, W, h, w, make_axis<Acc>(ys, h, H, window, ramp), make_axis<Acc>(xs, w, W, window, ramp),
      {}};
  const int64_t rows = static_cast<int64_t>(plan.down.starts.size());
  const int64_t columns = static_cast<int64_t>(plan.across.starts.size());
  const auto place = [](const std::vector<int64_t>& starts, int64_t start) {
    return std::lower_bound(starts.begin(), starts.end(), start) - starts.begin();
  };
  STD_TORCH_CHECK(
      T == rows * columns, "offsets must be every pair of ", rows, " rows and ", columns,
      " columns once, got ", T);
  plan.grid.assign(T, -1);
  for (int64_t t = 0; t < T; ++t) {
    plan.grid[place(plan.down.starts, ys[t]) * columns + place(plan.across.starts, xs[t])] = t;
  }
  STD_TORCH_CHECK(
      std::count(plan.grid.begin(), plan.grid.end(), -1) == 0,
      "offsets must be every pair of ", rows, " rows and ", columns, " columns once, got ", T);
  return plan;
}

// Calls add(sum, weights, scale, tile, at, n) for every piece of a tile's row that has weight in the
// canvas rows y0 <= y < y1. The callee adds scale * weights[i] * (element at + i of one plane of the
// tile) to sum[i]. `sums` holds whole canvas rows, starting with y0.
template <typename Acc, typename Add>
void sum_band(const Plan<Acc>& plan, int64_t y0, int64_t y1, Acc* sums, const Add& add) {
  struct Line {
    int64_t y, u;  // the same row, counted in the band and in the tile
    Acc weight;
  };
  const Axis<Acc>&down = plan.down, &across = plan.across;
  const int64_t columns = static_cast<int64_t>(across.starts.size());
  std::vector<Line> lines;
  for (size_t i = 0; i < down.starts.size(); ++i) {
    lines.clear();
    for (int64_t y = y0; y < y1; ++y) {
      const int64_t u = y >= down.starts[i] ? y - down.starts[i] : y - down.starts[i] + plan.H;
      if (u >= down.first[i] && u < down.last[i]) {
        lines.push_back({y - y0, u, down.weights[i * plan.h + u]});
      }
    }
    for (int64_t j = 0; j < columns && !lines.empty(); ++j) {
      const int64_t tile = plan.grid[i * columns + j];
      const Acc* weights = &across.weights[j * plan.w];
      const int64_t start = across.starts[j], first = across.first[j], last = across.last[j];
      // Columns first..wrap are left of the canvas border, wrap..last continue at its other side.
      const int64_t wrap = std::min(std::max(first, plan.W - start), last);
      for (const Line& line : lines) {
        Acc* sum = sums + line.y * plan.W + start;
        const int64_t row = line.u * plan.w;
        add(sum + first, weights + first, line.weight, tile, row + first, wrap - first);
        if (wrap < last) {
          add(sum + wrap - plan.W, weights + wrap, line.weight, tile, row + wrap, last - wrap);
        }
      }
    }
  }
}

// Storage and arithmetic of each dtype. torch's Half and BFloat16 convert with branches and class
// objects, which GCC does not vectorise; it does vectorise integers and selects.
struct F32 {
  using Store = float;
  using Acc = float;
  static Acc widen(Store v) { return v; }
  static Store narrow(Acc v) { return v; }
};

struct F64 {
  using Store = double;
  using Acc = double;
  static Acc widen(Store v) { return v; }
  static Store narrow(Acc v) { return v; }
};

struct BF16 {
  using Store = uint16_t;
  using Acc = float;
  static Acc widen(Store v) { return bits_to_float(static_cast<uint32_t>(v) << 16); }
  static Store narrow(Acc v) {
    const uint32_t bits = float_to_bits(v);
    const uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // round to nearest even
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : static_cast<Store>(even);
  }
};

struct F16 {
  using Store = uint16_t;
  using Acc = float;
  static Acc widen(Store v) {
    // Move sign, exponent and mantissa to a float's bits, then correct the exponent bias (112) by a
    // product, which is exact and makes denormal halves normal.
    const uint32_t spread = static_cast<uint32_t>(static_cast<int16_t>(v)) << 13;
    const uint32_t bits = float_to_bits(bits_to_float(spread & 0x8fffe000) * 0x1p112f);
    // From 2^16 on the value is infinity or NaN, depending on the mantissa.
    return bits_to_float((bits & 0x7fffffff) < 0x47800000 ? bits : bits | 0x7f800000);
  }
  static Store narrow(Acc v) {
    const uint32_t bits = float_to_bits(v), rest = bits & 0x7fffffff;
    const uint32_t normal = (rest - (112u << 23) + 0xfff + ((rest >> 13) & 1)) >> 13;
    // Below 2^-14: adding 1/2 leaves units of 2^-24, as in a denormal half, rounded to even.
    const uint32_t small = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000;
    const uint32_t special = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t half = rest < 0x38800000 ? small : rest < 0x47800000 ? normal : special;
    return static_cast<Store>(((bits >> 16) & 0x8000) | half);
  }
};

template <typename F>
inline __attribute__((always_inline)) void accumulate_row(
    typename F::Acc* __restrict acc, const typename F::Acc* __restrict weights,
    typename F::Acc scale, const typename F::Store* __restrict row, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    acc[i] += (scale * weights[i]) * F::widen(row[i]);
  }
}

// target_clones does not work on templates, so there is one overload per dtype.
#define TILEDCORE_ACCUMULATE(F)                                                                 \
  [[maybe_unused]] TILEDCORE_CLONES void accumulate(                                            \
      F, F::Acc* acc, const F::Acc* weights, F::Acc scale, const F::Store* row, int64_t n) {    \
    accumulate_row<F>(acc, weights, scale, row, n);                                             \
  }
TILEDCORE_ACCUMULATE(F32)
TILEDCORE_ACCUMULATE(F64)
TILEDCORE_ACCUMULATE(F16)
TILEDCORE_ACCUMULATE(BF16)
#undef TILEDCORE_ACCUMULATE

}  // namespace
}  // namespace tiledcore
