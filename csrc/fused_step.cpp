// CPU implementation of tiledcore::fused_step.
//
// Works on one band of canvas rows at a time: the guided predictions of the tiles are summed in the
// cache as in blend_tiles, then the band of every state slot is read once, combined and written once.
// A value is only overwritten after everything that depends on it is computed, so the update is in
// place.
#include "blend_axis.h"

#include <array>
#include <optional>

namespace tiledcore {
namespace {

constexpr int64_t MAX_SLOTS = 8;
constexpr int64_t CHUNK = 1024;  // new values of a chunk stay in L1 until the last one is computed

// Blending is linear, so guidance can be applied before it: one sum instead of two.
template <typename F>
inline __attribute__((always_inline)) void accumulate_guided_row(
    typename F::Acc* __restrict acc, const typename F::Acc* __restrict weights,
    typename F::Acc scale, const typename F::Store* __restrict uncond,
    const typename F::Store* __restrict cond, typename F::Acc guidance, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const typename F::Acc u = F::widen(uncond[i]);
    acc[i] += (scale * weights[i]) * (u + guidance * (F::widen(cond[i]) - u));
  }
}

// For one tile as large as the canvas: its weight is 1 everywhere, and nothing is summed.
template <typename F>
inline __attribute__((always_inline)) void guide_row(
    typename F::Acc* __restrict out, const typename F::Store* __restrict uncond,
    const typename F::Store* __restrict cond, typename F::Acc guidance, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const typename F::Acc u = F::widen(uncond[i]);
    out[i] = u + guidance * (F::widen(cond[i]) - u);
  }
}

template <typename F>
inline __attribute__((always_inline)) void widen_row(
    typename F::Acc* __restrict out, const typename F::Store* __restrict row, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = F::widen(row[i]);
  }
}

template <typename F>
inline __attribute__((always_inline)) void scale_row(
    typename F::Store* __restrict out, const typename F::Acc* __restrict in,
    typename F::Acc scale, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = F::narrow(scale * in[i]);
  }
}

constexpr int64_t FUSED_TERMS = 4;  // summed in one pass, so that `out` may be one of the inputs

template <int TERMS, typename Acc>
inline __attribute__((always_inline)) void combine_row(
    Acc* out, const Acc* const* in, const Acc* c, int64_t n) {
  std::array<const Acc*, TERMS> from;
  std::array<Acc, TERMS> by;
  for (int k = 0; k < TERMS; ++k) {
    from[k] = in[k];
    by[k] = c[k];
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    Acc sum = by[0] * from[0][i];
    for (int k = 1; k < TERMS; ++k) {
      sum += by[k] * from[k][i];
    }
    out[i] = sum;
  }
}

template <typename Acc>
inline __attribute__((always_inline)) void combine_rows(
    Acc* out, const Acc* const* in, const Acc* c, int64_t terms, int64_t n) {
  switch (terms) {
    case 0:
      std::fill(out, out + n, Acc(0));
      return;
    case 1:
      return combine_row<1>(out, in, c, n);
    case 2:
      return combine_row<2>(out, in, c, n);
    case 3:
      return combine_row<3>(out, in, c, n);
    default:
      combine_row<FUSED_TERMS>(out, in, c, n);
  }
  for (int64_t k = FUSED_TERMS; k < terms; ++k) {
    const Acc* from = in[k];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      out[i] += c[k] * from[i];
    }
  }
}

// target_clones does not work on templates, so there are overloads.
#define TILEDCORE_DTYPE_LOOPS(F)                                                                \
  TILEDCORE_CLONES void accumulate_guided(                                                      \
      F, F::Acc* acc, const F::Acc* weights, F::Acc scale, const F::Store* uncond,              \
      const F::Store* cond, F::Acc guidance, int64_t n) {                                       \
    accumulate_guided_row<F>(acc, weights, scale, uncond, cond, guidance, n);                   \
  }                                                                                             \
  TILEDCORE_CLONES void guide(                                                                  \
      F, F::Acc* out, const F::Store* uncond, const F::Store* cond, F::Acc guidance, int64_t n) { \
    guide_row<F>(out, uncond, cond, guidance, n);                                               \
  }                                                                                             \
  TILEDCORE_CLONES void widen(F, F::Acc* out, const F::Store* row, int64_t n) {                 \
    widen_row<F>(out, row, n);                                                                  \
  }                                                                                             \
  TILEDCORE_CLONES void store_scaled(                                                           \
      F, F::Store* out, const F::Acc* in, F::Acc scale, int64_t n) {                            \
    scale_row<F>(out, in, scale, n);                                                            \
  }
TILEDCORE_DTYPE_LOOPS(F32)
TILEDCORE_DTYPE_LOOPS(F64)
TILEDCORE_DTYPE_LOOPS(F16)
TILEDCORE_DTYPE_LOOPS(BF16)
#undef TILEDCORE_DTYPE_LOOPS

TILEDCORE_CLONES void combine(
    float* out, const float* const* in, const float* c, int64_t terms, int64_t n) {
  combine_rows<float>(out, in, c, terms, n);
}

