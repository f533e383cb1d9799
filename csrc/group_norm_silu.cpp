// CPU implementation of tiledcore::group_norm_silu: one pass, each element read once and written once.
//
// The planes of a channel must be contiguous, but batches and channels may have any stride: input and
// output can be bands of rows of larger tensors, without a copy.
#include "blend_axis.h"

#include <array>

namespace tiledcore {
namespace {

// e^-v as 2^(-v log2 e), accurate to a few units in the last place, and limited to normal numbers:
// beyond these, v / (1 + e^-v) is 0 or v up to rounding anyway. NaN stays NaN.
inline __attribute__((always_inline)) float exp_of_negative(float v) {
  float x = v * -1.44269504f;
  x = x < -126.0f ? -126.0f : x;
  x = x > 126.0f ? 126.0f : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  const float shifted = x + 12582912.0f;
  const float f = x - (shifted - 12582912.0f);  // -1/2 to 1/2
  float y = 1.5403530e-4f;  // Taylor series of exp(f * ln 2)
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  return y * bits_to_float((float_to_bits(shifted) + 127) << 23);
}

inline __attribute__((always_inline)) double exp_of_negative(double v) { return std::exp(-v); }

template <typename F>
inline __attribute__((always_inline)) void plane(
    typename F::Store* out, const typename F::Store* in, typename F::Acc mean,
    typename F::Acc scale, typename F::Acc bias, bool silu, int64_t n) {
  using Acc = typename F::Acc;
  if (silu) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Acc v = (F::widen(in[i]) - mean) * scale + bias;
      out[i] = F::narrow(v / (Acc(1) + exp_of_negative(v)));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      out[i] = F::narrow((F::widen(in[i]) - mean) * scale + bias);
    }
  }
}

// target_clones does not work on templates, so there are overloads.
#define TILEDCORE_PLANE(F)                                                                     \
  TILEDCORE_CLONES void normalize(                                                             \
      F, F::Store* out, const F::Store* in, F::Acc mean, F::Acc scale, F::Acc bias, bool silu, \
      int64_t n) {                                                                             \
    plane<F>(out, in, mean, scale, bias, silu, n);                                             \
  }
TILEDCORE_PLANE(F32)
TILEDCORE_PLANE(F64)
TILEDCORE_PLANE(F16)
TILEDCORE_PLANE(BF16)
#undef TILEDCORE_PLANE

constexpr int64_t CHUNK = 16384;  // elements per task: enough work to use a thread

template <typename F>
void run(
    const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
    const Tensor& bias, bool silu, Tensor& out) {
  using Acc = typename F::Acc;
  using Store = typename F::Store;
  const int64_t C = x.size(1), groups = mean.size(1), n = x.size(2) * x.size(3);
  const int64_t chunks = (n + CHUNK - 1) / CHUNK;
  const Store* from = static_cast<const Store*>(x.const_data_ptr());
  Store* to = static_cast<Store*>(out.mutable_data_ptr());
  const Acc* m = static_cast<const Acc*>(mean.const_data_ptr());
  const Acc* r = static_cast<const Acc*>(rstd.const_data_ptr());
  const Store* w = static_cast<const Store*>(weight.const_data_ptr());
  const Store* b = static_cast<const Store*>(bias.const_data_ptr());
  const std::array<int64_t, 4> strides{x.stride(0), x.stride(1), out.stride(0), out.stride(1)};
  torch::stable::parallel_for(
      0, x.size(0) * C * chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t image = task / chunks / C, c = task / chunks % C, at = task % chunks * CHUNK;
          const int64_t group = image * groups + c / (C / groups);
          normalize(
              F{}, to + image * strides[2] + c * strides[3] + at,
              from + image * strides[0] + c * strides[1] + at, m[group], r[group] * F::widen(w[c]),
              F::widen(b[c]), silu, std::min(CHUNK, n - at));
        }
      });
}

void check(const char* name, const Tensor& tensor, ScalarType type, const std::vector<int64_t>& shape) {
  bool fits = tensor.is_cpu() && tensor.scalar_type() == type &&
      tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    fits = tensor.size(i) == shape[i];
  }
  STD_TORCH_CHECK(fits, name, " has another shape, dtype or device than the rest calls for");
}

void check_planes(const char* name, const Tensor& tensor) {
  // The stride of a dimension of size 1 may have any value.
  STD_TORCH_CHECK(
      (tensor.size(3) == 1 || tensor.stride(3) == 1) &&
          (tensor.size(2) == 1 || tensor.stride(2) == tensor.size(3)),
      name, " must have contiguous planes");
}

}  // namespace

void group_norm_silu_cpu(
    const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
    const Tensor& bias, bool silu, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu() && mean.dim() == 2, "x must be [B, C, H, W], mean [B, G]");
  const int64_t B = x.size(0), C = x.size(1), groups = mean.size(1);
  STD_TORCH_CHECK(groups > 0 && C % groups == 0, C, " channels are no multiple of ", groups, " groups");
  const ScalarType type = x.scalar_type();
  const ScalarType exact = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check("out", out, type, {B, C, x.size(2), x.size(3)});
  check("mean", mean, exact, {B, groups});
  check("rstd", rstd, exact, {B, groups});
  check("weight", weight, type, {C});
  check("bias", bias, type, {C});
  STD_TORCH_CHECK(
      mean.is_contiguous() && rstd.is_contiguous() && weight.is_contiguous() && bias.is_contiguous(),
      "mean, rstd, weight and bias must be contiguous");
  if (x.numel() == 0) {
    return;
  }
  check_planes("x", x);
  check_planes("out", out);
  switch (type) {
    case ScalarType::Float:
      return run<F32>(x, mean, rstd, weight, bias, silu, out);
    case ScalarType::Double:
      return run<F64>(x, mean, rstd, weight, bias, silu, out);
    case ScalarType::Half:
      return run<F16>(x, mean, rstd, weight, bias, silu, out);
    case ScalarType::BFloat16:
      return run<BF16>(x, mean, rstd, weight, bias, silu, out);
    default:
      STD_TORCH_CHECK(false, "x must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace tiledcore

STABLE_TORCH_LIBRARY_IMPL(tiledcore, CPU, m) {
  m.impl("group_norm_silu_native", TORCH_BOX(&tiledcore::group_norm_silu_cpu));
}
