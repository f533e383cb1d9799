// CPU implementation of tiledcore::neighbor_attention: blocked online softmax (Milakov and Gimelshein
// 2018; Dao 2022).
//
// One task is a chunk of one tile's queries for one head. It loops over the tile's window in blocks of
// keys, packs each block into panels that the inner loop reads in order, and keeps a running maximum,
// sum and weighted values per query. So each thread needs a fixed amount of scratch memory, and inputs
// are read in place by their strides. All arithmetic is float32.
#include "blend_axis.h"

#include <limits>
#include <memory>
#include <new>
#include <optional>

namespace tiledcore {
namespace {

constexpr int64_t QUERIES = 480;  // per chunk; queries and sums with D = 64 take 240 KiB of L2
constexpr int64_t KEYS = 64;      // per block; its keys and values with D = 64 take 32 KiB

// A tensor [B, tokens, heads, D] whose last dimension is contiguous; strides in elements.
struct Strided {
  const void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

// One tile on one axis, and its window: `window` positions from `first` on, modulo the canvas size.
struct Span {
  int64_t start, extent, first, window;
};

struct Problem {
  Strided q, k, v, global_q, global_k, global_v;
  void* out;  // [B, H * W, heads, D], contiguous
  int64_t B, H, W, heads, D, G;
  double scale;
};

// Queries begin..begin + count of a tile, in row-major order.
struct Task {
  int64_t b, h, begin, count;
  Span down, across;

  int64_t query(const Problem& p, int64_t i) const {
    const int64_t at = begin + i;
    return (down.start + at / across.extent) * p.W + across.start + at % across.extent;
  }

