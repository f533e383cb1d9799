// Shared code of all ops: argument checks, and the macro that compiles a loop for several CPUs.
//
// Built on PyTorch's stable ABI only: one binary works with every torch from 2.10 on. The Python side
// (tiledcore/ops/) owns the schemas and has the helpful error messages; the checks here only prevent
// a direct call of the raw op from accessing memory outside of its tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>

// Baseline machine code plus clones that the loader selects by CPU: unlike -march=native, a wheel
// built here runs anywhere and still uses the wide registers of the CPU that it runs on. Clones need
// the GNU dynamic loader's ifunc; elsewhere only the baseline is compiled.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define TILEDCORE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TILEDCORE_CLONES
#endif

namespace tiledcore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The product of sizes that a caller chose; an error if it does not fit 64 bits. Torch checks the
// sizes of tensors itself, but an overflowed product could equal a tensor's size, for example 0.
inline int64_t product(const char* name, std::initializer_list<int64_t> sizes) {
  int64_t result = 1;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(!__builtin_mul_overflow(result, size, &result), name, " does not fit 64 bits");
  }
  return result;
}

// Offsets as contiguous pairs (y, x), all of them on the canvas.
inline Tensor checked_offsets(const Tensor& offsets, int64_t height, int64_t width) {
  STD_TORCH_CHECK(
      offsets.is_cpu() && offsets.dim() == 2 && offsets.size(1) == 2 && offsets.size(0) > 0 &&
          offsets.scalar_type() == ScalarType::Int,
      "offsets must be an int32 tensor [T, 2] on the CPU with T >= 1");
  Tensor pairs = torch::stable::contiguous(offsets);
  const int32_t* at = pairs.const_data_ptr<int32_t>();
  for (int64_t t = 0; t < pairs.size(0); ++t) {
    const int64_t y = at[2 * t], x = at[2 * t + 1];
    STD_TORCH_CHECK(
        y >= 0 && y < height && x >= 0 && x < width,
        "offset (", y, ", ", x, ") of tile ", t, " is not on the canvas ", height, " x ", width);
  }
  return pairs;
}

}  // namespace tiledcore
