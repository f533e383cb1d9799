// CPU implementation of tiledcore::gather_tiles: each row of a tile is one or two calls of memcpy.
#include "common.h"

#include <algorithm>
#include <cstring>

namespace tiledcore {

Tensor gather_tiles_cpu(
    const Tensor& canvas_in, const Tensor& offsets_in, int64_t h, int64_t w) {
  STD_TORCH_CHECK(canvas_in.dim() == 4, "canvas must be [B, C, H, W]");
  const int64_t B = canvas_in.size(0), C = canvas_in.size(1);
  const int64_t H = canvas_in.size(2), W = canvas_in.size(3);
  STD_TORCH_CHECK(
      h >= 1 && h <= H && w >= 1 && w <= W,
      "tile ", h, " x ", w, " does not fit the canvas ", H, " x ", W);
  const Tensor canvas = torch::stable::contiguous(canvas_in);
  const Tensor offsets = checked_offsets(offsets_in, H, W);
  const int64_t T = offsets.size(0);
  Tensor out =
      torch::stable::new_empty(canvas, {product("tiles times batch", {T, B}), C, h, w});
  if (out.numel() == 0) {
    return out;
  }
  const int64_t planes = B * C;

  const int32_t* at = offsets.const_data_ptr<int32_t>();
  const char* from = static_cast<const char*>(canvas.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t size = static_cast<int64_t>(canvas.element_size());

  // One index is one plane of one tile. A thread should get at least about 64 KiB of work.
  const int64_t grain = std::max<int64_t>(1, 65536 / (h * w * size));
  torch::stable::parallel_for(0, T * planes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y0 = at[2 * (i / planes)], x0 = at[2 * (i / planes) + 1];
      const int64_t before = std::min(w, W - x0);  // columns before the canvas wraps
      const char* plane = from + (i % planes) * H * W * size;
      char* row = to + i * h * w * size;
      for (int64_t u = 0; u < h; ++u, row += w * size) {
        const int64_t y = y0 + u < H ? y0 + u : y0 + u - H;
        std::memcpy(row, plane + (y * W + x0) * size, before * size);
        std::memcpy(row + before * size, plane + y * W * size, (w - before) * size);
      }
    }
  });
  return out;
}

}  // namespace tiledcore

STABLE_TORCH_LIBRARY_IMPL(tiledcore, CPU, m) {
  m.impl("gather_tiles_native", TORCH_BOX(&tiledcore::gather_tiles_cpu));
}