TILEDCORE_CLONES void combine(
    double* out, const double* const* in, const double* c, int64_t terms, int64_t n) {
  combine_rows<double>(out, in, c, terms, n);
}

// One slot that this evaluation writes: the inputs with a weight, and these weights.
template <typename Acc>
struct Row {
  int64_t slot, terms = 0;
  std::array<int64_t, MAX_SLOTS + 2> input;  // a slot, S for the prediction, S + 1 for the noise
  std::array<Acc, MAX_SLOTS + 2> coefficient;
};

template <typename Acc>
std::vector<Row<Acc>> written_rows(const Acc* table, int64_t slots) {
  std::vector<Row<Acc>> rows;
  for (int64_t s = 0; s < slots; ++s) {
    const Acc* line = table + s * (slots + 2);
    Row<Acc> row{s};
    for (int64_t j = 0; j < slots + 2; ++j) {
      if (line[j] != 0) {
        row.input[row.terms] = j;
        row.coefficient[row.terms++] = line[j];
      }
    }
    const bool untouched = row.terms == 1 && row.input[0] == s && row.coefficient[0] == 1;
    if (!untouched) {
      rows.push_back(row);
    }
  }
  return rows;
}

struct Arguments {
  Tensor tiles, offsets, state, table, input_scale, step, model_input;
  std::optional<Tensor> guidance_scale, noise;
  std::string window;
  int64_t ramp;
};

template <typename Acc>
const Acc* optional_data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const Acc*>(tensor->const_data_ptr()) : nullptr;
}

template <typename F>
void run(const Arguments& a) {
  using Acc = typename F::Acc;
  using Store = typename F::Store;
  const int64_t S = a.state.size(0), B = a.state.size(1), C = a.state.size(2), planes = B * C;
  const int64_t H = a.state.size(3), W = a.state.size(4), h = a.tiles.size(2), w = a.tiles.size(3);
  const int64_t evaluations = a.table.size(0), T = a.offsets.size(0);
  const int64_t at_step = *a.step.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(
      at_step >= 0 && at_step < evaluations, "step is ", at_step, ", but the table has ",
      evaluations, " evaluations");
  const Acc* table = static_cast<const Acc*>(a.table.const_data_ptr());
  const std::vector<Row<Acc>> rows = written_rows(table + at_step * S * (S + 2), S);
  const auto uses = [&](int64_t input) {
    return std::any_of(rows.begin(), rows.end(), [&](const Row<Acc>& row) {
      const auto end = row.input.begin() + row.terms;
      return std::find(row.input.begin(), end, input) != end;
    });
  };
  const bool uses_prediction = uses(S);
  STD_TORCH_CHECK(!uses(S + 1) || a.noise, "evaluation ", at_step, " needs noise");

  const Plan<Acc> plan = make_plan<Acc>(a.offsets, H, W, h, w, a.window, a.ramp);
  const Store* tiles = static_cast<const Store*>(a.tiles.const_data_ptr());
  Acc* state = static_cast<Acc*>(a.state.mutable_data_ptr());
  Store* model_input = static_cast<Store*>(a.model_input.mutable_data_ptr());
  const Acc input_scale = static_cast<const Acc*>(a.input_scale.const_data_ptr())[at_step + 1];
  const Acc* noise = optional_data<Acc>(a.noise);
  const Acc* guidance = optional_data<Acc>(a.guidance_scale);
  const int64_t halves = guidance ? 2 : 1;
  const int64_t guidance_stride = guidance && a.guidance_scale->size(0) > 1 ? 1 : 0;

  // A tile as large as the canvas is read in order anyway, so its band can be small and stay in L1.
  const bool unmoved = plan.down.starts[0] == 0 && plan.across.starts[0] == 0;
  const bool whole = T == 1 && h == H && w == W && unmoved;
  const int64_t band = std::clamp<int64_t>((whole ? CHUNK : BAND_ELEMENTS) / W, 1, H);
  const int64_t bands = (H + band - 1) / band;
  torch::stable::parallel_for(0, planes * bands, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> sums(band * W), fresh(rows.size() * CHUNK);
    std::array<const Acc*, MAX_SLOTS + 2> in;
    std::array<Acc, MAX_SLOTS + 2> by;
    std::array<Acc*, MAX_SLOTS> out;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / bands, y0 = task % bands * band, y1 = std::min(H, y0 + band);
      const int64_t image = plane / C, size = (y1 - y0) * W;
      if (uses_prediction && whole) {
        const Store* row = tiles + (plane * H + y0) * W;
        if (guidance) {
          const Acc scale = guidance[image * guidance_stride];
          guide(F{}, sums.data(), row, row + planes * H * W, scale, size);
        } else {
          widen(F{}, sums.data(), row, size);
        }
      } else if (uses_prediction) {
        std::fill(sums.begin(), sums.begin() + size, Acc(0));
        const Acc scale = guidance ? guidance[image * guidance_stride] : Acc(0);
        sum_band(
            plan, y0, y1, sums.data(),
            [&](Acc* sum, const Acc* weights, Acc by, int64_t tile, int64_t at, int64_t n) {
              const Store* row = tiles + (tile * halves * planes + plane) * h * w + at;
              if (guidance) {
                accumulate_guided(F{}, sum, weights, by, row, row + planes * h * w, scale, n);
              } else {
                accumulate(F{}, sum, weights, by, row, n);
              }
            });
      }
      for (int64_t start = 0; start < size; start += CHUNK) {
        const int64_t n = std::min(CHUNK, size - start);
        const int64_t pixel = (plane * H + y0) * W + start;
        const auto source = [&](int64_t input) -> const Acc* {
          return input == S       ? sums.data() + start
                 : input == S + 1 ? noise + pixel
                                  : state + input * planes * H * W + pixel;
        };
        const Acc* newest = source(0);
        for (size_t r = 0; r < rows.size(); ++r) {
          const Row<Acc>& row = rows[r];
          for (int64_t k = 0; k < row.terms; ++k) {
            in[k] = source(row.input[k]);
            by[k] = row.coefficient[k];
          }
          // No later row reads the slot of the last row.
          const bool direct = r + 1 == rows.size() && row.terms <= FUSED_TERMS;
          out[r] = direct ? state + row.slot * planes * H * W + pixel : &fresh[r * CHUNK];
          combine(out[r], in.data(), by.data(), row.terms, n);
          newest = row.slot == 0 ? out[r] : newest;
        }
        store_scaled(F{}, model_input + pixel, newest, input_scale, n);
        for (size_t r = 0; r < rows.size(); ++r) {
          Acc* slot = state + rows[r].slot * planes * H * W + pixel;
          if (out[r] != slot) {
            std::copy_n(out[r], n, slot);
          }
        }
      }
    }
  });
}

