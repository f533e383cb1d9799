// CPU implementation of tiledcore::blend_tiles in gather form.
//
// The weights are separable and the grid is rows x columns, so both are split per axis: a small
// table of weights for each row and each column of tiles, already normalised per axis, is all that
// is ever stored. One output row is then accumulated in L1 and stored once, while the tiles' rows
// stream through. Tiles are summed row by row, then column by column, in whatever order they are
// listed.
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

constexpr int64_t BAND_ELEMENTS = 16384;  // 64 KiB of sums: a small part of any L2

template <typename Acc>
struct Axis {
  std::vector<int64_t> starts;  // distinct and ascending
  std::vector<Acc> weights;     // [starts, extent]
  std::vector<int64_t> first, last;  // where each start's weights are not zero: [first, last)
};

double relative_weight(
    const std::string& window, int64_t ramp, int64_t extent, int64_t depth, int64_t deepest) {
  const double gap = static_cast<double>(deepest - depth);
  if (window == "mean") {
    return 1.0;
  }
  if (window == "gaussian") {
    // exp(-c^2/0.02) / exp(-c_deepest^2/0.02), c = 0.5 - (depth + 0.5) / extent, with the
    // difference of squares taken apart: exact where the plain form would cancel.
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

// How each dtype is stored and summed. torch's own Half and BFloat16 convert with branches and
// through class objects, which GCC does not vectorise; on plain integers and selects it does.
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
    // Sign, exponent and mantissa at a float's places, then the exponents' biases, 112 apart, made
    // up for by a product, which is exact and makes denormal halves normal.
    const uint32_t spread = static_cast<uint32_t>(static_cast<int16_t>(v)) << 13;
    const uint32_t bits = float_to_bits(bits_to_float(spread & 0x8fffe000) * 0x1p112f);
    // From 2^16 on it is no number: infinity or NaN, by the mantissa.
    return bits_to_float((bits & 0x7fffffff) < 0x47800000 ? bits : bits | 0x7f800000);
  }
  static Store narrow(Acc v) {
    const uint32_t bits = float_to_bits(v), rest = bits & 0x7fffffff;
    const uint32_t normal = (rest - (112u << 23) + 0xfff + ((rest >> 13) & 1)) >> 13;
    // Below 2^-14: adding 1/2 leaves units of 2^-24, those of a denormal half, rounded to even.
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

template <typename F>
inline __attribute__((always_inline)) void store_row(
    typename F::Store* __restrict out, const typename F::Acc* __restrict acc, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = F::narrow(acc[i]);
  }
}

// target_clones does not apply to templates, hence one pair of overloads a dtype.
#define TILEDCORE_ROW_LOOPS(F)                                                                  \
  TILEDCORE_CLONES void accumulate(                                                             \
      F, F::Acc* acc, const F::Acc* weights, F::Acc scale, const F::Store* row, int64_t n) {    \
    accumulate_row<F>(acc, weights, scale, row, n);                                             \
  }                                                                                             \
  [[maybe_unused]] TILEDCORE_CLONES void store(                                                 \
      F, F::Store* out, const F::Acc* acc, int64_t n) {                                         \
    store_row<F>(out, acc, n);                                                                  \
  }
TILEDCORE_ROW_LOOPS(F32)
TILEDCORE_ROW_LOOPS(F64)
TILEDCORE_ROW_LOOPS(F16)
TILEDCORE_ROW_LOOPS(BF16)
#undef TILEDCORE_ROW_LOOPS

template <typename F>
void blend(
    const Tensor& tiles, const Tensor& offsets, Tensor& out, const std::string& window,
    int64_t ramp) {
  using Acc = typename F::Acc;
  using Store = typename F::Store;
  const int64_t T = offsets.size(0), planes = out.size(0) * out.size(1);
  const int64_t H = out.size(2), W = out.size(3), h = tiles.size(2), w = tiles.size(3);
  const int32_t* at = offsets.const_data_ptr<int32_t>();
  std::vector<int64_t> ys, xs;
  for (int64_t t = 0; t < T; ++t) {
    ys.push_back(at[2 * t]);
    xs.push_back(at[2 * t + 1]);
  }
  const Axis<Acc> down = make_axis<Acc>(ys, h, H, window, ramp);
  const Axis<Acc> across = make_axis<Acc>(xs, w, W, window, ramp);
  const int64_t rows = static_cast<int64_t>(down.starts.size());
  const int64_t columns = static_cast<int64_t>(across.starts.size());

  // The tile at each (row, column): every place of the grid must be taken exactly once.
  const auto place = [](const std::vector<int64_t>& starts, int64_t start) {
    return std::lower_bound(starts.begin(), starts.end(), start) - starts.begin();
  };
  std::vector<int64_t> grid(rows * columns, -1);
  for (int64_t t = 0; t < T; ++t) {
    grid[place(down.starts, ys[t]) * columns + place(across.starts, xs[t])] = t;
  }
  STD_TORCH_CHECK(
      T == rows * columns && std::count(grid.begin(), grid.end(), -1) == 0,
      "offsets must be every pair of ", rows, " rows and ", columns, " columns once, got ", T);

  const Store* from = static_cast<const Store*>(tiles.const_data_ptr());
  Store* to = static_cast<Store*>(out.mutable_data_ptr());
  // A band of rows at a time: from each tile it reads some kilobytes in one piece, which is what
  // the hardware prefetches well, while the band itself stays in the cache.
  const int64_t band = std::clamp<int64_t>(BAND_ELEMENTS / W, 1, H);
  const int64_t bands = (H + band - 1) / band;
  struct Line {
    int64_t y, u;  // the same line, counted in the band and in the tile
    Acc weight;
  };
  torch::stable::parallel_for(0, planes * bands, 1, [&](int64_t begin, int64_t end) {
    constexpr bool in_place = std::is_same_v<Store, Acc>;  // sum in the output itself
    std::vector<Acc> buffer(in_place ? 0 : band * W);
    std::vector<Line> lines;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / bands, y0 = task % bands * band, y1 = std::min(H, y0 + band);
      Store* result = to + (plane * H + y0) * W;
      Acc* sums = buffer.data();
      if constexpr (in_place) {
        sums = result;
      }
      std::fill(sums, sums + (y1 - y0) * W, Acc(0));
      for (int64_t i = 0; i < rows; ++i) {
        lines.clear();
        for (int64_t y = y0; y < y1; ++y) {
          const int64_t u = y >= down.starts[i] ? y - down.starts[i] : y - down.starts[i] + H;
          if (u >= down.first[i] && u < down.last[i]) {
            lines.push_back({y - y0, u, down.weights[i * h + u]});
          }
        }
        for (int64_t j = 0; j < columns && !lines.empty(); ++j) {
          const Store* tile = from + (grid[i * columns + j] * planes + plane) * h * w;
          const Acc* weights = &across.weights[j * w];
          const int64_t start = across.starts[j], first = across.first[j], last = across.last[j];
          // Columns first..wrap lie left of where the canvas wraps, wrap..last right of it.
          const int64_t wrap = std::min(std::max(first, W - start), last);
          for (const Line& line : lines) {
            const Store* row = tile + line.u * w;
            Acc* sum = sums + line.y * W;
            accumulate(
                F{}, sum + start + first, weights + first, line.weight, row + first, wrap - first);
            if (wrap < last) {
              accumulate(
                  F{}, sum + start + wrap - W, weights + wrap, line.weight, row + wrap,
                  last - wrap);
            }
          }
        }
      }
      if constexpr (!in_place) {
        store(F{}, result, sums, (y1 - y0) * W);
      }
    }
  });
}

}  // namespace

