// Registers csrc/blend_tiles.cu as the CUDA implementation of tiledcore::blend_tiles_native.
#include "blend_tiles.h"
#include "common.h"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <string>

namespace tiledcore {

Tensor blend_tiles_cuda(
    const Tensor& tiles_in, const Tensor& offsets_in, int64_t H, int64_t W, std::string window,
    int64_t ramp) {
  STD_TORCH_CHECK(tiles_in.dim() == 4, "tiles must be [T * B, C, h, w]");
  STD_TORCH_CHECK(
      offsets_in.is_cuda() && offsets_in.get_device_index() == tiles_in.get_device_index() &&
          offsets_in.dim() == 2 && offsets_in.size(1) == 2 && offsets_in.size(0) > 0 &&
          offsets_in.scalar_type() == ScalarType::Int,
      "offsets must be an int32 tensor [T, 2] on the tiles' device with T >= 1");
  STD_TORCH_CHECK(ramp >= 1, "ramp must be at least 1, got ", ramp);
  const int64_t T = offsets_in.size(0), h = tiles_in.size(2), w = tiles_in.size(3);
  STD_TORCH_CHECK(
      h >= 1 && h <= H && w >= 1 && w <= W,
      "tile ", h, " x ", w, " does not fit the canvas ", H, " x ", W);
  STD_TORCH_CHECK(tiles_in.size(0) % T == 0, "tiles cannot be shared by ", T, " offsets");
  const int64_t B = tiles_in.size(0) / T, C = tiles_in.size(1);
  STD_TORCH_CHECK(
      std::max({T, H, W, B * C}) <= LIMIT, "more than ", LIMIT, " tiles, pixels a side or planes");

  const torch::stable::accelerator::DeviceGuard guard(tiles_in.get_device_index());
  const Tensor tiles = torch::stable::contiguous(tiles_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  Tensor out = torch::stable::new_empty(tiles, {B, C, H, W});
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tiles.get_device_index(), &stream));

  Element element = Element::f32;
  switch (tiles.scalar_type()) {
    case ScalarType::Half:
      element = Element::f16;
      break;
    case ScalarType::BFloat16:
      element = Element::bf16;
      break;
    case ScalarType::Float:
      break;
    case ScalarType::Double:
      element = Element::f64;
      break;
    default:
      STD_TORCH_CHECK(false, "tiles must be float16, bfloat16, float32 or float64");
  }
  STD_TORCH_CHECK(
      window == "mean" || window == "gaussian" || window == "ramp",
      "window must be mean, gaussian or ramp, got ", window);
  const Window which = window == "mean"       ? Window::mean
                       : window == "gaussian" ? Window::gaussian
                                              : Window::ramp;
  const auto narrow = [](int64_t n) { return static_cast<int32_t>(n); };
  const Blend blend{
      tiles.const_data_ptr(),
      static_cast<const int32_t*>(offsets.const_data_ptr()),
      out.mutable_data_ptr(),
      narrow(T),
      narrow(B * C),
      narrow(H),
      narrow(W),
      narrow(h),
      narrow(w),
      narrow(std::min(ramp, LIMIT))};
  const cudaError_t error =
      launch_blend_tiles(blend, element, which, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "blend_tiles: ", cudaGetErrorString(error));
  return out;
}

}  // namespace tiledcore

STABLE_TORCH_LIBRARY_IMPL(tiledcore, CUDA, m) {
  m.impl("blend_tiles_native", TORCH_BOX(&tiledcore::blend_tiles_cuda));
}