void check(
    const char* name, const Tensor& tensor, ScalarType dtype, const std::vector<int64_t>& shape) {
  bool same = tensor.is_cpu() && tensor.scalar_type() == dtype &&
              tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) {
    same = tensor.size(i) == shape[i];
  }
  STD_TORCH_CHECK(same, name, " has not the dtype or the shape that the other arguments ask for");
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

}  // namespace

void fused_step_cpu(
    const Tensor& tiles, const Tensor& offsets, Tensor state, const Tensor& table,
    const Tensor& input_scale, const Tensor& step, Tensor model_input,
    std::optional<Tensor> guidance_scale, std::optional<Tensor> noise,
    std::string window, int64_t ramp) {
  STD_TORCH_CHECK(
      tiles.dim() == 4 && state.dim() == 5 && table.dim() == 3,
      "tiles must be [T * G * B, C, h, w], state [S, B, C, H, W] and table [n, S, S + 2]");
  STD_TORCH_CHECK(
      window == "mean" || window == "gaussian" || window == "ramp",
      "window must be mean, gaussian or ramp, got ", window);
  STD_TORCH_CHECK(ramp >= 1, "ramp must be at least 1, got ", ramp);
  const int64_t S = state.size(0), B = state.size(1), C = state.size(2);
  const int64_t H = state.size(3), W = state.size(4), h = tiles.size(2), w = tiles.size(3);
  STD_TORCH_CHECK(S >= 1 && S <= MAX_SLOTS, "state must have 1 to 8 slots, got ", S);
  STD_TORCH_CHECK(
      h >= 1 && h <= H && w >= 1 && w <= W,
      "tile ", h, " x ", w, " does not fit the canvas ", H, " x ", W);
  STD_TORCH_CHECK(
      state.is_contiguous() && model_input.is_contiguous(),
      "state and model_input must be contiguous");
  const ScalarType type =
      tiles.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Arguments a{
      torch::stable::contiguous(tiles), checked_offsets(offsets, H, W), state,
      torch::stable::contiguous(table), torch::stable::contiguous(input_scale), step, model_input,
      contiguous(guidance_scale), contiguous(noise), window, ramp};
  const int64_t halves = guidance_scale ? 2 : 1;
  const int64_t count = product("tiles times batch", {a.offsets.size(0), halves, B});
  check("tiles", tiles, tiles.scalar_type(), {count, C, h, w});
  check("state", state, type, {S, B, C, H, W});
  check("table", table, type, {table.size(0), S, S + 2});
  check("input_scale", input_scale, type, {table.size(0) + 1});
  check("step", step, ScalarType::Long, {1});
  check("model_input", model_input, tiles.scalar_type(), {B, C, H, W});
  if (guidance_scale) {
    check("guidance_scale", *guidance_scale, type, {guidance_scale->size(0) == 1 ? 1 : B});
  }
  if (noise) {
    check("noise", *noise, type, {B, C, H, W});
  }
  if (state.numel() == 0) {
    return;
  }
  switch (tiles.scalar_type()) {
    case ScalarType::Float:
      return run<F32>(a);
    case ScalarType::Double:
      return run<F64>(a);
    case ScalarType::Half:
      return run<F16>(a);
    case ScalarType::BFloat16:
      return run<BF16>(a);
    default:
      STD_TORCH_CHECK(false, "tiles must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace tiledcore

STABLE_TORCH_LIBRARY_IMPL(tiledcore, CPU, m) {
  m.impl("fused_step_native", TORCH_BOX(&tiledcore::fused_step_cpu));
}