Tensor blend_tiles_cpu(
    const Tensor& tiles_in, const Tensor& offsets_in, int64_t H, int64_t W, std::string window,
    int64_t ramp) {
  STD_TORCH_CHECK(tiles_in.dim() == 4, "tiles must be [T * B, C, h, w]");
  STD_TORCH_CHECK(
      window == "mean" || window == "gaussian" || window == "ramp",
      "window must be mean, gaussian or ramp, got ", window);
  STD_TORCH_CHECK(ramp >= 1, "ramp must be at least 1, got ", ramp);
  const int64_t h = tiles_in.size(2), w = tiles_in.size(3);
  STD_TORCH_CHECK(
      h >= 1 && h <= H && w >= 1 && w <= W,
      "tile ", h, " x ", w, " does not fit the canvas ", H, " x ", W);
  const Tensor tiles = torch::stable::contiguous(tiles_in);
  const Tensor offsets = checked_offsets(offsets_in, H, W);
  STD_TORCH_CHECK(
      tiles.size(0) % offsets.size(0) == 0,
      tiles.size(0), " tiles cannot be shared by ", offsets.size(0), " offsets");
  Tensor out = torch::stable::new_empty(
      tiles, {tiles.size(0) / offsets.size(0), tiles.size(1), H, W});
  switch (tiles.scalar_type()) {
    case ScalarType::Float:
      blend<F32>(tiles, offsets, out, window, ramp);
      break;
    case ScalarType::Double:
      blend<F64>(tiles, offsets, out, window, ramp);
      break;
    case ScalarType::Half:
      blend<F16>(tiles, offsets, out, window, ramp);
      break;
    case ScalarType::BFloat16:
      blend<BF16>(tiles, offsets, out, window, ramp);
      break;
    default:
      STD_TORCH_CHECK(false, "tiles must be float16, bfloat16, float32 or float64");
  }
  return out;
}

}  // namespace tiledcore

STABLE_TORCH_LIBRARY_IMPL(tiledcore, CPU, m) {
  m.impl("blend_tiles_native", TORCH_BOX(&tiledcore::blend_tiles_cpu));
}