  int64_t key(const Problem& p, int64_t j) const {
    const int64_t y = down.first + j / across.window, x = across.first + j % across.window;
    return (y < p.H ? y : y - p.H) * p.W + (x < p.W ? x : x - p.W);
  }
};

// Some keys and values of one head.
struct Block {
  const void *k, *v;
  int64_t k_token, v_token;
  const int64_t* tokens;
  int64_t count;
};

// Scratch memory of one thread.
struct Scratch {
  float *queries, *sums, *highest, *total, *keys, *values, *scores;
};

}  // namespace
}  // namespace tiledcore

#define TILEDCORE_ISA baseline
#define TILEDCORE_TARGET
#define TILEDCORE_LANES 4
#if defined(__aarch64__)
#define TILEDCORE_ROWS 8
#else
#define TILEDCORE_ROWS 5
#endif
#include "neighbor_attention.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define TILEDCORE_X86
#define TILEDCORE_ISA avx2
#define TILEDCORE_TARGET __attribute__((target("avx2,fma")))
#define TILEDCORE_LANES 8
#define TILEDCORE_ROWS 6
#include "neighbor_attention.h"

#define TILEDCORE_ISA avx512
#define TILEDCORE_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define TILEDCORE_LANES 16
#define TILEDCORE_ROWS 12
#include "neighbor_attention.h"
#endif

namespace tiledcore {
namespace {

constexpr int64_t MOST_LANES = 16;

template <typename F>
using Attend = void (*)(const Problem&, const Task&, Scratch&);

template <typename F>
Attend<F> best() {
#ifdef TILEDCORE_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512::attend<F>;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::attend<F>;
  }
#endif
  return baseline::attend<F>;
}

// All tiles have the length `tile`, except the last one, which may be shorter.
std::vector<Span> spans(int64_t size, int64_t tile, int64_t halo, bool wrap) {
  tile = std::min(tile, size);
  halo = std::min(halo, size);
  std::vector<Span> result;
  for (int64_t start = 0; start < size; start += tile) {
    const int64_t extent = std::min(tile, size - start);
    int64_t low = start - halo, high = start + extent + halo;
    if (!wrap || high - low >= size) {  // a key that is reached from both sides counts once
      low = wrap ? 0 : std::max<int64_t>(low, 0);
      high = wrap ? size : std::min(high, size);
    }
    result.push_back({start, extent, low < 0 ? low + size : low, high - low});
  }
  return result;
}

template <typename F>
void run(const Problem& p, const std::vector<Span>& down, const std::vector<Span>& across) {
  std::vector<Task> tasks;  // of one head of one batch entry
  for (const Span& y : down) {
    for (const Span& x : across) {
      const int64_t all = y.extent * x.extent;
      // Chunks of equal size: two of 300 instead of 480 and 120.
      const int64_t chunks = (all + QUERIES - 1) / QUERIES, each = (all + chunks - 1) / chunks;
      for (int64_t begin = 0; begin < all; begin += each) {
        tasks.push_back({0, 0, begin, std::min(each, all - begin), y, x});
      }
    }
  }
  const Attend<F> attend = best<F>();
  const int64_t D = p.D, depth = (D + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
  const int64_t count = static_cast<int64_t>(tasks.size());
  torch::stable::parallel_for(0, p.B * count * p.heads, 1, [&](int64_t begin, int64_t end) {
    const int64_t sizes[] = {QUERIES * D, QUERIES * depth, QUERIES, QUERIES, KEYS * D,
                             KEYS * depth, 16 * KEYS};
    int64_t total = 0;
    for (const int64_t size : sizes) {
      total += (size + 15) / 16 * 16;
    }
    constexpr std::align_val_t line{64};
    const auto release = [](float* memory) { operator delete(memory, line); };
    std::unique_ptr<float, decltype(release)> memory(
        static_cast<float*>(operator new(total * sizeof(float), line)), release);
    float* at[7] = {memory.get()};
    for (int i = 1; i < 7; ++i) {
      at[i] = at[i - 1] + (sizes[i - 1] + 15) / 16 * 16;
    }
    Scratch scratch{at[0], at[1], at[2], at[3], at[4], at[5], at[6]};
    for (int64_t i = begin; i < end; ++i) {
      Task task = tasks[i / p.heads % count];
      task.b = i / p.heads / count;
      task.h = i % p.heads;
      attend(p, task, scratch);
    }
  });
}

Strided strided(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The tensor, or a copy if its last dimension is not contiguous; checks dtype, heads and D against q.
Tensor checked(const char* name, const Tensor& tensor, const Tensor& q, int64_t tokens) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.dim() == 4 && tensor.scalar_type() == q.scalar_type() &&
          tensor.size(0) == q.size(0) && tensor.size(1) == tokens &&
          tensor.size(2) == q.size(2) && tensor.size(3) == q.size(3),
      name, " must be [B, ", tokens, ", heads, D] on the CPU, as q in dtype, batch, heads and D");
  return tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace

Tensor neighbor_attention_cpu(
    const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, std::optional<Tensor> global_q_in,
    std::optional<Tensor> global_k_in, std::optional<Tensor> global_v_in,
    std::vector<int64_t> canvas, std::vector<int64_t> tile, std::vector<int64_t> halo,
    std::vector<bool> wrap, double scale) {
  STD_TORCH_CHECK(
      canvas.size() == 2 && tile.size() == 2 && halo.size() == 2 && wrap.size() == 2 &&
          canvas[0] >= 1 && canvas[1] >= 1 && tile[0] >= 1 && tile[1] >= 1 && halo[0] >= 0 &&
          halo[1] >= 0,
      "canvas, tile, halo and wrap must be pairs; canvas and tile at least 1, halo at least 0");
  STD_TORCH_CHECK(q_in.dim() == 4, "q must be [B, H * W, heads, D]");
  STD_TORCH_CHECK(
      global_k_in.has_value() == global_v_in.has_value(), "global_k and global_v need each other");
  const int64_t N = product("canvas", {canvas[0], canvas[1]});
  const Tensor q = checked("q", q_in, q_in, N), k = checked("k", k_in, q, N);
  const Tensor v = checked("v", v_in, q, N);
  STD_TORCH_CHECK(
      q.size(0) >= 1 && q.size(2) >= 1 && q.size(3) >= 1, "q must have no dimension 0");
  Tensor out = torch::stable::new_empty(q, {q.size(0), N, q.size(2), q.size(3)});
  Problem p{strided(q), strided(k), strided(v), {}, {}, {}, out.mutable_data_ptr(),
            q.size(0), canvas[0], canvas[1], q.size(2), q.size(3), 0, scale};
  std::optional<Tensor> global_q, global_k, global_v;  // keep copies alive
  if (global_k_in.has_value()) {
    p.G = global_k_in->size(1);
    global_k = checked("global_k", *global_k_in, q, p.G);
    global_v = checked("global_v", *global_v_in, q, p.G);
    p.global_k = strided(*global_k);
    p.global_v = strided(*global_v);
    if (global_q_in.has_value()) {
      global_q = checked("global_q", *global_q_in, q, N);
      p.global_q = strided(*global_q);
    }
  }
  const std::vector<Span> down = spans(p.H, tile[0], halo[0], wrap[0]);
  const std::vector<Span> across = spans(p.W, tile[1], halo[1], wrap[1]);
  switch (q.scalar_type()) {
    case ScalarType::Float:
      run<F32>(p, down, across);
      break;
    case ScalarType::Half:
      run<F16>(p, down, across);
      break;
    case ScalarType::BFloat16:
      run<BF16>(p, down, across);
      break;
    default:
      STD_TORCH_CHECK(false, "q must be float16, bfloat16 or float32");
  }
  return out;
}

}  // namespace tiledcore

STABLE_TORCH_LIBRARY_IMPL(tiledcore, CPU, m) {
  m.impl("neighbor_attention_native", TORCH_BOX(&tiledcore::neighbor_attention_cpu));
}
