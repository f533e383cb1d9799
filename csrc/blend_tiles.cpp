// CPU implementation of tiledcore::blend_tiles in gather form.
//
// One band of output rows is accumulated in the cache and stored once, while the rows of the tiles
// are read one after the other; see blend_axis.h.
#include "blend_axis.h"

namespace tiledcore {
namespace {

template <typename F>
inline __attribute__((always_inline)) void store_row(
    typename F::Store* __restrict out, const typename F::Acc* __restrict acc, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = F::narrow(acc[i]);
  }
}

// target_clones does not work on templates, so there is one overload per dtype.
#define TILEDCORE_ROW_LOOPS(F)                                                                  \
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
  const int64_t planes = out.size(0) * out.size(1);
  const int64_t H = out.size(2), W = out.size(3), h = tiles.size(2), w = tiles.size(3);
  const Plan<Acc> plan = make_plan<Acc>(offsets, H, W, h, w, window, ramp);
  const Store* from = static_cast<const Store*>(tiles.const_data_ptr());
  Store* to = static_cast<Store*>(out.mutable_data_ptr());
  const int64_t band = std::clamp<int64_t>(BAND_ELEMENTS / W, 1, H);
  const int64_t bands = (H + band - 1) / band;
  torch::stable::parallel_for(0, planes * bands, 1, [&](int64_t begin, int64_t end) {
    constexpr bool in_place = std::is_same_v<Store, Acc>;  // sum in the output itself
    std::vector<Acc> buffer(in_place ? 0 : band * W);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / bands, y0 = task % bands * band, y1 = std::min(H, y0 + band);
      Store* result = to + (plane * H + y0) * W;
      Acc* sums = buffer.data();
      if constexpr (in_place) {
        sums = result;
      }
      std::fill(sums, sums + (y1 - y0) * W, Acc(0));
      sum_band(
          plan, y0, y1, sums,
          [&](Acc* sum, const Acc* weights, Acc scale, int64_t tile, int64_t at, int64_t n) {
            accumulate(F{}, sum, weights, scale, from + (tile * planes + plane) * h * w + at, n);
          });
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
  const int64_t B = tiles.size(0) / offsets.size(0), C = tiles.size(1);
  product("the canvas", {B, C, H, W});
  Tensor out = torch::stable::new_empty(tiles, {B, C, H, W});
  if (out.numel() == 0) {
    return out;
  }
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
